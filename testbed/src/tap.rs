//! A TCP proxy that counts what a client says to PostgreSQL, and that can fall silent or break.
//!
//! It decides nothing about what passes: bytes go through as they came. What is encrypted is forwarded and not counted.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use crate::frames::{self, Frames, Head};

/// What passed through a [`Tap`] from clients to the server.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Batches that the client must wait for: those that end in Sync, simple queries, function calls. Not the log-in.
    pub round_trips: u64,
    /// Statements: simple queries and Execute messages.
    pub queries: u64,
    /// Messages by their type letter.
    pub by_type: BTreeMap<char, u64>,
    /// Start-up messages.
    pub startups: u64,
    /// Cancel requests, each on a connection of its own.
    pub cancels: u64,
    /// TCP connections accepted.
    pub connections: u64,
}

/// How the open connections end.
#[derive(Clone, Copy, Debug)]
enum End {
    Reset,
    Close,
}

/// What all connections look at.
#[derive(Clone, Copy, Debug)]
struct Order {
    stalled: bool,
    /// Connections that began before this one was given end in the way it says.
    ends: (u64, End),
}

struct Shared {
    counts: Mutex<Counts>,
    upstream: Mutex<SocketAddr>,
    order: watch::Sender<Order>,
}

impl Shared {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A proxy in front of one server. Dropping it closes its connections and its port.
pub struct Tap {
    addr: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Tap {
    /// Listens on `listen` and connects each client to `upstream`.
    pub async fn start(listen: SocketAddr, upstream: SocketAddr) -> Self {
        let listener = TcpListener::bind(listen).await.unwrap_or_else(|error| panic!("tap on {listen}: {error}"));
        let shared = Arc::new(Shared {
            counts: Mutex::default(),
            upstream: Mutex::new(upstream),
            order: watch::Sender::new(Order { stalled: false, ends: (0, End::Close) }),
        });
        let addr = listener.local_addr().expect("a bound socket");
        let task = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Self { addr, shared, task }
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What has passed since the start or the last [`Tap::reset`].
    pub fn counts(&self) -> Counts {
        self.shared.counts().clone()
    }

    /// Sets all counts to zero.
    pub fn reset(&self) {
        *self.shared.counts() = Counts::default();
    }

    /// Ends all open connections with a RST towards the client.
    pub fn drop_connections(&self) {
        self.end(End::Reset);
    }

    /// Ends all open connections with a FIN towards the client.
    pub fn close_connections(&self) {
        self.end(End::Close);
    }

    fn end(&self, how: End) {
        self.shared.order.send_modify(|order| order.ends = (order.ends.0 + 1, how));
    }

    /// While stalled, connections are accepted and stay open, and nothing is forwarded in either direction.
    pub fn stall(&self, stalled: bool) {
        self.shared.order.send_modify(|order| order.stalled = stalled);
    }

    /// Where new connections go; open ones stay where they are.
    pub fn set_upstream(&self, upstream: SocketAddr) {
        *self.shared.upstream.lock().unwrap_or_else(PoisonError::into_inner) = upstream;
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // The connections' tasks belong to this one and end with it.
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { continue };
                shared.counts().connections += 1;
                connections.spawn(serve(client, Arc::clone(&shared)));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve(mut client: TcpStream, shared: Arc<Shared>) {
    let mut order = shared.order.subscribe();
    let begun = order.borrow().ends.0;
    let ended = async {
        // The sender lives in `shared`, which this task holds.
        order.wait_for(|order| order.ends.0 > begun).await.map_or(End::Close, |order| order.ends.1)
    };
    let how = tokio::select! {
        how = ended => how,
        () = forward(&mut client, &shared) => End::Close,
    };
    if matches!(how, End::Reset) {
        // A linger time of zero makes the close a RST.
        let _ = SockRef::from(&client).set_linger(Some(Duration::ZERO));
    }
}

async fn forward(client: &mut TcpStream, shared: &Shared) {
    let mut order = shared.order.subscribe();
    flowing(&mut order).await;
    let upstream = *shared.upstream.lock().unwrap_or_else(PoisonError::into_inner);
    let Ok(mut server) = TcpStream::connect(upstream).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (client_reads, client_writes) = client.split();
    let (server_reads, server_writes) = server.split();
    let mut frontend = Frontend::default();
    let to_server =
        pump(client_reads, server_writes, order.clone(), |bytes| frontend.feed(bytes, &mut shared.counts()));
    let to_client = pump(server_reads, client_writes, order, |_| {});
    tokio::join!(to_server, to_client);
}

async fn flowing(order: &mut watch::Receiver<Order>) {
    // An error means that the tap is gone, and this task is about to end.
    let _ = order.wait_for(|order| !order.stalled).await;
}

/// Forwards one direction to its end, and the end itself.
async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut order: watch::Receiver<Order>,
    mut saw: impl FnMut(&[u8]),
) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        flowing(&mut order).await;
        let read = from.read(&mut buffer).await.unwrap_or(0);
        // The stall may have come while this waited for bytes.
        flowing(&mut order).await;
        if read == 0 {
            let _ = to.shutdown().await;
            return;
        }
        // Counted before it is sent, so that a client that has its answer finds it counted.
        saw(&buffer[..read]);
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

/// Counts what a client's byte stream holds.
struct Frontend(Frames);

impl Default for Frontend {
    fn default() -> Self {
        Self(Frames::of_client())
    }
}

impl Frontend {
    fn feed(&mut self, bytes: &[u8], counts: &mut Counts) {
        self.0.feed(bytes);
        while let Some(frame) = self.0.next() {
            match frame.head {
                Head::Message(letter) => {
                    *counts.by_type.entry(char::from(letter)).or_default() += 1;
                    counts.round_trips += u64::from(matches!(letter, b'Q' | b'S' | b'F'));
                    counts.queries += u64::from(matches!(letter, b'Q' | b'E'));
                }
                Head::Request(frames::CANCEL) => counts.cancels += 1,
                Head::Request(frames::TLS | frames::GSS) | Head::Byte(_) | Head::Opaque => {}
                Head::Request(_) => counts.startups += 1,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frames::samples::{message, startup};
    use crate::frames::{CANCEL, TLS};

    #[test]
    fn messages_are_counted_however_they_are_cut() {
        let stream = [
            startup(TLS, b""),
            startup(196_608, b"user\0app\0\0"),
            message(b'Q', b"SELECT 1\0"),
            message(b'P', b"\0SELECT 1\0\0\0"),
            message(b'B', &[0; 8]),
            message(b'E', &[0; 5]),
            message(b'S', b""),
            message(b'X', b""),
        ]
        .concat();
        for size in 1..stream.len() {
            let (mut frontend, mut counts) = (Frontend::default(), Counts::default());
            for part in stream.chunks(size) {
                frontend.feed(part, &mut counts);
            }
            let expected = Counts {
                round_trips: 2,
                queries: 2,
                by_type: "QPBESX".chars().map(|letter| (letter, 1)).collect(),
                startups: 1,
                ..Counts::default()
            };
            assert_eq!(counts, expected, "in pieces of {size}");
        }
    }

    #[test]
    fn cancel_requests_and_encrypted_streams_are_told_apart() {
        let (mut frontend, mut counts) = (Frontend::default(), Counts::default());
        frontend.feed(&startup(CANCEL, &[0; 8]), &mut counts);
        assert_eq!(counts, Counts { cancels: 1, ..Counts::default() });

        let (mut frontend, mut counts) = (Frontend::default(), Counts::default());
        frontend.feed(&startup(TLS, b""), &mut counts);
        frontend.feed(&[0x16, 3, 1, 0, 200, 1, 2, 3, 4, 5], &mut counts);
        assert_eq!(counts, Counts::default());
    }
}
