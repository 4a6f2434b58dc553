//! Examines what answers at an address if no session could ever be opened.
//!
//! PostgreSQL, and anything that speaks its protocol, answers a TLS request with one byte, `S` or `N`. The driver
//! cannot recognise other answers: it would read a web server's text as the start of a very long message.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::connect::{ByteStream, Connect};
use crate::topology::{Address, Endpoint};

/// Time limit for each step. A peer that answers at all does so immediately.
const WITHIN: Duration = Duration::from_millis(500);
/// How long to wait for more data after the first byte.
const MORE_WITHIN: Duration = Duration::from_millis(100);
/// `SSLRequest`: its length, and the code in place of a protocol version.
const TLS_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
const ALERT_OR_HANDSHAKE: [u8; 2] = [21, 22];

/// What answers at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    /// PostgreSQL, or something that speaks its protocol.
    Postgres { offers_tls: bool },
    /// Something else. This is the name of its protocol.
    Stranger(&'static str),
}

/// Finds out what answers at this address, over a stream of the user's connector if there is one. `None`: that is not
/// known.
pub(super) async fn what_answers(endpoint: &Endpoint, connector: Option<&Arc<dyn Connect>>) -> Option<Peer> {
    let words = first_words(connect(endpoint, connector).await?).await?;
    if !words.is_empty() {
        return peer(&words);
    }
    // Some web servers hang up on what is no request of theirs.
    peer(&words_of_a_web_server(connect(endpoint, connector).await?).await?)
}

async fn connect(endpoint: &Endpoint, connector: Option<&Arc<dyn Connect>>) -> Option<Box<dyn ByteStream>> {
    match (connector, &endpoint.address) {
        (Some(connector), Address::Tcp(_)) => timeout(WITHIN, connector.connect(endpoint)).await.ok()?.ok(),
        (None, Address::Tcp(address)) => Some(Box::new(timeout(WITHIN, TcpStream::connect(address)).await.ok()?.ok()?)),
        _ => None,
    }
}

/// Returns the answer to a request for a page, if it is one of HTTP. PostgreSQL hangs up on this request.
async fn words_of_a_web_server(mut stream: Box<dyn ByteStream>) -> Option<Vec<u8>> {
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.ok()?;
    let mut words = vec![0; 5];
    timeout(WITHIN, stream.read_exact(&mut words)).await.ok()?.ok()?;
    (words == b"HTTP/").then_some(words)
}

async fn first_words(mut stream: Box<dyn ByteStream>) -> Option<Vec<u8>> {
    stream.write_all(&TLS_REQUEST).await.ok()?;
    let mut words = vec![0; 64];
    let first = if let Ok(read) = timeout(WITHIN, stream.read(&mut words)).await {
        // A peer that hangs up may also reset the connection.
        read.unwrap_or(0)
    } else {
        // Some protocols answer only to whole lines, so send one. PostgreSQL would have answered by now.
        stream.write_all(b"\r\n\r\n").await.ok()?;
        timeout(WITHIN, stream.read(&mut words)).await.ok()?.ok()?
    };
    let more = match words.get_mut(first..) {
        Some(rest) if first > 0 => timeout(MORE_WITHIN, stream.read(rest)).await.map_or(0, |read| read.unwrap_or(0)),
        _ => 0,
    };
    words.truncate(first + more);
    Some(words)
}

/// Recognises a peer by its first bytes. `None`: the peer hung up without an answer, or it may be PostgreSQL.
fn peer(words: &[u8]) -> Option<Peer> {
    let starts = |start: &[u8]| words.starts_with(start);
    let name = match words {
        [b'S'] => return Some(Peer::Postgres { offers_tls: true }),
        [b'N'] => return Some(Peer::Postgres { offers_tls: false }),
        // An error of PostgreSQL, in either form: see `error_before_the_session`.
        [] | [b'E', ..] => return None,
        // This may be a proxy that accepts only TLS.
        [first, ..] if ALERT_OR_HANDSHAKE.contains(first) => return None,
        _ if starts(b"HTTP/") => "HTTP",
        _ if starts(b"SSH-") => "SSH",
        _ if starts(b"-") || starts(b"+") => "the protocol of Redis",
        _ if starts(b"220") => "SMTP or FTP",
        [_, _, _, 0, 10, ..] => "the protocol of MySQL",
        _ => "something else",
    };
    Some(Peer::Stranger(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_speaks_is_told_by_its_first_words() {
        for (words, offers_tls) in [(b"S", true), (b"N", false)] {
            assert_eq!(peer(words), Some(Peer::Postgres { offers_tls }));
        }
        for (words, name) in [
            (&b""[..], None),
            (b"E\0\0\0\x2eSFATAL", None),
            (b"\x15\x03\x03\0\x02\x02\x28", None),
            (b"HTTP/1.1 400 Bad Request\r\n", Some("HTTP")),
            (b"SSH-2.0-OpenSSH_9.2\r\n", Some("SSH")),
            (b"-ERR unknown command\r\n", Some("the protocol of Redis")),
            (b"220 mail.example ESMTP\r\n", Some("SMTP or FTP")),
            (b"\x4a\0\0\0\x0a8.0.36\0", Some("the protocol of MySQL")),
            (b"Ecould not fork new process for connection: Cannot allocate memory\n\0", None),
            (b"SOMETHING", Some("something else")),
            (b"\0\0\0\0", Some("something else")),
        ] {
            assert_eq!(peer(words), name.map(Peer::Stranger), "{words:?}");
        }
    }
}
