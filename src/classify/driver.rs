//! The errors that the driver or the operating system finds and no server reports: lost sockets, malformed bytes, wrong
//! settings.

use std::error::Error as StdError;
use std::io;

use tokio_postgres::Error;

use super::Verdict;
use super::chain::{io_error, links};
use super::kind::Kind;

/// The verdict on an error that no server reported, but the driver or the operating system found.
pub(super) fn of_driver(error: &Error, kind: Kind<'_>) -> Verdict {
    match kind {
        Kind::Closed | Kind::Timeout => Verdict::ConnectionLost,
        // While a session opens, the codec reports malformed bytes as io errors, and only io errors of the system have
        // an OS error number. A message that was cut short has the same kind as a socket that was cut short, so it
        // counts as a lost connection.
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
        // Refused, unreachable, timed out, or no address. A server may answer there next time.
        Kind::Connect => match io_error(error).map(ToString::to_string).as_deref() {
            // The driver reports in these words that `target_session_attrs` was not met.
            Some("database does not allow writes") => Verdict::ReadOnly,
            Some("database is not read only") => Verdict::NotNow,
            _ => Verdict::ConnectionLost,
        },
        Kind::Tls if links(error).any(cut_short) => Verdict::ConnectionLost,
        Kind::Tls | Kind::Authentication | Kind::Config | Kind::ConnectionString => Verdict::Refused,
        // The driver also reports two mistakes of the caller under this kind.
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

/// Returns whether the peer ended an open connection without a message that makes sense.
pub(crate) fn hung_up(error: &Error) -> bool {
    match Kind::of(error) {
        Kind::Closed => true,
        // The codec reports the second one when the bytes before the end were not a whole message.
        Kind::Io => io_error(error).is_some_and(|cause| {
            matches!(cause.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset)
                || cause.to_string() == "bytes remaining on stream"
        }),
        _ => false,
    }
}

/// Returns whether the peer ended the connection in the TLS handshake, without a TLS alert that says why.
pub(crate) fn hung_up_in_handshake(error: &Error) -> bool {
    Kind::of(error) == Kind::Tls && links(error).any(cut_short)
}

/// Returns whether the driver did not expect the server's answer to the statement. This is so for a `COPY` through a
/// method that is not meant for it.
pub(crate) fn unexpected(error: &Error) -> bool {
    Kind::of(error) == Kind::UnexpectedMessage
}

/// A short name for an error without an SQLSTATE, for telemetry. There are only a few of these names.
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
        // An error of the database has an SQLSTATE, so nobody asks for its name.
        Kind::Db(_) => "database",
    }
}

/// Returns whether a handshake failed because the connection was lost, and not because of what the peer said.
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
    // OpenSSL reports an end of file without an io error.
    by_kind || link.to_string().to_ascii_lowercase().contains("unexpected eof")
}

/// Returns whether the text is a TLS alert that our certificate is missing or not accepted, in the words of rustls or
/// OpenSSL.
pub(super) fn certificate_alert(text: &str) -> bool {
    let text = text.to_ascii_lowercase();
    text.contains("alert")
        && ["certificate", "unknownca", "unknown ca", "accessdenied", "access denied"]
            .iter()
            .any(|word| text.contains(word))
}
