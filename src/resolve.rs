//! What a host name means right now.
//!
//! Decides which words there are for the addresses of a name, and which of two failures is the one to report.
//! Knows nothing of DNS servers, sockets and clocks: those are behind [`Resolve`], of which `resolve/hickory.rs` is
//! the one that asks DNS. Nothing here or there keeps an answer: an address is only a candidate that a probe has yet
//! to confirm, and the address that was right a second ago is the wrong one after a failover.

use std::{
    collections::{HashMap, HashSet},
    error::Error,
    fmt,
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

mod hickory;
mod system;

pub use hickory::HickoryResolver;
pub(crate) use system::is_scoped;

/// A boxed future that can be sent to another thread, as [`Resolve`] returns it.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Finds the addresses of a host name.
///
/// The pool asks at each search for the primary and at each patrol, so an implementation is free of two duties: it
/// needs no cache, and **must not have one** (a cached address is how a client stays on a dead primary), and it need
/// not check whether a server answers at an address. It should give up by itself after a second or two; the pool goes
/// on with the servers it has seen before, and reports the failure.
///
/// [`HickoryResolver`] asks DNS and is the default; [`FixedResolver`] is for addresses that are known beforehand.
///
/// # Examples
/// Members of a cluster from a service registry:
/// ```
/// use std::{net::IpAddr, pin::Pin};
/// use tokio_postgres_failover::{Addresses, Resolve, ResolveError};
///
/// struct Registry { /* a client of the registry */ }
///
/// impl Registry {
///     async fn members(&self, service: &str) -> std::io::Result<Vec<IpAddr>> {
///         # let _ = service;
///         Ok(vec![IpAddr::from([10, 0, 0, 7])])
///     }
/// }
///
/// impl Resolve for Registry {
///     fn resolve<'a>(
///         &'a self,
///         host: &'a str,
///     ) -> Pin<Box<dyn Future<Output = Result<Addresses, ResolveError>> + Send + 'a>> {
///         Box::pin(async move {
///             match self.members(host).await {
///                 Ok(members) => Ok(Addresses::new(members)),
///                 Err(error) => Err(ResolveError::custom(host, error)),
///             }
///         })
///     }
/// }
/// ```
pub trait Resolve: Send + Sync + 'static {
    /// The addresses of `host`, as they are now.
    ///
    /// `host` is what the connection string says: a name, with or without a trailing dot, or an IP address, which
    /// stands for itself. An `Ok` without an address counts as [`ResolveError::NoAddresses`].
    fn resolve<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Addresses, ResolveError>>;
}

/// One resolver for many pools, or one that a test goes on steering.
impl<R: Resolve + ?Sized> Resolve for Arc<R> {
    fn resolve<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Addresses, ResolveError>> {
        (**self).resolve(host)
    }
}

/// The addresses of one name: each of them once, in the order in which they were given.
///
/// # Examples
/// ```
/// use std::net::IpAddr;
/// use tokio_postgres_failover::Addresses;
///
/// let (one, two) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
/// let addresses = Addresses::new([two, one, two]);
/// assert_eq!(addresses.iter().collect::<Vec<_>>(), [two, one]);
/// ```
#[derive(Clone, Debug, Default)]
pub struct Addresses {
    addresses: Vec<IpAddr>,
    partial: Option<ResolveError>,
}

impl Addresses {
    /// These addresses, without the ones that occur again.
    ///
    /// # Examples
    /// ```
    /// # use std::net::IpAddr;
    /// # use tokio_postgres_failover::Addresses;
    /// assert!(Addresses::new([]).is_empty());
    /// assert_eq!(Addresses::new([IpAddr::from([127, 0, 0, 1]); 3]).len(), 1);
    /// ```
    #[must_use]
    pub fn new(addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        let mut seen = HashSet::new();
        Self { addresses: addresses.into_iter().filter(|address| seen.insert(*address)).collect(), partial: None }
    }

    /// The same addresses, with the note that this part of the question failed.
    ///
    /// # Examples
    /// ```
    /// # use std::net::IpAddr;
    /// # use tokio_postgres_failover::{Addresses, ResolveError};
    /// let addresses = Addresses::new([IpAddr::from([10, 0, 0, 1])])
    ///     .with_partial(ResolveError::custom("pg.internal", "the second registry is down"));
    /// assert!(addresses.partial().is_some());
    /// ```
    #[must_use]
    pub fn with_partial(mut self, failure: ResolveError) -> Self {
        self.partial = Some(failure);
        self
    }

    /// What failed while these addresses were found: there may be more of them.
    ///
    /// Set when one address family (A, AAAA) was answered and the other was not. An answer that there is no address of
    /// a family is no failure.
    ///
    /// # Examples
    /// ```
    /// # use tokio_postgres_failover::Addresses;
    /// assert!(Addresses::new([[10, 0, 0, 1].into()]).partial().is_none());
    /// ```
    #[must_use]
    pub fn partial(&self) -> Option<&ResolveError> {
        self.partial.as_ref()
    }

    /// The addresses, in order.
    ///
    /// # Examples
    /// ```
    /// # use tokio_postgres_failover::Addresses;
    /// let addresses = Addresses::new([[10, 0, 0, 1].into()]);
    /// assert!(addresses.iter().all(|address| address.is_ipv4()));
    /// ```
    #[must_use]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = IpAddr> + '_ {
        self.addresses.iter().copied()
    }

    /// How many there are.
    ///
    /// # Examples
    /// ```
    /// # use tokio_postgres_failover::Addresses;
    /// assert_eq!(Addresses::new([[10, 0, 0, 1].into(), [10, 0, 0, 2].into()]).len(), 2);
    /// ```
    #[must_use]
    pub fn len(&self) -> usize {
        self.addresses.len()
    }

    /// Whether there is none.
    ///
    /// # Examples
    /// ```
    /// # use tokio_postgres_failover::Addresses;
    /// assert!(Addresses::default().is_empty());
    /// ```
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }

    /// The address that `host` stands for when it is one itself: there is nothing to resolve then.
    pub(crate) fn literal(host: &str) -> Option<Self> {
        host.parse().ok().map(|address: IpAddr| Self::new([address]))
    }

    /// One answer from those of the two address families, each of them asked on its own.
    ///
    /// A family that has no addresses takes nothing away from the other one. A family that failed is not forgotten
    /// because the other answered; and when there are no addresses at all, a failure is reported before an answer
    /// that says "none": the name may well have addresses that nobody could tell.
    pub(crate) fn merge(
        one: Result<Self, ResolveError>,
        other: Result<Self, ResolveError>,
    ) -> Result<Self, ResolveError> {
        match (one, other) {
            (Ok(one), Ok(other)) => Ok(Self {
                partial: one.partial.clone().or_else(|| other.partial.clone()),
                ..Self::new(one.into_iter().chain(other))
            }),
            (Ok(found), Err(error)) | (Err(error), Ok(found)) if error.is_answer() => Ok(found),
            (Ok(found), Err(failure)) | (Err(failure), Ok(found)) => Ok(found.with_partial(failure)),
            (Err(one), Err(other)) => Err(one.or_more_telling(other)),
        }
    }
}

impl IntoIterator for Addresses {
    type Item = IpAddr;
    type IntoIter = std::vec::IntoIter<IpAddr>;

    fn into_iter(self) -> Self::IntoIter {
        self.addresses.into_iter()
    }
}

impl<'a> IntoIterator for &'a Addresses {
    type Item = IpAddr;
    type IntoIter = std::iter::Copied<std::slice::Iter<'a, IpAddr>>;

    fn into_iter(self) -> Self::IntoIter {
        self.addresses.iter().copied()
    }
}

impl FromIterator<IpAddr> for Addresses {
    fn from_iter<I: IntoIterator<Item = IpAddr>>(addresses: I) -> Self {
        Self::new(addresses)
    }
}

/// Why a name gave no addresses.
///
/// # Examples
/// ```
/// use tokio_postgres_failover::{FixedResolver, Resolve, ResolveError};
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
    /// There is no such name; DNS calls it NXDOMAIN.
    #[non_exhaustive]
    NotFound {
        /// The host that was asked for.
        name: String,
    },
    /// The name exists, and has no address.
    #[non_exhaustive]
    NoAddresses {
        /// The host that was asked for.
        name: String,
    },
    /// The name server answered that it could not, or would not, say.
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
        /// How long an answer was waited for.
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
    /// Anything else, among it the failures of a resolver of your own: see [`ResolveError::custom`].
    #[non_exhaustive]
    Other {
        /// The host that was asked for.
        name: String,
        /// What happened.
        source: Arc<dyn Error + Send + Sync>,
    },
}

impl ResolveError {
    /// The failure of a resolver of your own.
    ///
    /// # Examples
    /// ```
    /// use std::{error::Error, io};
    /// use tokio_postgres_failover::ResolveError;
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

    /// The host that was asked for; for [`ResolveError::NoConfiguration`], the file.
    ///
    /// # Examples
    /// ```
    /// # use tokio_postgres_failover::ResolveError;
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

    /// Whether somebody who should know has said that there is no address. All else leaves the question open.
    pub(crate) fn is_answer(&self) -> bool {
        self.weight() <= 1
    }

    /// The one of two failures that says more about what to repair; this one when they weigh the same.
    pub(crate) fn or_more_telling(self, other: Self) -> Self {
        if other.weight() > self.weight() { other } else { self }
    }

    /// "No such name" says least: a name with an address of the other family, or one further down the search list, is
    /// not touched by it. A server that speaks up about its trouble says more than one that is silent.
    fn weight(&self) -> u8 {
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

// By hand, since a derived `source` would hand out the `Arc` itself, which no downcast sees through.
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

/// Knows the addresses of some names beforehand and asks nobody.
///
/// For clusters whose members have fixed addresses, and for tests. Names are compared as DNS does: upper and lower case
/// are the same, and so is a trailing dot. A name that was not given is [`ResolveError::NotFound`].
///
/// # Examples
/// ```
/// use tokio_postgres_failover::{FixedResolver, Resolve};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let resolver = FixedResolver::new([("pg.internal", vec!["10.0.0.1".parse()?, "fdaa::2".parse()?])]);
/// assert_eq!(resolver.resolve("PG.internal.").await?.len(), 2);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, Default)]
pub struct FixedResolver {
    names: HashMap<String, Addresses>,
}

impl FixedResolver {
    /// These names with these addresses. A name that is given twice has the addresses of both.
    ///
    /// # Examples
    /// ```
    /// # use tokio_postgres_failover::FixedResolver;
    /// let resolver = FixedResolver::new([
    ///     ("orders.internal", [[10, 0, 0, 1].into(), [10, 0, 0, 2].into()]),
    ///     ("people.internal", [[10, 0, 1, 1].into(), [10, 0, 1, 2].into()]),
    /// ]);
    /// ```
    pub fn new<N, A>(names: impl IntoIterator<Item = (N, A)>) -> Self
    where
        N: AsRef<str>,
        A: IntoIterator<Item = IpAddr>,
    {
        let mut known: HashMap<String, Vec<IpAddr>> = HashMap::new();
        for (name, addresses) in names {
            known.entry(Self::key(name.as_ref())).or_default().extend(addresses);
        }
        Self { names: known.into_iter().map(|(name, addresses)| (name, Addresses::new(addresses))).collect() }
    }

    fn key(name: &str) -> String {
        name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
    }

    fn look_up(&self, host: &str) -> Result<Addresses, ResolveError> {
        if let Some(itself) = Addresses::literal(host) {
            return Ok(itself);
        }
        match self.names.get(&Self::key(host)) {
            Some(addresses) if addresses.is_empty() => Err(ResolveError::NoAddresses { name: host.to_owned() }),
            Some(addresses) => Ok(addresses.clone()),
            None => Err(ResolveError::NotFound { name: host.to_owned() }),
        }
    }
}

impl Resolve for FixedResolver {
    fn resolve<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Addresses, ResolveError>> {
        Box::pin(std::future::ready(self.look_up(host)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[allow(clippy::unnecessary_wraps, reason = "stands for the answer of a family")]
    fn ok(last: &[u8]) -> Result<Addresses, ResolveError> {
        Ok(last.iter().copied().map(ip).collect())
    }

    fn name() -> String {
        "pg.internal".to_owned()
    }

    fn every_error() -> [ResolveError; 7] {
        let source = || Arc::new(std::io::Error::other("a reason")) as Arc<_>;
        [
            ResolveError::NotFound { name: name() },
            ResolveError::NoAddresses { name: name() },
            ResolveError::TimedOut { name: name(), after: Duration::from_millis(2034) },
            ResolveError::Other { name: name(), source: source() },
            ResolveError::ServerFailure { name: name(), code: "SERVFAIL".to_owned() },
            ResolveError::NoNameServers { name: name() },
            ResolveError::NoConfiguration { file: "/etc/resolv.conf".to_owned(), source: source() },
        ]
    }

    #[test]
    fn addresses_keep_their_order_and_lose_their_doubles() {
        let addresses = Addresses::new([ip(3), ip(1), ip(3), ip(2), ip(1)]);
        assert_eq!(addresses.iter().collect::<Vec<_>>(), [ip(3), ip(1), ip(2)]);
        assert_eq!((&addresses).into_iter().collect::<Vec<_>>(), [ip(3), ip(1), ip(2)]);
        assert_eq!(addresses.len(), 3);
        assert_eq!(addresses.into_iter().collect::<Vec<_>>(), [ip(3), ip(1), ip(2)]);
    }

    #[test]
    fn both_families_are_merged() {
        let merged = Addresses::merge(ok(&[1, 2]), ok(&[2, 3])).unwrap();
        assert_eq!(merged.iter().collect::<Vec<_>>(), [ip(1), ip(2), ip(3)]);
        assert!(merged.partial().is_none());
    }

    #[test]
    fn a_family_without_addresses_is_no_failure_of_the_other() {
        for error in every_error() {
            let answer = error.is_answer();
            assert_eq!(answer, matches!(error, ResolveError::NotFound { .. } | ResolveError::NoAddresses { .. }));
            let text = error.to_string();
            for merged in [
                Addresses::merge(ok(&[1]), Err(error.clone())).unwrap(),
                Addresses::merge(Err(error), ok(&[1])).unwrap(),
            ] {
                assert_eq!(merged.len(), 1);
                assert_eq!(merged.partial().map(ToString::to_string), (!answer).then(|| text.clone()));
            }
        }
    }

    /// The order of `every_error` is the order of weight.
    #[test]
    fn of_two_failures_the_more_telling_one_is_reported() {
        let errors = every_error();
        for (i, one) in errors.iter().enumerate() {
            for (j, other) in errors.iter().enumerate() {
                let reported = Addresses::merge(Err(one.clone()), Err(other.clone())).unwrap_err();
                if one.weight() != other.weight() {
                    assert_eq!(reported.to_string(), errors[i.max(j)].to_string());
                }
            }
        }
    }

    #[test]
    fn every_error_names_what_was_asked_and_what_to_check() {
        for error in every_error() {
            let text = error.to_string();
            assert!(text.contains(error.name()), "{text}");
            assert!(text.contains("check") || text.contains("a reason"), "{text}");
            assert_eq!(error.source().is_some(), text.contains("a reason"), "{text}");
        }
    }

    #[test]
    fn the_source_of_a_custom_error_can_be_downcast() {
        let error = ResolveError::custom(name(), std::io::Error::other("a reason"));
        assert!(error.source().is_some_and(<dyn Error>::is::<std::io::Error>));
    }

    #[test]
    fn a_fixed_resolver_knows_its_names_only() {
        let resolver =
            FixedResolver::new([("PG.internal.", vec![ip(1)]), ("pg.internal", vec![ip(2)]), ("none", vec![])]);
        assert_eq!(resolver.look_up("pg.INTERNAL").unwrap().len(), 2);
        assert_eq!(resolver.look_up("10.9.9.9").unwrap().iter().collect::<Vec<_>>(), [IpAddr::from([10, 9, 9, 9])]);
        assert!(matches!(resolver.look_up("none"), Err(ResolveError::NoAddresses { .. })));
        assert!(matches!(resolver.look_up("internal"), Err(ResolveError::NotFound { .. })));
    }

    #[tokio::test]
    async fn a_shared_resolver_is_a_resolver() {
        let shared: Arc<dyn Resolve> = Arc::new(FixedResolver::new([("pg.internal", [ip(1)])]));
        assert_eq!(Resolve::resolve(&shared, "pg.internal").await.unwrap().len(), 1);
    }
}
