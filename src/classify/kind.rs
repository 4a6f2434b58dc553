//! Which kind an error of the driver is.

use tokio_postgres::Error;
use tokio_postgres::error::DbError;

/// The driver's kind of error. The driver keeps it private, so it is read from the text of `Display`. A test pins each
/// text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind<'a> {
    Db(&'a DbError),
    Closed,
    Io,
    Connect,
    Tls,
    Authentication,
    Config,
    ConnectionString,
    Timeout,
    UnexpectedMessage,
    Parse,
    /// Failed conversions, and wrong numbers of rows, columns or parameters.
    Usage,
}

impl<'a> Kind<'a> {
    pub(super) fn of(error: &'a Error) -> Self {
        if let Some(db) = error.as_db_error() {
            return Self::Db(db);
        }
        if error.is_closed() {
            return Self::Closed;
        }
        match error.to_string().as_str() {
            "error communicating with the server" => Self::Io,
            "error connecting to server" => Self::Connect,
            "error performing TLS handshake" => Self::Tls,
            "authentication error" => Self::Authentication,
            "invalid configuration" => Self::Config,
            "invalid connection string" => Self::ConnectionString,
            "timeout waiting for server" => Self::Timeout,
            "unexpected message from server" => Self::UnexpectedMessage,
            "error parsing response from server" => Self::Parse,
            _ => Self::Usage,
        }
    }
}
