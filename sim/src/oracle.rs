//! What must be true. A violation is a fault of the crate, or of the model.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::log::Row;

/// How often the work of a call may be in the table at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expect {
    /// `Ok`: once. Asynchronous replication may lose it.
    Once,
    /// An error that says "not committed".
    Never,
    /// An outcome that is unknown, or a call that was dropped.
    AtMostOnce,
    /// `Ok` of idempotent work.
    AtLeastOnce,
    /// Idempotent work without an answer.
    Any,
}

#[derive(Clone, Copy, Debug)]
struct Call {
    expect: Expect,
    rows: usize,
}

#[derive(Debug, Default)]
pub(crate) struct Oracle {
    calls: BTreeMap<i64, Call>,
    /// The calls whose work had a commit record on some server.
    committed: BTreeSet<i64>,
    violations: Vec<String>,
    /// What the model could not answer.
    lacks: BTreeSet<String>,
    /// The newest timeline that the pool has published, and when.
    newest: Option<(u32, Instant)>,
    pub(crate) most_open: usize,
    pub(crate) connects: u64,
}

/// A statement may reach the old primary for so long after the pool has published a newer one: the network had it
/// meanwhile.
const JUST_BEFORE: Duration = Duration::from_secs(15);

impl Oracle {
    pub(crate) fn violation(&mut self, what: impl Into<String>) {
        self.violations.push(what.into());
    }

    pub(crate) fn model_lacks(&mut self, what: &str) {
        self.lacks.insert(what.chars().take(200).collect());
    }

    pub(crate) fn violations(&self) -> Vec<String> {
        let lacks = self.lacks.iter().map(|what| format!("the model does not know: {what}"));
        self.violations.iter().cloned().chain(lacks).collect()
    }

    pub(crate) fn committed(&mut self, rows: &[Row]) {
        self.committed.extend(rows.iter().map(|row| row.call));
    }

    /// Notes the end of a call that wrote so many rows in each of its attempts.
    pub(crate) fn answered(&mut self, call: i64, rows: usize, expect: Expect) {
        if matches!(expect, Expect::Once | Expect::AtLeastOnce) && !self.committed.contains(&call) {
            self.violation(format!("call {call} was answered `Ok`, and no server has ever committed it"));
        }
        self.calls.insert(call, Call { expect, rows });
    }

    pub(crate) fn published(&mut self, timeline: u32) {
        if self.newest.is_some_and(|(newest, _)| timeline < newest) {
            self.violation(format!("the pool went back to timeline {timeline}"));
        }
        if self.newest.is_none_or(|(newest, _)| timeline > newest) {
            self.newest = Some((timeline, Instant::now()));
        }
    }

    /// Work is done on this timeline, in a transaction that began at this time.
    pub(crate) fn work_on(&mut self, timeline: u32, begun_at: Instant) {
        if let Some((newest, since)) = self.newest
            && timeline < newest
            && begun_at > since + JUST_BEFORE
        {
            self.violation(format!("work began on timeline {timeline} long after the pool knew timeline {newest}"));
        }
    }

    pub(crate) fn connected(&mut self, open: usize) {
        self.connects += 1;
        self.most_open = self.most_open.max(open);
    }

    /// Compares the calls with the rows that are committed in the end. `may_lose`: replication is asynchronous. Returns
    /// how many calls were lost as it allows.
    pub(crate) fn judge(&mut self, rows: impl Iterator<Item = Row>, may_lose: bool) -> u64 {
        let mut applied: BTreeMap<i64, BTreeMap<i64, usize>> = BTreeMap::new();
        for row in rows {
            *applied.entry(row.call).or_default().entry(row.attempt).or_default() += 1;
        }
        let (mut lost, mut found) = (0, Vec::new());
        for (call, Call { expect, rows }) in &self.calls {
            let attempts = applied.get(call);
            let times = attempts.map_or(0, BTreeMap::len);
            if let Some((attempt, count)) = attempts.iter().flat_map(|it| it.iter()).find(|(_, count)| *count != rows) {
                found.push(format!("call {call}, attempt {attempt}: {count} rows of {rows} are there"));
            }
            let (least, most) = match expect {
                Expect::Once => (1, 1),
                Expect::Never => (0, 0),
                Expect::AtMostOnce => (0, 1),
                Expect::AtLeastOnce => (1, usize::MAX),
                Expect::Any => (0, usize::MAX),
            };
            if times < least && may_lose {
                lost += 1;
            } else if times < least {
                found.push(format!("call {call} is lost: it was answered `Ok`"));
            } else if times > most && *expect == Expect::Never {
                found.push(format!("call {call} is there {times} times: its error said that it never would be"));
            } else if times > most {
                found.push(format!("call {call} is there {times} times"));
            }
        }
        self.violations.extend(found);
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_doubled_untrue_or_halved_is_found() {
        let of = |expect, rows: &[(i64, i64)], may_lose| {
            let mut oracle = Oracle::default();
            oracle.committed(&[Row { call: 1, attempt: 1 }]);
            oracle.answered(1, 2, expect);
            oracle.judge(rows.iter().map(|(call, attempt)| Row { call: *call, attempt: *attempt }), may_lose);
            oracle.violations().len()
        };
        let (once, twice) = ([(1, 1), (1, 1)], [(1, 1), (1, 1), (1, 2), (1, 2)]);
        assert_eq!(of(Expect::Once, &once, false), 0);
        assert_eq!(of(Expect::Once, &[], false), 1);
        assert_eq!(of(Expect::Once, &[], true), 0);
        assert_eq!(of(Expect::Once, &twice, true), 1);
        assert_eq!(of(Expect::Never, &once, true), 1);
        assert_eq!(of(Expect::AtMostOnce, &twice, true), 1);
        assert_eq!(of(Expect::AtLeastOnce, &twice, false), 0);
        assert_eq!(of(Expect::Any, &[(1, 1)], false), 1, "half of a transaction");
    }
}
