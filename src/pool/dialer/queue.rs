//! Opens new connections in the background, each for the caller that has waited longest.
//!
//! A dial belongs to the pool and not to the caller that needed it first. If that caller gives up, the dial goes on,
//! and the next caller gets its connection. A caller that waits for a dial also takes a connection that is given back
//! meanwhile. Invariants: connections and dials together never exceed `max_size`. Doubted connections (`stale.rs`) are
//! not counted: others may be opened in their place, and a doubted one comes back only if there is room for it. If a
//! waiter has just given up, its delivery goes to the next one. Callers are served in the order in which they asked,
//! and nobody loses their place because a dial fails. The tests are in `tests/it/checkout/impatient.rs`.

mod after_connect;
mod dial;
mod kept;

pub(in crate::pool) use self::kept::{Doubted, InAHook};

use std::collections::VecDeque;
use std::future::pending;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use deadpool::managed::WeakPool;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::Instant;

use self::dial::dial;
use super::Dialer;
use crate::cluster::{Cluster, Generation};
use crate::error::{Error, Refused};
use crate::pool::connection::Connection;
use crate::pool::manager::Manager;
use crate::pool::room::{ConnectionCounts, CountedConnection};
use crate::server::{Session, SessionClient};
use crate::sync::lock;
use crate::topology::{GenerationId, ProbeFailure};

/// How long callers wait at least before they are told of a refused log-in, while connections are open that may come
/// back.
pub(in crate::pool) const REFUSED_AFTER: Duration = Duration::from_millis(500);

type Delivery<C> = Result<Connection<C>, Error>;

/// The connections that are being opened, the callers that wait for them, and connections that are ready for the next
/// caller.
pub(in crate::pool) struct DialQueue<C: SessionClient> {
    book: Mutex<QueueState<C>>,
    /// The number of callers that wait. It is read whenever a connection is given back, and written only while
    /// connections are opened.
    waiting: AtomicUsize,
    /// The largest number of connections and dials together.
    max_size: AtomicUsize,
    /// The number of connections to keep idle.
    min_idle: AtomicUsize,
    /// The pool that the manager serves, if it is this crate's.
    pool: OnceLock<WeakPool<Manager<C>>>,
    /// The runtime that the pool was built on. Dials and the drivers of their sessions run there, because a caller's
    /// runtime may end first.
    runtime: Handle,
    room: Arc<ConnectionCounts>,
}

struct QueueState<C> {
    waiters: VecDeque<Waiter<C>>,
    /// Connections outside of deadpool that are ready for the next caller. The newest one is the last.
    ready: Vec<Ready<C>>,
    dialing: usize,
    next_ticket: u64,
    /// When a dial that no caller waited for last failed, and to which primary.
    failed_at: Option<(GenerationId, Instant)>,
}

struct Waiter<C> {
    ticket: u64,
    /// When its caller asked. Only a refused log-in that began later is an answer to it.
    asked: Instant,
    deliver: oneshot::Sender<Delivery<C>>,
}

struct Ready<C> {
    connection: Connection<C>,
    since: Instant,
}

impl<C: SessionClient> DialQueue<C> {
    pub(in crate::pool) fn new(runtime: Handle) -> Self {
        let book =
            QueueState { waiters: VecDeque::new(), ready: Vec::new(), dialing: 0, next_ticket: 0, failed_at: None };
        Self {
            book: Mutex::new(book),
            waiting: AtomicUsize::new(0),
            max_size: AtomicUsize::new(usize::MAX),
            min_idle: AtomicUsize::new(0),
            pool: OnceLock::new(),
            runtime,
            room: Arc::default(),
        }
    }

    pub(in crate::pool) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// Sets the pool that the manager serves.
    pub(in crate::pool) fn serve(&self, pool: WeakPool<Manager<C>>, max_size: usize, min_idle: usize) {
        self.max_size.store(max_size, Ordering::Relaxed);
        self.min_idle.store(min_idle, Ordering::Relaxed);
        let _ = self.pool.set(pool);
    }

    /// Returns whether the manager serves a pool that the user has built. The size of such a pool is unknown.
    pub(in crate::pool) fn is_pool_built_by_hand(&self) -> bool {
        self.pool.get().is_none()
    }

    /// Returns whether a caller waits for a new connection. This is cheap: it reads a value that is rarely written.
    pub(in crate::pool) fn wanted(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }

    /// The number of connections that are ready for the next caller.
    pub(in crate::pool) fn ready(&self) -> usize {
        self.book().ready.len()
    }

    /// Waits until a caller needs a new connection, or until a connection or a dial has ended. Cancel-safe.
    pub(in crate::pool) async fn changed(&self) {
        self.room.changed.notified().await;
    }

    /// Returns when a dial to this primary that no caller waited for last failed.
    pub(in crate::pool) fn failed_at(&self, primary: GenerationId) -> Option<Instant> {
        self.book().failed_at.filter(|(to, _)| *to == primary).map(|(_, at)| at)
    }

    /// Gives a connection to the caller that has waited longest. If none waits, keeps it ready for the next caller.
    pub(in crate::pool) fn hand(&self, mut connection: Connection<C>) {
        if connection.is_evicted() {
            return;
        }
        let mut book = self.book();
        // The pool may have been made smaller meanwhile.
        if self.gives_way(&mut connection) {
            // Dropping a connection runs foreign code, so release the lock first.
            drop(book);
            return;
        }
        let unclaimed = self.deliver(&mut book, Ok(connection));
        if let Some(Ok(connection)) = unclaimed {
            book.ready.push(Ready { connection, since: Instant::now() });
        }
    }

    /// Returns whether there is one connection too many, so that this one must be closed. If so, it does not count any
    /// more, so that no other one is closed as well. The caller must hold the lock of the book.
    fn gives_way(&self, connection: &mut Connection<C>) -> bool {
        let surplus = self.is_overfull();
        if surplus {
            connection.leave_the_pool();
        }
        surplus
    }

    /// Gives a connection to the first waiter, or keeps it for the next one. Returns what is of no use.
    fn place(
        &self,
        book: &mut QueueState<C>,
        connection: Connection<C>,
        cluster: &Cluster<C>,
    ) -> Option<Connection<C>> {
        let unclaimed = if connection.may_be_handed_out(cluster) {
            self.deliver(book, Ok(connection))
        } else if connection.stale(cluster) {
            return Some(connection);
        } else {
            Some(Ok(connection))
        };
        if let Some(Ok(connection)) = unclaimed {
            connection.watched().ready();
            book.ready.push(Ready { connection, since: Instant::now() });
        }
        None
    }

    /// Gives `delivery` to the first waiter that still waits, or returns it if there is none.
    fn deliver(&self, book: &mut QueueState<C>, mut delivery: Delivery<C>) -> Option<Delivery<C>> {
        while let Some(waiter) = book.waiters.pop_front() {
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            match waiter.deliver.send(delivery) {
                Ok(()) => return None,
                Err(back) => delivery = back,
            }
        }
        Some(delivery)
    }

    fn book(&self) -> MutexGuard<'_, QueueState<C>> {
        lock(&self.book)
    }
}

/// A dial that is counted as under way.
struct CountedDial<C: SessionClient>(Arc<DialQueue<C>>);

impl<C: SessionClient> Drop for CountedDial<C> {
    fn drop(&mut self) {
        let mut book = self.0.book();
        book.dialing = book.dialing.saturating_sub(1);
        drop(book);
        // The waiters may need another dial, however this one has ended.
        self.0.room.changed.notify_one();
    }
}

/// A caller's place in the queue for new connections. Dropping it leaves the queue. If a connection was delivered and
/// not taken, it goes to the next caller.
struct QueueTicket<C: SessionClient> {
    queue: Arc<DialQueue<C>>,
    ticket: u64,
    delivered: oneshot::Receiver<Delivery<C>>,
}

impl<C: SessionClient> Drop for QueueTicket<C> {
    fn drop(&mut self) {
        let mut book = self.queue.book();
        if let Some(index) = book.waiters.iter().position(|waiter| waiter.ticket == self.ticket) {
            book.waiters.remove(index);
            self.queue.waiting.fetch_sub(1, Ordering::SeqCst);
            return;
        }
        drop(book);
        self.delivered.close();
        if let Ok(Ok(connection)) = self.delivered.try_recv() {
            self.queue.hand(connection);
        }
    }
}

impl<C: SessionClient> Dialer<C> {
    /// Returns a connection that no other caller holds. Waits for a primary and for a dial without a limit of its own.
    /// Cancel-safe: the dial or the test goes on, and its connection goes to the next caller.
    pub(in crate::pool) async fn connection(self: &Arc<Self>) -> Result<Connection<C>, Error> {
        let _wanting = self.cluster.want();
        let asked = Instant::now();
        loop {
            let generation = self.cluster.primary().await.map_err(Error::without_primary)?;
            let mut place = match self.enlist(&generation, asked) {
                Ok(connection) => match self.tested(connection).await {
                    Some(connection) => return Ok(connection),
                    None => continue,
                },
                Err(place) => place,
            };
            self.dial_for_waiters(&generation, 0);
            // A connection may have been given back just before this caller joined the queue.
            if let Some(connection) = self.queue.take_idle()
                && let Some(connection) = self.tested(connection).await
            {
                return Ok(connection);
            }
            tokio::select! {
                biased;
                delivered = &mut place.delivered => match delivered {
                    Ok(Ok(connection)) => if let Some(connection) = self.tested(connection).await {
                        return Ok(connection);
                    },
                    Ok(Err(error)) => return Err(error),
                    // This cannot happen, because this place keeps the queue alive.
                    Err(_) => return Err(Error::without_primary(self.cluster.ended())),
                },
                () = self.cluster.left(generation.primary.id) => {}
                () = self.keep_dialing(&generation) => {}
            }
        }
    }

    /// Starts another dial for the waiters whenever one has ended. A dial may end without a connection, for instance
    /// with its generation. In this crate's pool a task does this (`idle.rs`); in a pool built by hand, the waiters do
    /// it. Never returns.
    async fn keep_dialing(self: &Arc<Self>, generation: &Arc<Generation<C>>) {
        if !self.queue.is_pool_built_by_hand() {
            return pending().await;
        }
        loop {
            self.queue.changed().await;
            self.dial_for_waiters(generation, 0);
        }
    }

    /// Returns a ready connection, or a place in the queue.
    fn enlist(
        self: &Arc<Self>,
        generation: &Arc<Generation<C>>,
        asked: Instant,
    ) -> Result<Connection<C>, QueueTicket<C>> {
        let mut stale = Vec::new();
        let evictions = self.queue.room.evictions();
        let mut book = self.queue.book();
        for ready in std::mem::take(&mut book.ready) {
            // While the primary is suspended, its connections are not handed out. But they may be good again later, so
            // keep them.
            if ready.connection.stale(&self.cluster) { stale.push(ready) } else { book.ready.push(ready) }
        }
        if book.ready.last().is_some_and(|newest| newest.connection.may_be_handed_out(&self.cluster))
            && let Some(newest) = book.ready.pop()
        {
            self.queue.room.changed.notify_one();
            return Ok(newest.connection);
        }
        // The size of a pool built by hand is unknown. It has room for this caller if each dial under way has a waiter.
        let spoken_for = book.dialing > book.waiters.len() && self.queue.is_pool_built_by_hand();
        if !spoken_for
            && !self.has_after_connect()
            && self.queue.has_room(&book, true)
            && let Some(session) = generation.take_spare()
        {
            return Ok(self.make(session, generation, evictions));
        }
        let (deliver, delivered) = oneshot::channel();
        let ticket = book.next_ticket;
        book.next_ticket += 1;
        // A caller that waits again, because its primary was lost or its connection had ended, keeps its place.
        let place = book.waiters.partition_point(|waiter| waiter.asked <= asked);
        book.waiters.insert(place, Waiter { ticket, asked, deliver });
        self.queue.waiting.fetch_add(1, Ordering::SeqCst);
        drop(book);
        self.queue.room.changed.notify_one();
        Err(QueueTicket { queue: Arc::clone(&self.queue), ticket, delivered })
    }

    /// Starts the dials that the waiters need, and then others until `ahead` connections without a waiter are ready or
    /// being opened.
    pub(in crate::pool) fn balance(self: &Arc<Self>, ahead: usize) {
        if let Some(generation) = self.cluster.current() {
            self.dial_for_waiters(&generation, ahead);
        }
    }

    /// Like [`Self::balance`], for the primary of this generation. The waiter passes its generation. If this asked the
    /// cluster for it, the primary might be suspended just then and resumed a moment later, and no dial would be
    /// started.
    fn dial_for_waiters(self: &Arc<Self>, generation: &Arc<Generation<C>>, ahead: usize) {
        self.serve_waiters();
        let mut book = self.queue.book();
        loop {
            let (coming, waiters) = (book.dialing + book.ready.len(), book.waiters.len());
            if coming >= waiters + ahead || !self.queue.has_room(&book, coming < waiters) {
                break;
            }
            book.dialing += 1;
            let dialing = CountedDial(Arc::clone(&self.queue));
            let dial = dial(Arc::downgrade(self), Arc::clone(generation), dialing);
            // If the runtime has ended, the task is dropped immediately, and takes the lock. So release the lock first.
            drop(book);
            drop(self.queue.runtime.spawn(dial));
            if self.cluster.is_closed() {
                return;
            }
            book = self.queue.book();
        }
    }

    /// Gives ready connections to waiters, and closes stale ones. Otherwise they would be counted as if they were on
    /// their way to the waiters, and too few dials would be started. Waiters and ready connections exist at the same
    /// time only if a connection has arrived while its primary was suspended.
    fn serve_waiters(&self) {
        let mut stale = Vec::new();
        let mut book = self.queue.book();
        if book.waiters.is_empty() {
            return;
        }
        for Ready { connection, since } in std::mem::take(&mut book.ready) {
            if connection.stale(&self.cluster) {
                stale.push(connection);
                continue;
            }
            let unclaimed = if connection.may_be_handed_out(&self.cluster) {
                self.queue.deliver(&mut book, Ok(connection))
            } else {
                Some(Ok(connection))
            };
            if let Some(Ok(connection)) = unclaimed {
                book.ready.push(Ready { connection, since });
            }
        }
        // Dropping a connection runs foreign code, so release the lock first.
        drop(book);
    }

    /// The number of connections that are ready or being opened although no caller waits for them.
    pub(in crate::pool) fn ahead(&self) -> usize {
        let book = self.queue.book();
        book.ready.len() + book.dialing.saturating_sub(book.waiters.len())
    }

    /// Makes a connection of the session. The caller must hold the lock of the book.
    /// `evictions`: their number when the session was dialled.
    fn make(&self, session: Session<C>, generation: &Generation<C>, evictions: u64) -> Connection<C> {
        // Subtract up to a tenth, so that connections that were opened together after a failover do not expire
        // together.
        let less = self.random_up_to(self.max_lifetime / 10);
        let lifetime = self.max_lifetime.saturating_sub(less);
        let berth = CountedConnection::new(&self.queue.room, evictions);
        let (observer, opener) = (self.cluster.observer(), &self.opener);
        let connection = Connection::new(session, generation, lifetime, observer, berth, opener);
        self.trails.add(&connection.facts().trail);
        connection
    }

    fn arrived(&self, session: Session<C>, generation: &Generation<C>, dialing: CountedDial<C>, evictions: u64) {
        let mut book = self.queue.book();
        book.failed_at = None;
        let mut connection = self.make(session, generation, evictions);
        // One that was doubted may have come back, and taken the place of this one, or the pool was made smaller
        // meanwhile.
        let unwanted = if self.queue.gives_way(&mut connection) {
            Some(connection)
        } else {
            self.queue.place(&mut book, connection, &self.cluster)
        };
        drop(book);
        drop((unwanted, dialing));
    }

    /// No session could be opened. The callers go on waiting, and another dial is started.
    fn not_arrived(&self, generation: &Generation<C>) {
        let mut book = self.queue.book();
        if book.waiters.is_empty() {
            book.failed_at = Some((generation.primary.id, Instant::now()));
        }
    }

    /// Handles a refused log-in. It answers all callers that asked before the log-in began. While other connections are
    /// open, it leaves out callers that have just come, because they may still get one of those.
    fn refused(&self, generation: &Generation<C>, failure: &ProbeFailure, dialled: Instant) {
        let mut book = self.queue.book();
        if book.waiters.is_empty() {
            book.failed_at = Some((generation.primary.id, Instant::now()));
        }
        let grace = if generation.open.count() > 0 { REFUSED_AFTER } else { Duration::ZERO };
        let answered = |waiter: &Waiter<C>| waiter.asked <= dialled && waiter.asked.elapsed() >= grace;
        while book.waiters.front().is_some_and(answered) {
            let refused = Refused::new(Some(generation.endpoint()), failure.clone());
            self.queue.deliver(&mut book, Err(Error::Refused(Box::new(refused))));
        }
    }
}

impl<C: SessionClient> DialQueue<C> {
    /// Returns whether there are as many connections as the pool may have. Dials and doubted connections are not
    /// counted.
    fn is_full(&self) -> bool {
        self.undoubted() >= self.max_size.load(Ordering::Relaxed)
    }

    /// Returns whether nobody who asks now gets a connection unless another one is given back: those that are open, and
    /// those that others wait for, are as many as there may be.
    pub(in crate::pool) fn is_spoken_for(&self) -> bool {
        let book = self.book();
        let coming = book.dialing.max(book.waiters.len());
        self.undoubted() + coming >= self.max_size.load(Ordering::Relaxed)
    }

    /// Returns whether another connection may be opened. `waits`: for a caller that waits. Otherwise it would be for
    /// nobody.
    fn has_room(&self, book: &QueueState<C>, waits: bool) -> bool {
        let live = if waits { self.undoubted() } else { self.room.live.load(Ordering::Acquire) };
        let most = self.max_size.load(Ordering::Relaxed);
        live + book.dialing < if planted!("opens too many connections") { most * 4 } else { most }
    }
}
