//! Was every answer true? Compares what clients were told with what is stored in the end. Pure.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Mutex, MutexGuard};

use crate::sync::lock;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Answer {
    Acknowledged,
    Refused,
    Unknown,
}

/// The answers that the writes of a run got, each write known by an id that it stores as a row.
#[derive(Debug)]
pub struct History<Id = i64> {
    answers: Mutex<BTreeMap<Id, Answer>>,
}

/// What [`History::check`] found.
#[derive(Clone, PartialEq, Eq, Debug)]
#[must_use]
pub struct Verdict<Id = i64> {
    /// How many writes were acknowledged.
    pub acknowledged: usize,
    /// Acknowledged and not stored.
    pub lost: Vec<Id>,
    /// Stored more than once, whatever the answer was.
    pub doubled: Vec<Id>,
    /// Stored though the answer was a definite "not committed".
    pub untrue: Vec<Id>,
    /// How many writes of unknown outcome are stored.
    pub unknown_stored: usize,
    /// Stored, and no answer is on record: the writer was dropped before it had one.
    pub unanswered: Vec<Id>,
}

impl<Id> Default for History<Id> {
    fn default() -> Self {
        Self { answers: Mutex::new(BTreeMap::new()) }
    }
}

impl<Id: Ord + Clone + Debug> History<Id> {
    /// An empty history.
    pub fn new() -> Self {
        Self::default()
    }

    /// The write was answered with success.
    pub fn acknowledged(&self, id: Id) {
        self.record(id, Answer::Acknowledged);
    }

    /// The write was answered with an error that means "not committed".
    pub fn refused(&self, id: Id) {
        self.record(id, Answer::Refused);
    }

    /// The write was answered with "it may have been committed".
    pub fn unknown(&self, id: Id) {
        self.record(id, Answer::Unknown);
    }

    fn record(&self, id: Id, answer: Answer) {
        let shown = format!("{id:?}");
        if let Some(before) = self.answers().insert(id, answer) {
            panic!("{shown} was {before:?} and is now {answer:?}: an id stands for one write");
        }
    }

    fn answers(&self) -> MutexGuard<'_, BTreeMap<Id, Answer>> {
        lock(&self.answers)
    }

    /// Compares with the rows read back: each id with how often it is there.
    pub fn check(&self, rows: &[(Id, i64)]) -> Verdict<Id> {
        let mut stored: BTreeMap<&Id, i64> = BTreeMap::new();
        for (id, count) in rows.iter().filter(|(_, count)| *count > 0) {
            *stored.entry(id).or_default() += count;
        }
        let answers = self.answers();
        let of = |wanted: Answer| answers.iter().filter(move |(_, answer)| **answer == wanted).map(|(id, _)| id);
        let pick = |ids: &mut dyn Iterator<Item = &Id>| ids.cloned().collect::<Vec<_>>();
        Verdict {
            acknowledged: of(Answer::Acknowledged).count(),
            lost: pick(&mut of(Answer::Acknowledged).filter(|id| !stored.contains_key(id))),
            doubled: stored.iter().filter(|(_, count)| **count > 1).map(|(id, _)| (*id).clone()).collect(),
            untrue: pick(&mut of(Answer::Refused).filter(|id| stored.contains_key(id))),
            unknown_stored: of(Answer::Unknown).filter(|id| stored.contains_key(id)).count(),
            unanswered: stored.keys().filter(|id| !answers.contains_key(**id)).map(|id| (*id).clone()).collect(),
        }
    }
}

impl<Id> Verdict<Id> {
    /// Nothing acknowledged was lost, nothing is there twice, and no "not committed" was a lie.
    pub fn is_true(&self) -> bool {
        self.lost.is_empty() && self.doubled.is_empty() && self.untrue.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_to_go_wrong_is_named() {
        let history = History::new();
        for id in [1, 2, 3] {
            history.acknowledged(id);
        }
        for id in [4, 5] {
            history.refused(id);
        }
        for id in [6, 7, 8] {
            history.unknown(id);
        }
        let verdict = history.check(&[(1, 1), (3, 2), (5, 1), (6, 1), (8, 2), (9, 1)]);
        let expected = Verdict {
            acknowledged: 3,
            lost: vec![2],
            doubled: vec![3, 8],
            untrue: vec![5],
            unknown_stored: 2,
            unanswered: vec![9],
        };
        assert_eq!(verdict, expected);
        assert!(!verdict.is_true());
    }

    #[test]
    fn unknown_writes_may_be_there_or_not() {
        let history = History::new();
        history.acknowledged("a");
        history.refused("b");
        history.unknown("c");
        history.unknown("d");
        let verdict = history.check(&[("a", 1), ("b", 0), ("c", 1)]);
        assert!(verdict.is_true(), "{verdict:?}");
        assert_eq!((verdict.acknowledged, verdict.unknown_stored), (1, 1));
    }

    #[test]
    #[should_panic(expected = "an id stands for one write")]
    fn one_write_has_one_answer() {
        let history = History::new();
        history.acknowledged(1);
        history.refused(1);
    }
}
