//! Opens the byte streams that sessions run over.
//!
//! A pool connects by TCP or a Unix socket by itself. Implement [`Connect`] if its servers are reached in another way
//! (a SOCKS proxy, an SSH tunnel, vsock, a test's own network), and give the connector to
//! [`PoolBuilder::connector`](crate::PoolBuilder::connector).

// This file has the trait. `server/wire.rs` uses it for sessions, probes and cancel requests, and `server/stranger.rs`
// to examine what answers. Tests: `tests/it/sessions/connector.rs`, and the whole simulation in sim/.

use std::io;
use std::pin::Pin;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::topology::Endpoint;

/// The boxed future that [`Connect`] returns. It can be sent to another thread.
pub type Connecting<'a> = Pin<Box<dyn Future<Output = io::Result<Box<dyn ByteStream>>> + Send + 'a>>;

/// A byte stream to a server. Every type that can be read, written, moved and sent to another thread is one.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> ByteStream for S {}

/// Opens a byte stream to one server.
///
/// The pool calls this for everything that it sends: sessions, probes, heartbeats and cancel requests. It finds the
/// addresses of names with its [`Resolve`](crate::resolve::Resolve) first, so a connector gets an address. A connector
/// whose proxy looks up names itself can ignore that, and use [`Endpoint::host`]. Then give the pool a resolver that
/// returns one address for each name, which stands for the server.
///
/// - **Time limits**: the pool drops the future after
///   [`probe_timeout`](crate::PoolBuilder::probe_timeout), so a connector needs no limit of its own.
/// - **Errors**: an error says that the server cannot be reached now. The pool tries again at its usual pace, and shows
///   the error's text in its reports.
/// - **Dead connections**: `keepalives` and `tcp_user_timeout` of the connection string configure only the pool's own
///   sockets. Set them on yours, because otherwise a statement may wait for a vanished server until
///   [`dead_after`](crate::PoolBuilder::dead_after).
///
/// # Examples
/// A proxy that is told the address in its first line:
/// ```
/// use tokio::{io::AsyncWriteExt, net::TcpStream};
/// use tokio_postgres_failover::{Pool, connect::{ByteStream, Connect, Connecting}, view::Endpoint};
///
/// struct Tunnel { proxy: String }
///
/// impl Connect for Tunnel {
///     fn connect<'a>(&'a self, endpoint: &'a Endpoint) -> Connecting<'a> {
///         Box::pin(async move {
///             let mut stream = TcpStream::connect(&self.proxy).await?;
///             stream.set_nodelay(true)?;
///             stream.write_all(format!("CONNECT {}\n", endpoint.address).as_bytes()).await?;
///             Ok(Box::new(stream) as Box<dyn ByteStream>)
///         })
///     }
/// }
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = Pool::builder("postgres://app@my-pg.internal/app")?
///     .connector(Tunnel { proxy: "127.0.0.1:9000".into() })
///     .build()?;
/// # Ok(())
/// # }
/// ```
pub trait Connect: Send + Sync + 'static {
    /// Opens a stream to the server at `endpoint`. The server must be ready to receive the first bytes of the protocol.
    ///
    /// The pool may drop the future at any point, and may call this several times at once.
    fn connect<'a>(&'a self, endpoint: &'a Endpoint) -> Connecting<'a>;
}

/// Several pools can share one connector in this way, or a test can keep control over the connector of its pool.
impl<C: Connect + ?Sized> Connect for Arc<C> {
    fn connect<'a>(&'a self, endpoint: &'a Endpoint) -> Connecting<'a> {
        (**self).connect(endpoint)
    }
}
