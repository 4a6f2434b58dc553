//! This pool beside others: the same servers, the same failover, the same run. `make bench` runs it.

#![allow(clippy::must_use_candidate, reason = "getters of a benchmark")]
#![allow(clippy::doc_markdown, reason = "PostgreSQL and its pools are names")]

pub mod counting;
pub mod external;
pub mod measurement;
pub mod peer;
pub mod quiet;
pub mod recorder;
