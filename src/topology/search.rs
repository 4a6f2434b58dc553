//! The search for a primary: when it begins, which writable server is accepted, and when the suspended primary is
//! resumed or given up. `gives_up_at` says when a silent primary is given up, `give_up_silent` gives it up, and the
//! table in `deadlines.rs` calls these.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    Action, Address, Answer, Change, Eviction, FIRST_GRACE, FailureKind, GRACE, GenerationId, Lsn, Member, Phase,
    Primary, ProbeFailure, RENEWED_AFTER, Refusal, ServerReport, Suspicion, Topology,
};

/// One search for a primary: from the loss of a primary, or from the start, until one is known.
pub(super) struct Search {
    pub(super) since: Instant,
    pub(super) suspended: Option<Suspended>,
    /// The best writable server so far. It is accepted after a short time in which the answer of another server may
    /// rule it out.
    pub(super) pick: Option<Pick>,
    /// The failure that callers get if waiting does not help.
    pub(super) refused: Option<ProbeFailure>,
    pub(super) refused_as_of: Option<Instant>,
    /// When the search will decide that waiting does not help, if no answer changes that.
    pub(super) judge_at: Option<Instant>,
    /// The operator was told that the search takes long.
    pub(super) told: bool,
}

impl Search {
    pub(super) fn new(since: Instant) -> Self {
        Self { since, suspended: None, pick: None, refused: None, refused_as_of: None, judge_at: None, told: false }
    }
}

/// The last primary, whose connections stay open until the search has decided.
pub(super) struct Suspended {
    pub(super) primary: Primary,
    pub(super) answered_at: Instant,
    pub(super) silent: bool,
}

/// Why a primary is suspended.
#[derive(Clone, Copy)]
pub(super) struct SuspendCause {
    /// `true`: it did not answer. `false`: its answer casts doubt on its role.
    pub(super) silent: bool,
    /// Its kept session may still be open.
    pub(super) kept_open: bool,
}

/// A writable server that the search will accept at `decide_at`, unless a better one answers before.
pub(super) struct Pick {
    pub(super) address: Address,
    pub(super) report: ServerReport,
    pub(super) decide_at: Instant,
    /// It was put off, because the process was late.
    pub(super) postponed: bool,
}

/// Ranks writable servers: a server that reports its cluster ranks above one that withholds it, then the newest
/// timeline counts, then the most WAL.
pub(super) fn rank(report: &ServerReport) -> (bool, Option<u32>, Option<Lsn>) {
    (report.system_identifier.is_some(), report.timeline, report.wal)
}

impl Member {
    /// Returns whether it answered in this search.
    pub(super) fn answered(&self, search: &Search) -> bool {
        self.answered_at.is_some_and(|at| at >= search.since)
    }

    /// Returns whether its kept session has reported a standby for so long that a new session should be opened. The
    /// address may be a proxy's, and then a new session may reach another server.
    ///
    /// The time counts from the start of the search. So each search asks the kept session first, even if that is old.
    pub(super) fn outlived(&self, search: &Search, now: Instant) -> bool {
        matches!(self.answer, Some(Answer::Refused(_, Refusal::Standby)))
            && self.opened_at.is_some_and(|at| now.duration_since(at.max(search.since)) >= RENEWED_AFTER)
    }
}

impl Topology {
    /// Handles the doubt of a caller with a connection of generation `id` whether its primary is still the primary.
    pub(crate) fn suspected(&mut self, now: Instant, id: GenerationId, suspicion: Suspicion) {
        let Phase::Known { primary, .. } = &self.phase else {
            return;
        };
        if primary.id != id {
            return;
        }
        let address = primary.endpoint.address.clone();
        self.doubt(now, &address);
        if matches!(suspicion, Suspicion::ReadOnly) {
            self.suspend(
                now,
                "a session on the primary has turned read-only",
                SuspendCause { silent: false, kept_open: true },
            );
        }
    }

    /// Suspends the known primary, and begins a search. Checkouts wait, but connections in use go on.
    pub(super) fn suspend(&mut self, now: Instant, why: &str, cause: SuspendCause) {
        let Phase::Known { primary, answered_at } = &self.phase else {
            return;
        };
        // If the primary is rarely asked, its last answer may be old. It has been silent for at most as long as a
        // question may take.
        let longest = self.settings.probe_timeout + self.settings.heartbeat_timeout;
        let answered_at = now.checked_sub(longest).map_or(*answered_at, |at| at.max(*answered_at));
        seen!("transitions", "known to suspended, silent: {}", cause.silent);
        let suspended = Suspended { primary: primary.clone(), answered_at, silent: cause.silent };
        self.phase = Phase::Searching(Search { suspended: Some(suspended), ..Search::new(now) });
        self.changed = Change { at: now, why: why.to_owned() };
        self.revision += 1;
        self.actions.push(Action::Suspend { why: why.to_owned() });
        for member in self.members.values_mut() {
            member.hurry(now, self.settings.poll.0);
        }
        self.hurry_names(now);
        // The kept session may still get an answer.
        self.beside.due = cause.kept_open.then_some(now);
    }

    /// Ends the suspended generation `id`: all its connections are closed.
    pub(super) fn end_suspended(&mut self, id: GenerationId, cause: Eviction, why: &str) {
        let Phase::Searching(search) = &mut self.phase else {
            return;
        };
        if search.suspended.as_ref().is_some_and(|suspended| suspended.primary.id == id) {
            search.suspended = None;
            seen!("transitions", "suspended to lost, {cause}");
            self.actions.push(Action::End { id, cause, why: why.to_owned(), lost: false });
        }
    }

    /// Ends the suspended generation, because its primary has been silent for `dead_after`. This applies to every
    /// suspended primary, including one that was suspended because of its role and then became silent.
    pub(super) fn give_up_silent(&mut self, now: Instant) {
        let Phase::Searching(Search { suspended: Some(suspended), .. }) = &self.phase else {
            return;
        };
        // The time since its last sign of life. Time in which no server was asked does not count.
        let silent = self.settings.dead_after + now.duration_since(self.gives_up_at(suspended));
        let id = suspended.primary.id;
        self.end_suspended(id, Eviction::Silent, &format!("no answer for {silent:?}, and no other primary"));
    }

    /// Resumes a primary that was suspended for silence, if it has answered on an open session since. The session is
    /// still open, so the server was not restarted, and its role is what it reported last.
    pub(super) fn resume_heard(&mut self, now: Instant) {
        let Phase::Searching(Search { since, suspended: Some(suspended), .. }) = &self.phase else {
            return;
        };
        // The sessions of a roaming pool may lead to different servers.
        if suspended.silent && !self.settings.roaming && self.received_at.is_some_and(|at| at > *since) {
            let (address, report) = (suspended.primary.endpoint.address.clone(), suspended.primary.report.clone());
            self.resume(now, &address, &report);
        }
    }

    /// Returns when a suspended primary counts as dead, unless it answers before.
    pub(super) fn gives_up_at(&self, suspended: &Suspended) -> Instant {
        let heard_at = self.received_at.map_or(suspended.answered_at, |at| at.max(suspended.answered_at));
        let dead_after = if planted!("gives up at once") { Duration::ZERO } else { self.settings.dead_after };
        self.unasked.counts_from(heard_at) + dead_after
    }

    /// Handles a candidate's answer in a search.
    pub(super) fn candidate_answered(&mut self, now: Instant, address: &Address, answer: &Answer, took: Duration) {
        let others_silent = self.members.iter().any(|(other, member)| other != address && !self.answered(member))
            || self.names_outstanding();
        let newest = self.newest_if_current();
        let (kept_open, pooled_open) = (self.beside.due.is_some() || self.beside.asking, self.traffic.open > 0);
        let Phase::Searching(search) = &mut self.phase else {
            return;
        };
        let confirmed = search.pick.take_if(|pick| pick.address == *address).map(|pick| pick.decide_at);
        if let Some(suspended) = &mut search.suspended {
            let same_address = suspended.primary.endpoint.address == *address;
            match answer {
                // Behind a proxy, this may be another server's answer. So an open session is asked too, and its answer
                // decides.
                Answer::Failed(failure)
                    if same_address
                        && suspended.silent
                        && failure.kind == FailureKind::Full
                        && (kept_open || pooled_open) =>
                {
                    // The kept session may be dead without a sign.
                    self.actions.extend(pooled_open.then_some(Action::AskIdle));
                }
                // The primary was only silent for a while. It has no slot for a new session, perhaps because this
                // pool's sessions use them all.
                Answer::Failed(failure) if same_address && suspended.silent && failure.kind == FailureKind::Full => {
                    let report = suspended.primary.report.clone();
                    self.resume(now, address, &report);
                    return;
                }
                Answer::Refused(report, refusal) if suspended.primary.is(address, report) => {
                    suspended.answered_at = now;
                    if let Some(cause) = refusal.proof() {
                        let (id, why) = (suspended.primary.id, format!("{}: {refusal}", suspended.primary.endpoint));
                        self.end_suspended(id, cause, &why);
                    }
                }
                // The answer does not show the server's role, but it ends the silence.
                Answer::Failed(failure) if same_address && failure.kind.is_an_answer() => suspended.answered_at = now,
                _ => {}
            }
        }
        let Phase::Searching(search) = &mut self.phase else {
            return;
        };
        let Answer::Primary(report) = answer else {
            self.judge_refusals(now);
            self.decide_pick(now);
            return;
        };
        // On a roaming pool, one address may lead to several servers. So only the start time shows that this is the
        // suspended primary.
        let anybody = self.settings.roaming && report.started_at.is_none();
        if !anybody && search.suspended.as_ref().is_some_and(|suspended| suspended.primary.is(address, report)) {
            self.resume(now, address, report);
            return;
        }
        // A timeline newer than any known one proves a promotion, so no other answer can rule this server out.
        let identified = self.system_identifier.is_some() == report.system_identifier.is_some();
        let promoted = identified && newest.is_some() && report.timeline > newest;
        let better = search.pick.as_ref().is_none_or(|pick| rank(report) > rank(&pick.report));
        if better {
            let grace = if newest.is_none() { FIRST_GRACE } else { GRACE };
            let wait = if promoted || !others_silent { Duration::ZERO } else { took.clamp(grace.0, grace.1) };
            let earlier = confirmed.or(search.pick.as_ref().map(|pick| pick.decide_at));
            let decide_at = earlier.map_or(now + wait, |at| at.min(now + wait));
            let postponed = search.pick.as_ref().is_some_and(|pick| pick.postponed);
            search.pick = Some(Pick { address: address.clone(), report: report.clone(), decide_at, postponed });
        }
        self.judge_refusals(now);
        self.decide_pick(now);
    }

    /// Returns whether this member has answered since the search began.
    pub(super) fn answered(&self, member: &Member) -> bool {
        match &self.phase {
            Phase::Searching(search) => member.answered(search),
            Phase::Known { .. } => true,
        }
    }

    /// Returns when the best writable server so far is adopted. If all servers and names have answered, this is now.
    pub(super) fn pick_at(&self) -> Option<Instant> {
        let pick = self.search()?.pick.as_ref()?;
        let all_answered = self.members.values().all(|member| self.answered(member)) && !self.names_outstanding();
        Some(if all_answered { self.polled_at.min(pick.decide_at) } else { pick.decide_at })
    }

    /// Accepts no server before `at`. The process stood still for a moment, and may not have read yet what the other
    /// servers answered meanwhile. On a busy machine it is late each time, so a moment counts only once; `long`: it was
    /// not just a moment.
    pub(super) fn postpone_pick(&mut self, at: Instant, long: bool) {
        if let Phase::Searching(Search { pick: Some(pick), .. }) = &mut self.phase
            && (long || !pick.postponed)
        {
            (pick.decide_at, pick.postponed) = (pick.decide_at.max(at), true);
        }
    }

    /// Accepts the best writable server if its time has come.
    pub(super) fn decide_pick(&mut self, now: Instant) {
        let Phase::Searching(Search { pick: Some(pick), .. }) = &self.phase else {
            return;
        };
        if self.pick_at().is_none_or(|at| at > now) {
            return;
        }
        seen!("transitions", "searching to known, suspended: {}", self.suspended_address().is_some());
        let (address, report) = (pick.address.clone(), pick.report.clone());
        if self.conflict(now).is_some() {
            if let Phase::Searching(search) = &mut self.phase {
                search.pick = None;
            }
            return self.judge_refusals(now);
        }
        self.adopt(now, &address, report, "verified as the primary");
    }

    /// Makes the suspended primary the known one again. Its generation goes on with its connections.
    pub(super) fn resume(&mut self, now: Instant, address: &Address, report: &ServerReport) {
        let Phase::Searching(search) = &mut self.phase else {
            return;
        };
        if planted!("does not resume") {
            return;
        }
        let Some(suspended) = search.suspended.take() else {
            return;
        };
        seen!("transitions", "suspended to known, silent: {}", suspended.silent);
        let mut primary = suspended.primary;
        let lost_for = now.duration_since(search.since);
        if let Some(member) = self.members.get(address) {
            primary.endpoint = member.endpoint.clone();
        }
        self.note_told(now, report);
        // A server shows its previous timeline only until its first checkpoint. This server is in the same life, so
        // what it showed before is still true.
        let ancestor = primary.report.checkpointed.filter(|older| Some(*older) < report.timeline);
        primary.report = ServerReport { checkpointed: ancestor.or(report.checkpointed), ..report.clone() };
        self.actions.push(Action::Resume { primary: primary.clone(), lost_for });
        self.known(now, primary, "the same server answers as the primary again");
    }

    /// Sets or clears the failure that callers get because waiting does not help.
    pub(super) fn set_refused(&mut self, now: Instant, failure: Option<ProbeFailure>) {
        let Phase::Searching(search) = &mut self.phase else {
            return;
        };
        if search.refused == failure {
            return;
        }
        if let Some(failure) = &failure {
            self.changed = Change { at: now, why: failure.message.clone() };
        }
        search.refused = failure;
        self.revision += 1;
    }
}
