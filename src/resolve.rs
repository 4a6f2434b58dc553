//! What a host name means right now.
//!
//! Decides which words there are for the addresses of a name, and which of two failures is the one to report.
//! Knows nothing of DNS servers, sockets and clocks: those are behind [`Resolve`], of which `resolve/hickory.rs` is
//! the one that asks DNS. Nothing here or there keeps an answer: an address is only a candidate that a probe has yet
//! to confirm, and the address that was right a second ago is the wrong one after a failover.

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

#[cfg(test)]
mod tests;
