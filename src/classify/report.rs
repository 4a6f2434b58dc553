//! The table of SQLSTATEs: what a report of a server or a proxy means.

use tokio_postgres::error::{DbError, Severity, SqlState};

use super::{Verdict, stale_report};

/// What a report says about the session that it came on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    /// The session goes on.
    Error,
    /// The session ends: FATAL or PANIC.
    Ends,
    /// The severity is translated, and the untranslated copy that servers send since 9.6 is missing.
    Unknown,
}

impl Level {
    pub(super) fn of(db: &DbError) -> Self {
        match db.parsed_severity() {
            Some(Severity::Fatal | Severity::Panic) => Self::Ends,
            Some(_) => Self::Error,
            // Poolers send only the field that may be translated, and never translate it.
            None => match db.severity() {
                "FATAL" | "PANIC" => Self::Ends,
                "ERROR" => Self::Error,
                _ => Self::Unknown,
            },
        }
    }
}

/// The routine that reports a RAISE of PL/pgSQL.
pub(super) const RAISE: &str = "exec_stmt_raise";

/// The table of SQLSTATEs. A row holds at any level unless it names one.
#[expect(clippy::match_same_arms, reason = "one row per code, with its own reason")]
pub(super) fn of_report(db: &DbError, level: Level) -> Verdict {
    let ends = level == Level::Ends;
    match *db.code() {
        // The session goes on, but its prepared statements cannot be used any more.
        _ if !ends && stale_report(db).is_some() => Verdict::Stale,
        // The session goes on, and the report is not about its server.
        _ if level == Level::Error && of_another(db) => Verdict::Application,

        // The server shuts down, starts up or recovers, or is a standby that is not consistent yet.
        SqlState::CANNOT_CONNECT_NOW => Verdict::NotNow,
        // No connection slot is free, either in all or for this role or database.
        SqlState::TOO_MANY_CONNECTIONS => Verdict::Full,

        // A write on a standby, under `default_transaction_read_only`, or in a transaction that the user made READ
        // ONLY.
        SqlState::READ_ONLY_SQL_TRANSACTION => Verdict::ReadOnly,
        // BEGIN READ WRITE or BEGIN ISOLATION LEVEL SERIALIZABLE on a standby.
        SqlState::FEATURE_NOT_SUPPORTED if hot_standby(db) => Verdict::ReadOnly,
        // A function that needs a transaction id on a standby and does not check for recovery first, such as
        // pg_logical_emit_message.
        SqlState::INTERNAL_ERROR if db.routine() == Some("GetNewTransactionId") => Verdict::ReadOnly,
        // If the session ends with it, the peer does not accept a start-up parameter or the protocol version.
        SqlState::FEATURE_NOT_SUPPORTED if ends => Verdict::Refused,

        // A proxy or a foreign server lost the connection and does not know how the transaction ended.
        SqlState::TRANSACTION_RESOLUTION_UNKNOWN => Verdict::OutcomeUnknown,
        // The SQL standard has this code for an unknown completion. CockroachDB sends it for an ambiguous commit.
        SqlState::T_R_STATEMENT_COMPLETION_UNKNOWN => Verdict::OutcomeUnknown,

        // pg_terminate_backend or a fast shutdown. At ERROR, the same happened to a parallel worker of this session, or
        // a proxy has lost its server.
        SqlState::ADMIN_SHUTDOWN => Verdict::ConnectionLost,
        // Another backend crashed, so the server restarts all of them.
        SqlState::CRASH_SHUTDOWN => Verdict::ConnectionLost,
        // The session was idle for longer than the server allows. A new session works.
        SqlState::IDLE_SESSION_TIMEOUT => Verdict::ConnectionLost,
        // The database of the session was dropped.
        SqlState::DATABASE_DROPPED if ends => Verdict::Refused,

        // The statement breaks the protocol, for example by a wrong number of parameters.
        SqlState::PROTOCOL_VIOLATION if !ends => Verdict::Application,
        // The mode of the pooler allows no transactions, so the next one would end in the same way.
        SqlState::PROTOCOL_VIOLATION if db.message() == "transaction blocks not allowed in statement pooling mode" => {
            Verdict::Refused
        }
        // The password is wrong, the role does not exist, or pg_hba.conf has no line for it.
        SqlState::INVALID_PASSWORD | SqlState::INVALID_AUTHORIZATION_SPECIFICATION if ends => Verdict::Refused,
        // The database does not exist. At ERROR, it is the answer to a DROP DATABASE.
        SqlState::INVALID_CATALOG_NAME if ends => Verdict::Refused,

        // The transaction was rolled back in favour of another one, and the session goes on. At FATAL, the recovery of
        // a standby was in conflict with the session and ended it.
        SqlState::T_R_SERIALIZATION_FAILURE | SqlState::T_R_DEADLOCK_DETECTED if !ends => Verdict::Conflict,
        SqlState::IN_FAILED_SQL_TRANSACTION => Verdict::Aborted,

        // It is FATAL, but the closure paused for too long between two statements and would do so again.
        SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT => Verdict::Application,
        _ => match (class(db), level) {
            // `transaction_timeout` (17 and later) is like the row above. The driver has no name for its code.
            _ if db.code().code() == "25P04" => Verdict::Application,
            // At ERROR with a routine, postgres_fdw or dblink lost *their* server, and this session goes on. Without a
            // routine, a proxy lost the server behind it. PgBouncer reports FATAL 08P01 for every trouble of its own.
            ("08", Level::Error) if db.routine().is_some() => Verdict::Application,
            ("08", _) => Verdict::ConnectionLost,
            (_, Level::Ends) => Verdict::ConnectionLost,
            (_, Level::Error | Level::Unknown) => Verdict::Application,
        },
    }
}

/// Returns whether a report at ERROR has the code of a server that ends its session or accepts none, or of an unknown
/// end, but is about something else: a function of the user's has raised it ([`RAISE`]), or another server has
/// said it to an extension such as `postgres_fdw` (`pgfdw_report_error`). A server ends its own session with FATAL.
///
/// The end of a parallel worker comes at ERROR, with the routine in which the worker ended (`ThrowErrorData` in
/// elog.c). A proxy names no routine, and means the server behind it. An extension cannot know how a transaction on
/// another server ended, so [`RAISE`] is the only routine that is not believed about that.
fn of_another(db: &DbError) -> bool {
    match *db.code() {
        SqlState::ADMIN_SHUTDOWN
        | SqlState::CRASH_SHUTDOWN
        | SqlState::CANNOT_CONNECT_NOW
        | SqlState::IDLE_SESSION_TIMEOUT
        | SqlState::TOO_MANY_CONNECTIONS => db.routine().is_some_and(|routine| routine != "ProcessInterrupts"),
        SqlState::TRANSACTION_RESOLUTION_UNKNOWN | SqlState::T_R_STATEMENT_COMPLETION_UNKNOWN => {
            db.routine() == Some(RAISE)
        }
        _ => false,
    }
}

/// The first two characters of an SQLSTATE.
pub(super) fn class(db: &DbError) -> &str {
    db.code().code().get(..2).unwrap_or_default()
}

/// Returns whether a "feature not supported" means that a standby refuses a transaction mode.
///
/// The message may be translated, so the routine counts as well. Check hooks of two parameters raise both errors
/// (`check_transaction_read_only` and `check_XactIsoLevel` in src/backend/commands/variable.c), and guc.c reports them
/// under its own routine (seen on 15). No other check hook of these types has this SQLSTATE. The second error also
/// comes from src/backend/storage/lmgr/predicate.c.
pub(super) fn hot_standby(db: &DbError) -> bool {
    matches!(
        db.message(),
        "cannot set transaction read-write mode during recovery" | "cannot use serializable mode in a hot standby"
    ) || matches!(
        db.routine(),
        Some(
            "call_bool_check_hook"
                | "call_enum_check_hook"
                | "check_transaction_read_only"
                | "check_XactReadOnly"
                | "check_XactIsoLevel"
                | "GetSerializableTransactionSnapshot"
        )
    )
}

/// Returns whether `PgBouncer` refuses a log-in for good. It reports temporary troubles under the same code, 08P01, so
/// only the text distinguishes them.
pub(super) fn pooler_refuses(message: &str) -> bool {
    const REFUSALS: [&str; 9] = [
        "auth failed",
        "certificate authentication failed",
        "login rejected",
        "no such database",
        "no such user",
        "password authentication failed",
        "SASL authentication failed",
        "SSL required",
        "unsupported startup parameter",
    ];
    REFUSALS.iter().any(|start| message.starts_with(start))
}
