//! Finds the present addresses of a host name.
//!
//! A pool asks DNS by itself. Implement [`Resolve`] if its servers are listed elsewhere, and give the resolver to
//! [`PoolBuilder::resolver`](crate::PoolBuilder::resolver). No answer is kept, because an address that was right a
//! second ago may be wrong after a failover. An address is only a candidate: the pool asks the server there what it is.

// This file has the trait and knows nothing of DNS servers, sockets and clocks. `resolve/hickory.rs` is the
// implementation that asks DNS, `resolve/fixed.rs` the one whose addresses are given. `resolve/addresses.rs` merges the
// answers of two address families, and `resolve/error.rs` decides which of two failures is reported. Tests:
// `resolve/tests.rs`, `tests/it/failover/resolve.rs`.

mod addresses;
mod error;
mod fixed;
mod hickory;
mod setup;
mod system;

pub use addresses::Addresses;
pub use error::ResolveError;
pub use fixed::FixedResolver;
pub use hickory::HickoryResolver;
pub(crate) use system::is_scoped;

use std::pin::Pin;
use std::sync::Arc;

/// The boxed future that [`Resolve`] returns. It can be sent to another thread.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Finds the addresses of a host name.
///
/// The pool asks at each search for the primary and at each patrol. An implementation needs no cache and **must not
/// have one**, because a client with a cached address stays on a dead primary. It also need not check whether a server
/// answers at an address. It should give up by itself after a second or two. The pool then goes on with the servers
/// that it has seen before, and reports the failure.
///
/// [`HickoryResolver`] asks DNS and is the default. [`FixedResolver`] is for addresses that are known beforehand.
///
/// # Examples
/// Members of a cluster from a service registry:
/// ```
/// use std::{net::IpAddr, pin::Pin};
/// use tokio_postgres_failover::resolve::{Addresses, Resolve, ResolveError};
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
    /// Finds the addresses that `host` has now.
    ///
    /// `host` is taken from the connection string. It is a name, with or without a trailing dot, or an IP address,
    /// whose only address is itself. An `Ok` without an address counts as [`ResolveError::NoAddresses`].
    fn resolve<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Addresses, ResolveError>>;
}

/// Several pools can share one resolver in this way, or a test can keep control over the resolver of its pool.
impl<R: Resolve + ?Sized> Resolve for Arc<R> {
    fn resolve<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Addresses, ResolveError>> {
        (**self).resolve(host)
    }
}

#[cfg(test)]
mod tests;
