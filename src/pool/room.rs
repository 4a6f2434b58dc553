//! How many connections a pool has.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// How much of `max_size` is taken.
#[derive(Default)]
pub(super) struct Room {
    /// The number of existing connections: idle, ready, on loan, and in between. It grows only under the book's lock.
    pub(super) live: AtomicUsize,
    /// How many of them are doubted. Callers that wait may have others in their place.
    pub(super) doubted: AtomicUsize,
    /// A connection or a dial has ended, or a caller has begun to wait.
    pub(super) changed: Notify,
}

/// One connection that counts towards `max_size`, until it is dropped or leaves the pool.
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
