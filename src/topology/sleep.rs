//! A topology of which nobody has asked anything for long: it ends its generation, and asks nobody anything until it is woken.

use tokio::time::Instant;

use super::lives::Beside;
use super::view::Eviction;
use super::{Action, Change, Phase, Search, Topology};

/// Whether anybody needs to know who the primary is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Sleep {
    #[default]
    Awake,
    Asleep,
    /// What was known before the sleep is old: a timeline that was the newest then may be an old primary's now.
    Woken,
}

impl Topology {
    /// Forgets who the primary is, and ends its generation: by the time that it is asked for again there may be another one.
    /// Until [`Topology::wake`] it must not be polled.
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

    /// What is to be done for the sleep.
    pub(crate) fn lie_down(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// Searches, as in the first search of all: every server may object before one is believed.
    pub(crate) fn wake(&mut self, now: Instant) {
        self.search_anew(now, Sleep::Woken, "woken by a caller");
        self.names.iter_mut().for_each(|name| name.ask_anew(now));
    }

    fn search_anew(&mut self, now: Instant, sleep: Sleep, why: &str) {
        self.sleep = sleep;
        self.phase = Phase::Searching(Search::new(now));
        self.changed = Change { at: now, why: why.to_owned() };
        self.revision += 1;
        // Whatever was under way is forgotten: nobody will tell how it ended.
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

    /// The newest timeline, where no other server can have gone beyond it unnoticed.
    pub(super) fn newest_if_awake(&self) -> Option<u32> {
        self.newest_timeline.filter(|_| self.sleep == Sleep::Awake)
    }

    /// A primary was found.
    pub(super) fn rested(&mut self) {
        self.sleep = Sleep::Awake;
    }
}
