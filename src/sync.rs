//! How this crate takes a lock, and how it calls the program's log and metrics where a panic of these must not do harm.
//! A poisoned lock is used like any other. Invariant, kept by every caller: the value behind the lock is consistent
//! after each statement that changes it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, even if it is poisoned.
///
/// Poison only says that another thread panicked while it held the lock. The values behind the locks of this crate are
/// consistent after every statement, so a panic elsewhere need not reach the next caller.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes a line to the program's log, or updates a metric. If its subscriber or its recorder panics, only that is
/// lost, not the session or the call whose task does it.
pub(crate) fn log_safely(report: impl FnOnce()) {
    let _ = catch_unwind(AssertUnwindSafe(report));
}
