//! A service moves from deadpool-postgres to this pool: what changes, what the compiler says on the way, and what its
//! users see of a failover before and after.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

mod compiler;
mod difference;
mod failover;
mod quotes;

use std::fs;
use std::path::{Path, PathBuf};

const PAGE: &str = "docs/from-deadpool.md";

fn source(name: &str) -> String {
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(name))
}

fn page() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(PAGE)
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
