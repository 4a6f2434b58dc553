//! A port with somebody behind it: what the proxies, the scripted servers and the traps have in common.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// Accepts connections until it is dropped, which closes the port and ends what serves the connections.
pub struct Port {
    addr: SocketAddr,
    accepted: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Port {
    /// Listens on `addr`, and serves each connection in a task of its own. `name` says in a panic who could not listen.
    pub async fn open<F>(name: &str, addr: SocketAddr, serve: impl FnMut(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        Self::on(listen(name, addr).await, serve)
    }

    /// The same with a listener that is there already.
    pub fn on<F>(listener: TcpListener, mut serve: impl FnMut(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        let addr = listener.local_addr().expect("a bound socket");
        let accepted = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&accepted);
        let task = tokio::spawn(async move {
            // The connections' tasks belong to this one and end with it.
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    connected = listener.accept() => {
                        let Ok((stream, _)) = connected else { continue };
                        count.fetch_add(1, Ordering::SeqCst);
                        connections.spawn(serve(stream));
                    }
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        Self { addr, accepted, task }
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// How many connections it has accepted.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::SeqCst)
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub async fn listen(name: &str, addr: SocketAddr) -> TcpListener {
    TcpListener::bind(addr).await.unwrap_or_else(|error| panic!("{name} on {addr}: {error}"))
}

/// Connects a proxy's client to `upstream`. `None`: it cannot be reached.
pub async fn connect(client: &TcpStream, upstream: SocketAddr) -> Option<TcpStream> {
    let server = TcpStream::connect(upstream).await.ok()?;
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    Some(server)
}

/// Copies both directions to their ends, and the ends themselves. `sent` sees what the client sends, before the server
/// does: a client that has its answer finds its question counted. Nothing passes while `stalled`.
pub async fn relay(
    client: &mut TcpStream,
    server: &mut TcpStream,
    stalled: watch::Receiver<bool>,
    sent: impl FnMut(&[u8]),
) {
    relay_at(client, server, stalled, &AtomicU64::new(0), sent).await;
}

/// The same, and the server's bytes come to the client at this rate, in bytes per second. 0 stands for no limit.
pub async fn relay_at(
    client: &mut TcpStream,
    server: &mut TcpStream,
    stalled: watch::Receiver<bool>,
    rate: &AtomicU64,
    sent: impl FnMut(&[u8]),
) {
    let (client_reads, client_writes) = client.split();
    let (server_reads, server_writes) = server.split();
    let unlimited = AtomicU64::new(0);
    let to_server = copy(client_reads, server_writes, stalled.clone(), &unlimited, sent);
    let to_client = copy(server_reads, client_writes, stalled, rate, |_| {});
    tokio::join!(to_server, to_client);
}

async fn copy(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut stalled: watch::Receiver<bool>,
    rate: &AtomicU64,
    mut sees: impl FnMut(&[u8]),
) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        flowing(&mut stalled).await;
        let read = from.read(&mut buffer).await.unwrap_or(0);
        // The stall may have come while this waited for bytes.
        flowing(&mut stalled).await;
        sees(&buffer[..read]);
        let micros = (read as u64 * 1_000_000).checked_div(rate.load(Ordering::Relaxed));
        if let Some(micros) = micros {
            tokio::time::sleep(Duration::from_micros(micros)).await;
        }
        if read == 0 || to.write_all(&buffer[..read]).await.is_err() {
            let _ = to.shutdown().await;
            return;
        }
    }
}

/// Waits for the end of a stall.
pub async fn flowing(stalled: &mut watch::Receiver<bool>) {
    // An error means that the proxy is gone, and this task is about to end.
    let _ = stalled.wait_for(|stalled| !stalled).await;
}

/// Reads to the end. A close with unread bytes would be a RST, which can overtake what was sent.
pub async fn drain(from: &mut (impl AsyncRead + Unpin)) {
    let mut buffer = [0; 1024];
    while from.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
}
