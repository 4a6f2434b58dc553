//! The wrapped pool is one of bb8.
//!
//! What differs from deadpool: bb8 opens connections in tasks of its own and tells nobody why that fails, so this pool
//! opens them and adds them to bb8's. And bb8 closes no idle connection on demand. `shells.rs` takes connections out of
//! it. The tests of `tests/it/checkout/wrap.rs` run over both kinds of pool, and `bb8.rs` beside them has those of bb8
//! alone.

mod memory;
mod shells;

use std::error::Error as StdError;
use std::future::{Future, poll_fn};
use std::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bb8::{AddError, ManageConnection, PooledConnection, RunError};
use deadpool::managed;
use deadpool_postgres::ClientWrapper;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::task::unconstrained;
use tokio::time::{Instant, sleep};
use tokio_postgres::CancelToken;

use self::shells::{Shell, Shells, around};
use super::counted::Counted;
use super::wrapped_pool::{
    Getting, MANAGER, NoObject, ObjectKey, Returned, Returns, WrappedObject, WrappedPool, cancel_without_tls,
    no_owned_session,
};
use super::{Pool, WrapBuilder};
use crate::error::BuildError;
use crate::server::{Guarded, Open, Opened, OpenedOwned, OpenerParts, Scope, Session, not_created, panicked};
use crate::sync::lock;
use crate::topology::{Endpoint, FailureKind, GenerationId, ProbeFailure, Question};

/// If a caller waits for bb8 itself for this long, and bb8 has room, this pool opens a connection.
const STUCK_AFTER: Duration = Duration::from_millis(250);
/// How often a caller looks for room or an idle connection while connections under way take the room that there is.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

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
    /// - bb8 does not report why a connect failed. So while bb8 has room, this pool opens the connections that it
    ///   needs, by [`bb8::Pool::dedicated_connection`], and adds them. bb8's statistics do not count them as created.
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

/// A connection checked out from bb8. Dropping it gives it back.
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
        &self.shell.as_ref().expect("a connection checked out has its client").wrapper
    }
}

impl<M: Lends> DerefMut for Got<M> {
    #[expect(clippy::expect_used, reason = "as above")]
    fn deref_mut(&mut self) -> &mut ClientWrapper {
        &mut self.shell.as_mut().expect("a connection checked out has its client").wrapper
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
        self.shell.take().expect("a connection checked out has its client").wrapper
    }
}

/// What whoever needs a connection does next.
enum Next<'a, T> {
    /// Waits for bb8, whose `get` was polled once.
    Get(Poll<T>),
    /// Opens a connection in this place.
    Open(Counted<'a>),
    /// Waits, because connections under way take all the room.
    Wait,
}

/// A bb8 pool as a source of connections, and its manager as a source of sessions.
struct Bb8Pool<M: Lends> {
    existing: bb8::Pool<M>,
    max_size: usize,
    parts: OpenerParts,
    runtime: OnceLock<Handle>,
    shells: Arc<Shells>,
    /// The newest generation for which idle connections were closed. The first generation closes none.
    evicted_for: AtomicU64,
    returns: Arc<Returns>,
    /// How many times the idle connections were to be closed.
    evictions: Arc<AtomicU64>,
    /// How many connections that were never seen here may be older than the generation. bb8 does not tell new ones.
    older: AtomicUsize,
    /// How many connections are being opened for bb8. bb8 does not count them.
    opening: AtomicUsize,
    /// Held while this pool looks what bb8 has, and acts on it. Only the owner of the bb8 pool can come in between.
    alone: Mutex<()>,
    /// Held by the one caller that opens a connection because it has waited for bb8 in vain.
    late: tokio::sync::Mutex<()>,
}

impl<M: Lends> Bb8Pool<M> {
    fn new(existing: bb8::Pool<M>) -> Self {
        let max_size = count(existing.config().max_size);
        let older = AtomicUsize::new(count(existing.state().connections));
        Self {
            existing,
            max_size,
            parts: OpenerParts::default(),
            runtime: OnceLock::new(),
            shells: Arc::new(Shells::new(max_size)),
            evicted_for: AtomicU64::new(1),
            returns: Arc::default(),
            evictions: Arc::default(),
            older,
            opening: AtomicUsize::new(0),
            alone: Mutex::default(),
            late: tokio::sync::Mutex::default(),
        }
    }

    /// Lends a connection that bb8 has lent. Does not wait, so no cancelled future can lose the connection.
    fn check_out(&self, mut pooled: PooledConnection<'static, M>, evictions: u64) -> Result<Got<M>, NoObject> {
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

    /// Gets a connection from bb8. While bb8 has room, this opens one and adds it: bb8 tells nobody why a connect of
    /// its own failed, and starts another one for each caller that it wakes in vain.
    async fn get_from_bb8(&self) -> Result<PooledConnection<'static, M>, NoObject> {
        let began = Instant::now();
        let mut crowded = false;
        loop {
            // A panic of the manager costs only this one connection.
            let getting = AssertUnwindSafe(async { self.existing.get_owned().await }).catch_unwind();
            let mut getting = pin!(getting);
            let mut poll = |context: &mut Context<'_>| getting.as_mut().poll(context);
            let next = poll_fn(|context| Poll::Ready(self.next(crowded, || poll(context)))).await;
            let got = match next {
                Next::Get(Poll::Ready(got)) => got,
                Next::Get(Poll::Pending) => tokio::select! {
                    biased;
                    got = getting => got,
                    opened = self.open_late() => {
                        opened.map_err(NoObject::Failed)?;
                        crowded = false;
                        continue;
                    }
                },
                Next::Open(place) => {
                    crowded = !self.open_for_bb8(place).await.map_err(NoObject::Failed)?;
                    continue;
                }
                Next::Wait if began.elapsed() >= self.existing.config().connection_timeout => {
                    return Err(NoObject::NoneFree);
                }
                Next::Wait => {
                    sleep(LOOK_AGAIN).await;
                    continue;
                }
            };
            return match got {
                Ok(Ok(pooled)) => Ok(pooled),
                Ok(Err(RunError::User(error))) => Err(NoObject::Failed(not_created(error))),
                Ok(Err(RunError::TimedOut)) => {
                    let Some(place) = self.place() else { return Err(NoObject::NoneFree) };
                    crowded = !self.open_for_bb8(place).await.map_err(NoObject::Failed)?;
                    continue;
                }
                Err(panic) => Err(NoObject::Failed(panicked(MANAGER, &*panic))),
            };
        }
    }

    /// Decides what whoever needs a connection does next. Polls bb8's `get` only if that starts no connect. `crowded`:
    /// connects of bb8's own take the room that it seems to have.
    fn next<T>(&self, crowded: bool, poll: impl FnOnce() -> Poll<T>) -> Next<'_, T> {
        let _alone = lock(&self.alone);
        let size = count(self.existing.state().connections);
        if crowded || size >= self.max_size || self.idle() > 0 {
            return Next::Get(poll());
        }
        self.claim(size).map_or(Next::Wait, Next::Open)
    }

    /// Claims room for another connection, if there is any.
    fn place(&self) -> Option<Counted<'_>> {
        let _alone = lock(&self.alone);
        self.claim(count(self.existing.state().connections))
    }

    /// Call this under the lock `alone`, so that `size` and the count of those under way belong together.
    fn claim(&self, size: usize) -> Option<Counted<'_>> {
        let taken = size.saturating_add(self.opening.load(Ordering::SeqCst));
        (taken < self.max_size).then(|| Counted::new(&self.opening))
    }

    /// Opens a connection if bb8 has had none to give for a while, although it has room: a connect of its own has
    /// failed, or it tests a connection that does not answer. Only one of those who wait does so.
    async fn open_late(&self) -> Result<(), ProbeFailure> {
        let _only = self.late.lock().await;
        loop {
            sleep(STUCK_AFTER).await;
            if self.idle() == 0
                && let Some(place) = self.place()
                && self.open_for_bb8(place).await?
            {
                return Ok(());
            }
        }
    }

    /// Opens a connection, and adds it to bb8's idle ones. Returns whether there was room for it. If this is dropped,
    /// its place is free again.
    async fn open_for_bb8(&self, place: Counted<'_>) -> Result<bool, ProbeFailure> {
        let evictions = self.evictions.load(Ordering::Acquire);
        let client = self.create().await?;
        if self.evictions.load(Ordering::Acquire) != evictions {
            return Ok(true);
        }
        let _alone = lock(&self.alone);
        let added = self.existing.add(client);
        drop(place);
        match added {
            Ok(()) => Ok(true),
            Err(AddError::NoCapacity(_)) => Ok(false),
            Err(AddError::Broken(_)) => {
                let message = "the wrapped pool's manager says that its new connection is broken";
                Err(ProbeFailure::new(FailureKind::Unreachable, message))
            }
        }
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
            let existing = self.existing.clone();
            let mut getting = Box::pin(async move { existing.get_owned().await });
            let got = {
                let _alone = lock(&self.alone);
                if self.idle() == 0 {
                    break;
                }
                unconstrained(getting.as_mut()).now_or_never()
            };
            match got {
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
    fn parts(&self) -> &OpenerParts {
        &self.parts
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
            self.parts.ask_first(session, endpoint, question).await
        })
    }

    fn open_owned<'a>(&'a self, _: &'a Endpoint, _: Question, _: Scope) -> BoxFuture<'a, OpenedOwned> {
        no_owned_session()
    }

    fn drives(&self) -> bool {
        false
    }

    fn cancel(&self, _: &Endpoint, token: CancelToken) -> BoxFuture<'static, Result<(), tokio_postgres::Error>> {
        cancel_without_tls(token)
    }
}

impl<M: Lends> WrappedPool<ClientWrapper> for Bb8Pool<M> {
    fn get(self: Arc<Self>) -> Getting<ClientWrapper> {
        Box::pin(async move {
            let evictions = self.evictions.load(Ordering::Acquire);
            let pooled = self.get_from_bb8().await?;
            self.check_out(pooled, evictions).map(|got| Box::new(got) as Box<dyn WrappedObject<ClientWrapper>>)
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
        self.parts.traffic.fetch_add(1, Ordering::Relaxed);
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
