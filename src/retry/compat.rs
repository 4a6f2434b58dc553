//! Lets a policy take its delays from a schedule of the `backoff` crate.
//!
//! It decides nothing, and does not use that crate's own retry loop, clock or error type. Invariant: the deadline and
//! the attempts of the policy hold as for any other schedule. Tests: at the end of this file.

use std::time::Duration;

use super::{Backoff, RetryPolicy};

struct Adapter<B>(B);

impl<B: backoff::backoff::Backoff + Send> Backoff for Adapter<B> {
    fn next_delay(&mut self) -> Option<Duration> {
        self.0.next_backoff()
    }
}

impl RetryPolicy {
    /// Takes the delays from a schedule of the `backoff` crate. `make` runs once for each call. Feature `backoff`.
    ///
    /// `backoff` is unmaintained ([RUSTSEC-2025-0012](https://rustsec.org/advisories/RUSTSEC-2025-0012)), and so is its
    /// dependency `instant` ([RUSTSEC-2024-0384](https://rustsec.org/advisories/RUSTSEC-2024-0384)). No fixed version
    /// exists, and `cargo deny` reports both by default. This method is for users whose schedules are built on that
    /// crate already. In new code use the policy's own settings, which cover what `ExponentialBackoff` does, or
    /// [`schedule`](Self::schedule) with an iterator of delays, such as those of the maintained `backon` crate.
    ///
    /// It takes any schedule of that crate, including your own types and a `Box<dyn Backoff + Send>`. It resets the
    /// schedule first, as that crate's own loop does. Like `schedule`, it replaces every setting except
    /// [`deadline`](Self::deadline) and [`attempts`](Self::attempts).
    ///
    /// `ExponentialBackoff` also has a limit of its own, `max_elapsed_time`, which is 15 minutes unless you change it.
    /// It is measured on the system's clock, which a paused clock of tokio does not stop.
    ///
    /// ```
    /// use std::time::Duration;
    /// use backoff::ExponentialBackoffBuilder;
    /// use tokio_postgres_failover::RetryPolicy;
    ///
    /// let policy = RetryPolicy::new().backoff(|| {
    ///     ExponentialBackoffBuilder::new().with_max_interval(Duration::from_secs(2)).build()
    /// });
    /// # let _ = policy;
    /// ```
    #[must_use]
    pub fn backoff<B>(self, make: impl Fn() -> B + Send + Sync + 'static) -> Self
    where
        B: backoff::backoff::Backoff + Send + 'static,
    {
        self.schedule(move || {
            let mut schedule = make();
            // That crate's own loop does the same. So a schedule that was used before, or a clone of one, starts from
            // the beginning.
            schedule.reset();
            Adapter(schedule)
        })
    }
}

#[cfg(test)]
mod tests {
    use backoff::ExponentialBackoffBuilder;
    use backoff::backoff::{Constant, Stop};
    use tokio::time::Instant;

    use super::super::{GiveUp, RetryBudget};
    use super::*;

    const DELAY: Duration = Duration::from_millis(20);

    fn delays(policy: &RetryPolicy) -> Vec<Result<Duration, GiveUp>> {
        let now = Instant::now();
        let mut retries = policy.start(now, 0);
        let budget = RetryBudget::unlimited();
        (0..4).map(|_| retries.next(now, &budget)).collect()
    }

    #[test]
    fn exponential_backoff_sets_the_delays() {
        let policy = RetryPolicy::new().backoff(|| {
            ExponentialBackoffBuilder::new()
                .with_initial_interval(DELAY)
                .with_multiplier(2.0)
                .with_randomization_factor(0.0)
                .with_max_interval(3 * DELAY)
                .build()
        });
        // Each call starts anew.
        for _ in 0..2 {
            assert_eq!(delays(&policy), [DELAY, 2 * DELAY, 3 * DELAY, 3 * DELAY].map(Ok));
        }
    }

    /// A schedule that was used before. So its clones were used before, too.
    #[derive(Clone)]
    struct Used(u32);

    impl backoff::backoff::Backoff for Used {
        fn reset(&mut self) {
            self.0 = 0;
        }

        fn next_backoff(&mut self) -> Option<Duration> {
            self.0 += 1;
            (self.0 <= 2).then_some(DELAY * self.0)
        }
    }

    #[test]
    fn each_call_starts_anew_whatever_is_made() {
        let used = Used(2);
        let policy = RetryPolicy::new().backoff(move || used.clone());
        let boxed = RetryPolicy::new().backoff(|| -> Box<dyn backoff::backoff::Backoff + Send> { Box::new(Used(9)) });
        for policy in [policy, boxed] {
            for _ in 0..2 {
                assert_eq!(delays(&policy)[..3], [Ok(DELAY), Ok(2 * DELAY), Err(GiveUp::Schedule)]);
            }
        }
    }

    #[test]
    fn deadline_and_attempts_hold() {
        let steady = RetryPolicy::new().backoff(|| Constant::new(DELAY));
        assert_eq!(delays(&steady.clone().attempts(2))[1], Err(GiveUp::Attempts(2)));
        assert_eq!(delays(&steady.deadline(DELAY))[0], Err(GiveUp::Deadline));
        assert_eq!(delays(&RetryPolicy::new().backoff(|| Stop {}))[0], Err(GiveUp::Schedule));
    }
}
