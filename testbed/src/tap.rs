//! A TCP proxy that counts what a client says to PostgreSQL, and that can fall silent or break.
//!
//! It decides nothing about what passes: bytes go through as they came. What is encrypted is forwarded and not counted.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use crate::frames::{self, Frames, Head};
use crate::port;
use crate::sync::lock;

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

/// What becomes of new connections, while the open ones go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TurnAway {
    /// Nobody listens.
    Refuse,
    /// Accepted, and reset at once.
    Reset,
    /// Accepted, read, and never answered.
    Hang,
    /// TLS is agreed to, and its handshake never answered. Whoever does not ask for TLS hangs, too.
    HangInTls,
    /// The log-in is accepted, and never completed.
    HangInAuthentication,
    /// The log-in is answered with an error of a class that nobody knows.
    Error,
    /// The first message, whatever it is, gets the answer of a server that cannot start a process for the session.
    NoProcess,
    /// Forwarded after so long.
    Delay(Duration),
}

struct Shared {
    counts: Mutex<Counts>,
    upstream: Mutex<SocketAddr>,
    stalled: watch::Sender<bool>,
    /// Connections that began before the newest number was given end in the way that stands beside it.
    ends: watch::Sender<(u64, End)>,
    away: watch::Sender<Option<TurnAway>>,
}

impl Shared {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        lock(&self.counts)
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
        let listener = port::listen("tap", listen).await;
        let shared = Arc::new(Shared {
            counts: Mutex::default(),
            upstream: Mutex::new(upstream),
            stalled: watch::Sender::new(false),
            ends: watch::Sender::new((0, End::Close)),
            away: watch::Sender::new(None),
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
        self.shared.ends.send_modify(|ends| *ends = (ends.0 + 1, how));
    }

    /// While stalled, connections are accepted and stay open, and nothing is forwarded in either direction.
    pub fn stall(&self, stalled: bool) {
        self.shared.stalled.send_replace(stalled);
    }

    /// From now on new connections fare so; open ones go on. `None`: they are forwarded again.
    pub fn turn_away(&self, how: Option<TurnAway>) {
        self.shared.away.send_replace(how);
    }

    /// Where new connections go; open ones stay where they are.
    pub fn set_upstream(&self, upstream: SocketAddr) {
        *lock(&self.shared.upstream) = upstream;
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // The connections' tasks belong to this one and end with it.
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let addr = listener.local_addr().expect("a bound socket");
    let mut listener = Some(listener);
    let mut away = shared.away.subscribe();
    let mut connections = JoinSet::new();
    loop {
        let refuses = *away.borrow_and_update() == Some(TurnAway::Refuse);
        if refuses {
            listener = None;
        } else if listener.is_none() {
            listener = Some(port::listen("tap", addr).await);
        }
        let accepting = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            accepted = accepting => {
                let Ok((client, _)) = accepted else { continue };
                shared.counts().connections += 1;
                connections.spawn(serve(client, Arc::clone(&shared)));
            }
            _ = away.changed() => {}
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve(mut client: TcpStream, shared: Arc<Shared>) {
    let mut ends = shared.ends.subscribe();
    let begun = ends.borrow().0;
    let ended = async {
        // The sender lives in `shared`, which this task holds.
        ends.wait_for(|ends| ends.0 > begun).await.map_or(End::Close, |ends| ends.1)
    };
    let away = *shared.away.borrow();
    let served = async {
        match away {
            None => forward(&mut client, &shared).await,
            Some(TurnAway::Delay(delay)) => {
                tokio::time::sleep(delay).await;
                forward(&mut client, &shared).await;
            }
            Some(how) => return turn_away(&mut client, how).await,
        }
        End::Close
    };
    let how = tokio::select! {
        how = ended => how,
        how = served => how,
    };
    if matches!(how, End::Reset) {
        // A linger time of zero makes the close a RST.
        let _ = SockRef::from(&client).set_linger(Some(Duration::ZERO));
    }
}

/// Answers a log-in as `how` says, and reads the rest.
async fn turn_away(client: &mut TcpStream, how: TurnAway) -> End {
    if how == TurnAway::Reset {
        return End::Reset;
    }
    let mut buffer = [0; 1024];
    while let Ok(read @ 1..) = client.read(&mut buffer).await {
        let asks_for_tls = buffer[..read] == [0, 0, 0, 8, 4, 210, 22, 47];
        let answer: &[u8] = match how {
            TurnAway::HangInTls if asks_for_tls => b"S",
            TurnAway::HangInAuthentication | TurnAway::Error if asks_for_tls => b"N",
            TurnAway::HangInAuthentication => b"R\0\0\0\x08\0\0\0\0",
            TurnAway::Error => b"E\0\0\0\x24SERROR\0CZZ999\0Mno words for it\0\0",
            // `report_fork_failure_to_client` speaks version 2 of the protocol.
            TurnAway::NoProcess => b"Ecould not fork new process for connection: Resource temporarily unavailable\n\0",
            _ => b"",
        };
        let is_over = how == TurnAway::NoProcess || (how == TurnAway::Error && !asks_for_tls);
        if client.write_all(answer).await.is_err() || is_over {
            break;
        }
    }
    End::Close
}

async fn forward(client: &mut TcpStream, shared: &Shared) {
    let mut stalled = shared.stalled.subscribe();
    port::flowing(&mut stalled).await;
    let upstream = *lock(&shared.upstream);
    let Some(mut server) = port::connect(client, upstream).await else { return };
    let mut frontend = Frontend::default();
    port::relay(client, &mut server, stalled, |bytes| frontend.feed(bytes, &mut shared.counts())).await;
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
    use crate::frames::samples::startup;
    use crate::frames::{CANCEL, TLS, framed};

    #[test]
    fn messages_are_counted_however_they_are_cut() {
        let stream = [
            startup(TLS, b""),
            startup(196_608, b"user\0app\0\0"),
            framed(b'Q', b"SELECT 1\0"),
            framed(b'P', b"\0SELECT 1\0\0\0"),
            framed(b'B', &[0; 8]),
            framed(b'E', &[0; 5]),
            framed(b'S', b""),
            framed(b'X', b""),
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
