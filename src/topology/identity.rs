//! Decides which cluster is the pool's own. The pool never guesses the cluster, and only the user can change it.
//!
//! Timelines are compared within one cluster only, because the timelines of two clusters are unrelated.

use std::collections::BTreeSet;

use super::{
    Action, Answer, Duration, Endpoint, Eviction, FailureKind, Instant, Member, Notice, Phase, ProbeFailure, Refusal,
    Role, Search, ServerReport, Topology,
};

/// In the first search, a server that reported its cluster and then fell silent is remembered for this long. Its
/// silence does not prove that the other cluster is the right one.
const REMEMBER_RIVAL: Duration = Duration::from_secs(30);

/// The most servers that the error about several clusters lists.
const NAMED: usize = 8;

/// Which cluster the pool is to belong to from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accept {
    /// This cluster in its present state, even if that is an older timeline.
    Cluster(u64),
    /// Any cluster that the next search finds, as in the first search.
    Any,
}

/// Returns whether both reports are from the same cluster. Two servers that withhold their identifier count as one
/// cluster, because nothing distinguishes them.
pub(super) fn comparable(one: &ServerReport, other: &ServerReport) -> bool {
    one.system_identifier == other.system_identifier
}

impl Topology {
    /// Returns the failure to report if servers of several clusters answer, one of them is writable, and it is not
    /// known which of the clusters is the pool's own.
    pub(super) fn conflict(&self, now: Instant) -> Option<ProbeFailure> {
        if self.system_identifier.is_some() || !matches!(self.phase, Phase::Searching(_)) {
            return None;
        }
        let recent = |member: &'_ Member| {
            member.heard_at.is_some_and(|at| now.duration_since(self.unasked.counts_from(at)) < REMEMBER_RIVAL)
        };
        let told: Vec<(&Endpoint, &ServerReport)> = self
            .members
            .values()
            .filter(|member| recent(member))
            .filter_map(|member| Some((&member.endpoint, member.report.as_ref()?)))
            .collect();
        let writable = |report: &ServerReport| report.role() == Role::Primary;
        let primaries = || told.iter().filter(|(_, report)| writable(report));
        let identified: BTreeSet<u64> = told.iter().filter_map(|(_, report)| report.system_identifier).collect();
        // A server that withholds its cluster may belong to either.
        let unclear = primaries().any(|(_, report)| report.system_identifier.is_none())
            && primaries().any(|(_, report)| report.system_identifier.is_some());
        if primaries().next().is_none() || (identified.len() < 2 && !unclear) {
            return None;
        }
        let listed = told.iter().filter(|(_, report)| report.system_identifier.is_some() || writable(report));
        let servers: Vec<String> = listed.take(NAMED).map(|(endpoint, report)| described(endpoint, report)).collect();
        let message = format!("servers of several clusters answer: {}", servers.join(", "));
        Some(ProbeFailure::new(FailureKind::SeveralClusters, message))
    }

    /// Follows the user's choice of the cluster that is the pool's own from now on.
    pub(crate) fn accept(&mut self, now: Instant, accepted: Accept) {
        let why = match accepted {
            Accept::Cluster(system_identifier) => {
                format!("the cluster {system_identifier} was accepted as this pool's")
            }
            Accept::Any => "this pool's cluster was forgotten".to_owned(),
        };
        self.accept_because(now, accepted, &why);
    }

    fn accept_because(&mut self, now: Instant, accepted: Accept, why: &str) {
        let identifier = match accepted {
            Accept::Cluster(identifier) => Some(identifier),
            Accept::Any => None,
        };
        let before = self.system_identifier;
        self.system_identifier = identifier;
        self.newest_timeline = None;
        self.untold = super::Parts::default();
        let ours = |report: &ServerReport| identifier.is_some() && report.system_identifier == identifier;
        if let Phase::Known { primary, .. } = &self.phase
            && ours(&primary.report)
        {
            self.newest_timeline = primary.report.timeline;
            return;
        }
        // This makes the number of the next generation higher, so that a commit of the previous cluster stays in doubt.
        // No later primary continues that cluster's history.
        self.crossings += u64::from(self.generation.0 > 0);
        let ended = match &mut self.phase {
            Phase::Known { primary, .. } => Some((primary.id, true)),
            Phase::Searching(search) => {
                let left = search.suspended.take_if(|suspended| !ours(&suspended.primary.report));
                left.map(|suspended| (suspended.primary.id, false))
            }
        };
        let suspended = match &mut self.phase {
            Phase::Known { .. } => None,
            Phase::Searching(search) => search.suspended.take(),
        };
        self.phase = Phase::Searching(Search { suspended, ..Search::new(now) });
        self.changed = super::Change { at: now, why: why.to_owned() };
        self.revision += 1;
        if let Some((id, lost)) = ended {
            self.actions.push(Action::End { id, cause: Eviction::Replaced, why: why.to_owned(), lost });
        }
        self.noticed.clear();
        self.say(Notice::ClusterAccepted { before, accepted: identifier });
        for member in self.members.values_mut() {
            member.forget_answer();
            member.hurry(now, self.settings.poll.0);
        }
        self.names.iter_mut().for_each(|name| name.doubt(now));
    }

    /// Applies `accept_new_cluster_after`: if no server of the pool's cluster has answered as its primary for that
    /// long, the pool follows the one cluster that answers in its place.
    pub(super) fn follow_successor(&mut self, now: Instant) {
        let Some(after) = self.settings.accept_new_cluster_after else {
            return;
        };
        let claimants: BTreeSet<u64> = self.claimants().filter_map(|report| report.system_identifier).collect();
        let Some(successor) = claimants.first().filter(|_| claimants.len() == 1) else {
            return;
        };
        let why =
            format!("no server of this pool's cluster was a primary for {after:.0?}: cluster {successor} is followed");
        self.accept_because(now, Accept::Cluster(*successor), &why);
    }

    /// When another cluster may be followed, if one answers. The time counts only while servers are asked for the
    /// primary: within this search, and not during a sleep or while the process is frozen.
    pub(super) fn follow_at(&self) -> Option<Instant> {
        let after = self.settings.accept_new_cluster_after.filter(|_| self.generation.0 > 0)?;
        self.claimants().next()?;
        let Phase::Searching(search) = &self.phase else { return None };
        Some(self.unasked.counts_from(self.own_primary_at.max(search.since)) + after)
    }

    /// The reports of writable servers that were refused in this search because of their cluster or their timeline.
    fn claimants(&self) -> impl Iterator<Item = &ServerReport> {
        let search = self.search();
        let claims = move |member: &'_ Member| search.is_some_and(|search| member.answered(search));
        self.members.values().filter(move |member| claims(member)).filter_map(|member| match &member.answer {
            Some(Answer::Refused(report, Refusal::OtherCluster { .. } | Refusal::Zombie { .. })) => {
                Some(report).filter(|report| report.role() == Role::Primary)
            }
            _ => None,
        })
    }
}

impl Member {
    /// Forgets the member's answer, so that it is asked again: the answer was judged for another cluster.
    fn forget_answer(&mut self) {
        self.answer = None;
        self.report = None;
        self.answered_at = None;
        self.verified = false;
        self.fresh = true;
    }
}

fn described(endpoint: &Endpoint, report: &ServerReport) -> String {
    let role = match report.role() {
        Role::Primary => "writable",
        Role::Standby => "a standby",
        Role::Fenced => "fenced",
        Role::Promoting => "being promoted",
    };
    match report.system_identifier {
        Some(identifier) => format!("{endpoint} (system identifier {identifier}, {role})"),
        None => format!("{endpoint} (does not tell its system identifier, {role})"),
    }
}
