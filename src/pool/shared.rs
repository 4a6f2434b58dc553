//! What the calls of a pool share: their limits, and what they know of the newest primary and of the ledgers.

use std::collections::HashMap;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

use super::Pool;
use super::lacking::{Check, Lacking};
use crate::commit::Ledger;
use crate::commit::{Guarantee, Signature};
use crate::retry::{RetryBudget, RetryPolicy};
use crate::server::SessionClient;
use crate::sync::lock;
use crate::topology::GenerationId;

/// One new pool of so many prunes its ledger at once.
const PRUNE_AT_ONCE: u64 = 64;

pub(super) struct Shared {
    pub(super) checkout_timeout: Duration,
    pub(super) heartbeat: Duration,
    pub(super) retry: RetryPolicy,
    pub(super) budget: RetryBudget,
    pub(super) guarantee: Guarantee,
    /// Callers that wait for a primary; the inner pool knows of those alone that wait for a connection.
    pub(super) searching: AtomicUsize,
    /// What transactions do without on the newest primary.
    pub(super) lacking: Lacking,
    /// What the timeline of the newest primary is signed with. `None` within: somebody is about to sign, or it cannot be.
    pub(super) signature: Mutex<Option<(GenerationId, Option<Arc<Signature>>)>>,
    /// When each ledger is pruned next, by its name.
    pub(super) prune_at: Mutex<HashMap<String, Instant>>,
}

impl<C: SessionClient> Pool<C> {
    pub(crate) fn budget(&self) -> &RetryBudget {
        &self.shared.budget
    }

    pub(crate) fn guarantee(&self) -> &Guarantee {
        &self.shared.guarantee
    }

    /// Can the transactions of this primary not be marked?
    pub(crate) fn is_unmarked(&self, id: GenerationId) -> bool {
        self.shared.lacking.is_unmarked(id)
    }

    /// What this primary's timeline is signed with, or the task to sign it, which one caller gets.
    pub(crate) fn signature(&self, id: GenerationId) -> Signing {
        let mut signature = lock(&self.shared.signature);
        match &*signature {
            Some((signed, by)) if *signed >= id => Signing::Done(by.clone().filter(|_| *signed == id)),
            _ => {
                *signature = Some((id, None));
                Signing::Yours
            }
        }
    }

    pub(crate) fn set_signature(&self, id: GenerationId, by: Option<Arc<Signature>>) {
        let mut signature = lock(&self.shared.signature);
        if let Some((signed, held)) = &mut *signature
            && *signed == id
        {
            *held = by;
        }
    }

    /// Remembers that the transactions of this primary cannot be marked; says so the first time.
    pub(crate) fn set_unmarked(&self, id: GenerationId, why: &str) {
        self.shared.lacking.set_unmarked(id, why);
    }

    /// How a COMMIT looks for its transaction.
    pub(crate) fn check(&self) -> Check {
        self.shared.lacking.check()
    }

    /// The prepared statement by which a COMMIT looked for its transaction is gone.
    pub(crate) fn check_is_gone(&self) {
        self.shared.lacking.check_is_gone();
    }

    pub(crate) fn check_refused(&self, refused: Check, why: &str) {
        self.shared.lacking.check_refused(refused, why);
    }

    /// Is it this caller who prunes the ledger? One does, several times while a row is kept.
    pub(crate) fn prunes(&self, ledger: &Ledger) -> bool {
        let (now, pause) = (Instant::now(), ledger.kept_for() / 8);
        let mut dates = lock(&self.shared.prune_at);
        let date = dates.entry(ledger.path()).or_insert_with(|| {
            // Pools that were started together do not prune together; and those that never live so long prune, too.
            let at_once = self.next_seed().is_multiple_of(PRUNE_AT_ONCE);
            if at_once { now } else { now + self.dialer.random_up_to(pause) }
        });
        let due = *date <= now;
        if due {
            *date = now + pause;
        }
        due
    }

    /// How long a caller waits for a connection unless it says otherwise.
    pub(crate) fn checkout_timeout(&self) -> Duration {
        self.shared.checkout_timeout
    }

    /// How often the primary is asked.
    pub(crate) fn heartbeat(&self) -> Duration {
        self.shared.heartbeat
    }
}

/// Who signs the timeline of a primary.
pub(crate) enum Signing {
    /// It is signed so, or not.
    Done(Option<Arc<Signature>>),
    Yours,
}
