//! Counts the connections of a pool.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use tokio::sync::Notify;

/// Counts the pool's connections. Those that are being opened are counted in `Book::dialing` of `dialer/queue.rs`; both
/// together are at most `max_size`.
#[derive(Default)]
pub(super) struct ConnectionCounts {
    /// All existing connections: in deadpool, ready in the `DialQueue`, checked out, or on their way between these. It
    /// grows only under the lock of `DialQueue::book`, so that the comparison with `max_size` holds.
    pub(super) live: AtomicUsize,
    /// How many of them are doubted: they have been idle for as long as another one that did not answer its test
    /// (`stale.rs`). While a caller waits, they do not count towards `max_size`.
    pub(super) doubted: AtomicUsize,
    /// How many are being tested for waiting callers.
    pub(super) tested: AtomicUsize,
    /// How many a hook of the user's has in its hands.
    pub(super) hooked: AtomicUsize,
    /// How many times all connections that are not checked out were to be closed.
    pub(super) evictions: AtomicU64,
    /// Wakes the task that opens connections: a place has become free, or another connection is needed.
    pub(super) changed: Notify,
}

impl ConnectionCounts {
    pub(super) fn evictions(&self) -> u64 {
        self.evictions.load(Ordering::Acquire)
    }
}

/// Counts one connection towards `max_size`, until the connection is dropped or leaves the pool.
pub(super) struct CountedConnection {
    room: Arc<ConnectionCounts>,
    /// The number of evictions when its session was opened, or when a caller last gave it back.
    evictions: AtomicU64,
}

impl CountedConnection {
    /// `evictions`: their number when the session was dialled.
    pub(super) fn new(room: &Arc<ConnectionCounts>, evictions: u64) -> Self {
        room.live.fetch_add(1, Ordering::AcqRel);
        Self { room: Arc::clone(room), evictions: AtomicU64::new(evictions) }
    }

    /// A caller has given the connection back. An eviction from before that spared it, because it was checked out.
    pub(super) fn given_back(&self) {
        self.evictions.store(self.room.evictions(), Ordering::Relaxed);
    }

    /// Returns whether all connections were to be closed since.
    pub(super) fn is_evicted(&self) -> bool {
        self.evictions.load(Ordering::Relaxed) < self.room.evictions()
    }
}

impl Drop for CountedConnection {
    fn drop(&mut self) {
        self.room.live.fetch_sub(1, Ordering::AcqRel);
        self.room.changed.notify_one();
    }
}
