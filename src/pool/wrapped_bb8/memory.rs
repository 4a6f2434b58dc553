//! What the driver says of a session without a word to its server: it writes to memory, and reads from there.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::FutureExt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::tls::{ChannelBinding, NoTls, TlsConnect, TlsStream};
use tokio_postgres::{Client, Config};

/// What a server sends that lets everybody in: `AuthenticationOk` and `ReadyForQuery`.
const WELCOME: &[u8] = b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I";
/// What a server sends that takes a request for TLS.
const TLS: &[u8] = b"S";

/// By which a server knows one of its sessions: the process and the secret key that it sends at a log-in.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct BackendKey([u8; 8]);

impl BackendKey {
    /// Reads the key from the request that would cancel what the session runs. `None`: its server gave it none.
    pub(super) fn of(client: &Client) -> Option<Self> {
        let mut memory = Memory { unread: TLS, written: Vec::new() };
        client.cancel_token().cancel_query_raw(&mut memory, InMemory).now_or_never()?.ok()?;
        let key = *memory.written.last_chunk()?;
        (key != [0; 8]).then_some(Self(key))
    }
}

/// Returns a client whose session has ended.
pub(super) fn closed_client() -> Option<Client> {
    let memory = Memory { unread: WELCOME, written: Vec::new() };
    let mut config = Config::new();
    config.user("nobody");
    // The session ends at once, because nobody drives its connection.
    let (client, _) = config.connect_raw(memory, NoTls).now_or_never()?.ok()?;
    Some(client)
}

/// A stream that is always ready.
struct Memory {
    unread: &'static [u8],
    written: Vec<u8>,
}

impl AsyncRead for Memory {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let (read, unread) = self.unread.split_at(self.unread.len().min(into.remaining()));
        into.put_slice(read);
        self.unread = unread;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Memory {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.written.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl TlsStream for &mut Memory {
    fn channel_binding(&self) -> ChannelBinding {
        ChannelBinding::none()
    }
}

/// Encrypts nothing. Under `sslmode=require` the driver asks for TLS even here.
struct InMemory;

impl<'a> TlsConnect<&'a mut Memory> for InMemory {
    type Stream = &'a mut Memory;
    type Error = Infallible;
    type Future = Ready<Result<&'a mut Memory, Infallible>>;

    fn connect(self, memory: &'a mut Memory) -> Self::Future {
        ready(Ok(memory))
    }
}

#[cfg(test)]
mod tests {
    use tokio_postgres::config::SslMode;

    use super::*;

    /// A session with this key, or none.
    fn client(key: Option<[u8; 8]>, mode: SslMode) -> Client {
        let mut welcome = match mode {
            SslMode::Disable => Vec::new(),
            SslMode::Prefer => b"N".to_vec(),
            _ => b"S".to_vec(),
        };
        welcome.extend(b"R\0\0\0\x08\0\0\0\0");
        if let Some(key) = key {
            welcome.extend([b"K\0\0\0\x0c".as_slice(), &key].concat());
        }
        welcome.extend(b"Z\0\0\0\x05I");
        let memory = Box::leak(Box::new(Memory { unread: welcome.leak(), written: Vec::new() }));
        let mut config = Config::new();
        config.user("app").ssl_mode(mode);
        config.connect_raw(memory, InMemory).now_or_never().unwrap().unwrap().0
    }

    #[test]
    fn a_session_is_known_by_the_key_of_its_backend() {
        for mode in [SslMode::Disable, SslMode::Prefer, SslMode::Require] {
            let (one, other) = ([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 9]);
            assert!(BackendKey::of(&client(Some(one), mode)) == Some(BackendKey(one)), "{mode:?}");
            assert!(BackendKey::of(&client(Some(other), mode)) == Some(BackendKey(other)), "{mode:?}");
            assert!(BackendKey::of(&client(None, mode)).is_none(), "{mode:?}");
        }
    }

    #[test]
    fn a_closed_client_is_closed() {
        let client = closed_client().unwrap();
        assert!(client.is_closed());
        assert!(BackendKey::of(&client).is_none());
    }
}
