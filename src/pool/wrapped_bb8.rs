//! The wrapped pool is one of bb8.
//!
//! What differs from deadpool: bb8 opens connections in tasks of its own and tells nobody why that fails, and it closes
//! no idle connection on demand. `shells.rs` takes connections out of it. The tests of `tests/it/checkout/wrap.rs` run
//! over both kinds of pool, and `bb8.rs` beside them has those of bb8 alone.

mod memory;
mod shells;

use std::error::Error as StdError;
use std::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bb8::{ManageConnection, PooledConnection, RunError};
use deadpool::managed;
use deadpool_postgres::ClientWrapper;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::task::unconstrained;
use tokio::time::{Instant, sleep};
use tokio_postgres::{CancelToken, NoTls};

use self::shells::{Shell, Shells, around};
use super::wrapped_pool::{
    Getting, MANAGER, NoObject, ObjectKey, Returned, Returns, WrappedObject, WrappedPool, no_owned_session,
};
use super::{Pool, WrapBuilder};
use crate::error::BuildError;
use crate::server::{Asker, Guarded, Open, Opened, OpenedOwned, Scope, Session, not_created, panicked};
use crate::topology::{Endpoint, FailureKind, GenerationId, ProbeFailure, Question};

/// If bb8 has room and gives no connection for this long, this pool opens one, or learns why that is impossible.
const ASK_WHY_AFTER: Duration = Duration::from_secs(1);

impl Pool {
    /// As [`Pool::wrap`], around an existing bb8 pool, whose connections are the driver's clients, as those of
    /// `bb8_postgres` are. Needs the feature `bb8`.
    ///
    /// The result is an ordinary [`Pool`], with `prepare_cached`. What the documentation of [`Pool::wrap`] says is true
    /// of a bb8 pool, too. These are the differences:
    /// - Build the bb8 pool with `test_on_check_out(false)`: this pool tests connections where a test is of use,
    ///   without a round trip for each checkout. bb8's own test would hang on a frozen host, for `connection_timeout`,
    ///   and hold up whoever gets the connection.
    /// - Build it with `retry_connection(false)`: otherwise a connect that failed during the failover pauses for longer
    ///   each time, in a slot of the pool.
    /// - bb8 does not report why a connect failed. If it has room and gives no connection for a second, this pool asks
    ///   the manager for one, and adds it. So callers are told of a wrong password after a second or two.
    /// - bb8 runs its `connection_customizer` on all sessions, also on those of the heartbeat. [`Pool::resize`] fails,
    ///   because a bb8 pool has its size for life.
    /// - Connections are told apart by the key that the server gives each session for cancel requests. Behind a proxy
    ///   that gives none, each checkout asks the connection which server it leads to, which is a round trip.
    /// - The manager's `has_broken` must say so of a closed client. That of `bb8_postgres` does.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use bb8_postgres::PostgresConnectionManager;
    /// use tokio_postgres_failover::{Pool, bb8, tokio_postgres::NoTls};
    ///
    /// let url = "postgres://app@a.my-pg.internal,b.my-pg.internal/app?target_session_attrs=read-write";
    /// let manager = PostgresConnectionManager::new_from_stringlike(url, NoTls)?;
    /// let builder = bb8::Pool::builder().max_size(16).test_on_check_out(false).retry_connection(false);
    /// let existing = builder.build_unchecked(manager);
    ///
    /// let pool = Pool::wrap_bb8(existing).build()?;
    /// pool.transaction(async |tx| Ok(tx.execute("UPDATE stock SET left = left - 1", &[]).await?)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn wrap_bb8<M>(existing: bb8::Pool<M>) -> WrapBuilder
    where
        M: ManageConnection<Connection = tokio_postgres::Client>,
        M::Error: StdError + Send + Sync + 'static,
    {
        WrapBuilder::new(Arc::new(Bb8Pool::new(existing)))
    }
}

/// A manager of the driver's clients.
trait Lends: ManageConnection<Connection = tokio_postgres::Client, Error: StdError + Send + Sync + 'static> {}

impl<M> Lends for M where
    M: ManageConnection<Connection = tokio_postgres::Client, Error: StdError + Send + Sync + 'static>
{
}

/// A connection on loan from bb8. Dropping it gives it back.
struct Got<M: Lends> {
    /// Has a closed client in the connection's place. `None`: it has gone back.
    pooled: Option<PooledConnection<'static, M>>,
    /// Has the connection's client. `None`: somebody has taken that.
    shell: Option<Shell>,
    is_used: bool,
    evictions: (u64, Arc<AtomicU64>),
    shells: Arc<Shells>,
    runtime: Handle,
    /// The last field, so that it notifies after the connection has gone back.
    _returned: Returned,
}

impl<M: Lends> Drop for Got<M> {
    fn drop(&mut self) {
        // bb8 may spawn a task here, and tokio would panic outside of a runtime.
        let _entered = self.runtime.enter();
        let Some(mut pooled) = self.pooled.take() else { return };
        if let Some(shell) = self.shell.take() {
            self.shells.put_back(shell, &mut pooled);
        }
        // This calls the manager, and a panic must not end a task of this pool.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(pooled)));
    }
}

impl<M: Lends> Deref for Got<M> {
    type Target = ClientWrapper;

    #[expect(clippy::expect_used, reason = "the client is taken by `take` and `drop`, after which nobody can deref")]
    fn deref(&self) -> &ClientWrapper {
        &self.shell.as_ref().expect("a connection on loan has its client").wrapper
    }
}

impl<M: Lends> DerefMut for Got<M> {
    #[expect(clippy::expect_used, reason = "as above")]
    fn deref_mut(&mut self) -> &mut ClientWrapper {
        &mut self.shell.as_mut().expect("a connection on loan has its client").wrapper
    }
}

impl<M: Lends> WrappedObject<ClientWrapper> for Got<M> {
    fn key(&self) -> ObjectKey {
        // There is a shell until the connection is taken, which consumes this.
        ObjectKey::Numbered(self.shell.as_ref().map_or(u64::MAX, |shell| shell.id))
    }

    fn is_used(&self) -> bool {
        self.is_used
    }

    fn is_evicted(&self) -> bool {
        self.evictions.0 < self.evictions.1.load(Ordering::Acquire)
    }

    #[expect(clippy::expect_used, reason = "as above")]
    fn take(mut self: Box<Self>) -> ClientWrapper {
        // bb8 gets the closed client, and frees the slot.
        self.shell.take().expect("a connection on loan has its client").wrapper
    }
}

/// A bb8 pool as a source of connections, and its manager as a source of sessions.
struct Bb8Pool<M: Lends> {
    existing: bb8::Pool<M>,
    max_size: usize,
    asker: Asker,
    runtime: OnceLock<Handle>,
    shells: Arc<Shells>,
    /// The newest generation for which idle connections were closed. The first generation closes none.
    evicted_for: AtomicU64,
    returns: Arc<Returns>,
    /// How many times the idle connections were to be closed.
    evictions: Arc<AtomicU64>,
    /// How many connections that were never seen here may be older than the generation. bb8 does not tell new ones.
    older: AtomicUsize,
    /// When a connection was last opened for bb8 in vain, and why, if the manager failed. Only one is opened at a time.
    in_vain: tokio::sync::Mutex<Option<(Instant, Option<ProbeFailure>)>>,
}

impl<M: Lends> Bb8Pool<M> {
    fn new(existing: bb8::Pool<M>) -> Self {
        let max_size = count(existing.config().max_size);
        let older = AtomicUsize::new(count(existing.state().connections));
        Self {
            existing,
            max_size,
            asker: Asker::default(),
            runtime: OnceLock::new(),
            shells: Arc::new(Shells::new(max_size)),
            evicted_for: AtomicU64::new(1),
            returns: Arc::default(),
            evictions: Arc::default(),
            older,
            in_vain: tokio::sync::Mutex::default(),
        }
    }

    /// Lends a connection that bb8 has lent. Does not wait, so no cancelled future can lose the connection.
    fn lend(&self, mut pooled: PooledConnection<'static, M>, evictions: u64) -> Result<Got<M>, NoObject> {
        let Some((shell, is_new)) = self.shells.take_out(&mut pooled) else {
            let message = "the driver has made no client without a session";
            return Err(NoObject::Failed(ProbeFailure::new(FailureKind::Unreachable, message)));
        };
        let is_older = || {
            let one_less = |older: usize| older.checked_sub(1);
            self.older.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_less).is_ok()
        };
        Ok(Got {
            pooled: Some(pooled),
            shell: Some(shell),
            is_used: !is_new || is_older(),
            evictions: (evictions, Arc::clone(&self.evictions)),
            shells: Arc::clone(&self.shells),
            runtime: Handle::current(),
            _returned: Returned(Arc::clone(&self.returns)),
        })
    }

    /// Gets a connection from bb8. Ends without one if the manager opens no session.
    async fn get_from_bb8(&self) -> Result<PooledConnection<'static, M>, NoObject> {
        loop {
            let began = Instant::now();
            // A panic of the manager costs only this one connection.
            let getting = AssertUnwindSafe(async { self.existing.get_owned().await }).catch_unwind();
            let got = tokio::select! {
                biased;
                got = getting => got,
                opened = self.why_none(began) => {
                    opened.map_err(NoObject::Failed)?;
                    continue;
                }
            };
            return match got {
                Ok(Ok(pooled)) => Ok(pooled),
                Ok(Err(RunError::User(error))) => Err(NoObject::Failed(not_created(error))),
                Ok(Err(RunError::TimedOut)) if self.has_room() => {
                    self.add_one(began).await.map_err(NoObject::Failed)?;
                    continue;
                }
                Ok(Err(RunError::TimedOut)) => Err(NoObject::NoneFree),
                Err(panic) => Err(NoObject::Failed(panicked(MANAGER, &*panic))),
            };
        }
    }

    fn has_room(&self) -> bool {
        count(self.existing.state().connections) < self.max_size
    }

    /// Waits until bb8 should have opened a connection. Then opens one for it.
    async fn why_none(&self, since: Instant) -> Result<(), ProbeFailure> {
        loop {
            sleep(ASK_WHY_AFTER).await;
            if self.has_room() {
                return self.add_one(since).await;
            }
        }
    }

    /// Opens a connection, and adds it to bb8's. bb8 itself tries no other connect while as many hang as callers wait,
    /// and does not report one that failed. One attempt in vain answers all callers that have waited since before.
    async fn add_one(&self, since: Instant) -> Result<(), ProbeFailure> {
        let mut in_vain = self.in_vain.lock().await;
        if let Some((_, why)) = in_vain.as_ref().filter(|(began, _)| *began >= since) {
            return why.clone().map_or(Ok(()), Err);
        }
        let began = Instant::now();
        let added = self.create().await.map(|client| self.existing.add(client).is_ok());
        *in_vain = match &added {
            Ok(true) => None,
            // Connects of bb8's own take the room that there is.
            Ok(false) => Some((began, None)),
            Err(failure) => Some((began, Some(failure.clone()))),
        };
        added.map(drop)
    }

    async fn create(&self) -> Result<tokio_postgres::Client, ProbeFailure> {
        // A panic of the manager costs only this one session.
        let creating = AssertUnwindSafe(async { self.existing.dedicated_connection().await }).catch_unwind();
        creating.await.map_err(|panic| panicked(MANAGER, &*panic))?.map_err(not_created)
    }

    /// Closes the idle connections, and returns how many there were. bb8 cannot do that, so this borrows each of them.
    fn close_idle(&self) -> usize {
        let Some(runtime) = self.runtime.get() else { return 0 };
        let _entered = runtime.enter();
        let mut closed = 0;
        for _ in 0..self.existing.state().idle_connections {
            if self.idle() == 0 {
                break;
            }
            let existing = self.existing.clone();
            let mut getting = Box::pin(async move { existing.get_owned().await });
            match unconstrained(getting.as_mut()).now_or_never() {
                Some(Ok(pooled)) => {
                    close(pooled, &self.shells);
                    closed += 1;
                }
                Some(Err(_)) => break,
                // bb8 tests each connection before it lends it.
                None => {
                    let shells = Arc::clone(&self.shells);
                    drop(runtime.spawn(async move { getting.await.map(|pooled| close(pooled, &shells)) }));
                }
            }
        }
        closed
    }
}

/// Closes a connection, and frees its slot. Call this within a runtime.
fn close<M: Lends>(mut pooled: PooledConnection<'static, M>, shells: &Shells) {
    let taken = shells.take_out(&mut pooled);
    drop(pooled);
    drop(taken);
}

fn count(connections: u32) -> usize {
    usize::try_from(connections).unwrap_or(usize::MAX)
}

impl<M: Lends> Open<ClientWrapper> for Bb8Pool<M> {
    fn asker(&self) -> &Asker {
        &self.asker
    }

    fn open<'a>(
        &'a self,
        endpoint: &'a Endpoint,
        question: Question,
        scope: Scope,
    ) -> BoxFuture<'a, Opened<ClientWrapper>> {
        Box::pin(async move {
            let client = Guarded::new(around(self.create().await?, &Handle::current()));
            let session = Session { client, abort: None, scope, notices: Arc::default() };
            let told = &session.notices.session;
            let report = self.asker.questions.ask(&endpoint.address, &session.client, question, told).await?;
            Ok((session, report))
        })
    }

    fn open_owned<'a>(&'a self, _: &'a Endpoint, _: Question, _: Scope) -> BoxFuture<'a, OpenedOwned> {
        no_owned_session()
    }

    fn drives(&self) -> bool {
        false
    }

    /// Sends the request without TLS, as for a pool of deadpool.
    fn cancel(&self, _: &Endpoint, token: CancelToken) -> BoxFuture<'static, Result<(), tokio_postgres::Error>> {
        Box::pin(async move { token.cancel_query(NoTls).await })
    }
}

impl<M: Lends> WrappedPool<ClientWrapper> for Bb8Pool<M> {
    fn get(self: Arc<Self>) -> Getting<ClientWrapper> {
        Box::pin(async move {
            let evictions = self.evictions.load(Ordering::Acquire);
            let pooled = self.get_from_bb8().await?;
            self.lend(pooled, evictions).map(|got| Box::new(got) as Box<dyn WrappedObject<ClientWrapper>>)
        })
    }

    fn status(&self) -> managed::Status {
        let state = self.existing.state();
        let (size, available) = (count(state.connections), count(state.idle_connections));
        managed::Status { max_size: self.max_size, size, available, waiting: 0 }
    }

    fn idle(&self) -> usize {
        count(self.existing.state().idle_connections)
    }

    fn returns(&self) -> &Returns {
        &self.returns
    }

    fn evict_for(&self, id: GenerationId) {
        if self.evicted_for.fetch_max(id.get(), Ordering::AcqRel) >= id.get() {
            return;
        }
        let evicted = self.close_idle();
        self.older.store(count(self.existing.state().connections), Ordering::Release);
        tracing::debug!(evicted, "idle connections of the wrapped pool closed");
    }

    fn count_traffic(&self) {
        self.asker.traffic.fetch_add(1, Ordering::Relaxed);
    }

    fn clear_idle(&self) {
        self.shells.forget();
    }

    fn resize(&self, _: usize) -> Result<(), BuildError> {
        Err(BuildError::invalid("max_size", "a bb8 pool has its size for life; build another pool"))
    }

    fn evict_idle(&self) -> usize {
        self.evictions.fetch_add(1, Ordering::AcqRel);
        self.close_idle()
    }

    fn start(&self, runtime: Handle) {
        // This is called once.
        let _ = self.runtime.set(runtime);
    }
}
