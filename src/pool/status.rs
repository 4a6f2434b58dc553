//! What a pool reports about itself.

use crate::topology::{Evidence, View};

/// The state of a pool, from [`Pool::status`](crate::Pool::status).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// The most connections that are handed out at the same time.
    pub max_size: usize,
    /// The number of existing connections.
    pub size: usize,
    /// How many of them are idle.
    pub available: usize,
    /// How many callers wait for a connection.
    pub waiting: usize,
    /// What this primary does not offer, so that [`Guarantee::ExactlyOnce`](crate::Guarantee::ExactlyOnce) is only
    /// [`Guarantee::AtMostOnce`](crate::Guarantee::AtMostOnce) on it. `None` if the primary lacks nothing, and before
    /// the first transaction.
    pub fallback: Option<String>,
    /// The evidence that settles a commit in doubt on this primary, with
    /// [`Guarantee::ExactlyOnce`](crate::Guarantee::ExactlyOnce). `None` while there is no primary, and until its first
    /// heartbeat.
    pub evidence: Option<Evidence>,
    /// The primary, the generation, and the last change with its reason.
    pub view: View,
}
