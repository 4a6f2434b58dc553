//! What all clones of a pool have in common: where its connections come from, the limits of its calls, and what is
//! known about the newest primary and the ledgers.

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::checkout_reports::CheckoutLimits;
use super::closing::Closing;
use super::dialer::Dialer;
use super::lacking::Lacking;
use super::pruning::PruneAt;
use super::signing::SignatureCache;
use super::{Pool, Source};
use crate::commit::{Guarantee, Nonce};
use crate::observe::Observer;
use crate::retry::{RetryBudget, RetryPolicy};
use crate::server::SessionClient;
use crate::topology::{GenerationId, Suspicion};

/// What all clones of a pool have in common. One pointer to it is cheaper to clone than several.
pub(super) struct Shared<C: SessionClient> {
    pub(super) source: Source<C>,
    pub(super) dialer: Arc<Dialer<C>>,
    pub(super) calls: CallState,
}

/// What the calls of a pool have in common.
pub(super) struct CallState {
    pub(super) checkout_timeout: Duration,
    pub(super) heartbeat: Duration,
    pub(super) retry: RetryPolicy,
    pub(super) budget: RetryBudget,
    pub(super) guarantee: Guarantee,
    pub(super) begin_with_first_statement: bool,
    /// The number of callers that wait for a primary. The inner pool knows only those that wait for a connection.
    pub(super) searching: AtomicUsize,
    pub(super) lacking: Lacking,
    pub(super) signatures: SignatureCache,
    pub(super) prune_at: PruneAt,
    pub(super) closing: Closing,
    pub(super) reports: CheckoutLimits,
    /// Held while the size is changed.
    pub(super) resizing: Mutex<()>,
}

impl<C: SessionClient> Pool<C> {
    pub(crate) fn budget(&self) -> &RetryBudget {
        &self.shared.calls.budget
    }

    pub(crate) fn guarantee(&self) -> &Guarantee {
        &self.shared.calls.guarantee
    }

    /// Returns whether BEGIN may travel with the first statement of a transaction.
    pub(crate) fn begins_with_first_statement(&self) -> bool {
        self.shared.calls.begin_with_first_statement
    }

    /// How long a caller waits for a connection by default.
    pub(crate) fn checkout_timeout(&self) -> Duration {
        self.shared.calls.checkout_timeout
    }

    /// The time limit for opening a session.
    pub(crate) fn opens_within(&self) -> Duration {
        self.shared.dialer.open_timeout
    }

    /// The scope that ends when the pool is closed, or when its runtime ends.
    pub(crate) fn closing(&self) -> &CancellationToken {
        self.cluster().scope()
    }

    /// Pause between two heartbeats.
    pub(crate) fn heartbeat(&self) -> Duration {
        self.shared.calls.heartbeat
    }

    pub(crate) fn lacking(&self) -> &Lacking {
        &self.shared.calls.lacking
    }

    pub(crate) fn signatures(&self) -> &SignatureCache {
        &self.shared.calls.signatures
    }

    /// A nonce for the mark of one transaction.
    pub(crate) fn next_nonce(&self) -> Nonce {
        self.shared.dialer.next_nonce()
    }

    /// A seed for the jitter of one call.
    pub(crate) fn next_seed(&self) -> u64 {
        self.shared.dialer.next_seed()
    }

    /// The runtime of the pool's tasks.
    pub(crate) fn runtime(&self) -> &Handle {
        self.shared.dialer.queue.runtime()
    }

    pub(crate) fn observer(&self) -> &Observer {
        self.cluster().observer()
    }

    /// Reports a doubt about the primary of this generation.
    pub(crate) fn suspect(&self, id: GenerationId, suspicion: Suspicion) {
        self.cluster().suspect(id, suspicion);
    }

    /// Returns whether the pool has left the primary of this generation for good.
    pub(crate) fn has_left(&self, id: GenerationId) -> bool {
        self.cluster().has_ended(id)
    }

    /// Returns whether callers get connections to the primary of this generation.
    pub(crate) fn is_current(&self, id: GenerationId) -> bool {
        self.cluster().is_current(id)
    }
}
