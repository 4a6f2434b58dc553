//! Gets connections from a wrapped pool for callers: in the background, each for the caller that has waited longest.
//!
//! deadpool opens and tests connections within its caller's `get`, and drops them with it. So a caller polls that `get`
//! once, which is all that an idle connection takes, and hands the rest to a task of this pool (`fetches/fetch.rs`). If
//! the caller gives up, the task goes on and serves the next one. A connection that nobody waits for goes back to the
//! wrapped pool. While log-ins will most likely fail, only one task tries to log in, and it also takes connections that
//! come back meanwhile. If its log-in hangs, the next task may try. Invariants: at least as many fetches are under way
//! as callers wait. A fetch ends with its generation. A fetch that nobody waits for ends after the time limit for
//! opening a session, and tries no log-in that will most likely fail. The tests are in `tests/it/checkout/fetches.rs`
//! and `tests/it/checkout/refused.rs`.

mod fetch;

use std::collections::{HashMap, VecDeque};
use std::future::{pending, poll_fn, ready};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::task::Poll;
use std::time::Duration;

use deadpool::managed;
use tokio::sync::{Notify, oneshot};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep};

use self::fetch::{Fetching, spawn};
use super::client::CheckedOut;
use super::counted::Counted;
use super::dialer::{Dialer, REFUSED_AFTER, Turn};
use super::facts::Facts;
use super::trail::SessionTrails;
use super::wrapped_pool::{Getting, NoObject, ObjectKey, WrappedObject, WrappedPool};
use crate::cluster::Generation;
use crate::error::{Error, Obstacle, Refused, Unavailable};
use crate::server::SessionClient;
use crate::sync::lock;
use crate::topology::{GenerationId, ProbeFailure};

/// How often a fetch that waits for its log-in looks for idle connections. This pool does not notice when other users
/// of the wrapped pool give connections back.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// The source of connections for [`Pool::get`](super::Pool::get) with a wrapped pool.
pub(super) struct Wrapped<C: SessionClient> {
    pub(super) existing: Arc<dyn WrappedPool<C>>,
    /// The connections whose server proved to be the primary of the newest generation.
    known: Mutex<HashMap<ObjectKey, Arc<Facts>>>,
    pub(super) trails: SessionTrails,
    queue: Mutex<Queue<C>>,
    /// While log-ins will most likely fail, the one fetch that may try the next log-in holds this lock. It waits for
    /// its time, and for a connection that comes back.
    first: tokio::sync::Mutex<()>,
    /// The number of fetches that wait for this lock, or that hold it and still wait for their log-in.
    held_up: AtomicUsize,
    /// When the next such log-in may be tried.
    pub(super) next_at: Mutex<Option<Instant>>,
    /// Tells the fetches that do not hold a clearance that a log-in was refused.
    pub(super) turned_away: Notify,
}

/// The callers that wait, and the fetches under way for the primary of one generation.
pub(super) struct Queue<C> {
    pub(super) waiters: VecDeque<Waiter<C>>,
    next_ticket: u64,
    pub(super) generation: GenerationId,
    pub(super) fetches: usize,
    /// The number of fetches that a new caller may rely on. The others take too long.
    pub(super) young: usize,
}

pub(super) struct Waiter<C> {
    ticket: u64,
    /// When its caller asked. Only a fetch that began later can fail it.
    asked: Instant,
    deliver: oneshot::Sender<Delivery<C>>,
}

/// A connection to the verified primary.
pub(super) struct Fetched<C> {
    pub(super) object: Box<dyn WrappedObject<C>>,
    pub(super) facts: Arc<Facts>,
    pub(super) generation: Arc<Generation<C>>,
}

type Delivery<C> = Result<Fetched<C>, Error>;

/// A caller's place in the queue. Dropping it leaves the queue. If a connection was delivered and not taken, it goes to
/// the next caller.
struct QueueTicket<C: SessionClient> {
    wrapped: Arc<Wrapped<C>>,
    ticket: u64,
    delivered: oneshot::Receiver<Delivery<C>>,
}

impl<C: SessionClient> Drop for QueueTicket<C> {
    fn drop(&mut self) {
        let mut queue = self.wrapped.queue();
        if let Some(index) = queue.waiters.iter().position(|waiter| waiter.ticket == self.ticket) {
            let left = queue.waiters.remove(index);
            drop(queue);
            self.wrapped.existing.returns().waiting.fetch_sub(usize::from(left.is_some()), Ordering::SeqCst);
            return;
        }
        drop(queue);
        self.delivered.close();
        if let Ok(Ok(fetched)) = self.delivered.try_recv() {
            self.wrapped.hand(fetched);
        }
    }
}

/// The locks that a fetch holds while it tries a log-in that will most likely fail.
pub(super) struct Clearance<'a> {
    _first: tokio::sync::MutexGuard<'a, ()>,
    _turn: Turn,
}

impl<C: SessionClient> Wrapped<C> {
    pub(super) fn new(existing: Arc<dyn WrappedPool<C>>) -> Self {
        let queue = Queue {
            waiters: VecDeque::new(),
            next_ticket: 0,
            generation: GenerationId::default(),
            fetches: 0,
            young: 0,
        };
        Self {
            existing,
            known: Mutex::default(),
            trails: SessionTrails::default(),
            queue: Mutex::new(queue),
            first: tokio::sync::Mutex::default(),
            held_up: AtomicUsize::new(0),
            next_at: Mutex::default(),
            turned_away: Notify::new(),
        }
    }

    pub(super) fn status(&self) -> managed::Status {
        let status = self.existing.status();
        let queue = self.queue();
        // The wrapped pool counts a fetch that nobody waits for as waiting, so subtract those.
        let surplus = queue.fetches.saturating_sub(queue.waiters.len());
        managed::Status { waiting: status.waiting.saturating_sub(surplus).max(queue.waiters.len()), ..status }
    }

    pub(super) fn clear_statement_caches(&self) {
        self.trails.clear();
        self.existing.clear_idle();
    }

    /// Returns a connection to the primary. Waits without a limit of its own. Cancel-safe: a fetch that was begun goes
    /// on for the next caller.
    pub(super) async fn checkout(self: &Arc<Self>, dialer: &Arc<Dialer<C>>) -> Result<CheckedOut<C>, Error> {
        let asked = Instant::now();
        loop {
            // Wait before a slot is taken, so that others can use the slot meanwhile.
            let generation = dialer.cluster.primary().await.map_err(Error::without_primary)?;
            // After this pool was closed, the wrapped pool still has idle connections. Do not hand those out.
            if dialer.cluster.is_closed() {
                return Err(Error::without_primary(dialer.cluster.ended()));
            }
            let id = generation.primary.id;
            self.existing.evict_for(id);
            let getting = if self.may_get(dialer, &generation) {
                match self.poll_once(dialer, &generation).await {
                    Ok(fetched) => return Ok(check_out(dialer, fetched)),
                    Err(getting) => Some(getting),
                }
            } else {
                None
            };
            let (mut place, fetching) = self.enlist(id, asked, getting.is_some());
            if let Some(fetching) = fetching {
                spawn(dialer, fetching, &generation, getting);
            }
            let delivered = tokio::select! {
                biased;
                delivered = &mut place.delivered => delivered,
                () = dialer.cluster.scope().cancelled() => return Err(Error::without_primary(dialer.cluster.ended())),
                () = dialer.cluster.left(id) => continue,
            };
            match delivered {
                Ok(Ok(fetched)) if dialer.cluster.is_current(id) => return Ok(check_out(dialer, fetched)),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(error),
                // The fetch was dropped, by a panic in the program's log or with the runtime.
                Err(_) => yield_now().await,
            }
        }
    }

    /// Returns whether a caller may call the wrapped pool itself. If not, the caller joins the queue: either a fetch
    /// under way will serve it, or others wait already because log-ins will most likely fail.
    fn may_get(&self, dialer: &Dialer<C>, generation: &Generation<C>) -> bool {
        let (waiting, spare) = {
            let queue = self.queue();
            let current = queue.generation == generation.primary.id;
            (!queue.waiters.is_empty(), current && queue.young > queue.waiters.len())
        };
        if !waiting && self.existing.status().available > 0 {
            return true;
        }
        if self.held_up.load(Ordering::SeqCst) > 0 || dialer.needs_turn(generation).is_some() {
            return !waiting && self.existing.idle() > 0;
        }
        !spare || self.existing.idle() > 0
    }

    /// Calls the wrapped pool, and polls its future once, which is enough if a connection is idle. `Err`: it takes
    /// longer, or the connection must be asked which server it leads to.
    async fn poll_once(&self, dialer: &Dialer<C>, generation: &Arc<Generation<C>>) -> Result<Fetched<C>, Getting<C>> {
        let mut getting = Arc::clone(&self.existing).get();
        let polled = poll_fn(|context| {
            // Tasks that the manager starts must run on the pool's runtime, because a caller's runtime may end first.
            let _entered = dialer.queue.runtime().enter();
            Poll::Ready(getting.as_mut().poll(context))
        })
        .await;
        match polled {
            Poll::Pending => Err(getting),
            Poll::Ready(Err(none)) => Err(at_once(Err(none))),
            Poll::Ready(Ok(object)) => self.as_known(generation, object).map_err(|object| at_once(Ok(object))),
        }
    }

    /// Joins the queue. Returns the fetch that the caller must start, if one is needed. `begun`: the caller has called
    /// the wrapped pool already.
    fn enlist(
        self: &Arc<Self>,
        id: GenerationId,
        asked: Instant,
        begun: bool,
    ) -> (QueueTicket<C>, Option<Fetching<C>>) {
        let (deliver, delivered) = oneshot::channel();
        let mut queue = self.queue();
        queue.turn_to(id);
        let ticket = queue.next_ticket;
        queue.next_ticket += 1;
        // A caller whose primary was lost keeps its place.
        let place = queue.waiters.partition_point(|waiter| waiter.asked <= asked);
        queue.waiters.insert(place, Waiter { ticket, asked, deliver });
        self.existing.returns().waiting.fetch_add(1, Ordering::SeqCst);
        let fetching =
            (begun || queue.young < queue.waiters.len()).then(|| Fetching::new(Arc::clone(self), &mut queue, id));
        drop(queue);
        (QueueTicket { wrapped: Arc::clone(self), ticket, delivered }, fetching)
    }

    /// Gives a connection to the caller that has waited longest, or back to the wrapped pool.
    pub(super) fn hand(&self, fetched: Fetched<C>) {
        // Those who wait have fetches of their own.
        if fetched.object.is_evicted() {
            return fetched.object.discard();
        }
        let mut queue = self.queue();
        let unclaimed = if queue.generation == fetched.generation.primary.id {
            self.deliver(&mut queue, Ok(fetched))
        } else {
            Some(Ok(fetched))
        };
        drop(queue);
        drop(unclaimed);
    }

    /// Gives `delivery` to the first caller that still waits, or returns it if there is none.
    fn deliver(&self, queue: &mut Queue<C>, mut delivery: Delivery<C>) -> Option<Delivery<C>> {
        while let Some(waiter) = queue.waiters.pop_front() {
            self.existing.returns().waiting.fetch_sub(1, Ordering::SeqCst);
            match waiter.deliver.send(delivery) {
                Ok(()) => return None,
                Err(back) => delivery = back,
            }
        }
        Some(delivery)
    }

    /// Handles a refused log-in. It answers all callers that asked before the log-in began. While connections are open,
    /// it leaves out callers that have just come, because they may still get one of those.
    pub(super) fn refused(&self, generation: &Generation<C>, failure: &ProbeFailure, dialled: Instant) {
        let grace = if self.existing.status().size > 0 { REFUSED_AFTER } else { Duration::ZERO };
        let answered = |waiter: &Waiter<C>| waiter.asked <= dialled && waiter.asked.elapsed() >= grace;
        let mut queue = self.queue();
        while queue.waiters.front().is_some_and(answered) {
            let refused = Refused::new(Some(generation.endpoint()), failure.clone());
            self.deliver(&mut queue, Err(Error::Refused(Box::new(refused))));
        }
    }

    /// Handles the wrapped pool's error that no connection became free within its own wait time-out. The first caller
    /// gets that error if it has waited for as long.
    pub(super) fn none_free(&self, dialer: &Dialer<C>, began: Instant) {
        let obstacle = Obstacle::NoneFree { max_size: self.existing.status().max_size };
        let limit = "the wait time-out of the wrapped pool";
        let unavailable = Unavailable::new(began.elapsed(), dialer.cluster.diagnosis(), obstacle, limit);
        let mut queue = self.queue();
        if queue.waiters.front().is_some_and(|waiter| waiter.asked <= began) {
            self.deliver(&mut queue, Err(Error::Unavailable(Box::new(unavailable))));
        }
    }

    /// Tells all callers that the owner has closed the wrapped pool.
    pub(super) fn closed(&self, dialer: &Dialer<C>) {
        let mut queue = self.queue();
        while !queue.waiters.is_empty() {
            self.deliver(&mut queue, Err(Error::without_primary(dialer.cluster.ended())));
        }
    }

    /// Waits until a log-in may be tried, or until the wrapped pool has an idle connection. Fails if a log-in that
    /// began after `began` was refused. `until`: the fetch's last log-in failed, and the next one must not come
    /// earlier. The outer `None`: the pool has been dropped.
    pub(super) async fn clearance<'a>(
        &'a self,
        dialer: &Weak<Dialer<C>>,
        generation: &Generation<C>,
        began: Instant,
        until: Option<Instant>,
    ) -> Option<Result<Option<Clearance<'a>>, ProbeFailure>> {
        let turns = dialer.upgrade()?.needs_turn(generation);
        let unlikely = turns.is_some();
        let behind = unlikely || self.held_up.load(Ordering::SeqCst) > 0;
        if !behind && until.is_none_or(|until| until <= Instant::now()) {
            return Some(Ok(None));
        }
        let _held_up = Counted::new(&self.held_up);
        let first = self.first.lock().await;
        let mut turn: Turn = None;
        let mut taking = turns.map(|turns| Box::pin(turns.lock_owned()));
        loop {
            let due = if unlikely {
                match dialer.upgrade()?.log_in_at(generation, began) {
                    Ok(at) => at.max(*lock(&self.next_at)),
                    Err(refused) => return Some(Err(refused)),
                }
            } else {
                until
            };
            let may_log_in = taking.is_none() && due.is_none_or(|due| due <= Instant::now());
            if may_log_in || self.existing.idle() > 0 {
                return Some(Ok(unlikely.then(|| Clearance { _first: first, _turn: turn })));
            }
            let taken = async {
                match taking.as_mut() {
                    Some(taking) => taking.await,
                    None => pending().await,
                }
            };
            tokio::select! {
                biased;
                held = taken => {
                    taking = None;
                    turn = Some(held);
                }
                () = self.existing.returns().changed.notified() => {}
                () = sleep(LOOK_AGAIN) => {}
            }
        }
    }

    /// Gives the wrapped pool's idle connections to the callers that wait for a log-in.
    pub(super) async fn serve_idle(self: &Arc<Self>, dialer: &Weak<Dialer<C>>, generation: &Arc<Generation<C>>) {
        while self.existing.returns().waiting.load(Ordering::SeqCst) > 0 && self.existing.idle() > 0 {
            let Some(dialer) = dialer.upgrade() else { return };
            match self.poll_once(&dialer, generation).await {
                Ok(fetched) => self.hand(fetched),
                Err(getting) => {
                    let fetching = Fetching::new(Arc::clone(self), &mut self.queue(), generation.primary.id);
                    return spawn(&dialer, fetching, generation, Some(getting));
                }
            }
        }
    }

    /// Returns the connection as it is handed out, if its server is known to be the primary.
    pub(super) fn as_known(
        &self,
        generation: &Arc<Generation<C>>,
        object: Box<dyn WrappedObject<C>>,
    ) -> Result<Fetched<C>, Box<dyn WrappedObject<C>>> {
        self.existing.count_traffic();
        // The manager's `recycle` may accept every connection.
        if object.is_used() && object.is_closed() {
            return Err(object);
        }
        let id = generation.primary.id;
        let facts = lock(&self.known).get(&object.key()).filter(|facts| facts.generation == id).cloned();
        match facts {
            Some(facts) => Ok(Fetched { object, facts, generation: Arc::clone(generation) }),
            None => Err(object),
        }
    }

    /// Remembers a connection to the primary. The wrapped pool does not report which connections it closes. So from
    /// time to time this forgets all connections, and open ones are asked once more.
    pub(super) fn remember(&self, object: ObjectKey, facts: &Arc<Facts>) {
        let most = self.existing.status().max_size.saturating_mul(4).max(64);
        let mut known = lock(&self.known);
        if known.len() >= most {
            known.clear();
        }
        known.retain(|_, other| other.generation == facts.generation);
        known.insert(object, Arc::clone(facts));
    }

    pub(super) fn queue(&self) -> MutexGuard<'_, Queue<C>> {
        lock(&self.queue)
    }
}

impl<C> Queue<C> {
    /// From now on, only the fetches of this generation count.
    fn turn_to(&mut self, id: GenerationId) {
        if id > self.generation {
            (self.generation, self.fetches, self.young) = (id, 0, 0);
        }
    }
}

fn at_once<C: SessionClient>(got: Result<Box<dyn WrappedObject<C>>, NoObject>) -> Getting<C> {
    Box::pin(ready(got))
}

fn check_out<C: SessionClient>(dialer: &Dialer<C>, fetched: Fetched<C>) -> CheckedOut<C> {
    let Fetched { object, facts, generation } = fetched;
    let watched = dialer.cluster.observer().connection(&generation.open, generation.endpoint().address);
    CheckedOut::Wrapped { object, facts, watched, scope: generation.scope.clone() }
}
