//! What a pool tells of itself.

use crate::topology::{Evidence, View};

/// What a pool is doing, from [`Pool::status`](crate::Pool::status).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Status {
    /// The most connections that are handed out at the same time.
    pub max_size: usize,
    /// Connections that exist now.
    pub size: usize,
    /// Those of them that are idle.
    pub available: usize,
    /// Callers that wait for one.
    pub waiting: usize,
    /// Why [`Guarantee::ExactlyOnce`](crate::Guarantee::ExactlyOnce) is no more than
    /// [`Guarantee::AtMostOnce`](crate::Guarantee::AtMostOnce) on this primary, if it is not: what the server
    /// does not offer. Known from the first transaction on.
    pub fallback: Option<String>,
    /// What a commit in doubt is settled by on this primary, with [`Guarantee::ExactlyOnce`](crate::Guarantee::ExactlyOnce).
    /// `None` while there is no primary, and until its first heart-beat.
    pub evidence: Option<Evidence>,
    /// The primary, the generation, and the last change and why it happened.
    pub view: View,
}
