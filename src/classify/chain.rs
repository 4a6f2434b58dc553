//! The causes of an error: which links its source chain has, where a database error is among them, and all in one line.

use std::error::Error as StdError;
use std::fmt::Write as _;
use std::io;
use std::sync::Arc;

use tokio_postgres::Error;
use tokio_postgres::error::DbError;

use super::driver::Kind;
use super::encryption;

/// A source chain longer than this is a loop, or nobody's.
const LINKS: usize = 16;

/// The error and its causes, from the outside in.
pub(crate) fn links<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |link| (*link).source()).take(LINKS)
}

pub(super) fn io_error(error: &Error) -> Option<&io::Error> {
    links(error).find_map(|link| link.downcast_ref())
}

/// A link of a source chain that is of the database.
pub(super) enum Found<'a> {
    Driver(&'a Error),
    /// What the server said, alone: whoever wraps the driver's error transparently shows no more of it.
    Report(&'a DbError),
}

impl<'a> Found<'a> {
    pub(super) fn in_link(link: &'a (dyn StdError + 'static)) -> Option<Self> {
        database_error(link).map(Self::Driver).or_else(|| link.downcast_ref().map(Self::Report))
    }
}

/// A link that is a database error, or a wrapper that hides one: `source` of these three skips what they hold.
fn database_error<'a>(link: &'a (dyn StdError + 'static)) -> Option<&'a Error> {
    if let Some(boxed) = link.downcast_ref::<Box<Error>>() {
        return Some(boxed);
    }
    if let Some(shared) = link.downcast_ref::<Arc<Error>>() {
        return Some(shared);
    }
    if let Some(cause) = link.downcast_ref::<io::Error>() {
        return cause.get_ref()?.downcast_ref();
    }
    link.downcast_ref()
}

/// The error in one line: what the driver says, the SQLSTATE and message of the server, and the causes.
///
/// `Display` of the driver's error stops at "db error". DETAIL and HINT are left out, as they quote rows, and so is
/// whatever a connection string was misread as, which may be a part of its password.
pub(crate) fn explain(error: &Error) -> String {
    let mut line = match Kind::of(error) {
        Kind::Db(db) => {
            let severity = db.severity();
            format!("{severity} {}: {}", db.code().code(), db.message())
        }
        _ => error.to_string(),
    };
    for cause in links(error).skip(1) {
        let text = cause.to_string();
        let text = encryption::dated(&text).unwrap_or(text);
        let quotes = Kind::of(error) == Kind::ConnectionString && !text.starts_with("invalid value");
        if cause.is::<DbError>() || quotes || line.ends_with(&text) {
            continue;
        }
        // Writing to a String cannot fail.
        let _ = write!(line, ": {text}");
    }
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}
