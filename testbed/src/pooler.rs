//! A connection pooler in transaction mode, as PgBouncer is one: a client's session is its own, and each of its
//! transactions runs on whichever server connection is free.
//!
//! It decides nothing about what passes, and tracks no prepared statements: one that was prepared in another
//! transaction is there by chance. Nobody may need encryption or a password. `COPY FROM STDIN` by the extended protocol
//! keeps its client on its server connection until that ends.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::sleep;

use crate::frames::{self, Frame, Frames, Head, framed};
use crate::port::{Port, drain};
use crate::sync::lock;

/// Between two tries to log in to a server that takes nobody, and two looks at what a client waits for.
const PAUSE: Duration = Duration::from_millis(5);
/// What PgBouncer tells a client whose server connection has ended, with the three fields that it sends.
const CRASHED: &[u8] = b"SFATAL\0C08P01\0Mserver conn crashed?\0\0";
/// The answer to the log-in of a client without a password.
const AUTHENTICATED: [u8; 4] = [0; 4];

/// A pooler in front of one server at a time. Dropping it closes its connections and its port.
///
/// Server connections are taken in turn, so that a client's next transaction runs on another one wherever there is one.
/// A client that goes away within a transaction takes its server connection along. While the target takes nobody,
/// clients wait.
pub struct Pooler {
    port: Port,
    shared: Arc<Shared>,
}

struct Shared {
    /// `None`: paused.
    target: Mutex<Option<SocketAddr>>,
    /// Those that no client is on, the next one first.
    idle: Mutex<VecDeque<Server>>,
    /// Where the clients are that are within a transaction, and the key to cancel what they run there.
    busy: Mutex<BTreeMap<i32, (SocketAddr, Vec<u8>)>>,
    clients: AtomicI32,
}

impl Pooler {
    /// Listens on `listen`; transactions run on `target`.
    pub async fn start(listen: SocketAddr, target: SocketAddr) -> Self {
        let shared = Arc::new(Shared {
            target: Mutex::new(Some(target)),
            idle: Mutex::default(),
            busy: Mutex::default(),
            clients: AtomicI32::default(),
        });
        let served = Arc::clone(&shared);
        let serve = move |client| serve(Wire::new(client, Frames::of_client()), Arc::clone(&served));
        Self { port: Port::open("pooler", listen, serve).await, shared }
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.port.addr()
    }

    /// Where transactions run that begin from now on; those that have begun end where they are. Ends a pause.
    pub fn set_target(&self, target: SocketAddr) {
        *lock(&self.shared.target) = Some(target);
    }

    /// Lets no transaction begin, whose clients wait, and returns when those that had begun have ended: `PAUSE`.
    pub async fn pause(&self) {
        *lock(&self.shared.target) = None;
        while self.busy() > 0 {
            sleep(PAUSE).await;
        }
    }

    /// How many clients are within a transaction.
    pub fn busy(&self) -> usize {
        lock(&self.shared.busy).len()
    }
}

/// A client, from its first byte to its end. `None`, as everywhere below: it or its server has gone.
async fn serve(mut client: Wire, shared: Arc<Shared>) -> Option<()> {
    let startup = loop {
        let frame = client.next().await?;
        match frame.head {
            Head::Request(frames::TLS | frames::GSS) => client.send(b"N").await?,
            Head::Request(frames::CANCEL) => return shared.cancel(frame.bytes.get(8..12)?).await,
            Head::Request(_) => break frame.bytes,
            _ => return None,
        }
    };
    let number = shared.clients.fetch_add(1, Ordering::Relaxed);
    let (server, busy) = client.wait_for(shared.take(&startup, number)).await?;
    let mut greeting = framed(b'R', &AUTHENTICATED);
    greeting.extend_from_slice(&server.parameters);
    greeting.extend(framed(b'K', &[number.to_be_bytes(), [0; 4]].concat()));
    greeting.extend(framed(b'Z', b"I"));
    busy.give_back(server);
    client.send(&greeting).await?;
    loop {
        let first = client.next().await?;
        if first.head == Head::Message(b'X') {
            return None;
        }
        let (mut server, busy) = client.wait_for(shared.take(&startup, number)).await?;
        transact(&mut client, &mut server.wire, first).await?;
        busy.give_back(server);
    }
}

/// One transaction, or one statement outside of any: from its first message until the server is idle and owes no
/// answer.
async fn transact(client: &mut Wire, server: &mut Wire, first: Frame) -> Option<()> {
    let (mut asked, mut owed, mut synced) = (Some(first), 0_u32, false);
    loop {
        if let Some(frame) = asked.take() {
            if frame.head == Head::Message(b'X') {
                return None;
            }
            synced = matches!(frame.head, Head::Message(b'Q' | b'S' | b'F'));
            owed += u32::from(synced);
            // Where this fails, the server's end is read next.
            let _ = server.send(&frame.bytes).await;
        }
        tokio::select! {
            frame = client.next() => asked = Some(frame?),
            frame = server.next() => {
                let Some(frame) = frame else {
                    client.send(&framed(b'E', CRASHED)).await?;
                    return client.finish().await;
                };
                client.send(&frame.bytes).await?;
                if frame.head == Head::Message(b'Z') {
                    owed = owed.saturating_sub(1);
                    if owed == 0 && synced && frame.body() == b"I" {
                        return Some(());
                    }
                }
            }
        }
    }
}

impl Shared {
    /// A connection to the target that nobody is on. Waits until the target gives one, and for the end of a pause.
    async fn take(&self, startup: &[u8], client: i32) -> (Server, Busy<'_>) {
        loop {
            if let Some(server) = self.server(startup).await {
                let busy = Busy::new(self, client, &server);
                // In this order: a pause that began meanwhile has seen this client, or is seen here.
                if self.target() == Some(server.addr) {
                    return (server, busy);
                }
            }
            sleep(PAUSE).await;
        }
    }

    fn target(&self) -> Option<SocketAddr> {
        *lock(&self.target)
    }

    async fn server(&self, startup: &[u8]) -> Option<Server> {
        let target = self.target()?;
        if let Some(idle) = self.idle(target, startup) {
            return Some(idle);
        }
        Server::log_in(target, startup).await
    }

    /// The first idle one. What leads elsewhere by now, or has ended, is closed.
    fn idle(&self, target: SocketAddr, startup: &[u8]) -> Option<Server> {
        let mut idle = lock(&self.idle);
        idle.retain(|server| server.addr == target && server.is_silent());
        let first = idle.iter().position(|server| server.startup == startup)?;
        idle.remove(first)
    }

    /// Passes a cancel request on to where the client is.
    async fn cancel(&self, client: &[u8]) -> Option<()> {
        let number = i32::from_be_bytes(*client.first_chunk()?);
        let (addr, key) = lock(&self.busy).get(&number)?.clone();
        let request = [&16_u32.to_be_bytes()[..], &frames::CANCEL.to_be_bytes(), &key].concat();
        TcpStream::connect(addr).await.ok()?.write_all(&request).await.ok()
    }
}

/// A client that is within a transaction.
struct Busy<'a> {
    shared: &'a Shared,
    client: i32,
}

impl<'a> Busy<'a> {
    fn new(shared: &'a Shared, client: i32, server: &Server) -> Self {
        lock(&shared.busy).insert(client, (server.addr, server.key.clone()));
        Self { shared, client }
    }

    fn give_back(self, server: Server) {
        lock(&self.shared.idle).push_back(server);
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        lock(&self.shared.busy).remove(&self.client);
    }
}

/// A connection to a server. Its session is what the start-up message made of it, and clients leave in it what they
/// like.
struct Server {
    addr: SocketAddr,
    startup: Vec<u8>,
    /// The messages that tell a new client what the session is like.
    parameters: Vec<u8>,
    key: Vec<u8>,
    wire: Wire,
}

impl Server {
    async fn log_in(addr: SocketAddr, startup: &[u8]) -> Option<Self> {
        let mut wire = Wire::new(TcpStream::connect(addr).await.ok()?, Frames::of_server());
        wire.send(startup).await?;
        let (mut parameters, mut key) = (Vec::new(), Vec::new());
        loop {
            let frame = wire.next().await?;
            match frame.head {
                Head::Message(b'S') => parameters.extend(frame.bytes),
                Head::Message(b'K') => key = frame.body().to_vec(),
                Head::Message(b'R') if frame.body() != AUTHENTICATED => panic!("{addr} asks for a password"),
                Head::Message(b'R' | b'N') => {}
                Head::Message(b'Z') => {
                    return Some(Self { addr, startup: startup.to_vec(), parameters, key, wire });
                }
                _ => return None,
            }
        }
    }

    /// It has neither ended nor said anything of its own accord, mostly that it is about to.
    fn is_silent(&self) -> bool {
        let read = self.wire.reads.try_read(&mut [0]);
        read.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
    }
}

/// A socket, in whole messages.
struct Wire {
    reads: OwnedReadHalf,
    writes: OwnedWriteHalf,
    buffer: Vec<u8>,
    frames: Frames,
}

impl Wire {
    fn new(stream: TcpStream, frames: Frames) -> Self {
        let _ = stream.set_nodelay(true);
        let (reads, writes) = stream.into_split();
        Self { reads, writes, buffer: vec![0; 16 * 1024], frames }
    }

    /// Cancel-safe.
    async fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.frames.next() {
                return Some(frame);
            }
            self.read().await?;
        }
    }

    async fn read(&mut self) -> Option<()> {
        let read = self.reads.read(&mut self.buffer).await.ok().filter(|read| *read > 0)?;
        self.frames.feed(self.buffer.get(..read)?);
        Some(())
    }

    async fn send(&mut self, bytes: &[u8]) -> Option<()> {
        self.writes.write_all(bytes).await.ok()
    }

    /// What this client waits for, unless it goes away meanwhile.
    async fn wait_for<T>(&mut self, wanted: impl Future<Output = T>) -> Option<T> {
        let gone = async { while self.read().await.is_some() {} };
        tokio::select! {
            wanted = wanted => Some(wanted),
            () = gone => None,
        }
    }

    /// Sends a FIN and reads to the end.
    async fn finish(&mut self) -> Option<()> {
        self.writes.shutdown().await.ok()?;
        drain(&mut self.reads).await;
        None
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinHandle;
    use tokio_postgres::error::SqlState;
    use tokio_postgres::{Client, Config, Error, NoTls};

    use super::*;
    use crate::wait::eventually;
    use crate::{Cluster, Node};

    const PATIENCE: Duration = Duration::from_secs(10);

    async fn pooler(nodes: usize) -> (Cluster, Pooler) {
        let cluster = Cluster::builder().nodes(nodes).start().await;
        let listen = SocketAddr::new(cluster.spare_addr(0), 0);
        let pooler = Pooler::start(listen, cluster.socket_addr(Node(0))).await;
        (cluster, pooler)
    }

    async fn session(pooler: &Pooler) -> (Client, JoinHandle<Result<(), Error>>) {
        let mut config = Config::new();
        config.hostaddr(pooler.addr().ip()).port(pooler.addr().port()).user("app").dbname("app");
        let (client, connection) = config.connect(NoTls).await.unwrap();
        (client, tokio::spawn(connection))
    }

    async fn backend(client: &Client) -> i32 {
        client.query_typed("SELECT pg_backend_pid()", &[]).await.unwrap()[0].get(0)
    }

    #[tokio::test]
    async fn sessions_share_server_connections_and_transactions_do_not() {
        let (_cluster, pooler) = pooler(1).await;
        let ((one, _), (two, _)) = (session(&pooler).await, session(&pooler).await);
        let shared = backend(&one).await;
        assert_eq!(backend(&two).await, shared, "one is enough for two that take turns");
        one.batch_execute("BEGIN").await.unwrap();
        assert_eq!((backend(&one).await, pooler.busy()), (shared, 1));
        let other = backend(&two).await;
        assert_ne!(other, shared);
        // Messages ahead of the answers, and an error, leave it where it is.
        let _ = tokio::join!(one.batch_execute("SELECT 1 / 0"), one.batch_execute("ROLLBACK"));
        assert_eq!(pooler.busy(), 0);
        assert_eq!([backend(&one).await, backend(&one).await], [other, shared], "they take turns");
    }

    #[tokio::test]
    async fn the_next_transaction_goes_to_the_new_target() {
        let (cluster, pooler) = pooler(2).await;
        let (client, _) = session(&pooler).await;
        let standby =
            async || -> bool { client.query_typed("SELECT pg_is_in_recovery()", &[]).await.unwrap()[0].get(0) };
        client.batch_execute("BEGIN").await.unwrap();
        pooler.set_target(cluster.socket_addr(Node(1)));
        assert!(!standby().await, "it ends where it began");
        client.batch_execute("COMMIT").await.unwrap();
        assert!(standby().await);
    }

    #[tokio::test]
    async fn a_pause_waits_for_transactions_and_lets_none_begin() {
        let (cluster, pooler) = pooler(1).await;
        let ((client, _), (other, _)) = (session(&pooler).await, session(&pooler).await);
        client.batch_execute("BEGIN").await.unwrap();
        let mut waits = std::pin::pin!(other.batch_execute("SELECT 1"));
        let ends = async {
            assert_eq!(pooler.busy(), 1);
            client.batch_execute("COMMIT").await.unwrap();
        };
        tokio::select! {
            biased;
            ((), ()) = async { tokio::join!(pooler.pause(), ends) } => {}
            _ = &mut waits => panic!("it did not wait"),
        }
        pooler.set_target(cluster.socket_addr(Node(0)));
        waits.await.unwrap();
    }

    #[tokio::test]
    async fn a_lost_server_ends_those_who_are_on_it_and_the_others_wait() {
        let (cluster, pooler) = pooler(1).await;
        let ((busy, ended), (idle, _)) = (session(&pooler).await, session(&pooler).await);
        busy.batch_execute("BEGIN").await.unwrap();
        // So that it has no time for last words of its own.
        cluster.freeze(Node(0));
        cluster.kill(Node(0)).await;
        let said = ended.await.unwrap().unwrap_err();
        assert_eq!(said.code(), Some(&SqlState::PROTOCOL_VIOLATION), "{said:?}");
        assert!(busy.is_closed() && !idle.is_closed());
        let (answer, ()) = tokio::join!(idle.batch_execute("SELECT 1"), cluster.start_node(Node(0)));
        answer.unwrap();
    }

    #[tokio::test]
    async fn a_client_that_goes_away_takes_its_transaction_along() {
        let (cluster, pooler) = pooler(1).await;
        let (client, connection) = session(&pooler).await;
        client.batch_execute("BEGIN; CREATE TEMP TABLE held ()").await.unwrap();
        connection.abort();
        let admin = cluster.direct(Node(0)).await;
        eventually("the transaction has ended", PATIENCE, async || {
            let sql = "SELECT FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'";
            pooler.busy() == 0 && admin.query(sql, &[]).await.unwrap().is_empty()
        })
        .await;
    }

    #[tokio::test]
    async fn a_cancel_request_reaches_the_client_s_server() {
        let (_cluster, pooler) = pooler(1).await;
        let ((client, _), (other, _)) = (session(&pooler).await, session(&pooler).await);
        other.batch_execute("BEGIN").await.unwrap();
        let token = client.cancel_token();
        let stop = async {
            eventually("the statement runs", PATIENCE, async || pooler.busy() == 2).await;
            // Again, as it may overtake the statement.
            let stopped = async || {
                token.cancel_query(NoTls).await.unwrap();
                pooler.busy() == 1
            };
            eventually("the statement ends", PATIENCE, stopped).await;
        };
        let (slept, ()) = tokio::join!(client.batch_execute("SELECT pg_sleep(600)"), stop);
        assert_eq!(slept.unwrap_err().code(), Some(&SqlState::QUERY_CANCELED));
        other.batch_execute("COMMIT").await.unwrap();
    }
}
