//! Sessions for those who settle a commit, beside the pool's: whoever settles must not queue behind those who wait for the
//! locks of the transaction in doubt.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{Semaphore, SemaphorePermit};

use super::Aside;
use super::dialer::Dialer;
use crate::cluster::lock;
use crate::error::Error;
use crate::server::SessionClient;

/// A failover may leave as many commits in doubt as there are connections. So few ask at the same time: a server that was
/// just promoted has better things to do than to open sessions.
const AT_ONCE: usize = 2;

pub(super) struct Settlers<C> {
    permits: Semaphore,
    /// Commits that are being settled.
    pending: AtomicUsize,
    /// Sessions for the next, while there is one.
    idle: Mutex<Vec<Aside<C>>>,
}

impl<C> Default for Settlers<C> {
    fn default() -> Self {
        Self { permits: Semaphore::new(AT_ONCE), pending: AtomicUsize::new(0), idle: Mutex::default() }
    }
}

/// One commit that is being settled. The last to end closes the sessions that were kept.
pub(crate) struct Settling<'a, C: SessionClient> {
    dialer: &'a Dialer<C>,
}

impl<'a, C: SessionClient> Settling<'a, C> {
    pub(super) fn new(dialer: &'a Dialer<C>) -> Self {
        dialer.settlers.pending.fetch_add(1, Ordering::AcqRel);
        Self { dialer }
    }

    /// A session to the current primary, and the right to ask on it. Waits for both without a limit of its own.
    /// Cancel-safe.
    pub(crate) async fn session(&self) -> Result<(Option<SemaphorePermit<'a>>, Aside<C>), Error> {
        // Never closed, so waiting for it cannot fail.
        let permit = self.dialer.settlers.permits.acquire().await.ok();
        while let Some(kept) = self.take() {
            if self.dialer.cluster.is_current(kept.generation()) && !kept.client().is_closed() {
                kept.notices().forget();
                return Ok((permit, kept));
            }
        }
        Ok((permit, Aside::open(self.dialer).await?))
    }

    /// Keeps a session without a transaction for whoever settles next.
    pub(crate) fn keep(&self, aside: Aside<C>) {
        lock(&self.dialer.settlers.idle).push(aside);
    }

    fn take(&self) -> Option<Aside<C>> {
        lock(&self.dialer.settlers.idle).pop()
    }
}

impl<C: SessionClient> Drop for Settling<'_, C> {
    fn drop(&mut self) {
        if self.dialer.settlers.pending.fetch_sub(1, Ordering::AcqRel) == 1 {
            let kept = std::mem::take(&mut *lock(&self.dialer.settlers.idle));
            drop(kept);
        }
    }
}
