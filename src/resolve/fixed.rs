//! A resolver whose names and addresses are given beforehand.

use std::collections::HashMap;
use std::net::IpAddr;

use super::{Addresses, BoxFuture, Resolve, ResolveError};

/// A resolver that knows the addresses of some names beforehand and asks nobody.
///
/// It is for clusters whose members have fixed addresses, and for tests. It compares names as DNS does: upper and lower
/// case are the same, and a trailing dot makes no difference. A name that was not given is [`ResolveError::NotFound`].
///
/// # Examples
/// ```
/// use tokio_postgres_failover::resolve::{FixedResolver, Resolve};
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
    /// Makes a resolver of these names and their addresses. A name that is given twice has the addresses of both.
    ///
    /// # Examples
    /// ```
    /// # use tokio_postgres_failover::resolve::FixedResolver;
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

    pub(super) fn look_up(&self, host: &str) -> Result<Addresses, ResolveError> {
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
