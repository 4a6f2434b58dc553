//! What a server withholds, and what replaces it.
//!
//! If a part is withheld, the pool loses only what that part would show. `topology/tests/untold.rs` checks these rules:
//!
//! - What a server reported before stays true for it. A kept session reaches the same server in the same life, and so
//!   does a new session if the start time is the same.
//! - If the pool's cluster is known, a server that withholds its cluster is refused, unless the primary itself withheld
//!   it and this address has proved before that it belongs to the cluster. A server that reports its cluster is
//!   preferred.
//! - If a timeline is known, a server that withholds its timeline counts as an old primary. There are three exceptions:
//!   the pool has seen its promotion since, or its last checkpoint is not on an older timeline, or the primary itself
//!   withheld its timeline.

use super::{
    Action, Address, Instant, Notice, Part, Parts, Phase, Primary, Probed, Question, Refusal, ServerReport, Topology,
    generation::same_replay,
};

/// Returns the parts that are withheld after this report. A part that the question did not ask for stays as it was.
fn kept_back(before: Parts, probed: &Probed, report: &ServerReport) -> Parts {
    let asked = if probed.fresh { Question::Candidate } else { Question::Again }.parts();
    before.without(asked).and(report.withheld)
}

/// Returns whether both reports are from one server in the same life. `kept`: they came over one session.
fn same_server(before: &ServerReport, report: &ServerReport, kept: bool) -> bool {
    match (before.started_at, report.started_at) {
        (Some(then), Some(now)) => then == now,
        _ => kept,
    }
}

fn fill<T: Copy>(known: &mut Option<T>, told: Option<T>) -> bool {
    let gained = known.is_none() && told.is_some();
    *known = known.or(told);
    gained
}

/// Fills withheld parts of the report with what the same server reported before. If a part is missing without being
/// withheld, that is an error of the server, and it stays missing.
fn complete(report: &mut ServerReport, before: &ServerReport, kept: bool) {
    if !same_server(before, report, kept) {
        return;
    }
    let withheld = report.withheld;
    if withheld.contains(Part::Identity) {
        report.system_identifier = before.system_identifier;
    }
    if withheld.contains(Part::StartTime) {
        report.started_at = before.started_at;
    }
    if report.in_recovery || before.in_recovery || !same_replay(before, report) {
        return;
    }
    if withheld.contains(Part::Timeline) {
        report.timeline = before.timeline;
    }
    if withheld.contains(Part::Replay) {
        report.replayed = before.replayed;
    }
}

impl Topology {
    fn primary_in_use(&self) -> Option<&Primary> {
        match &self.phase {
            Phase::Known { primary, .. } => Some(primary),
            Phase::Searching(search) => search.suspended.as_ref().map(|suspended| &suspended.primary),
        }
    }

    /// Returns the report, completed with what the same server reported before and now withholds.
    pub(super) fn completed(&self, probed: &Probed, report: &ServerReport) -> ServerReport {
        let mut report = report.clone();
        let primary = self.primary_in_use();
        let to_primary = primary.is_some_and(|primary| primary.endpoint.address == probed.address);
        if let Some(primary) = primary {
            complete(&mut report, &primary.report, to_primary && !probed.fresh);
        }
        if let Some(before) = self.members.get(&probed.address).and_then(|member| member.report.as_ref()) {
            complete(&mut report, before, !to_primary && !probed.fresh);
        }
        report
    }

    /// Returns whether a server may withhold this part. It may if the primary withheld it as well, and the server's
    /// address has proved before that it belongs to the cluster.
    fn may_keep_back(&self, address: &Address, report: &ServerReport, part: Part) -> bool {
        report.withheld.contains(part)
            && self.untold.contains(part)
            && self.members.get(address).is_some_and(|member| member.verified)
    }

    /// Checks whether a writable server may withhold its cluster although the pool's cluster is known.
    pub(super) fn may_be_unidentified(&self, address: &Address, report: &ServerReport) -> Result<(), Refusal> {
        if self.may_keep_back(address, report, Part::Identity) { Ok(()) } else { Err(Refusal::Unidentified) }
    }

    /// Checks whether a writable server may withhold its timeline although a newest timeline is known.
    pub(super) fn may_have_no_timeline(
        &self,
        probed: (&Address, bool),
        report: &ServerReport,
        newest: u32,
    ) -> Result<(), Refusal> {
        let (address, kept) = probed;
        match report.checkpointed {
            _ if self.saw_promotion(address, report, kept) => Ok(()),
            // A server's timeline is never older than that of its last checkpoint.
            Some(timeline) if timeline < newest => Err(Refusal::Zombie { timeline, newest }),
            Some(_) => Ok(()),
            None if self.may_keep_back(address, report, Part::Timeline) => Ok(()),
            None => Err(Refusal::NoTimeline { newest }),
        }
    }

    /// Returns whether this server was a standby after the newest timeline was found, and is a primary in the same life
    /// now. If so, its timeline is newer.
    fn saw_promotion(&self, address: &Address, report: &ServerReport, kept: bool) -> bool {
        self.members.get(address).is_some_and(|member| {
            let since = member.heard_at.is_some_and(|at| at >= self.newest_at);
            let standby = member.report.as_ref().filter(|before| since && before.in_recovery);
            standby.is_some_and(|before| same_server(before, report, kept))
        })
    }

    /// Notes what the primary's answer shows in addition, and what it withholds now.
    pub(super) fn learn(&mut self, now: Instant, probed: &Probed, report: &ServerReport) {
        let Phase::Known { primary, .. } = &mut self.phase else {
            return;
        };
        let mine = &mut primary.report;
        let withheld = kept_back(mine.withheld, probed, report);
        let mut changed = mine.withheld != withheld;
        let replay_was_untold = mine.withheld.contains(Part::Replay) && !withheld.contains(Part::Replay);
        mine.withheld = withheld;
        if report.evidence.is_some() && mine.evidence != report.evidence {
            mine.evidence = report.evidence;
            changed = true;
        }
        let mut gained = false;
        if same_server(mine, report, !probed.fresh) {
            gained |= fill(&mut mine.system_identifier, report.system_identifier);
            gained |= fill(&mut mine.started_at, report.started_at);
            gained |= fill(&mut mine.timeline, report.timeline);
            gained |= fill(&mut mine.stats_reset, report.stats_reset);
            gained |= fill(&mut mine.checkpointed, report.checkpointed);
            if replay_was_untold {
                mine.replayed = report.replayed;
                gained = true;
            }
        }
        if gained {
            self.actions.push(Action::Learned { report: mine.clone() });
        }
        let told = mine.clone();
        self.revision += u64::from(changed || gained);
        self.note_told(now, &told);
    }

    /// Notes the primary's cluster and timeline, and what it withholds.
    pub(super) fn note_told(&mut self, now: Instant, report: &ServerReport) {
        self.untold = report.withheld;
        if self.system_identifier.is_none() {
            self.system_identifier = report.system_identifier;
        }
        if report.timeline > self.newest_timeline && !planted!("forgets the newest timeline") {
            self.newest_timeline = report.timeline;
            self.newest_at = now;
        }
    }

    /// Tells the operator what a primary withholds, and tells it again when the primary withholds more.
    pub(super) fn notice_withheld(&mut self, probed: &Probed, report: &ServerReport) {
        let Some(member) = self.members.get_mut(&probed.address) else {
            return;
        };
        let before = std::mem::take(&mut member.kept_back);
        member.kept_back = kept_back(before, probed, report);
        let more = member.kept_back.without(before);
        if !more.is_empty() {
            self.actions.push(Action::Notice(Notice::Withheld(probed.address.clone(), more)));
        }
    }

    /// Returns whether this server replaces the primary because it reports its cluster and the primary does not.
    pub(super) fn is_better_known(&self, primary: &Primary, report: &ServerReport) -> bool {
        primary.report.system_identifier.is_none()
            && self.system_identifier.is_some()
            && report.system_identifier == self.system_identifier
            && report.timeline >= primary.report.timeline
    }

    /// Returns whether the primary withholds the setting for new sessions, so that only a new session shows whether it
    /// is read-only.
    pub(super) fn must_look_anew(&self) -> bool {
        matches!(&self.phase, Phase::Known { primary, .. } if primary.report.withheld.contains(Part::Fence))
    }
}
