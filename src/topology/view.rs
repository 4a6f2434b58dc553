//! What a pool publishes about its cluster.

use std::fmt;

use tokio::time::Instant;

use super::{Endpoint, ProbeFailure, Refusal, ServerReport};

/// The number of a generation: one primary, from the moment it was found until it was replaced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GenerationId(pub(crate) u64);

impl GenerationId {
    /// The number; 0 means that no primary has been found yet.
    #[must_use]
    pub fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for GenerationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a pool knows about its cluster at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct View {
    /// Whether there is a verified primary.
    pub state: State,
    /// The newest generation that has begun.
    pub generation: GenerationId,
    /// When and why the state changed last.
    pub changed: Change,
}

/// The state in a [`View`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// No verified primary: checkouts wait.
    Searching {
        /// Set if waiting does not help, because each candidate refuses the credentials, is not PostgreSQL, belongs to
        /// another of several clusters, or has an unknown name.
        refused: Option<ProbeFailure>,
    },
    /// A verified primary.
    Primary {
        /// Where it is.
        endpoint: Endpoint,
        /// What it said when it was verified.
        report: ServerReport,
    },
    /// No caller has asked for a connection for [`sleep_after`](crate::PoolBuilder::sleep_after). No session is open,
    /// and no server is asked. The next caller wakes the pool.
    Asleep,
    /// The pool was closed.
    Closed,
}

/// The last change of a [`View`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Change {
    /// When it happened.
    pub at: Instant,
    /// Why, in a few words.
    pub why: String,
}

/// Why the connections of a generation were closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Eviction {
    /// Another server proved to be the primary, or the same server after a restart or a crash.
    Replaced,
    /// Its server is a standby now.
    Demoted,
    /// Its server refuses writes: `default_transaction_read_only` is on.
    Fenced,
    /// Its server was silent for [`dead_after`](crate::PoolBuilder::dead_after).
    Silent,
    /// No caller asked for a connection for [`sleep_after`](crate::PoolBuilder::sleep_after).
    Asleep,
}

impl Refusal {
    /// Returns the reason to evict, if the refusal proves that the server itself refuses writes. The other refusals
    /// only say that its identity is unknown, or that it is another server.
    pub(super) fn proof(self) -> Option<Eviction> {
        match self {
            Self::Standby => Some(Eviction::Demoted),
            Self::Fenced => Some(Eviction::Fenced),
            _ => None,
        }
    }
}

impl fmt::Display for Eviction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Replaced => "replaced",
            Self::Demoted => "demoted",
            Self::Fenced => "fenced",
            Self::Silent => "silent",
            Self::Asleep => "asleep",
        })
    }
}
