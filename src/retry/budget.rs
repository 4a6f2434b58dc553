//! The bound on the re-runs of all calls of a pool together.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::Instant;

use crate::sync::lock;

/// A bound on the re-runs of all calls of one pool together, so that an outage does not multiply the load.
///
/// It is a bucket of tokens. A re-run takes one; `per_second` of them flow back, a call that succeeds puts back a
/// fraction of one ([`ratio`](Self::ratio)), and it holds `burst` at most. When it is empty a re-run is not refused
/// but waits for its turn; only a call whose turn would come after its deadline ends, with its last error. First runs
/// take no token, so a healthy pool never notices the budget.
///
/// Clones share one bucket: give the same budget to several pools to bound them together.
///
/// Default: 200 at once, then 500 per second. With these, 2,000 calls that fail in the same instant all run again
/// within four seconds.
///
/// ```
/// use tokio_postgres_failover::RetryBudget;
///
/// // A small server: after an outage, at most 20 re-runs at once and then 10 per second.
/// let budget = RetryBudget::new(20, 10).ratio(0.1);
/// # let _ = budget;
/// ```
#[derive(Clone, Debug)]
pub struct RetryBudget {
    ratio: f64,
    /// `None` has no limit.
    bucket: Option<Arc<Mutex<Bucket>>>,
}

#[derive(Debug)]
struct Bucket {
    burst: f64,
    per_second: f64,
    /// Below zero by as many as are promised to calls that wait.
    tokens: f64,
    /// Up to when the flow of tokens is counted in.
    counted_to: Option<Instant>,
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self::new(200, 500)
    }
}

impl RetryBudget {
    /// A full bucket of `burst` tokens, into which `per_second` of them flow back.
    ///
    /// With `per_second` zero, re-runs beyond `burst` are earned by successes alone.
    #[must_use]
    pub fn new(burst: u32, per_second: u32) -> Self {
        let burst = f64::from(burst);
        Self {
            ratio: 0.2,
            bucket: Some(Arc::new(Mutex::new(Bucket {
                burst,
                per_second: f64::from(per_second),
                tokens: burst,
                counted_to: None,
            }))),
        }
    }

    /// Every re-run is granted at once: only each call's own delays hold it back.
    #[must_use]
    pub fn unlimited() -> Self {
        Self { ratio: 0.0, bucket: None }
    }

    /// Tokens put back by a call that succeeds. Default: 0.2, so that a fifth of the traffic may be re-runs.
    ///
    /// A negative value or one that is no number counts as 0.
    #[must_use]
    pub fn ratio(mut self, ratio: f64) -> Self {
        self.ratio = ratio.max(0.0);
        self
    }

    /// Takes a token for a re-run at `now`, one yet to come if need be, and tells how long until it is there.
    pub(crate) fn withdraw(&self, now: Instant) -> Duration {
        let Some(mut bucket) = self.lock() else {
            return Duration::ZERO;
        };
        let before = bucket.counted_to.unwrap_or(now);
        let flowed = now.saturating_duration_since(before).as_secs_f64() * bucket.per_second;
        bucket.add(flowed);
        // Calls read the clock before they get here, so an earlier `now` may come later.
        bucket.counted_to = Some(before.max(now));
        bucket.tokens -= 1.0;
        if bucket.tokens >= 0.0 {
            return Duration::ZERO;
        }
        // Nothing flows in: no number of seconds is enough.
        Duration::try_from_secs_f64(-bucket.tokens / bucket.per_second).unwrap_or(Duration::MAX)
    }

    /// A call succeeded.
    pub(crate) fn deposit(&self) {
        if let Some(mut bucket) = self.lock() {
            bucket.add(self.ratio);
        }
    }

    /// Gives back a token of [`withdraw`](Self::withdraw) that is not used after all.
    pub(crate) fn refund(&self) {
        if let Some(mut bucket) = self.lock() {
            bucket.add(1.0);
        }
    }

    fn lock(&self) -> Option<MutexGuard<'_, Bucket>> {
        Some(lock(self.bucket.as_ref()?))
    }
}

impl Bucket {
    fn add(&mut self, tokens: f64) {
        self.tokens = (self.tokens + tokens).min(self.burst);
    }
}
