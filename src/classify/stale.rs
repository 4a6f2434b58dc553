//! Errors of a session whose prepared statements are not what they were: a table, a type or the session itself was changed
//! under them.

use tokio_postgres::Error;
use tokio_postgres::error::{DbError, SqlState};

use super::Kind;

/// What mends a session whose prepared statements are of no use any more.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Cure {
    /// They have to be prepared anew, and the types that the driver has read about are to be read again.
    Clear,
    /// The server does not know them any more, those of the driver itself included, which nobody can clear.
    Close,
}

/// Whether the error says that a prepared statement is of no use any more. The same work on a session without one succeeds.
pub(crate) fn stale(error: &Error) -> Option<Cure> {
    match Kind::of(error) {
        Kind::Db(db) => stale_report(db),
        // A type that the driver has read about may be another one by now. It says nothing about the statement, so the work
        // is not run again for it.
        Kind::Usage if error.to_string().starts_with("error serializing parameter") => Some(Cure::Clear),
        _ => None,
    }
}

/// As [`stale`], for what the server said.
pub(crate) fn stale_report(db: &DbError) -> Option<Cure> {
    match *db.code() {
        // `RevalidateCachedQuery` in plancache.c; the message may be translated, and the routine may be left out by a proxy.
        SqlState::FEATURE_NOT_SUPPORTED
            if db.routine() == Some("RevalidateCachedQuery")
                || db.message() == "cached plan must not change result type" =>
        {
            Some(Cure::Clear)
        }
        // After DISCARD ALL or DEALLOCATE ALL, or behind a pooler on another server's session, which may also have one of this
        // name from another client.
        SqlState::INVALID_SQL_STATEMENT_NAME | SqlState::DUPLICATE_PSTATEMENT => Some(Cure::Close),
        // PgBouncer's word for the same.
        SqlState::PROTOCOL_VIOLATION if db.message().starts_with("prepared statement did not exist") => {
            Some(Cure::Close)
        }
        // A type, function or relation was dropped, or made anew, between preparing and running. `elog` is never translated.
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

/// Whether it may be the effect of a statement that was prepared before a type of a column or a parameter was changed: the
/// server analyses such a statement again, with the types that its parameters had then. As likely a mistake in the statement,
/// so it counts on a session alone that has statements of an earlier time.
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
