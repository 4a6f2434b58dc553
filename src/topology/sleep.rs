//! A topology that has not been used for long: it ends its generation, and asks no server until it is woken.

use tokio::time::Instant;

use super::lives::Beside;
use super::view::Eviction;
use super::{Action, Change, Phase, Search, Topology};

/// Whether the pool is in use, so that it must know the primary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Sleep {
    #[default]
    Awake,
    Asleep,
    /// What was known before the sleep is outdated: the newest timeline known then may now be an old primary's.
    Woken,
}

impl Topology {
    /// Forgets the primary and ends its generation, as there may be another primary by the time it is needed again.
    /// Do not poll the topology until [`Topology::wake`].
    pub(crate) fn sleep(&mut self, now: Instant, why: &str) {
        let id = match &self.phase {
            Phase::Known { primary, .. } => Some(primary.id),
            Phase::Searching(search) => search.suspended.as_ref().map(|suspended| suspended.primary.id),
        };
        self.actions.clear();
        if let Some(id) = id {
            let why = why.to_owned();
            self.actions.push(Action::End { id, cause: Eviction::Asleep, why, lost: false });
        }
        self.search_anew(now, Sleep::Asleep, why);
    }

    /// Returns the actions that the sleep requires.
    pub(crate) fn lie_down(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// Searches as in the very first search: every server may object before one is accepted.
    pub(crate) fn wake(&mut self, now: Instant) {
        self.search_anew(now, Sleep::Woken, "woken by a caller");
        self.names.iter_mut().for_each(|name| name.ask_anew(now));
    }

    fn search_anew(&mut self, now: Instant, sleep: Sleep, why: &str) {
        self.sleep = sleep;
        self.phase = Phase::Searching(Search::new(now));
        self.changed = Change { at: now, why: why.to_owned() };
        self.revision += 1;
        // Forgets all questions under way, as their ends will not be reported.
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
        self.sleep == Sleep::Asleep
    }

    /// The newest timeline, if no other server can have passed it unnoticed during a sleep.
    pub(super) fn newest_if_awake(&self) -> Option<u32> {
        self.newest_timeline.filter(|_| self.sleep == Sleep::Awake)
    }

    /// A primary was found, so what is known is up to date again.
    pub(super) fn rested(&mut self) {
        self.sleep = Sleep::Awake;
    }
}
