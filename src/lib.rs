#![doc = include_str!("docs/links.md")]
#![doc = include_str!("docs/picture.md")]
#![doc = include_str!("../README.md")]

// Level 0: pure. Decides; no I/O, no clock, no task.
mod classify;
mod commit;
pub mod fly;
mod random;
pub mod resolve;
mod sync;
mod topology;

// Level 1: I/O. Fetches what the decisions need, and decides nothing.
mod server;
mod settle;
#[cfg(feature = "rustls")]
pub mod tls;

// Also level 1: logs, events and metrics. Decides nothing.
mod observe;

// Level 2: the one task that owns a topology.
mod cluster;

// Level 3: the public error, which contains the errors of the layers below, and the pure retry policy, whose hooks see
// it.
pub mod error;
pub mod retry;

// Level 4: connections of the current generation.
mod pool;

// Level 5: work that runs again, and subscriptions that are renewed.
pub mod listen;
mod transaction;

// The pages of docs/, whose examples are tests.
#[cfg(any(doc, doctest))]
pub mod docs;

pub use deadpool;
pub use deadpool_postgres;
pub use tokio_postgres;

// What everyday code names. Everything else has one path, in one of the modules.
pub use commit::Guarantee;
pub use error::build::BuildError;
pub use error::call::{CommitOutcome, Error};
pub use observe::{Event, Events};
pub use pool::{Client, Manager, Pool, PoolBuilder, WrapBuilder};
pub use retry::policy::RetryPolicy;
pub use transaction::{Savepoint, Transaction, TransactionBuilder};

/// The table that settles commits in doubt, for [`Guarantee::Ledger`].
pub mod ledger {
    pub use crate::commit::Ledger;
}

/// What stands behind a [`Client`]: its session, how a statement on it is cancelled and how it leaves the pool, and
/// what sessions are opened with.
pub mod session {
    pub use crate::pool::{CancelToken, Connection, Detached, IntoConfig};
    pub use crate::server::SessionClient;
}

/// What a pool knows of itself and of its servers.
///
/// [`Pool::status`], [`Pool::watch`] and [`Pool::candidates`] return it, and each [`Event`] has a part of it.
pub mod view {
    pub use crate::observe::Settlement;
    pub use crate::pool::Status;
    pub use crate::topology::{
        Address, Answer, BadReport, CandidateReport, Change, Endpoint, Eviction, Evidence, GenerationId, Lsn, Origin,
        Part, Parts, Refusal, Role, ServerReport, State, View,
    };
}

/// The parsers that the fuzz targets call, which are private otherwise. `cargo fuzz` sets the cfg.
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

    /// What a report read and does not show: the fence, the start time and the reset of the statistics.
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
