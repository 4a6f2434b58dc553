//! Walks along the causes of an error: finds the database error among them, and writes all of them in one line.

use std::error::Error as StdError;
use std::fmt::Write as _;
use std::io;
use std::sync::Arc;

use tokio_postgres::Error;
use tokio_postgres::error::DbError;

use super::encryption;
use super::kind::Kind;

/// The most links of a source chain that are looked at. A longer chain is most likely a loop.
const LINKS: usize = 16;

/// The error and its causes, from the outside in.
pub(crate) fn links<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |link| (*link).source()).take(LINKS)
}

pub(super) fn io_error(error: &Error) -> Option<&io::Error> {
    links(error).find_map(|link| link.downcast_ref())
}

/// A database error in a source chain.
pub(super) enum Found<'a> {
    Driver(&'a Error),
    /// The server's report alone. An error that wraps the driver's error transparently shows only this as its source.
    Report(&'a DbError),
}

impl<'a> Found<'a> {
    pub(super) fn in_link(link: &'a (dyn StdError + 'static)) -> Option<Self> {
        database_error(link).map(Self::Driver).or_else(|| link.downcast_ref().map(Self::Report))
    }
}

/// The database error that a link is, or that a wrapper hides. The `source` of these three wrappers skips the error
/// that they hold.
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

/// Writes the error in one line: the driver's text, or the SQLSTATE and message of the server, and then the causes.
///
/// `Display` of the driver's error says only "db error". DETAIL and HINT are left out, because they quote rows. The
/// unknown option of a connection string is left out as well, because it may be a part of a password that was not
/// escaped.
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
    one_line(&line)
}

/// Writes a text that a server may have sent in one line, without anything that would steer a terminal.
pub(crate) fn one_line(text: &str) -> String {
    text.replace(char::is_control, " ").split_whitespace().collect::<Vec<_>>().join(" ")
}
