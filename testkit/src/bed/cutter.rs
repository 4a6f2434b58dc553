//! A TCP proxy that cuts a connection at a chosen point of its transaction: around BEGIN, after a statement, around
//! COMMIT.
//!
//! It passes on one round trip at a time: what a client sends ahead waits until the answer before it has come. So a cut
//! lies between two messages, or between two bytes of an answer, and never somewhere near. Nothing else is changed.
//! What is encrypted passes, and is not cut.

mod link;

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::watch;

use crate::bed::port::Port;
use crate::bed::sync::lock;

/// Where a transaction's connection is cut.
///
/// BEGIN is a simple query whose text begins with it or with START, or is parsed in the same round trip as the first
/// statement, as the failover pool sends it. COMMIT is a simple query that has it as a statement, as
/// `SELECT 1; COMMIT`. The answer of a message ends with ReadyForQuery. "Closed" is a FIN after all that was passed on,
/// and is for both sides where nothing else is said; the server then rolls back what it has open, as soon as it reads
/// from the connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cut {
    /// BEGIN is not passed on.
    BeginUndelivered,
    /// The server has answered BEGIN. Nothing of it is passed on.
    BeforeBeginAnswer,
    /// So many round trips after BEGIN's have been answered, and the client has the answer; whatever it sends then is
    /// not passed on. A simple query is one round trip, and so are the messages up to a Sync: a statement with
    /// parameters that `tokio_postgres` prepares first makes two, and a third when it is dropped. 0 is after BEGIN's
    /// own answer. If BEGIN comes together with the first statement, 0 and 1 are after the answer to both. A COMMIT,
    /// and what ends the transaction in another way, does not count.
    AfterStatement(u32),
    /// The same, but the server's side stays open and silent, as when a path vanishes: the session stays idle in
    /// transaction, with its locks, until [`Cutter::release`].
    AfterStatementHeld(u32),
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
            Self::AfterStatementHeld(_) => "AfterStatementHeld",
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
        !self.at_begin() && !matches!(self, Self::AfterStatement(_) | Self::AfterStatementHeld(_))
    }

    fn keeps_server(self) -> bool {
        matches!(self, Self::CommitUndelivered { server_stays: true } | Self::CommitHeld | Self::AfterStatementHeld(_))
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
/// # use tokio_postgres_failover_testkit::bed::{cluster, cutter};
/// # async fn example(cluster: std::sync::Arc<cluster::Cluster>) {
/// use std::net::SocketAddr;
///
/// use cluster::Node;
/// use cutter::{Cut, Cutter};
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
        let port = Port::open("cutter", listen, move |client| link::serve(client, Arc::clone(&served))).await;
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

    /// Closes the connections to the server that [`Cut::CommitHeld`], [`Cut::CommitUndelivered`] and
    /// [`Cut::AfterStatementHeld`] have left open.
    pub fn release(&self) {
        self.shared.released.send_modify(|released| *released += 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        for cut in [Cut::AfterStatement(1), Cut::AfterStatementHeld(1)] {
            assert!(!cut.at_begin() && !cut.at_commit());
        }
    }
}
