//! Whether a closure has ended its transaction itself. Pure; `left.rs` finds it out.
//!
//! The server's answers show each end exactly: the tag of COMMIT or PREPARE TRANSACTION, or a session without a
//! transaction. The text that was sent counts only for a request that was not answered.

use crate::error::Ending;
use crate::server::TransactionEnd;

/// Whether the closure itself has ended the pool's transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClosuresEnd {
    /// It has. The server has answered that.
    Left(Ending),
    /// It has sent a COMMIT, which was not answered.
    UnderWay,
    /// It has sent something that ends the transaction, and other statements behind that. Nobody can find out whether
    /// those are stored, because they are not in the pool's transaction.
    WithMore,
    NotSent,
    /// Nobody knows: the session belongs to a wrapped pool, and this crate does not see what is sent on it.
    Unwatched,
}

impl ClosuresEnd {
    pub(super) fn left(end: TransactionEnd) -> Self {
        Self::Left(match end {
            TransactionEnd::Committed => Ending::Committed,
            TransactionEnd::Prepared => Ending::Prepared,
            TransactionEnd::RolledBack => Ending::RolledBack,
        })
    }

    /// Returns whether it has ended the transaction, or may have.
    pub(super) fn is_sent(self) -> bool {
        matches!(self, Self::Left(_) | Self::UnderWay | Self::WithMore)
    }
}
