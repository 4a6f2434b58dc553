//! A COMMIT whose outcome could not be settled.

use std::error::Error as StdError;
use std::fmt;

use crate::classify::explain;
use crate::commit::Unsettled;

/// [`Error::CommitUnknown`]: COMMIT was sent, and whether it will last is not known.
#[derive(Debug)]
pub struct CommitUnknown {
    pub(super) doubt: Doubt,
    reason: Unsettled,
}

/// What came instead of an answer to COMMIT.
#[derive(Debug)]
pub(super) enum Doubt {
    /// The end of the connection.
    Lost(InDoubt),
    /// The server was left before it answered.
    Evicted,
    /// The warning that the wait for a standby was cancelled.
    NotReplicated,
    /// An earlier run of the work was not answered, and who said that it was not committed is no primary any more.
    Earlier,
}

impl CommitUnknown {
    /// `lost`: what came instead of an answer; `None` where the server gave up waiting for a standby.
    pub(crate) fn new(lost: Option<tokio_postgres::Error>, reason: Unsettled) -> Self {
        let doubt = lost.map_or(Doubt::NotReplicated, |lost| Doubt::Lost(InDoubt(lost)));
        Self { doubt, reason }
    }

    /// The primary was left before it answered, and the connection did not end with it.
    pub(crate) fn evicted(reason: Unsettled) -> Self {
        Self { doubt: Doubt::Evicted, reason }
    }

    /// An earlier run of the work was not in the history of the primary that was asked then, and no later one says so.
    pub(crate) fn earlier(reason: Unsettled) -> Self {
        Self { doubt: Doubt::Earlier, reason }
    }

    pub(crate) fn because(self, reason: Unsettled) -> Self {
        Self { reason, ..self }
    }

    /// Why the outcome could not be settled.
    #[must_use]
    pub fn reason(&self) -> Unsettled {
        self.reason
    }
}

impl fmt::Display for CommitUnknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.doubt {
            Doubt::Lost(source) => write!(
                f,
                "the connection was lost after COMMIT was sent ({}): the transaction may or may not have been committed",
                explain(&source.0)
            )?,
            Doubt::Evicted => f.write_str(
                "the primary was left before it answered to COMMIT: the transaction may or may not have been committed",
            )?,
            Doubt::NotReplicated => f.write_str(
                "the wait for a synchronous standby was cancelled: the transaction is committed on the primary, and a \
                 failover may still lose it",
            )?,
            Doubt::Earlier => f.write_str(
                "an earlier run's COMMIT was not answered, and the primary that did not have it was lost, too: the \
                 transaction may or may not have been committed",
            )?,
        }
        write!(f, "; {}; look for its effect before repeating it", self.reason)?;
        match self.reason {
            Unsettled::NoMarker => {
                f.write_str(", or use `idempotent` for work that may be applied twice, or a guarantee that settles")
            }
            Unsettled::SeveralFailovers | Unsettled::Restarted | Unsettled::OtherHistory | Unsettled::Forgotten => {
                f.write_str("; `Guarantee::Ledger` would have known")
            }
            _ => Ok(()),
        }
    }
}

impl StdError for CommitUnknown {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match &self.doubt {
            Doubt::Lost(source) => Some(source),
            Doubt::Evicted | Doubt::NotReplicated | Doubt::Earlier => None,
        }
    }
}

/// A link of the source chain that no wrapper skips: whoever walks the chain of an application's error has to meet the
/// doubt before the lost connection, which taken alone would be a reason to run again.
#[derive(Debug, thiserror::Error)]
#[error("the outcome of a commit is not known")]
pub(crate) struct InDoubt(#[source] pub(super) tokio_postgres::Error);
