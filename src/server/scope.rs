//! The scope that ends the sessions of one generation.

use std::ops::Deref;

use tokio_util::sync::CancellationToken;

/// Ends sessions, in one step or in two. Derefs to the token of the first step, after which no work begins or goes on.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Scope {
    left: CancellationToken,
    /// The first step is a child of this one.
    abandoned: CancellationToken,
}

impl Scope {
    /// Creates a scope that ends with `root`.
    pub(crate) fn within(root: &CancellationToken) -> Self {
        let abandoned = root.child_token();
        Self { left: abandoned.child_token(), abandoned }
    }

    /// Ends the sessions, except those with a COMMIT under way. These end when they have the answer.
    pub(crate) fn leave(&self) {
        self.left.cancel();
    }

    /// Ends all sessions.
    pub(crate) fn abandon(&self) {
        self.abandoned.cancel();
    }

    /// The token of the second step, after which no answer is waited for.
    pub(crate) fn abandoned(&self) -> &CancellationToken {
        &self.abandoned
    }
}

impl Deref for Scope {
    type Target = CancellationToken;

    fn deref(&self) -> &CancellationToken {
        &self.left
    }
}
