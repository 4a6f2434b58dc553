//! Extensions of a [`RetryPolicy`]: schedules of your own, a budget for all re-runs of a pool, and the failed attempt
//! that a hook gets.
//!
//! The presets of [`RetryPolicy`] need none of these.

// Decides when failed work runs again: the schedule of delays, the deadline, the number of attempts and the budget.
//
// This module does not know whether a re-run is safe, and it reads no clock: the time is an argument. It names the
// public error only for the user's hooks, and decides nothing by it. `retry/policy.rs` has the settings,
// `retry/backoff.rs` the schedules, `retry/budget.rs` the bound of a whole pool, and `retry/hooks.rs` what the user
// adds.
//
// Invariants: a delay never reaches beyond the deadline. No setting and no length of an outage causes a panic or an
// overflow. In any time `t`, the budget grants at most `burst + per_second × t + ratio × successes` re-runs without a
// wait. Tests: `retry/tests.rs`, by property.

mod backoff;
mod budget;
#[cfg(feature = "backoff")]
mod compat;
mod hooks;
pub(crate) mod policy;

pub use backoff::{Backoff, Exponential};
pub use budget::RetryBudget;
pub use hooks::Retry;
pub(crate) use policy::RetryPolicy;

use std::fmt;
use std::time::Duration;

use tokio::time::Instant;

/// The longest wait and the most distant deadline, about thirty years. Longer settings count as this one, because
/// points in time and the timers of some platforms overflow beyond it.
pub(crate) const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);

/// One call under a [`RetryPolicy`]: which attempt it makes now, and how long it may go on.
pub(crate) struct Retries {
    schedule: Box<dyn Backoff>,
    began: Instant,
    deadline: Instant,
    attempt: u32,
    attempts: Option<u32>,
    /// When the current attempt failed, if its failure was noticed before its outcome was known.
    failed_at: Option<Instant>,
}

impl Retries {
    /// The moment at which the call is over.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// How long the call may take, from its beginning.
    pub(crate) fn limit(&self) -> Duration {
        self.deadline.saturating_duration_since(self.began)
    }

    /// The number of the current attempt. The first is 1.
    pub(crate) fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Notes that the current attempt failed at this moment. Its delay is counted from here, even if [`Self::next`] is
    /// asked later.
    pub(crate) fn failed(&mut self, at: Instant) {
        self.failed_at = Some(at);
    }

    /// Says how long to wait before the next attempt, or why there is none. The current attempt has failed at `now`,
    /// unless [`Self::failed`] gave an earlier moment.
    ///
    /// On `Ok` one token of `budget` is used up. On `Err` no token is used up.
    pub(crate) fn next(&mut self, now: Instant, budget: &RetryBudget) -> Result<Duration, GiveUp> {
        if self.attempts.is_some_and(|limit| self.attempt >= limit) {
            return Err(GiveUp::Attempts(self.attempt));
        }
        let passed = self.failed_at.take().map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let delay = self.schedule.next_delay().ok_or(GiveUp::Schedule)?.saturating_sub(passed);
        // `>=`, because an attempt that starts at the deadline has no time left.
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
    /// The number of attempts that the policy allows (this many) is used up.
    Attempts(u32),
    /// The next delay would reach the deadline.
    Deadline,
    /// The user's schedule ended.
    Schedule,
    /// The budget of the pool grants no re-run before the deadline.
    Budget,
    /// The user's hook stopped the call.
    Hook,
}

impl GiveUp {
    /// Says why, in the words of an error. `limit` is the [`deadline`](RetryPolicy::deadline) of the policy.
    pub(crate) fn explain(self, limit: Duration) -> String {
        match self {
            Self::Attempts(1) => "the policy allows one attempt (attempts)".to_owned(),
            Self::Attempts(count) => format!("the policy allows {count} attempts (attempts)"),
            Self::Deadline => {
                format!("another attempt would begin after the policy's deadline of {limit:?} (deadline)")
            }
            Self::Schedule => "the retry schedule has ended (schedule)".to_owned(),
            Self::Budget => {
                format!("the retry budget grants no attempt before the policy's deadline of {limit:?} (retry_budget)")
            }
            Self::Hook => "the policy's on_retry said stop".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests;
