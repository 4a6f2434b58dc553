//! Where the tests of a row ran, as the records in `tests/ran` say. Programs write these: `scripts/record.sh` the tests
//! of each server, and `make managers RECORD=1` the trials with failover managers.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

/// The major versions of PostgreSQL on which a test passed, by its name.
type Tests = BTreeMap<String, BTreeSet<u32>>;

/// The records.
pub(crate) struct Ran {
    tests: Tests,
    /// One line each: the server, what promotes, and the rows that it is an instance of.
    trials: Vec<(u32, String, BTreeSet<String>)>,
}

/// What `tests/ran/tests.txt` says: in each line a name, and versions.
fn tests(text: &str) -> Tests {
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    lines
        .map(|(name, versions)| {
            let versions = versions.split(' ').map(|version| version.parse().expect("a major version"));
            (name.to_owned(), versions.collect())
        })
        .collect()
}

/// What `tests/ran/managers.txt` says: name, rows, server, managers, rounds.
fn trials(text: &str) -> Vec<(u32, String, BTreeSet<String>)> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| match line.split(" | ").collect::<Vec<_>>()[..] {
            [_, rows, server, managers, _] => {
                let major = server.split('.').next().and_then(|major| major.parse().ok()).expect("a version");
                (major, managers.to_owned(), rows.split_whitespace().map(ToOwned::to_owned).collect())
            }
            _ => panic!("tests/ran/managers.txt: not five parts: {line}"),
        })
        .collect()
}

/// The page with these runs as its first table. Where none is recorded, the page stays as it is.
pub(crate) fn with_runs(page: &str, runs: &str) -> String {
    if runs.is_empty() {
        return page.to_owned();
    }
    let is_row = |line: &&str| line.starts_with('|');
    let before: Vec<_> = page.lines().take_while(|line| !is_row(line)).collect();
    let after: Vec<_> = page.lines().skip(before.len()).skip_while(is_row).collect();
    let mut text = before.join("\n")
        + "\n| server | suite | tests | result | time | commit | date |\n|---|---|---|---|---|---|---|\n";
    for run in runs.lines() {
        let _ = writeln!(text, "| {run} |");
    }
    text + &after.join("\n") + "\n"
}

/// "13–15, 18".
fn ranges(versions: &BTreeSet<u32>) -> String {
    let mut text = String::new();
    let mut left = versions.iter().copied().peekable();
    while let Some(first) = left.next() {
        let mut last = first;
        while let Some(next) = left.next_if_eq(&(last + 1)) {
            last = next;
        }
        let comma = if text.is_empty() { "" } else { ", " };
        let _ = if first == last { write!(text, "{comma}{first}") } else { write!(text, "{comma}{first}–{last}") };
    }
    text
}

impl Ran {
    pub(crate) fn read(root: &Path) -> Self {
        let read = |file: &str| fs::read_to_string(root.join("tests/ran").join(file)).unwrap_or_default();
        Self { tests: tests(&read("tests.txt")), trials: trials(&read("managers.txt")) }
    }

    /// The rows of the trials.
    pub(crate) fn rows(&self) -> BTreeSet<&str> {
        self.trials.iter().flat_map(|(_, _, rows)| rows).map(String::as_str).collect()
    }

    /// The cell of a row with these tests on real servers: on which versions of PostgreSQL, and who promoted.
    pub(crate) fn cell(&self, row: &str, on_servers: &[&str], others: usize) -> String {
        let mut parts: Vec<String> = self.on_versions(on_servers).into_iter().collect();
        let mut managers = BTreeMap::<u32, BTreeSet<&str>>::new();
        for (server, names, _) in self.trials.iter().filter(|(_, _, rows)| rows.contains(row)) {
            managers.entry(*server).or_default().extend(names.split(", "));
        }
        for (server, names) in managers {
            parts.push(format!("{server}: {}", names.into_iter().collect::<Vec<_>>().join(", ")));
        }
        match (parts.is_empty(), on_servers.is_empty() && others > 0) {
            (false, _) => parts.join("; "),
            (true, true) => "no server".to_owned(),
            (true, false) => "not recorded".to_owned(),
        }
    }

    /// The versions on which all of them passed, and those on which some did.
    fn on_versions(&self, names: &[&str]) -> Option<String> {
        let mut passed = BTreeMap::<u32, usize>::new();
        for version in names.iter().filter_map(|name| self.tests.get(*name)).flatten() {
            *passed.entry(*version).or_default() += 1;
        }
        let all = passed.iter().filter(|(_, count)| **count == names.len()).map(|(version, _)| *version).collect();
        let mut texts = Vec::from_iter(Some(ranges(&all)).filter(|text| !text.is_empty()));
        passed.retain(|_, count| *count < names.len());
        texts.extend(passed.iter().map(|(version, count)| format!("{version} ({count} of {} tests)", names.len())));
        (!texts.is_empty()).then(|| format!("{}: test bed", texts.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runs_take_the_place_of_the_first_table() {
        let page = "# Title\n\n| a |\n|---|\n| old |\n\nText.\n\n| b |\n";
        assert_eq!(with_runs(page, ""), page);
        let renewed = with_runs(page, "18.6 | it | all | 9 passed, 0 failed | 7 s | abc | 2026-01-01\n");
        let (before, after) = renewed.split_once("| server |").unwrap();
        assert_eq!(before, "# Title\n\n");
        assert!(
            after.ends_with("\n| 18.6 | it | all | 9 passed, 0 failed | 7 s | abc | 2026-01-01 |\n\nText.\n\n| b |\n")
        );
        assert_eq!(with_runs(&renewed, "18.6 | it | all | 9 passed, 0 failed | 7 s | abc | 2026-01-01\n"), renewed);
    }

    #[test]
    fn a_cell_says_what_the_records_say() {
        let ran = Ran {
            tests: tests("a::one 13 14 15 18\na::two 13 14 15 18\na::new 15\n"),
            trials: trials("# made up\nPatroni: kill | S1 M1 | 15.18 | Patroni 4.1.5, HAProxy 2.6.12 | 3\n"),
        };
        assert_eq!(ran.cell("S2", &["a::one", "a::two"], 1), "13–15, 18: test bed");
        assert_eq!(
            ran.cell("S1", &["a::one", "a::new"], 0),
            "15, 13 (1 of 2 tests), 14 (1 of 2 tests), 18 (1 of 2 tests): test bed; 15: HAProxy 2.6.12, Patroni 4.1.5"
        );
        assert_eq!(ran.cell("M1", &[], 0), "15: HAProxy 2.6.12, Patroni 4.1.5");
        assert_eq!(
            (ran.cell("H1", &[], 2), ran.cell("H2", &["a::three"], 0)),
            ("no server".into(), "not recorded".into())
        );
        assert_eq!(ran.rows(), BTreeSet::from(["M1", "S1"]));
    }
}
