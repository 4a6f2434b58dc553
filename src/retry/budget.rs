//! The bound on the re-runs of all calls of one pool together.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::Instant;

use crate::sync::lock;

/// A bound on the re-runs of all calls of one pool together, so that an outage does not multiply the load.
///
/// It is a bucket of tokens that holds at most `burst` of them. A re-run takes one token. `per_second` tokens flow back
/// each second, and a call that succeeds puts back a fraction of one ([`ratio`](Self::ratio)). When the bucket is
/// empty, a re-run is not refused but waits for its turn. A call ends with its last error only if its turn would come
/// after its deadline. First runs take no token, so the budget does not affect a healthy pool.
///
/// Clones share one bucket. Give the same budget to several pools to bound them together.
///
/// The default is 200 re-runs at once and then 500 per second. With it, 2,000 calls that fail in the same instant all
/// run again within four seconds.
///
/// ```
/// use tokio_postgres_failover::retry::RetryBudget;
///
/// // A small server: after an outage, at most 20 re-runs at once and then 10 per second.
/// let budget = RetryBudget::new(20, 10).ratio(0.1);
/// # let _ = budget;
/// ```
#[derive(Clone, Debug)]
pub struct RetryBudget {
    ratio: f64,
    /// `None` means that there is no limit.
    bucket: Option<Arc<Mutex<Bucket>>>,
}

#[derive(Debug)]
struct Bucket {
    burst: f64,
    per_second: f64,
    /// How many tokens are free. A negative number counts the tokens that are promised to waiting calls.
    tokens: f64,
    /// The moment up to which the flow of tokens is included in `tokens`.
    counted_to: Option<Instant>,
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self::new(200, 500)
    }
}

impl RetryBudget {
    /// A full bucket of `burst` tokens, into which `per_second` tokens flow back each second.
    ///
    /// If `per_second` is zero, only successful calls pay for re-runs beyond `burst`.
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

    /// Grants every re-run immediately. Only the delays of each call hold it back.
    #[must_use]
    pub fn unlimited() -> Self {
        Self { ratio: 0.0, bucket: None }
    }

    /// How many tokens a successful call puts back. Default: 0.2, so that re-runs may be a fifth of the traffic.
    ///
    /// A value that is negative or not a number counts as 0.
    #[must_use]
    pub fn ratio(mut self, ratio: f64) -> Self {
        self.ratio = ratio.max(0.0);
        self
    }

    /// Takes a token for a re-run at `now`, and returns how long the caller has to wait for it. If the bucket is empty,
    /// it takes a token that will flow in later.
    pub(crate) fn withdraw(&self, now: Instant) -> Duration {
        let Some(mut bucket) = self.lock() else {
            return Duration::ZERO;
        };
        let before = bucket.counted_to.unwrap_or(now);
        let flowed = now.saturating_duration_since(before).as_secs_f64() * bucket.per_second;
        bucket.add(flowed);
        // Calls read the clock before they lock the bucket, so `now` may be earlier than that of the call before.
        bucket.counted_to = Some(before.max(now));
        bucket.tokens -= 1.0;
        if bucket.tokens >= 0.0 {
            return Duration::ZERO;
        }
        // If nothing flows in, no number of seconds is enough.
        Duration::try_from_secs_f64(-bucket.tokens / bucket.per_second).unwrap_or(Duration::MAX)
    }

    /// Puts back the share of a call that succeeded.
    pub(crate) fn deposit(&self) {
        if let Some(mut bucket) = self.lock() {
            bucket.add(self.ratio);
        }
    }

    /// Gives back a token of [`withdraw`](Self::withdraw) that was not used in the end.
    pub(crate) fn refund(&self) {
        if let Some(mut bucket) = self.lock() {
            bucket.add(1.0);
        }
    }

    /// Holds a token of [`withdraw`](Self::withdraw) while its call waits for its turn.
    pub(crate) fn promised(&self) -> Promised<'_> {
        Promised(Some(self))
    }

    fn lock(&self) -> Option<MutexGuard<'_, Bucket>> {
        Some(lock(self.bucket.as_ref()?))
    }
}

/// A token whose call waits for its turn. It goes back if the call is dropped before.
#[derive(Debug)]
pub(crate) struct Promised<'a>(Option<&'a RetryBudget>);

impl Promised<'_> {
    pub(crate) fn spend(mut self) {
        self.0 = None;
    }
}

impl Drop for Promised<'_> {
    fn drop(&mut self) {
        if let Some(budget) = self.0 {
            budget.refund();
        }
    }
}

impl Bucket {
    fn add(&mut self, tokens: f64) {
        self.tokens = (self.tokens + tokens).min(self.burst);
    }
}
