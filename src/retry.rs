//! Decides when failed work runs again: the schedule of delays, the deadline, the number of attempts, the budget.
//! Knows nothing of whether a re-run is safe, and of clocks: the time is an argument. It names the public error for
//! the user's hooks alone, and looks into none.
//! Invariants: a delay never reaches beyond the deadline; no setting and no length of an outage panics or overflows;
//! the budget grants at most `burst + per_second × t + ratio × successes` re-runs without a wait in any time `t`.
//! Tests: at the end of this file, by property.

mod backoff;
mod budget;
#[cfg(feature = "backoff")]
mod compat;
mod hooks;
mod policy;

pub use backoff::{Backoff, Exponential};
pub use budget::RetryBudget;
pub use hooks::Retry;
pub use policy::RetryPolicy;

use std::fmt;
use std::time::Duration;

use tokio::time::Instant;

/// The longest wait and the most distant deadline, about thirty years. Longer settings count as this one, because points
/// in time and the timers of some platforms overflow beyond it.
pub(crate) const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);

/// One call under a [`RetryPolicy`]: which attempt it is at, and until when it may go on.
pub(crate) struct Retries {
    schedule: Box<dyn Backoff>,
    began: Instant,
    deadline: Instant,
    attempt: u32,
    attempts: Option<u32>,
    /// When the attempt under way failed, if that was noticed before it was known what it had come to.
    failed_at: Option<Instant>,
}

impl Retries {
    /// The moment at which the call is over.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// The attempt under way; the first is 1.
    pub(crate) fn attempt(&self) -> u32 {
        self.attempt
    }

    /// The attempt under way failed at this moment; its delay is counted from here, whenever [`Self::next`] is asked.
    pub(crate) fn failed(&mut self, at: Instant) {
        self.failed_at = Some(at);
    }

    /// The attempt under way has failed, at `now` unless [`Self::failed`] said when: how long to wait before the next, or why
    /// there is none.
    ///
    /// A token taken from `budget` stays taken on `Ok`, and is given back on `Err`.
    pub(crate) fn next(&mut self, now: Instant, budget: &RetryBudget) -> Result<Duration, GiveUp> {
        if self.attempts.is_some_and(|limit| self.attempt >= limit) {
            return Err(GiveUp::Attempts(self.attempt));
        }
        let passed = self.failed_at.take().map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let delay = self.schedule.next_delay().ok_or(GiveUp::Schedule)?.saturating_sub(passed);
        // An attempt that starts at the deadline has no time left, so `>=`.
        let left = self.deadline.saturating_duration_since(now);
        if delay >= left {
            return Err(GiveUp::Deadline);
        }
        let wait = budget.withdraw(now);
        if wait >= left {
            budget.refund();
            return Err(GiveUp::Budget);
        }
        self.attempt = self.attempt.saturating_add(1);
        Ok(delay.max(wait))
    }
}

impl fmt::Debug for Retries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Retries")
            .field("deadline", &self.deadline)
            .field("attempt", &self.attempt)
            .field("attempts", &self.attempts)
            .finish_non_exhaustive()
    }
}

/// Why a call is not run again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GiveUp {
    /// The policy's number of attempts (this many) is used up.
    Attempts(u32),
    /// The next delay would reach the deadline.
    Deadline,
    /// The user's schedule ended.
    Schedule,
    /// The pool's budget has no re-run to give before the deadline.
    Budget,
    /// The user's hook said stop.
    Hook,
}

impl fmt::Display for GiveUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attempts(1) => f.write_str("the policy allows one attempt"),
            Self::Attempts(count) => write!(f, "the policy allows {count} attempts"),
            Self::Deadline => f.write_str("the deadline is reached before another attempt"),
            Self::Schedule => f.write_str("the retry schedule has ended"),
            Self::Budget => f.write_str("the retry budget grants no attempt before the deadline"),
            Self::Hook => f.write_str("the policy's on_retry said stop"),
        }
    }
}

#[cfg(test)]
mod tests;
