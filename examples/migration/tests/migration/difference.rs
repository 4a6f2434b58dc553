//! The page shows the difference between the two shops. `RENEW=1` renews it.

use std::fs;

use super::{page, read, source};

/// What is between these is the difference.
const BLOCK: (&str, &str) = ("\n```diff\n", "\n```\n");

#[test]
fn the_page_shows_the_difference() {
    let difference = difference(&source("before.rs"), &source("after.rs"));
    let text = read(&page());
    let (before, rest) = text.split_once(BLOCK.0).expect("the page shows a difference");
    let (shown, after) = rest.split_once(BLOCK.1).expect("the difference ends");
    if std::env::var_os("RENEW").is_some() {
        fs::write(page(), [before, BLOCK.0, &difference, BLOCK.1, after].concat()).unwrap();
        return;
    }
    assert!(shown == difference, "`RENEW=1 cargo test -p failover-migration difference` renews the page");
}

/// The lines that differ by more than their indentation, as `diff` shows them.
fn difference(before: &str, after: &str) -> String {
    let (old, new): (Vec<&str>, Vec<&str>) = (before.lines().collect(), after.lines().collect());
    let mut common = vec![vec![0_usize; new.len() + 1]; old.len() + 1];
    for (i, gone) in old.iter().enumerate().rev() {
        for (j, come) in new.iter().enumerate().rev() {
            common[i][j] = if gone.trim() == come.trim() {
                common[i + 1][j + 1] + 1
            } else {
                common[i + 1][j].max(common[i][j + 1])
            };
        }
    }
    let (mut i, mut j, mut lines) = (0, 0, Vec::new());
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i].trim() == new[j].trim() {
            // Between two places that differ, one line stands for all that is the same.
            if lines.last().is_some_and(|line| line != " …") {
                lines.push(" …".to_owned());
            }
            (i, j) = (i + 1, j + 1);
        } else if i < old.len() && (j == new.len() || common[i + 1][j] >= common[i][j + 1]) {
            lines.push(format!("-{}", old[i]));
            i += 1;
        } else {
            lines.push(format!("+{}", new[j]));
            j += 1;
        }
    }
    lines.pop_if(|line| line == " …");
    lines.join("\n")
}

#[test]
fn differences_are_found() {
    assert_eq!(difference("a\nb\nc\nd", "a\n  b\nx\nd\ne"), "-c\n+x\n …\n+e");
}
