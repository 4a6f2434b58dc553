//! The wrapped pool as a source of connections, and its manager as a source of sessions.
//!
//! The traits are the same for each kind of pool. This file has deadpool's, and `wrapped_bb8.rs` has bb8's.

use std::error::Error as StdError;
use std::ops::{Deref, DerefMut};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use deadpool::managed::{self, Object, ObjectId, PoolError};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio_postgres::{CancelToken, NoTls};

use super::trail::clear_idle;
use crate::error::BuildError;
use crate::server::{
    Guarded, Open, Opened, OpenedOwned, OpenerParts, Scope, Session, SessionClient, not_created, panicked,
};
use crate::topology::{Endpoint, FailureKind, GenerationId, ProbeFailure, Question};

/// Tells one connection of a wrapped pool from another, for as long as both are in it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum ObjectKey {
    Deadpool(ObjectId),
    #[cfg(feature = "bb8")]
    Numbered(u64),
}

/// A connection of the wrapped pool.
pub(super) trait WrappedObject<C>: DerefMut<Target = C> + Send + Sync {
    fn key(&self) -> ObjectKey;

    /// Returns whether it has been used before, by any user, so that it may lead to the previous primary.
    fn is_used(&self) -> bool;

    /// Returns whether the idle connections were to be closed while it was in this pool's hands.
    fn is_evicted(&self) -> bool;

    /// Takes it out of its pool. This frees its slot.
    fn take(self: Box<Self>) -> C;

    /// Closes it, and frees its slot.
    fn discard(self: Box<Self>) {
        drop(self.take());
    }
}

/// Tells this pool that a connection of the wrapped pool has come back, or has freed its slot.
#[derive(Default)]
pub(super) struct Returns {
    /// How many callers wait. It is read whenever a connection comes back.
    pub(super) waiting: AtomicUsize,
    pub(super) changed: Notify,
}

/// Notifies when it is dropped. Drop it after the connection has gone back.
pub(super) struct Returned(pub(super) Arc<Returns>);

impl Drop for Returned {
    fn drop(&mut self) {
        if self.0.waiting.load(Ordering::SeqCst) > 0 {
            self.0.changed.notify_one();
        }
    }
}

/// A connection that this pool has got. The fields are dropped in this order, so `returned` notifies after the
/// connection has gone back.
struct Got<M: managed::Manager> {
    object: Object<M>,
    returned: Returned,
    /// The number of evictions when this pool asked for it, and their number now.
    evictions: (u64, Arc<AtomicU64>),
}

impl<M: managed::Manager> Deref for Got<M> {
    type Target = M::Type;

    fn deref(&self) -> &M::Type {
        &self.object
    }
}

impl<M: managed::Manager> DerefMut for Got<M> {
    fn deref_mut(&mut self) -> &mut M::Type {
        &mut self.object
    }
}

impl<M> WrappedObject<M::Type> for Got<M>
where
    M: managed::Manager,
    M::Type: Send + Sync,
{
    fn key(&self) -> ObjectKey {
        ObjectKey::Deadpool(Object::id(&self.object))
    }

    fn is_used(&self) -> bool {
        Object::metrics(&self.object).recycle_count > 0
    }

    fn is_evicted(&self) -> bool {
        self.evictions.0 < self.evictions.1.load(Ordering::Acquire)
    }

    fn take(self: Box<Self>) -> M::Type {
        let Self { object, returned, .. } = *self;
        let taken = Object::take(object);
        drop(returned);
        taken
    }
}

/// The future that gets a connection of the wrapped pool.
pub(super) type Getting<C> = BoxFuture<'static, Result<Box<dyn WrappedObject<C>>, NoObject>>;

/// What this pool asks of a wrapped one.
pub(super) trait WrappedPool<C>: Send + Sync {
    fn get(self: Arc<Self>) -> Getting<C>;

    fn status(&self) -> managed::Status;

    /// The number of idle connections. Unlike [`managed::Status::available`], it is also right while others are
    /// connecting.
    fn idle(&self) -> usize;

    fn returns(&self) -> &Returns;

    /// Closes the idle connections at the first call for `id`, because they still point at the previous primary.
    fn evict_for(&self, id: GenerationId);

    /// Notes that something was sent or received.
    fn count_traffic(&self);

    /// Clears the prepared statements of idle connections.
    fn clear_idle(&self);

    /// Fails if a pool of this kind has its size for life.
    fn resize(&self, max_size: usize) -> Result<(), BuildError>;

    /// Closes the idle connections, and returns how many there were.
    fn evict_idle(&self) -> usize;

    /// Called once, before anything else: the pool's tasks run on `runtime`.
    fn start(&self, runtime: Handle);
}

/// A wrapped pool, without the type of its manager.
pub(super) trait Existing<C>: Open<C> + WrappedPool<C> {}

impl<C, P: Open<C> + WrappedPool<C>> Existing<C> for P {}

/// How an error names the code that has panicked.
pub(super) const MANAGER: &str = "the wrapped pool's manager";

/// Why the wrapped pool gave no connection.
pub(super) enum NoObject {
    /// Its own wait time-out was shorter than this pool's.
    NoneFree,
    Closed,
    /// A log-in has been refused meanwhile, so this one must wait for its turn.
    HeldBack,
    Failed(ProbeFailure),
}

/// Opens sessions with the wrapped pool's manager.
pub(super) struct ExistingPool<M: managed::Manager> {
    existing: managed::Pool<M>,
    parts: OpenerParts,
    /// The newest generation for which idle connections were closed. The first generation closes none.
    evicted_for: AtomicU64,
    returns: Arc<Returns>,
    /// How many times the idle connections were to be closed.
    evictions: Arc<AtomicU64>,
}

impl<M: managed::Manager> ExistingPool<M> {
    pub(super) fn new(existing: managed::Pool<M>) -> Self {
        Self {
            existing,
            parts: OpenerParts::default(),
            evicted_for: AtomicU64::new(1),
            returns: Arc::default(),
            evictions: Arc::default(),
        }
    }
}

impl<M> Open<M::Type> for ExistingPool<M>
where
    M: managed::Manager + 'static,
    M::Type: SessionClient,
    M::Error: StdError + Send + Sync + 'static,
{
    fn parts(&self) -> &OpenerParts {
        &self.parts
    }

    fn open<'a>(&'a self, endpoint: &'a Endpoint, question: Question, scope: Scope) -> BoxFuture<'a, Opened<M::Type>> {
        Box::pin(async move {
            // A panic of the manager costs only this one session.
            let creating = AssertUnwindSafe(async { self.existing.manager().create().await }).catch_unwind();
            let created = creating.await.map_err(|panic| panicked(MANAGER, &*panic))?.map_err(not_created)?;
            let existing = self.existing.clone();
            // The manager may keep a record of the clients that it created, as the one of deadpool-postgres does.
            let client = Guarded::with_on_drop(created, move |client| existing.manager().detach(client));
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

/// Sends the request without TLS. The server does not require TLS for a cancel request. But if the manager's `sslmode`
/// is `require`, the driver refuses to send it.
pub(super) fn cancel_without_tls(token: CancelToken) -> BoxFuture<'static, Result<(), tokio_postgres::Error>> {
    Box::pin(async move { token.cancel_query(NoTls).await })
}

/// Nobody calls this: a wrapped pool refuses `dial` and `listen` before.
pub(super) fn no_owned_session<'a>() -> BoxFuture<'a, OpenedOwned> {
    let message = "a wrapped pool's manager drives its sessions itself";
    Box::pin(async move { Err(ProbeFailure::new(FailureKind::Unreachable, message)) })
}

impl<M> WrappedPool<M::Type> for ExistingPool<M>
where
    M: managed::Manager + 'static,
    M::Type: SessionClient,
    M::Error: StdError + Send + Sync + 'static,
{
    fn get(self: Arc<Self>) -> Getting<M::Type> {
        Box::pin(async move {
            let evictions = (self.evictions.load(Ordering::Acquire), Arc::clone(&self.evictions));
            // A panic of the manager, or of a hook of the wrapped pool, costs only this one connection.
            let getting = AssertUnwindSafe(async { self.existing.get().await }).catch_unwind();
            let got = match getting.await {
                Ok(got) => got,
                Err(panic) => return Err(NoObject::Failed(panicked(MANAGER, &*panic))),
            };
            match got {
                Ok(object) => {
                    let returned = Returned(Arc::clone(&self.returns));
                    Ok(Box::new(Got { object, returned, evictions }) as Box<dyn WrappedObject<M::Type>>)
                }
                Err(PoolError::Backend(error)) => Err(NoObject::Failed(not_created(error))),
                Err(PoolError::Timeout(managed::TimeoutType::Wait)) => Err(NoObject::NoneFree),
                Err(PoolError::Closed) => Err(NoObject::Closed),
                Err(other) => Err(NoObject::Failed(ProbeFailure::new(FailureKind::Unreachable, other.to_string()))),
            }
        })
    }

    fn status(&self) -> managed::Status {
        self.existing.status()
    }

    fn idle(&self) -> usize {
        let mut idle = 0;
        self.existing.retain(|_, _| {
            idle += 1;
            true
        });
        idle
    }

    fn returns(&self) -> &Returns {
        &self.returns
    }

    fn evict_for(&self, id: GenerationId) {
        if self.evicted_for.fetch_max(id.get(), Ordering::AcqRel) >= id.get() {
            return;
        }
        let evicted = self.existing.retain(|_, _| false).removed.len();
        tracing::debug!(evicted, "idle connections of the wrapped pool closed");
    }

    fn count_traffic(&self) {
        self.parts.traffic.fetch_add(1, Ordering::Relaxed);
    }

    fn clear_idle(&self) {
        self.existing.retain(|client, _| clear_idle(client));
    }

    fn resize(&self, max_size: usize) -> Result<(), BuildError> {
        self.existing.resize(max_size);
        Ok(())
    }

    fn evict_idle(&self) -> usize {
        self.evictions.fetch_add(1, Ordering::AcqRel);
        self.existing.retain(|_, _| false).removed.len()
    }

    fn start(&self, _: Handle) {}
}
