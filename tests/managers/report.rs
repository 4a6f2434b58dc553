//! What a round came to, what it should have come to, and the table of all.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use testbed::Verdict;

use crate::load::Answers;

/// What the pool promises in a trial. Nothing is ever doubled, untrue or unknown, and no call of the pool fails.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Promise {
    /// Commits wait for no standby: what the old primary acknowledged before the new one's first write may be lost.
    pub(crate) may_lose_before: bool,
    /// The old primary goes on acknowledging, and nothing but the new one's sight ends that: for so long at most.
    pub(crate) may_lose_for: Option<Duration>,
}

/// When what happened in a round.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    pub(crate) begun: Instant,
    pub(crate) fault: Instant,
    /// The new primary's first write, by somebody else.
    pub(crate) accepted: Instant,
}

/// What one round came to.
#[derive(Debug)]
pub(crate) struct Round {
    acknowledged: usize,
    lost_before: usize,
    lost_after: usize,
    /// The last one that was lost, from the new primary's first write on.
    lost_for: Duration,
    doubled: usize,
    untrue: usize,
    unknown: usize,
    gap: Duration,
    outage: Duration,
    first: Duration,
    all: Duration,
    /// What broke a promise.
    pub(crate) broken: Vec<String>,
}

impl Round {
    pub(crate) fn judge(answers: &Answers, stored: &[(i64, i64)], times: Times, promise: Promise) -> Self {
        let Verdict { acknowledged, lost, doubled, untrue, .. } = answers.check(stored);
        let answered = answers.times(&lost);
        let lost_after = answered.iter().filter(|at| **at > times.accepted).count();
        let (first, all) = answers.recovery(times.accepted, &lost).unwrap_or((Duration::MAX, Duration::MAX));
        let last = answered.iter().map(|at| at.saturating_duration_since(times.accepted)).max();
        let mut round = Self {
            acknowledged,
            lost_before: answered.len() - lost_after,
            lost_after,
            lost_for: last.unwrap_or_default(),
            doubled: doubled.len(),
            untrue: untrue.len(),
            unknown: answers.unknown().len(),
            gap: answers.longest_gap(times.begun),
            outage: times.accepted.saturating_duration_since(times.fault),
            first,
            all,
            broken: Vec::new(),
        };
        let failed = [
            (!doubled.is_empty(), format!("doubled: {doubled:?}")),
            (!untrue.is_empty(), format!("untrue: {untrue:?}")),
            (!answers.unknown().is_empty(), format!("unknown: {:#?}", answers.unknown())),
            (!answers.errors().is_empty(), format!("errors: {:#?}", answers.errors())),
            (round.lost_before > 0 && !promise.may_lose_before, format!("lost before: {}", round.lost_before)),
            (
                lost_after > 0 && promise.may_lose_for.is_none_or(|limit| round.lost_for > limit),
                format!("lost after the new primary's first write: {lost_after}, for {:?}", round.lost_for),
            ),
        ];
        round.broken.extend(failed.into_iter().filter(|(is_broken, _)| *is_broken).map(|(_, what)| what));
        round
    }

    /// In one line.
    pub(crate) fn line(&self) -> String {
        let Self { acknowledged, lost_before, lost_after, doubled, untrue, unknown, .. } = self;
        format!(
            "acknowledged={acknowledged} lost={lost_before}/{lost_after} lost_for_ms={} doubled={doubled} \
             untrue={untrue} unknown={unknown} gap_s={:.1} outage_s={:.1} first_ms={} all_ms={}",
            self.lost_for.as_millis(),
            self.gap.as_secs_f64(),
            self.outage.as_secs_f64(),
            self.first.as_millis(),
            self.all.as_millis(),
        )
    }
}

pub(crate) const HEAD: &str = "\
                               | trial | rounds | lost before / after | doubled | untrue | unknown | longest gap, s | \
                               outage of the server, s | first / all writers, ms |
|---|---|---|---|---|---|---|---|---|
";

/// The table's row: the least and the most of all rounds.
pub(crate) fn row(name: &str, rounds: &[Round]) -> String {
    let count = |of: fn(&Round) -> usize| span(rounds.iter().map(of), ToString::to_string);
    let seconds = |of: fn(&Round) -> Duration| span(rounds.iter().map(of), |time| format!("{:.1}", time.as_secs_f64()));
    let ms = |of: fn(&Round) -> Duration| span(rounds.iter().map(of), |time| time.as_millis().to_string());
    let sum = |of: fn(&Round) -> usize| rounds.iter().map(of).sum::<usize>();
    let mut row = format!("| {name} | {} ", rounds.len());
    let _ = writeln!(
        row,
        "| {} / {} | {} | {} | {} | {} | {} | {} / {} |",
        count(|round| round.lost_before),
        count(|round| round.lost_after),
        sum(|round| round.doubled),
        sum(|round| round.untrue),
        sum(|round| round.unknown),
        seconds(|round| round.gap),
        seconds(|round| round.outage),
        ms(|round| round.first),
        ms(|round| round.all),
    );
    row
}

fn span<T: Ord>(values: impl Iterator<Item = T>, show: impl Fn(&T) -> String) -> String {
    let mut values: Vec<_> = values.collect();
    values.sort_unstable();
    match (values.first().map(&show), values.last().map(&show)) {
        (Some(least), Some(most)) if least != most => format!("{least}–{most}"),
        (Some(one), _) => one,
        _ => "none".to_owned(),
    }
}
