//! What the calls of a pool share: their limits, and what is known about the newest primary and the ledgers.

use std::collections::HashMap;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Pool;
use super::lacking::{Check, Lacking};
use crate::commit::Ledger;
use crate::commit::{Guarantee, Signature};
use crate::retry::{RetryBudget, RetryPolicy};
use crate::server::SessionClient;
use crate::sync::lock;
use crate::topology::GenerationId;

/// One new pool in 64 prunes the ledger immediately; the others wait a random time.
const PRUNE_AT_ONCE: u64 = 64;

pub(super) struct Shared {
    pub(super) checkout_timeout: Duration,
    pub(super) heartbeat: Duration,
    pub(super) retry: RetryPolicy,
    pub(super) budget: RetryBudget,
    pub(super) guarantee: Guarantee,
    /// The number of callers that wait for a primary. The inner pool knows only those that wait for a connection.
    pub(super) searching: AtomicUsize,
    /// What transactions must do without on the newest primary.
    pub(super) lacking: Lacking,
    /// The signature of the newest primary's timeline. An inner `None`: signing is under way, or is impossible.
    pub(super) signature: Mutex<Option<(GenerationId, Option<Arc<Signature>>)>>,
    /// When each ledger is next pruned, by its name.
    pub(super) prune_at: Mutex<HashMap<String, Instant>>,
}

impl<C: SessionClient> Pool<C> {
    pub(crate) fn budget(&self) -> &RetryBudget {
        &self.shared.budget
    }

    pub(crate) fn guarantee(&self) -> &Guarantee {
        &self.shared.guarantee
    }

    /// Returns whether this primary's transactions cannot be marked.
    pub(crate) fn is_unmarked(&self, id: GenerationId) -> bool {
        self.shared.lacking.is_unmarked(id)
    }

    /// Returns the signature of this primary's timeline, or the task of signing it, which only one caller gets.
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

    /// Remembers that this primary's transactions cannot be marked, and logs it the first time.
    pub(crate) fn set_unmarked(&self, id: GenerationId, why: &str) {
        self.shared.lacking.set_unmarked(id, why);
    }

    /// How a COMMIT checks for its transaction.
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

    /// Returns whether this caller must prune the ledger. One caller does, several times within the time that a row is
    /// kept.
    pub(crate) fn prunes(&self, ledger: &Ledger) -> bool {
        let (now, pause) = (Instant::now(), ledger.kept_for() / 8);
        let mut dates = lock(&self.shared.prune_at);
        let date = dates.entry(ledger.path()).or_insert_with(|| {
            // Pools that start together must not prune together, and pools that do not live long must prune as well.
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

    /// Is cancelled when the pool is closed, or its runtime ends.
    pub(crate) fn closing(&self) -> &CancellationToken {
        self.cluster().scope()
    }

    /// Pause between two heartbeats.
    pub(crate) fn heartbeat(&self) -> Duration {
        self.shared.heartbeat
    }
}

/// The state of signing a primary's timeline.
pub(crate) enum Signing {
    /// The timeline is signed with this, or is not signed.
    Done(Option<Arc<Signature>>),
    Yours,
}
