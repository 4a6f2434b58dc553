//! What a pool holds, and the deadpool manager that makes it.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use deadpool::managed::{self, Metrics, RecycleError, RecycleResult, WeakPool};
use deadpool_postgres::ClientWrapper;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::dialer::Dialer;
use super::trail::{Trail, Trails};
use crate::cluster::{Generation, lock};
use crate::commit::wal::Marking;
use crate::commit::{Life, Server};
use crate::error::Error;
use crate::observe::{Observer, Watched};
use crate::server::{Guarded, Notices, Session, SessionClient};
use crate::topology::{GenerationId, ServerReport};

/// Shortest and longest pause between two looks at the idle connections.
const REAP_PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(30));

/// What is known of one session, whoever holds it.
pub(super) struct Facts {
    pub(super) generation: GenerationId,
    pub(super) life: Option<Life>,
    /// How it marks transactions.
    pub(super) marking: Mutex<Marking>,
    pub(super) notices: Arc<Notices>,
    pub(super) poisoned: AtomicBool,
    /// A COMMIT was sent, and not answered yet.
    pub(super) committing: AtomicBool,
    pub(super) trail: Arc<Trail>,
}

impl Facts {
    pub(super) fn new<C>(generation: &Generation<C>, notices: Arc<Notices>, trail: Arc<Trail>) -> Self {
        Self {
            generation: generation.primary.id,
            life: life(&generation.primary.report),
            marking: Mutex::default(),
            notices,
            poisoned: AtomicBool::new(false),
            committing: AtomicBool::new(false),
            trail,
        }
    }

    pub(super) fn marking(&self) -> Marking {
        *lock(&self.marking)
    }

    pub(super) fn is_committing(&self) -> bool {
        self.committing.load(Ordering::Acquire)
    }

    pub(super) fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    /// Nobody else may use the session.
    pub(super) fn is_unfit(&self) -> bool {
        self.is_poisoned() || self.trail.is_retired()
    }
}

/// The life of the server that says this, where it lets itself be identified.
pub(super) fn life(report: &ServerReport) -> Option<Life> {
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
    /// Boxed: a checkout moves it a dozen times.
    held: Box<Held<C>>,
}

struct Held<C> {
    client: Guarded<C>,
    abort: Option<AbortHandle>,
    facts: Facts,
    watched: Arc<Watched>,
    /// From then on it is not handed out any more.
    expires: Instant,
}

impl<C: SessionClient> Connection<C> {
    fn new(session: Session<C>, generation: &Generation<C>, lifetime: Duration, observer: &Arc<Observer>) -> Self {
        let watched = observer.connection(&generation.open, generation.endpoint().address);
        session.notices.pool(Box::new(Arc::clone(&watched)));
        let trail = Arc::new(Trail::of(&*session.client));
        let held = Held {
            watched,
            expires: Instant::now() + lifetime,
            client: session.client,
            abort: session.abort,
            facts: Facts::new(generation, session.notices, trail),
        };
        Self { held: Box::new(held) }
    }

    pub(super) fn facts(&self) -> &Facts {
        &self.held.facts
    }

    pub(super) fn watched(&self) -> &Watched {
        &self.held.watched
    }

    pub(super) fn usable(&self) -> bool {
        !self.held.client.is_closed() && !self.held.facts.is_unfit()
    }

    pub(super) fn abort(&self) {
        if let Some(driver) = &self.held.abort {
            driver.abort();
        }
    }

    fn expired(&self) -> bool {
        Instant::now() >= self.held.expires
    }
}

impl<C> Deref for Connection<C> {
    type Target = C;

    fn deref(&self) -> &C {
        &self.held.client
    }
}

impl<C> DerefMut for Connection<C> {
    fn deref_mut(&mut self) -> &mut C {
        &mut self.held.client
    }
}

impl<C> fmt::Debug for Connection<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("generation", &self.held.facts.generation).finish_non_exhaustive()
    }
}

/// The deadpool manager inside a [`Pool`](crate::Pool), for those who build their deadpool pools by hand.
///
/// Its `create` waits for a primary without a limit of its own: give the pool time-outs, or bound each `get`. Where a
/// primary is known and takes no session it fails with [`Error::Unavailable`], and the next `get` may have more luck. Its
/// `recycle` does no I/O. What it lacks against [`Pool`](crate::Pool) are the transactions and the explained time-outs; and its
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
pub struct Manager<C: SessionClient = ClientWrapper> {
    pub(super) dialer: Arc<Dialer<C>>,
    pub(super) trails: Trails,
    max_lifetime: Duration,
}

impl<C: SessionClient> Manager<C> {
    pub(super) fn new(dialer: Arc<Dialer<C>>, max_lifetime: Duration) -> Self {
        Self { dialer, trails: Trails::default(), max_lifetime }
    }

    fn connection(&self, session: Session<C>, generation: &Generation<C>) -> Connection<C> {
        // Up to a tenth less: connections that were opened together, after a failover, do not expire together.
        let less = self.dialer.random_up_to(self.max_lifetime / 10);
        let lifetime = self.max_lifetime.saturating_sub(less);
        let connection = Connection::new(session, generation, lifetime, self.dialer.cluster.observer());
        self.trails.add(&connection.held.facts.trail);
        connection
    }
}

impl<C: SessionClient> managed::Manager for Manager<C> {
    type Type = Connection<C>;
    type Error = Error;

    async fn create(&self) -> Result<Connection<C>, Error> {
        // Boxed, as it is rare and large, and every waiting call would carry it.
        let (session, generation) = Box::pin(self.dialer.session()).await?;
        Ok(self.connection(session, &generation))
    }

    async fn recycle(&self, connection: &mut Connection<C>, _: &Metrics) -> RecycleResult<Error> {
        if !connection.usable() || connection.expired() {
            return Err(RecycleError::message("the connection has ended, or is too old"));
        }
        let (cluster, id) = (&self.dialer.cluster, connection.held.facts.generation);
        if cluster.is_current(id) {
            return Ok(());
        }
        // No primary is verified now. If it is the same one again, its connections are as good as before.
        let generation = cluster.primary().await.map_err(|none| RecycleError::Backend(none.into()))?;
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

/// When idle connections are closed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Idle {
    pub(super) timeout: Duration,
    pub(super) min: usize,
}

impl Idle {
    /// Closes what is of no use any more and what has been idle for too long, until the pool is gone.
    pub(super) async fn reap<C: SessionClient>(self, pool: WeakPool<Manager<C>>, end: CancellationToken) {
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
