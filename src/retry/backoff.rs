//! Schedules of delays.

use std::time::Duration;

use crate::random::SplitMix64;

/// A schedule of delays: how long to wait before each re-run of one call.
///
/// A schedule only says *how long*. Whether a re-run is safe is decided before it is asked, and the deadline and the
/// number of attempts of the [`RetryPolicy`] hold whatever it says: it can stop a call, and it cannot prolong one.
///
/// Every iterator of [`Duration`]s is a schedule, those of the `backon` crate among them.
///
/// ```
/// use std::time::Duration;
/// use tokio_postgres_failover::{Backoff, RetryPolicy};
///
/// /// Twice quickly, then once a second for as long as the deadline allows.
/// struct Patient(u32);
///
/// impl Backoff for Patient {
///     fn next_delay(&mut self) -> Option<Duration> {
///         self.0 += 1;
///         Some(Duration::from_millis(if self.0 <= 2 { 20 } else { 1000 }))
///     }
/// }
///
/// let own = RetryPolicy::new().schedule(|| Patient(0));
/// let iterator = RetryPolicy::new().schedule(|| [10, 50, 250].map(Duration::from_millis).into_iter());
/// # let _ = (own, iterator);
/// ```
pub trait Backoff: Send {
    /// The wait before the next re-run; `None` ends the call with the error of its last attempt.
    ///
    /// Asked once per failed attempt, on one call's own schedule, so the state in `self` is that call's alone.
    fn next_delay(&mut self) -> Option<Duration>;
}

impl<I: Iterator<Item = Duration> + Send> Backoff for I {
    fn next_delay(&mut self) -> Option<Duration> {
        self.next()
    }
}

/// Delays that grow by a factor up to a limit, and never end: the schedule a [`RetryPolicy`] uses by itself.
///
/// Named here for those who build a schedule of their own on top of it, as an iterator:
///
/// ```
/// use std::time::Duration;
/// use tokio_postgres_failover::{Exponential, RetryPolicy};
///
/// let delays = Exponential::new(Duration::from_millis(10), 2.0, Duration::from_millis(50));
/// let millis: Vec<_> = delays.take(4).map(|delay| delay.as_millis()).collect();
/// assert_eq!(millis, [10, 20, 40, 50]);
///
/// // The first re-run at once, then as usual.
/// let policy = RetryPolicy::new().schedule(|| {
///     let later = Exponential::new(Duration::from_millis(10), 2.0, Duration::from_secs(1)).jitter(7);
///     std::iter::once(Duration::ZERO).chain(later)
/// });
/// # let _ = policy;
/// ```
#[derive(Clone, Debug)]
pub struct Exponential {
    next: Duration,
    factor: f64,
    max: Duration,
    jitter: Option<SplitMix64>,
}

impl Exponential {
    /// `initial`, then each delay `factor` times the one before, none longer than `max`; no jitter.
    ///
    /// A factor below 1 (or no number at all) counts as 1: every delay is `initial`.
    #[must_use]
    pub fn new(initial: Duration, factor: f64, max: Duration) -> Self {
        Self { next: initial.min(max), factor: factor.max(1.0), max, jitter: None }
    }

    /// Makes each delay a random one between zero and what it would have been ("full jitter"), drawn from `seed`.
    ///
    /// After an outage many calls wait at once; with jitter they come back spread out and not in waves. That needs
    /// another seed for each of them: the same seed gives the same delays.
    #[must_use]
    pub fn jitter(mut self, seed: u64) -> Self {
        self.jitter = Some(SplitMix64::new(seed));
        self
    }
}

impl Iterator for Exponential {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let delay = self.next;
        // Out of range means "longer than any limit", however the multiplication came to that.
        self.next = Duration::try_from_secs_f64(delay.as_secs_f64() * self.factor).unwrap_or(self.max).min(self.max);
        Some(match &mut self.jitter {
            Some(generator) => generator.up_to(delay),
            None => delay,
        })
    }
}
