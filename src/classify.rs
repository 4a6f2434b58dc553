//! Decides what an error of `tokio_postgres` means: it turns an SQLSTATE, a severity, an io error or a closed socket
//! into a [`Verdict`].
//!
//! This module knows nothing of pools and transactions, and does not decide what is done about a verdict. No other
//! module knows SQLSTATEs or kinds of io errors. `classify/report.rs` has the table of SQLSTATEs, `classify/driver.rs`
//! the errors that no server reports, and `classify/chain.rs` walks along the causes of an error.
//!
//! Invariants: every code at every severity has a verdict. [`commit_refused`] is true only for a proof. A code that is
//! not in the table is left to the application, unless the session ended with it. Tests: `classify/tests.rs`.

mod chain;
mod driver;
mod encryption;
mod fatal;
mod kind;
mod report;
mod stale;

pub(crate) use chain::{explain, links, one_line};
pub(crate) use driver::{hung_up, hung_up_in_handshake, unexpected, without_code};
pub(crate) use encryption::{BadCertificate, NO_DIRECT_TLS, NO_TLS, TlsTrouble, tls_trouble};
pub(crate) use fatal::{Recurs, advice, announces_end, ends_session, recurs, verdict_of_end};
pub(crate) use stale::{Cure, may_be_stale, misfits, stale, stale_report};

use std::error::Error as StdError;

use tokio_postgres::Error;
use tokio_postgres::error::{DbError, SqlState};

use chain::Found;
use driver::{certificate_alert, of_driver};
use kind::Kind;
use report::{Level, RAISE, class, of_report, pooler_refuses};

/// What an error means. What to do about it also depends on the work, so other modules decide that.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    /// The session has ended or is about to end, so it cannot be used any more. Other sessions may be well.
    ConnectionLost,
    /// The server answers but accepts no work at the moment, because it starts, stops or recovers.
    NotNow,
    /// The server is well but accepts no more sessions, because it has too many clients.
    Full,
    /// The session cannot write: the server is a standby or a fenced primary, or the transaction is `READ ONLY` itself.
    ReadOnly,
    /// The server rolled the transaction back in favour of another one, so the same work may succeed next time.
    Conflict,
    /// The server, or a proxy in front of it, says that it does not know how the transaction ended.
    OutcomeUnknown,
    /// An earlier error aborted the transaction, and the caller sent another statement nevertheless.
    Aborted,
    /// A prepared statement cannot be used any more, because a table, a type or the session has changed since.
    Stale,
    /// The configuration is wrong: credentials, database name or TLS. Another attempt cannot help.
    Refused,
    /// The peer's bytes make no sense in this protocol. On a session that worked before, the cause can also be a `COPY`
    /// through a method that is not meant for it, because the driver reports both in the same way.
    NotPostgres,
    /// Everything else, which is returned as it is: constraints, syntax, time-outs of statements and transactions,
    /// conversions.
    Application,
}

impl Verdict {
    /// Returns whether the session, or the server behind it, is lost. The client's own session may still be open,
    /// because a proxy can keep it and connect it to another session of a server.
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

/// The verdict on an error that came while a session was being opened.
///
/// It differs from [`classify`] in three points. Any report ends the attempt, whatever its severity is, because proxies
/// use other severities. More codes mean that the user's settings are wrong. A server that rejects our certificate
/// reports it by a TLS alert, which since TLS 1.3 arrives after the end of the handshake on our side.
pub(crate) fn verdict_of_open(error: &Error) -> Verdict {
    match Kind::of(error) {
        Kind::Db(db) => match *db.code() {
            // The server does not accept the options, the role may not connect, or the database accepts no connections.
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
/// It is meant for the errors of a caller's closure, which may hold a database error at any depth.
pub(crate) fn classify_chain(error: &(dyn StdError + 'static)) -> Option<Verdict> {
    links(error).find_map(Found::in_link).map(|found| match found {
        Found::Driver(error) => classify(error),
        Found::Report(report) => classify_report(report),
    })
}

/// What the server reported, taken from the first database error in an error's source chain.
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

/// Returns whether this answer to `COMMIT` proves that the transaction was rolled back, if the server was ready for the
/// next message afterwards. If it does not, the outcome is in doubt.
///
/// A server that fails before it has written the commit record reports an `ERROR` and goes on. If it fails after it has
/// written the record, it may report an `ERROR`, too, but then it ends with a PANIC (`RecordTransactionAbort` in
/// `xact.c`: "cannot abort transaction, it was already committed"). This holds for every code, also if an extension has
/// lost another server, but only for reports of the server itself: a proxy may send the same message when the server
/// behind it is gone. A server names the reporting routine in each of its errors. `PgBouncer`, Pgpool-II, Odyssey and
/// pgcat do not.
pub(crate) fn commit_refused(error: &Error) -> bool {
    let Kind::Db(db) = Kind::of(error) else {
        return false;
    };
    if Level::of(db) != Level::Error {
        return false;
    }
    match *db.code() {
        // These say that the outcome is not known. PostgreSQL itself never means its own transaction by them, but a
        // server that imitates it does, and names a routine, too (CockroachDB).
        SqlState::TRANSACTION_RESOLUTION_UNKNOWN | SqlState::T_R_STATEMENT_COMPLETION_UNKNOWN => {
            db.routine() == Some(RAISE)
        }
        SqlState::T_R_SERIALIZATION_FAILURE | SqlState::T_R_DEADLOCK_DETECTED | SqlState::IN_FAILED_SQL_TRANSACTION => {
            true
        }
        // Integrity constraints. At COMMIT, these are deferred ones. They mean a rollback, whoever reports them.
        _ => class(db) == "23" || db.routine().is_some(),
    }
}

/// Returns whether the server itself reports this, and no proxy.
pub(crate) fn is_the_servers(error: &Error) -> bool {
    matches!(Kind::of(error), Kind::Db(db) if db.routine().is_some())
}

/// Returns whether the check before COMMIT has found another transaction than the pool's, or none. The check then
/// divides by zero, or reads a setting that is empty or unknown.
pub(crate) fn not_ours(error: &Error) -> bool {
    let codes = [SqlState::DIVISION_BY_ZERO, SqlState::INVALID_TEXT_REPRESENTATION, SqlState::UNDEFINED_OBJECT];
    // With `exit_on_error`, the server reports it as FATAL, so the severity is not checked.
    error.code().is_some_and(|code| codes.contains(code))
}

/// Returns whether the server had no transaction to end.
pub(crate) fn no_transaction(error: &Error) -> bool {
    reports(error, &[SqlState::NO_ACTIVE_SQL_TRANSACTION])
}

fn reports(error: &Error, codes: &[SqlState]) -> bool {
    let Kind::Db(db) = Kind::of(error) else {
        return false;
    };
    Level::of(db) == Level::Error && codes.contains(db.code())
}

/// Returns whether the server does not know, or does not permit, what the statement asked for. Managed services take
/// functions away from ordinary roles. This says nothing about the health of the server.
pub(crate) fn not_offered(error: &Error) -> bool {
    let Kind::Db(db) = Kind::of(error) else {
        return false;
    };
    Level::of(db) == Level::Error && matches!(class(db), "42" | "0A")
}

/// Returns whether the server does not know a function: it is older than the function, or only imitates PostgreSQL.
pub(crate) fn lacks_function(error: &Error) -> bool {
    error.code() == Some(&SqlState::UNDEFINED_FUNCTION)
}

/// Returns whether a limit on the time of a statement or transaction ended it, or somebody cancelled it.
/// `transaction_timeout` (17 and later) ends the session too.
pub(crate) fn cut_off(error: &Error) -> bool {
    error.code().is_some_and(|code| *code == SqlState::QUERY_CANCELED || code.code() == "25P04")
}

/// Returns whether the error says that a prepared statement is missing, or is there already. A proxy may give each
/// transaction another session, and `DEALLOCATE ALL` removes every statement.
pub(crate) fn not_prepared(error: &Error) -> bool {
    let codes = [SqlState::INVALID_SQL_STATEMENT_NAME, SqlState::DUPLICATE_PSTATEMENT];
    error.code().is_some_and(|code| codes.contains(code))
}

/// Returns whether the error may be about only one part of what a statement asked for. The server does not offer that
/// part, or it fails each time (a file that cannot be read, an internal error). The other parts may still be answered.
pub(crate) fn about_a_part(error: &Error) -> bool {
    let Kind::Db(db) = Kind::of(error) else {
        return false;
    };
    Level::of(db) == Level::Error && matches!(class(db), "0A" | "22" | "38" | "39" | "42" | "55" | "58" | "P0" | "XX")
}

/// Returns whether the statement called a function that works only on a primary.
pub(crate) fn for_primaries_only(error: &Error) -> bool {
    reports(error, &[SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE])
}

/// Returns whether the server refused the role or its password. Some methods of authentication report a more general
/// code than that of a wrong password. PAM, which RDS uses for its tokens, is one of them.
pub(crate) fn not_let_in(error: &Error) -> bool {
    let codes = [SqlState::INVALID_PASSWORD, SqlState::INVALID_AUTHORIZATION_SPECIFICATION];
    error.code().is_some_and(|code| codes.contains(code))
}

/// Returns whether the server has no database of the name that was asked for.
pub(crate) fn no_such_database(error: &Error) -> bool {
    error.code() == Some(&SqlState::INVALID_CATALOG_NAME)
}

#[cfg(test)]
pub(crate) mod tests;
