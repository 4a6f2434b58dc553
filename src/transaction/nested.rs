//! A call within another call's closure. If its outcome is in doubt, so is the outer call's, whatever the closure makes
//! of the error: running the outer call again would run the inner one again, too.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use crate::pool::Trail;

tokio::task_local! {
    /// The session of the call whose closure runs.
    static OUTER: Arc<Trail>;
}

/// Polls a closure's future as part of the call on this session. It is a function and not a future of its own, because
/// the compiler limits the depth of nested futures.
pub(super) fn poll_within<F: Future>(
    trail: &Arc<Trail>,
    work: Pin<&mut F>,
    context: &mut Context<'_>,
) -> Poll<F::Output> {
    OUTER.sync_scope(Arc::clone(trail), || work.poll(context))
}

/// A call under way. If it is dropped before its end, its outcome is unknown.
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
    // In most cases there is no outer call.
    let _ = OUTER.try_with(|outer| outer.note_doubt());
}
