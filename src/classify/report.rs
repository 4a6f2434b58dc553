//! What a server or a proxy reports: the table of SQLSTATEs.

use tokio_postgres::error::{DbError, Severity, SqlState};

use super::{Verdict, stale_report};

/// What a report says about its session.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    /// The session goes on.
    Error,
    /// FATAL and PANIC: it ends.
    Ends,
    /// Translated, and without the plain copy that servers send since 9.6.
    Unknown,
}

impl Level {
    pub(super) fn of(db: &DbError) -> Self {
        match db.parsed_severity() {
            Some(Severity::Fatal | Severity::Panic) => Self::Ends,
            Some(_) => Self::Error,
            // Poolers send the one field only, and never translate it.
            None => match db.severity() {
                "FATAL" | "PANIC" => Self::Ends,
                "ERROR" => Self::Error,
                _ => Self::Unknown,
            },
        }
    }
}

/// The table of SQLSTATEs. Rows hold at any level unless they say otherwise.
#[expect(clippy::match_same_arms, reason = "one row per code, with its own reason")]
pub(super) fn of_report(db: &DbError, level: Level) -> Verdict {
    let ends = level == Level::Ends;
    match *db.code() {
        // The session goes on, its prepared statements do not.
        _ if !ends && stale_report(db).is_some() => Verdict::Stale,

        // Shutting down, starting up, in recovery, a standby that is not consistent yet.
        SqlState::CANNOT_CONNECT_NOW => Verdict::NotNow,
        // No slot left, for all or for this role or database.
        SqlState::TOO_MANY_CONNECTIONS => Verdict::Full,

        // An INSERT on a standby or under `default_transaction_read_only`, or in the user's own READ ONLY transaction.
        SqlState::READ_ONLY_SQL_TRANSACTION => Verdict::ReadOnly,
        // BEGIN READ WRITE, BEGIN ISOLATION LEVEL SERIALIZABLE on a standby.
        SqlState::FEATURE_NOT_SUPPORTED if hot_standby(db) => Verdict::ReadOnly,
        // Whatever needs a transaction id there and does not ask about recovery first, such as pg_logical_emit_message.
        SqlState::INTERNAL_ERROR if db.routine() == Some("GetNewTransactionId") => Verdict::ReadOnly,
        // Otherwise, while the session ends: start-up parameters or a protocol version the peer does not take.
        SqlState::FEATURE_NOT_SUPPORTED if ends => Verdict::Refused,

        // The connection to a second phase was lost; a middle man's or a foreign server's word.
        SqlState::TRANSACTION_RESOLUTION_UNKNOWN => Verdict::OutcomeUnknown,
        // Named for this by the standard; CockroachDB sends it for an ambiguous commit.
        SqlState::T_R_STATEMENT_COMPLETION_UNKNOWN => Verdict::OutcomeUnknown,

        // pg_terminate_backend, fast shutdown; at ERROR, the same that met a parallel worker of this session.
        SqlState::ADMIN_SHUTDOWN => Verdict::ConnectionLost,
        // Another backend crashed, and the server restarts all.
        SqlState::CRASH_SHUTDOWN => Verdict::ConnectionLost,
        // The session was idle for too long for the server's taste; the next one will do.
        SqlState::IDLE_SESSION_TIMEOUT => Verdict::ConnectionLost,
        // The database was dropped under the session.
        SqlState::DATABASE_DROPPED if ends => Verdict::Refused,

        // A statement that breaks the protocol, such as a wrong number of parameters.
        SqlState::PROTOCOL_VIOLATION if !ends => Verdict::Application,
        // A pooler whose mode knows no transactions: the next one would end the same way.
        SqlState::PROTOCOL_VIOLATION if db.message() == "transaction blocks not allowed in statement pooling mode" => {
            Verdict::Refused
        }
        // Wrong password, no such role, no line in pg_hba.conf.
        SqlState::INVALID_PASSWORD | SqlState::INVALID_AUTHORIZATION_SPECIFICATION if ends => Verdict::Refused,
        // No such database. At ERROR it is a DROP DATABASE's complaint.
        SqlState::INVALID_CATALOG_NAME if ends => Verdict::Refused,

        // Rolled back for another transaction's sake, the session lives. A FATAL one is a standby's recovery conflict.
        SqlState::T_R_SERIALIZATION_FAILURE | SqlState::T_R_DEADLOCK_DETECTED if !ends => Verdict::Conflict,
        SqlState::IN_FAILED_SQL_TRANSACTION => Verdict::Aborted,

        // FATAL, but the closure took too long between two statements, and would again.
        SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT => Verdict::Application,
        _ => match (class(db), level) {
            // `transaction_timeout` (17 and later), of which the driver has no name: as the row above.
            _ if db.code().code() == "25P04" => Verdict::Application,
            // At ERROR with a routine: postgres_fdw or dblink lost *their* server, this session lives. Without one, a
            // proxy lost the server behind it. PgBouncer has FATAL 08P01 for everything that befalls it.
            ("08", Level::Error) if db.routine().is_some() => Verdict::Application,
            ("08", _) => Verdict::ConnectionLost,
            (_, Level::Ends) => Verdict::ConnectionLost,
            (_, Level::Error | Level::Unknown) => Verdict::Application,
        },
    }
}

/// The first two characters of an SQLSTATE.
pub(super) fn class(db: &DbError) -> &str {
    db.code().code().get(..2).unwrap_or_default()
}

/// Whether a "feature not supported" is a standby's refusal of a transaction mode.
///
/// The message may be translated; then the routine tells. Both are raised by hooks of a parameter
/// (`check_transaction_read_only`, `check_XactIsoLevel` in src/backend/commands/variable.c), on whose behalf guc.c
/// reports (seen on 15), and no other hook of these types has this SQLSTATE. The second also comes from
/// src/backend/storage/lmgr/predicate.c.
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

/// `PgBouncer`'s refusals of a login for good. They come under 08P01 like its passing troubles: only the text tells.
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
