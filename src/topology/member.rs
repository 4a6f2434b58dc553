//! What is known of each candidate, which candidates are added, and which one is forgotten to make room.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{
    Address, Answer, CandidateReport, Endpoint, Origin, Parts, Phase, ProbeFailure, PromotionWait, Refusal,
    ServerReport, Topology, generation::same_start,
};

/// The most candidates that are probed at the same time. If there are more, the others wait for their turns.
pub(super) const MAX_MEMBERS: usize = 64;

/// One candidate. The glossary calls it a member only if it is `verified`.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(super) struct Member {
    pub(super) endpoint: Endpoint,
    /// The other names that lead to this address. The server's certificate may be for one of these.
    other_names: VecDeque<Option<Arc<str>>>,
    /// With how many names in a row the certificate did not fit.
    wrong_names: usize,
    pub(super) origin: Origin,
    /// When to ask next. If a probe is under way, it must end first.
    pub(super) due: Instant,
    pub(super) asking: bool,
    /// The promotion wait of the last question, if it had one.
    pub(super) promotion_wait: Option<PromotionWait>,
    pub(super) asked_at: Option<Instant>,
    pub(super) answered_at: Option<Instant>,
    /// When its last report came.
    pub(super) heard_at: Option<Instant>,
    pub(super) answer: Option<Answer>,
    /// When the pool asked the question that was answered last.
    pub(super) told_at: Option<Instant>,
    /// Its last report, which came at `heard_at`.
    pub(super) report: Option<ServerReport>,
    /// The withheld parts that the operator has already been told of.
    pub(super) kept_back: Parts,
    /// How many times in a row it had no free connection slot.
    pub(super) full: u32,
    pub(super) took: Option<Duration>,
    /// How long its last report took.
    reported_in: Option<Duration>,
    /// The shorter time of its last two reports.
    pub(super) usually: Option<Duration>,
    /// The next probe must open a new session.
    pub(super) fresh: bool,
    /// The next question is urgent, so it must not be postponed to the usual time.
    pub(super) prompt: bool,
    /// When the session of the last question was opened.
    pub(super) opened_at: Option<Instant>,
    /// It has proved to belong to this cluster.
    pub(super) verified: bool,
    pub(super) named_at: Instant,
}

impl Member {
    pub(super) fn is_dead(&self) -> bool {
        matches!(&self.answer, Some(Answer::Failed(failure)) if !failure.kind.is_an_answer())
    }

    /// Returns whether it is a standby whose session can be kept. Such a session survives the promotion and becomes the
    /// first one of the new primary. A session that was opened under a fence does not count, because it stays read-only
    /// after the fence is lifted.
    pub(super) fn is_standby(&self) -> bool {
        matches!(&self.answer, Some(Answer::Refused(report, Refusal::Standby)) if !report.default_read_only)
    }

    /// Notes that this name leads to the address, too.
    fn add_name(&mut self, name: Option<Arc<str>>) {
        if self.endpoint.host != name && !self.other_names.contains(&name) {
            self.other_names.push_back(name);
        }
    }

    /// Notes whether the certificate fitted the name. If it did not, the next question tries the next name.
    pub(super) fn note_name(&mut self, failure: Option<&ProbeFailure>) {
        let is_wrong = failure.is_some_and(ProbeFailure::is_of_a_wrong_name);
        self.wrong_names = if is_wrong { self.wrong_names.saturating_add(1) } else { 0 };
    }

    /// Turns to the next name if the certificate did not fit the last one.
    pub(super) fn turn_to_next_name(&mut self) {
        if self.wrong_names > 0
            && let Some(next) = self.other_names.pop_front()
        {
            self.other_names.push_back(std::mem::replace(&mut self.endpoint.host, next));
        }
    }

    /// Returns whether the certificate did not fit the names that were tried, and another one was not tried yet.
    pub(super) fn has_untried_name(&self) -> bool {
        (1..=self.other_names.len()).contains(&self.wrong_names)
    }

    /// Notes how long a report took. A single slow report does not count.
    pub(super) fn note_pace(&mut self, took: Option<Duration>) {
        let last = std::mem::replace(&mut self.reported_in, took);
        self.usually = last.into_iter().chain(took).min();
    }

    /// Adapts the promotion wait to the server. A slow server is probably polled by many pools, so its recovery is
    /// checked less often.
    pub(super) fn spares(&self, promotion_wait: PromotionWait) -> PromotionWait {
        let step = promotion_wait.step.max(self.took.unwrap_or_default() / 2).min(promotion_wait.lasts);
        PromotionWait { step, ..promotion_wait }
    }

    /// Returns whether the next question needs a new log-in although the server has refused the last one. Such a log-in
    /// will most likely be refused, too.
    pub(super) fn must_log_in(&self, current: Option<&Address>) -> bool {
        let held = current == Some(&self.endpoint.address) && !self.fresh;
        let refused = matches!(&self.answer, Some(Answer::Failed(failure)) if failure.is_refused_log_in());
        refused && !held
    }

    /// Asks as soon as possible, but not before `pause` has passed since the last question.
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

    /// The members that are kept even if DNS no longer names them. While a primary is known, this is the primary.
    /// During a search, these are the suspended primary and the server that is about to be accepted.
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
            member.add_name(endpoint.host);
            if member.has_untried_name() {
                member.due = member.due.min(now);
            }
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
            other_names: VecDeque::new(),
            wrong_names: 0,
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
            reported_in: None,
            usually: None,
            fresh: true,
            prompt: false,
            opened_at: None,
            verified: false,
            named_at: now,
        };
        self.spare.retain(|(other, _)| other.address != endpoint.address);
        self.members.insert(endpoint.address, member);
    }

    /// Makes room for a new member. Forgets the member that was named longest ago, among those that the newest DNS
    /// answer does not name. A verified member may be the next primary, and DNS may be wrong about it. So a verified
    /// member is forgotten only if more than half of all places are taken by verified members.
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

    /// Returns whether this is the server of the current or suspended generation. Its session is kept even if a
    /// question on it fails.
    pub(crate) fn holds(&self, address: &Address) -> bool {
        self.primary_address().as_ref() == Some(address) || self.suspended_address().as_ref() == Some(address)
    }

    /// Returns whether the last answer from this address came from the known primary, which may have several addresses.
    pub(super) fn is_also_primary(&self, address: &Address) -> bool {
        let Phase::Known { primary, .. } = &self.phase else {
            return false;
        };
        let answer = self.members.get(address).and_then(|member| member.answer.as_ref());
        matches!(answer, Some(Answer::Primary(report)) if same_start(report, &primary.report))
    }

    /// Returns whether an open session to this server should be kept for the next question.
    pub(crate) fn keeps(&self, address: &Address) -> bool {
        match &self.phase {
            Phase::Known { primary, .. } => {
                let warm = self.is_standby(address) || (!self.settings.roaming && self.is_also_primary(address));
                primary.endpoint.address == *address || (self.settings.warm_standbys && warm)
            }
            Phase::Searching(search) => {
                search.pick.as_ref().is_some_and(|pick| pick.address == *address)
                    || self.holds(address)
                    || self.is_standby(address)
            }
        }
    }
}
