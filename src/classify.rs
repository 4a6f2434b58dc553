//! Decides what an error of `tokio_postgres` means: SQLSTATE, severity, io error or closed socket → a [`Verdict`].
//! Knows nothing of pools, transactions, and what is done about a verdict. Nothing else knows SQLSTATEs and io kinds.
//! Invariants: total (any code, any severity has a verdict); [`commit_refused`] is true only for a proof;
//! a code that is not in the table is the application's business unless it came with the end of the session.
//! Tests: at the end of this file; each error there is made by a scripted server over an in-memory stream.

mod chain;
mod driver;
mod encryption;
mod fatal;
mod report;
mod stale;

pub(crate) use chain::{explain, links};
pub(crate) use driver::{hung_up, without_code};
pub(crate) use encryption::{BadCertificate, TlsTrouble, tls_trouble};
pub(crate) use fatal::{Recurs, advice, announces_end, ends_session, recurs, verdict_of_end};
pub(crate) use stale::{Cure, may_be_stale, stale, stale_report};

use std::error::Error as StdError;

use tokio_postgres::Error;
use tokio_postgres::error::{DbError, SqlState};

use chain::Found;
use driver::{Kind, certificate_alert, of_driver};
use report::{Level, class, of_report, pooler_refuses};

/// What an error means. What to do about it depends on the work as well, and is decided elsewhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    /// The session is gone, or going: nothing more is to be had from it. Says nothing about other sessions.
    ConnectionLost,
    /// The server is there and takes no work at the moment: starting, stopping, recovering.
    NotNow,
    /// The server is well and takes no more sessions: too many clients.
    Full,
    /// The session cannot write: a standby, a fenced primary, or the transaction's own `READ ONLY`.
    ReadOnly,
    /// The server rolled the transaction back in favour of another one: the same work may succeed next time.
    Conflict,
    /// The server, or something before it, says that it does not know how the transaction ended.
    OutcomeUnknown,
    /// An earlier error ended the transaction, and something went on as if it had not.
    Aborted,
    /// A prepared statement is of no use any more, as a table, a type or the session was changed under it.
    Stale,
    /// Configuration: credentials, database name, TLS. Trying again cannot help.
    Refused,
    /// The peer's bytes make no sense in this protocol. On a session that worked before, also a `COPY`
    /// through a method that is not for it; the driver reports both alike.
    NotPostgres,
    /// All else, returned as it is: constraints, syntax, time-outs of statements and transactions, conversions.
    Application,
}

impl Verdict {
    /// Whether the session, or the server behind it, is lost. A proxy may keep the client's session open, and lead it to
    /// another server session.
    pub(crate) fn is_loss(self) -> bool {
        match self {
            Self::ConnectionLost
            | Self::NotNow
            | Self::Full
            | Self::OutcomeUnknown
            | Self::Refused
            | Self::NotPostgres => true,
            Self::ReadOnly | Self::Conflict | Self::Aborted | Self::Stale | Self::Application => false,
        }
    }
}

/// The verdict on an error of a session that was open.
pub(crate) fn classify(error: &Error) -> Verdict {
    match Kind::of(error) {
        Kind::Db(db) => of_report(db, Level::of(db)),
        kind => of_driver(error, kind),
    }
}

/// The verdict on an error of opening a session.
///
/// It differs from [`classify`] where the moment adds meaning. Any report ends the attempt, whatever severity a proxy
/// gave it; what is wrong with the user's settings comes under more codes; and a server that rejects our certificate
/// says so by a TLS alert which, since TLS 1.3, comes when the handshake is over on our side.
pub(crate) fn verdict_of_open(error: &Error) -> Verdict {
    match Kind::of(error) {
        Kind::Db(db) => match *db.code() {
            // Options that the server does not take, a role that may not connect, a database that takes nobody.
            SqlState::INSUFFICIENT_PRIVILEGE
            | SqlState::UNDEFINED_OBJECT
            | SqlState::INVALID_PARAMETER_VALUE
            | SqlState::SYNTAX_ERROR
            | SqlState::CANT_CHANGE_RUNTIME_PARAM
            | SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE => Verdict::Refused,
            SqlState::PROTOCOL_VIOLATION if pooler_refuses(db.message()) => Verdict::Refused,
            _ => of_report(db, Level::Ends),
        },
        Kind::Io if links(error).any(|link| certificate_alert(&link.to_string())) => Verdict::Refused,
        kind => of_driver(error, kind),
    }
}

/// The verdict on the first database error in an error's source chain, if there is one.
///
/// For errors of the caller's own closure, which may hold a database error at any depth.
pub(crate) fn classify_chain(error: &(dyn StdError + 'static)) -> Option<Verdict> {
    links(error).find_map(Found::in_link).map(|found| match found {
        Found::Driver(error) => classify(error),
        Found::Report(report) => classify_report(report),
    })
}

/// What the server reported, by the first database error in an error's source chain.
pub(crate) fn report_in_chain<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a DbError> {
    match links(error).find_map(Found::in_link)? {
        Found::Driver(error) => error.as_db_error(),
        Found::Report(report) => Some(report),
    }
}

/// The verdict on what the server reported in a session that was open.
pub(crate) fn classify_report(report: &DbError) -> Verdict {
    of_report(report, Level::of(report))
}

/// Whether this answer to `COMMIT` proves that the transaction was rolled back. If not, its outcome is in doubt.
///
/// The server can report an `ERROR` only before the commit record is written; from there on any failure is a PANIC.
/// But that holds for its own word, and a proxy uses the same message for "the server behind me is gone".
/// A server names the routine that reports, in each of its errors; proxies do not.
pub(crate) fn commit_refused(error: &Error) -> bool {
    let Kind::Db(db) = Kind::of(error) else {
        return false;
    };
    if Level::of(db) != Level::Error {
        return false;
    }
    match class(db) {
        // "Connection exception", the unknown resolution (08007) among them: of whose connection, nobody can tell.
        "08" => false,
        // Integrity constraints, deferred ones here: a rollback whoever says so.
        "23" => true,
        _ => match *db.code() {
            SqlState::T_R_STATEMENT_COMPLETION_UNKNOWN
            | SqlState::ADMIN_SHUTDOWN
            | SqlState::CRASH_SHUTDOWN
            | SqlState::CANNOT_CONNECT_NOW => false,
            SqlState::T_R_SERIALIZATION_FAILURE
            | SqlState::T_R_DEADLOCK_DETECTED
            | SqlState::IN_FAILED_SQL_TRANSACTION => true,
            _ => db.routine().is_some(),
        },
    }
}

/// Whether the statement that looks for the pool's own transaction, before COMMIT, has found another one, or none: it divides
/// by zero then, or reads a setting that is empty or unknown.
pub(crate) fn not_ours(error: &Error) -> bool {
    let codes = [SqlState::DIVISION_BY_ZERO, SqlState::INVALID_TEXT_REPRESENTATION, SqlState::UNDEFINED_OBJECT];
    reports(error, &codes)
}

/// Whether the server had no transaction to end.
pub(crate) fn no_transaction(error: &Error) -> bool {
    reports(error, &[SqlState::NO_ACTIVE_SQL_TRANSACTION])
}

fn reports(error: &Error, codes: &[SqlState]) -> bool {
    let Kind::Db(db) = Kind::of(error) else {
        return false;
    };
    Level::of(db) == Level::Error && codes.contains(db.code())
}

/// Whether the server does not know, or does not permit, what the statement asked for: managed services take functions
/// away from ordinary roles. Says nothing about its health.
pub(crate) fn not_offered(error: &Error) -> bool {
    let Kind::Db(db) = Kind::of(error) else {
        return false;
    };
    Level::of(db) == Level::Error && matches!(class(db), "42" | "0A")
}

/// Whether the error may be about one part of what a statement asked for, so that the others can be had: it is not offered, or it
/// fails each time (a file that cannot be read, an internal error).
pub(crate) fn about_a_part(error: &Error) -> bool {
    let Kind::Db(db) = Kind::of(error) else {
        return false;
    };
    Level::of(db) == Level::Error && matches!(class(db), "0A" | "22" | "38" | "39" | "42" | "55" | "58" | "P0" | "XX")
}

/// Whether a function was asked that a standby does not answer.
pub(crate) fn for_primaries_only(error: &Error) -> bool {
    reports(error, &[SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE])
}

/// Whether the server refused the role or its password. Not all ways to authenticate have the code of a wrong password:
/// PAM, by which RDS takes its tokens, has the more general one.
pub(crate) fn not_let_in(error: &Error) -> bool {
    let codes = [SqlState::INVALID_PASSWORD, SqlState::INVALID_AUTHORIZATION_SPECIFICATION];
    error.code().is_some_and(|code| codes.contains(code))
}

#[cfg(test)]
pub(crate) mod tests;
