//! Opens the socket that the driver would use.
//!
//! The driver sets its TCP sockets up with keep-alives and time-outs, and has no function that only does this. So this
//! module passes it a TLS connector that takes the socket and encrypts nothing.

use std::error::Error as StdError;
use std::future::{Ready, ready};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
#[cfg(unix)]
use tokio::net::UnixStream;
use tokio_postgres::config::{Host, SslMode, SslNegotiation};
use tokio_postgres::tls::{MakeTlsConnect, NoTlsStream, TlsConnect};
use tokio_postgres::{Config, Error, Socket};

use crate::sync::lock;

/// Opens the socket that the driver would use.
pub(super) async fn open(config: &Config) -> Result<Plain, Error> {
    let mut asking = config.clone();
    // With these settings the driver sends nothing before it calls the connector.
    asking.ssl_mode(SslMode::Require).ssl_negotiation(SslNegotiation::Direct);
    loop {
        #[cfg(unix)]
        if let Some(plain) = open_unix(config).await {
            return Ok(plain);
        }
        let thief = Thief(Arc::default());
        let Err(error) = asking.connect(thief.clone()).await else { continue };
        if let Some(socket) = lock(&thief.0).take() {
            return Ok(Plain::Tcp(socket));
        }
        // Only the driver can report why there is no socket. It calls no connector on a Unix socket, so if it gets that
        // far, there is a server now: try again.
        let no_socket = error.source().is_some_and(<dyn StdError>::is::<io::Error>);
        if no_socket || !is_unix(config) {
            return Err(error);
        }
        tokio::task::yield_now().await;
    }
}

fn is_unix(config: &Config) -> bool {
    config.get_hosts().first().is_some_and(|host| !matches!(host, Host::Tcp(_)))
}

#[cfg(unix)]
async fn open_unix(config: &Config) -> Option<Plain> {
    let Some(Host::Unix(folder)) = config.get_hosts().first() else { return None };
    let port = config.get_ports().first().copied().unwrap_or(5432);
    UnixStream::connect(folder.join(format!(".s.PGSQL.{port}"))).await.ok().map(Plain::Unix)
}

/// A TLS connector that only takes the socket out of the driver, and encrypts nothing.
#[derive(Clone)]
struct Thief(Arc<Mutex<Option<Socket>>>);

impl MakeTlsConnect<Socket> for Thief {
    type Stream = NoTlsStream;
    type TlsConnect = Self;
    type Error = io::Error;

    fn make_tls_connect(&mut self, _: &str) -> Result<Self, io::Error> {
        Ok(self.clone())
    }
}

impl TlsConnect<Socket> for Thief {
    type Stream = NoTlsStream;
    type Error = io::Error;
    type Future = Ready<Result<NoTlsStream, io::Error>>;

    fn connect(self, socket: Socket) -> Self::Future {
        *lock(&self.0) = Some(socket);
        ready(Err(io::Error::other("the socket was taken")))
    }
}

/// A socket of either kind.
pub(super) enum Plain {
    Tcp(Socket),
    #[cfg(unix)]
    Unix(UnixStream),
}

impl AsyncRead for Plain {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Tcp(socket) => Pin::new(socket).poll_read(cx, buf),
            #[cfg(unix)]
            Self::Unix(socket) => Pin::new(socket).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Plain {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut *self {
            Self::Tcp(socket) => Pin::new(socket).poll_write(cx, buf),
            #[cfg(unix)]
            Self::Unix(socket) => Pin::new(socket).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Tcp(socket) => Pin::new(socket).poll_flush(cx),
            #[cfg(unix)]
            Self::Unix(socket) => Pin::new(socket).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Tcp(socket) => Pin::new(socket).poll_shutdown(cx),
            #[cfg(unix)]
            Self::Unix(socket) => Pin::new(socket).poll_shutdown(cx),
        }
    }
}
