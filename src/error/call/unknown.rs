//! The error of a COMMIT whose outcome the pool could not find out.

use std::error::Error as StdError;
use std::fmt;

use super::Error;
use crate::classify::{ends_session, explain};
use crate::commit::Unsettled;

/// [`Error::CommitUnknown`](super::Error::CommitUnknown): COMMIT was sent, and it is not known whether the transaction
/// is committed for good. In a wrapped pool, the closure may have sent it without the pool's knowledge.
#[derive(Debug)]
pub struct CommitUnknown {
    pub(super) doubt: WhyInDoubt,
    reason: Unsettled,
}

/// What came instead of an answer to COMMIT.
#[derive(Debug)]
pub(super) enum WhyInDoubt {
    /// The connection was lost, or an error came that does not show the outcome.
    Lost(InDoubt),
    /// The pool gave up the server before the answer came.
    Evicted,
    /// A warning came that the wait for a standby was cancelled.
    NotReplicated,
    /// The answer to COMMIT's message lacked COMMIT's own.
    Incomplete,
    /// An earlier run of the work got no answer. A server that is no longer the primary said that it was not committed.
    /// `asked`: another primary was looked for, to ask it.
    Earlier { asked: bool },
    /// The attempt ended with this error before the pool sent COMMIT, on a wrapped pool's session. The pool does not
    /// see whether the closure has sent one.
    Unwatched(Error),
}

impl CommitUnknown {
    /// `lost` is the error that came instead of an answer. It is `None` if the server stopped waiting for a standby.
    pub(crate) fn new(lost: Option<tokio_postgres::Error>, reason: Unsettled) -> Self {
        let doubt = lost.map_or(WhyInDoubt::NotReplicated, |lost| WhyInDoubt::Lost(InDoubt(lost)));
        Self { doubt, reason }
    }

    /// The pool gave up the primary before the answer came, and the connection had not ended by itself.
    pub(crate) fn evicted(reason: Unsettled) -> Self {
        Self { doubt: WhyInDoubt::Evicted, reason }
    }

    /// An earlier run of the work was not in the history of the primary that was asked then. The call has ended before
    /// another one was asked.
    pub(crate) fn earlier(reason: Unsettled) -> Self {
        Self { doubt: WhyInDoubt::Earlier { asked: false }, reason }
    }

    /// The same, but a later primary was asked, or looked for in vain.
    pub(crate) fn asked_for_earlier(reason: Unsettled) -> Self {
        Self { doubt: WhyInDoubt::Earlier { asked: true }, reason }
    }

    /// The server answered COMMIT's message without an error, and did not say that it has committed.
    pub(crate) fn incomplete(reason: Unsettled) -> Self {
        Self { doubt: WhyInDoubt::Incomplete, reason }
    }

    /// The attempt ended with `error` before the pool sent COMMIT. The closure may have sent one, because the pool does
    /// not see what is sent on a wrapped pool's session.
    pub(crate) fn unwatched(error: Error, reason: Unsettled) -> Self {
        Self { doubt: WhyInDoubt::Unwatched(error), reason }
    }

    pub(crate) fn because(self, reason: Unsettled) -> Self {
        Self { reason, ..self }
    }

    /// Why the pool could not find out the outcome.
    #[must_use]
    pub fn reason(&self) -> Unsettled {
        self.reason
    }
}

impl fmt::Display for CommitUnknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.doubt {
            WhyInDoubt::Lost(source) if source.0.as_db_error().is_some_and(|report| !ends_session(report)) => write!(
                f,
                "COMMIT was answered with an error that does not show its outcome ({}): the transaction may or may not \
                 have been committed",
                explain(&source.0)
            )?,
            WhyInDoubt::Lost(source) => write!(
                f,
                "the connection was lost after COMMIT was sent ({}): the transaction may or may not have been \
                 committed",
                explain(&source.0)
            )?,
            WhyInDoubt::Evicted => f.write_str(
                "the pool left the primary before it answered COMMIT: the transaction may or may not have been \
                 committed",
            )?,
            WhyInDoubt::NotReplicated => f.write_str(
                "the wait for a synchronous standby was cancelled: the transaction is committed on the primary, and a \
                 failover may still lose it",
            )?,
            WhyInDoubt::Incomplete => f.write_str(
                "the answer to COMMIT is incomplete, as if a proxy had kept back a part of the message: the \
                 transaction may or may not have been committed",
            )?,
            WhyInDoubt::Earlier { .. } => f.write_str(
                "the COMMIT of an earlier attempt was not answered, and the primary that did not have it was lost, \
                 too: the transaction may or may not have been committed",
            )?,
            WhyInDoubt::Unwatched(error) => write!(
                f,
                "the attempt ended before the pool sent COMMIT ({error}), and its rollback is not certain: the pool \
                 does not see what is sent on the connection of a wrapped pool, so the closure may have committed the \
                 transaction itself"
            )?,
        }
        match self.doubt {
            // The deadline did not end the call, but the policy, its budget or its hook may have.
            WhyInDoubt::Earlier { asked: false } => f.write_str(
                "; the call ended before another primary was asked: if its deadline was the limit, raise \
                 `RetryPolicy::deadline` above the length of your failover",
            )?,
            _ => write!(f, "; {}", self.reason)?,
        }
        f.write_str("; look for its effect before repeating it")?;
        match self.reason {
            Unsettled::NoMark => {
                f.write_str(", or use `idempotent` for work that may be applied twice, or a guarantee that settles")
            }
            Unsettled::SeveralFailovers | Unsettled::Restarted | Unsettled::OtherHistory | Unsettled::Forgotten => {
                f.write_str("; `Guarantee::Ledger` would have settled it")
            }
            _ => Ok(()),
        }
    }
}

impl StdError for CommitUnknown {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match &self.doubt {
            WhyInDoubt::Lost(source) => Some(source),
            // The attempt's error is in the text only. A link to it would look like a reason to run the work again.
            WhyInDoubt::Evicted
            | WhyInDoubt::NotReplicated
            | WhyInDoubt::Incomplete
            | WhyInDoubt::Earlier { .. }
            | WhyInDoubt::Unwatched(_) => None,
        }
    }
}

/// A link of the source chain that no wrapper skips. Code that walks the chain of an application's error must find this
/// link before the lost connection behind it: a lost connection alone would be a reason to run the work again, and a
/// commit in doubt is not.
#[derive(Debug, thiserror::Error)]
#[error("the outcome of a commit is not known")]
pub(crate) struct InDoubt(#[source] pub(super) tokio_postgres::Error);
