//! How this crate takes a lock, and how it logs where a panic would end more than one line.
//! Decides one thing: a poisoned lock is used as if it were whole. Knows nothing of what the locks hold.
//! Invariant, kept by every caller: the value behind the lock is whole after each statement that changes it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, poisoned or not.
///
/// Poison only says that another thread panicked while it held the lock. The values behind the locks of this crate are
/// whole after every statement, so a panic elsewhere need not reach the next caller.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes a line to the program's log. If its subscriber panics, that costs the line, and not the session or the call
/// whose task writes it.
pub(crate) fn log_safely(line: impl FnOnce()) {
    let _ = catch_unwind(AssertUnwindSafe(line));
}
