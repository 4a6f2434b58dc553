//! Counts the connections of a pool.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// How much of `max_size` is taken.
#[derive(Default)]
pub(super) struct Room {
    /// The number of existing connections: those that are idle in deadpool, ready, on loan, or on their way between
    /// these. It grows only while the book is locked.
    pub(super) live: AtomicUsize,
    /// How many of them are doubted. Others may be opened in their place for callers that wait.
    pub(super) doubted: AtomicUsize,
    /// A connection or a dial has ended, or a caller has begun to wait.
    pub(super) changed: Notify,
}

/// Counts one connection towards `max_size`, until the connection is dropped or leaves the pool.
pub(super) struct Berth(Arc<Room>);

impl Berth {
    pub(super) fn new(room: &Arc<Room>) -> Self {
        room.live.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(room))
    }
}

impl Drop for Berth {
    fn drop(&mut self) {
        self.0.live.fetch_sub(1, Ordering::AcqRel);
        self.0.changed.notify_one();
    }
}
