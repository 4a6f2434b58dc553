//! Decides by the sessions to the primary whether the primary lives, and asks it a second question beside the
//! heartbeat. A primary that seems dead is suspended. `search.rs` decides when it is given up.
//!
//! `topology/tests/lives.rs` checks these rules with tables and properties:
//!
//! - An answer on any open session of the generation proves that the server lives, and so does anything else that is
//!   received there.
//! - While an older session is open, a failure to open a new one proves nothing about the server. The older session is
//!   asked instead, or if it has ended, an idle session of the pool.
//! - An error in place of a report is an answer. The server's role stays what it reported last.
//! - An unanswered question is silence only if nothing was received meanwhile: neither on a session of the pool, nor in
//!   answer to the second question.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    Action, Address, Answer, Change, FailureKind, Phase, ProbeFailure, Probed, Search, SuspendCause, Suspended,
    Topology, TrafficSample,
};

/// The longest pause between two attempts to open a new session while these attempts fail.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// The pause between two new sessions to the primary's address that look for a proxy, if other servers are in sight.
const RARE_PATROL: Duration = Duration::from_secs(60);

/// A second question to the primary, which runs at the same time as the first, on another session.
///
/// While the primary is known, the first question uses the kept session, and this one opens a new session. So a server
/// that accepts no new sessions is still asked. While the primary is suspended, it is the other way round: the first
/// question opens a new session to the primary's address, and this one uses the kept session.
#[derive(Debug, Default)]
pub(super) struct Beside {
    /// When to ask. `None` while there is no reason to ask.
    pub(super) due: Option<Instant>,
    pub(super) asking: bool,
    pub(super) asked_at: Option<Instant>,
    /// How many attempts to open a new session have failed in a row.
    failures: u32,
    /// Since when no session to the known primary is kept.
    pub(super) alone_since: Option<Instant>,
    /// When the pool was last told to ask on an idle session.
    idle_asked_at: Option<Instant>,
    /// Since when that question has no answer.
    pub(super) idle_waits_since: Option<Instant>,
    /// A new session has reached another writable server on the primary's timeline. The session to the primary has not
    /// answered since.
    pub(super) met_rival: bool,
}

impl Beside {
    /// Asks as soon as possible, but not before the pause has passed since the last question. The pause doubles with
    /// each attempt that fails in a row.
    pub(super) fn hurry(&mut self, now: Instant, pause: Duration) {
        let pause = pause.saturating_mul(1 << self.failures.min(10)).min(LONGEST_PAUSE.max(pause));
        let earliest = self.asked_at.map_or(now, |asked| now.max(asked + pause));
        self.due = Some(self.due.map_or(earliest, |due| due.min(earliest)));
    }

    pub(super) fn begin(&mut self, now: Instant) {
        *self = Self { due: None, asking: true, asked_at: Some(now), ..*self };
    }

    /// Notes that the question has ended, and returns how long it took.
    pub(super) fn answered(&mut self, now: Instant) -> Option<Duration> {
        self.asking = false;
        self.asked_at.map(|asked| now.duration_since(asked))
    }
}

/// What a question that brought no report shows about a known primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finding {
    /// The server lives. Its role stays what it reported last.
    Lives,
    /// The session of the question has ended. That proves nothing yet.
    SessionEnded,
    /// New sessions fail, but older ones are open. Those show whether the server lives.
    NewSessionsFail,
    /// Nothing shows that the server lives.
    Gone,
}

/// What is known at the moment when a question has failed.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(super) struct Circumstances {
    pub(super) kind: FailureKind,
    /// The question was to open a new session.
    pub(super) fresh: bool,
    /// The session kept for the heartbeat is open, or is busy with a question of its own.
    pub(super) kept_open: bool,
    /// Sessions of the pool to this primary are open.
    pub(super) pooled_open: bool,
    /// Something was received on another session to this primary since the question was asked.
    pub(super) received: bool,
    /// A user waits for an answer on one of the pool's sessions, and nothing has come from the primary for
    /// `heartbeat_timeout`, whatever was sent meanwhile.
    pub(super) mute: bool,
}

impl Circumstances {
    pub(super) fn finding(self) -> Finding {
        match (self.fresh, self.kind) {
            // The server itself has answered. The callers must not wait for a free slot: this pool's own connections
            // may use all of them.
            (_, FailureKind::Full) | (false, FailureKind::Errored) => Finding::Lives,
            (false, FailureKind::TimedOut) if self.received => Finding::Lives,
            // An administrator (57P01) or a proxy may have ended the session.
            (false, FailureKind::Unreachable | FailureKind::NotNow) => Finding::SessionEnded,
            (true, _) if self.kept_open => Finding::NewSessionsFail,
            (true, _) if self.pooled_open && !self.mute => Finding::NewSessionsFail,
            _ => Finding::Gone,
        }
    }
}

impl Topology {
    /// Opens a new session to the primary with each patrol if no other server is in sight, or if the user said that
    /// there are proxies. A successor may then appear only behind the primary's address, and the kept session would
    /// never see it. The pool does the same if only a new session shows which settings new sessions get. Beside other
    /// servers, a proxy is unlikely, so such a session is rare.
    pub(super) fn patrol_alone(&mut self, now: Instant) {
        let Phase::Known { primary, .. } = &self.phase else {
            return;
        };
        let in_sight = |member: &super::Member| match &member.answer {
            Some(Answer::Primary(report) | Answer::Refused(report, _)) => {
                !super::generation::same_start(report, &primary.report)
            }
            _ => false,
        };
        let current = primary.endpoint.address.clone();
        let alone = !self.members.iter().any(|(address, member)| *address != current && in_sight(member));
        let each_patrol = alone || self.settings.proxied || self.must_look_anew();
        let pause = if each_patrol { self.settings.patrol } else { self.settings.patrol.max(RARE_PATROL) };
        let due = now >= self.patrolled_at + pause.mul_f64(0.9);
        // A roaming pool opens its sessions by another pool's manager, and has a patrol of its own in
        // `ask_due_members`.
        if due && !self.settings.roaming {
            self.patrolled_at = now;
            match self.next_address().filter(|address| *address != current && !self.must_look_anew()) {
                Some(other) => self.look_anew_at(now, &other),
                None => self.beside.hurry(now, self.settings.poll.0),
            }
        }
    }

    /// Returns the address for the next patrol. All addresses of the primary take turns, because the pool keeps a
    /// session to each of them, and no kept session would see a successor.
    fn next_address(&mut self) -> Option<Address> {
        let Phase::Known { primary, .. } = &self.phase else {
            return None;
        };
        let own = &primary.endpoint.address;
        let also = self.members.keys().filter(|address| *address == own || self.is_also_primary(address));
        let all: Vec<Address> = also.cloned().collect();
        let last = self.patrolled.as_ref();
        let next = all.iter().find(|address| Some(*address) > last).or(all.first()).cloned();
        self.patrolled.clone_from(&next);
        next
    }

    fn look_anew_at(&mut self, now: Instant, address: &Address) {
        if let Some(member) = self.members.get_mut(address) {
            member.fresh = true;
            member.hurry(now, self.settings.poll.0);
        }
    }

    /// Asks the question beside the first one.
    pub(super) fn ask_beside(&mut self, now: Instant) {
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
            // The first question now counts from this moment, so that it does not open another new session right away.
            member.asked_at = Some(now);
        }
        let within = self.settings.heartbeat_timeout;
        let opened_within = self.settings.probe_timeout + within;
        self.actions.push(Action::Probe { endpoint, fresh, beside: true, promotion_wait: None, within, opened_within });
    }

    /// Returns whether anything was received on another session to the primary after `asked_at`.
    pub(super) fn heard_since(&self, asked_at: Option<Instant>) -> bool {
        self.received_at.is_some_and(|received| asked_at.is_none_or(|asked| received > asked))
    }

    /// Notes since when callers have sent something without an answer. A message does not renew this time, because it
    /// proves nothing: a caller may go on sending to a server that is dead. What was sent before the primary last
    /// reported, or before the connections of now were checked out, does not count.
    pub(super) fn note_unanswered(&mut self, now: Instant, traffic: TrafficSample) {
        let counts_from = self.lent_at.max(self.own_primary_at);
        if traffic.received {
            self.unanswered_since = None;
        } else if traffic.moved && self.unanswered_since.is_none_or(|since| since < counts_from) {
            self.unanswered_since = Some(now);
        }
    }

    /// Returns whether callers wait on the pool's sessions while nothing was received there for `heartbeat_timeout`
    /// after the first message without an answer, and the primary has not reported on any other session. Connections
    /// that are checked out and send nothing count as silent, too. If no connection is in use, the question on an idle
    /// session decides.
    fn is_mute(&self, now: Instant) -> bool {
        // What callers have sent proves nothing if the idle sessions have no answer.
        if !self.traffic.in_use || self.idle_is_mute(now) {
            return self.idle_is_mute(now);
        }
        let quiet_since = self.unanswered_since.unwrap_or(self.moved_at);
        let heard_at = quiet_since.max(self.lent_at).max(self.own_primary_at);
        // Idle sessions are asked only from `alone_since` on.
        let heard_at = self.unasked.counts_from(heard_at.max(self.beside.alone_since.unwrap_or(heard_at)));
        now.duration_since(heard_at) >= self.settings.heartbeat_timeout
    }

    /// No session is kept, and questions of [`Self::ask_idle`] have had no answer for `heartbeat_timeout`. Nothing else
    /// has come from the primary meanwhile.
    fn idle_is_mute(&self, now: Instant) -> bool {
        let (Some(alone_since), Some(asked_at)) = (self.beside.alone_since, self.beside.idle_waits_since) else {
            return false;
        };
        // The oldest question may be on a session that is dead without a sign, even from an earlier time. Since no
        // session is kept, others are asked again and again, so the silence counts from then on, or from the last
        // answer.
        let heard_at = self.received_at.unwrap_or(asked_at).max(self.own_primary_at);
        let silent_since = self.unasked.counts_from(asked_at.max(alone_since).max(heard_at));
        now.saturating_duration_since(silent_since) >= self.settings.heartbeat_timeout
    }

    /// When the primary is next to be asked on an idle session of the pool: while it is known and no session is kept,
    /// while it takes long to answer the heartbeat, or while it is suspended for silence. Nothing else might show that
    /// it lives.
    pub(super) fn idle_due(&self) -> Option<Instant> {
        if self.traffic.open == 0 || self.settings.roaming {
            return None;
        }
        let from = match &self.phase {
            Phase::Known { .. } if self.beside.alone_since.is_some() => self.polled_at,
            // The server may hold up the heartbeat's question for reasons of its own, such as a lock on a catalog.
            Phase::Known { primary, .. } => {
                let asking = self.members.get(&primary.endpoint.address).filter(|member| member.asking)?;
                asking.asked_at? + self.settings.heartbeat_timeout / 2
            }
            Phase::Searching(search) => {
                search.suspended.as_ref().filter(|suspended| suspended.silent).map(|_| self.polled_at)?
            }
        };
        Some(self.beside.idle_asked_at.map_or(from, |at| from.max(at + self.settings.heartbeat / 4)))
    }

    /// Has the primary asked on an idle session of the pool.
    pub(super) fn ask_idle(&mut self, now: Instant) {
        self.beside.idle_asked_at = Some(now);
        self.actions.push(Action::AskIdle);
    }

    /// Handles the failure of a question to the known primary.
    pub(super) fn primary_failed(&mut self, now: Instant, probed: &Probed, failure: &ProbeFailure) {
        let Phase::Known { primary, .. } = &self.phase else {
            return;
        };
        // It was sent while the primary was suspended, on a session that is not the kept one any more.
        if probed.beside && !probed.fresh {
            return;
        }
        if !probed.still_open && self.beside.alone_since.is_none() {
            self.beside.alone_since = Some(now);
        }
        let member = self.members.get(&probed.address);
        let asked_at = member.and_then(|member| member.asked_at);
        let circumstances = Circumstances {
            kind: failure.kind,
            fresh: probed.fresh,
            kept_open: probed.still_open,
            pooled_open: self.traffic.open > 0,
            received: self.heard_since(asked_at),
            mute: self.is_mute(now),
        };
        let why = format!("{}: {failure}", primary.endpoint);
        // These failures are not silence, so `dead_after` must not run. For instance, the password provider may fail
        // while the server is well.
        if failure.kind.is_an_answer() {
            self.primary_lives(now);
        }
        seen!("findings", "{:?}, {:?}", circumstances.finding(), failure.kind);
        match circumstances.finding() {
            Finding::NewSessionsFail if planted!("takes what new sessions meet for silence") => {
                self.suspend(now, &why, SuspendCause { silent: true, kept_open: false });
                self.give_up_silent(now);
            }
            Finding::Lives => {
                self.primary_lives(now);
                // The session itself may be dead without a sign. Then it would show no fence, so replace it.
                if failure.kind == FailureKind::TimedOut {
                    self.beside.hurry(now, self.settings.heartbeat);
                }
                // No other failure is the server's own answer to this question. On a new session it may be another
                // server's, behind a proxy.
                let older_open = circumstances.kept_open || circumstances.pooled_open;
                if failure.kind == FailureKind::Full && !(circumstances.fresh && older_open) {
                    self.heard(now);
                }
            }
            Finding::SessionEnded => {
                if let Some(member) = self.members.get_mut(&probed.address) {
                    member.fresh = true;
                }
                self.ask_now(now, &probed.address, Duration::ZERO);
            }
            Finding::NewSessionsFail => self.new_sessions_fail(now, probed),
            Finding::Gone => {
                // If its own session gives an answer that makes no sense, it is not silent, and what other sessions
                // receive does not speak for it.
                let silent = probed.fresh || failure.kind != FailureKind::NotPostgres;
                self.suspend(now, &why, SuspendCause { silent, kept_open: probed.still_open });
            }
        }
    }

    pub(super) fn primary_lives(&mut self, now: Instant) {
        if let Phase::Known { answered_at, .. } = &mut self.phase {
            *answered_at = now;
        }
    }

    /// Asks the primary before the usual time: on the kept session, or on a new one if none is kept.
    pub(super) fn ask_now(&mut self, now: Instant, address: &Address, pause: Duration) {
        let Some(member) = self.members.get_mut(address).filter(|member| !member.asking) else {
            return;
        };
        let due = member.asked_at.map_or(now, |asked| now.max(asked + pause));
        // If the question was already urgent, the earlier of the two times counts. Otherwise only `pause` counts,
        // because the caller wants that pause.
        member.due = if member.prompt { due.min(member.due) } else { due };
        member.prompt = true;
    }

    /// Asks the kept session whether the server lives, and the other servers whether one is the successor.
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

    /// Suspends the primary if new sessions fail, the heartbeat's question has no answer, and the pool's open sessions
    /// receive nothing.
    pub(super) fn give_up_mute(&mut self, now: Instant) {
        let Phase::Known { primary, .. } = &self.phase else {
            return;
        };
        let asked_at =
            self.members.get(&primary.endpoint.address).filter(|member| member.asking).and_then(|it| it.asked_at);
        let hangs = asked_at.is_some_and(|at| now.duration_since(at) > self.settings.heartbeat_timeout);
        if hangs && self.beside.failures > 0 && self.is_mute(now) {
            let why = format!("{}: no answer within {:?}", primary.endpoint, self.settings.heartbeat_timeout);
            self.suspend(now, &why, SuspendCause { silent: true, kept_open: false });
        }
    }

    /// Handles a caller's report that it could not open a session, or has lost one: opens a new session to the primary
    /// soon.
    pub(super) fn doubt(&mut self, now: Instant, address: &Address) {
        let full = self.members.get(address).and_then(super::Member::full_pause).unwrap_or_default();
        self.beside.hurry(now, self.settings.poll.0.max(full));
        // The failure of new sessions proves nothing, so ask the kept session whether the server still lives.
        if self.beside.failures > 0 {
            self.ask_now(now, address, self.settings.heartbeat / super::QUIET);
        }
    }

    /// Notes that the primary answers at another address as well. If new sessions to its own address fail, the other
    /// address is used from now on.
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

    /// Handles the result of a question to the suspended primary on its kept session.
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
        // An older session does not show the settings of new ones. So if the primary's role is in doubt, only a new
        // session can resume it, unless no new session can be opened.
        let new_sessions_fail = matches!(main, Some(Some(Answer::Failed(_))))
            && self.members.get(&probed.address).is_some_and(|member| member.answered_at.is_some_and(|at| at >= since));
        let silent = *silent;
        if (silent || new_sessions_fail) && !self.is_fenced(&report) {
            self.resume(now, &probed.address, &report);
        }
    }
}
