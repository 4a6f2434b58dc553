//! How an unused topology sleeps: it ends its generation, and asks no server until it is woken.

use tokio::time::Instant;

use super::lives::Beside;
use super::view::Eviction;
use super::{Action, Change, Phase, Search, Topology};

impl Topology {
    /// Forgets the primary and ends its generation, because another server may be the primary when one is needed again.
    /// Do not poll the topology until [`Topology::wake`].
    pub(crate) fn sleep(&mut self, now: Instant, why: &str) {
        let id = match &self.phase {
            Phase::Known { primary, .. } => Some(primary.id),
            Phase::Searching(search) => search.suspended.as_ref().map(|suspended| suspended.primary.id),
        };
        self.actions.clear();
        seen!("transitions", "{} to asleep", if id.is_some() { "known or suspended" } else { "searching" });
        if let Some(id) = id {
            let why = why.to_owned();
            self.actions.push(Action::End { id, cause: Eviction::Asleep, why, lost: false });
        }
        self.asleep = true;
        self.unasked.begin(now);
        self.search_anew(now, why);
    }

    /// Returns the actions that falling asleep requires.
    pub(crate) fn lie_down(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// Searches as in the very first search: before a server is accepted, the search waits for the answers of the
    /// others.
    pub(crate) fn wake(&mut self, now: Instant) {
        self.asleep = false;
        seen!("transitions", "asleep to searching");
        self.search_anew(now, "woken by a caller");
        self.unasked.end(now);
        self.names.iter_mut().for_each(|name| name.ask_anew(now));
    }

    fn search_anew(&mut self, now: Instant, why: &str) {
        self.phase = Phase::Searching(Search::new(now));
        self.changed = Change { at: now, why: why.to_owned() };
        self.revision += 1;
        // The cluster's task has dropped all questions that were under way and will not report their results, so forget
        // them.
        self.beside = Beside::default();
        for member in self.members.values_mut() {
            member.asking = false;
            member.prompt = false;
            member.fresh = true;
            member.promotion_wait = None;
            member.opened_at = None;
            member.due = now;
        }
    }

    pub(super) fn is_asleep(&self) -> bool {
        self.asleep
    }
}
