//! The scopes of generations that have ended. They are ended only after the newer state was published.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::timeout;

use crate::server::Scope;
use crate::topology::Eviction;

pub(super) struct Scopes {
    /// Scopes that are still to be ended, and why.
    due: VecDeque<(Scope, Eviction)>,
    /// The scope of a fenced primary, on which COMMITs may be under way.
    fenced: Option<Scope>,
    /// How long a fenced primary has for its answer to a COMMIT.
    limit: Duration,
}

impl Scopes {
    pub(super) fn new(limit: Duration) -> Self {
        Self { due: VecDeque::new(), fenced: None, limit }
    }

    /// Notes a generation's end.
    pub(super) fn end(&mut self, scope: Scope, cause: Eviction) {
        self.due.push_back((scope, cause));
    }

    /// A generation begins, so the primary of the one before is of no use any more: the new one knows best what became
    /// of a COMMIT.
    pub(super) fn begin(&mut self) {
        self.due.extend(self.fenced.take().map(|scope| (scope, Eviction::Replaced)));
    }

    /// Returns whether this scope has ended, or will when its turn comes.
    pub(super) fn includes(&self, scope: &Scope) -> bool {
        scope.is_cancelled() || self.due.iter().any(|(due, _)| due == scope)
    }

    /// Ends the scopes that are due.
    ///
    /// A fence keeps back new transactions only, and the server goes on with those that have begun. While no other
    /// primary is known, nobody else can tell how a COMMIT ends that is under way there.
    pub(super) fn carry_out(&mut self) {
        while let Some((scope, cause)) = self.due.pop_front() {
            if planted!("leaves the older connections open") {
                continue;
            }
            if cause != Eviction::Fenced {
                scope.abandon();
                continue;
            }
            scope.leave();
            let (limit, last) = (self.limit, scope.clone());
            tokio::spawn(async move {
                let _ = timeout(limit, last.abandoned().cancelled()).await;
                last.abandon();
            });
            self.fenced = Some(scope);
        }
    }
}
