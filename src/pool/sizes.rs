//! Changes a pool while it runs: its size, and its idle connections.

use deadpool::managed;

use super::options::usable_size;
use super::{Manager, Pool, Source};
use crate::error::BuildError;
use crate::server::SessionClient;
use crate::sync::lock;

impl<C: SessionClient> Pool<C> {
    /// Changes [`PoolBuilder::max_size`](crate::PoolBuilder::max_size) of the running pool, for all its clones.
    ///
    /// A larger pool serves waiting callers at once. A smaller one closes idle connections, and those checked out when
    /// they come back; until then there are more of them than `max_size`. Never waits. A pool that is closed stays as
    /// it is.
    ///
    /// Of a [wrapped](Pool::wrap) pool, it changes the size of the deadpool pool inside, and that size is then no firm
    /// limit. When deadpool 0.13 makes a pool smaller, it takes back only the places of open connections, and when it
    /// makes a pool larger again, it adds new places. So each time that a pool shrinks while it has fewer connections
    /// than its old size, and grows again, it may open more connections at once than before, without a bound; it closes
    /// the surplus as it comes back. Choose the size of such a pool once. The limit of this crate's own pools always
    /// holds. A bb8 pool has its size for life.
    ///
    /// # Errors
    /// Fails like [`PoolBuilder::build`](crate::PoolBuilder::build) if the size is zero, more than a server accepts, or
    /// less than [`PoolBuilder::min_idle`](crate::PoolBuilder::min_idle), or if the pool wraps one of bb8. The pool
    /// then stays as it is.
    ///
    /// ```no_run
    /// # fn example(pool: tokio_postgres_failover::Pool) -> Result<(), tokio_postgres_failover::BuildError> {
    /// pool.resize(32)?;
    /// assert_eq!(pool.status().max_size, 32);
    /// # Ok(())
    /// # }
    /// ```
    pub fn resize(&self, max_size: usize) -> Result<(), BuildError> {
        usable_size(max_size)?;
        let _one_at_a_time = lock(&self.shared.calls.resizing);
        if self.cluster().is_closed() {
            return Ok(());
        }
        let min_idle = match &self.shared.source {
            Source::Own(inner) => self.resize_own(inner, max_size)?,
            Source::Wrapped(wrapped) => {
                wrapped.existing.resize(max_size)?;
                0
            }
        };
        self.observer().sized(max_size, min_idle);
        // It may have been closed just now, and a closed pool has no size.
        if self.cluster().is_closed() {
            self.observer().sized(0, 0);
        }
        tracing::info!(max_size, "the pool's size was changed");
        Ok(())
    }

    fn resize_own(&self, inner: &managed::Pool<Manager<C>>, max_size: usize) -> Result<usize, BuildError> {
        let min_idle = self.shared.dialer.queue.min_idle();
        if min_idle > max_size {
            let problem = format!("{max_size} is less than min_idle, {min_idle}; a pool keeps its min_idle for life");
            return Err(BuildError::invalid("max_size", problem));
        }
        self.shared.dialer.queue.resize(max_size);
        inner.resize(max_size);
        Ok(min_idle)
    }

    /// Closes all idle connections, and returns how many there were. Those checked out stay. Those that a hook or a
    /// test of the pool has at this moment, and those that are being opened, are closed when that ends. The next
    /// callers get new ones, and [`PoolBuilder::min_idle`](crate::PoolBuilder::min_idle) is filled again.
    ///
    /// Use it when new sessions differ from old ones: after `ALTER ROLE … SET`, a change of a service behind a proxy,
    /// or a rotated certificate. A failover needs no such call. Never waits.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), tokio_postgres_failover::Error> {
    /// pool.transaction(async |tx| Ok(tx.batch_execute("ALTER ROLE app SET work_mem = '64MB'").await?)).await?;
    /// pool.evict_idle();
    /// # Ok(())
    /// # }
    /// ```
    pub fn evict_idle(&self) -> usize {
        let closed = match &self.shared.source {
            Source::Own(_) => self.evict_own(),
            Source::Wrapped(wrapped) => wrapped.existing.evict_idle(),
        };
        tracing::debug!(closed, "idle connections closed");
        closed
    }

    fn evict_own(&self) -> usize {
        // The session that proved the primary is as old as the others.
        drop(self.cluster().current().and_then(|generation| generation.take_spare()));
        // Before the idle ones are taken out, so that what is on its way back to them meanwhile is closed as well.
        self.shared.dialer.queue.evict();
        self.shared.dialer.queue.take_silent(u64::MAX).len()
    }
}
