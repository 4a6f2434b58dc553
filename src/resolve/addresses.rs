//! The addresses of one name, and how the answers of two address families become one.

use std::collections::HashSet;
use std::net::IpAddr;

use super::ResolveError;

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
    pub(super) addresses: Vec<IpAddr>,
    pub(super) partial: Option<ResolveError>,
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
