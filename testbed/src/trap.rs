//! Addresses that are no PostgreSQL server: packets vanish, nobody answers, or something else does.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::port::{Port, drain};

/// After this long without an answer, a connect to a [`Blackhole`] counts as hanging. Loopback answers in microseconds;
/// the kernel repeats a SYN only after a second.
const HANGING: Duration = Duration::from_millis(150);

/// A listener whose accept queue is full: the kernel drops every SYN, so connects hang, as with a host that vanished.
/// Dropping it turns the hanging connects into refused ones at their next SYN.
pub struct Blackhole {
    addr: SocketAddr,
    _listener: TcpListener,
    _queued: Vec<TcpStream>,
}

impl Blackhole {
    /// Returns when a connect has been seen to hang.
    pub async fn start(addr: SocketAddr) -> Self {
        let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.expect("a socket");
        socket.set_reuseaddr(true).expect("SO_REUSEADDR");
        socket.bind(addr).unwrap_or_else(|error| panic!("blackhole on {addr}: {error}"));
        let listener = socket.listen(0).expect("listen");
        let addr = listener.local_addr().expect("a bound socket");
        let mut queued = Vec::new();
        // The kernel's queue is longer than asked for by one or two, depending on its version.
        while let Ok(connected) = timeout(HANGING, TcpStream::connect(addr)).await {
            queued.push(connected.unwrap_or_else(|error| panic!("blackhole on {addr}: {error}")));
            assert!(queued.len() < 64, "this kernel accepts connections beyond the backlog");
        }
        Self { addr, _listener: listener, _queued: queued }
    }

    /// Where connects hang.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
}

macro_rules! trap_methods {
    () => {
        /// Where it listens.
        pub fn addr(&self) -> SocketAddr {
            self.0.addr()
        }

        /// How many connections it has accepted.
        pub fn accepted(&self) -> u64 {
            self.0.accepted()
        }
    };
}

/// Accepts connections, reads what comes, and never answers.
pub struct Silent(Port);

impl Silent {
    /// Listens on `addr`.
    pub async fn start(addr: SocketAddr) -> Self {
        Self(Port::open("trap", addr, async |mut stream| drain(&mut stream).await).await)
    }

    trap_methods!();
}

/// Answers the first bytes of a client with something that is not PostgreSQL, and closes.
pub struct Garbage(Port);

impl Garbage {
    /// Listens on `addr` and says `bytes`: `b"HTTP/1.1 400 Bad Request\r\n\r\n"` is what a web server would.
    pub async fn start(addr: SocketAddr, bytes: impl Into<Vec<u8>>) -> Self {
        let bytes: Arc<[u8]> = bytes.into().into();
        let answer = move |mut stream: TcpStream| {
            let bytes = Arc::clone(&bytes);
            async move {
                let first = stream.read(&mut [0; 1024]).await;
                if first.is_ok() && stream.write_all(&bytes).await.is_ok() && stream.shutdown().await.is_ok() {
                    drain(&mut stream).await;
                }
            }
        };
        Self(Port::open("trap", addr, answer).await)
    }

    trap_methods!();
}

/// Accepts connections and closes them at once, like a load balancer without a backend.
pub struct Eof(Port);

impl Eof {
    /// Listens on `addr`.
    pub async fn start(addr: SocketAddr) -> Self {
        Self(Port::open("trap", addr, async |stream| drop(stream)).await)
    }

    trap_methods!();
}
