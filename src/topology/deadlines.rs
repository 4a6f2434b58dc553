//! What the topology does by itself, and when. Both [`Topology::poll`] and [`Topology::wake_at`] read one table, so
//! nothing can become due without a wake-up.
//!
//! The idea comes from quinn-proto's `timer.rs`. There, the table stores the instants. Here, each instant is computed
//! from the state that it depends on, so that no second copy must be kept up to date.

use tokio::time::Instant;

use super::pace::LONG_SEARCH;
use super::{Action, Topology};

type At = fn(&Topology) -> Option<Instant>;

/// One thing that the topology does by itself.
struct Deadline {
    when: When,
    act: fn(&mut Topology, Instant),
}

enum When {
    /// It is done once when this instant has come. Doing it moves the instant, or removes it.
    At(At),
    /// It is done at every poll from this instant on, so only the first of these polls needs a wake-up.
    From(At),
    /// It depends on more than the time, so it is called at every poll. This instant is the latest time for the next
    /// poll.
    EachPoll(At),
}

/// In the order in which they are carried out: what decides about the primary, then what hurries questions, then what
/// asks them.
static DEADLINES: [Deadline; 15] = [
    // The pool's own cluster has been silent for so long that another one is followed.
    Deadline { when: When::From(Topology::follow_at), act: Topology::follow_successor },
    // The best writable server has waited long enough for the answers of the other servers.
    Deadline { when: When::At(Topology::pick_at), act: Topology::decide_pick },
    // Every server that answers refuses the pool, and waiting has not helped.
    Deadline { when: When::At(|it| it.search()?.judge_at), act: Topology::judge_refusals },
    // A primary that was suspended for silence is heard on an open session.
    Deadline { when: When::EachPoll(Topology::listens_at), act: Topology::resume_heard },
    // A suspended primary has been silent for `dead_after`.
    Deadline { when: When::At(Topology::dead_at), act: Topology::give_up_silent },
    // The search takes long, so the operator is told.
    Deadline { when: When::At(Topology::long_search_at), act: Topology::tell_of_a_long_search },
    // The known primary's sessions receive nothing, and new ones fail. This needs no wake-up of its own, because the
    // next row samples the sessions often enough.
    Deadline { when: When::EachPoll(|_| None), act: Topology::give_up_mute },
    // The known primary's sessions are silent while they are in use.
    Deadline { when: When::EachPoll(Topology::sample_at), act: Topology::ask_if_quiet },
    // No session is kept, or the primary is suspended for silence, and the pool has idle sessions.
    Deadline { when: When::At(Topology::idle_due), act: Topology::ask_idle },
    // The known primary takes long to answer, so the other servers are asked sooner.
    Deadline { when: When::From(Topology::uneasy_at), act: Topology::hurry_others },
    Deadline { when: When::At(Topology::names_due), act: Topology::look_up_due_names },
    // Queued servers take the place of members that are due now.
    Deadline { when: When::EachPoll(|_| None), act: Topology::take_turns },
    // No other server is in sight. This needs no wake-up of its own, because heartbeats are frequent enough.
    Deadline { when: When::EachPoll(|_| None), act: Topology::patrol_alone },
    Deadline { when: When::At(Topology::beside_at), act: Topology::ask_beside },
    Deadline { when: When::At(Topology::members_due), act: Topology::ask_due_members },
];

impl Topology {
    /// Returns what is to be done now. Call it after each input and at [`Self::wake_at`].
    pub(crate) fn poll(&mut self, now: Instant) -> Vec<Action> {
        self.notice_pause(now);
        self.polled_at = now;
        for Deadline { when, act } in &DEADLINES {
            let due = match when {
                When::At(at) | When::From(at) => at(self).is_some_and(|at| at <= now),
                When::EachPoll(_) => true,
            };
            if due {
                act(self, now);
            }
        }
        self.note_due(now);
        std::mem::take(&mut self.actions)
    }

    /// The next moment at which [`Self::poll`] may have something to do without new input.
    pub(crate) fn wake_at(&self) -> Option<Instant> {
        let wake_ups = DEADLINES.iter().filter_map(|deadline| match deadline.when {
            When::At(at) | When::EachPoll(at) => at(self),
            When::From(at) => at(self).filter(|at| *at > self.polled_at),
        });
        wake_ups.min()
    }

    /// When a suspended primary is given up. See [`Self::gives_up_at`].
    fn dead_at(&self) -> Option<Instant> {
        let suspended = self.search()?.suspended.as_ref()?;
        Some(self.gives_up_at(suspended))
    }

    fn long_search_at(&self) -> Option<Instant> {
        let search = self.search().filter(|search| !search.told)?;
        Some(search.since + LONG_SEARCH)
    }

    fn sample_at(&self) -> Option<Instant> {
        let samples =
            self.search().is_none() && (self.traffic.in_use || self.traffic.moved || self.beside.alone_since.is_some());
        samples.then(|| self.polled_at + self.listen_interval())
    }

    /// In a search, too, the sessions checked out may show that the suspended primary lives.
    fn listens_at(&self) -> Option<Instant> {
        let suspended = self.search()?.suspended.as_ref()?;
        let listens = suspended.silent && self.traffic.in_use && !self.settings.roaming;
        listens.then(|| self.polled_at + self.listen_interval())
    }

    fn beside_at(&self) -> Option<Instant> {
        self.beside.due.filter(|_| !self.beside.asking)
    }

    fn members_due(&self) -> Option<Instant> {
        let (current, log_in_at) = (self.primary_address(), self.log_in_at());
        let idle = self.members.values().filter(|member| !member.asking);
        let due = idle.map(
            |member| {
                if member.must_log_in(current.as_ref()) { member.due.max(log_in_at) } else { member.due }
            },
        );
        due.min()
    }
}
