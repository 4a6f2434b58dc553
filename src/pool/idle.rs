//! Keeps the right number of connections idle: closes connections that have been idle for too long, and opens
//! `min_idle` in advance.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::time::Duration;

use deadpool::managed::{self, WeakPool};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::Manager;
use super::dialer::Dialer;
use crate::cluster::Snapshot;
use crate::server::SessionClient;

/// Shortest and longest pause between two checks of the idle connections.
const REAP_PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(30));
/// The pause before the next attempt if a server accepted no session and no caller waits for one.
const FILL_AGAIN: Duration = Duration::from_secs(5);

/// How many connections may be idle, and for how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Idle {
    pub(super) timeout: Duration,
    pub(super) min: usize,
}

/// What the task that keeps the idle connections needs. The task keeps neither the pool nor the dialer alive.
pub(super) struct IdleTask<C: SessionClient> {
    pub(super) idle: Idle,
    pub(super) pool: WeakPool<Manager<C>>,
    pub(super) dialer: Weak<Dialer<C>>,
    /// The snapshots show the generation that connections belong to. The views would be too early: each is published a
    /// moment before its generation.
    pub(super) snapshots: watch::Receiver<Arc<Snapshot<C>>>,
    pub(super) end: CancellationToken,
}

/// The task ends with the pool, or with its runtime. A runtime that ends wakes nobody, so this wakes the callers on
/// other runtimes that wait for a slot.
impl<C: SessionClient> Drop for IdleTask<C> {
    fn drop(&mut self) {
        let (Some(pool), Some(dialer)) = (self.pool.upgrade(), self.dialer.upgrade()) else { return };
        dialer.cluster.runtime_ends();
        pool.close();
    }
}

impl<C: SessionClient> IdleTask<C> {
    /// Runs until the pool is gone.
    pub(super) async fn run(mut self) {
        let upgraded = self.dialer.upgrade().map(|dialer| (Arc::clone(&dialer.queue), dialer.cluster.ask_idle()));
        let Some((queue, ask_idle)) = upgraded else { return };
        let pause = (self.idle.timeout / 4).clamp(REAP_PAUSE.0, REAP_PAUSE.1);
        let mut reap_at = Instant::now() + pause;
        let mut fill_at = None;
        loop {
            let wake_at = fill_at.map_or(reap_at, |fill_at: Instant| fill_at.min(reap_at));
            let reap = tokio::select! {
                () = self.end.cancelled() => return,
                () = queue.changed() => false,
                () = ask_idle.notified() => {
                    if let Some(dialer) = self.dialer.upgrade() {
                        dialer.ask_idle();
                    }
                    continue;
                }
                // Connections of an older generation are useless now, so close them.
                changed = self.snapshots.changed() => match changed {
                    Ok(()) => true,
                    Err(_) => return,
                },
                () = sleep_until(wake_at) => reap_at <= Instant::now(),
            };
            let (Some(pool), Some(dialer)) = (self.pool.upgrade(), self.dialer.upgrade()) else { return };
            if reap {
                reap_at = Instant::now() + pause;
                // The program's log may panic. This task must go on, because callers wait for the dials that it starts.
                let _ = catch_unwind(AssertUnwindSafe(|| self.idle.reap(&pool, &dialer)));
            }
            // A connection may have come back while its primary was suspended, and a caller that waits for a dial may
            // not have noticed that it is the primary again.
            queue.offer_idle();
            fill_at = self.idle.fill(&pool, &dialer);
        }
    }
}

impl Idle {
    /// Closes unusable connections, and those that have been idle for too long.
    fn reap<C: SessionClient>(self, pool: &managed::Pool<Manager<C>>, dialer: &Dialer<C>) {
        let idle = pool.status().available + dialer.queue.ready();
        let mut surplus = idle.saturating_sub(self.min);
        let mut reaped = dialer.queue.reap(&dialer.cluster, self.timeout, &mut surplus);
        let retained = pool.retain(|connection, _| {
            let reap = connection.stale(&dialer.cluster) || (surplus > 0 && connection.idle_for() >= self.timeout);
            surplus = surplus.saturating_sub(usize::from(reap));
            !reap
        });
        reaped += retained.removed.len();
        if reaped > 0 {
            tracing::debug!(closed = reaped, idle = retained.retained, "idle connections reaped");
        }
    }

    /// Starts the dials that waiters and `min_idle` need. Returns when to try again if the server accepts no session.
    fn fill<C: SessionClient>(self, pool: &managed::Pool<Manager<C>>, dialer: &Arc<Dialer<C>>) -> Option<Instant> {
        // This many connections must be ready, or be opened in advance, so that `min` are idle. Doubted connections
        // count as idle, because they may be good.
        let ahead = self.min.saturating_sub(pool.status().available + dialer.queue.doubted());
        let failed_at = dialer.cluster.current().and_then(|generation| dialer.queue.failed_at(generation.primary.id));
        let again = failed_at.map(|failed_at| failed_at + FILL_AGAIN);
        let wait = again.filter(|again| dialer.ahead() < ahead && *again > Instant::now());
        dialer.balance(if wait.is_some() { 0 } else { ahead });
        wait
    }
}
