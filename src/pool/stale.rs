//! Tests connections that have been idle for a while before they are handed out. Their socket may have died without a
//! sign, because a machine was suspended, or a router forgot it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::connection::Connection;
use super::dialer::Dialer;
use super::dials::Dials;
use crate::server::{SessionClient, wall_clock};
use crate::topology::Suspicion;

/// The time limit for an idle session's answer, which takes a round trip. A slower one is closed, and another one is
/// used.
const ANSWER_WITHIN: Duration = Duration::from_millis(500);
/// A caller that gives up after this time has shown that there is no answer.
const SILENT_AFTER: Duration = Duration::from_millis(50);

/// The silence from which a connection is tested.
#[derive(Clone, Copy, Debug)]
pub(super) struct TestAfter {
    milliseconds: u64,
}

impl TestAfter {
    pub(super) fn new(idle_for: Duration) -> Self {
        Self { milliseconds: u64::try_from(idle_for.as_millis()).unwrap_or(u64::MAX) }
    }

    /// Measures by the wall clock, as the monotonic clock of Linux stops while a machine is suspended. If the wall
    /// clock was set back, the idle time is unknown, so the test is due.
    fn is_due(self, heard_at: u64, now: u64) -> bool {
        self.milliseconds != u64::MAX
            && heard_at != 0
            && now.checked_sub(heard_at).is_none_or(|idle| idle >= self.milliseconds)
    }
}

impl<C: SessionClient> Dialer<C> {
    /// The connection may have been given back with something under way that its driver has not seen yet, and it may have been
    /// ready, or on loan without being used, for so long that its socket is dead.
    pub(super) async fn is_fit(&self, connection: &Connection<C>) -> bool {
        connection.idle().await && self.is_alive(connection).await
    }

    /// Returns whether the connection may be handed out. Asks its server where it has said nothing for a while.
    pub(super) async fn is_alive(&self, connection: &Connection<C>) -> bool {
        let heard_at = connection.facts().notices.activity.heard_at();
        if !self.test_after.is_due(heard_at, wall_clock()) {
            return true;
        }
        let mut asked = Asked { dials: &self.dials, heard_at, since: Instant::now(), alive: None };
        let alive = matches!(timeout(ANSWER_WITHIN, connection.check_connection()).await, Ok(Ok(())));
        asked.alive = Some(alive);
        drop(asked);
        if !alive {
            tracing::debug!("an idle connection gave no answer within {ANSWER_WITHIN:?}; it is closed");
            // The pool's own session may be dead too.
            self.cluster.suspect(connection.facts().generation, Suspicion::Connection);
        }
        alive
    }
}

/// A test under way. If it fails, all connections that have been idle for as long are closed, so that the next caller
/// does not wait for each of them.
struct Asked<'a, C: SessionClient> {
    dials: &'a Arc<Dials<C>>,
    heard_at: u64,
    since: Instant,
    alive: Option<bool>,
}

impl<C: SessionClient> Drop for Asked<'_, C> {
    fn drop(&mut self) {
        let silent = || self.since.elapsed() >= SILENT_AFTER;
        if self.alive.map_or_else(silent, |alive| !alive) {
            self.dials.close_idle_since(self.heard_at);
        }
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
