//! Which cluster this is: never guessed, and changed by the user's word alone.
//!
//! Timelines are compared within one cluster only: those of two system identifiers have nothing to do with each other.

use std::collections::BTreeSet;

use super::{
    Action, Answer, Duration, Endpoint, Eviction, FailureKind, Instant, Member, Notice, Phase, ProbeFailure, Refusal,
    Role, Search, ServerReport, Topology,
};

/// A server that said in the first search to which cluster it belongs, and then falls silent, is remembered for so long: its
/// silence does not make the other cluster the right one.
const REMEMBER_RIVAL: Duration = Duration::from_secs(30);

/// So many servers are named in the error about two clusters.
const NAMED: usize = 8;

/// Which cluster is to be taken for the pool's own from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accept {
    /// This one, as it is now: on an older timeline, too.
    Cluster(u64),
    /// The one that the next search finds, as if it were the first.
    Any,
}

/// Do both belong to the same cluster, as far as they tell? Two that do not tell count as one: there is nothing to tell them
/// apart by.
pub(super) fn comparable(one: &ServerReport, other: &ServerReport) -> bool {
    one.system_identifier == other.system_identifier
}

impl Topology {
    /// Servers of several clusters answer, one of them is writable, and none of the clusters is known to be the pool's own.
    pub(super) fn conflict(&self, now: Instant) -> Option<ProbeFailure> {
        if self.system_identifier.is_some() || !matches!(self.phase, Phase::Searching(_)) {
            return None;
        }
        let told: Vec<(&Endpoint, &ServerReport)> =
            self.members.values().filter_map(|member| Some((&member.endpoint, member.recent_report(now)?))).collect();
        let writable = |report: &ServerReport| report.role() == Role::Primary;
        let primaries = || told.iter().filter(|(_, report)| writable(report));
        let identified: BTreeSet<u64> = told.iter().filter_map(|(_, report)| report.system_identifier).collect();
        // One that does not tell where it belongs may be of either.
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

    /// The user says which cluster is the pool's own from now on.
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
        // What was begun on another cluster is in doubt for good: no later primary is the next one after it.
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
            member.forget_word();
            member.hurry(now, self.settings.poll.0);
        }
        self.hurry_names(now);
    }

    /// Follows the user's policy: a cluster of which no server has answered as its primary for so long has been replaced by
    /// the one that answers in its place.
    pub(super) fn follow_successor(&mut self, now: Instant) {
        if self.follow_at().is_none_or(|at| at > now) {
            return;
        }
        let claimants: BTreeSet<u64> = self.claimants().filter_map(|report| report.system_identifier).collect();
        let Some(successor) = claimants.first().filter(|_| claimants.len() == 1) else {
            return;
        };
        let silent = now.duration_since(self.own_primary_at);
        let why =
            format!("no server of this pool's cluster was a primary for {silent:.0?}: cluster {successor} is followed");
        self.accept_because(now, Accept::Cluster(*successor), &why);
    }

    /// When somebody else may be followed, if somebody else answers.
    pub(super) fn follow_at(&self) -> Option<Instant> {
        let after = self.settings.accept_new_cluster_after.filter(|_| self.generation.0 > 0)?;
        self.claimants().next()?;
        Some(self.own_primary_at + after)
    }

    /// Writable servers that are refused for where they come from.
    fn claimants(&self) -> impl Iterator<Item = &ServerReport> {
        let search = match &self.phase {
            Phase::Searching(search) => Some(search),
            Phase::Known { .. } => None,
        };
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
    /// What it reported last, if that is not too long ago.
    fn recent_report(&self, now: Instant) -> Option<&ServerReport> {
        let recent = self.heard_at.is_some_and(|at| now.duration_since(at) < REMEMBER_RIVAL);
        self.report.as_ref().filter(|_| recent)
    }

    /// It is asked anew: what it said was judged by what is no longer so.
    fn forget_word(&mut self) {
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
