//! When an idle connection is tested before it is handed out.

use std::time::Duration;

/// How long a connection's server must have been silent before the connection is tested.
#[derive(Clone, Copy, Debug)]
pub(super) struct TestAfter {
    milliseconds: u64,
}

impl TestAfter {
    pub(super) fn new(idle_for: Duration) -> Self {
        Self { milliseconds: u64::try_from(idle_for.as_millis()).unwrap_or(u64::MAX) }
    }

    /// Returns whether the test is due. Measures by the wall clock, because the monotonic clock of Linux stops while a
    /// machine is suspended. If the wall clock was set back, the idle time is unknown, and the test is due.
    pub(super) fn is_due(self, heard_at: u64, now: u64) -> bool {
        self.milliseconds != u64::MAX
            && heard_at != 0
            && now.checked_sub(heard_at).is_none_or(|idle| idle >= self.milliseconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_silent_for_long_is_tested() {
        let after = TestAfter::new(Duration::from_secs(1));
        for (heard_at, now, due) in [
            (10_000, 10_000, false),
            (10_000, 10_999, false),
            (10_000, 11_000, true),
            (10_000, 99_000, true),
            // The clock was set back.
            (10_000, 9_999, true),
            // No traffic is counted on this one.
            (0, 99_000, false),
        ] {
            assert_eq!(after.is_due(heard_at, now), due, "{heard_at} {now}");
        }
        assert!(!TestAfter::new(Duration::MAX).is_due(1, u64::MAX), "never");
        assert!(TestAfter::new(Duration::ZERO).is_due(1, 1), "always");
    }
}
