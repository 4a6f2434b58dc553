//! The search for a primary: when it begins, which writable server is accepted, and when the lost primary is resumed or
//! given up.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    Action, Address, Answer, Change, Eviction, FIRST_GRACE, FailureKind, GRACE, GenerationId, Lsn, Member, Phase,
    Primary, ProbeFailure, ServerReport, Suspicion, Topology,
};

pub(super) struct Search {
    pub(super) since: Instant,
    pub(super) suspended: Option<Suspended>,
    /// The best writable server so far, while others may still object.
    pub(super) pick: Option<Pick>,
    /// What callers are told when waiting does not help.
    pub(super) refused: Option<ProbeFailure>,
    pub(super) refused_as_of: Option<Instant>,
    /// When it will be decided that waiting does not help, if nothing changes.
    pub(super) judge_at: Option<Instant>,
    /// An operator was told that the search takes long.
    pub(super) told: bool,
}

impl Search {
    pub(super) fn new(since: Instant) -> Self {
        Self { since, suspended: None, pick: None, refused: None, refused_as_of: None, judge_at: None, told: false }
    }
}

pub(super) struct Suspended {
    pub(super) primary: Primary,
    pub(super) answered_at: Instant,
    pub(super) silent: bool,
}

/// Why a primary is suspended.
#[derive(Clone, Copy)]
pub(super) struct Doubt {
    /// It did not answer. Otherwise, what it answered casts doubt on its role.
    pub(super) silent: bool,
    /// The kept session to it may be open.
    pub(super) kept_open: bool,
}

pub(super) struct Pick {
    pub(super) address: Address,
    pub(super) report: ServerReport,
    pub(super) decide_at: Instant,
}

/// Ranks writable servers: a server that tells its cluster comes first, then the newest timeline, then the most WAL.
pub(super) fn rank(report: &ServerReport) -> (bool, Option<u32>, Option<Lsn>) {
    (report.system_identifier.is_some(), report.timeline, report.wal)
}

impl Topology {
    /// A user of generation `id` doubts its primary.
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
                Doubt { silent: false, kept_open: true },
            );
        }
    }

    pub(super) fn suspend(&mut self, now: Instant, why: &str, doubt: Doubt) {
        let Phase::Known { primary, answered_at } = &self.phase else {
            return;
        };
        // A primary that is rarely asked was silent for as long as a question takes, and not since its last answer.
        let longest = self.settings.probe_timeout + self.settings.heartbeat_timeout;
        let answered_at = now.checked_sub(longest).map_or(*answered_at, |at| at.max(*answered_at));
        let suspended = Suspended { primary: primary.clone(), answered_at, silent: doubt.silent };
        self.phase = Phase::Searching(Search { suspended: Some(suspended), ..Search::new(now) });
        self.changed = Change { at: now, why: why.to_owned() };
        self.revision += 1;
        self.actions.push(Action::Suspend { why: why.to_owned() });
        for member in self.members.values_mut() {
            member.hurry(now, self.settings.poll.0);
        }
        self.hurry_names(now);
        // The kept session may still get an answer.
        self.beside.due = doubt.kept_open.then_some(now);
    }

    pub(super) fn end_suspended(&mut self, id: GenerationId, cause: Eviction, why: &str) {
        let Phase::Searching(search) = &mut self.phase else {
            return;
        };
        if search.suspended.as_ref().is_some_and(|suspended| suspended.primary.id == id) {
            search.suspended = None;
            self.actions.push(Action::End { id, cause, why: why.to_owned(), lost: false });
        }
    }

    pub(super) fn give_up_silent(&mut self, now: Instant) {
        let Phase::Searching(Search { suspended: Some(suspended), .. }) = &self.phase else {
            return;
        };
        let silent = self.settings.dead_after + now.duration_since(self.gives_up_at(suspended));
        let id = suspended.primary.id;
        self.end_suspended(id, Eviction::Silent, &format!("no answer for {silent:?}, and no other primary"));
    }

    /// Resumes a primary that was suspended for silence, if it has answered on an open session since. It is in the same
    /// life, so its role is what it reported last.
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

    /// When a suspended primary counts as dead, unless it is heard before.
    pub(super) fn gives_up_at(&self, suspended: &Suspended) -> Instant {
        let heard_at = self.received_at.map_or(suspended.answered_at, |at| at.max(suspended.answered_at));
        self.unasked.counts_from(heard_at) + self.settings.dead_after
    }

    pub(super) fn candidate_answered(&mut self, now: Instant, address: &Address, answer: &Answer, took: Duration) {
        let others_silent = self.members.iter().any(|(other, member)| other != address && !self.answered(member))
            || self.names_outstanding();
        let newest = self.newest_if_current();
        let Phase::Searching(search) = &mut self.phase else {
            return;
        };
        let confirmed = search.pick.take_if(|pick| pick.address == *address).map(|pick| pick.decide_at);
        if let Some(suspended) = &mut search.suspended {
            let same_address = suspended.primary.endpoint.address == *address;
            match answer {
                // It was only silent for a while. Now it has no slot for a question, perhaps because this pool's
                // sessions use them all.
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
                // Whatever it is, it is not silent.
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
        // On a roaming pool, the address alone does not show that it is the same server, so the start time must be
        // readable.
        let anybody = self.settings.roaming && report.started_at.is_none();
        if !anybody && search.suspended.as_ref().is_some_and(|suspended| suspended.primary.is(address, report)) {
            self.resume(now, address, report);
            return;
        }
        // A timeline newer than any known one is a promotion, so no other server can object.
        let identified = self.system_identifier.is_some() == report.system_identifier.is_some();
        let promoted = identified && newest.is_some() && report.timeline > newest;
        let better = search.pick.as_ref().is_none_or(|pick| rank(report) > rank(&pick.report));
        if better {
            let grace = if newest.is_none() { FIRST_GRACE } else { GRACE };
            let wait = if promoted || !others_silent { Duration::ZERO } else { took.clamp(grace.0, grace.1) };
            let earlier = confirmed.or(search.pick.as_ref().map(|pick| pick.decide_at));
            let decide_at = earlier.map_or(now + wait, |at| at.min(now + wait));
            search.pick = Some(Pick { address: address.clone(), report: report.clone(), decide_at });
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

    /// When the best writable server so far is adopted: at once if no other server can object any more.
    pub(super) fn pick_at(&self) -> Option<Instant> {
        let pick = self.search()?.pick.as_ref()?;
        let all_answered = self.members.values().all(|member| self.answered(member)) && !self.names_outstanding();
        Some(if all_answered { self.polled_at.min(pick.decide_at) } else { pick.decide_at })
    }

    pub(super) fn decide_pick(&mut self, now: Instant) {
        let Phase::Searching(Search { pick: Some(pick), .. }) = &self.phase else {
            return;
        };
        if self.pick_at().is_none_or(|at| at > now) {
            return;
        }
        let (address, report) = (pick.address.clone(), pick.report.clone());
        if self.conflict(now).is_some() {
            if let Phase::Searching(search) = &mut self.phase {
                search.pick = None;
            }
            return self.judge_refusals(now);
        }
        self.adopt(now, &address, report, "verified as the primary");
    }

    pub(super) fn resume(&mut self, now: Instant, address: &Address, report: &ServerReport) {
        let Phase::Searching(search) = &mut self.phase else {
            return;
        };
        let Some(Suspended { mut primary, .. }) = search.suspended.take() else {
            return;
        };
        let lost_for = now.duration_since(search.since);
        if let Some(member) = self.members.get(address) {
            primary.endpoint = member.endpoint.clone();
        }
        self.note_told(now, report);
        // Its earlier timeline is visible only until its first checkpoint. It is in the same life, so keep that
        // timeline.
        let ancestor = primary.report.checkpointed.filter(|older| Some(*older) < report.timeline);
        primary.report = ServerReport { checkpointed: ancestor.or(report.checkpointed), ..report.clone() };
        self.actions.push(Action::Resume { primary: primary.clone(), lost_for });
        self.known(now, primary, "the same server answers as the primary again");
    }

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
