//! The deadpool manager that creates the pool's connections, and tests them before they are handed out again.

use std::fmt;
use std::sync::Arc;

use deadpool::managed::{self, Metrics, Object, RecycleError, RecycleResult};
use deadpool_postgres::ClientWrapper;

use super::connection::Connection;
use super::dialer::Dialer;
use crate::error::Error;
use crate::server::SessionClient;

/// The deadpool manager inside a [`Pool`](crate::Pool), for deadpool pools that are built by hand.
///
/// Its `create` waits for a primary, and then until the primary accepts a session. It has no limit of its own, so give
/// the pool time-outs, or limit each `get`. Its `recycle` does no I/O on a recently used connection; see
/// [`PoolBuilder::test_idle_after`]. Unlike [`Pool`](crate::Pool), such a pool offers neither transactions nor
/// explained time-outs, and when it is dropped, all its connections end, even those in use.
///
/// [`PoolBuilder::test_idle_after`]: crate::PoolBuilder::test_idle_after
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use tokio_postgres_failover::{Manager, Pool, deadpool};
///
/// let manager: Manager = Pool::builder("postgres://app@my-pg.internal/app")?.build_manager()?;
/// let pool = deadpool::managed::Pool::<Manager>::builder(manager).max_size(8).build()?;
/// let connection = pool.get().await?;
/// connection.batch_execute("SELECT 1").await?;
/// # Ok(())
/// # }
/// ```
pub struct Manager<C: SessionClient = ClientWrapper> {
    pub(super) dialer: Arc<Dialer<C>>,
}

impl<C: SessionClient> Manager<C> {
    pub(super) fn new(dialer: Arc<Dialer<C>>) -> Self {
        Self { dialer }
    }
}

impl<C: SessionClient> managed::Manager for Manager<C> {
    type Type = Connection<C>;
    type Error = Error;

    async fn create(&self) -> Result<Connection<C>, Error> {
        // Boxed, because it is rare and large, and would otherwise enlarge the future of every call.
        Box::pin(self.dialer.connection()).await
    }

    async fn recycle(&self, connection: &mut Connection<C>, _: &Metrics) -> RecycleResult<Error> {
        if !connection.usable() || connection.expired() {
            return Err(RecycleError::message("the connection has ended, or is too old"));
        }
        let (cluster, id) = (&self.dialer.cluster, connection.facts().generation);
        // If a caller gives up inside `recycle`, deadpool closes a good connection. So this crate's own pool waits for
        // nothing here. `checkout.rs` waits instead, and the connection stays in the pool meanwhile.
        if !self.dialer.queue.is_pool_built_by_hand() {
            let ended = cluster.has_ended(id);
            return if ended { Err(RecycleError::message("the connection's generation has ended")) } else { Ok(()) };
        }
        if !connection.idle().await {
            self.dialer.cancel_running(connection, connection.facts());
            return Err(RecycleError::message("something is under way on the connection, or a transaction is open"));
        }
        if !self.dialer.is_alive(connection).await {
            return Err(RecycleError::message("its server has not answered"));
        }
        if cluster.is_current(id) {
            return Ok(());
        }
        // No primary is verified now. If the same server is the next primary, its connections are as good as before.
        let generation = cluster.primary().await.map_err(|none| RecycleError::Backend(Error::without_primary(none)))?;
        if generation.primary.id == id && connection.usable() {
            return Ok(());
        }
        Err(RecycleError::message("the connection belongs to an older generation"))
    }
}

impl<C: SessionClient> Dialer<C> {
    /// Takes back a good connection. It goes to a caller that waits for a new connection, or else to the idle ones.
    pub(super) fn give_back(&self, mut object: Object<Manager<C>>) {
        object.returned();
        if object.is_evicted() {
            return drop(Object::take(object));
        }
        if !self.queue.wanted() {
            drop(object);
        } else if self.queue.is_surplus(&mut object) {
            return drop(Object::take(object));
        } else if object.may_be_handed_out(&self.cluster) {
            return self.queue.hand(Object::take(object));
        }
        // A caller may have begun to wait just now.
        if self.queue.wanted() {
            self.queue.offer_idle();
        }
    }
}

impl<C: SessionClient> fmt::Debug for Manager<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Manager").field("view", &self.dialer.cluster.view()).finish_non_exhaustive()
    }
}
