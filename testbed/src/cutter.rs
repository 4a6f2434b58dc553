//! A TCP proxy that cuts a connection at a chosen point of its transaction: around BEGIN, after a statement, around
//! COMMIT.
//!
//! It passes on one round trip at a time: what a client sends ahead waits until the answer before it has come. So a cut
//! lies between two messages, or between two bytes of an answer, and never somewhere near. Nothing else is changed.
//! What is encrypted passes, and is not cut.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;

use crate::frames::{self, Frame, Frames, Head};
use crate::port::{Port, connect, drain};
use crate::sync::lock;

/// Where a transaction's connection is cut.
///
/// BEGIN is a simple query whose text begins with it, and COMMIT one that has it as a statement, as `SELECT 1; COMMIT`.
/// The answer of a message ends with ReadyForQuery. "Closed" is a FIN after all that was passed on, and is for both
/// sides where nothing else is said; the server then rolls back what it has open, as soon as it reads from the
/// connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cut {
    /// BEGIN is not passed on.
    BeginUndelivered,
    /// The server has answered BEGIN. Nothing of it is passed on.
    BeforeBeginAnswer,
    /// So many round trips after BEGIN's have been answered, and the client has the answer; whatever it sends then is
    /// not passed on. A simple query is one round trip, and so are the messages up to a Sync: a statement with
    /// parameters that `tokio_postgres` prepares first makes two, and a third when it is dropped. 0 is after BEGIN's
    /// own answer. A COMMIT, and what ends the transaction in another way, does not count.
    AfterStatement(u32),
    /// COMMIT is not passed on.
    CommitUndelivered {
        /// The server's side stays open and silent, as when a path vanishes: the session stays idle in transaction,
        /// with its locks, until [`Cutter::release`].
        server_stays: bool,
    },
    /// COMMIT is passed on, and both sides are closed at once. When the server carries it out is a race; that it does
    /// is likely.
    CommitDelivered,
    /// The server has answered COMMIT. Nothing of it is passed on.
    CommitAnswerDropped,
    /// The server has answered COMMIT. So many bytes of it are passed on, also in the midst of a message, but never
    /// all: the last byte is withheld whatever the number.
    CommitAnswerHalf(usize),
    /// COMMIT is passed on and the client's side is closed. The server's side stays open until [`Cutter::release`];
    /// what it answers is thrown away.
    CommitHeld,
}

impl Cut {
    /// The variant's name.
    pub fn kind(self) -> &'static str {
        match self {
            Self::BeginUndelivered => "BeginUndelivered",
            Self::BeforeBeginAnswer => "BeforeBeginAnswer",
            Self::AfterStatement(_) => "AfterStatement",
            Self::CommitUndelivered { .. } => "CommitUndelivered",
            Self::CommitDelivered => "CommitDelivered",
            Self::CommitAnswerDropped => "CommitAnswerDropped",
            Self::CommitAnswerHalf(_) => "CommitAnswerHalf",
            Self::CommitHeld => "CommitHeld",
        }
    }

    /// The server's answer is read to its end before the client's side is closed.
    fn awaits_answer(self) -> bool {
        matches!(self, Self::BeforeBeginAnswer | Self::CommitAnswerDropped | Self::CommitAnswerHalf(_))
    }

    fn at_begin(self) -> bool {
        matches!(self, Self::BeginUndelivered | Self::BeforeBeginAnswer)
    }

    fn at_commit(self) -> bool {
        !self.at_begin() && !matches!(self, Self::AfterStatement(_))
    }

    fn keeps_server(self) -> bool {
        matches!(self, Self::CommitUndelivered { server_stays: true } | Self::CommitHeld)
    }
}

/// A cut that was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Done {
    /// Where.
    pub cut: Cut,
    /// Which transaction: those that may write are counted from 1. `None` for `READ ONLY`.
    pub transaction: Option<u64>,
    /// Whether the server has committed, as far as this can be known from what passed: `true` when its answer says so,
    /// `false` when it did not get COMMIT or answered otherwise, `None` when its answer was not seen to the end. It
    /// says nothing about other servers: an asynchronous standby may lack what was committed.
    pub committed: Option<bool>,
}

/// A cut that is to come; see [`Cutter::arm`]. Dropping it takes nothing back.
#[derive(Clone)]
pub struct Armed(watch::Receiver<Option<Done>>);

impl Armed {
    /// Waits until the cut has been made and the sockets are closed.
    ///
    /// # Panics
    /// When it will not come: after [`Cutter::disarm`], without the cutter, or when the hook panicked.
    pub async fn happened(&self) -> Done {
        let mut done = self.0.clone();
        let done = done.wait_for(Option::is_some).await.ok().and_then(|done| *done);
        done.expect("a cut that still can happen")
    }

    /// Whether the cut has been made.
    pub fn has_happened(&self) -> bool {
        self.0.borrow().is_some()
    }
}

type Hook = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;
type Plan = Box<dyn FnMut(u64, &str) -> Option<Cut> + Send>;

/// A cut, and what goes with it.
struct Order {
    cut: Cut,
    hook: Option<Hook>,
    done: watch::Sender<Option<Done>>,
}

#[derive(Default)]
struct Book {
    armed: VecDeque<Order>,
    plan: Option<Plan>,
    /// Transactions that may write.
    begun: u64,
    done: Vec<Done>,
}

struct Shared {
    book: Mutex<Book>,
    upstream: Mutex<SocketAddr>,
    /// How often [`Cutter::release`] was called.
    released: watch::Sender<u64>,
    held: AtomicUsize,
}

impl Shared {
    fn book(&self) -> MutexGuard<'_, Book> {
        lock(&self.book)
    }
}

/// A proxy in front of one server. Dropping it closes its connections and its port, and drops hooks that are running.
///
/// ```no_run
/// # async fn example(cluster: std::sync::Arc<testbed::Cluster>) {
/// use std::net::SocketAddr;
/// use testbed::{Cut, Cutter, Node};
///
/// let listen = SocketAddr::new(cluster.spare_addr(0), 0);
/// let cutter = Cutter::start(listen, cluster.socket_addr(Node(0))).await;
/// let crash = cutter.arm_with(Cut::CommitAnswerDropped, {
///     let cluster = cluster.clone();
///     async move || cluster.kill(Node(0)).await
/// });
/// // … a transaction through `cutter.addr()` ends with an error …
/// assert_eq!(crash.happened().await.committed, Some(true));
/// # }
/// ```
pub struct Cutter {
    port: Port,
    shared: Arc<Shared>,
}

impl Cutter {
    /// Listens on `listen` and connects each client to `upstream`. A client is closed when this cannot be reached.
    pub async fn start(listen: SocketAddr, upstream: SocketAddr) -> Self {
        let shared = Arc::new(Shared {
            book: Mutex::default(),
            upstream: Mutex::new(upstream),
            released: watch::Sender::new(0),
            held: AtomicUsize::new(0),
        });
        let served = Arc::clone(&shared);
        let port = Port::open("cutter", listen, move |client| serve(client, Arc::clone(&served))).await;
        Self { port, shared }
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.port.addr()
    }

    /// Where new connections go; open ones stay where they are.
    pub fn set_upstream(&self, upstream: SocketAddr) {
        *lock(&self.shared.upstream) = upstream;
    }

    /// Cuts the next connection that reaches the point, once; a `READ ONLY` transaction is none the safer. What was
    /// armed first is cut first, and the plan goes before both.
    pub fn arm(&self, cut: Cut) -> Armed {
        self.order(cut, None)
    }

    /// [`Cutter::arm`], and at the point, with the bytes withheld and before anything is closed, `hook` is awaited.
    ///
    /// What the cut passes on is on its way by then. Meanwhile this connection stands still and the others do not.
    pub fn arm_with<F, Fut>(&self, cut: Cut, hook: F) -> Armed
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        self.order(cut, Some(Box::new(move || Box::pin(hook()))))
    }

    fn order(&self, cut: Cut, hook: Option<Hook>) -> Armed {
        let done = watch::Sender::new(None);
        let armed = Armed(done.subscribe());
        self.shared.book().armed.push_back(Order { cut, hook, done });
        armed
    }

    /// Asks `plan` at each BEGIN without `READ ONLY` how that transaction is cut, in place of the plan before. It gets
    /// the transaction's number, from 1, and the query's text. A transaction that does not come to the point goes
    /// uncut.
    pub fn arm_every(&self, plan: impl FnMut(u64, &str) -> Option<Cut> + Send + 'static) {
        self.shared.book().plan = Some(Box::new(plan));
    }

    /// Forgets the plan and all that is armed. Transactions that have begun keep what the plan said.
    pub fn disarm(&self) {
        let mut book = self.shared.book();
        book.armed.clear();
        book.plan = None;
    }

    /// How many cuts were made, by [`Cut::kind`]. A client that sees its connection closed finds the cut counted.
    pub fn cuts(&self) -> BTreeMap<&'static str, u64> {
        let mut cuts = BTreeMap::new();
        for done in &self.shared.book().done {
            *cuts.entry(done.cut.kind()).or_default() += 1;
        }
        cuts
    }

    /// The cuts that were made, in their order.
    pub fn done(&self) -> Vec<Done> {
        self.shared.book().done.clone()
    }

    /// How many transactions that may write have begun.
    pub fn transactions(&self) -> u64 {
        self.shared.book().begun
    }

    /// How many connections to the server are held open for no client.
    pub fn held(&self) -> usize {
        self.shared.held.load(Ordering::SeqCst)
    }

    /// Closes the connections to the server that [`Cut::CommitHeld`] and [`Cut::CommitUndelivered`] have left open.
    pub fn release(&self) {
        self.shared.released.send_modify(|released| *released += 1);
    }
}

async fn serve(client: TcpStream, shared: Arc<Shared>) {
    let upstream = *lock(&shared.upstream);
    let Some(server) = connect(&client, upstream).await else { return };
    let link = Link {
        client: Side::new(client, Frames::of_client()),
        server: Side::new(server, Frames::of_server()),
        shared,
        waiting: None,
        pending: None,
        copying: false,
        transaction: None,
        withheld: None,
    };
    link.run().await;
}

/// One of a connection's two ends.
struct Side {
    reads: OwnedReadHalf,
    writes: OwnedWriteHalf,
    buffer: Vec<u8>,
    frames: Frames,
    /// What is still to be sent.
    out: Vec<u8>,
    /// Nothing more comes from it.
    ended: bool,
    /// Nothing more can be sent to it.
    gone: bool,
}

impl Side {
    fn new(stream: TcpStream, frames: Frames) -> Self {
        let (reads, writes) = stream.into_split();
        Self { reads, writes, buffer: vec![0; 16 * 1024], frames, out: Vec::new(), ended: false, gone: false }
    }

    fn send(&mut self, bytes: &[u8]) {
        if !self.gone {
            self.out.extend_from_slice(bytes);
        }
    }

    fn was_read(&mut self, read: usize) {
        self.ended = read == 0;
        self.frames.feed(self.buffer.get(..read).unwrap_or_default());
    }

    fn was_written(&mut self, written: Option<usize>) {
        if let Some(written) = written {
            self.out.drain(..written);
        } else {
            self.gone = true;
            self.out.clear();
        }
    }

    async fn flush(&mut self) {
        let _ = self.writes.write_all(&self.out).await;
        self.out.clear();
    }

    /// Sends a FIN, once.
    async fn finish(&mut self) {
        let _ = self.writes.shutdown().await;
        self.gone = true;
    }

    /// Reads to the end.
    async fn drain(&mut self) {
        drain(&mut self.reads).await;
    }
}

/// What the server's next ReadyForQuery answers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pending {
    /// The log-in, a COMMIT, or what comes outside of transactions.
    Other,
    Begin,
    Statement,
}

struct Transaction {
    number: Option<u64>,
    planned: Option<Cut>,
    statements: u32,
}

/// An answer that is not passed on.
struct Withheld {
    order: Order,
    answer: Vec<u8>,
    committed: bool,
}

/// One client and its server.
struct Link {
    client: Side,
    server: Side,
    shared: Arc<Shared>,
    /// A client's message that may not pass before an answer.
    waiting: Option<Frame>,
    pending: Option<Pending>,
    /// The server reads COPY data, and ignores the Sync of the message that began it.
    copying: bool,
    transaction: Option<Transaction>,
    withheld: Option<Withheld>,
}

impl Link {
    async fn run(mut self) {
        loop {
            if let Some((order, committed)) = self.pass() {
                return self.cut(order, committed).await;
            }
            if self.server.ended && self.client.out.is_empty() {
                break;
            }
            if self.client.ended && self.waiting.is_none() && self.server.out.is_empty() && !self.server.gone {
                self.server.finish().await;
            }
            self.transfer().await;
        }
        self.client.finish().await;
        drop(self.server);
        self.client.drain().await;
    }

    /// Reads or writes something, wherever this is possible next.
    async fn transfer(&mut self) {
        let Self { client, server, .. } = self;
        tokio::select! {
            read = client.reads.read(&mut client.buffer), if !client.ended && server.out.is_empty() => {
                client.was_read(read.unwrap_or(0));
            }
            read = server.reads.read(&mut server.buffer), if !server.ended && client.out.is_empty() => {
                server.was_read(read.unwrap_or(0));
            }
            written = client.writes.write(&client.out), if !client.out.is_empty() => client.was_written(written.ok()),
            written = server.writes.write(&server.out), if !server.out.is_empty() => server.was_written(written.ok()),
        }
    }

    /// Moves frames from one side to the other until a cut's point is reached or there is nothing left that may pass.
    /// Gives the cut, and whether the server has committed.
    fn pass(&mut self) -> Option<(Order, Option<bool>)> {
        while let Some(frame) = self.server.frames.next() {
            if let Some(cut) = self.server_says(&frame) {
                return Some(cut);
            }
        }
        if self.server.ended
            && let Some(withheld) = self.withheld.take()
        {
            // It died with its answer unsaid. Nothing of that is passed on either.
            let committed = if withheld.order.cut.at_commit() { None } else { Some(false) };
            return Some(self.end_answer(withheld, committed));
        }
        while let Some(frame) = self.waiting.take().or_else(|| self.client.frames.next()) {
            if !self.may_pass(frame.head) {
                self.waiting = Some(frame);
                break;
            }
            if let Some(cut) = self.client_says(&frame) {
                return Some(cut);
            }
        }
        None
    }

    fn may_pass(&self, head: Head) -> bool {
        match head {
            _ if self.pending.is_none() => true,
            // The log-in's further messages, COPY data, Terminate.
            Head::Message(b'p' | b'd' | b'c' | b'f' | b'X') | Head::Opaque => true,
            Head::Message(b'S' | b'H') => self.copying,
            _ => false,
        }
    }

    fn client_says(&mut self, frame: &Frame) -> Option<(Order, Option<bool>)> {
        match frame.head {
            Head::Request(frames::TLS | frames::GSS) => self.server.frames.expect_byte(),
            Head::Request(frames::CANCEL) => {}
            Head::Request(_) => self.pending = Some(Pending::Other),
            Head::Message(b'Q') => {
                let text = String::from_utf8_lossy(frame.body().strip_suffix(b"\0").unwrap_or(frame.body()));
                return self.query(&text, frame);
            }
            Head::Message(b'S' | b'F') if self.pending.is_none() => self.expect_answer(Pending::Statement),
            Head::Message(_) | Head::Byte(_) | Head::Opaque => {}
        }
        self.server.send(&frame.bytes);
        None
    }

    fn expect_answer(&mut self, pending: Pending) {
        let inside = self.transaction.is_some();
        self.pending = Some(if inside { pending } else { Pending::Other });
    }

    fn query(&mut self, text: &str, frame: &Frame) -> Option<(Order, Option<bool>)> {
        let begins = self.transaction.is_none() && begins(text);
        if begins {
            self.transaction = Some(self.begin(text));
        }
        let commits = self.transaction.is_some() && commits(text);
        let order =
            self.reached(|cut| cut.at_begin() && begins).or_else(|| self.reached(|cut| cut.at_commit() && commits));
        self.expect_answer(match (begins, commits) {
            (_, true) => Pending::Other,
            (true, _) => Pending::Begin,
            _ => Pending::Statement,
        });
        let Some(order) = order else {
            self.server.send(&frame.bytes);
            return None;
        };
        if matches!(order.cut, Cut::BeginUndelivered | Cut::CommitUndelivered { .. }) {
            return Some((order, Some(false)));
        }
        self.server.send(&frame.bytes);
        if order.cut.awaits_answer() {
            self.withheld = Some(Withheld { order, answer: Vec::new(), committed: false });
            return None;
        }
        Some((order, None))
    }

    fn begin(&self, text: &str) -> Transaction {
        let mut book = self.shared.book();
        if text.to_ascii_uppercase().contains("READ ONLY") {
            return Transaction { number: None, planned: None, statements: 0 };
        }
        book.begun += 1;
        let number = book.begun;
        let planned = book.plan.as_mut().and_then(|plan| plan(number, text));
        Transaction { number: Some(number), planned, statements: 0 }
    }

    /// The cut for this point: the plan's, or else the first one armed.
    fn reached(&mut self, here: impl Fn(Cut) -> bool) -> Option<Order> {
        let planned = self.transaction.as_mut().and_then(|transaction| transaction.planned.take_if(|cut| here(*cut)));
        if let Some(cut) = planned {
            return Some(Order { cut, hook: None, done: watch::Sender::new(None) });
        }
        let mut book = self.shared.book();
        let first = book.armed.iter().position(|order| here(order.cut))?;
        book.armed.remove(first)
    }

    fn server_says(&mut self, frame: &Frame) -> Option<(Order, Option<bool>)> {
        if let Some(withheld) = &mut self.withheld {
            withheld.answer.extend_from_slice(&frame.bytes);
            withheld.committed |= frame.head == Head::Message(b'C') && frame.body() == b"COMMIT\0";
        } else {
            self.client.send(&frame.bytes);
        }
        match frame.head {
            Head::Byte(b'S' | b'G') => {
                self.client.frames.make_opaque();
                self.server.frames.make_opaque();
            }
            Head::Message(b'G') => self.copying = true,
            Head::Message(b'Z') => return self.answered(frame.body().first() == Some(&b'I')),
            _ => {}
        }
        None
    }

    /// The server is ready for the next query.
    fn answered(&mut self, idle: bool) -> Option<(Order, Option<bool>)> {
        self.copying = false;
        let pending = self.pending.take();
        if let Some(withheld) = self.withheld.take() {
            let committed = withheld.committed;
            return Some(self.end_answer(withheld, Some(committed)));
        }
        if idle {
            self.transaction = None;
        }
        let transaction = self.transaction.as_mut()?;
        match pending {
            Some(Pending::Begin) => {}
            Some(Pending::Statement) => transaction.statements += 1,
            _ => return None,
        }
        let statements = transaction.statements;
        self.reached(|cut| cut == Cut::AfterStatement(statements)).map(|order| (order, Some(false)))
    }

    fn end_answer(&mut self, withheld: Withheld, committed: Option<bool>) -> (Order, Option<bool>) {
        if let Cut::CommitAnswerHalf(bytes) = withheld.order.cut {
            let most = withheld.answer.len().saturating_sub(1);
            self.client.send(withheld.answer.get(..bytes.min(most)).unwrap_or_default());
        }
        (withheld.order, committed)
    }

    async fn cut(mut self, order: Order, committed: Option<bool>) {
        let Order { cut, hook, done } = order;
        tokio::join!(self.server.flush(), self.client.flush());
        if let Some(hook) = hook {
            hook().await;
        }
        let transaction = self.transaction.and_then(|transaction| transaction.number);
        let what = Done { cut, transaction, committed };
        self.shared.book().done.push(what);
        let released = self.shared.released.subscribe();
        // Not kept means dropped here, that is, closed.
        let held = cut.keeps_server().then(|| Held::new(self.server, released, Arc::clone(&self.shared)));
        self.client.finish().await;
        done.send_replace(Some(what));
        let holding = async {
            if let Some(held) = held {
                held.hold().await;
            }
        };
        tokio::join!(self.client.drain(), holding);
    }
}

/// A server that has no client any more.
struct Held {
    server: Side,
    released: watch::Receiver<u64>,
    shared: Arc<Shared>,
}

impl Held {
    fn new(server: Side, released: watch::Receiver<u64>, shared: Arc<Shared>) -> Self {
        shared.held.fetch_add(1, Ordering::SeqCst);
        Self { server, released, shared }
    }

    async fn hold(mut self) {
        tokio::select! {
            () = self.server.drain() => {}
            _ = self.released.changed() => {}
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.shared.held.fetch_sub(1, Ordering::SeqCst);
    }
}

fn begins(text: &str) -> bool {
    first_word(text).eq_ignore_ascii_case("BEGIN")
}

/// Not `READ COMMITTED`, `synchronous_commit` or `ON COMMIT DROP`, in which there is one, too.
fn commits(text: &str) -> bool {
    text.split(';').any(|statement| first_word(statement).eq_ignore_ascii_case("COMMIT"))
}

fn first_word(text: &str) -> &str {
    let text = text.trim_start();
    text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_').next().unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn begin_and_commit_are_told_from_what_looks_like_them() {
        for text in ["BEGIN", "begin;", " BEGIN ISOLATION LEVEL READ COMMITTED; SELECT pg_current_xact_id()"] {
            assert!(begins(text) && !commits(text), "{text}");
        }
        for text in ["COMMIT", "SELECT 1; COMMIT", "select 1;commit;", "COMMIT AND CHAIN"] {
            assert!(commits(text) && !begins(text), "{text}");
        }
        let others =
            ["", "BEGINNING", "SET synchronous_commit = local", "CREATE TEMP TABLE a () ON COMMIT DROP", "ROLLBACK"];
        for text in others {
            assert!(!commits(text) && !begins(text), "{text}");
        }
    }

    #[test]
    fn each_cut_has_one_point() {
        let at_commit = [
            Cut::CommitUndelivered { server_stays: true },
            Cut::CommitDelivered,
            Cut::CommitAnswerDropped,
            Cut::CommitAnswerHalf(3),
            Cut::CommitHeld,
        ];
        assert!(at_commit.iter().all(|cut| cut.at_commit() && !cut.at_begin()));
        let at_begin = [Cut::BeginUndelivered, Cut::BeforeBeginAnswer];
        assert!(at_begin.iter().all(|cut| cut.at_begin() && !cut.at_commit()));
        assert!(!Cut::AfterStatement(1).at_begin() && !Cut::AfterStatement(1).at_commit());
    }
}
