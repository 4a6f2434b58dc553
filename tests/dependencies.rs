//! What the default build pulls in: nothing with an open advisory, nothing newer than `rust-version` allows.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// The versions that mended the advisories known of what this crate uses.
const MENDED: [(&str, [u64; 3], &str); 4] = [
    ("hickory-proto", [0, 26, 1], "RUSTSEC-2026-0118, RUSTSEC-2026-0119"),
    ("hickory-net", [0, 26, 1], "RUSTSEC-2026-0120"),
    ("tokio-postgres", [0, 7, 18], "RUSTSEC-2026-0178"),
    ("postgres-protocol", [0, 6, 12], "RUSTSEC-2026-0179, RUSTSEC-2026-0180"),
];
/// Crates of the default build, this one included.
const MOST_CRATES: usize = 120;
/// Crates with an advisory that nothing mends.
const UNMENDED: [(&str, &str); 2] = [("backoff", "RUSTSEC-2025-0012"), ("instant", "RUSTSEC-2024-0384")];

fn cargo(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(arguments)
        .args(["--locked", "--offline"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The crates in a build of the library, as `cargo tree` prints them.
fn tree(features: &[&str]) -> String {
    let mut arguments = vec!["tree", "--package", "tokio-postgres-failover", "--edges", "normal", "--prefix", "none"];
    arguments.extend(features);
    cargo(&arguments)
}

/// Name and version of each crate in a build of the library.
fn crates(features: &[&str]) -> BTreeMap<String, [u64; 3]> {
    tree(features)
        .lines()
        .filter_map(|line| {
            let (name, rest) = line.split_once(" v")?;
            Some((name.to_owned(), version(rest.split_whitespace().next()?)))
        })
        .collect()
}

fn version(text: &str) -> [u64; 3] {
    let plain = text.split(['-', '+']).next().unwrap();
    let mut parts = plain.split('.').map(|part| part.parse().unwrap());
    [parts.next().unwrap(), parts.next().unwrap_or(0), parts.next().unwrap_or(0)]
}

#[test]
fn the_default_build_holds_no_crate_with_an_open_advisory() {
    let crates = crates(&[]);
    println!("{} crates, this one included", crates.len());
    for (name, least, advisory) in MENDED {
        assert!(crates[name] >= least, "{name} {:?} is older than the mend of {advisory}", crates[name]);
    }
    for (name, advisory) in UNMENDED {
        assert!(!crates.contains_key(name), "{name}: {advisory}");
    }
}

/// A crate counts once for each of its versions.
#[test]
fn the_default_build_has_as_many_crates_as_the_readme_says() {
    let tree = tree(&[]);
    let crates: BTreeSet<&str> = tree.lines().filter_map(|line| line.split(" (").next()).collect();
    assert!(crates.len() <= MOST_CRATES, "{} crates, and {MOST_CRATES} were promised: {crates:?}", crates.len());
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let words = format!("This pool compiles {} crates", crates.len());
    assert!(readme.contains(&words), "README.md does not say: {words}; docs/figures.md has the number, too");
}

#[test]
fn only_the_feature_rustls_brings_tls_and_it_needs_no_cmake() {
    let tls = ["ring", "rustls", "rustls-native-certs", "rustls-webpki", "tokio-postgres-rustls", "tokio-rustls"];
    let (usual, with_tls) = (crates(&[]), crates(&["--features", "rustls"]));
    for name in tls {
        assert!(!usual.contains_key(name) && with_tls.contains_key(name), "{name}");
    }
    assert!(!with_tls.contains_key("aws-lc-rs"), "two cryptographic libraries, one of which is built by cmake");
    println!("{} crates more with the feature `rustls`", with_tls.len() - usual.len());
}

#[test]
fn only_the_feature_backoff_brings_the_unmaintained_crates() {
    let crates = crates(&["--features", "backoff"]);
    for (name, _) in UNMENDED {
        assert!(crates.contains_key(name), "the check above looks for a name that does not exist: {name}");
    }
}

#[test]
fn no_dependency_needs_a_newer_rust_than_the_manifest_says() {
    // What other platforms need was never downloaded here.
    let version_of_cargo = cargo(&["--version", "--verbose"]);
    let host = version_of_cargo.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();
    let arguments = ["metadata", "--format-version", "1", "--filter-platform", host];
    let metadata: Value = serde_json::from_str(&cargo(&arguments)).unwrap();
    let used = crates(&["--all-features"]);
    let packages = metadata["packages"].as_array().unwrap();
    let rust_version = |package: &Value| package["rust_version"].as_str().map(version);
    let named = |package: &&Value| package["name"] == "tokio-postgres-failover";
    let ours = packages.iter().find(named).and_then(rust_version).unwrap();
    let mut newest = [0; 3];
    for package in packages {
        let used = used.get(package["name"].as_str().unwrap());
        if used != Some(&version(package["version"].as_str().unwrap())) {
            continue;
        }
        let needs = rust_version(package).unwrap_or_default();
        assert!(needs <= ours, "{} needs Rust {needs:?}, the manifest promises {ours:?}", package["name"]);
        if !named(&package) {
            newest = newest.max(needs);
        }
    }
    assert_eq!(newest, ours, "the manifest may promise an older Rust than {ours:?}");
}

#[test]
fn only_the_feature_metrics_brings_the_facade() {
    assert!(!crates(&[]).contains_key("metrics"));
    assert!(crates(&["--features", "metrics"]).contains_key("metrics"));
}
