//! Whether the primary lives, as far as its sessions show, and the question that runs beside the heart-beat.
//!
//! The rules, which `topology/tests/lives.rs` holds as tables and properties:
//!
//! - An answer on any open session of the generation proves that the server lives; so does anything that is received there.
//! - A session that cannot be opened says nothing of a server while an older session to it is open: that one is asked.
//! - An error in place of a report is an answer. What the server is stays what it said last.
//! - A question that is left open is silence only if nothing was received meanwhile.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    Action, Address, Answer, Change, Doubt, FailureKind, Phase, ProbeFailure, Probed, Search, Suspended, Topology,
};

/// The longest pause between two checks of new sessions while those fail.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A second question to the primary, under way at the same time as the first, on another session.
///
/// While the primary is known, the first question goes over the session that is kept, and this one opens a new session: a
/// server that takes no new session goes on being asked. In a search it is the other way round: candidates are asked on new
/// sessions, and this one goes over the session that was kept to the suspended primary.
#[derive(Debug, Default)]
pub(super) struct Beside {
    /// When to ask; `None` while there is no reason to.
    pub(super) due: Option<Instant>,
    pub(super) asking: bool,
    asked_at: Option<Instant>,
    /// New sessions that failed in a row.
    failures: u32,
}

impl Beside {
    /// Asks as soon as may be. The more new sessions have failed in a row, the longer is the pause between two.
    pub(super) fn hurry(&mut self, now: Instant, pause: Duration) {
        let pause = pause.saturating_mul(1 << self.failures.min(10)).min(LONGEST_PAUSE.max(pause));
        let earliest = self.asked_at.map_or(now, |asked| now.max(asked + pause));
        self.due = Some(self.due.map_or(earliest, |due| due.min(earliest)));
    }

    pub(super) fn begin(&mut self, now: Instant) {
        *self = Self { due: None, asking: true, asked_at: Some(now), ..*self };
    }

    /// Returns how long the answer took.
    pub(super) fn answered(&mut self, now: Instant) -> Option<Duration> {
        self.asking = false;
        self.asked_at.map(|asked| now.duration_since(asked))
    }
}

/// What a question without a report says of a primary that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finding {
    /// It lives, and what it is stays what it said last.
    Lives,
    /// The session of the question had ended: that says nothing yet.
    SessionEnded,
    /// New sessions cannot be had. Older ones are open, and tell more.
    NewSessionsFail,
    /// Nothing shows that it lives.
    Gone,
}

/// What is known when a question failed.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(super) struct Sighting {
    pub(super) kind: FailureKind,
    /// It was to be asked on a new session.
    pub(super) fresh: bool,
    /// The session that is kept for the heart-beat is open, or under way with a question of its own.
    pub(super) kept_open: bool,
    /// Sessions of the pool to this primary are open.
    pub(super) pooled_open: bool,
    /// Something was received on one of those since the question was asked.
    pub(super) received: bool,
    /// Somebody waits for an answer on one of those, and nothing has come for as long as a heart-beat may take.
    pub(super) mute: bool,
}

impl Sighting {
    pub(super) fn finding(self) -> Finding {
        match (self.fresh, self.kind) {
            // The server itself spoke. Its slots may all be this pool's own: to make the callers wait for a free one would be
            // to wait for themselves.
            (_, FailureKind::Full) | (false, FailureKind::Errored) => Finding::Lives,
            (false, FailureKind::TimedOut) if self.received => Finding::Lives,
            // An administrator may have ended the session (57P01), or a proxy.
            (false, FailureKind::Unreachable | FailureKind::NotNow) => Finding::SessionEnded,
            (true, _) if self.kept_open => Finding::NewSessionsFail,
            (true, _) if self.pooled_open && !self.mute => Finding::NewSessionsFail,
            _ => Finding::Gone,
        }
    }
}

impl Topology {
    /// Where no other server is in sight, a successor shows itself at the primary's own address or not at all: there may be a
    /// proxy. The session that is kept would never see it, so each patrol opens a new one; also where nothing else shows what new
    /// sessions get.
    pub(super) fn patrol_alone(&mut self, now: Instant) {
        let Phase::Known { primary, .. } = &self.phase else {
            return;
        };
        let in_sight = |member: &super::Member| match &member.answer {
            Some(Answer::Primary(report) | Answer::Refused(report, _)) => {
                !super::primary::same_start(report, &primary.report)
            }
            _ => false,
        };
        let current = &primary.endpoint.address;
        let alone = !self.members.iter().any(|(address, member)| address != current && in_sight(member));
        let due = now >= self.patrolled_at + self.settings.patrol.mul_f64(0.9);
        // What opens sessions by another pool's manager has a patrol of its own.
        if (alone || self.must_look_anew()) && due && !self.settings.roaming {
            self.patrolled_at = now;
            self.beside.hurry(now, self.settings.poll.0);
        }
    }

    /// The question beside the first one, if it is time for it.
    pub(super) fn ask_beside(&mut self, now: Instant) {
        if self.beside.asking || self.beside.due.is_none_or(|due| due > now) {
            return;
        }
        let (primary, fresh) = match &self.phase {
            Phase::Known { primary, .. } => (primary, true),
            Phase::Searching(Search { suspended: Some(suspended), .. }) => (&suspended.primary, false),
            Phase::Searching(_) => {
                self.beside.due = None;
                return;
            }
        };
        let endpoint = primary.endpoint.clone();
        self.beside.begin(now);
        if let Some(member) = self.members.get_mut(&endpoint.address).filter(|member| fresh && !member.asking) {
            // No second new session follows at once.
            member.asked_at = Some(now);
        }
        let within = self.settings.heartbeat_timeout;
        let opened_within = self.settings.probe_timeout + within;
        self.actions.push(Action::Probe { endpoint, fresh, beside: true, promotion_wait: None, within, opened_within });
    }

    /// When something was last received on any session of the pool to the primary.
    pub(super) fn heard_since(&self, asked_at: Option<Instant>) -> bool {
        self.received_at.is_some_and(|received| asked_at.is_none_or(|asked| received > asked))
    }

    /// A caller waits on a session of the pool, and nothing has stirred for as long as a heart-beat may take.
    fn is_mute(&self, now: Instant) -> bool {
        let heard_at = self.moved_at.max(self.lent_at);
        self.traffic.in_use && now.duration_since(heard_at) >= self.settings.heartbeat_timeout
    }

    /// A question to the primary that is known brought no report.
    pub(super) fn primary_failed(&mut self, now: Instant, probed: &Probed, failure: &ProbeFailure) {
        let Phase::Known { primary, .. } = &self.phase else {
            return;
        };
        let member = self.members.get(&probed.address);
        let asked_at = member.and_then(|member| member.asked_at);
        let sighting = Sighting {
            kind: failure.kind,
            fresh: probed.fresh,
            kept_open: probed.still_open,
            pooled_open: self.traffic.open > 0,
            received: self.heard_since(asked_at),
            mute: self.is_mute(now),
        };
        let why = format!("{}: {failure}", primary.endpoint);
        // Its connections are not ended for a silence that is none, as where the password provider is away.
        if failure.kind.is_an_answer() {
            self.primary_lives(now);
        }
        match sighting.finding() {
            Finding::Lives => self.primary_lives(now),
            Finding::SessionEnded => {
                if let Some(member) = self.members.get_mut(&probed.address) {
                    member.fresh = true;
                }
                self.ask_now(now, &probed.address, Duration::ZERO);
            }
            Finding::NewSessionsFail => self.new_sessions_fail(now, probed),
            Finding::Gone => self.suspend(now, &why, Doubt { silent: true, kept_open: probed.still_open }),
        }
    }

    pub(super) fn primary_lives(&mut self, now: Instant) {
        if let Phase::Known { answered_at, .. } = &mut self.phase {
            *answered_at = now;
        }
    }

    /// Asks the primary before the usual time, on the session that is kept, or on a new one if there is none.
    pub(super) fn ask_now(&mut self, now: Instant, address: &Address, pause: Duration) {
        let Some(member) = self.members.get_mut(address).filter(|member| !member.asking) else {
            return;
        };
        let due = member.asked_at.map_or(now, |asked| now.max(asked + pause));
        // What is due already was put off on purpose only if nobody was in a hurry.
        member.due = if member.prompt { due.min(member.due) } else { due };
        member.prompt = true;
    }

    /// The session that is kept says whether the server lives, and the others whether they know a successor.
    fn new_sessions_fail(&mut self, now: Instant, probed: &Probed) {
        let first = self.beside.failures == 0;
        self.beside.failures = self.beside.failures.saturating_add(1);
        let shortest = self.settings.poll.0;
        let pause = if probed.still_open {
            Duration::ZERO
        } else {
            shortest.saturating_mul(1 << self.beside.failures.min(10)).min(self.settings.heartbeat / 4).max(shortest)
        };
        self.ask_now(now, &probed.address, pause);
        if first {
            let others = self.members.iter_mut().filter(|(address, _)| **address != probed.address);
            others.for_each(|(_, member)| member.hurry(now, super::UNEASY_PACE));
        }
    }

    /// New sessions fail, the one for the question hangs as well, and nothing comes on those that are open.
    pub(super) fn give_up_mute(&mut self, now: Instant) {
        let Phase::Known { primary, .. } = &self.phase else {
            return;
        };
        let asked_at =
            self.members.get(&primary.endpoint.address).filter(|member| member.asking).and_then(|it| it.asked_at);
        let hangs = asked_at.is_some_and(|at| now.duration_since(at) > self.settings.heartbeat_timeout);
        if hangs && self.beside.failures > 0 && self.is_mute(now) {
            let why = format!("{}: no answer within {:?}", primary.endpoint, self.settings.heartbeat_timeout);
            self.suspend(now, &why, Doubt { silent: true, kept_open: false });
        }
    }

    /// Somebody could not have a session, or lost one.
    pub(super) fn doubt(&mut self, now: Instant, address: &Address) {
        let full = self.members.get(address).and_then(super::Member::full_pause).unwrap_or_default();
        self.beside.hurry(now, self.settings.poll.0.max(full));
        // New sessions fail, and say nothing: has the server died meanwhile?
        if self.beside.failures > 0 {
            self.ask_now(now, address, self.settings.heartbeat / super::QUIET);
        }
    }

    /// The primary answers at another address as well: where it takes no session at its own any more, it is reached there.
    pub(super) fn reach_at(&mut self, now: Instant, address: &Address) {
        let Some(endpoint) = self.members.get(address).map(|member| member.endpoint.clone()) else {
            return;
        };
        let Phase::Known { primary, .. } = &mut self.phase else {
            return;
        };
        if self.beside.failures == 0 || primary.endpoint.address == *address {
            return;
        }
        self.changed = Change {
            at: now,
            why: format!("the same server answers at {endpoint}, and at {} no more", primary.endpoint),
        };
        primary.endpoint = endpoint.clone();
        self.revision += 1;
        self.new_sessions_succeed();
        self.actions.push(Action::Move { endpoint });
    }

    pub(super) fn new_sessions_succeed(&mut self) {
        self.beside.failures = 0;
    }

    /// The session that was kept to the suspended primary has answered, or failed to.
    pub(super) fn suspended_answered(&mut self, now: Instant, probed: &Probed, answer: &Answer) {
        let pause = self.settings.poll.1;
        let main = self.members.get(&probed.address).map(|member| member.answer.clone());
        let Phase::Searching(search) = &mut self.phase else {
            return;
        };
        let since = search.since;
        let Some(Suspended { primary, answered_at, silent, .. }) = &mut search.suspended else {
            return;
        };
        if probed.still_open {
            self.beside.due = Some(now + pause);
        }
        let report = match answer {
            Answer::Failed(failure) if failure.kind == FailureKind::Errored => {
                *answered_at = now;
                return;
            }
            Answer::Failed(_) => return,
            Answer::Primary(report) | Answer::Refused(report, _) if !primary.is(&probed.address, report) => return,
            Answer::Refused(report, refusal) => {
                *answered_at = now;
                if let Some(cause) = refusal.proof().filter(|_| primary.is(&probed.address, report)) {
                    let (id, why) = (primary.id, format!("{}: {refusal}", primary.endpoint));
                    self.end_suspended(id, cause, &why);
                }
                return;
            }
            Answer::Primary(report) => report.clone(),
        };
        *answered_at = now;
        self.untold = self.untold.and(report.withheld);
        // A session that was open before does not feel what new ones are denied. Where its role is in doubt, a new session has
        // the word, unless none can be had.
        let new_sessions_fail = matches!(main, Some(Some(Answer::Failed(_))))
            && self.members.get(&probed.address).is_some_and(|member| member.answered_at.is_some_and(|at| at >= since));
        if (*silent || new_sessions_fail) && !report.fence_pending {
            self.resume(now, &probed.address, &report);
        }
    }
}
