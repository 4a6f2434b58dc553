//! The error of a call on a pool or a transaction. The modules below have the details that contain such an error
//! themselves.

mod ended;
mod transaction;
mod unknown;

pub use ended::SessionEnded;
pub use transaction::{EndedInside, Ending, Exhausted, RolledBack};
pub use unknown::CommitUnknown;
pub(crate) use unknown::InDoubt;

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use unknown::WhyInDoubt;

use super::{CHECKOUT_TIMEOUT, Obstacle, Refused, Unavailable};
use crate::classify::{explain, links, without_code};
use crate::cluster::NoPrimary;

/// Why a call on a pool or a transaction has failed.
///
/// After a write, the important question is whether it may have been committed. [`Error::commit_outcome`] answers it.
///
/// ```
/// use tokio_postgres_failover::{CommitOutcome, Error};
///
/// fn advice(error: &Error) -> &'static str {
///     match error {
///         Error::Unavailable(_) => "no primary in time: answer 503 and try later",
///         Error::Refused(_) | Error::Closed => "waiting does not help",
///         _ if error.commit_outcome() == CommitOutcome::Unknown => "check for the work before you repeat it",
///         _ => "the transaction was rolled back",
///     }
/// }
/// # assert_eq!(advice(&Error::Closed), "waiting does not help");
/// ```
///
/// Its `Debug` shows the same text as its `Display`, because `unwrap` and a `main` that returns it print `Debug`.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There was no connection to a verified primary before the deadline. The error lists each candidate and its
    /// answer.
    #[error(transparent)]
    Unavailable(Box<Unavailable>),
    /// The servers refuse the credentials, the database or the kind of TLS, are not PostgreSQL, or belong to several
    /// clusters. Waiting would not help.
    #[error(transparent)]
    Refused(Box<Refused>),
    /// The pool was closed.
    #[error("the pool is closed; make a new one, or close it after the last user is done")]
    Closed,
    /// The tokio runtime that the pool was built on has ended. The task that follows the primary and every session
    /// ended with it. This is typical of a pool in a `static` that several `#[tokio::test]`s share, because each of
    /// them has a runtime of its own.
    #[error(
        "the tokio runtime that the pool was built on has ended, and the pool with it; build the pool on a runtime \
         that outlives its users: one pool for each #[tokio::test], or one runtime for all"
    )]
    RuntimeEnded,
    /// A [wrapped](crate::Pool::wrap) pool can neither listen nor dial. Its manager opens its connections, and their
    /// drivers do not pass notifications to this crate.
    #[error(
        "a pool of `Pool::wrap` or `Pool::wrap_bb8` can neither listen nor dial; use one made by `Pool::builder` for \
         that"
    )]
    Wrapped,
    /// The database answered with an error, or the connection was lost.
    #[error("{}", explain(.0))]
    Database(#[from] tokio_postgres::Error),
    /// The connection was lost between COMMIT and its answer, and the pool could not find out the outcome. The
    /// transaction may or may not have been committed.
    #[error(transparent)]
    CommitUnknown(Box<CommitUnknown>),
    /// The transaction did not begin, because the ledger of [`Guarantee::Ledger`](crate::Guarantee::Ledger) cannot be
    /// written.
    #[error(
        "the ledger cannot be written: {}; create it with `Ledger::install` or sql/ledger.sql, and grant SELECT, \
         INSERT, UPDATE and DELETE on it, and EXECUTE on a function that the server names here",
        explain(.0)
    )]
    Ledger(#[source] tokio_postgres::Error),
    /// The closure returned `Ok`, but the transaction was rolled back.
    #[error(transparent)]
    RolledBack(RolledBack),
    /// The closure ended its transaction itself, for example with `COMMIT` or `ROLLBACK`. The pool cannot tell which
    /// part of its work is stored, and did not run it again.
    #[error(transparent)]
    EndedInside(Box<EndedInside>),
    /// The work ran again until the retry policy stopped it, or until an error allowed no further attempt after an
    /// attempt in doubt. [`Error::commit_outcome`] says whether an attempt may have been committed.
    #[error(transparent)]
    Exhausted(Box<Exhausted>),
    /// The attempt took longer than [`RetryPolicy::attempt_timeout`](crate::RetryPolicy::attempt_timeout) allows. The
    /// pool told the server to stop, and the transaction is rolled back.
    #[error(
        "the transaction took longer than {after:?} and was rolled back; make its statements faster, split it, or \
         raise the policy's attempt_timeout"
    )]
    TimedOut {
        /// The limit.
        after: Duration,
    },
    /// The server ended the session within the transaction, which was rolled back. The same would happen again (for
    /// example by a time limit for idle transactions), so the work ran only once. [`Exhausted::last_error`] and
    /// [`Retry::cause`](crate::retry::Retry::cause) also return this error for an attempt that was run again.
    #[error(transparent)]
    SessionEnded(Box<SessionEnded>),
    /// The closure failed with an error of its own (see [`Error::abort`]), and the transaction was rolled back.
    #[error(transparent)]
    Aborted(Box<dyn StdError + Send + Sync>),
}

/// Whether the work of a failed call may have been committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CommitOutcome {
    /// It was not committed and never will be.
    NotCommitted,
    /// It may or may not have been committed.
    Unknown,
}

impl Error {
    /// Ends a transaction's closure with an error of the application. The transaction is rolled back, and the caller
    /// gets the error as [`Error::Aborted`]. It takes any error, a `String`, an `anyhow::Error` or a `Box<dyn Error>`.
    ///
    /// The work does not run again, except in three cases in which another run helps: the session has ended, the server
    /// has aborted the transaction with a conflict, or the error's source chain holds a database error that a failover
    /// causes.
    ///
    /// ```
    /// use tokio_postgres_failover::Error;
    ///
    /// #[derive(Debug, PartialEq, thiserror::Error)]
    /// #[error("sold out")]
    /// struct SoldOut;
    ///
    /// let error = Error::abort(SoldOut);
    /// assert_eq!(error.downcast_ref::<SoldOut>(), Some(&SoldOut));
    /// assert_eq!(error.downcast::<SoldOut>().unwrap(), SoldOut);
    /// ```
    ///
    /// An `anyhow::Error` or an `eyre::Report` becomes a boxed error here, which hides the type of the error within
    /// unless a context was added. Use [`Error::abort_report`] for those, so that [`Error::downcast_ref`] finds that
    /// error.
    pub fn abort(error: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Aborted(error.into())
    }

    /// The same as [`Error::abort`], for an `anyhow::Error`, an `eyre::Report` or any other type that shows the error
    /// within by `AsRef`. It keeps the type of that error, so that [`Error::downcast_ref`] finds it.
    ///
    /// ```
    /// use tokio_postgres_failover::Error;
    ///
    /// #[derive(Debug, PartialEq, thiserror::Error)]
    /// #[error("sold out")]
    /// struct SoldOut;
    ///
    /// fn buy() -> anyhow::Result<()> {
    ///     Err(SoldOut.into())
    /// }
    ///
    /// let error = buy().map_err(Error::abort_report).unwrap_err();
    /// assert_eq!(error.downcast_ref::<SoldOut>(), Some(&SoldOut));
    /// ```
    pub fn abort_report<R>(report: R) -> Self
    where
        R: AsRef<dyn StdError + Send + Sync> + fmt::Debug + fmt::Display + Send + Sync + 'static,
    {
        Self::Aborted(Box::new(ended::Report(report)))
    }

    /// The closure's own error, or an error in its source chain, if one of them is an `E`.
    #[must_use]
    pub fn downcast_ref<E: StdError + 'static>(&self) -> Option<&E> {
        match self {
            Self::Aborted(source) => links(source.as_ref()).find_map(|link| link.downcast_ref()),
            Self::Exhausted(exhausted) => exhausted.source.downcast_ref(),
            Self::EndedInside(ended) => ended.source.as_ref().and_then(Self::downcast_ref),
            Self::SessionEnded(ended) => ended.last_error().downcast_ref(),
            Self::CommitUnknown(unknown) => match &unknown.doubt {
                WhyInDoubt::Unwatched(error) => error.downcast_ref(),
                _ => None,
            },
            _ => None,
        }
    }

    /// The closure's own error if it is an `E`, and this error unchanged if it is not. An `E` within a source chain
    /// cannot be moved out of it. Use [`Error::downcast_ref`] for that.
    ///
    /// The error also stays unchanged if its [`commit_outcome`](Self::commit_outcome) is unknown, because the own error
    /// alone would not say so.
    pub fn downcast<E: StdError + 'static>(self) -> Result<E, Self> {
        if !self.is_own::<E>() {
            return Err(self);
        }
        match self {
            Self::Aborted(source) => source.downcast().map(|own| *own).map_err(Self::Aborted),
            Self::Exhausted(exhausted) => exhausted.source.downcast(),
            Self::SessionEnded(ended) => ended.into_last_error().downcast(),
            other => Err(other),
        }
    }

    /// Returns whether an `E` can be moved out of it, and nothing but its context is lost by that.
    fn is_own<E: StdError + 'static>(&self) -> bool {
        match self {
            Self::Aborted(source) => source.is::<E>(),
            Self::Exhausted(exhausted) => {
                exhausted.outcome == CommitOutcome::NotCommitted && exhausted.source.is_own::<E>()
            }
            Self::SessionEnded(ended) => ended.last_error().is_own::<E>(),
            _ => false,
        }
    }

    /// Returns whether the work may have been committed. It is meant for the errors of `transaction`, `idempotent` and
    /// `read`.
    #[must_use]
    pub fn commit_outcome(&self) -> CommitOutcome {
        match self {
            Self::CommitUnknown(_) | Self::EndedInside(_) => CommitOutcome::Unknown,
            Self::Exhausted(exhausted) => exhausted.outcome,
            _ => CommitOutcome::NotCommitted,
        }
    }

    /// The SQLSTATE of the database error within this error, if there is one.
    ///
    /// ```
    /// # use tokio_postgres_failover::Error;
    /// assert!(Error::Closed.code().is_none());
    /// ```
    #[must_use]
    pub fn code(&self) -> Option<&tokio_postgres::error::SqlState> {
        match self {
            Self::Database(error) | Self::Ledger(error) => error.code(),
            Self::CommitUnknown(unknown) => match &unknown.doubt {
                WhyInDoubt::Lost(source) => source.0.code(),
                WhyInDoubt::Evicted
                | WhyInDoubt::NotReplicated
                | WhyInDoubt::Incomplete
                | WhyInDoubt::Earlier { .. } => None,
                WhyInDoubt::Unwatched(error) => error.code(),
            },
            Self::Exhausted(exhausted) => exhausted.source.code(),
            Self::EndedInside(ended) => ended.source.as_ref().and_then(Self::code),
            Self::SessionEnded(ended) => Some(ended.report().code()),
            _ => None,
        }
    }
}

impl Error {
    /// The error of a call for which waiting for a primary does not help.
    pub(crate) fn without_primary(none: NoPrimary) -> Self {
        match none {
            NoPrimary::Closed => Self::Closed,
            NoPrimary::RuntimeEnded => Self::RuntimeEnded,
            NoPrimary::Refused(endpoint, failure) => Self::Refused(Box::new(Refused::new(endpoint, failure))),
            NoPrimary::UnknownName(waited, diagnosis) => {
                Self::Unavailable(Box::new(Unavailable::new(waited, diagnosis, Obstacle::NoPrimary, CHECKOUT_TIMEOUT)))
            }
        }
    }

    /// A short name for what failed, for telemetry. There are only a few of these names.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Unavailable(_) => "unavailable",
            Self::Refused(_) => "refused",
            Self::Closed => "closed",
            Self::RuntimeEnded => "runtime_ended",
            Self::Database(error) => without_code(error),
            Self::CommitUnknown(_) => "commit_unknown",
            Self::Ledger(_) => "ledger",
            Self::RolledBack(_) => "rolled_back",
            Self::EndedInside(_) => "ended_inside",
            Self::Exhausted(_) => "exhausted",
            Self::TimedOut { .. } => "timed_out",
            Self::SessionEnded(_) => "session_ended",
            Self::Aborted(_) => "aborted",
            Self::Wrapped => "wrapped",
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unavailable(_) => write!(f, "Unavailable: {self}"),
            Self::Refused(_) => write!(f, "Refused: {self}"),
            Self::Closed => write!(f, "Closed: {self}"),
            Self::RuntimeEnded => write!(f, "RuntimeEnded: {self}"),
            Self::Database(_) => write!(f, "Database: {self}"),
            Self::CommitUnknown(_) => write!(f, "CommitUnknown: {self}"),
            Self::Ledger(_) => write!(f, "Ledger: {self}"),
            Self::RolledBack(_) => write!(f, "RolledBack: {self}"),
            Self::EndedInside(_) => write!(f, "EndedInside: {self}"),
            Self::Exhausted(_) => write!(f, "Exhausted: {self}"),
            Self::TimedOut { .. } => write!(f, "TimedOut: {self}"),
            Self::SessionEnded(_) => write!(f, "SessionEnded: {self}"),
            Self::Wrapped => write!(f, "Wrapped: {self}"),
            // The `Debug` of the caller's own error may say more than its text.
            Self::Aborted(source) => write!(f, "Aborted: {source:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Ending;

    #[derive(Debug, PartialEq, thiserror::Error)]
    #[error("sold out")]
    struct SoldOut;

    /// The own error is the source of another one.
    #[derive(Debug, thiserror::Error)]
    #[error("the order failed")]
    struct Failed(#[source] SoldOut);

    fn exhausted(outcome: CommitOutcome, source: Error) -> Error {
        Error::Exhausted(Box::new(Exhausted::new(2, "for a test".to_owned(), outcome, source)))
    }

    #[test]
    fn an_own_error_that_cannot_be_moved_out_changes_nothing() {
        for own in [|| Error::abort(SoldOut), || Error::abort(Failed(SoldOut))] {
            for error in [
                exhausted(CommitOutcome::Unknown, own()),
                EndedInside::error(Ending::Committed, Some(own())),
                exhausted(CommitOutcome::NotCommitted, Error::abort(Failed(SoldOut))),
            ] {
                assert_eq!(error.downcast_ref::<SoldOut>(), Some(&SoldOut));
                let (text, outcome) = (error.to_string(), error.commit_outcome());
                let error = error.downcast::<SoldOut>().expect_err(&text);
                assert_eq!((error.to_string(), error.commit_outcome()), (text, outcome));
            }
        }
    }

    #[test]
    fn the_own_error_of_a_call_that_was_rolled_back_is_moved_out() {
        assert_eq!(
            exhausted(CommitOutcome::NotCommitted, Error::abort(SoldOut)).downcast::<SoldOut>().unwrap(),
            SoldOut
        );
    }
}
