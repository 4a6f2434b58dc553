//! Why a benchmark cannot be run.

use std::path::PathBuf;

/// What stops the whole run. What stops one peer alone is a note in the report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A variable of the environment.
    #[error("{name}={value}: say {wanted}")]
    Setting {
        /// The variable.
        name: String,
        /// What it was.
        value: String,
        /// What it may be.
        wanted: String,
    },
    /// A file that cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A results file that is not one.
    #[error("{path} holds no results; remove it and measure again: {source}")]
    Results {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// A server that did not do as it was told.
    #[error("a server failed: {0}")]
    Server(#[from] tokio_postgres::Error),
    /// A program that could not be run.
    #[error("{what}: {source}")]
    Program {
        /// Which one, and what for.
        what: String,
        /// Why.
        source: std::io::Error,
    },
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// A variable, or a word of the command line, that says nothing known.
    pub fn setting(name: &str, value: &str, wanted: &str) -> Self {
        Self::Setting { name: name.to_owned(), value: value.to_owned(), wanted: wanted.to_owned() }
    }

    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }
}
