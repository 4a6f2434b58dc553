//! The schedules of delays between the attempts of one call.

use std::time::Duration;

use crate::random::SplitMix64;

/// A schedule of delays: how long to wait before each re-run of one call.
///
/// A schedule only says *how long*. Whether a re-run is safe is decided before the schedule is asked. The deadline and
/// the number of attempts of the [`RetryPolicy`](crate::RetryPolicy) hold in any case, so a schedule can stop a call
/// but cannot prolong it.
///
/// Every iterator of [`Duration`]s is a schedule. Those of the `backon` crate are such iterators.
///
/// ```
/// use std::time::Duration;
/// use tokio_postgres_failover::RetryPolicy;
/// use tokio_postgres_failover::retry::Backoff;
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
    /// It is asked once after each failed attempt. Each call has a schedule of its own, so the state in `self` belongs
    /// to one call.
    fn next_delay(&mut self) -> Option<Duration>;
}

impl<I: Iterator<Item = Duration> + Send> Backoff for I {
    fn next_delay(&mut self) -> Option<Duration> {
        self.next()
    }
}

/// Delays that grow by a factor up to a limit and never end. It is the default schedule of a
/// [`RetryPolicy`](crate::RetryPolicy).
///
/// It is public for schedules that are built on top of it, as an iterator:
///
/// ```
/// use std::time::Duration;
/// use tokio_postgres_failover::RetryPolicy;
/// use tokio_postgres_failover::retry::Exponential;
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
    /// Starts with `initial`. Each further delay is `factor` times the one before, and none is longer than `max`. There
    /// is no jitter.
    ///
    /// A factor below 1, or one that is not a number, counts as 1, so that every delay is `initial`.
    #[must_use]
    pub fn new(initial: Duration, factor: f64, max: Duration) -> Self {
        Self { next: initial.min(max), factor: factor.max(1.0), max, jitter: None }
    }

    /// Draws each delay at random, between zero and the delay without jitter ("full jitter"). `seed` starts the random
    /// numbers.
    ///
    /// After an outage many calls wait at the same time. With jitter they come back spread out and not in waves. Each
    /// call needs a seed of its own for that, because the same seed gives the same delays.
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
        // A product that is out of range is longer than any limit, so the limit counts.
        self.next = Duration::try_from_secs_f64(delay.as_secs_f64() * self.factor).unwrap_or(self.max).min(self.max);
        Some(match &mut self.jitter {
            Some(generator) => generator.up_to(delay),
            None => delay,
        })
    }
}
