//! A call within another call's closure: its doubt is the outer one's, whatever the closure makes of the error. Running the
//! outer one again would run the inner one again, too.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use crate::pool::Trail;

tokio::task_local! {
    /// The session of the call whose closure runs.
    static OUTER: Arc<Trail>;
}

/// Polls a closure's future as that of the call on this session. No future of its own: each layer of those that a user's
/// program is wrapped in counts, as the compiler has a limit.
pub(super) fn poll_within<F: Future>(
    trail: &Arc<Trail>,
    work: Pin<&mut F>,
    context: &mut Context<'_>,
) -> Poll<F::Output> {
    OUTER.sync_scope(Arc::clone(trail), || work.poll(context))
}

/// A call under way. Dropped before it has ended, its outcome is not known to anybody.
pub(super) struct Inner(());

impl Inner {
    pub(super) fn begin() -> Self {
        Self(())
    }

    /// `doubt`: it may or may not have been committed.
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
    // Mostly there is no outer call.
    let _ = OUTER.try_with(|outer| outer.note_doubt());
}
