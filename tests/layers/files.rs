//! Which file of `src/` names which other one.
//!
//! A path is followed through re-exports to the file that has the named item. Methods are not seen: an `impl Topology`
//! in one file may call those in another.

use std::collections::{BTreeMap, BTreeSet};
use std::iter::Peekable;
use std::path::Path;
use std::vec::IntoIter;

use super::{HELPERS, code_of, sources, tokens};

/// A file by the path of its module: `pool/builder.rs` is `["pool", "builder"]`.
type Name = Vec<String>;

/// The modules whose files decide, and do no I/O.
const LEVEL_0: [&str; 6] = ["classify", "commit", "connect", "fly", "resolve", "topology"];
/// The files of these modules that do I/O nevertheless, with the modules below them.
const ABOVE: [&[&str]; 1] = [&["resolve", "hickory"]];

#[test]
fn a_file_of_level_0_names_no_file_above() {
    let files = Files::of_the_crate();
    let lowest = |file: &Name| {
        let above = ABOVE.iter().any(|above| file.len() >= above.len() && file.iter().zip(*above).all(|(a, b)| a == b));
        !above && file.first().is_some_and(|top| LEVEL_0.contains(&&**top) || HELPERS.contains(&&**top))
    };
    let edges = files.edges();
    let upwards: Vec<_> = edges.iter().filter(|(from, to)| lowest(from) && !lowest(to) && !related(from, to)).collect();
    assert!(upwards.is_empty(), "{upwards:?}");
}

#[test]
fn no_two_files_name_each_other() {
    let edges = Files::of_the_crate().edges();
    let found = circles(&edges);
    assert!(found.is_empty(), "files that name each other, and are not parent and child: {found:?}");
}

#[test]
fn planted_circles_are_found() {
    let files = |sources: &[(&str, &str)]| {
        let file = |(path, source): &(&str, &str)| (name(Path::new(path)), File::new(source));
        circles(&Files(sources.iter().map(file).collect()).edges()).len()
    };
    let parent = ("pool.rs", "mod client; mod facts; pub(crate) use client::Client;");
    assert_eq!(files(&[parent, ("pool/client.rs", "use super::facts::Facts;"), ("pool/facts.rs", "")]), 0);
    for facts in ["use super::Client;", "use super::client::Client;", "use crate::pool::{self, Client};"] {
        assert_eq!(files(&[parent, ("pool/client.rs", "use super::facts::Facts;"), ("pool/facts.rs", facts)]), 1);
    }
    let inline = "fn f() { super::facts::g() }";
    assert_eq!(files(&[parent, ("pool/client.rs", inline), ("pool/facts.rs", "use super::{Client as C};")]), 1);
    assert_eq!(files(&[parent, ("pool/client.rs", "use super::Pool;"), ("pool/facts.rs", "")]), 0, "parent and child");
}

/// The pairs of files that name each other, without parents and children.
fn circles(edges: &BTreeSet<(Name, Name)>) -> Vec<&(Name, Name)> {
    let both = |from: &Name, to: &Name| edges.contains(&(to.clone(), from.clone()));
    edges.iter().filter(|(from, to)| from < to && !related(from, to) && both(from, to)).collect()
}

fn related(one: &[String], other: &[String]) -> bool {
    one.starts_with(other) || other.starts_with(one)
}

fn name(path: &Path) -> Name {
    path.with_extension("").iter().map(|part| part.to_str().unwrap().to_owned()).collect()
}

/// What a file names.
#[derive(Default)]
struct File {
    /// The path of each name that a `use` brings in.
    imports: BTreeMap<String, Name>,
    /// Every path, those of imports included.
    paths: Vec<Name>,
}

impl File {
    fn new(source: &str) -> Self {
        let mut file = Self::default();
        let mut rest = tokens(&code_of(source)).into_iter().peekable();
        let mut previous = String::new();
        while let Some(token) = rest.next() {
            if token == "use" {
                file.import(&mut rest, &[]);
                continue;
            }
            let begins = previous != "::" && is_word(&token) && rest.peek().is_some_and(|next| next == "::");
            previous.clone_from(&token);
            if !begins {
                continue;
            }
            let mut path = vec![token];
            while rest.next_if(|next| next == "::").is_some()
                && let Some(word) = rest.next_if(|next| is_word(next))
            {
                path.push(word);
            }
            file.paths.push(path);
        }
        file
    }

    /// Reads what follows a `use`, or what follows a `::` or a brace in it.
    fn import(&mut self, rest: &mut Peekable<IntoIter<String>>, before: &[String]) {
        let mut path = before.to_vec();
        while let Some(token) = rest.next() {
            if token == "{" {
                while rest.peek().is_some_and(|next| next != "}") {
                    self.import(rest, &path);
                    let _ = rest.next_if(|next| next == ",");
                }
                rest.next();
                return;
            }
            if token != "self" || path.is_empty() {
                path.push(token);
            }
            if rest.next_if(|next| next == "::").is_none() {
                break;
            }
        }
        let renamed = rest.next_if(|next| next == "as").and_then(|_| rest.next());
        if let Some(name) = renamed.or_else(|| path.last().cloned()) {
            self.imports.insert(name, path.clone());
        }
        self.paths.push(path);
    }
}

fn is_word(token: &str) -> bool {
    token.starts_with(|first: char| first.is_alphabetic() || first == '_')
}

struct Files(BTreeMap<Name, File>);

impl Files {
    fn of_the_crate() -> Self {
        Self(sources().iter().map(|(path, source)| (name(path), File::new(source))).collect())
    }

    fn edges(&self) -> BTreeSet<(Name, Name)> {
        let of = |(from, file): (&Name, &File)| {
            let targets = file.paths.iter().filter_map(|path| self.file_of(from, path, 0));
            targets.filter(|to| to != from).map(|to| (from.clone(), to)).collect::<Vec<_>>()
        };
        self.0.iter().flat_map(of).collect()
    }

    /// The file that has what `path` means in the file `from`.
    fn file_of(&self, from: &[String], path: &[String], depth: u32) -> Option<Name> {
        let child = |of: &[String], word: &String| [of, std::slice::from_ref(word)].concat();
        let (mut at, mut path) = match path.first()?.as_str() {
            "crate" => (Name::new(), &path[1..]),
            "self" => (from.to_vec(), &path[1..]),
            "super" => {
                let up = path.iter().take_while(|word| *word == "super").count();
                (from[..from.len().checked_sub(up)?].to_vec(), &path[up..])
            }
            _ if self.0.contains_key(&child(from, path.first()?)) => (from.to_vec(), path),
            _ => return None,
        };
        while let Some(word) = path.first()
            && self.0.contains_key(&child(&at, word))
        {
            at = child(&at, word);
            path = &path[1..];
        }
        let imported = path.first().and_then(|word| self.0.get(&at)?.imports.get(word)).filter(|_| depth < 8);
        let origin = imported.and_then(|import| self.file_of(&at, import, depth + 1));
        origin.or_else(|| self.0.contains_key(&at).then_some(at))
    }
}
