//! A stream that the user's connector has opened, or the error of one that it could not open.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::connect::{ByteStream, Connect};
use crate::topology::Endpoint;

/// Only the driver can make its errors. So a connector's error becomes a stream that fails at once, and the driver
/// reports why.
pub(crate) enum Over {
    Stream(Box<dyn ByteStream>),
    Failed(NotConnected),
}

/// The connector's error, with its kind hidden: a kind such as `InvalidData` would say that the peer is not PostgreSQL,
/// but no byte of it was seen.
#[derive(Debug, thiserror::Error)]
#[error("the connector did not reach the server: {0}")]
pub(crate) struct NotConnected(#[source] io::Error);

impl NotConnected {
    /// The driver may ask more than once.
    fn again(&self) -> io::Error {
        io::Error::other(Self(io::Error::new(self.0.kind(), self.0.to_string())))
    }
}

impl Over {
    pub(super) async fn open(connector: &dyn Connect, endpoint: &Endpoint) -> Self {
        match connector.connect(endpoint).await {
            Ok(stream) => Self::Stream(stream),
            Err(error) => Self::Failed(NotConnected(error)),
        }
    }
}

impl AsyncRead for Over {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Stream(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Failed(failed) => Poll::Ready(Err(failed.again())),
        }
    }
}

impl AsyncWrite for Over {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut *self {
            Self::Stream(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Failed(failed) => Poll::Ready(Err(failed.again())),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Stream(stream) => Pin::new(stream).poll_flush(cx),
            Self::Failed(failed) => Poll::Ready(Err(failed.again())),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Stream(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Failed(failed) => Poll::Ready(Err(failed.again())),
        }
    }
}
