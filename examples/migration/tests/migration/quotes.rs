//! The pages quote the compiler, so that a search finds them. `tests/refused` has a program for each quotation.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::read;

/// The package of the programs. What it depends on has the versions of this workspace.
const MANIFEST: &str = r#"[package]
name = "refused"
edition = "2024"

[dependencies]
anyhow = "1.0"
deadpool-postgres = "0.14"
tokio-postgres = "0.7"
tokio-postgres-failover = { path = "@" }

[workspace]
"#;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[test]
#[ignore = "it checks all that the crate depends on: `make test-long`"]
fn the_compiler_says_what_the_pages_quote() {
    let (said, quoted) = (said(), quoted());
    assert!(quoted.len() > 15, "{quoted:#?}");
    let strange: Vec<_> = quoted.iter().filter(|quote| !said.values().any(|text| has(text, quote))).collect();
    assert!(strange.is_empty(), "the compiler says none of {strange:#?}\nbut {said:#?}");
    let unknown: Vec<_> = said.iter().filter(|(_, text)| !quoted.iter().any(|quote| has(text, quote))).collect();
    assert!(unknown.is_empty(), "no page has what the compiler says of {unknown:#?}");
}

/// `…` stands for what differs from program to program.
fn has(text: &str, quote: &str) -> bool {
    text.lines().any(|line| quote.split('…').all(|part| line.contains(part)))
}

/// What the pages quote: pieces in two backticks, and the lines of blocks of text.
fn quoted() -> BTreeSet<String> {
    let part = |path: &str, from: &str, to: &str| {
        let page = read(&root().join("docs").join(path));
        let (_, part) = page.split_once(from).unwrap_or_else(|| panic!("{path} has no {from}"));
        part.split(to).next().unwrap_or_default().to_owned()
    };
    let table = part("from-deadpool.md", "\n| error | cure |\n", "\n\n");
    let section = part("recipes.md", "\n## Closures that the compiler refuses\n", "\n## ");
    let blocks = section.split("\n```text\n").skip(1).filter_map(|block| block.split("\n```").next());
    let lines = blocks.flat_map(str::lines).map(|line| {
        line.split_once(": ").map_or(line, |(error, text)| if error.starts_with("error") { text } else { line })
    });
    let prose = section.replace("\n```", "\n").replace('\n', " ");
    let pieces = [&table, &prose].into_iter().flat_map(|text| text.split("``").skip(1).step_by(2).collect::<Vec<_>>());
    lines.map(str::trim).chain(pieces.map(str::trim)).map(str::to_owned).collect()
}

/// What the compiler says of each program.
fn said() -> BTreeMap<String, String> {
    let package = Path::new(env!("CARGO_TARGET_TMPDIR")).join("refused");
    let programs = package.join("examples");
    let _ = fs::remove_dir_all(&programs);
    fs::create_dir_all(&programs).unwrap();
    fs::create_dir_all(package.join("src")).unwrap();
    fs::write(package.join("src/lib.rs"), "").unwrap();
    let root = root().canonicalize().unwrap();
    fs::write(package.join("Cargo.toml"), MANIFEST.replace('@', root.to_str().unwrap())).unwrap();
    fs::copy(root.join("Cargo.lock"), package.join("Cargo.lock")).unwrap();
    let mut said = BTreeMap::new();
    for program in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/refused")).unwrap() {
        let program = program.unwrap().path();
        fs::write(programs.join(program.file_name().unwrap()), read(&program) + "\nfn main() {}\n").unwrap();
        said.insert(program.file_stem().unwrap().to_str().unwrap().to_owned(), String::new());
    }
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["check", "--examples", "--keep-going", "--offline", "--message-format=json"]).current_dir(&package);
    let output = cargo.env("CARGO_TARGET_DIR", package.join("target")).output().unwrap();
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        let Ok(reported) = serde_json::from_str::<Value>(line) else { continue };
        if reported["message"]["level"] == "error" {
            said.get_mut(reported["target"]["name"].as_str().unwrap()).unwrap().push_str(&words(&reported["message"]));
        }
    }
    let silent: Vec<_> = said.iter().filter(|(_, text)| text.is_empty()).collect();
    assert!(silent.is_empty(), "the compiler accepts {silent:?}\n{}", String::from_utf8_lossy(&output.stderr));
    said
}

/// An error with its labels and notes, a line for each.
fn words(message: &Value) -> String {
    let labels = message["spans"].as_array().unwrap().iter().filter_map(|span| span["label"].as_str());
    let notes = message["children"].as_array().unwrap().iter().filter_map(|note| note["message"].as_str());
    let all = message["message"].as_str().into_iter().chain(labels).chain(notes);
    all.flat_map(str::lines).flat_map(|line| [line.trim(), "\n"]).collect()
}
