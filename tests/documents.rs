//! The pages of `docs/` are all in the documentation, their links lead somewhere, and the page of errors has every
//! variant.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The enums whose variants a caller meets, and the file that has each.
const ENUMS: [(&str, &str); 6] = [
    ("src/error/call.rs", "Error"),
    ("src/error/unavailable.rs", "UnavailableReason"),
    ("src/error/call/transaction.rs", "RolledBack"),
    ("src/error/build.rs", "BuildError"),
    ("src/commit.rs", "Unsettled"),
    ("src/topology/candidate.rs", "FailureKind"),
];

/// What the README shows, and the file of each.
const PICTURES: [(&str, &str); 2] = [("picture", "docs/failover.svg"), ("recovery", "docs/bench/recovery-dns-all.svg")];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every page, by its path from the root.
fn pages() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut folders = vec![root().join("docs")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "md") {
                found.insert(path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    found
}

/// Label and target of each definition, `[label]: target`.
fn definitions(text: &str) -> Vec<(&str, &str)> {
    text.lines().filter_map(|line| line.strip_prefix('[')?.split_once("]: ")).collect()
}

/// The text outside of code.
fn prose(text: &str) -> String {
    let mut code = false;
    let lines = text.lines().filter(|line| {
        code ^= line.starts_with("```");
        !code
    });
    lines.map(|line| line.split('`').step_by(2).collect::<String>() + "\n").collect()
}

/// The variants of `pub enum name`, as they stand in its source.
fn variants(source: &str, name: &str) -> Vec<String> {
    let (_, body) = source.split_once(&format!("pub enum {name} {{\n")).expect("the enum is there");
    let body = body.split("\n}").next().unwrap();
    let at_depth = body.lines().filter_map(|line| line.strip_prefix("    "));
    at_depth
        .filter(|line| line.starts_with(|first: char| first.is_ascii_uppercase()))
        .map(|line| line.chars().take_while(char::is_ascii_alphanumeric).collect())
        .collect()
}

/// The names in the first column of the table under the heading of `name`.
fn rows(page: &str, name: &str) -> Vec<String> {
    let (_, section) = page.split_once(&format!("\n## `{name}`\n")).unwrap_or_else(|| panic!("no section on {name}"));
    let section = section.split("\n## ").next().unwrap();
    let cells = section.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    cells.map(ToOwned::to_owned).collect()
}

#[test]
fn the_page_of_errors_has_every_variant_and_no_other() {
    let page = read("docs/errors.md");
    for (file, name) in ENUMS {
        let variants = variants(&read(file), name);
        assert!(variants.len() > 4, "{name}: {variants:?}");
        if name == "FailureKind" {
            let missing: Vec<_> = variants.iter().filter(|kind| !page.contains(&format!("`{kind}`"))).collect();
            assert!(missing.is_empty(), "docs/errors.md lacks {missing:?} of {name}");
        } else {
            assert_eq!(rows(&page, name), variants, "docs/errors.md has the variants of {name}, in their order");
        }
    }
}

#[test]
fn variants_are_found() {
    let source = "pub enum E {\n    /// No.\n    A,\n    #[error(\"B\")]\n    B(Box<C>),\n    D {\n        After: \
                  u8,\n    },\n}\n";
    assert_eq!(variants(source, "E"), ["A", "B", "D"]);
    assert_eq!(
        rows("\n## `E`\n\n| variant |\n|---|\n| `A` | x |\n| `B` | `C` |\n\n## `F`\n| `G` |\n", "E"),
        ["A", "B"]
    );
}

#[test]
fn every_page_is_in_the_documentation() {
    let module = read("src/docs.rs");
    let included: BTreeSet<String> = module
        .lines()
        .filter_map(|line| line.strip_prefix("#[doc = include_str!(\"../")?.strip_suffix("\")]"))
        .map(ToOwned::to_owned)
        .collect();
    assert_eq!(included, pages(), "src/docs.rs has each page of docs/");
    let pages_of_the_module = module.matches("\npub mod ").count();
    assert_eq!(pages_of_the_module, included.len());
    assert_eq!(module.matches("include_str!(\"docs/links.md\")").count(), pages_of_the_module);
}

/// For readers of the files and of the documentation alike.
#[test]
fn links_lead_somewhere() {
    let links = read("src/docs/links.md");
    let known = definitions(&links).into_iter().map(|(label, _)| label);
    let known: BTreeSet<&str> = known.chain(PICTURES.map(|(label, _)| label)).collect();
    for page in pages().into_iter().chain(["README.md".to_owned()]) {
        let text = read(&page);
        let folder = root().join(&page).parent().map(PathBuf::from).unwrap();
        for (label, target) in definitions(&text).into_iter().filter(|(_, target)| !target.contains("://")) {
            assert!(folder.join(target).is_file(), "{page}: [{label}] leads to {target}, which is not there");
            assert!(known.contains(label), "{page}: [{label}] is not in src/docs/links.md");
        }
        let prose = prose(&text);
        let inline = prose.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        let lost: Vec<&str> = inline.filter(|target| !target.contains("://") && !target.starts_with('#')).collect();
        let cure = "lead nowhere in the documentation; write [text][label], and name the label at the end";
        assert!(lost.is_empty(), "{page}: {lost:?} {cure}");
    }
}

/// The documentation has no files beside it, so the pictures are in its text. `make picture` and `make bench-docs`
/// renew it.
#[test]
fn the_pictures_in_the_documentation_are_those_in_the_readme() {
    let encoded = |(label, path): (&str, &str)| {
        read(path).bytes().fold(format!("[{label}]: data:image/svg+xml,"), |text, byte| {
            let plain = byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
            if plain { text + std::str::from_utf8(&[byte]).unwrap() } else { format!("{text}%{byte:02X}") }
        })
    };
    let encoded = PICTURES.map(encoded).join("\n");
    let path = root().join("src/docs/picture.md");
    if std::env::var_os("RENEW").is_some() {
        fs::write(&path, encoded + "\n\n").unwrap();
        return;
    }
    let current = fs::read_to_string(&path).is_ok_and(|text| text.trim_end() == encoded);
    assert!(current, "`RENEW=1 cargo test --test documents picture` renews {}", path.display());
}

/// Somebody copies the example: it encrypts, or the page says that it does not.
#[test]
fn a_page_about_servers_says_whether_its_examples_encrypt() {
    let operators = pages().into_iter().filter(|page| page.starts_with("docs/operators/"));
    let mut pages = 0;
    for page in operators {
        let text = read(&page);
        let strings = text.split("\"postgres://").skip(1).map(|rest| rest.split('"').next().unwrap());
        let plain: Vec<_> = strings.filter(|url| !url.contains("sslmode=") && !url.ends_with("?{encrypted}")).collect();
        let told = text.contains("The example does not encrypt: without `sslmode`");
        assert!(plain.is_empty() || told, "{page}: {plain:?} have no sslmode, and the page does not say so");
        assert!(text.contains("[TLS][tls]"), "{page}: where is TLS explained?");
        pages += 1;
    }
    assert!(pages >= 5, "{pages} pages");
}

#[test]
fn there_are_ten_recipes() {
    let numbered = |line: &str| line.strip_prefix("## ")?.split_once('.')?.0.parse::<usize>().ok();
    let recipes: Vec<usize> = read("docs/recipes.md").lines().filter_map(numbered).collect();
    assert_eq!(recipes, (1..=10).collect::<Vec<_>>());
}

/// The words of each line that `source` logs at `info` and above: the first text in the macro's arguments.
fn logged(source: &str) -> Vec<String> {
    let calls = ["tracing::info!(", "tracing::warn!(", "tracing::error!("];
    let bodies = calls.iter().flat_map(|call| source.split(call).skip(1));
    let texts = bodies.map(|body| body.split('"').nth(1).expect("a line has words"));
    // A text may go on in the next line of the source.
    texts.map(|text| text.replace("\\\n", " ").split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

/// The first column of the last table on the page of logs.
fn log_rows(page: &str) -> Vec<&str> {
    let (_, table) = page.split_once("\n## Every line\n").expect("the table is there");
    table.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect()
}

#[test]
fn the_page_of_logs_has_every_line() {
    let page = read("docs/logs.md");
    let rows = log_rows(&page);
    let mut folders = vec![root().join("src")];
    let mut lines = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                lines.extend(logged(&fs::read_to_string(path).unwrap()));
            }
        }
    }
    assert!(lines.len() > 20, "only {lines:#?}");
    let without: Vec<_> = lines.iter().filter(|line| !rows.iter().any(|row| line.contains(row.trim()))).collect();
    assert!(without.is_empty(), "docs/logs.md has no row for {without:#?}");
    let untrue: Vec<_> = rows.iter().filter(|row| !lines.iter().any(|line| line.contains(row.trim()))).collect();
    assert!(untrue.is_empty(), "docs/logs.md has rows that nothing logs: {untrue:#?}");
}
