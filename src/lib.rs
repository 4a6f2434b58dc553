#![doc = include_str!("docs/links.md")]
#![doc = include_str!("docs/picture.md")]
#![doc = include_str!("../README.md")]

/// Whether the simulation in sim/ has planted this deliberate fault, which it must find. Without `cfg(failover_sim)`
/// this is `false`, and nothing is left of it.
#[cfg(failover_sim)]
macro_rules! planted {
    ($mutant:literal) => {
        crate::simulation::is_planted($mutant)
    };
}
#[cfg(not(failover_sim))]
macro_rules! planted {
    ($mutant:literal) => {
        false
    };
}

/// Counts for the simulation in sim/ that a row of a decision was used: its group, and its name as a format. Without
/// `cfg(failover_sim)` nothing is left of it.
#[cfg(failover_sim)]
macro_rules! seen {
    ($group:literal, $($name:tt)+) => {
        crate::simulation::see($group, format!($($name)+))
    };
}
#[cfg(not(failover_sim))]
macro_rules! seen {
    ($group:literal, $($name:tt)+) => {};
}

// Level 0 decides, without I/O, clock or task. `random` and `sync` are helpers. `resolve` has the trait and its types;
// its file `hickory.rs` asks DNS, and belongs to level 1.
mod classify;
mod commit;
pub mod connect;
pub mod fly;
mod random;
pub mod resolve;
#[cfg(failover_sim)]
#[doc(hidden)]
pub mod simulation;
mod sync;
mod topology;

// Level 1 does I/O and decides nothing: it fetches what the decisions need. `observe` writes logs, events and metrics.
mod observe;
mod server;
mod settle;
#[cfg(feature = "rustls")]
pub mod tls;

// Level 2 is the task that owns a topology.
mod cluster;

// Level 3 has the public error and the retry policy. The error contains the errors of the levels below. The policy is
// pure; it is on this level because its hooks get the error.
pub mod error;
pub mod retry;

// Level 4 has the connections of the current generation.
mod pool;

// Level 5 has the work that runs again, and the subscriptions that are renewed.
pub mod listen;
mod transaction;

// The pages of docs/. Their examples are tests.
#[cfg(any(doc, doctest))]
pub mod docs;

#[cfg(feature = "bb8")]
pub use bb8;
pub use deadpool;
pub use deadpool_postgres;
pub use tokio_postgres;

// The names that everyday code needs. Every other name has one path, in one of the modules.
pub use commit::Guarantee;
pub use error::build::BuildError;
pub use error::call::{CommitOutcome, Error};
pub use observe::{Event, Events};
pub use pool::{Client, GenericClient, Manager, Pool, PoolBuilder, WrapBuilder};
pub use retry::policy::RetryPolicy;
pub use transaction::{Savepoint, Transaction, TransactionBuilder};

/// The table that settles commits in doubt, for [`Guarantee::Ledger`].
pub mod ledger {
    pub use crate::commit::Ledger;
}

/// The types behind a [`Client`]: its session, the token that cancels a statement, a session that has left the pool,
/// and the transactions that a [`GenericClient`] begins.
///
/// [`IntoConfig`](session::IntoConfig) is here, too: it is what [`Pool::builder`] accepts as a configuration.
pub mod session {
    pub use crate::pool::{CancelToken, Connection, Detached, GenericTransaction, IntoConfig, SessionDriver};
    pub use crate::server::SessionClient;
}

/// What a pool knows about itself and its servers.
///
/// These are the types that [`Pool::status`], [`Pool::watch`] and [`Pool::candidates`] return. An [`Event`] contains
/// some of them.
pub mod view {
    pub use crate::observe::SettledOutcome;
    pub use crate::pool::Status;
    pub use crate::topology::{
        Address, Answer, BadReport, CandidateReport, Change, Endpoint, Eviction, Evidence, GenerationId, Lsn, Origin,
        Part, Parts, Refusal, Role, ServerReport, State, View,
    };
}

/// The parsers that the fuzz targets call. This module exists only with `cfg(fuzzing)`, which `cargo fuzz` sets.
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing {
    use tokio_postgres::Config;

    use crate::view::{BadReport, ServerReport};
    use crate::{BuildError, Pool};

    /// The parts from which a pool would be made.
    #[derive(Clone, Debug)]
    pub struct Configuration {
        /// DNS names and their ports.
        pub names: Vec<(String, u16)>,
        /// Servers by address.
        pub addresses: Vec<String>,
        /// The configuration of each session.
        pub template: Config,
    }

    /// Reads the timeline from the name of a WAL file.
    pub fn timeline(name: &str) -> Result<u32, BadReport> {
        ServerReport::timeline_of(name)
    }

    /// Reads an answer to the probe.
    pub fn report(row: &[Option<&str>]) -> Result<ServerReport, BadReport> {
        ServerReport::parse(row)
    }

    /// The private fields of a report: the fence, the start time and the reset of the statistics.
    #[must_use]
    pub fn hidden(report: &ServerReport) -> (bool, Option<i64>, Option<i64>) {
        (report.fence_pending, report.started_at, report.stats_reset)
    }

    /// Reads a connection string, up to the point where a pool would need a runtime.
    pub fn configuration(text: &str, tls: bool) -> Result<Configuration, BuildError> {
        let (names, addresses, template) = Pool::builder(text)?.read(tls)?;
        Ok(Configuration { names, addresses, template })
    }
}
