//! What is known of each candidate, and which candidates there are: whom to add, and whom to forget for one that is new.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    Address, Answer, CandidateReport, Endpoint, FULL_PAUSE, FailureKind, Origin, Parts, Phase, PromotionWait,
    RENEWED_AFTER, Refusal, Search, ServerReport, Topology,
};

/// So many candidates are probed at the same time; more of them take turns.
pub(super) const MAX_MEMBERS: usize = 64;

#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(super) struct Member {
    pub(super) endpoint: Endpoint,
    pub(super) origin: Origin,
    /// When to ask next; a probe that is under way is waited for first.
    pub(super) due: Instant,
    pub(super) asking: bool,
    /// The one that the last question came with.
    pub(super) promotion_wait: Option<PromotionWait>,
    pub(super) asked_at: Option<Instant>,
    pub(super) answered_at: Option<Instant>,
    /// When it reported last.
    pub(super) heard_at: Option<Instant>,
    pub(super) answer: Option<Answer>,
    /// The question that was answered last was asked then.
    pub(super) told_at: Option<Instant>,
    /// What it reported last, at `heard_at`.
    pub(super) report: Option<ServerReport>,
    /// What it keeps back, as far as an operator was told.
    pub(super) kept_back: Parts,
    /// So many times in a row it had no slot for a session.
    pub(super) full: u32,
    pub(super) took: Option<Duration>,
    /// The next probe needs a session of its own.
    pub(super) fresh: bool,
    /// The next question is not put off to the usual time.
    pub(super) prompt: bool,
    /// When the session opened that was asked last.
    pub(super) opened_at: Option<Instant>,
    /// Has proved to belong to this cluster.
    pub(super) verified: bool,
    pub(super) named_at: Instant,
}

impl Member {
    pub(super) fn is_dead(&self) -> bool {
        matches!(&self.answer, Some(Answer::Failed(failure)) if !failure.kind.is_an_answer())
    }

    /// A session to a standby survives its promotion and is then the first one of the new primary. One that was opened under
    /// a fence stays read-only after the fence is lifted, so it does not count.
    pub(super) fn is_standby(&self) -> bool {
        matches!(&self.answer, Some(Answer::Refused(report, Refusal::Standby)) if !report.default_read_only)
    }

    /// A server that takes long to answer has other pools that wait, too: it looks less often.
    pub(super) fn spares(&self, promotion_wait: PromotionWait) -> PromotionWait {
        let step = promotion_wait.step.max(self.took.unwrap_or_default() / 2).min(promotion_wait.lasts);
        PromotionWait { step, ..promotion_wait }
    }

    /// Has it said in this search what it is?
    pub(super) fn answered(&self, search: &Search) -> bool {
        self.answered_at.is_some_and(|at| at >= search.since)
    }

    /// Its session, which is kept for its promotion, has told for long enough that it is on a standby: the address may be a
    /// proxy's, which leads a new session elsewhere.
    ///
    /// Counted from the search's begin: a session that was kept for it is asked, however old it is.
    pub(super) fn outlived(&self, search: &Search, now: Instant) -> bool {
        matches!(self.answer, Some(Answer::Refused(_, Refusal::Standby)))
            && self.opened_at.is_some_and(|at| now.duration_since(at.max(search.since)) >= RENEWED_AFTER)
    }

    /// The next question to it is a log-in that will most likely be refused, as the last one was.
    pub(super) fn must_log_in(&self, current: Option<&Address>) -> bool {
        let held = current == Some(&self.endpoint.address) && !self.fresh;
        let refused = matches!(&self.answer, Some(Answer::Failed(failure)) if failure.kind == FailureKind::Refused);
        refused && !held
    }

    /// How long a server that had no slot for a session is left alone.
    pub(super) fn full_pause(&self) -> Option<Duration> {
        let doublings = self.full.checked_sub(1)?.min(16);
        Some((FULL_PAUSE.0 * 2_u32.pow(doublings)).min(FULL_PAUSE.1))
    }

    /// Ask as soon as may be, which is `pause` after the last question.
    pub(super) fn hurry(&mut self, now: Instant, pause: Duration) {
        let earliest = self.asked_at.map_or(now, |asked| now.max(asked + pause));
        self.due = self.due.min(earliest);
    }
}

impl Topology {
    pub(crate) fn candidates(&self) -> Vec<CandidateReport> {
        let report = |member: &Member| CandidateReport {
            endpoint: member.endpoint.clone(),
            origin: member.origin,
            answer: member.answer.clone(),
            took: member.took,
        };
        self.members.values().map(report).collect()
    }

    pub(super) fn is_standby(&self, address: &Address) -> bool {
        !self.settings.roaming && self.members.get(address).is_some_and(Member::is_standby)
    }

    /// Members that are not forgotten, whatever DNS says: the primary, the one that is searched for, the one that is about to
    /// be believed.
    pub(super) fn needed(&self) -> Vec<Address> {
        match &self.phase {
            Phase::Known { primary, .. } => vec![primary.endpoint.address.clone()],
            Phase::Searching(search) => {
                let suspended = search.suspended.as_ref().map(|suspended| suspended.primary.endpoint.address.clone());
                suspended.into_iter().chain(search.pick.as_ref().map(|pick| pick.address.clone())).collect()
            }
        }
    }

    pub(super) fn add(&mut self, endpoint: Endpoint, origin: Origin, now: Instant) {
        if let Some(member) = self.members.get_mut(&endpoint.address) {
            member.named_at = now;
            if member.origin != Origin::Configured {
                member.origin = origin;
            }
            return;
        }
        if self.members.len() >= MAX_MEMBERS && !self.forget_one(now) {
            return self.wait_for_room(endpoint, origin);
        }
        let member = Member {
            endpoint: endpoint.clone(),
            origin,
            due: now,
            asking: false,
            promotion_wait: None,
            asked_at: None,
            answered_at: None,
            heard_at: None,
            answer: None,
            told_at: None,
            report: None,
            kept_back: Parts::default(),
            full: 0,
            took: None,
            fresh: true,
            prompt: false,
            opened_at: None,
            verified: false,
            named_at: now,
        };
        self.spare.retain(|(other, _)| other.address != endpoint.address);
        self.members.insert(endpoint.address, member);
    }

    /// Makes room: of the members that this moment's answer does not name, the one that was named longest ago goes. One that
    /// proved to belong to the cluster may be the next primary: a mistake in DNS pushes out half of those at most.
    fn forget_one(&mut self, now: Instant) -> bool {
        let needed = self.needed();
        let crowded = self.members.values().filter(|member| member.verified).count() > MAX_MEMBERS / 2;
        let oldest = self
            .members
            .iter()
            .filter(|(address, member)| {
                member.origin != Origin::Configured
                    && member.named_at < now
                    && (crowded || !member.verified)
                    && !needed.contains(address)
            })
            .min_by_key(|(_, member)| member.named_at)
            .map(|(address, _)| address.clone());
        oldest.is_some_and(|address| self.members.remove(&address).is_some())
    }

    /// Is this the server whose connections are in use, or were until it was suspended? Its session is kept although a
    /// question on it failed.
    pub(crate) fn holds(&self, address: &Address) -> bool {
        self.primary_address().as_ref() == Some(address) || self.suspended_address().as_ref() == Some(address)
    }

    /// Should an open session to this server be kept for the next question?
    pub(crate) fn keeps(&self, address: &Address) -> bool {
        match &self.phase {
            Phase::Known { primary, .. } => {
                primary.endpoint.address == *address || (self.settings.warm_standbys && self.is_standby(address))
            }
            Phase::Searching(search) => {
                search.pick.as_ref().is_some_and(|pick| pick.address == *address)
                    || self.holds(address)
                    || self.is_standby(address)
            }
        }
    }
}
