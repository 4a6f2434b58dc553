//! Hands out connections of the current generation, and no others.
//!
//! Decides nothing about servers: what may be handed out is read from the cluster's snapshot. Knows nothing of how the
//! primary was found. Invariants: a checkout does no I/O on an idle connection; a new connection has answered the probe
//! in this generation; a poisoned connection never goes back. Tests: `tests/it/get.rs`, `tests/it/errors.rs`.

mod builder;

pub use builder::{IntoConfig, PoolBuilder};

use std::collections::HashMap;
use std::fmt;
use std::future::poll_fn;
use std::ops::{Deref, DerefMut};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use deadpool::managed::{self, Metrics, Object, PoolError, RecycleError, RecycleResult, WeakPool};
use deadpool_postgres::ClientWrapper;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::cluster::{Cluster, Generation, NoPrimary};
use crate::commit::ledger::Ledger;
use crate::commit::wal::Marking;
use crate::commit::{Guarantee, Life, Server};
use crate::error::{BuildError, Error, Obstacle, Refused, Unavailable};
use crate::retry::{Exponential, RetryBudget, RetryPolicy};
use crate::server::{Notices, Opener, Session};
use crate::topology::{CandidateReport, FailureKind, GenerationId, ProbeFailure, ServerReport, Suspicion, View};

/// Pauses between tries to open a session to a primary that is known and takes none.
const OPEN_PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// One new pool of so many prunes its ledger at once.
const PRUNE_AT_ONCE: u64 = 64;

/// Shortest and longest pause between two looks at the idle connections.
const REAP_PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(30));

/// A pool of connections to the primary of one cluster. Cheap to clone; all clones are one pool.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use tokio_postgres_failover::Pool;
///
/// let pool = Pool::builder("postgres://app@my-pg.internal/app")?.max_size(16).build()?;
/// let client = pool.get().await?;
/// let row = client.query_one("SELECT version()", &[]).await?;
/// println!("{}", row.get::<_, String>(0));
/// # Ok(())
/// # }
/// ```
///
/// Up to `max_size` connections are open for the callers, and one more for the heart-beat; for a moment after a failover
/// one more holds the session that found the primary. When the last clone and the last [`Client`] are dropped, everything
/// that the pool started ends.
#[derive(Clone)]
pub struct Pool {
    inner: managed::Pool<Manager>,
    shared: Arc<Shared>,
}

struct Shared {
    checkout_timeout: Duration,
    retry: RetryPolicy,
    budget: RetryBudget,
    guarantee: Guarantee,
    /// Callers that wait for a primary; the inner pool knows of those alone that wait for a connection.
    searching: AtomicUsize,
    /// The newest primary on which transactions cannot be marked, and why.
    unmarked: Mutex<Option<(GenerationId, String)>>,
    /// When each ledger is pruned next, by its name.
    prune_at: Mutex<HashMap<String, Instant>>,
    /// Of those who settle a commit, so many ask at the same time.
    settlers: Semaphore,
}

impl Pool {
    /// Starts a configuration from a connection string, in URL or `key=value` form, or a [`tokio_postgres::Config`].
    ///
    /// Everything that such a configuration carries is honoured, or refused with a [`BuildError`].
    pub fn builder(config: impl IntoConfig) -> Result<PoolBuilder, BuildError> {
        PoolBuilder::new(config)
    }

    /// Waits until a primary was found and verified, at most for the checkout timeout. Cancel-safe.
    ///
    /// Optional: `get` and the transactions wait by themselves. Of use at start-up, to fail early and with the reason.
    pub async fn connect(&self) -> Result<(), Error> {
        let began = Instant::now();
        match timeout(self.shared.checkout_timeout, self.cluster().primary()).await {
            Ok(found) => found.map(drop).map_err(Into::into),
            Err(_) => Err(self.unavailable(began)),
        }
    }

    /// A connection to the verified primary.
    ///
    /// Waits for a primary and for a free connection, at most for the checkout timeout (30 s unless set); then fails
    /// with [`Error::Unavailable`], which lists each candidate and what it said. Fails at once with [`Error::Refused`]
    /// where the credentials are wrong. An idle connection is handed out without a round trip. Cancel-safe.
    ///
    /// What you begin by hand, end by hand before the connection goes back: neither an open transaction nor a statement
    /// whose future was dropped is undone for you. [`Client::transaction`](deadpool_postgres::ClientWrapper::transaction)
    /// rolls back by itself, and [`Pool::transaction`] leaves nothing behind whatever happens.
    ///
    /// A failover ends the connection: its statements then fail with [`tokio_postgres::Error`]s, and the next `get`
    /// gives one to the new primary. To have the work run again instead, use [`Pool::transaction`].
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
    /// let client = pool.get().await?;
    /// let statement = client.prepare_cached("SELECT name FROM users WHERE id = $1").await?;
    /// let row = client.query_one(&statement, &[&7_i64]).await?;
    /// # drop(row);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn get(&self) -> Result<Client, Error> {
        self.get_by(|| Instant::now() + self.shared.checkout_timeout).await
    }

    /// What the pool is doing now.
    #[must_use]
    pub fn status(&self) -> Status {
        let managed::Status { max_size, size, available, waiting } = self.inner.status();
        let waiting = waiting + self.shared.searching.load(Ordering::Relaxed);
        let view = self.cluster().view();
        let fallback = lock(&self.shared.unmarked).clone().filter(|(id, _)| *id == view.generation).map(|(_, why)| why);
        Status { max_size, size, available, waiting, fallback, view }
    }

    /// Follows the cluster's state: the receiver sees each primary lost and found.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) {
    /// use tokio_postgres_failover::State;
    ///
    /// let mut states = pool.subscribe();
    /// while states.changed().await.is_ok() {
    ///     let view = states.borrow_and_update().clone();
    ///     match view.state {
    ///         State::Primary { endpoint, .. } => println!("primary: {endpoint}"),
    ///         State::Searching { .. } => println!("no primary: {}", view.changed.why),
    ///         _ => break,
    ///     }
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<View> {
        self.cluster().subscribe()
    }

    /// Each candidate of the newest search or patrol, and what it said last: for diagnosis. Its answers may be as old as
    /// the last patrol.
    #[must_use]
    pub fn candidates(&self) -> Vec<CandidateReport> {
        self.cluster().diagnosis().candidates
    }

    /// What DNS failed with when it was asked last, if it did.
    #[must_use]
    pub fn dns_failure(&self) -> Option<String> {
        self.cluster().diagnosis().dns
    }

    /// Closes the pool at once: waiting callers get [`Error::Closed`], and every connection ends, also one in use.
    /// Finish your work first. Idempotent; affects all clones.
    pub fn close(&self) {
        self.inner.close();
        self.cluster().close();
    }

    pub(crate) async fn get_until(&self, deadline: Instant) -> Result<Client, Error> {
        self.get_by(|| deadline).await
    }

    async fn get_by(&self, deadline: impl FnOnce() -> Instant) -> Result<Client, Error> {
        let mut checkout = pin!(self.checkout());
        // An idle connection is there at once: for it no clock is read and no timer is made.
        if let Poll::Ready(checked_out) = poll_fn(|context| Poll::Ready(checkout.as_mut().poll(context))).await {
            return checked_out;
        }
        let (began, deadline) = (Instant::now(), deadline());
        match timeout_at(deadline, checkout).await {
            Ok(checked_out) => checked_out,
            Err(_) => Err(self.unavailable(began)),
        }
    }

    async fn checkout(&self) -> Result<Client, Error> {
        loop {
            // Waiting is done here and not in `recycle`: a caller that gives up in there takes a good connection along.
            if !self.cluster().has_primary() {
                let _counted = Counted::new(&self.shared.searching);
                if let Err(none) = Box::pin(self.cluster().primary()).await {
                    // Whoever asks again at once, in a loop, must let the task run that might find something better.
                    tokio::task::yield_now().await;
                    return Err(none.into());
                }
            }
            match self.inner.get().await {
                Ok(object) => {
                    self.cluster().lend();
                    return Ok(Client { object: Some(object), pool: self.clone() });
                }
                // No session could be opened now. Another caller may have given one back meanwhile: look there first.
                Err(PoolError::Backend(Error::Unavailable(_))) => {}
                Err(PoolError::Backend(error)) => return Err(error),
                // The inner pool has no time-outs and no hooks of its own, so all that is left is that it was closed.
                Err(_) => return Err(Error::Closed),
            }
        }
    }

    pub(crate) fn retry_policy(&self) -> &RetryPolicy {
        &self.shared.retry
    }

    pub(crate) fn budget(&self) -> &RetryBudget {
        &self.shared.budget
    }

    pub(crate) fn guarantee(&self) -> &Guarantee {
        &self.shared.guarantee
    }

    /// Can the transactions of this primary not be marked?
    pub(crate) fn is_unmarked(&self, id: GenerationId) -> bool {
        lock(&self.shared.unmarked).as_ref().is_some_and(|(unmarked, _)| *unmarked == id)
    }

    /// Remembers that the transactions of this primary cannot be marked; says so the first time.
    pub(crate) fn set_unmarked(&self, id: GenerationId, why: &str) {
        let before = lock(&self.shared.unmarked).replace((id, why.to_owned()));
        if before.is_none_or(|(_, said)| said != why) {
            tracing::warn!(why, "transactions cannot be settled here: ExactlyOnce is AtMostOnce");
        }
    }

    /// Is it this caller who prunes the ledger? One does, several times while a row is kept.
    pub(crate) fn prunes(&self, ledger: &Ledger) -> bool {
        let (now, pause) = (Instant::now(), ledger.kept_for() / 8);
        let mut dates = lock(&self.shared.prune_at);
        let date = dates.entry(ledger.path()).or_insert_with(|| {
            // Pools that were started together do not prune together; and those that never live so long prune, too.
            let at_once = self.next_seed().is_multiple_of(PRUNE_AT_ONCE);
            if at_once { now } else { now + self.inner.manager().random_up_to(pause) }
        });
        let due = *date <= now;
        if due {
            *date = now + pause;
        }
        due
    }

    /// A session beside those of the pool. Whoever settles a commit must not queue behind those who wait for its locks.
    /// Waits for a primary without a limit of its own. Cancel-safe.
    pub(crate) async fn aside(&self) -> Result<Aside, Error> {
        let (session, generation) = self.inner.manager().session().await?;
        Ok(Aside { session, generation })
    }

    /// Passed by those who settle a commit, while they ask.
    pub(crate) fn settlers(&self) -> &Semaphore {
        &self.shared.settlers
    }

    /// A seed for one call's jitter.
    pub(crate) fn next_seed(&self) -> u64 {
        self.inner.manager().next_seed()
    }

    pub(crate) fn suspect(&self, id: GenerationId, suspicion: Suspicion) {
        self.cluster().suspect(id, suspicion);
    }

    fn cluster(&self) -> &Cluster {
        &self.inner.manager().cluster
    }

    fn unavailable(&self, began: Instant) -> Error {
        let managed::Status { size, max_size, .. } = self.inner.status();
        let obstacle = match self.cluster().current() {
            None => Obstacle::NoPrimary,
            Some(_) if size >= max_size => Obstacle::NoneFree { max_size },
            Some(generation) => Obstacle::NoSession(generation.trouble()),
        };
        Error::Unavailable(Box::new(Unavailable::new(began.elapsed(), self.cluster().diagnosis(), obstacle)))
    }

    /// Asks the server to stop what `client` runs, in a task of its own that takes some seconds at most. It does not end
    /// with the pool: a session whose socket is gone still runs its statement to the end.
    fn cancel_running(&self, client: &ClientWrapper) {
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        let opener = Arc::clone(&self.inner.manager().opener);
        let token = client.cancel_token();
        runtime.spawn(async move { opener.cancel(token).await });
    }
}

/// A session to the primary that no pool holds; dropping it closes it, and what was begun on it is rolled back.
pub(crate) struct Aside {
    session: Session,
    generation: Arc<Generation>,
}

impl Aside {
    pub(crate) fn client(&self) -> &tokio_postgres::Client {
        &self.session.client
    }

    pub(crate) fn notices(&self) -> &Notices {
        &self.session.notices
    }

    pub(crate) fn generation(&self) -> GenerationId {
        self.generation.primary.id
    }

    pub(crate) fn life(&self) -> Option<Life> {
        life(&self.generation.primary.report)
    }
}

/// One more in a counter, for as long as it lives.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(counter: &'a AtomicUsize) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(counter)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("status", &self.status()).finish_non_exhaustive()
    }
}

/// When idle connections are closed.
#[derive(Clone, Copy, Debug)]
struct Idle {
    timeout: Duration,
    min: usize,
}

impl Idle {
    /// Closes what is of no use any more and what has been idle for too long, until the pool is gone.
    async fn reap(self, pool: WeakPool<Manager>, end: CancellationToken) {
        let pause = (self.timeout / 4).clamp(REAP_PAUSE.0, REAP_PAUSE.1);
        while end.run_until_cancelled(sleep(pause)).await.is_some() {
            let Some(pool) = pool.upgrade() else {
                return;
            };
            let mut surplus = pool.status().available.saturating_sub(self.min);
            let reaped = pool.retain(|connection, metrics| {
                let stale = !connection.usable() || connection.expired();
                let reap = stale || (surplus > 0 && metrics.last_used() >= self.timeout);
                surplus = surplus.saturating_sub(usize::from(reap));
                !reap
            });
            if !reaped.removed.is_empty() {
                tracing::debug!(closed = reaped.removed.len(), idle = reaped.retained, "idle connections reaped");
            }
        }
    }
}

/// What a pool is doing, from [`Pool::status`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Status {
    /// The most connections that are handed out at the same time.
    pub max_size: usize,
    /// Connections that exist now.
    pub size: usize,
    /// Those of them that are idle.
    pub available: usize,
    /// Callers that wait for one.
    pub waiting: usize,
    /// Why [`Guarantee::ExactlyOnce`] is no more than [`Guarantee::AtMostOnce`] on this primary, if it is not: what the
    /// server does not offer. Known from the first transaction on.
    pub fallback: Option<String>,
    /// The primary, the generation, and the last change and why it happened.
    pub view: View,
}

/// A connection to the primary, on loan from a [`Pool`]; dropping it gives it back.
///
/// Derefs to deadpool-postgres' `ClientWrapper`, which has `prepare_cached` and `transaction`, and on to
/// [`tokio_postgres::Client`], which is a [`tokio_postgres::GenericClient`].
///
/// ```no_run
/// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
/// use tokio_postgres::GenericClient;
///
/// async fn count(client: &impl GenericClient) -> Result<i64, tokio_postgres::Error> {
///     Ok(client.query_one("SELECT count(*) FROM orders", &[]).await?.get(0))
/// }
///
/// let mut client = pool.get().await?;
/// count(&***client).await?;
/// let transaction = client.transaction().await?;
/// count(&*transaction).await?;
/// # Ok(())
/// # }
/// ```
pub struct Client {
    /// Taken only by `drop`.
    object: Option<Object<Manager>>,
    /// Keeps the cluster's task alive for as long as the connection is in use.
    pool: Pool,
}

impl Client {
    /// The generation that the connection belongs to.
    #[must_use]
    pub fn generation(&self) -> GenerationId {
        self.connection().map_or_else(GenerationId::default, |connection| connection.held.generation)
    }

    /// Ends the session; it never goes back to the pool. What the server still runs for it is cancelled.
    pub(crate) fn poison(&self) {
        if let Some(connection) = self.connection()
            && !connection.held.poisoned.swap(true, Ordering::AcqRel)
        {
            // What the pool itself has closed may still run on the server.
            if !connection.held.client.is_closed() || self.pool.cluster().is_closed() {
                self.pool.cancel_running(&connection.held.client);
            }
            connection.held.abort.abort();
        }
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The server at the other end, where it lets itself be identified.
    pub(crate) fn life(&self) -> Option<Life> {
        self.connection().and_then(|connection| connection.held.life)
    }

    /// How its session marks transactions.
    pub(crate) fn marking(&self) -> Marking {
        self.connection().map_or(Marking::Plain, |connection| *lock(&connection.held.marking))
    }

    pub(crate) fn set_marking(&self, marking: Marking) {
        if let Some(connection) = self.connection() {
            *lock(&connection.held.marking) = marking;
        }
    }

    fn connection(&self) -> Option<&Connection> {
        self.object.as_deref()
    }
}

impl Deref for Client {
    type Target = Connection;

    #[expect(clippy::expect_used, reason = "the object is taken in `drop` alone, after which nobody can deref")]
    fn deref(&self) -> &Connection {
        self.object.as_ref().expect("a client holds its connection until it is dropped")
    }
}

impl DerefMut for Client {
    #[expect(clippy::expect_used, reason = "the object is taken in `drop` alone, after which nobody can deref")]
    fn deref_mut(&mut self) -> &mut Connection {
        self.object.as_mut().expect("a client holds its connection until it is dropped")
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.pool.cluster().returned();
        let Some(object) = self.object.take() else {
            return;
        };
        let closed = self.pool.cluster().is_closed();
        if closed && !object.held.poisoned.load(Ordering::Acquire) {
            self.pool.cancel_running(&object.held.client);
        }
        if closed || !object.usable() {
            // Frees the slot now; inside the pool the dead connection would hold it until the next checkout.
            drop(Object::take(object));
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("generation", &self.generation()).finish_non_exhaustive()
    }
}

/// One pooled connection: what a deadpool pool of this [`Manager`] holds.
pub struct Connection {
    /// Boxed: a checkout moves it a dozen times.
    held: Box<Held>,
}

struct Held {
    client: ClientWrapper,
    abort: AbortHandle,
    generation: GenerationId,
    life: Option<Life>,
    marking: Mutex<Marking>,
    notices: Arc<Notices>,
    /// From then on it is not handed out any more.
    expires: Instant,
    poisoned: AtomicBool,
}

impl Connection {
    fn new(session: Session, generation: &Generation, lifetime: Duration) -> Self {
        session.notices.pool();
        let held = Held {
            expires: Instant::now() + lifetime,
            client: session.client,
            abort: session.abort,
            generation: generation.primary.id,
            life: life(&generation.primary.report),
            marking: Mutex::default(),
            notices: session.notices,
            poisoned: AtomicBool::new(false),
        };
        Self { held: Box::new(held) }
    }

    pub(crate) fn notices(&self) -> &Notices {
        &self.held.notices
    }

    fn usable(&self) -> bool {
        !self.held.client.is_closed() && !self.held.poisoned.load(Ordering::Acquire)
    }

    fn expired(&self) -> bool {
        Instant::now() >= self.held.expires
    }
}

fn life(report: &ServerReport) -> Option<Life> {
    let server = Server {
        system_identifier: report.system_identifier?,
        timeline: report.timeline?,
        started_at: report.started_at?,
    };
    Some(Life { server, replayed: report.replayed, stats_reset: report.stats_reset })
}

/// A poisoned lock only says that another thread panicked; what these locks hold is whole after every statement.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Deref for Connection {
    type Target = ClientWrapper;

    fn deref(&self) -> &ClientWrapper {
        &self.held.client
    }
}

impl DerefMut for Connection {
    fn deref_mut(&mut self) -> &mut ClientWrapper {
        &mut self.held.client
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("generation", &self.held.generation).finish_non_exhaustive()
    }
}

/// The deadpool manager inside a [`Pool`], for those who build their deadpool pools by hand.
///
/// Its `create` waits for a primary without a limit of its own: give the pool time-outs, or bound each `get`. Where a
/// primary is known and takes no session it fails with [`Error::Unavailable`], and the next `get` may have more luck. Its
/// `recycle` does no I/O. What it lacks against [`Pool`] are the transactions and the explained time-outs; and its
/// connections end with the deadpool pool, also those in use.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use tokio_postgres_failover::{Manager, Pool, deadpool};
///
/// let manager: Manager = Pool::builder("postgres://app@my-pg.internal/app")?.build_manager()?;
/// let pool = deadpool::managed::Pool::<Manager>::builder(manager).max_size(8).build()?;
/// let connection = pool.get().await?;
/// connection.batch_execute("SELECT 1").await?;
/// # Ok(())
/// # }
/// ```
pub struct Manager {
    cluster: Cluster,
    opener: Arc<Opener>,
    open_timeout: Duration,
    max_lifetime: Duration,
    seeds: AtomicU64,
}

impl Manager {
    fn connection(&self, session: Session, generation: &Generation) -> Connection {
        // Up to a tenth less: connections that were opened together, after a failover, do not expire together.
        let less = self.random_up_to(self.max_lifetime / 10);
        Connection::new(session, generation, self.max_lifetime.saturating_sub(less))
    }

    fn random_up_to(&self, most: Duration) -> Duration {
        Exponential::new(most, 1.0, most).jitter(self.next_seed()).next().unwrap_or_default()
    }

    /// A seed for one decision's jitter: different each time, the same series again for the same seed of the pool.
    fn next_seed(&self) -> u64 {
        self.seeds.fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed)
    }

    /// Opens one session of this generation and lets its server prove that it is the one.
    async fn open(&self, generation: &Generation) -> Result<Session, ProbeFailure> {
        let endpoint = generation.endpoint();
        let opening = self.opener.open(&endpoint, generation.scope.clone());
        let (session, report) = timeout(self.open_timeout, opening).await.unwrap_or_else(|_| {
            let message = format!("no session within {:?}", self.open_timeout);
            Err(ProbeFailure::new(FailureKind::TimedOut, message))
        })?;
        let admitted = generation.primary.admits(&report);
        admitted.map_err(|refusal| ProbeFailure::new(FailureKind::Unreachable, refusal.to_string()))?;
        Ok(session)
    }

    /// A session of the current generation.
    async fn session(&self) -> Result<(Session, Arc<Generation>), Error> {
        loop {
            let generation = self.cluster.primary().await?;
            if let Some(session) = generation.take_spare() {
                return Ok((session, generation));
            }
            // A dial to a server that has been replaced meanwhile is not waited for.
            let opened = tokio::select! {
                biased;
                () = self.cluster.left(generation.primary.id) => None,
                opened = self.open_through_gate(&generation) => opened?,
            };
            if let Some(session) = opened {
                return Ok((session, generation));
            }
        }
    }

    /// One try, through the generation's gate. `None`: the generation was left meanwhile.
    async fn open_through_gate(&self, generation: &Generation) -> Result<Option<Session>, Error> {
        let id = generation.primary.id;
        // The gate is never closed, so waiting for it cannot fail.
        let _permit = generation.gate.acquire().await;
        if let Some(session) = generation.take_spare() {
            return Ok(Some(session));
        }
        let failure = match self.open(generation).await {
            Ok(session) => {
                generation.opened();
                return Ok(self.cluster.is_current(id).then_some(session));
            }
            Err(failure) => failure,
        };
        tracing::debug!(generation = id.get(), "a session could not be opened: {failure}");
        if failure.kind == FailureKind::Refused {
            return Err(Error::Refused(Box::new(Refused::new(Some(generation.endpoint()), failure))));
        }
        self.cluster.suspect(id, Suspicion::Connection);
        let failures = generation.not_opened(failure.clone());
        // The permit is held through the pause: a server that takes no sessions is not asked by everybody.
        let longest = OPEN_PAUSE.0.saturating_mul(2_u32.saturating_pow(failures)).min(OPEN_PAUSE.1);
        sleep((longest + self.random_up_to(longest)) / 2).await;
        let obstacle = Obstacle::NoSession(Some(failure));
        Err(Error::Unavailable(Box::new(Unavailable::new(Duration::ZERO, self.cluster.diagnosis(), obstacle))))
    }
}

impl managed::Manager for Manager {
    type Type = Connection;
    type Error = Error;

    async fn create(&self) -> Result<Connection, Error> {
        // Boxed, as are the other rare waits on the way of a checkout: their size would be moved about by each.
        let (session, generation) = Box::pin(self.session()).await?;
        Ok(self.connection(session, &generation))
    }

    async fn recycle(&self, connection: &mut Connection, _: &Metrics) -> RecycleResult<Error> {
        if !connection.usable() || connection.expired() {
            return Err(RecycleError::message("the connection has ended, or is too old"));
        }
        if self.cluster.is_current(connection.held.generation) {
            return Ok(());
        }
        // No primary is verified now. If it is the same one again, its connections are as good as before.
        let found = Box::pin(self.cluster.primary()).await;
        let generation = found.map_err(|none| RecycleError::Backend(none.into()))?;
        if generation.primary.id == connection.held.generation && connection.usable() {
            return Ok(());
        }
        Err(RecycleError::message("the connection belongs to an older generation"))
    }
}

impl fmt::Debug for Manager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Manager").field("view", &self.cluster.view()).finish_non_exhaustive()
    }
}

impl From<NoPrimary> for Error {
    fn from(none: NoPrimary) -> Self {
        match none {
            NoPrimary::Closed => Self::Closed,
            NoPrimary::Refused(endpoint, failure) => Self::Refused(Box::new(Refused::new(endpoint, failure))),
        }
    }
}
