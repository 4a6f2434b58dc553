//! What has happened: in plain words for one seed, and in numbers for all.

use std::collections::BTreeMap;
use std::time::Duration;

/// How often each thing was seen, by its group and name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts(BTreeMap<(&'static str, String), u64>);

impl Counts {
    pub(crate) fn note(&mut self, group: &'static str, name: impl Into<String>) {
        *self.0.entry((group, name.into())).or_default() += 1;
    }

    #[cfg(failover_sim)]
    pub(crate) fn note_many(&mut self, group: &'static str, name: String, times: u64) {
        *self.0.entry((group, name)).or_default() += times;
    }

    pub(crate) fn of(&self, group: &str, name: &str) -> u64 {
        self.0.iter().filter(|((its, own), _)| *its == group && own == name).map(|(_, count)| *count).sum()
    }

    pub(crate) fn add(&mut self, others: &Self) {
        for (key, count) in &others.0 {
            *self.0.entry(key.clone()).or_default() += count;
        }
    }

    /// The names of a group that were seen.
    pub(crate) fn names<'a>(&'a self, group: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.keys().filter(move |(its, _)| *its == group).map(|(_, name)| name.as_str())
    }

    /// One line for each group.
    pub(crate) fn lines(&self) -> Vec<String> {
        let mut groups: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for ((group, name), count) in &self.0 {
            groups.entry(group).or_default().push(format!("{name} {count}"));
        }
        groups.into_iter().map(|(group, entries)| format!("{group}: {}", entries.join(", "))).collect()
    }
}

/// The story of one simulation.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    lines: Option<Vec<String>>,
}

impl Trace {
    /// `kept`: the lines are wanted. Without that, a line is not even made.
    pub(crate) fn new(kept: bool) -> Self {
        Self { lines: kept.then(Vec::new) }
    }

    pub(crate) fn say(&mut self, at: Duration, line: impl FnOnce() -> String) {
        if let Some(lines) = &mut self.lines {
            lines.push(format!("{:>9.3} s  {}", at.as_secs_f64(), line()));
        }
    }

    pub(crate) fn take(&mut self) -> Vec<String> {
        self.lines.take().unwrap_or_default()
    }
}
