//! Decides which caller prunes a ledger, and when.

use std::collections::HashMap;
use std::sync::Mutex;

use tokio::time::Instant;

use super::Pool;
use crate::commit::Ledger;
use crate::server::SessionClient;
use crate::sync::lock;

/// One new pool in 64 prunes the ledger immediately; the others wait a random time.
const PRUNE_AT_ONCE: u64 = 64;

/// When each ledger is next pruned, by its name.
pub(super) type PruneAt = Mutex<HashMap<String, Instant>>;

impl<C: SessionClient> Pool<C> {
    /// Returns whether this caller must prune the ledger. Several times in the period for which a row is kept, this
    /// returns `true` to one caller.
    pub(crate) fn prunes(&self, ledger: &Ledger) -> bool {
        let (now, pause) = (Instant::now(), ledger.kept_for() / 8);
        let mut dates = lock(&self.shared.calls.prune_at);
        let date = dates.entry(ledger.path()).or_insert_with(|| {
            // Pools that start together must not prune at the same time. But short-lived pools must prune as well, so a
            // few prune immediately.
            let at_once = self.next_seed().is_multiple_of(PRUNE_AT_ONCE);
            if at_once { now } else { now + self.shared.dialer.random_up_to(pause) }
        });
        let due = *date <= now;
        if due {
            *date = now + pause;
        }
        due
    }
}
