//! What the cluster's task publishes.

use std::sync::Arc;

use tokio::time::Instant;

use super::Generation;
use crate::topology::View;

/// What the task publishes: the view, and the generation whose connections may be handed out.
pub(crate) struct Snapshot<C> {
    pub(crate) view: View,
    /// Set exactly while the view's state is [`State::Primary`](crate::topology::State::Primary).
    pub(crate) generation: Option<Arc<Generation<C>>>,
    /// When the question was sent whose answer shows that waiting does not help. `None` unless the view says so.
    pub(super) refused_as_of: Option<Instant>,
    /// When the generation became the current one.
    since: Instant,
}

impl<C> Snapshot<C> {
    /// The first snapshot, from before the first search.
    pub(super) fn first(view: View) -> Self {
        Self { since: view.changed.at, view, generation: None, refused_as_of: None }
    }

    /// The snapshot that follows this one.
    pub(super) fn next(
        &self,
        view: View,
        generation: Option<Arc<Generation<C>>>,
        refused_as_of: Option<Instant>,
    ) -> Self {
        let id = |generation: &Option<Arc<Generation<C>>>| generation.as_ref().map(|generation| generation.primary.id);
        // A view also changes when the generation's server is found at another address.
        let since = if id(&generation) == id(&self.generation) { self.since } else { view.changed.at };
        Self { view, generation, refused_as_of, since }
    }

    /// Returns since when the current generation has been the current one without a break, if there is one.
    pub(super) fn since(&self) -> Option<Instant> {
        self.generation.as_ref().map(|_| self.since)
    }
}
