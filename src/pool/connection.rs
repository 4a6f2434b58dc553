//! A pooled connection: its client, its facts, and when it may be handed out.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use deadpool_postgres::ClientWrapper;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};

use super::cancel_token::CancelToken;
use super::facts::Facts;
use super::room::CountedConnection;
use super::trail::Trail;
use crate::cluster::{Cluster, Generation};
use crate::observe::{Observer, Watched};
use crate::server::{Activity, Guarded, Open, Session, SessionClient};

/// How long to wait for the end of an answer when a connection is given back. A statement that runs longer is
/// cancelled.
pub(super) const DRAIN_WITHIN: Duration = Duration::from_millis(200);

/// One pooled connection: what a deadpool pool of this [`Manager`](super::Manager) holds.
pub struct Connection<C = ClientWrapper> {
    /// Boxed, because a checkout moves it a dozen times.
    inner: Box<Inner<C>>,
}

struct Inner<C> {
    client: Guarded<C>,
    abort: Option<AbortHandle>,
    facts: Facts,
    watched: Arc<Watched>,
    opened_at: Instant,
    /// When it last came back, in milliseconds since it was opened.
    returned_at: AtomicU64,
    /// From this moment on, it is not handed out any more.
    expires: Instant,
    /// A caller has used it before.
    used: AtomicBool,
    berth: Option<CountedConnection>,
    /// Sends cancel requests.
    opener: Arc<dyn Open<C>>,
}

impl<C: SessionClient> Connection<C> {
    pub(super) fn new(
        session: Session<C>,
        generation: &Generation<C>,
        lifetime: Duration,
        observer: &Arc<Observer>,
        berth: CountedConnection,
        opener: &Arc<dyn Open<C>>,
    ) -> Self {
        let watched = observer.connection(&generation.open, generation.endpoint().address);
        session.notices.pool(Box::new(Arc::clone(&watched)));
        let trail = Arc::new(Trail::of(&*session.client, false));
        let opened_at = Instant::now();
        let inner = Inner {
            watched,
            opened_at,
            returned_at: AtomicU64::new(0),
            expires: opened_at + lifetime,
            client: session.client,
            abort: session.abort,
            facts: Facts::new(generation, session.notices, trail),
            used: AtomicBool::new(false),
            berth: Some(berth),
            opener: Arc::clone(opener),
        };
        Self { inner: Box::new(inner) }
    }

    /// Returns a token that can cancel what this session runs. It can be sent to any task.
    ///
    /// Use this one: the token of the driver's own `Client`, behind two derefs, does not know the server's address.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_postgres_failover::{Manager, Pool, deadpool};
    ///
    /// let manager: Manager = Pool::builder("postgres://app@my-pg.internal/app")?.build_manager()?;
    /// let pool = deadpool::managed::Pool::<Manager>::builder(manager).build()?;
    /// let connection = pool.get().await?;
    /// let token = connection.cancel_token();
    /// tokio::spawn(async move { token.cancel().await });
    /// connection.batch_execute("SELECT pg_sleep(60)").await?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn cancel_token(&self) -> CancelToken {
        let token = tokio_postgres::Client::cancel_token(&self.inner.client);
        CancelToken::new(&self.inner.opener, self.inner.facts.endpoint.clone(), token)
    }

    pub(super) fn facts(&self) -> &Facts {
        &self.inner.facts
    }

    pub(super) fn activity(&self) -> &Activity {
        &self.inner.facts.notices.activity
    }

    /// Returns whether a caller has had it.
    pub(super) fn is_used(&self) -> bool {
        self.inner.used.load(Ordering::Relaxed)
    }

    pub(super) fn watched(&self) -> &Watched {
        &self.inner.watched
    }

    /// Returns whether its session is open and fit for another caller, and none of those that were to be closed.
    pub(super) fn usable(&self) -> bool {
        let facts = &self.inner.facts;
        !self.inner.client.is_closed()
            && !facts.is_unfit()
            && !facts.notices.activity.is_condemned()
            && !facts.notices.activity.has_opening()
            && !self.is_evicted()
    }

    /// Returns whether `evict_idle` was called since it was opened, or since it was last checked out.
    pub(super) fn is_evicted(&self) -> bool {
        self.inner.berth.as_ref().is_some_and(CountedConnection::is_evicted)
    }

    /// Waits until the driver has seen all requests, and until a failed request has ended. Returns whether nothing is
    /// under way.
    pub(super) async fn idle(&self) -> bool {
        let activity = &self.inner.facts.notices.activity;
        // Usually the answer is known already. Then no timer is needed.
        if let Some(idle) = activity.is_idle() {
            return idle;
        }
        timeout(DRAIN_WITHIN, activity.idle()).await.unwrap_or(false)
    }

    /// From now on, it does not count towards `max_size`.
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

    /// Notes that its caller has given it back.
    pub(super) fn given_back(&self) {
        if let Some(berth) = &self.inner.berth {
            berth.given_back();
        }
    }

    /// Notes that it comes back.
    pub(super) fn returned(&self) {
        let after = u64::try_from(self.inner.opened_at.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.inner.returned_at.store(after, Ordering::Relaxed);
    }

    /// How long ago it came back, or was opened if nobody has had it.
    pub(super) fn idle_for(&self) -> Duration {
        let returned = Duration::from_millis(self.inner.returned_at.load(Ordering::Relaxed));
        self.inner.opened_at.elapsed().saturating_sub(returned)
    }

    /// Returns whether nothing is under way, as far as is known without waiting.
    pub(super) fn is_known_idle(&self) -> bool {
        self.inner.facts.notices.activity.is_idle() == Some(true)
    }

    /// Returns whether a caller may get it now: it is usable, and its generation is the current one.
    pub(super) fn may_be_handed_out(&self, cluster: &Cluster<C>) -> bool {
        let current = cluster.is_current(self.inner.facts.generation) || planted!("hands out while suspended");
        self.usable() && !self.expired() && current
    }

    /// Returns whether no caller may ever get it again. During a suspension, neither this nor
    /// [`Self::may_be_handed_out`] is true.
    pub(super) fn stale(&self, cluster: &Cluster<C>) -> bool {
        !self.usable() || self.expired() || cluster.has_ended(self.inner.facts.generation)
    }

    /// Notes that a caller uses it. Returns whether nobody has used it before.
    pub(super) fn use_it(&self) -> bool {
        // Reading first is cheaper than writing, and usually finds `true`.
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
