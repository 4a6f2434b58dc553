//! Reports callers that wait long for a connection, and connections that are held for long, with the place in the code
//! where they were taken.
//!
//! Nothing is watched unless a limit is set. The tests are in `tests/it/checkout/loans.rs`.

use std::panic::Location;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};

use super::Pool;
use crate::observe::Observer;
use crate::server::SessionClient;
use crate::sync::{lock, log_safely};

/// Where a caller asked for a connection.
pub(crate) type CallSite = &'static Location<'static>;

/// A slow checkout is reported at most once in this time, because in an outage every checkout is slow.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// The limits above which waits for a checkout, and checkouts, are reported. `None`: never.
#[derive(Debug, Default)]
pub(super) struct CheckoutLimits {
    pub(super) slow_checkout_after: Option<Duration>,
    pub(super) leak_after: Option<Duration>,
    /// When a slow checkout was last reported, and how many were not reported since.
    told: Mutex<(Option<Instant>, u64)>,
}

impl CheckoutLimits {
    pub(super) fn new(slow_checkout_after: Option<Duration>, leak_after: Option<Duration>) -> Self {
        Self { slow_checkout_after, leak_after, told: Mutex::default() }
    }

    /// Counts a slow checkout. If it is to be reported, returns how many were not reported since the last one.
    fn tells(&self, now: Instant) -> Option<u64> {
        let mut told = lock(&self.told);
        if told.0.is_some_and(|last| now.saturating_duration_since(last) < TELL_EVERY) {
            told.1 += 1;
            return None;
        }
        let untold = told.1;
        *told = (Some(now), 0);
        Some(untold)
    }
}

/// Watches one checkout until it ends.
pub(super) struct CheckoutWatch {
    task: AbortHandle,
    since: Instant,
    told: Arc<AtomicBool>,
    place: CallSite,
}

impl Drop for CheckoutWatch {
    fn drop(&mut self) {
        self.task.abort();
        if self.told.load(Ordering::Acquire) {
            log_safely(|| Observer::long_checkout_ended(self.since.elapsed(), self.place));
        }
    }
}

impl<C: SessionClient> Pool<C> {
    /// Reports the wait of a caller, whether or not it has got a connection, if the wait was long enough.
    pub(super) fn waited(&self, began: Instant, place: CallSite) {
        let Some(limit) = self.shared.calls.reports.slow_checkout_after else { return };
        let now = Instant::now();
        let waited = now.saturating_duration_since(began);
        if waited < limit {
            return;
        }
        if let Some(untold) = self.shared.calls.reports.tells(now) {
            self.observer().slow_checkout(waited, untold, place);
        }
    }

    /// Watches a checkout, if a limit is set.
    pub(super) fn watch_checkout(&self, place: CallSite) -> Option<CheckoutWatch> {
        let limit = self.shared.calls.reports.leak_after?;
        let since = Instant::now();
        let (told, tell) = (Arc::new(AtomicBool::new(false)), Arc::clone(self.cluster().observer()));
        let watched = Arc::clone(&told);
        let task = self.runtime().spawn(async move {
            sleep(limit).await;
            watched.store(true, Ordering::Release);
            tell.long_checkout(since.elapsed(), place);
        });
        Some(CheckoutWatch { task: task.abort_handle(), since, told, place })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn slow_checkouts_are_told_once_a_second() {
        let limits = CheckoutLimits::default();
        let now = Instant::now();
        assert_eq!(limits.tells(now), Some(0));
        for _ in 0..5 {
            assert_eq!(limits.tells(now + TELL_EVERY / 2), None);
        }
        assert_eq!(limits.tells(now + TELL_EVERY), Some(5));
        assert_eq!(limits.tells(now + TELL_EVERY * 3), Some(0));
    }
}
