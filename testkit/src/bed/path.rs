//! A network path to one server that is long, that is cut for a while, or that vanishes without a word.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::bed::port::{Port, connect, relay_at};
use crate::bed::sync::lock;

struct Shared {
    upstream: Mutex<SocketAddr>,
    delay: Mutex<Duration>,
    /// How often [`Path::vanish`] was called.
    vanished: watch::Sender<u64>,
    /// How often [`Path::close`] was called.
    closed: watch::Sender<u64>,
    held: watch::Sender<bool>,
    rate: AtomicU64,
}

/// A proxy in front of one server. Dropping it closes its connections and its port.
pub struct Path {
    port: Port,
    shared: Arc<Shared>,
}

impl Path {
    /// Listens on `listen` and connects each client to `upstream`.
    pub async fn start(listen: SocketAddr, upstream: SocketAddr) -> Self {
        let shared = Arc::new(Shared {
            upstream: Mutex::new(upstream),
            delay: Mutex::default(),
            vanished: watch::Sender::new(0),
            closed: watch::Sender::new(0),
            held: watch::Sender::new(false),
            rate: AtomicU64::new(0),
        });
        let served = Arc::clone(&shared);
        let port = Port::open("path", listen, move |client| serve(client, Arc::clone(&served))).await;
        Self { port, shared }
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.port.addr()
    }

    /// Each connection that comes from now on stands still for so long before anything passes: its log-in takes so
    /// long.
    pub fn delay_log_ins(&self, delay: Duration) {
        *lock(&self.shared.delay) = delay;
    }

    /// Where new connections go; open ones stay where they are.
    pub fn set_upstream(&self, upstream: SocketAddr) {
        *lock(&self.shared.upstream) = upstream;
    }

    /// All open connections stay open and nothing passes on them any more, in either direction: neither side is told.
    /// New ones pass.
    pub fn vanish(&self) {
        self.shared.vanished.send_modify(|times| *times += 1);
    }

    /// All open connections are closed, on both sides. New ones pass.
    pub fn close(&self) {
        self.shared.closed.send_modify(|times| *times += 1);
    }

    /// While held nothing passes in either direction, on open connections and on new ones, and neither side is told: a
    /// network that is cut. Afterwards all of them go on. The port still takes connections, as the kernel does that.
    pub fn hold(&self, held: bool) {
        self.shared.held.send_replace(held);
    }

    /// From now on the server's bytes come at this rate, in bytes per second. 0: as fast as they can.
    pub fn limit_rate(&self, rate: u64) {
        self.shared.rate.store(rate, Ordering::Relaxed);
    }

    /// How many connections have come.
    pub fn accepted(&self) -> u64 {
        self.port.accepted()
    }
}

async fn serve(mut client: TcpStream, shared: Arc<Shared>) {
    let (mut vanished, mut closed) = (shared.vanished.subscribe(), shared.closed.subscribe());
    let (begun, open) = (*vanished.borrow(), *closed.borrow());
    let delay = *lock(&shared.delay);
    let upstream = *lock(&shared.upstream);
    sleep(delay).await;
    let mut held = shared.held.subscribe();
    // The sender lives in `shared`, which this task holds.
    let _ = held.wait_for(|held| !held).await.map(drop);
    let Some(mut server) = connect(&client, upstream).await else { return };
    let passing = relay_at(&mut client, &mut server, held, &shared.rate, |_| {});
    let vanished = async {
        // The sender lives in `shared`, which this task holds.
        let _ = vanished.wait_for(|times| *times > begun).await.map(drop);
    };
    let carried = async {
        tokio::select! {
            () = passing => {}
            // Both sockets stay open, and nobody reads from them.
            () = vanished => std::future::pending().await,
        }
    };
    let closed = async {
        let _ = closed.wait_for(|times| *times > open).await.map(drop);
    };
    tokio::select! {
        () = carried => {}
        () = closed => {}
    }
}
