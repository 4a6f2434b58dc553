//! The errors of a session whose prepared statements cannot be used any more, because a table, a type or the session
//! itself has changed since they were prepared.

use std::error::Error as StdError;

use tokio_postgres::Error;
use tokio_postgres::error::{DbError, SqlState};
use tokio_postgres::types::WrongType;

use super::{Kind, links};

/// How to repair a session whose prepared statements cannot be used any more.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Cure {
    /// Prepare the statements again, and make the driver read the types again.
    Clear,
    /// Close the session. The server has forgotten its statements, including the driver's own, and those cannot be
    /// cleared in the driver.
    Close,
}

/// Returns the cure if the error says that a prepared statement cannot be used any more. The same work succeeds on a
/// session without that statement.
pub(crate) fn stale(error: &Error) -> Option<Cure> {
    match Kind::of(error) {
        Kind::Db(db) => stale_report(db),
        _ if misfits(error) => Some(Cure::Clear),
        // A type that the driver has cached may have changed, and the program's own conversion may say so in its own
        // words.
        Kind::Usage if error.to_string().starts_with("error serializing parameter") => Some(Cure::Clear),
        _ => None,
    }
}

/// Returns whether the error, or one of its causes, says that a Rust type does not take the type of a parameter or a
/// column. The driver may have read that type before it was changed: for instance, it does not know a new label of an
/// enum. The error can be a mistake in the program as well. A NULL never causes it.
///
/// An error that wraps the driver's error transparently shows only the cause of that error. So this looks for the cause
/// alone.
pub(crate) fn misfits(error: &(dyn StdError + 'static)) -> bool {
    links(error).any(<dyn StdError>::is::<WrongType>)
}

/// The same as [`stale`], for a report of the server.
pub(crate) fn stale_report(db: &DbError) -> Option<Cure> {
    match *db.code() {
        // `RevalidateCachedQuery` in plancache.c. The message may be translated, and a proxy may leave out the routine.
        SqlState::FEATURE_NOT_SUPPORTED
            if db.routine() == Some("RevalidateCachedQuery")
                || db.message() == "cached plan must not change result type" =>
        {
            Some(Cure::Clear)
        }
        // The session ran DISCARD ALL or DEALLOCATE ALL, or a pooler moved it to another session of the server. That
        // one may also have a statement of the same name from another client.
        SqlState::INVALID_SQL_STATEMENT_NAME | SqlState::DUPLICATE_PSTATEMENT => Some(Cure::Close),
        // PgBouncer reports the same in these words.
        SqlState::PROTOCOL_VIOLATION if db.message().starts_with("prepared statement did not exist") => {
            Some(Cure::Close)
        }
        // A type, function or relation was dropped, or dropped and created again, between prepare and execution.
        // Messages of `elog` are never translated.
        SqlState::INTERNAL_ERROR
            if db.message().starts_with("cache lookup failed for ")
                || db.message().starts_with("could not open relation with OID ") =>
        {
            Some(Cure::Clear)
        }
        SqlState::UNDEFINED_OBJECT if db.message().starts_with("type with OID ") => Some(Cure::Clear),
        _ => None,
    }
}

/// Returns whether the error may come from a statement that was prepared before the type of a column or a parameter was
/// changed. The server analyses such a statement again, with the types that its parameters had before. The same error
/// can be a mistake in the statement, so it counts only on a session that has statements from an earlier time.
pub(crate) fn may_be_stale(db: &DbError) -> bool {
    matches!(
        *db.code(),
        SqlState::DATATYPE_MISMATCH
            | SqlState::UNDEFINED_FUNCTION
            | SqlState::AMBIGUOUS_FUNCTION
            | SqlState::AMBIGUOUS_PARAMETER
            | SqlState::INDETERMINATE_DATATYPE
            | SqlState::CANNOT_COERCE
            | SqlState::INVALID_BINARY_REPRESENTATION
    )
}
