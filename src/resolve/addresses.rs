//! The addresses of one name, and how the answers of two address families become one.

use std::collections::HashSet;
use std::net::IpAddr;

use super::ResolveError;

/// The addresses of one name, without duplicates, in the order in which they were given.
///
/// # Examples
/// ```
/// use std::net::IpAddr;
/// use tokio_postgres_failover::resolve::Addresses;
///
/// let (one, two) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
/// let addresses = Addresses::new([two, one, two]);
/// assert_eq!(addresses.iter().collect::<Vec<_>>(), [two, one]);
/// ```
#[derive(Clone, Debug, Default)]
pub struct Addresses {
    pub(super) addresses: Vec<IpAddr>,
    pub(super) partial: Option<ResolveError>,
}

impl Addresses {
    /// Makes a list of these addresses, and leaves out duplicates. An IPv4 address in the form of IPv6
    /// (`::ffff:10.0.0.1`) becomes IPv4, because it leads to the same server.
    ///
    /// # Examples
    /// ```
    /// # use std::net::IpAddr;
    /// # use tokio_postgres_failover::resolve::Addresses;
    /// assert!(Addresses::new([]).is_empty());
    /// assert_eq!(Addresses::new([IpAddr::from([127, 0, 0, 1]); 3]).len(), 1);
    /// ```
    #[must_use]
    pub fn new(addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        let mut seen = HashSet::new();
        let canonical = addresses.into_iter().map(|address| address.to_canonical());
        Self { addresses: canonical.filter(|address| seen.insert(*address)).collect(), partial: None }
    }

    /// Adds the note that a part of the question failed with this error.
    ///
    /// # Examples
    /// ```
    /// # use std::net::IpAddr;
    /// # use tokio_postgres_failover::resolve::{Addresses, ResolveError};
    /// let addresses = Addresses::new([IpAddr::from([10, 0, 0, 1])])
    ///     .with_partial(ResolveError::custom("pg.internal", "the second registry is down"));
    /// assert!(addresses.partial().is_some());
    /// ```
    #[must_use]
    pub fn with_partial(mut self, failure: ResolveError) -> Self {
        self.partial = Some(failure);
        self
    }

    /// The failure of a part of the question. If there is one, the name may have more addresses than these.
    ///
    /// It is set when there was an answer for one address family (A or AAAA) and none for the other. An answer that a
    /// family has no addresses is not a failure.
    ///
    /// # Examples
    /// ```
    /// # use tokio_postgres_failover::resolve::Addresses;
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
    /// # use tokio_postgres_failover::resolve::Addresses;
    /// let addresses = Addresses::new([[10, 0, 0, 1].into()]);
    /// assert!(addresses.iter().all(|address| address.is_ipv4()));
    /// ```
    #[must_use]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = IpAddr> + '_ {
        self.addresses.iter().copied()
    }

    /// The number of addresses.
    ///
    /// # Examples
    /// ```
    /// # use tokio_postgres_failover::resolve::Addresses;
    /// assert_eq!(Addresses::new([[10, 0, 0, 1].into(), [10, 0, 0, 2].into()]).len(), 2);
    /// ```
    #[must_use]
    pub fn len(&self) -> usize {
        self.addresses.len()
    }

    /// Returns whether there are no addresses.
    ///
    /// # Examples
    /// ```
    /// # use tokio_postgres_failover::resolve::Addresses;
    /// assert!(Addresses::default().is_empty());
    /// ```
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }

    /// If `host` is an IP address and not a name, returns this address. Then there is nothing to resolve.
    pub(crate) fn literal(host: &str) -> Option<Self> {
        host.parse().ok().map(|address: IpAddr| Self::new([address]))
    }

    /// Merges the answers of the two address families, which are asked separately.
    ///
    /// If one family has no addresses, those of the other one are the answer. If one family failed, the result holds
    /// that failure beside the addresses of the other one. If there are no addresses at all, a failure is reported
    /// rather than an answer that says "none", because the failed question might have found addresses.
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
