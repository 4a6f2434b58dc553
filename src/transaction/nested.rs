//! Calls within another call's closure. If the outcome of the inner call is in doubt, the outer call must not run
//! again: it would apply the inner work a second time. This holds even if the closure hides the inner call's error, and
//! on every path. `decide` has the rule, and `tests/it/transaction/inner.rs` the tests.
//!
//! A call in a task that the closure spawns is not seen.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

tokio::task_local! {
    /// The call whose closure runs.
    static OUTER: InnerDoubt;
}

/// Whether the outcome of another call, made within this call's closure, is unknown.
#[derive(Clone, Debug, Default)]
pub(super) struct InnerDoubt(Arc<Flags>);

#[derive(Debug, Default)]
struct Flags {
    noted: AtomicBool,
    /// The outcome of a closure's run may be unknown: it has run, and is not known to have been rolled back.
    begun: AtomicBool,
}

impl InnerDoubt {
    fn note(&self) {
        self.0.noted.store(true, Ordering::Release);
    }

    pub(super) fn is_noted(&self) -> bool {
        self.0.noted.load(Ordering::Acquire)
    }

    /// This call's closure begins. Before that, nothing of the call can have been committed.
    pub(super) fn begin_work(&self) {
        self.0.begun.store(true, Ordering::Release);
    }

    /// The next run of this call's closure has not begun. `undone`: all runs so far are known to have been rolled back.
    pub(super) fn rest_if(&self, undone: bool) {
        if undone {
            self.0.begun.store(false, Ordering::Release);
        }
    }
}

/// Polls a closure's future as a part of the call with these flags. This is a function, not a future of its own,
/// because the compiler limits the depth of nested futures.
pub(super) fn poll_within<F: Future>(
    doubt: &InnerDoubt,
    work: Pin<&mut F>,
    context: &mut Context<'_>,
) -> Poll<F::Output> {
    OUTER.sync_scope(doubt.clone(), || work.poll(context))
}

/// A call that is under way. If this is dropped before the call has ended, and its closure has run, the call's outcome
/// is unknown.
pub(super) struct Inner {
    /// The outer call's flags, if there is an outer call. They are looked up at the beginning, because this may be
    /// dropped outside of the outer closure.
    outer: Option<InnerDoubt>,
    /// This call's own flags.
    own: InnerDoubt,
    /// The call's work must not be done twice.
    once: bool,
}

impl Inner {
    /// Call this while the call's future is polled.
    pub(super) fn begin(once: bool) -> Self {
        Self { outer: OUTER.try_with(InnerDoubt::clone).ok(), own: InnerDoubt::default(), once }
    }

    pub(super) fn doubt(&self) -> InnerDoubt {
        self.own.clone()
    }

    /// `unknown`: it is unknown whether the call was committed.
    pub(super) fn ended(mut self, unknown: bool) {
        self.once &= unknown;
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let Some(outer) = &self.outer else { return };
        let in_doubt = self.once && self.own.0.begun.load(Ordering::Acquire);
        // If the outcome of a call within this one is unknown, that concerns the outer call, too.
        if in_doubt || self.own.is_noted() {
            outer.note();
        }
    }
}
