//! Patroni with etcd, repmgr, and HAProxy in front, for real: what they do to a pool under load, held against what is
//! stored in the end.
//!
//! `make test-managers` runs one round of the most important trials (`short`); `make managers` runs all of them and
//! prints the table (`table`). `cargo test` alone runs neither, so that the other tests need no failover manager.
//! Environment:
//! - `ROUNDS=3`: so many rounds of each trial of the table; 1 unless told.
//! - `TRIAL=zombie`: those alone whose name contains this.
//! - `RUST_LOG=tokio_postgres_failover=debug` shows what the pool does.
//!
//! A binary of its own: cargo runs it after the others, so that its clusters, of ten processes and more each, have the
//! machine to themselves; and `make managers` compiles it for release without the fifty modules of `it`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]
#![allow(clippy::large_futures, reason = "a test is one future, and nobody waits for it but the runtime")]

#[path = "../soak/entries.rs"]
mod entries;
mod first_write;
mod load;
mod report;
mod rounds;
mod short;
mod table;
mod trials;
