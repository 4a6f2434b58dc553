//! The error of a session that its server ended, and the wrapper for a report of `anyhow` or `eyre`.

use std::error::Error as StdError;
use std::fmt;

use tokio_postgres::error::DbError;

use super::Error;
use crate::classify::{advice, one_line};

/// [`Error::SessionEnded`]: what the server said when it ended the session.
#[derive(Debug)]
pub struct SessionEnded {
    report: DbError,
    source: Error,
}

impl SessionEnded {
    pub(crate) fn new(report: DbError, source: Error) -> Self {
        Self { report, source }
    }

    /// The last report of the server, with its SQLSTATE and message.
    #[must_use]
    pub fn report(&self) -> &DbError {
        &self.report
    }

    /// The setting of the server that ended the session, such as `idle_in_transaction_session_timeout`. `None` if no
    /// setting was the reason.
    #[must_use]
    pub fn setting(&self) -> Option<&'static str> {
        advice(&self.report).0
    }

    /// The error of the attempt. Usually it says that the connection is closed, or it is the error that the closure
    /// returned instead.
    #[must_use]
    pub fn last_error(&self) -> &Error {
        &self.source
    }

    pub(super) fn into_last_error(self) -> Error {
        self.source
    }
}

impl fmt::Display for SessionEnded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (severity, code, message) = (self.report.severity(), self.report.code().code(), self.report.message());
        let said = one_line(&format!("{severity} {code}: {message}"));
        write!(f, "the server ended the session, and the transaction was rolled back: {said}; ")?;
        let (setting, what_to_do) = advice(&self.report);
        if let Some(setting) = setting {
            write!(f, "its setting {setting} is behind it: ")?;
        }
        write!(f, "{what_to_do}")?;
        match &self.source {
            Error::Database(_) => Ok(()),
            own => write!(f, "; the closure failed with: {own}"),
        }
    }
}

impl StdError for SessionEnded {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&self.source)
    }
}

/// A report of `anyhow` or `eyre`. Its conversion into a boxed error would hide the error within, so this wrapper shows
/// that error as its source.
pub(super) struct Report<R>(pub(super) R);

impl<R: fmt::Debug> fmt::Debug for Report<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<R: fmt::Display> fmt::Display for Report<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<R> StdError for Report<R>
where
    R: AsRef<dyn StdError + Send + Sync> + fmt::Debug + fmt::Display,
{
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(self.0.as_ref())
    }
}
