//! Sessions for settling commits. A settler must not queue behind other callers, because these may wait for locks that
//! the transaction in doubt still holds. So it uses a new connection of the pool if there is a free slot. That
//! connection is not wasted, because the settler's caller needs one next anyway. Otherwise it uses a session outside
//! the pool. If no session can be opened, it uses an idle one of the pool, which callers have used before.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{Semaphore, SemaphorePermit};

use super::counted::Counted;
use super::{Client, Pool, SideSession};
use crate::commit::Life;
use crate::error::Error;
use crate::server::{Notices, SessionClient};
use crate::sync::lock;
use crate::topology::{GenerationId, Suspicion};

/// The most sessions outside the pool at the same time. After a failover, each connection may have left a commit in
/// doubt, but a newly promoted server should not be flooded with sessions.
const AT_ONCE: usize = 2;

pub(super) struct SettleSessions<C> {
    permits: Semaphore,
    /// The number of commits that are being settled.
    pending: AtomicUsize,
    /// How many of them hold a connection of the pool, or are about to take one.
    pooled: AtomicUsize,
    /// Sessions outside the pool that are kept for the next settlers. They are closed when no commit is being settled
    /// any more.
    idle: Mutex<Vec<SideSession<C>>>,
}

impl<C> Default for SettleSessions<C> {
    fn default() -> Self {
        let (pending, pooled) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Self { permits: Semaphore::new(AT_ONCE), pending, pooled, idle: Mutex::default() }
    }
}

/// A commit that is being settled. When no commit is being settled any more, the kept sessions are closed.
pub(crate) struct SettleGuard<'a, C: SessionClient> {
    pool: &'a Pool<C>,
    settlers: &'a SettleSessions<C>,
}

impl<'a, C: SessionClient> SettleGuard<'a, C> {
    /// Registers a commit that is being settled. Hold the result until it is settled.
    pub(crate) fn new(pool: &'a Pool<C>) -> Self {
        let settlers = &pool.shared.dialer.settlers;
        settlers.pending.fetch_add(1, Ordering::AcqRel);
        Self { pool, settlers }
    }

    /// Returns a session to the current primary. If the session is outside the pool, its permit is returned, too: the
    /// session may be used while the permit is held. Waits for both without a limit of its own. Cancel-safe.
    pub(crate) async fn session(&self) -> Result<(Option<SemaphorePermit<'a>>, SettleSession<'a, C>), Error> {
        if let Some(checked_out) = self.checked_out().await? {
            return Ok((None, SettleSession::Pooled(checked_out)));
        }
        // The semaphore is never closed, so waiting for it cannot fail.
        let permit = self.settlers.permits.acquire().await.ok();
        while let Some(kept) = self.take() {
            if self.pool.cluster().is_current(kept.generation()) && !kept.client().is_closed() {
                kept.notices().forget();
                return Ok((permit, SettleSession::Beside(kept)));
            }
        }
        match self.pool.side_session().await {
            Ok(opened) => Ok((permit, SettleSession::Beside(opened))),
            Err(ended @ (Error::Closed | Error::RuntimeEnded)) => Err(ended),
            Err(error) => match self.used().await {
                Some(used) => Ok((None, SettleSession::Pooled(used))),
                None => Err(error),
            },
        }
    }

    /// Takes an idle connection that callers may have used. Rolls back first, because a caller may have left a
    /// transaction open that this crate did not see.
    async fn used(&self) -> Option<PooledSession<'a, C>> {
        let counted = Counted::new(&self.settlers.pooled);
        let client = self.pool.get_idle().await?;
        client.notices().forget();
        let session = PooledSession { client, clean: false, used: true, _counted: counted };
        session.client.run_own("BEGIN; ROLLBACK").await.ok()?;
        Some(session)
    }

    /// Takes a connection of the pool, unless settlers hold half of the pool already. The other half stays for other
    /// callers, such as readers. A settler may hold its connection for long, because it waits until a standby has
    /// confirmed the commit.
    async fn checked_out(&self) -> Result<Option<PooledSession<'a, C>>, Error> {
        let counted = Counted::new(&self.settlers.pooled);
        if self.settlers.pooled.load(Ordering::Relaxed) > self.pool.status().max_size / 2 {
            return Ok(None);
        }
        let client = self.pool.get_new().await?;
        Ok(client.map(|client| PooledSession { client, clean: false, used: false, _counted: counted }))
    }

    /// Asks the cluster's task to verify the primary of this generation again.
    pub(crate) fn suspect(&self, id: GenerationId) {
        self.pool.suspect(id, Suspicion::Connection);
    }

    /// Keeps a session, so that it can be used again. No transaction may be open on it.
    pub(crate) fn keep(&self, session: SettleSession<'_, C>) {
        match session {
            SettleSession::Pooled(mut checked_out) => checked_out.clean = true,
            SettleSession::Beside(side_session) => lock(&self.settlers.idle).push(side_session),
        }
    }

    fn take(&self) -> Option<SideSession<C>> {
        lock(&self.settlers.idle).pop()
    }
}

impl<C: SessionClient> Drop for SettleGuard<'_, C> {
    fn drop(&mut self) {
        if self.settlers.pending.fetch_sub(1, Ordering::AcqRel) == 1 {
            let kept = std::mem::take(&mut *lock(&self.settlers.idle));
            drop(kept);
        }
    }
}

/// The session that a settler asks on. Dropping this ends the session and rolls back its transaction.
/// [`SettleGuard::keep`] keeps the session.
pub(crate) enum SettleSession<'a, C: SessionClient> {
    Pooled(PooledSession<'a, C>),
    Beside(SideSession<C>),
}

pub(crate) struct PooledSession<'a, C: SessionClient> {
    client: Client<C>,
    clean: bool,
    /// Callers may have used it, so they may have changed its role and settings.
    used: bool,
    _counted: Counted<'a>,
}

impl<C: SessionClient> Drop for PooledSession<'_, C> {
    fn drop(&mut self) {
        if !self.clean {
            self.client.poison();
        }
    }
}

impl<C: SessionClient> SettleSession<'_, C> {
    pub(crate) fn client(&self) -> &tokio_postgres::Client {
        match self {
            Self::Pooled(checked_out) => &checked_out.client,
            Self::Beside(side_session) => side_session.client(),
        }
    }

    /// Returns whether callers may have changed the role or the settings of this session. If so, a refused question
    /// does not show what the pool's own role may do.
    pub(crate) fn is_used(&self) -> bool {
        matches!(self, Self::Pooled(checked_out) if checked_out.used)
    }

    /// Notes whether the settler's COMMIT is under way. If the settler is dropped while it is, the COMMIT is not
    /// cancelled. On a session outside the pool nothing is ever cancelled, so nothing is noted for it.
    pub(crate) fn set_committing(&self, committing: bool) {
        if let Self::Pooled(checked_out) = self {
            checked_out.client.set_committing(committing);
        }
    }

    pub(crate) fn notices(&self) -> &Notices {
        match self {
            Self::Pooled(checked_out) => checked_out.client.notices(),
            Self::Beside(side_session) => side_session.notices(),
        }
    }

    pub(crate) fn generation(&self) -> GenerationId {
        match self {
            Self::Pooled(checked_out) => checked_out.client.generation(),
            Self::Beside(side_session) => side_session.generation(),
        }
    }

    /// The system identifier of the session's server, if the server shows it.
    pub(crate) fn cluster(&self) -> Option<u64> {
        match self {
            Self::Pooled(checked_out) => checked_out.client.cluster(),
            Self::Beside(side_session) => side_session.cluster(),
        }
    }

    pub(crate) fn life(&self) -> Option<Life> {
        match self {
            Self::Pooled(checked_out) => checked_out.client.life(),
            Self::Beside(side_session) => side_session.life(),
        }
    }

    /// Waits until the generation of the session has ended. If the session itself ends with the generation, this may
    /// wait for ever. Cancel-safe.
    pub(crate) async fn evicted(&self) {
        match self {
            Self::Pooled(checked_out) => checked_out.client.evicted().await,
            Self::Beside(side_session) => side_session.evicted().await,
        }
    }
}
