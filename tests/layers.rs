//! Dependencies run one way: the edges between the modules of the crate are these and no others.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

#[path = "layers/files.rs"]
mod files;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Small helpers that know nothing of PostgreSQL. Every module may name them, and they name no module.
const HELPERS: [&str; 3] = ["random", "simulation", "sync"];

/// Which module may name which; a module may always name itself and the [`HELPERS`]. A module without a row is at level
/// 0 and names no other.
const ALLOWED: [(&str, &[&str]); 11] = [
    ("commit", &["topology"]),
    ("connect", &["topology"]),
    ("server", &["classify", "connect", "topology"]),
    ("settle", &["classify", "commit", "server", "topology"]),
    ("observe", &["classify", "commit", "server", "topology"]),
    ("cluster", &["observe", "resolve", "server", "topology"]),
    ("error", &["classify", "cluster", "commit", "resolve", "topology"]),
    ("retry", &["error"]),
    (
        "pool",
        &[
            "classify", "cluster", "commit", "connect", "error", "observe", "resolve", "retry", "server", "settle",
            "tls", "topology",
        ],
    ),
    ("listen", &["classify", "error", "pool", "retry", "server", "topology"]),
    ("transaction", &["classify", "commit", "error", "observe", "pool", "retry", "server", "settle", "topology"]),
];

/// Lower levels first. An edge of [`ALLOWED`] that points upwards is a mistake in the table.
const LEVELS: [&str; 20] = [
    "random",
    "simulation",
    "sync",
    "classify",
    "fly",
    "resolve",
    "topology",
    "commit",
    "connect",
    "server",
    "settle",
    "tls",
    "observe",
    "cluster",
    "error",
    "retry",
    "pool",
    "listen",
    "transaction",
    "docs",
];

type Edges = BTreeSet<(String, String)>;

#[test]
fn the_modules_depend_on_lower_levels_only() {
    let level = |module: &str| LEVELS.iter().position(|known| *known == module).expect("every module has a level");
    for (from, to) in ALLOWED.iter().flat_map(|(from, targets)| targets.iter().map(move |to| (from, to))) {
        assert!(level(to) < level(from), "{from} -> {to} points upwards");
    }
    let found = edges_of_the_crate();
    let forbidden: Vec<_> = found.iter().filter(|(from, to)| !allowed(from, to)).collect();
    assert!(forbidden.is_empty(), "edges that the design does not have: {forbidden:?}");
    let unused: Vec<_> = ALLOWED
        .iter()
        .flat_map(|(from, targets)| targets.iter().map(|to| ((*from).to_owned(), (*to).to_owned())))
        .filter(|edge| !found.contains(edge))
        .collect();
    assert!(unused.is_empty(), "edges that nobody needs any more: {unused:?}");
}

#[test]
fn every_module_is_in_the_list() {
    let modules: BTreeSet<String> = sources().into_keys().map(|path| module_of(&path)).collect();
    assert_eq!(modules, LEVELS.iter().map(|module| (*module).to_owned()).collect());
}

/// What decides does no I/O, waits for nothing, starts nothing and reads no clock.
#[test]
fn what_is_pure_stays_so() {
    const PURE: [&str; 4] = ["classify", "commit", "fly", "topology"];
    const IMPURE: [&str; 6] = ["await", "spawn", "Client", "Socket", "TcpStream", "File"];
    let pure = sources().into_iter().filter(|(path, _)| PURE.contains(&&*module_of(path)));
    let found: Vec<_> = pure
        .flat_map(|(path, source)| {
            let words = tokens(&code_of(&source));
            let reads_a_clock = words.windows(3).any(|it| it[0] == "Instant" && it[1] == "::" && it[2] == "now");
            let impure = words.into_iter().filter(|word| IMPURE.contains(&&**word));
            impure.chain(reads_a_clock.then(|| "Instant::now".to_owned())).map(move |word| (path.clone(), word))
        })
        .collect();
    assert!(found.is_empty(), "{found:?}");
    assert!(tokens(&code_of("async fn f(c: &Client) { c.get().await }")).iter().any(|word| word == "await"));
}

/// So that a file has one reason to change. Files of tests count, too.
#[test]
fn no_file_is_longer_than_five_hundred_lines() {
    let long: Vec<_> = all_sources().into_iter().map(|(path, source)| (path, source.lines().count())).collect();
    let long: Vec<_> = long.into_iter().filter(|(_, lines)| *lines > 500).collect();
    assert!(long.is_empty(), "{long:?}");
}

/// rustfmt keeps code within this limit, but not comments and strings.
#[test]
fn no_line_is_longer_than_120_characters() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut long = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() && name != "target" && !name.starts_with('.') {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let source = fs::read_to_string(&path).unwrap();
                let lines = source.lines().zip(1..).filter(|(line, _)| line.chars().count() > 120);
                let shown = path.strip_prefix(root).unwrap().display();
                long.extend(lines.map(|(line, number)| format!("{shown}:{number}: {line}")));
            }
        }
    }
    assert!(long.is_empty(), "{}", long.join("\n"));
}

#[test]
fn planted_edges_are_found() {
    let found = |source: &str| edges("retry", source).into_iter().map(|(_, to)| to).collect::<Vec<_>>();
    assert_eq!(found("use crate::pool::Pool;"), ["pool"]);
    assert_eq!(found("use crate :: pool :: Pool;"), ["pool"]);
    assert_eq!(found("use crate::{error::Error, pool::{Client, Pool}, self as root};"), ["error", "pool", "self"]);
    assert_eq!(found("fn f() { let _ = crate::server::open(); }"), ["server"]);
    assert_eq!(found("pub(crate) fn f(x: crate::pool::Client) {}"), ["pool"]);
    assert_eq!(found("use super::cluster::Cluster;"), ["cluster"], "`super` of a top-level module is the crate");
    assert_eq!(found("#[cfg(test)]\nmod tests;\nuse crate::pool::Pool;"), ["pool"]);
    assert_eq!(found("#[cfg(test)]\nuse crate::error::Error;\nuse crate::pool::Pool;"), ["pool"]);
    assert_eq!(
        found("const BRACE: char = '{'; #[cfg(test)] mod tests { fn f() { '}'; } } use crate::pool::P;"),
        ["pool"]
    );
    assert_eq!(found("fn f<'a>(x: &'a str) { crate::pool::f(x) }"), ["pool"]);
}

#[test]
fn what_is_no_edge_is_not_found() {
    for source in [
        "//! See crate::pool::Pool.",
        "/// [`Pool`](crate::pool::Pool)",
        "/* crate::pool /* nested */ crate::error */",
        r#"const TEXT: &str = "use crate::pool;\"crate::error";"#,
        "const TEXT: &str = r#\"use crate::pool; \"crate::error\"#;",
        "#[cfg(test)]\nmod tests { use crate::pool::Pool; fn f() { crate::error::g() } }",
        "pub(crate) fn retry() {}",
        "use crate::retry::RetryPolicy;",
        "mod inner { use super::cluster; }",
    ] {
        assert!(edges("retry", source).is_empty(), "{source}: {:?}", edges("retry", source));
    }
}

fn allowed(from: &str, to: &str) -> bool {
    let helps = HELPERS.contains(&to) && !HELPERS.contains(&from);
    helps || ALLOWED.iter().any(|(module, targets)| *module == from && targets.contains(&to))
}

fn edges_of_the_crate() -> Edges {
    sources().iter().flat_map(|(path, source)| edges_of_file(path, source)).collect()
}

fn edges_of_file(path: &Path, source: &str) -> Edges {
    let module = module_of(path);
    let mut edges = edges(&module, source);
    // In a file below the top level, `super` is a module of the same family.
    if path.components().count() > 1 {
        let nested = code_of(source);
        edges.retain(|(_, to)| paths(&nested, "crate").contains(to));
    }
    edges
}

/// `src/` without `lib.rs` and without files of tests, by path within `src/`.
fn sources() -> BTreeMap<PathBuf, String> {
    let mut sources = all_sources();
    sources.retain(|path, _| {
        let tests = path.components().any(|part| Path::new(part.as_os_str()).file_stem() == Some("tests".as_ref()));
        path != Path::new("lib.rs") && !tests
    });
    sources
}

/// All files of `src/`, by path within it.
fn all_sources() -> BTreeMap<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = BTreeMap::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.insert(path.strip_prefix(&root).unwrap().to_owned(), fs::read_to_string(&path).unwrap());
            }
        }
    }
    assert!(found.len() > 5, "the sources were not found");
    found
}

/// `pool/builder.rs` and `pool.rs` are `pool`.
fn module_of(path: &Path) -> String {
    let first = path.components().next().unwrap();
    Path::new(first.as_os_str()).file_stem().unwrap().to_str().unwrap().to_owned()
}

/// What a top-level module names of the crate, itself left out.
fn edges(module: &str, source: &str) -> Edges {
    let code = code_of(source);
    let mut targets = paths(&code, "crate");
    targets.extend(paths(&top_level(&code), "super"));
    targets.into_iter().filter(|to| to != module).map(|to| (module.to_owned(), to)).collect()
}

/// The first words after `root::`, also of a group in braces.
fn paths(code: &str, root: &str) -> BTreeSet<String> {
    let tokens = tokens(code);
    let mut found = BTreeSet::new();
    for (at, token) in tokens.iter().enumerate() {
        let within_a_path = at > 0 && tokens[at - 1] == "::";
        if token != root || within_a_path || tokens.get(at + 1).is_none_or(|next| next != "::") {
            continue;
        }
        let Some(next) = tokens.get(at + 2) else { continue };
        if next != "{" {
            found.insert(next.clone());
            continue;
        }
        let (mut depth, mut expects) = (0, true);
        for token in &tokens[at + 2..] {
            match token.as_str() {
                "{" => depth += 1,
                "}" => depth -= 1,
                "," if depth == 1 => expects = true,
                word if depth == 1 && expects => {
                    found.insert(word.to_owned());
                    expects = false;
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
    }
    found
}

/// Words, `::` and single characters.
fn tokens(code: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = code.chars().peekable();
    while let Some(character) = rest.next() {
        if character.is_alphanumeric() || character == '_' {
            let mut word = String::from(character);
            while let Some(next) = rest.next_if(|next| next.is_alphanumeric() || *next == '_') {
                word.push(next);
            }
            tokens.push(word);
        } else if character == ':' && rest.next_if_eq(&':').is_some() {
            tokens.push("::".to_owned());
        } else if !character.is_whitespace() {
            tokens.push(character.to_string());
        }
    }
    tokens
}

/// The source without comments, the insides of literals, and what is compiled for tests alone.
fn code_of(source: &str) -> String {
    without_tests(&without_comments_and_literals(source))
}

fn without_comments_and_literals(source: &str) -> String {
    let mut code = String::new();
    let mut rest = source;
    while let Some(character) = rest.chars().next() {
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if let Some(length) = raw_string(rest) {
            length
        } else if character == '"' {
            string(rest)
        } else if character == '\'' {
            character_literal(rest)
        } else {
            0
        };
        if skipped > 0 {
            code.push(' ');
            rest = &rest[skipped..];
        } else {
            code.push(character);
            rest = &rest[character.len_utf8()..];
        }
    }
    code
}

fn block_comment(text: &str) -> usize {
    let (mut depth, mut at) = (0_u32, 0);
    while at < text.len() {
        if text[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if text[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

fn raw_string(text: &str) -> Option<usize> {
    let hashes = text.strip_prefix('r')?;
    let count = hashes.chars().take_while(|character| *character == '#').count();
    let body = hashes[count..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(count));
    let length = body.find(&end).map_or(body.len(), |at| at + end.len());
    Some(1 + count + 1 + length)
}

fn string(text: &str) -> usize {
    let mut escaped = false;
    for (at, character) in text.char_indices().skip(1) {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// The length of a literal such as `'{'` or `'\n'`; of a lifetime, only its apostrophe.
fn character_literal(text: &str) -> usize {
    let mut characters = text.char_indices().skip(1);
    match characters.next() {
        Some((_, '\\')) => text[3..].find('\'').map_or(1, |at| at + 4),
        Some(_) => match characters.next() {
            Some((at, '\'')) => at + 1,
            _ => 1,
        },
        None => 1,
    }
}

/// Leaves out each item behind `#[cfg(test)]`: up to its `;`, or its body in braces.
fn without_tests(code: &str) -> String {
    let mut kept = String::new();
    let mut rest = code;
    while let Some(at) = rest.find("#[cfg(test)]") {
        kept.push_str(&rest[..at]);
        rest = &rest[at..];
        let mut depth = 0_u32;
        let end = rest.char_indices().find(|(_, character)| {
            match character {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            depth == 0 && matches!(character, ';' | '}')
        });
        rest = end.map_or("", |(at, _)| &rest[at + 1..]);
    }
    kept + rest
}

/// Without the bodies of inline modules, where `super` is something else.
fn top_level(code: &str) -> String {
    let mut kept = String::new();
    let mut rest = code;
    while let Some(at) = rest.find("mod ") {
        let word_begins =
            rest[..at].chars().next_back().is_none_or(|before| !before.is_alphanumeric() && before != '_');
        let body = rest[at..].find([';', '{']).map(|end| at + end);
        let Some(body) = body.filter(|body| word_begins && rest[*body..].starts_with('{')) else {
            kept.push_str(&rest[..at + 4]);
            rest = &rest[at + 4..];
            continue;
        };
        kept.push_str(&rest[..at]);
        let mut depth = 0_u32;
        let end = rest[body..].char_indices().find(|(_, character)| {
            match character {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            depth == 0
        });
        rest = end.map_or("", |(end, _)| &rest[body + end + 1..]);
    }
    kept + rest
}
