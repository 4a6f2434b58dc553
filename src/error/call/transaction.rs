//! The errors of transactions that the pool did not commit, and of calls that ran too often.

use std::error::Error as StdError;
use std::fmt;

use super::{CommitOutcome, Error};

/// [`Error::RolledBack`]: why a transaction was not committed although its closure returned `Ok`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum RolledBack {
    /// A statement failed and the closure went on. PostgreSQL turns the COMMIT of such a transaction into a ROLLBACK.
    #[error(
        "the transaction was rolled back: a statement in it failed and the closure returned Ok; pass the statement's \
         error on with `?`, or put the statement into a savepoint"
    )]
    FailedInside,
    /// The pool left the primary that the transaction ran on, and the transaction is not committed. Either its COMMIT
    /// was not sent, or it was lost with that primary before a standby had received it.
    #[error(
        "the pool left the primary that the transaction ran on, and the transaction is not committed; it is safe to \
         run it again"
    )]
    LostWithPrimary,
    /// BEGIN reached another server than the one that the connection was verified with, because a proxy switched
    /// servers.
    #[error(
        "nothing was done: a proxy has led the connection to another server than the one that was verified; it is \
         safe to run the transaction again"
    )]
    OtherServer,
    /// The pooled connection already had an open transaction. An earlier user of it began one by hand and did not end
    /// it.
    #[error(
        "nothing was done: the connection came with a transaction that someone had left open; end a transaction that \
         you begin by hand before you give the connection back"
    )]
    StrangeSession,
    /// A [`Transaction`](crate::Transaction) handle was still alive after its closure had returned.
    #[error(
        "the transaction was rolled back: its handle was kept beyond the closure; end every task that uses it before \
         the closure returns"
    )]
    HandleKept,
    /// The closure began a stream of rows or a COPY that was still open after it had returned, so the session was still
    /// busy.
    ///
    /// The pool sees the streams that the methods of [`Transaction`](crate::Transaction) and
    /// [`Savepoint`](crate::Savepoint) return. It does not see a stream that a helper began on the driver's own
    /// `&tokio_postgres::Client`. COMMIT waits for such a stream as long as it is kept.
    #[error(
        "the transaction was rolled back: a stream of rows or a COPY that its closure had begun was still open after \
         it; read streams to their end or drop them, and finish a CopyInSink, before the closure returns"
    )]
    StreamKept,
}

/// [`Error::EndedInside`]: the closure ended its transaction itself.
///
/// Statements that it ran afterwards, outside of the transaction, were committed one by one.
#[derive(Debug)]
pub struct EndedInside {
    ending: Ending,
    pub(super) source: Option<Error>,
}

/// How a closure ended its transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Ending {
    /// It committed, with `COMMIT` or `END`, or either of them with `AND CHAIN`.
    Committed,
    /// It rolled back, with `ROLLBACK` or `ABORT`, or either of them with `AND CHAIN`.
    RolledBack,
    /// It ran `PREPARE TRANSACTION`. The transaction is stored, holds its locks, and waits for `COMMIT PREPARED` or
    /// `ROLLBACK PREPARED`.
    Prepared,
    /// The server cannot tell, because the transaction had left no mark there. See [`Guarantee`](crate::Guarantee).
    Unknown,
}

impl EndedInside {
    /// `source` is the error that the closure returned afterwards, if it failed.
    pub(crate) fn error(ending: Ending, source: Option<Error>) -> Error {
        Error::EndedInside(Box::new(Self { ending, source }))
    }

    /// How the transaction was ended.
    #[must_use]
    pub fn ending(&self) -> Ending {
        self.ending
    }

    /// The error that the closure returned afterwards, if it failed.
    #[must_use]
    pub fn failure(&self) -> Option<&Error> {
        self.source.as_ref()
    }
}

impl fmt::Display for EndedInside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.ending {
            Ending::Committed => {
                "the closure committed its transaction itself: what it did before that is stored, and what it did \
                 afterwards may be in part"
            }
            Ending::RolledBack => {
                "the closure rolled its transaction back itself: what it did before that is undone, and what it did \
                 afterwards may be stored in part"
            }
            Ending::Prepared => {
                "the closure ended its transaction itself, with PREPARE TRANSACTION: it holds its locks until someone \
                 runs COMMIT PREPARED or ROLLBACK PREPARED"
            }
            Ending::Unknown => {
                "the closure ended its transaction itself (or took its mark away with RESET ALL): what it did may be \
                 stored in part"
            }
        })?;
        f.write_str("; look for its effect before repeating it, and leave BEGIN, COMMIT and ROLLBACK to the pool")?;
        match &self.source {
            Some(source) => write!(f, "; it then failed with: {source}"),
            None => Ok(()),
        }
    }
}

impl StdError for EndedInside {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_ref().map(|source| source as &(dyn StdError + 'static))
    }
}

/// [`Error::Exhausted`]: a call was ended by its retry policy, or by an error that allowed no further attempt after an
/// attempt in doubt, or after a call within its closure whose outcome is unknown.
#[derive(Debug)]
pub struct Exhausted {
    attempts: u32,
    why: String,
    pub(super) outcome: CommitOutcome,
    /// What may have been committed, if the outcome is unknown.
    doubt: &'static str,
    pub(super) source: Error,
}

impl Exhausted {
    pub(crate) fn new(attempts: u32, why: String, outcome: CommitOutcome, source: Error) -> Self {
        Self { attempts, why, outcome, doubt: "an earlier attempt may have been committed", source }
    }

    /// The work would run again, but its closure has made another call whose outcome is unknown.
    pub(crate) fn by_a_call_within(attempts: u32, source: Error) -> Self {
        Self::within("another run would repeat a call within the closure", attempts, source)
    }

    /// The work would not run again anyway, but its closure has made another call whose outcome is unknown.
    pub(crate) fn beside_a_call_within(attempts: u32, source: Error) -> Self {
        Self::within("the outcome of a call within the closure is unknown", attempts, source)
    }

    fn within(why: &str, attempts: u32, source: Error) -> Self {
        let why = why.to_owned();
        let doubt = "that call may have been committed: look for its effect before repeating this one";
        Self { attempts, why, outcome: CommitOutcome::Unknown, doubt, source }
    }

    /// The number of attempts that were made.
    #[must_use]
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// The error that ended the call: the last attempt's, or the reason why there was no further attempt.
    #[must_use]
    pub fn last_error(&self) -> &Error {
        &self.source
    }
}

impl fmt::Display for Exhausted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let times = if self.attempts == 1 { "attempt" } else { "attempts" };
        write!(f, "gave up after {} {times}: {}; the last error was: {}", self.attempts, self.why, self.source)?;
        if self.outcome == CommitOutcome::Unknown {
            write!(f, "; {}", self.doubt)?;
        }
        Ok(())
    }
}

impl StdError for Exhausted {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&self.source)
    }
}
