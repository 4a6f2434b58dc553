//! Notices calls within a transaction's closure. Such a call can never get a connection that a transaction around it
//! holds.

use std::sync::Arc;

use super::Pool;
use crate::server::SessionClient;

tokio::task_local! {
    static INNERMOST: Holder;
}

/// A transaction of this task that holds a connection while its closure runs.
#[derive(Clone)]
struct Holder {
    /// The pool's address, which is valid for as long as the connection.
    pool: usize,
    outer: Option<Arc<Holder>>,
}

impl<C: SessionClient> Pool<C> {
    /// Runs a closure's work as the holder of one of this pool's connections.
    ///
    /// A task that the work spawns does not count as part of the work. A future that is first polled here does, even if
    /// it finishes after the closure has returned.
    pub(crate) fn holding<F: Future>(&self, work: F) -> impl Future<Output = F::Output> + use<F, C> {
        let outer = INNERMOST.try_with(|outer| Arc::new(outer.clone())).ok();
        INNERMOST.scope(Holder { pool: self.address(), outer }, work)
    }

    /// Returns whether the transactions around this call hold all connections. Then no connection can become free while
    /// this call waits.
    pub(super) fn is_held_by_caller(&self) -> bool {
        let held = |innermost: &Holder| {
            let holders = std::iter::successors(Some(innermost), |holder| holder.outer.as_deref());
            let held = holders.filter(|holder| holder.pool == self.address()).count();
            // The owner of a wrapped pool that is closed has set its size to 0.
            held > 0 && (1..=held).contains(&self.shared.source.status().max_size)
        };
        INNERMOST.try_with(held).unwrap_or(false)
    }

    /// Returns whether this is called within a transaction of this pool.
    pub(super) fn is_within_a_call(&self) -> bool {
        let within = |innermost: &Holder| {
            let mut holders = std::iter::successors(Some(innermost), |holder| holder.outer.as_deref());
            holders.any(|holder| holder.pool == self.address())
        };
        INNERMOST.try_with(within).unwrap_or(false)
    }

    fn address(&self) -> usize {
        Arc::as_ptr(&self.shared).addr()
    }
}
