//! Counts what this process takes from its allocator, and the time of its processors.
//!
//! The one place with unsafe code: an allocator cannot be written without. It hands everything on to the system's.
//! While it does not count, it costs one read of a flag that nobody writes.

#![allow(
    unsafe_code,
    reason = "`GlobalAlloc` is an unsafe trait; every call goes on to the system's allocator as it came"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

static COUNTS: AtomicBool = AtomicBool::new(false);
static CALLS: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicU64 = AtomicU64::new(0);

struct Counting;

fn note(bytes: usize) {
    if COUNTS.load(Ordering::Relaxed) {
        CALLS.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

// SAFETY: each method hands its arguments to the system's allocator unchanged, and returns what that returned. Counting
// allocates nothing and cannot unwind.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`, and the pointer came from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: as in `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        // SAFETY: as in `dealloc`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// What was allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocations {
    /// Allocations and reallocations.
    pub calls: u64,
    /// What they asked for.
    pub bytes: u64,
}

/// Counts the allocations of the whole process while `work` runs. Two at the same time would count each other's.
pub async fn allocations<T>(work: impl Future<Output = T>) -> (T, Allocations) {
    CALLS.store(0, Ordering::Relaxed);
    BYTES.store(0, Ordering::Relaxed);
    COUNTS.store(true, Ordering::SeqCst);
    let done = work.await;
    COUNTS.store(false, Ordering::SeqCst);
    (done, Allocations { calls: CALLS.load(Ordering::Relaxed), bytes: BYTES.load(Ordering::Relaxed) })
}

/// The time that all threads of this process have spent on a processor, in the kernel or not.
pub fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_allocated_is_counted() {
        let (kept, some) = allocations(async { vec![vec![0_u8; 100_000], vec![1_u8; 100_000]] }).await;
        assert!(some.calls >= 3 && some.bytes >= 200_000, "{some:?}, {}", kept.len());
        let before = cpu_time();
        while cpu_time() == before {}
    }
}
