//! The texts of errors, as the page of errors has them.

use std::fmt::Display;

const PAGE: &str = include_str!("../../../docs/errors.md");

/// Compares an error with its row in the table "What they say", in which `…` stands for anything.
pub(crate) fn says(error: &impl Display, row: &str) {
    let (_, section) = PAGE.split_once("\n## What they say\n").expect("the section is there");
    let start = format!("| `{row}` | ");
    let line = section.lines().find_map(|line| line.strip_prefix(&start)?.strip_suffix(" |"));
    let pattern = line.unwrap_or_else(|| panic!("no row for {row}")).trim_matches('`').trim();
    let text = error.to_string();
    println!("{row}: {text}");
    assert!(is(&text, pattern), "{row} says\n{text}\nand docs/errors.md has\n{pattern}");
}

fn is(text: &str, pattern: &str) -> bool {
    let mut pieces = pattern.split('…');
    let first = pieces.next().unwrap();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let mut last = first;
    for piece in pieces {
        let Some(at) = rest.find(piece) else { return false };
        rest = &rest[at + piece.len()..];
        last = piece;
    }
    rest.is_empty() || last.is_empty() && pattern.contains('…')
}
