//! Errors that the driver or the operating system finds, and no server reports: lost sockets, malformed bytes, settings.

use std::error::Error as StdError;
use std::io;

use tokio_postgres::Error;
use tokio_postgres::error::DbError;

use super::Verdict;
use super::chain::{io_error, links};

/// The driver's kind of error, which is private there: read from the texts of its `Display`, each pinned by a test.
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
    /// Conversions, wrong numbers of rows, columns, parameters.
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

/// The verdict on what is not a report of the server: found by the driver or the operating system.
pub(super) fn of_driver(error: &Error, kind: Kind<'_>) -> Verdict {
    match kind {
        Kind::Closed | Kind::Timeout => Verdict::ConnectionLost,
        // The codec's own complaints about malformed bytes are io errors while a session opens; the system's have a
        // number. A message cut short has the same kind as a socket cut short, so it counts as that.
        Kind::Io => match io_error(error) {
            Some(cause) if certificate_alert(&cause.to_string()) => Verdict::ConnectionLost,
            Some(cause)
                if cause.raw_os_error().is_none()
                    && matches!(cause.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData) =>
            {
                Verdict::NotPostgres
            }
            _ => Verdict::ConnectionLost,
        },
        // Refused, unreachable, timed out, no address: a server may be there next time.
        Kind::Connect => match io_error(error).map(ToString::to_string).as_deref() {
            // How the driver says that `target_session_attrs` was not met.
            Some("database does not allow writes") => Verdict::ReadOnly,
            Some("database is not read only") => Verdict::NotNow,
            _ => Verdict::ConnectionLost,
        },
        Kind::Tls if links(error).any(cut_short) => Verdict::ConnectionLost,
        Kind::Tls | Kind::Authentication | Kind::Config | Kind::ConnectionString => Verdict::Refused,
        // The driver files two mistakes of the caller's here.
        Kind::Parse
            if io_error(error).is_some_and(|cause| {
                matches!(cause.to_string().as_str(), "string contains embedded null" | "value too large to transmit")
            }) =>
        {
            Verdict::Application
        }
        Kind::UnexpectedMessage | Kind::Parse => Verdict::NotPostgres,
        Kind::Usage | Kind::Db(_) => Verdict::Application,
    }
}

/// Whether the peer ended an open connection without a word that makes sense.
pub(crate) fn hung_up(error: &Error) -> bool {
    match Kind::of(error) {
        Kind::Closed => true,
        // The second is of the codec: what came before the end was no whole message.
        Kind::Io => io_error(error).is_some_and(|cause| {
            matches!(cause.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset)
                || cause.to_string() == "bytes remaining on stream"
        }),
        _ => false,
    }
}

/// A name for an error without an SQLSTATE, of a handful: for telemetry.
pub(crate) fn without_code(error: &Error) -> &'static str {
    match Kind::of(error) {
        Kind::Closed | Kind::Io => match of_driver(error, Kind::of(error)) {
            Verdict::NotPostgres => "protocol",
            _ => "connection_lost",
        },
        Kind::Connect => "connect",
        Kind::Timeout => "timed_out",
        Kind::Tls => "tls",
        Kind::Authentication => "authentication",
        Kind::Config | Kind::ConnectionString => "configuration",
        Kind::UnexpectedMessage => "protocol",
        Kind::Parse => match of_driver(error, Kind::Parse) {
            Verdict::Application => "usage",
            _ => "protocol",
        },
        Kind::Usage => "usage",
        // It has one.
        Kind::Db(_) => "database",
    }
}

/// Whether a handshake failed for want of a peer and not for what the peer said.
pub(super) fn cut_short(link: &(dyn StdError + 'static)) -> bool {
    let by_kind = link.downcast_ref::<io::Error>().is_some_and(|cause| {
        matches!(
            cause.kind(),
            io::ErrorKind::UnexpectedEof
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::BrokenPipe
                | io::ErrorKind::NotConnected
                | io::ErrorKind::TimedOut
                | io::ErrorKind::HostUnreachable
                | io::ErrorKind::NetworkUnreachable
        )
    });
    // OpenSSL has an end of file without an io error.
    by_kind || link.to_string().to_ascii_lowercase().contains("unexpected eof")
}

/// Whether the text is a TLS alert about our certificate, or the lack of one, in the words of rustls or OpenSSL.
pub(super) fn certificate_alert(text: &str) -> bool {
    let text = text.to_ascii_lowercase();
    text.contains("alert")
        && ["certificate", "unknownca", "unknown ca", "accessdenied", "access denied"]
            .iter()
            .any(|word| text.contains(word))
}
