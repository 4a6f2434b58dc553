//! Why the addresses of a name could not be found, and which of two failures is reported.

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// Why the addresses of a name could not be found.
///
/// # Examples
/// ```
/// use tokio_postgres_failover::resolve::{FixedResolver, Resolve, ResolveError};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// let resolver = FixedResolver::new([("pg.internal", [[10, 0, 0, 1].into()])]);
/// let error = resolver.resolve("gp.internal").await.unwrap_err();
/// assert!(matches!(error, ResolveError::NotFound { .. }));
/// assert_eq!(error.name(), "gp.internal");
/// # }
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ResolveError {
    /// There is no such name. DNS calls this NXDOMAIN.
    #[non_exhaustive]
    NotFound {
        /// The host that was asked for.
        name: String,
    },
    /// The name exists but has no address.
    #[non_exhaustive]
    NoAddresses {
        /// The host that was asked for.
        name: String,
    },
    /// The name server answered that it could not, or would not, answer the question.
    #[non_exhaustive]
    ServerFailure {
        /// The host that was asked for.
        name: String,
        /// The DNS response code, such as `SERVFAIL` or `REFUSED`.
        code: String,
    },
    /// No name server answered.
    #[non_exhaustive]
    TimedOut {
        /// The host that was asked for.
        name: String,
        /// How long the resolver waited for an answer.
        after: Duration,
    },
    /// There is no name server to ask.
    #[non_exhaustive]
    NoNameServers {
        /// The host that was asked for.
        name: String,
    },
    /// The system's resolver configuration cannot be used.
    #[non_exhaustive]
    NoConfiguration {
        /// The file that was read.
        file: String,
        /// What is wrong with it.
        source: Arc<dyn Error + Send + Sync>,
    },
    /// Anything else, including the failures of your own resolver. See [`ResolveError::custom`].
    #[non_exhaustive]
    Other {
        /// The host that was asked for.
        name: String,
        /// What happened.
        source: Arc<dyn Error + Send + Sync>,
    },
}

impl ResolveError {
    /// Makes the error of your own resolver.
    ///
    /// # Examples
    /// ```
    /// use std::{error::Error, io};
    /// use tokio_postgres_failover::resolve::ResolveError;
    ///
    /// let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
    /// let error = ResolveError::custom("pg.internal", refused);
    /// assert_eq!(error.to_string(), r#"the addresses of "pg.internal" could not be found: connection refused"#);
    /// assert!(error.source().is_some_and(|source| source.is::<io::Error>()));
    ///
    /// let error = ResolveError::custom("pg.internal", "the registry is empty");
    /// assert!(error.to_string().ends_with("the registry is empty"));
    /// ```
    pub fn custom(name: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Other { name: name.into(), source: Arc::from(source.into()) }
    }

    /// The host that was asked for. For [`ResolveError::NoConfiguration`] it is the file.
    ///
    /// # Examples
    /// ```
    /// # use tokio_postgres_failover::resolve::ResolveError;
    /// assert_eq!(ResolveError::custom("pg.internal", "no luck").name(), "pg.internal");
    /// ```
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::NotFound { name }
            | Self::NoAddresses { name }
            | Self::ServerFailure { name, .. }
            | Self::TimedOut { name, .. }
            | Self::NoNameServers { name }
            | Self::Other { name, .. } => name,
            Self::NoConfiguration { file, .. } => file,
        }
    }

    /// Returns whether DNS has answered that there is no address. Every other error leaves the question open.
    pub(crate) fn is_answer(&self) -> bool {
        self.weight() <= 1
    }

    /// Returns the failure that says more about what to repair, or `self` if both say the same.
    pub(crate) fn or_more_telling(self, other: Self) -> Self {
        if other.weight() > self.weight() { other } else { self }
    }

    /// How much a failure says about what to repair. "No such name" says least, because it does not rule out an address
    /// of the other family, or another name of the search list. A server that reports its trouble says more than one
    /// that is silent.
    pub(super) fn weight(&self) -> u8 {
        match self {
            Self::NotFound { .. } => 0,
            Self::NoAddresses { .. } => 1,
            Self::TimedOut { .. } => 2,
            Self::Other { .. } => 3,
            Self::ServerFailure { .. } => 4,
            Self::NoNameServers { .. } | Self::NoConfiguration { .. } => 5,
        }
    }
}

impl fmt::Display for ResolveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound { name } => write!(
                f,
                "there is no name {name:?} (NXDOMAIN): check its spelling, and whether this host asks the name servers \
                 that know it"
            ),
            Self::NoAddresses { name } => write!(
                f,
                "the name {name:?} exists but has neither an A nor an AAAA record: check whether any server is \
                 registered under it"
            ),
            Self::ServerFailure { name, code } => write!(
                f,
                "the name server answered {code} for {name:?}: check its health and whether this host may ask it"
            ),
            Self::TimedOut { name, after } => write!(
                f,
                "no name server answered for {name:?} within {after:.1?}: check the name servers' addresses and the \
                 network towards them"
            ),
            Self::NoNameServers { name } => {
                write!(f, "there is no name server to ask for {name:?}: check the list that was given")
            }
            Self::NoConfiguration { file, source } => write!(
                f,
                "the resolver configuration in {file} cannot be used: {source}; repair it, or give the resolver its \
                 name servers"
            ),
            Self::Other { name, source } => {
                write!(f, "the addresses of {name:?} could not be found: {source}")
            }
        }
    }
}

// This is not derived, because a derived `source` returns the `Arc` itself, and a downcast does not look into it.
impl Error for ResolveError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::NoConfiguration { source, .. } | Self::Other { source, .. } => Some(&**source),
            Self::NotFound { .. }
            | Self::NoAddresses { .. }
            | Self::ServerFailure { .. }
            | Self::TimedOut { .. }
            | Self::NoNameServers { .. } => None,
        }
    }
}
