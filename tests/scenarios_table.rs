//! `docs/scenarios.md` names every row of the list once, and only tests that exist. Its column "ran on" says what the
//! records in `tests/ran` say: `RENEW=1 cargo test --test scenarios_table` renews it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

#[path = "scenarios/ran.rs"]
mod ran;

use ran::Ran;

/// The list: a letter, and how many rows it has. R4b comes on top.
const ROWS: [(char, u32); 8] = [('S', 16), ('R', 17), ('D', 10), ('C', 32), ('E', 10), ('K', 10), ('H', 5), ('M', 7)];
/// How a row without a test says why.
const REASON: &str = "Not built yet: ";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn table() -> String {
    fs::read_to_string(root().join("docs/scenarios.md")).unwrap()
}

/// Each row's number and its cell of tests.
fn rows(table: &str) -> Vec<(&str, &str)> {
    let cells = |line| str::split(line, '|').map(str::trim).collect::<Vec<_>>();
    let lines = table.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| row |"));
    lines
        .map(|line| match cells(line)[..] {
            ["", row, _, _, tests, _, ""] => (row, tests),
            _ => panic!("not five cells: {line}"),
        })
        .collect()
}

/// What stands in backquotes and is meant as a test.
fn names(tests: &str) -> Vec<&str> {
    let quoted = tests.split('`').skip(1).step_by(2);
    quoted.filter(|name| name.contains("::") || Path::new(name).extension().is_some_and(|end| end == "toml")).collect()
}

fn listed() -> BTreeSet<String> {
    let numbered = ROWS.iter().flat_map(|(letter, count)| (1..=*count).map(move |number| format!("{letter}{number}")));
    numbered.chain(["R4b".to_owned()]).collect()
}

/// Why `name` is no test that exists, if it is none.
fn missing(name: &str) -> Option<String> {
    if name.contains(".toml") {
        let path = root().join("tests").join(name);
        return (!path.is_file()).then(|| format!("there is no {}", path.display()));
    }
    place(name).is_none().then(|| format!("there is no test `{name}`"))
}

/// The folder in which this test is: those in `tests/it` need a server, those in `tests/managers` also managers.
fn place(name: &str) -> Option<&'static str> {
    let (module, function) = name.rsplit_once("::")?;
    let file = format!("{}.rs", module.replace("::", "/"));
    let found = |place: PathBuf| fs::read_to_string(place).is_ok_and(|source| has_test(&source, function));
    ["tests/it", "tests", "src"].into_iter().find(|folder| found(root().join(folder).join(&file)))
}

/// The table with the cells that the records say, and each row whose cell is another one.
fn with_records(table: &str, ran: &Ran) -> (String, Vec<String>) {
    let (mut text, mut changed) = (String::new(), Vec::new());
    let cells: BTreeMap<&str, String> = rows(table)
        .into_iter()
        .map(|(row, tests)| {
            let names = names(tests);
            let on_servers: Vec<_> =
                names.iter().copied().filter(|name| place(name).is_some_and(|it| it == "tests/it")).collect();
            (row, ran.cell(row, &on_servers, names.iter().filter(|name| !name.starts_with("managers::")).count()))
        })
        .collect();
    for line in table.lines() {
        let row = line
            .strip_prefix("| ")
            .and_then(|line| line.split_once(" |"))
            .and_then(|(row, _)| cells.get_key_value(row));
        let renewed = row.map(|(row, cell)| {
            let (kept, old) = line.trim_end_matches(" |").rsplit_once(" | ").expect("five cells");
            if old != cell {
                changed.push(format!("{row}: \"{old}\" is \"{cell}\" by the records"));
            }
            format!("{kept} | {cell} |")
        });
        text += renewed.as_deref().unwrap_or(line);
        text.push('\n');
    }
    (text, changed)
}

/// A function of this name, with an attribute above it that makes it a test.
fn has_test(source: &str, function: &str) -> bool {
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let declared = |line: &str| {
        let rest = line
            .strip_prefix("async ")
            .unwrap_or(line)
            .strip_prefix("fn ")
            .and_then(|line| line.strip_prefix(function));
        rest.is_some_and(|rest| rest.starts_with('('))
    };
    let is_test = |line: &&str| line.starts_with("#[test]") || line.starts_with("#[tokio::test");
    let at = lines.iter().position(|line| declared(line));
    at.is_some_and(|at| lines[..at].iter().rev().take_while(|line| line.starts_with("#[")).any(is_test))
}

#[test]
fn every_row_stands_in_the_table_once() {
    let table = table();
    let mut seen = BTreeMap::<&str, u32>::new();
    for (row, _) in rows(&table) {
        *seen.entry(row).or_default() += 1;
    }
    let twice: Vec<_> = seen.iter().filter(|(_, times)| **times > 1).collect();
    assert!(twice.is_empty(), "more than once: {twice:?}");
    assert_eq!(seen.into_keys().map(str::to_owned).collect::<BTreeSet<_>>(), listed());
}

#[test]
fn every_row_has_a_test_that_exists_or_a_reason() {
    let table = table();
    let mut problems = Vec::new();
    for (row, tests) in rows(&table) {
        let names = names(tests);
        if names.is_empty() && tests.strip_prefix(REASON).is_none_or(str::is_empty) {
            problems.push(format!("{row}: neither a test nor `{REASON}…`"));
        }
        problems.extend(names.into_iter().filter_map(missing).map(|problem| format!("{row}: {problem}")));
    }
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
}

/// `RENEW=1` writes the cells.
#[test]
fn every_row_says_on_what_it_ran() {
    let (table, ran) = (table(), Ran::read(root()));
    let listed = listed();
    let unknown: Vec<_> = ran.rows().into_iter().filter(|row| !listed.contains(*row)).collect();
    assert!(unknown.is_empty(), "tests/ran/managers.txt names rows that do not exist: {unknown:?}");
    let (text, changed) = with_records(&table, &ran);
    if std::env::var_os("RENEW").is_some() {
        fs::write(root().join("docs/scenarios.md"), text).unwrap();
        return;
    }
    assert!(changed.is_empty(), "RENEW=1 cargo test --test scenarios_table renews these:\n{}\n", changed.join("\n"));
}

/// The page of versions has the table of the runs: `RENEW=1` writes it.
#[test]
fn the_page_of_versions_says_what_was_run() {
    let path = root().join("docs/versions.md");
    let page = fs::read_to_string(&path).unwrap();
    let runs = fs::read_to_string(root().join("tests/ran/runs.txt")).unwrap_or_default();
    let renewed = ran::with_runs(&page, &runs);
    if std::env::var_os("RENEW").is_some() {
        fs::write(&path, renewed).unwrap();
        return;
    }
    assert!(page == renewed, "RENEW=1 cargo test --test scenarios_table renews docs/versions.md");
}

/// What a scenario file says that it covers is what the table says.
#[test]
fn every_scenario_file_stands_where_it_says() {
    let table = table();
    let rows: BTreeMap<&str, BTreeSet<&str>> =
        rows(&table).into_iter().map(|(row, tests)| (row, names(tests).into_iter().collect())).collect();
    let mut problems = Vec::new();
    for entry in fs::read_dir(root().join("tests/topology")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|end| end != "toml") {
            continue;
        }
        let name = format!("topology/{}", path.file_name().unwrap().to_str().unwrap());
        let file: toml::Table = fs::read_to_string(&path).unwrap().parse().unwrap();
        let covers: BTreeSet<&str> =
            file["covers"].as_array().unwrap().iter().map(|row| row.as_str().unwrap()).collect();
        let named = rows.iter().filter(|(_, tests)| tests.contains(name.as_str())).map(|(row, _)| *row).collect();
        if covers != named {
            problems.push(format!("{name} covers {covers:?}, and the table names it in {named:?}"));
        }
    }
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
}

#[test]
fn planted_mistakes_are_found() {
    assert!(missing("topology/promotion.toml").is_none());
    assert!(missing("topology/promtion.toml").is_some());
    assert!(missing("scenarios_table::planted_mistakes_are_found").is_none());
    assert!(missing("scenarios_table::missing").is_some(), "a function, and no test");
    assert!(missing("scenarios_table::planted").is_some(), "the beginning of a name is no name");
    assert_eq!(names("`a::b`, `dead_after`, `c/d.toml`. Text"), ["a::b", "c/d.toml"]);
}
