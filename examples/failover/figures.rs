//! The figures of a run, and how they are compared over many.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use testbed::Spread;

use crate::fault::Fault;
use crate::load::Writer;
use crate::scenario::{Outcome, Run};
use crate::{PACE, Settings, WRITERS};

/// What happened when.
pub(crate) struct Timeline {
    pub(crate) start: Instant,
    /// When the primary failed.
    pub(crate) struck: Instant,
    /// When the new primary had answered the first direct write.
    pub(crate) accepted: Instant,
    /// When this pool had verified the new primary.
    pub(crate) verified: Instant,
    /// How long the server took from the promotion's order to that write.
    pub(crate) promotion: Duration,
    /// When DNS was moved, where it moves.
    pub(crate) named: Option<Instant>,
    pub(crate) end: Instant,
}

/// What one side came to in one run.
#[derive(Clone, Debug)]
pub(crate) struct Figures {
    pub(crate) acknowledged: usize,
    /// Errors that reached the caller.
    pub(crate) errors: usize,
    /// Rows beyond one per id.
    pub(crate) duplicates: usize,
    /// Acknowledged and not stored.
    pub(crate) lost: usize,
    /// The longest time that any writer was without an acknowledgement.
    pub(crate) longest_gap: Duration,
    /// From the new primary's first direct write to the first acknowledgement; `None`: it never came.
    pub(crate) first_success: Option<Duration>,
    /// The same, to the last writer's first acknowledgement.
    pub(crate) all_writers: Option<Duration>,
    /// From the change of DNS to the first acknowledgement, where DNS moves: before, the new primary has no name.
    pub(crate) after_dns: Option<Duration>,
}

impl Figures {
    /// `stored`: each id in the table, and how often it is there.
    pub(crate) fn new(timeline: &Timeline, writers: &[Writer], stored: &HashMap<i64, i64>) -> Self {
        let acknowledged = || writers.iter().flat_map(|writer| &writer.acknowledged);
        let firsts: Vec<Option<Duration>> = writers
            .iter()
            .map(|writer| {
                let first = writer.acknowledged.iter().find(|(_, at)| *at > timeline.accepted);
                first.map(|(_, at)| *at - timeline.accepted)
            })
            .collect();
        let first_success = firsts.iter().flatten().min().copied();
        let since =
            |then: Instant| first_success.map(|first| (timeline.accepted + first).saturating_duration_since(then));
        Self {
            acknowledged: acknowledged().count(),
            errors: writers.iter().map(|writer| writer.errors_until(timeline.end).count()).sum(),
            duplicates: stored.values().map(|count| usize::try_from(count - 1).unwrap_or(0)).sum(),
            lost: acknowledged().filter(|(id, _)| !stored.contains_key(id)).count(),
            longest_gap: writers.iter().map(|writer| longest_gap(timeline, writer)).max().unwrap_or_default(),
            first_success,
            all_writers: firsts.into_iter().collect::<Option<Vec<_>>>().and_then(|all| all.into_iter().max()),
            after_dns: timeline.named.and_then(since),
        }
    }

    /// What must not happen to a user of this pool.
    pub(crate) fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut must_not = |happened: bool, what: String| {
            if happened {
                faults.push(what);
            }
        };
        must_not(self.errors > 0, format!("{} errors reached the callers of this pool", self.errors));
        must_not(self.duplicates > 0, format!("this pool stored {} rows twice", self.duplicates));
        must_not(self.lost > 0, format!("{} writes that this pool acknowledged are lost", self.lost));
        must_not(self.all_writers.is_none(), "not every writer of this pool wrote again".to_owned());
        faults
    }

    /// The figures by the names that they have in the JSON file.
    pub(crate) fn named(&self) -> Vec<(&'static str, Option<f64>)> {
        let mut named = vec![
            ("acknowledged", Some(count(self.acknowledged))),
            ("errors", Some(count(self.errors))),
            ("duplicates", Some(count(self.duplicates))),
            ("lost", Some(count(self.lost))),
            ("longest_gap_ms", Some(milliseconds(self.longest_gap))),
            ("first_success_ms", self.first_success.map(milliseconds)),
            ("all_writers_ms", self.all_writers.map(milliseconds)),
        ];
        named.extend(self.after_dns.map(|after| ("first_success_after_dns_ms", Some(milliseconds(after)))));
        named
    }
}

fn longest_gap(timeline: &Timeline, writer: &Writer) -> Duration {
    let moments = writer.acknowledged.iter().map(|(_, at)| at.saturating_duration_since(timeline.start));
    testbed::longest_gap(Duration::ZERO, moments, timeline.end.saturating_duration_since(timeline.start))
}

/// Each figure over all runs. `side` picks the pool.
pub(crate) fn spreads(runs: &[Run], side: fn(&Run) -> &Outcome) -> Vec<(&'static str, Spread)> {
    let figures: Vec<_> = runs.iter().map(|run| side(run).figures.named()).collect();
    let names = figures.first().into_iter().flatten().map(|(name, _)| *name);
    let value = |of: &[(&'static str, Option<f64>)], wanted| {
        of.iter().find(|(name, _)| *name == wanted).and_then(|(_, value)| *value)
    };
    names.map(|name| (name, Spread::of(figures.iter().map(|run| value(run, name))))).collect()
}

/// From the order to promote to the first write, and from there to this pool's proof that the new primary is one.
pub(crate) fn change(runs: &[Run]) -> [(&'static str, Spread); 2] {
    let spread =
        |of: fn(&Timeline) -> Duration| Spread::of(runs.iter().map(|run| Some(milliseconds(of(&run.timeline)))));
    [
        ("promotion_ms", spread(|timeline| timeline.promotion)),
        ("verified_ms", spread(|timeline| timeline.verified.saturating_duration_since(timeline.accepted))),
    ]
}

/// The file's content: the conditions, and what each failure came to.
pub(crate) fn json(settings: Settings, all: &[(Fault, Vec<Run>)]) -> Value {
    let mut file = json!({
        "conditions": {
            "dns": settings.naming.name(),
            "detection_ms": number(Some(milliseconds(settings.detection))),
            "writers": WRITERS,
            "pace_ms": number(Some(milliseconds(PACE))),
        },
    });
    for (fault, runs) in all {
        file[fault.name()] = of_fault(runs);
    }
    file
}

/// The figures of the last run, which is the one in the picture, and the spread over all.
fn of_fault(runs: &[Run]) -> Value {
    let mut all = json!({});
    if let Some(last) = runs.last() {
        all["pool"] = object(last.pool.figures.named().into_iter().map(|(name, value)| (name, number(value))));
        all["plain"] = object(last.plain.figures.named().into_iter().map(|(name, value)| (name, number(value))));
        all["change"] =
            object(change(std::slice::from_ref(last)).into_iter().map(|(name, of)| (name, number(of.median))));
    }
    if runs.len() > 1 {
        let side = |side| object(spreads(runs, side).into_iter().map(|(name, spread)| (name, spread_json(spread))));
        all["runs"] = json!({
            "count": runs.len(),
            "pool": side(|run| &run.pool),
            "plain": side(|run| &run.plain),
            "change": object(change(runs).into_iter().map(|(name, spread)| (name, spread_json(spread)))),
        });
    }
    all
}

fn object(members: impl Iterator<Item = (&'static str, Value)>) -> Value {
    Value::Object(members.map(|(name, value)| (name.to_owned(), value)).collect::<Map<_, _>>())
}

fn spread_json(spread: Spread) -> Value {
    json!({ "median": number(spread.median), "min": number(spread.min), "max": number(spread.max) })
}

/// Whole numbers without a decimal point, others with one digit.
#[allow(clippy::cast_possible_truncation, reason = "counts of a demo are far below 2^53")]
fn number(value: Option<f64>) -> Value {
    match value {
        Some(value) if value.fract() == 0.0 => json!(value as i64),
        Some(value) => json!((value * 10.0).round() / 10.0),
        None => Value::Null,
    }
}

#[allow(clippy::cast_precision_loss, reason = "counts of a demo are far below 2^53")]
fn count(count: usize) -> f64 {
    count as f64
}

pub(crate) fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 10_000.0).round() / 10.0
}
