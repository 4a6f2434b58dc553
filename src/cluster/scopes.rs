//! The scopes of generations that have ended. They are ended only after the newer state was published.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::timeout;

use crate::server::Scope;
use crate::topology::{Eviction, Primary};

pub(super) struct Scopes {
    /// Scopes that are still to be ended, and why.
    due: VecDeque<(Scope, Eviction, Primary)>,
    /// The scopes of a fenced primary, on which COMMITs may be under way.
    fenced: Vec<(Scope, Primary)>,
    /// How long a fenced primary has for its answer to a COMMIT.
    limit: Duration,
}

impl Scopes {
    pub(super) fn new(limit: Duration) -> Self {
        Self { due: VecDeque::new(), fenced: Vec::new(), limit }
    }

    /// Notes a generation's end.
    pub(super) fn end(&mut self, scope: Scope, cause: Eviction, primary: Primary) {
        self.due.push_back((scope, cause, primary));
    }

    /// A generation begins. If its primary is another server, the fenced one is of no use any more: the new one knows
    /// best what became of a COMMIT. If it is the same server, that goes on with the COMMIT. It may even be fenced
    /// still: a session that began just before the fence reports for a moment that the server accepts writes.
    pub(super) fn begin(&mut self, primary: &Primary) {
        let is_same = |(_, fenced): &(Scope, Primary)| fenced.is(&primary.endpoint.address, &primary.report);
        let (same, left): (Vec<_>, Vec<_>) = std::mem::take(&mut self.fenced).into_iter().partition(is_same);
        self.fenced = same;
        self.due.extend(left.into_iter().map(|(scope, primary)| (scope, Eviction::Replaced, primary)));
    }

    /// Returns whether this scope has ended, or will when its turn comes.
    pub(super) fn includes(&self, scope: &Scope) -> bool {
        scope.is_cancelled() || self.due.iter().any(|(due, ..)| due == scope)
    }

    /// Ends the scopes that are due.
    ///
    /// A fence keeps back new transactions only, and the server goes on with those that have begun. While no other
    /// primary is known, nobody else can tell how a COMMIT ends that is under way there.
    pub(super) fn carry_out(&mut self) {
        self.fenced.retain(|(scope, _)| !scope.abandoned().is_cancelled());
        while let Some((scope, cause, primary)) = self.due.pop_front() {
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
            self.fenced.push((scope, primary));
        }
    }
}
