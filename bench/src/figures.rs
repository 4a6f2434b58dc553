//! What one peer came to in one failover. Pure.

use std::collections::HashMap;
use std::time::Duration;

use testbed::longest_gap;

use crate::event::Event;
use crate::fault::Timeline;

/// All figures of one failover.
#[derive(Clone, Debug, PartialEq)]
pub struct Figures {
    /// From the new primary's first direct write to the first acknowledgement of any worker. `None`: it never came.
    pub first_write: Option<f64>,
    /// The same, to the last worker's first acknowledgement.
    pub all_workers: Option<f64>,
    /// From the change of DNS to the first acknowledgement, where DNS moves.
    pub after_dns: Option<f64>,
    /// The longest time that any worker was without an acknowledgement.
    pub longest_gap: f64,
    /// Errors that reached the caller.
    pub errors: usize,
    /// Rows beyond one per id.
    pub duplicates: usize,
    /// Acknowledged and not stored.
    pub lost: usize,
    /// Workers that never wrote again while the harness waited.
    pub stuck: usize,
}

impl Figures {
    /// `stored`: each id in the table, and how often it is there. Times are milliseconds.
    pub fn new(timeline: &Timeline, events: &[Event], workers: usize, stored: &HashMap<String, i64>) -> Self {
        let acknowledged: Vec<&Event> = events.iter().filter(|event| event.outcome.is_ok()).collect();
        let of = |worker: usize| acknowledged.iter().filter(move |event| event.worker == worker);
        // No server takes writes between the failure and the order to promote. From then on the new one may have taken
        // one before the harness' own was answered: that is no time at all.
        let firsts: Vec<Option<u64>> = (0..workers)
            .map(|worker| of(worker).map(|event| event.micros).find(|micros| *micros >= timeline.ordered))
            .collect();
        let first = firsts.iter().flatten().min().copied();
        let last = firsts.iter().copied().collect::<Option<Vec<_>>>().and_then(|all| all.into_iter().max());
        let gap = |worker: usize| {
            let moments = of(worker).map(|event| Duration::from_micros(event.micros));
            longest_gap(Duration::from_micros(timeline.start), moments, Duration::from_micros(timeline.end))
        };
        Self {
            first_write: first.map(|first| since(timeline.accepted, first)),
            all_workers: last.map(|last| since(timeline.accepted, last)),
            after_dns: timeline.named.and_then(|named| first.map(|first| since(named, first))),
            longest_gap: (0..workers).map(gap).max().unwrap_or_default().as_secs_f64() * 1000.0,
            errors: events.len() - acknowledged.len(),
            duplicates: stored.values().map(|count| usize::try_from(count - 1).unwrap_or(0)).sum(),
            lost: acknowledged.iter().filter(|event| !stored.contains_key(&event.id)).count(),
            stuck: firsts.iter().filter(|first| first.is_none()).count(),
        }
    }

    /// Metric, unit and value.
    pub fn named(&self) -> Vec<(&'static str, &'static str, Option<f64>)> {
        let mut named = vec![
            ("first_write", "ms", self.first_write),
            ("all_workers", "ms", self.all_workers),
            ("longest_gap", "ms", Some(self.longest_gap)),
            ("errors", "count", Some(count(self.errors))),
            ("duplicates", "count", Some(count(self.duplicates))),
            ("lost", "count", Some(count(self.lost))),
            ("stuck", "count", Some(count(self.stuck))),
        ];
        named.extend(self.after_dns.map(|after| ("first_write_after_dns", "ms", Some(after))));
        named
    }
}

#[allow(clippy::cast_precision_loss, reason = "far below 2^53")]
fn since(begin: u64, end: u64) -> f64 {
    end.saturating_sub(begin) as f64 / 1000.0
}

#[allow(clippy::cast_precision_loss, reason = "far below 2^53")]
pub(crate) fn count(count: usize) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMELINE: Timeline =
        Timeline { start: 0, struck: 10_000, ordered: 20_000, accepted: 25_000, named: Some(30_000), end: 100_000 };

    fn ok(micros: u64, worker: usize, id: &str) -> Event {
        Event { micros, worker, id: id.to_owned(), outcome: Ok(()) }
    }

    fn err(micros: u64, worker: usize, id: &str) -> Event {
        Event { outcome: Err("gone".to_owned()), ..ok(micros, worker, id) }
    }

    fn stored(ids: &[(&str, i64)]) -> HashMap<String, i64> {
        ids.iter().map(|(id, count)| ((*id).to_owned(), *count)).collect()
    }

    #[test]
    fn each_figure_is_what_it_says() {
        let events = [
            ok(5_000, 0, "a"),
            // Answered late, but of the old primary: no recovery.
            ok(11_000, 1, "b"),
            err(12_000, 0, "c"),
            ok(31_000, 0, "c"),
            ok(45_000, 1, "d"),
            ok(90_000, 1, "e"),
        ];
        let stored = stored(&[("a", 1), ("b", 1), ("c", 2), ("e", 1), ("never acknowledged", 1)]);
        let figures = Figures::new(&TIMELINE, &events, 2, &stored);
        let expected = Figures {
            first_write: Some(6.0),
            all_workers: Some(20.0),
            after_dns: Some(1.0),
            longest_gap: 69.0,
            errors: 1,
            duplicates: 1,
            lost: 1,
            stuck: 0,
        };
        assert_eq!(figures, expected);
    }

    #[test]
    fn a_worker_that_never_writes_again_is_stuck() {
        let events = [ok(5_000, 0, "a"), ok(5_000, 1, "b"), ok(30_000, 0, "c")];
        let figures = Figures::new(&TIMELINE, &events, 2, &stored(&[("a", 1), ("b", 1), ("c", 1)]));
        assert_eq!((figures.stuck, figures.all_workers, figures.first_write), (1, None, Some(5.0)));
        assert!((figures.longest_gap - 95.0).abs() < 1e-9);
    }

    #[test]
    fn a_write_before_the_harness_saw_one_took_no_time() {
        let events = [ok(24_000, 0, "a")];
        assert_eq!(Figures::new(&TIMELINE, &events, 1, &stored(&[("a", 1)])).first_write, Some(0.0));
    }
}
