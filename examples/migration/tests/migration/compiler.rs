//! What the compiler says when only the pool's type was changed, and after the cures.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::{page, read, source};

/// In the beginning, the names that both crates have come from this one.
const CHANGED: (&str, &str) = (
    "use deadpool_postgres::{CreatePoolError, GenericClient, Pool, PoolConfig, PoolError, Runtime};",
    "use deadpool_postgres::{CreatePoolError, PoolConfig, Runtime};\n\
     use tokio_postgres_failover::{GenericClient, Pool, PoolError};",
);

/// Each error, as the page quotes it, and what is written instead.
const CURES: [(&str, &[(&str, &str)]); 2] = [
    (
        "expected `Pool`, found `Pool<Manager>`",
        &[
            ("let mut config = deadpool_postgres::Config::new();", ""),
            ("config.url = Some(url.to_owned());", ""),
            ("config.pool = Some(PoolConfig::new(16));", ""),
            ("config.create_pool(Some(Runtime::Tokio1), NoTls)?", "Pool::builder(url)?.max_size(16).build()?"),
            ("CreatePoolError, PoolConfig, Runtime", "CreatePoolError"),
            ("use deadpool_postgres::{CreatePoolError};", "use tokio_postgres_failover::BuildError;"),
            ("CreatePoolError", "BuildError"),
        ],
    ),
    ("no `PoolError` in the root", &[("PoolError", "Error")]),
];

#[test]
#[ignore = "it compiles the shop twice, with all that it depends on: `make test-long`"]
fn the_compiler_names_few_places_and_the_page_has_each() {
    let page = read(&page());
    let mut shop = changed(&source("before.rs"), &[CHANGED]);
    let errors = errors_of(&shop);
    println!("{errors:#?}");
    assert_eq!(errors.len(), CURES.len(), "{errors:#?}");
    for (expected, cure) in CURES {
        assert!(errors.iter().any(|error| error.contains(expected)), "expected `{expected}`: {errors:#?}");
        assert!(page.contains(expected), "the page does not have `{expected}`");
        shop = changed(&shop, cure);
    }
    assert_eq!(errors_of(&shop), [""; 0], "the cures are all that is needed");
}

fn changed(text: &str, changes: &[(&str, &str)]) -> String {
    changes.iter().fold(text.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "nothing to change: {from}");
        text.replace(from, to)
    })
}

/// What the compiler says of this shop, without what follows from it.
fn errors_of(shop: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("halfway.rs");
    // `include!` takes no documentation of the file itself.
    let shop: String =
        shop.lines().filter(|line| !line.starts_with("//!")).map(|line| line.to_owned() + "\n").collect();
    fs::write(&path, shop).unwrap();
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["rustc", "--package", "failover-migration", "--lib", "--offline", "--locked"]);
    cargo.args(["--message-format=json", "--", "--cfg", "halfway"]);
    let output = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).env("HALFWAY", &path).output().unwrap();
    let errors: Vec<String> = String::from_utf8(output.stdout).unwrap().lines().filter_map(error).collect();
    let says = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.success(), errors.is_empty(), "{errors:#?}\n{says}");
    errors
}

/// The error that cargo reports in this line, with the compiler's words at its place.
fn error(line: &str) -> Option<String> {
    let reported: Value = serde_json::from_str(line).ok()?;
    let message = &reported["message"];
    // The last error only counts the others, and has no code.
    if reported["reason"] != "compiler-message" || message["level"] != "error" || message["code"].is_null() {
        return None;
    }
    let labels = message["spans"].as_array()?.iter().filter_map(|span| span["label"].as_str());
    Some(labels.fold(message["message"].as_str()?.to_owned(), |text, label| format!("{text}: {label}")))
}
