//! What can go wrong with a cluster, and what to do.

use tokio::task::JoinError;

use crate::Node;

/// Why a [`Step`](crate::Step) could not be made.
///
/// ```
/// use tokio_postgres_failover_testkit::{Error, Node};
///
/// assert_eq!(Error::NotRunning(Node(1)).to_string(), "Node(1) does not run; `Cluster::start_node` starts it");
/// ```
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// PostgreSQL's server programs are not installed, or lie where nobody looks for them.
    #[error(
        "no PostgreSQL server programs (postgres, initdb, pg_basebackup) in {searched}; install them (Debian and \
         Ubuntu: apt-get install postgresql; Fedora: dnf install postgresql-server postgresql-contrib; Alpine: apk add \
         postgresql), or set PG_BIN to the folder that has them"
    )]
    NoPostgres {
        /// Where they were looked for.
        searched: String,
    },
    /// PostgreSQL refuses to run as root, and there is no other user to run it.
    #[error(
        "the tests run as root, PostgreSQL refuses to, and /etc/passwd has neither `postgres` nor `nobody`; install \
         PostgreSQL's package, or run the tests as another user"
    )]
    NoUser,
    /// No address of `127.0.0.0/8` can be bound. On Linux all of them can.
    #[error(
        "no address of 127.0.0.0/8 can be bound on the ports {} to {}; another program may listen on all addresses",
        ports.0, ports.1
    )]
    NoAddress {
        /// The first and the last port that were tried.
        ports: (u16, u16),
    },
    /// A builder was given what no cluster can have.
    #[error("{0}")]
    Invalid(String),
    /// There is no such node.
    #[error("there is no {0:?}; nodes are counted from 0, which is the first primary")]
    NoNode(Node),
    /// The node's server does not run.
    #[error("{0:?} does not run; `Cluster::start_node` starts it")]
    NotRunning(Node),
    /// The node's server runs already.
    #[error("{0:?} runs already; stop or kill it first")]
    Running(Node),
    /// The step did not come to its end, in time or at all.
    #[error("{step} failed: {reason}")]
    #[non_exhaustive]
    Failed {
        /// The step.
        step: String,
        /// What was seen last. [`Cluster::log`](crate::Cluster::log) has the server's own words.
        reason: String,
    },
}

impl Error {
    pub(crate) fn failed(step: &str, reason: impl Into<String>) -> Self {
        Self::Failed { step: step.to_owned(), reason: reason.into() }
    }

    /// The test bed ends a test by a panic that says why; here that is the reason of an error.
    pub(crate) fn ended(step: &str, error: JoinError) -> Self {
        let reason = match error.try_into_panic() {
            Ok(panic) => match panic.downcast::<String>() {
                Ok(text) => *text,
                Err(panic) => panic.downcast_ref::<&str>().map_or("it panicked", |text| text).to_owned(),
            },
            Err(cancelled) => cancelled.to_string(),
        };
        Self::failed(step, reason)
    }
}
