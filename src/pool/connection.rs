//! What the pool holds, and the deadpool manager that creates it.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use deadpool::managed::{self, Metrics, RecycleError, RecycleResult};
use deadpool_postgres::ClientWrapper;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};

use super::dialer::Dialer;
use super::dials::Berth;
use super::trail::Trail;
use crate::cluster::{Cluster, Generation};
use crate::commit::{Life, Server};
use crate::error::Error;
use crate::observe::{Observer, Watched};
use crate::server::{Guarded, Notices, Session, SessionClient};
use crate::settle::wal::MarkStatement;
use crate::sync::lock;
use crate::topology::{Endpoint, GenerationId, ServerReport};

/// How long to wait for the end of an answer that is just arriving. A statement that runs longer is cancelled.
pub(super) const DRAIN_WITHIN: Duration = Duration::from_millis(200);

/// What is known about one session, whichever handle holds it.
pub(super) struct Facts {
    pub(super) generation: GenerationId,
    life: Option<Life>,
    /// What the server told only later.
    learned: Arc<OnceLock<ServerReport>>,
    /// How the session marks transactions.
    pub(super) marking: Mutex<MarkStatement>,
    /// The statement by which a COMMIT looks for its transaction is prepared.
    pub(super) check_prepared: AtomicBool,
    pub(super) notices: Arc<Notices>,
    pub(super) poisoned: AtomicBool,
    /// A COMMIT was sent, and not answered yet.
    pub(super) committing: AtomicBool,
    pub(super) trail: Arc<Trail>,
    /// Where the session was opened.
    pub(super) endpoint: Endpoint,
}

impl Facts {
    pub(super) fn new<C: SessionClient>(generation: &Generation<C>, notices: Arc<Notices>, trail: Arc<Trail>) -> Self {
        Self {
            generation: generation.primary.id,
            life: life(&generation.primary.report),
            learned: Arc::clone(&generation.learned),
            marking: Mutex::default(),
            check_prepared: AtomicBool::new(false),
            notices,
            poisoned: AtomicBool::new(false),
            committing: AtomicBool::new(false),
            trail,
            endpoint: generation.endpoint(),
        }
    }

    pub(super) fn life(&self) -> Option<Life> {
        self.life.or_else(|| self.learned.get().and_then(life))
    }

    pub(super) fn marking(&self) -> MarkStatement {
        *lock(&self.marking)
    }

    pub(super) fn is_committing(&self) -> bool {
        self.committing.load(Ordering::Acquire) || self.notices.activity.is_committing()
    }

    pub(super) fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    /// Returns whether no other caller may use the session.
    pub(super) fn is_unfit(&self) -> bool {
        self.is_poisoned() || self.trail.is_retired()
    }
}

/// The life of the generation's server, if the server has been identified by now.
pub(super) fn life_in<C: SessionClient>(generation: &Generation<C>) -> Option<Life> {
    life(&generation.primary.report).or_else(|| generation.learned.get().and_then(life))
}

/// The life of the server with this report, if the report identifies it.
fn life(report: &ServerReport) -> Option<Life> {
    let server = Server {
        system_identifier: report.system_identifier?,
        timeline: report.timeline?,
        started_at: report.started_at?,
    };
    let ancestor = report.checkpointed.filter(|older| *older < server.timeline);
    Some(Life { server, replayed: report.replayed, stats_reset: report.stats_reset, ancestor })
}

/// One pooled connection: what a deadpool pool of this [`Manager`] holds.
pub struct Connection<C = ClientWrapper> {
    /// Boxed, because a checkout moves it a dozen times.
    inner: Box<Inner<C>>,
}

struct Inner<C> {
    client: Guarded<C>,
    abort: Option<AbortHandle>,
    facts: Facts,
    watched: Arc<Watched>,
    /// When it is no longer handed out.
    expires: Instant,
    /// A caller has had it.
    used: AtomicBool,
    berth: Option<Berth>,
}

impl<C: SessionClient> Connection<C> {
    pub(super) fn new(
        session: Session<C>,
        generation: &Generation<C>,
        lifetime: Duration,
        observer: &Arc<Observer>,
        berth: Berth,
    ) -> Self {
        let watched = observer.connection(&generation.open, generation.endpoint().address);
        session.notices.pool(Box::new(Arc::clone(&watched)));
        let trail = Arc::new(Trail::of(&*session.client));
        let inner = Inner {
            watched,
            expires: Instant::now() + lifetime,
            client: session.client,
            abort: session.abort,
            facts: Facts::new(generation, session.notices, trail),
            used: AtomicBool::new(false),
            berth: Some(berth),
        };
        Self { inner: Box::new(inner) }
    }

    pub(super) fn facts(&self) -> &Facts {
        &self.inner.facts
    }

    pub(super) fn watched(&self) -> &Watched {
        &self.inner.watched
    }

    pub(super) fn usable(&self) -> bool {
        let facts = &self.inner.facts;
        !self.inner.client.is_closed() && !facts.is_unfit() && !facts.notices.activity.is_condemned()
    }

    /// Waits until the driver has seen all requests, and for the end of a failed one. Returns whether nothing is under
    /// way.
    pub(super) async fn idle(&self) -> bool {
        let activity = &self.inner.facts.notices.activity;
        // Most of the time the answer is known already, which spares the timer.
        if let Some(idle) = activity.is_idle() {
            return idle;
        }
        timeout(DRAIN_WITHIN, activity.idle()).await.unwrap_or(false)
    }

    /// It no longer counts as one of the pool's connections.
    pub(super) fn leave_the_pool(&mut self) {
        self.inner.berth = None;
    }

    pub(super) fn abort(&self) {
        if let Some(driver) = &self.inner.abort {
            driver.abort();
        }
    }

    pub(super) fn expired(&self) -> bool {
        Instant::now() >= self.inner.expires
    }

    /// Returns whether this is a good connection of the current generation.
    pub(super) fn may_be_handed_out(&self, cluster: &Cluster<C>) -> bool {
        self.usable() && !self.expired() && cluster.is_current(self.inner.facts.generation)
    }

    /// Returns whether it will never be handed out again.
    pub(super) fn stale(&self, cluster: &Cluster<C>) -> bool {
        !self.usable() || self.expired() || cluster.has_ended(self.inner.facts.generation)
    }

    /// Notes that a caller has it. Returns whether it had never been used before.
    pub(super) fn use_it(&self) -> bool {
        // A read is cheaper than a write, and mostly finds `true`.
        !self.inner.used.load(Ordering::Relaxed) && !self.inner.used.swap(true, Ordering::Relaxed)
    }
}

impl<C> Deref for Connection<C> {
    type Target = C;

    fn deref(&self) -> &C {
        &self.inner.client
    }
}

impl<C> DerefMut for Connection<C> {
    fn deref_mut(&mut self) -> &mut C {
        &mut self.inner.client
    }
}

impl<C> fmt::Debug for Connection<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("generation", &self.inner.facts.generation).finish_non_exhaustive()
    }
}

/// The deadpool manager inside a [`Pool`](crate::Pool), for deadpool pools that are built by hand.
///
/// Its `create` waits without a limit of its own, for a primary and for a session if the primary accepts none. So give the
/// pool time-outs, or limit each `get`.
/// Its `recycle` does no I/O on a recently used connection; see [`PoolBuilder::test_idle_after`]. Unlike
/// [`Pool`](crate::Pool), it offers neither transactions nor explained time-outs, and its connections end with the
/// deadpool pool, even those in use.
///
/// [`PoolBuilder::test_idle_after`]: crate::PoolBuilder::test_idle_after
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
pub struct Manager<C: SessionClient = ClientWrapper> {
    pub(super) dialer: Arc<Dialer<C>>,
}

impl<C: SessionClient> Manager<C> {
    pub(super) fn new(dialer: Arc<Dialer<C>>) -> Self {
        Self { dialer }
    }
}

impl<C: SessionClient> managed::Manager for Manager<C> {
    type Type = Connection<C>;
    type Error = Error;

    async fn create(&self) -> Result<Connection<C>, Error> {
        // Boxed, because it is rare and large, and every waiting call would carry it.
        Box::pin(self.dialer.connection()).await
    }

    async fn recycle(&self, connection: &mut Connection<C>, _: &Metrics) -> RecycleResult<Error> {
        if !connection.usable() || connection.expired() {
            return Err(RecycleError::message("the connection has ended, or is too old"));
        }
        if !connection.idle().await {
            // Connections of this crate's own pool are checked when they are given back.
            self.dialer.cancel_running(&connection.inner.client, connection.facts());
            return Err(RecycleError::message("something is under way on the connection, or a transaction is open"));
        }
        // Those of this crate's own pool are tested outside of `recycle`, where a caller that gives up loses none.
        if self.dialer.dials.is_pool_built_by_hand() && !self.dialer.is_alive(connection).await {
            return Err(RecycleError::message("its server has not answered"));
        }
        let (cluster, id) = (&self.dialer.cluster, connection.inner.facts.generation);
        if cluster.is_current(id) {
            return Ok(());
        }
        // No primary is verified now. If the next one is the same, its connections are as good as before.
        let generation = cluster.primary().await.map_err(|none| RecycleError::Backend(Error::without_primary(none)))?;
        if generation.primary.id == id && connection.usable() {
            return Ok(());
        }
        Err(RecycleError::message("the connection belongs to an older generation"))
    }
}

impl<C: SessionClient> fmt::Debug for Manager<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Manager").field("view", &self.dialer.cluster.view()).finish_non_exhaustive()
    }
}
