//! Calls within another call's closure. If the outcome of the inner call is in doubt, the outer call must not run
//! again: it would apply the inner work a second time. This holds even if the closure hides the inner call's error.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use crate::pool::Trail;

tokio::task_local! {
    /// The session of the call whose closure runs.
    static OUTER: Arc<Trail>;
}

/// Polls a closure's future as part of the call on this session. This is a function, not a future of its own, because
/// the compiler limits the depth of nested futures.
pub(super) fn poll_within<F: Future>(
    trail: &Arc<Trail>,
    work: Pin<&mut F>,
    context: &mut Context<'_>,
) -> Poll<F::Output> {
    OUTER.sync_scope(Arc::clone(trail), || work.poll(context))
}

/// A call that is under way. If this is dropped before the call has ended, the call's outcome is unknown.
pub(super) struct Inner(());

impl Inner {
    pub(super) fn begin() -> Self {
        Self(())
    }

    /// `doubt`: it is unknown whether the call was committed.
    pub(super) fn ended(self, doubt: bool) {
        std::mem::forget(self);
        if doubt {
            note_doubt();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        note_doubt();
    }
}

fn note_doubt() {
    // This fails if there is no outer call, which is the usual case.
    let _ = OUTER.try_with(|outer| outer.note_doubt());
}
