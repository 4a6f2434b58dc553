//! What is packed for crates.io: all that the packages need and name, and nothing of the workspace. `make package`
//! builds and tests the packages themselves.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

const CRATE: &str = "tokio-postgres-failover";
const KIT: &str = "tokio-postgres-failover-testkit";

/// What the crate's package has beside its sources and pages.
const BESIDE: [&str; 9] = [
    "ARCHITECTURE.md",
    "BENCHMARKS.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
    "SECURITY.md",
    "examples/quickstart.rs",
    "sql/history.sql",
    "sql/ledger.sql",
];
const BESIDE_THE_KIT: [&str; 1] = ["README.md"];
/// What cargo adds to each package, and the licences.
const IN_EACH: [&str; 5] = [".cargo_vcs_info.json", "Cargo.lock", "Cargo.toml", "Cargo.toml.orig", "LICENSE-"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The files in the package, by their paths in it.
fn packed(package: &str) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .current_dir(root())
        .args(["package", "--list", "--allow-dirty", "--offline", "--package", package])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(ToOwned::to_owned).collect()
}

/// `a/b/../c` is `a/c`.
fn plain(path: &Path) -> String {
    let mut parts = PathBuf::new();
    for part in path.components() {
        if part == Component::ParentDir {
            parts.pop();
        } else {
            parts.push(part);
        }
    }
    parts.to_str().unwrap().to_owned()
}

fn is_a(path: &str, extension: &str) -> bool {
    Path::new(path).extension().is_some_and(|end| end == extension)
}

/// The files that the sources include as text.
fn included(folder: &Path, packed: &BTreeSet<String>) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for source in packed.iter().filter(|path| is_a(path, "rs")) {
        let text = read(&folder.join(source));
        for path in text.split("include_str!(\"").skip(1).filter_map(|rest| rest.split('"').next()) {
            found.insert(plain(&Path::new(source).parent().unwrap().join(path)));
        }
    }
    found
}

/// Every file of `folder` whose name ends so.
fn files(folder: &Path, of: &str, end: &str) -> BTreeSet<String> {
    let (mut found, mut folders) = (BTreeSet::new(), vec![folder.join(of)]);
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.to_str().unwrap().ends_with(end) {
                found.insert(path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    found
}

/// The paths that `expected` does not know.
fn strange<'a>(packed: &'a BTreeSet<String>, beside: &[&str], expected: &BTreeSet<String>) -> Vec<&'a String> {
    let known = |path: &str| {
        beside.contains(&path) || IN_EACH.iter().any(|start| path.starts_with(start)) || expected.contains(path)
    };
    packed.iter().filter(|path| !known(path)).collect()
}

#[test]
fn the_crate_is_whole_and_has_nothing_of_the_workspace() {
    let packed = packed(CRATE);
    let mut expected = files(root(), "src", "");
    expected.extend(files(root(), "tests/topology", ""));
    expected.extend(included(root(), &packed));
    // A picture, or another file that is no page: a page in the package names it.
    let pages: String = packed.iter().filter(|path| is_a(path, "md")).map(|path| read(&root().join(path))).collect();
    let named = |path: &String| pages.contains(path.as_str()) || pages.contains(path.trim_start_matches("docs/"));
    expected.extend(files(root(), "docs", ".svg").into_iter().filter(|path| pages.contains(path.as_str())));
    expected.extend(files(root(), "docs", ".json").into_iter().filter(named));
    let missing: Vec<_> = expected.difference(&packed).collect();
    assert!(missing.is_empty(), "the package lacks {missing:?}: see `include` in Cargo.toml");
    let strange = strange(&packed, &BESIDE, &expected);
    assert!(strange.is_empty(), "nobody who has the package needs {strange:?}: see `include` in Cargo.toml");
    let absent: Vec<_> = BESIDE.iter().filter(|path| !packed.contains(**path)).collect();
    assert!(absent.is_empty(), "{absent:?}");
}

#[test]
fn the_test_kit_is_whole_and_has_nothing_of_the_workspace() {
    let (folder, packed) = (root().join("testkit"), packed(KIT));
    let mut expected = files(&folder, "src", "");
    expected.extend(files(&folder, "tests/cluster", ""));
    expected.extend(included(&folder, &packed));
    let missing: Vec<_> = expected.difference(&packed).collect();
    assert!(missing.is_empty(), "the package lacks {missing:?}: see `include` in testkit/Cargo.toml");
    let strange = strange(&packed, &BESIDE_THE_KIT, &expected);
    assert!(strange.is_empty(), "nobody who has the package needs {strange:?}: see `include` in testkit/Cargo.toml");
}

/// docs.rs shows the files of the package, and no others.
#[test]
fn links_to_files_of_the_package_lead_to_files_in_it() {
    let packed = packed(CRATE);
    let links = read(&root().join("src/docs/links.md"));
    let mut seen = 0;
    for path in links.lines().filter_map(|line| Some(line.split_once("/latest/source/")?.1)) {
        assert!(packed.contains(path), "{path} is not in the package: see `include`");
        seen += 1;
    }
    assert!(seen >= 5, "{seen} files");
}

/// A packed crate has no dependency that is named by its path alone, so its tests must do without.
#[test]
fn the_packed_sources_use_no_crate_of_the_workspace() {
    for source in packed(CRATE).iter().filter(|path| is_a(path, "rs")) {
        let text = read(&root().join(source));
        let uses = ["testbed::", "tokio_postgres_failover_testkit::"].iter().find(|name| text.contains(**name));
        assert!(uses.is_none(), "{source} uses {uses:?}, which the package lacks");
    }
}
