//! Decides when waiting does not help, because every candidate gives a permanent reason. Callers are then told
//! immediately.

use super::{Answer, Duration, FailureKind, Instant, Phase, ProbeFailure, Refusal, Topology};

/// Unknown names and servers of the wrong cluster are reported to callers only after the search has lasted this long,
/// because a name may be registered, or an address moved, at the moment when the program starts.
pub(super) const GRACE: Duration = Duration::from_secs(2);
/// If this cluster has accepted the credentials before, callers are told of a refusal only after every server has
/// refused them for this long. A new primary may get the role, or its line in `pg_hba.conf`, only after the promotion.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// Pause between log-ins that will most likely be refused. They are tried on one server after the other.
pub(super) const LOG_IN_INTERVAL: Duration = Duration::from_secs(1);
/// The longest time by which several log-ins that were refused together postpone the next one.
const TOGETHER: Duration = Duration::from_secs(2);
/// Longest such pause. The pause grows to this while no caller waits.
const LONGEST_INTERVAL: Duration = Duration::from_secs(5);

/// What one candidate or one name contributes to the decision.
#[derive(Clone, Debug)]
pub(super) enum Outlook {
    /// Waiting may help.
    Open,
    /// It accepts no connection, and may be just starting, or a name may lead to more servers. So callers are told in
    /// spite of it only if others refuse the credentials, which are the same everywhere.
    Silent,
    /// It gave a permanent failure, in answer to a question that was sent at this time.
    Hopeless(ProbeFailure, Instant),
}

/// The failure that callers get because waiting does not help.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hopeless {
    pub(super) failure: ProbeFailure,
    /// When the question was sent whose answer this failure is.
    pub(super) as_of: Instant,
    /// Callers are told when the search has lasted this long.
    pub(super) after: Duration,
}

/// Decides from all candidates and names. `let_in`: a server of this cluster has accepted this role before.
pub(super) fn judge(outlooks: impl Iterator<Item = Outlook>, let_in: bool) -> Option<Hopeless> {
    let mut told: [Option<(ProbeFailure, Instant)>; 4] = [None, None, None, None];
    let (mut after, mut silent) = (Duration::ZERO, false);
    for outlook in outlooks {
        let (failure, at) = match outlook {
            Outlook::Open => return None,
            Outlook::Silent if let_in => return None,
            Outlook::Silent => {
                silent = true;
                continue;
            }
            Outlook::Hopeless(failure, at) => (failure, at),
        };
        let (rank, needs) = match failure.kind {
            FailureKind::Refused => (0, if let_in { PATIENCE } else { Duration::ZERO }),
            FailureKind::SeveralClusters if !let_in => (1, GRACE),
            FailureKind::NotPostgres if !let_in => (2, Duration::ZERO),
            FailureKind::UnknownName if !let_in => (3, GRACE),
            _ => return None,
        };
        after = after.max(needs);
        let newest = told[rank].take().filter(|(_, newest)| *newest >= at);
        told[rank] = newest.or(Some((failure, at)));
    }
    if silent && told[0].is_none() {
        return None;
    }
    // For each kind of failure, the newest answer counts. One server that was asked again is enough, because the
    // credentials are the same everywhere.
    let as_of = told.iter().flatten().map(|(_, at)| *at).min()?;
    let (failure, _) = told.into_iter().flatten().next()?;
    Some(Hopeless { failure, as_of, after })
}

/// A log-in that the server refused.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RefusedLogIn {
    pub(crate) began: Instant,
    pub(crate) refused: Instant,
}

/// Limits log-ins that will most likely be refused to one per interval on average. At first, and after a pause, it
/// allows two in a row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    free_at: Instant,
    /// When the last refusal came that counted in full.
    refused: Option<Instant>,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self { free_at: now.checked_sub(LOG_IN_INTERVAL).unwrap_or(now), refused: None }
    }

    pub(super) fn spend(&mut self, now: Instant) {
        self.free_at = (self.free_at + LOG_IN_INTERVAL).max(now);
    }

    /// Counts a refused log-in. There may be many log-ins under way when one of them is refused, and they could not
    /// know of that refusal. So together they postpone the next one by [`TOGETHER`] at most. A log-in that was begun
    /// after a refusal counts in full, however soon it was begun.
    pub(super) fn refused(&mut self, log_in: RefusedLogIn) {
        let before = self.free_at;
        self.spend(log_in.refused);
        if self.refused.is_some_and(|refused| log_in.began < refused) {
            self.free_at = self.free_at.min(before.max(log_in.refused + TOGETHER));
        } else {
            self.refused = Some(log_in.refused);
        }
    }
}

impl Topology {
    /// Sets the failure that callers get if waiting does not help, or clears it.
    pub(super) fn judge_refusals(&mut self, now: Instant) {
        let Phase::Searching(search) = &self.phase else {
            return;
        };
        let since = self.unasked.counts_from(search.since);
        let hopeless = match self.conflict(now) {
            Some(failure) => Some(Hopeless { failure, as_of: self.oldest_answer(now), after: Duration::ZERO }),
            None => judge(self.outlooks(), self.let_in),
        };
        let due = hopeless.as_ref().map(|hopeless| since + hopeless.after);
        let told = hopeless.filter(|_| due.is_some_and(|due| due <= now));
        let Phase::Searching(search) = &mut self.phase else {
            return;
        };
        search.judge_at = due.filter(|due| *due > now);
        search.refused_as_of = told.as_ref().map(|told| told.as_of);
        self.set_refused(now, told.map(|told| told.failure));
    }

    /// Returns when the oldest question was sent whose answer is still the newest of its server. The name may lead to
    /// another server by now.
    fn oldest_answer(&self, now: Instant) -> Instant {
        let members = self.members.values().filter_map(|member| member.told_at);
        members.chain(self.names.iter().filter_map(|name| name.told_at)).min().unwrap_or(now)
    }

    fn outlooks(&self) -> impl Iterator<Item = Outlook> {
        let members = self.members.values().map(|member| match (&member.answer, member.told_at) {
            _ if !self.answered(member) || member.has_untried_name() => Outlook::Open,
            (Some(Answer::Failed(failure)), Some(at)) => match failure.kind {
                FailureKind::Refused | FailureKind::NotPostgres => Outlook::Hopeless(failure.clone(), at),
                FailureKind::Unreachable => Outlook::Silent,
                _ => Outlook::Open,
            },
            (Some(Answer::Refused(_, refusal @ Refusal::OtherCluster { .. })), Some(at)) => {
                let message = format!("{}: {refusal}", member.endpoint);
                Outlook::Hopeless(ProbeFailure::new(FailureKind::SeveralClusters, message), at)
            }
            _ => Outlook::Open,
        });
        let names = self.names.iter().filter_map(|name| match (name.told_at, name.unknown, name.failure()) {
            (Some(at), true, Some(why)) => {
                Some(Outlook::Hopeless(ProbeFailure::new(FailureKind::UnknownName, why.to_owned()), at))
            }
            // The name has led to servers, which are judged separately.
            (Some(_), _, None) => None,
            // The name servers have told nothing, or only one of its address families. There may be more servers, but
            // they take the same credentials.
            (Some(_), false, Some(_)) => Some(Outlook::Silent),
            _ => Some(Outlook::Open),
        });
        members.chain(names)
    }

    /// When the question was sent whose answer shows that waiting does not help. `None` unless callers are told so.
    pub(crate) fn refused_as_of(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Searching(search) => search.refused_as_of,
            Phase::Known { .. } => None,
        }
    }

    /// Handles a caller that asks although waiting does not help: asks the candidates again soon. If callers ask in a
    /// loop, the questions still come no faster than at the slowest pace of a search.
    pub(crate) fn demanded(&mut self, now: Instant) {
        if self.refused_as_of().is_none() {
            return;
        }
        for member in self.members.values_mut() {
            member.hurry(now, self.settings.poll.1);
        }
        self.demand_names(now);
    }

    /// Notes that a log-in of another part of this pool was refused.
    pub(crate) fn log_in_refused(&mut self, log_in: RefusedLogIn) {
        self.log_ins.refused(log_in);
    }

    /// While log-ins will most likely be refused: the earliest time for the next one.
    pub(crate) fn log_in_at(&self) -> Instant {
        self.log_ins.free_at
    }

    /// Pause between a refused log-in and the next one while no caller waits.
    pub(super) fn refused_pause(&self, lost_for: Duration) -> Duration {
        if self.let_in { LOG_IN_INTERVAL } else { (lost_for / 16).clamp(LOG_IN_INTERVAL, LONGEST_INTERVAL) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::tests::KINDS;

    /// The kinds of a probe's failures that have an outlook, and those that the topology itself makes.
    fn kinds() -> impl Iterator<Item = FailureKind> {
        let probed = KINDS.into_iter().filter(|kind| *kind != FailureKind::Errored);
        probed.chain([FailureKind::SeveralClusters, FailureKind::UnknownName])
    }

    /// What [`Topology::outlooks`] makes of a failure of this kind.
    fn outlook(kind: FailureKind, at: Instant) -> Outlook {
        match kind {
            FailureKind::Unreachable => Outlook::Silent,
            FailureKind::TimedOut | FailureKind::NotNow | FailureKind::Full => Outlook::Open,
            _ => Outlook::Hopeless(ProbeFailure::new(kind, format!("{kind:?}")), at),
        }
    }

    /// For each pair of failure kinds: after how many seconds of the search callers are told, and which failure.
    #[test]
    fn each_kind_of_failure_beside_each() {
        use FailureKind::{Full, NotNow, NotPostgres, Refused, SeveralClusters, TimedOut, UnknownName, Unreachable};
        let now = Instant::now();
        for one in kinds() {
            for other in kinds() {
                let pair = || [one, other].into_iter();
                let judged = |let_in| {
                    let hopeless = judge(pair().map(|kind| outlook(kind, now)), let_in)?;
                    Some((hopeless.failure.kind, hopeless.after.as_secs()))
                };
                let has = |kind| pair().any(|it| it == kind);
                let starting = has(Unreachable) && !has(Refused);
                let waits = has(TimedOut) || has(NotNow) || has(Full) || starting;
                let grace = if has(UnknownName) || has(SeveralClusters) { 2 } else { 0 };
                let told = [Refused, SeveralClusters, NotPostgres, UnknownName].into_iter().find(|kind| has(*kind));
                let expected = told.filter(|_| !waits).map(|kind| (kind, grace));
                assert_eq!(judged(false), expected, "{one:?} and {other:?}, never let in");
                let all_refuse = pair().all(|kind| kind == Refused);
                let expected = all_refuse.then_some((Refused, 30));
                assert_eq!(judged(true), expected, "{one:?} and {other:?}, let in before");
            }
        }
        assert_eq!(judge(std::iter::empty(), false), None, "nothing is known yet");
    }

    #[test]
    fn one_that_was_asked_anew_speaks_for_its_kind() {
        let now = Instant::now();
        let later = now + GRACE;
        let as_of = |outlooks: &[(FailureKind, Instant)]| {
            judge(outlooks.iter().map(|(kind, at)| outlook(*kind, *at)), false).unwrap().as_of
        };
        assert_eq!(as_of(&[(FailureKind::Refused, now), (FailureKind::Refused, later)]), later);
        assert_eq!(as_of(&[(FailureKind::Refused, later), (FailureKind::Refused, now)]), later);
        assert_eq!(as_of(&[(FailureKind::UnknownName, now), (FailureKind::Refused, later)]), now);
    }

    #[test]
    fn refused_log_ins_are_tried_once_a_second() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        let mut tries = 0;
        for millisecond in 0..60_000 {
            let at = now + Duration::from_millis(millisecond);
            if pace.free_at <= at {
                pace.spend(at);
                tries += 1;
            }
        }
        assert_eq!(tries, 61);
        let at = now + Duration::from_secs(120);
        pace.spend(at);
        assert_eq!(pace.free_at, at, "a second one follows at once");
        pace.spend(at);
        assert_eq!(pace.free_at, at + LOG_IN_INTERVAL);
    }

    /// Each row is a series of log-ins: when each was begun and refused, and how long after the last refusal the next
    /// log-in is allowed. All times are in milliseconds.
    #[test]
    fn log_ins_refused_together_put_off_the_next_one_a_little() {
        type Case<'a> = (&'a str, &'a [(u64, u64)], u64);
        let cases: [Case<'_>; 9] = [
            ("a single one", &[(0, 5)], 0),
            ("two, one after the other", &[(0, 5), (6, 11)], 994),
            ("three, one after the other", &[(0, 5), (6, 11), (12, 17)], 1988),
            ("two together", &[(0, 5), (1, 6)], 999),
            ("sixty-four together", &[(0, 5); 64], 2000),
            ("four together, which end one after the other", &[(0, 5), (1, 6), (2, 60), (3, 700)], 2000),
            ("begun at the moment of a refusal", &[(0, 5), (5, 9)], 996),
            ("two groups", &[(0, 5), (0, 5), (6, 11), (6, 11)], 2000),
            ("one that was begun early, after a long debt", &[(0, 5), (6, 11), (12, 17), (18, 23), (13, 30)], 2975),
        ];
        for (case, log_ins, expected) in cases {
            let now = Instant::now();
            let at = |milliseconds| now + LOG_IN_INTERVAL + Duration::from_millis(milliseconds);
            let mut pace = Pace::new(now);
            for (began, refused) in log_ins {
                pace.refused(RefusedLogIn { began: at(*began), refused: at(*refused) });
            }
            let last = at(log_ins.last().unwrap().1);
            assert_eq!(pace.free_at.saturating_duration_since(last), Duration::from_millis(expected), "{case}");
        }
    }

    /// Callers that take turns log in once per interval on average, however many there are, and however late the pace
    /// learns of a refusal.
    #[test]
    fn those_who_take_turns_are_paced_however_late_a_refusal_is_noted() {
        for late in [0, 1, 3, 50] {
            let start = Instant::now();
            let mut pace = Pace::new(start);
            let (mut now, mut tries, mut unknown) = (start, 0, std::collections::VecDeque::new());
            while now < start + Duration::from_secs(60) {
                if pace.free_at > now {
                    now += Duration::from_millis(1);
                } else {
                    tries += 1;
                    unknown.push_back(RefusedLogIn { began: now, refused: now + Duration::from_millis(2) });
                    now += Duration::from_millis(2);
                }
                while unknown.front().is_some_and(|it| it.refused + Duration::from_millis(late) <= now) {
                    pace.refused(unknown.pop_front().unwrap());
                }
            }
            assert!((60..=61 + 2 * late).contains(&tries), "{late} ms: {tries}");
        }
    }
}
