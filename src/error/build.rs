//! The error of a configuration that no pool can be built from.

use std::fmt;

use crate::classify::explain;

/// A configuration that no pool can be built from.
///
/// Its `Debug` shows the same text as its `Display`, as for [`Error`](super::Error).
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The connection string cannot be parsed. Holds the driver's text, without anything that may be a part of a
    /// password.
    #[error(
        "{}; expected postgres://user:password@host:port/database?option=value or `host=… user=…`, with \
         tokio-postgres' options, and with `?`, `@`, `/`, `#` and `%` in a password written as %3F, %40, %2F, %23 and \
         %25",
        .0
    )]
    Url(String),
    /// There is no host to connect to.
    #[error("no host: name at least one server or DNS name, as in postgres://app@my-pg.internal/app")]
    NoHost,
    /// A value cannot be used.
    #[error("{option}: {problem}")]
    Invalid {
        /// The option of the connection string, or the method of the builder.
        option: &'static str,
        /// What is wrong and what to do.
        problem: String,
    },
    /// An option asks for TLS, and nothing can do it: neither this crate's feature `rustls` nor a connector.
    ///
    /// # Examples
    /// A program that is configured by its environment says it in words of its own:
    /// ```
    /// use tokio_postgres_failover::BuildError;
    ///
    /// fn explain(error: &BuildError) -> String {
    ///     match error {
    ///         BuildError::NoTls { option } => format!("{option} needs TLS, and this program was built without it"),
    ///         other => other.to_string(),
    ///     }
    /// }
    ///
    /// assert!(explain(&BuildError::NoHost).starts_with("no host"));
    /// ```
    #[error(
        "{option}: TLS is asked for; enable this crate's feature `rustls`, or give a connector with `PoolBuilder::tls`"
    )]
    NoTls {
        /// The option of the connection string.
        option: &'static str,
    },
    /// The system's resolver configuration cannot be read.
    #[error("the resolver cannot be set up: {0}; give the name servers with `PoolBuilder::dns_servers`")]
    Resolver(#[source] crate::resolve::ResolveError),
    /// `build` was called outside a tokio runtime.
    #[error("no tokio runtime: call `build` from within one, as in #[tokio::main]")]
    NoRuntime,
    /// `build` was called on a tokio runtime that was built without timers, or without sockets.
    #[error("the tokio runtime lacks what a pool needs; call `{lacks}`, or `enable_all`, on its builder")]
    #[non_exhaustive]
    Runtime {
        /// The method of [`tokio::runtime::Builder`] that enables what is missing.
        lacks: &'static str,
    },
}

impl fmt::Debug for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(_) => write!(f, "Url: {self}"),
            Self::NoHost => write!(f, "NoHost: {self}"),
            Self::Invalid { .. } => write!(f, "Invalid: {self}"),
            Self::NoTls { .. } => write!(f, "NoTls: {self}"),
            Self::Resolver(_) => write!(f, "Resolver: {self}"),
            Self::NoRuntime => write!(f, "NoRuntime: {self}"),
            Self::Runtime { .. } => write!(f, "Runtime: {self}"),
        }
    }
}

impl BuildError {
    /// `hint` says what to change, by what the driver has told.
    pub(crate) fn url(error: &tokio_postgres::Error, hint: impl FnOnce(&str) -> Option<String>) -> Self {
        let what = explain(error);
        Self::Url(hint(&what).map_or(what.clone(), |hint| format!("{what}: {hint}")))
    }

    pub(crate) fn invalid(option: &'static str, problem: impl Into<String>) -> Self {
        Self::Invalid { option, problem: problem.into() }
    }
}
