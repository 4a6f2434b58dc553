//! Calls within a transaction's closure: a connection that its own transactions hold is never to be had.

use std::sync::Arc;

use super::Pool;
use crate::server::SessionClient;

tokio::task_local! {
    static INNERMOST: Holder;
}

/// A transaction of this task that holds a connection for as long as its closure runs.
#[derive(Clone)]
struct Holder {
    /// The pool, by its address: it lives for as long as the connection does.
    pool: usize,
    outer: Option<Arc<Holder>>,
}

impl<C: SessionClient> Pool<C> {
    /// Runs a closure's work as what holds one of this pool's connections.
    ///
    /// A task that the work spawns is not seen as a part of it. What is polled here first and finished after the closure
    /// has returned counts as a part nevertheless.
    pub(crate) fn holding<F: Future>(&self, work: F) -> impl Future<Output = F::Output> + use<F, C> {
        let outer = INNERMOST.try_with(|outer| Arc::new(outer.clone())).ok();
        INNERMOST.scope(Holder { pool: self.address(), outer }, work)
    }

    /// Do the transactions around this call hold all connections that there are? Then none is ever given back to it.
    pub(super) fn is_held_by_caller(&self) -> bool {
        let max_size = self.source.status().max_size;
        let held = |innermost: &Holder| {
            let holders = std::iter::successors(Some(innermost), |holder| holder.outer.as_deref());
            holders.filter(|holder| holder.pool == self.address()).count() >= max_size
        };
        INNERMOST.try_with(held).unwrap_or(false)
    }

    fn address(&self) -> usize {
        Arc::as_ptr(&self.shared).addr()
    }
}
