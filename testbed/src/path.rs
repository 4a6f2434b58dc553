//! A network path to one server that is long, or that vanishes without a word.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::sleep;

use crate::sync::lock;

struct Shared {
    upstream: Mutex<SocketAddr>,
    delay: Mutex<Duration>,
    accepted: Mutex<u64>,
    /// How often [`Path::vanish`] was called.
    vanished: watch::Sender<u64>,
}

/// A proxy in front of one server. Dropping it closes its connections and its port.
pub struct Path {
    addr: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Path {
    /// Listens on `listen` and connects each client to `upstream`.
    pub async fn start(listen: SocketAddr, upstream: SocketAddr) -> Self {
        let listener = TcpListener::bind(listen).await.unwrap_or_else(|error| panic!("path on {listen}: {error}"));
        let shared = Arc::new(Shared {
            upstream: Mutex::new(upstream),
            delay: Mutex::default(),
            accepted: Mutex::default(),
            vanished: watch::Sender::new(0),
        });
        let addr = listener.local_addr().expect("a bound socket");
        let task = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Self { addr, shared, task }
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Each connection that comes from now on stands still for so long before anything passes: its log-in takes so long.
    pub fn delay_log_ins(&self, delay: Duration) {
        *lock(&self.shared.delay) = delay;
    }

    /// Where new connections go; open ones stay where they are.
    pub fn set_upstream(&self, upstream: SocketAddr) {
        *lock(&self.shared.upstream) = upstream;
    }

    /// All open connections stay open and nothing passes on them any more, in either direction: neither side is told. New
    /// ones pass.
    pub fn vanish(&self) {
        self.shared.vanished.send_modify(|times| *times += 1);
    }

    /// How many connections have come.
    pub fn accepted(&self) -> u64 {
        *lock(&self.shared.accepted)
    }
}

impl Drop for Path {
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
                *lock(&shared.accepted) += 1;
                connections.spawn(serve(client, Arc::clone(&shared)));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve(mut client: TcpStream, shared: Arc<Shared>) {
    let mut vanished = shared.vanished.subscribe();
    let begun = *vanished.borrow();
    let delay = *lock(&shared.delay);
    let upstream = *lock(&shared.upstream);
    sleep(delay).await;
    let Ok(mut server) = TcpStream::connect(upstream).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let passing = async {
        let (client_reads, client_writes) = client.split();
        let (server_reads, server_writes) = server.split();
        tokio::join!(pump(client_reads, server_writes), pump(server_reads, client_writes));
    };
    let vanished = async {
        // The sender lives in `shared`, which this task holds.
        let _ = vanished.wait_for(|times| *times > begun).await.map(drop);
    };
    tokio::select! {
        () = passing => {}
        // Both sockets stay open, and nobody reads from them.
        () = vanished => std::future::pending().await,
    }
}

/// Forwards one direction to its end, and the end itself.
async fn pump(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let read = from.read(&mut buffer).await.unwrap_or(0);
        if read == 0 || to.write_all(&buffer[..read]).await.is_err() {
            let _ = to.shutdown().await;
            return;
        }
    }
}
