//! Counts the connections of a pool.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// Counts the pool's connections. Those that are being opened are counted in `Book::dialing` of `dialer/queue.rs`; both
/// together are at most `max_size`.
#[derive(Default)]
pub(super) struct Room {
    /// All existing connections: in deadpool, ready in the `DialQueue`, on loan, or on their way between these. It
    /// grows only under the lock of `DialQueue::book`, so that the comparison with `max_size` holds.
    pub(super) live: AtomicUsize,
    /// How many of them are doubted: they have been idle for as long as another one that did not answer its test
    /// (`stale.rs`). While a caller waits, they do not count towards `max_size`.
    pub(super) doubted: AtomicUsize,
    /// How many are being tested for waiting callers.
    pub(super) tested: AtomicUsize,
    /// Wakes the task that opens connections: a place has become free, or another connection is needed.
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
