//! Addresses that are no PostgreSQL server: packets vanish, nobody answers, or something else does.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

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

/// What the accepting traps share.
struct Trap {
    addr: SocketAddr,
    accepted: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Trap {
    async fn start<F>(addr: SocketAddr, handle: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind(addr).await.unwrap_or_else(|error| panic!("trap on {addr}: {error}"));
        let addr = listener.local_addr().expect("a bound socket");
        let accepted = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&accepted);
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    connected = listener.accept() => {
                        let Ok((stream, _)) = connected else { continue };
                        count.fetch_add(1, Ordering::SeqCst);
                        connections.spawn(handle(stream));
                    }
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        Self { addr, accepted, task }
    }
}

impl Drop for Trap {
    fn drop(&mut self) {
        self.task.abort();
    }
}

macro_rules! trap_methods {
    () => {
        /// Where it listens.
        pub fn addr(&self) -> SocketAddr {
            self.0.addr
        }

        /// How many connections it has accepted.
        pub fn accepted(&self) -> u64 {
            self.0.accepted.load(Ordering::SeqCst)
        }
    };
}

/// Accepts connections, reads what comes, and never answers.
pub struct Silent(Trap);

impl Silent {
    /// Listens on `addr`.
    pub async fn start(addr: SocketAddr) -> Self {
        Self(Trap::start(addr, drain).await)
    }

    trap_methods!();
}

/// Answers the first bytes of a client with something that is not PostgreSQL, and closes.
pub struct Garbage(Trap);

impl Garbage {
    /// Listens on `addr` and says `bytes`: `b"HTTP/1.1 400 Bad Request\r\n\r\n"` is what a web server would.
    pub async fn start(addr: SocketAddr, bytes: impl Into<Vec<u8>>) -> Self {
        let bytes: Arc<[u8]> = bytes.into().into();
        let answer = move |mut stream: TcpStream| {
            let bytes = Arc::clone(&bytes);
            async move {
                let first = stream.read(&mut [0; 1024]).await;
                if first.is_ok() && stream.write_all(&bytes).await.is_ok() && stream.shutdown().await.is_ok() {
                    // A close with unread bytes would be a RST, which can overtake the answer.
                    drain(stream).await;
                }
            }
        };
        Self(Trap::start(addr, answer).await)
    }

    trap_methods!();
}

/// Accepts connections and closes them at once, like a load balancer without a backend.
pub struct Eof(Trap);

impl Eof {
    /// Listens on `addr`.
    pub async fn start(addr: SocketAddr) -> Self {
        Self(Trap::start(addr, async |stream| drop(stream)).await)
    }

    trap_methods!();
}

/// Reads to the end.
async fn drain(mut stream: TcpStream) {
    let mut buffer = [0; 1024];
    while stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
}
