//! Opens sessions of the current generation, for the pool and for settling commits.

mod queue;

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::OwnedMutexGuard;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use self::queue::DialQueue;
pub(super) use self::queue::{Doubted, InAHook, REFUSED_AFTER};
use super::facts::Facts;
use super::hooks::Hooks;
use super::settling::SettleSessions;
use super::test_after::TestAfter;
use super::trail::SessionTrails;
use crate::cluster::{Cluster, Generation};
use crate::commit::Nonce;
use crate::error::{CHECKOUT_TIMEOUT, Error, Obstacle, Refused, Unavailable, UnavailableReason};
use crate::random::SplitMix64;
use crate::server::{Notices, Open, OwnedSession, Session, SessionClient, cancel};
use crate::sync::{lock, log_safely};
use crate::topology::{Endpoint, FailureKind, ProbeFailure, Question, RefusedLogIn, ServerReport, Suspicion};

/// Shortest and longest pause between two attempts to open a session, if the known primary accepts none.
const OPEN_PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// The longest pause if the server has no free slot. Every instance of the service may be waiting for one.
const FULL_PAUSE: Duration = Duration::from_secs(1);
/// Refused credentials are tried again for this long after a failover, because the new primary may get the role, or its
/// line in `pg_hba.conf`, only after the promotion.
const REFUSED_PATIENCE: Duration = Duration::from_secs(30);

pub(super) struct Dialer<C: SessionClient> {
    pub(super) cluster: Cluster<C>,
    pub(super) opener: Arc<dyn Open<C>>,
    pub(super) open_timeout: Duration,
    pub(super) settlers: SettleSessions<C>,
    pub(super) queue: Arc<DialQueue<C>>,
    /// The age at which a connection is no longer handed out.
    pub(super) max_lifetime: Duration,
    /// The idle time after which a connection is tested before it is handed out.
    pub(super) test_after: TestAfter,
    /// The user's hooks, if at least one is set.
    pub(super) hooks: Option<Arc<Hooks<C>>>,
    /// How many new connections `before_acquire` has refused in a row.
    pub(super) refusals: AtomicU32,
    seeds: AtomicU64,
    nonces: Nonces,
    pub(super) trails: SessionTrails,
    /// The lock that a task holds while it tries a log-in that will most likely be refused, or find no free slot.
    turn: Arc<tokio::sync::Mutex<()>>,
    /// The last refusal, and when its log-in began. `None` after a session was opened.
    refused: Mutex<Option<(Instant, ProbeFailure)>>,
}

impl<C: SessionClient> Dialer<C> {
    /// `runtime` is where the pool's tasks run.
    pub(super) fn new(
        cluster: Cluster<C>,
        opener: Arc<dyn Open<C>>,
        open_timeout: Duration,
        seed: u64,
        runtime: Handle,
    ) -> Self {
        Self {
            cluster,
            opener,
            open_timeout,
            settlers: SettleSessions::default(),
            queue: Arc::new(DialQueue::new(runtime)),
            max_lifetime: Duration::MAX,
            test_after: TestAfter::new(Duration::MAX),
            hooks: None,
            refusals: AtomicU32::new(0),
            seeds: AtomicU64::new(seed),
            nonces: Nonces::default(),
            trails: SessionTrails::default(),
            turn: Arc::default(),
            refused: Mutex::default(),
        }
    }

    pub(super) fn with_ages(self, max_lifetime: Duration, test_idle_after: Duration) -> Self {
        Self { max_lifetime, test_after: TestAfter::new(test_idle_after), ..self }
    }

    pub(super) fn with_hooks(self, hooks: Option<Arc<Hooks<C>>>) -> Self {
        Self { hooks, ..self }
    }

    pub(super) fn random_up_to(&self, most: Duration) -> Duration {
        SplitMix64::new(self.next_seed()).up_to(most)
    }

    /// Returns a seed for the jitter of one decision. Each call returns another one. Two pools with the same seed
    /// return the same series.
    pub(super) fn next_seed(&self) -> u64 {
        self.seeds.fetch_add(SplitMix64::STEP, Ordering::Relaxed)
    }

    pub(super) fn next_nonce(&self) -> Nonce {
        self.nonces.next()
    }

    /// Asks the server to cancel what `client` runs, in a task of its own that takes some seconds at most. The task
    /// does not end with the pool, because the server runs a session's statement to the end even after the socket was
    /// closed.
    ///
    /// It never cancels a COMMIT. That would end the wait for the synchronous standbys, and make rows visible that
    /// perhaps no standby has.
    pub(super) fn cancel_running(&self, client: &tokio_postgres::Client, facts: &Facts) {
        if facts.is_committing() && !planted!("cancels commits") {
            return;
        }
        self.cancel_on(client, &facts.notices, facts.endpoint.clone());
    }

    /// As [`Self::cancel_running`], for a session without [`Facts`].
    pub(super) fn cancel_on(&self, client: &tokio_postgres::Client, notices: &Arc<Notices>, endpoint: Endpoint) {
        let notices = Arc::clone(notices);
        // Prefer the caller's runtime, because the pool's may have ended. A connection may also be dropped outside of
        // any runtime.
        let runtime = Handle::try_current().unwrap_or_else(|_| self.queue.runtime().clone());
        let opener = Arc::clone(&self.opener);
        let token = client.cancel_token();
        runtime.spawn(async move {
            // The driver's task may not have seen yet that the last request is a COMMIT.
            notices.requests_are_seen().await;
            if !notices.activity.is_committing() || planted!("cancels commits") {
                cancel(|| opener.cancel(&endpoint, token.clone())).await;
            }
        });
    }

    /// Returns a session of the current generation.
    pub(super) async fn session(&self) -> Result<(Session<C>, Arc<Generation<C>>), Error> {
        let asked = Instant::now();
        loop {
            let generation = self.cluster.primary().await.map_err(Error::without_primary)?;
            if let Some(session) = generation.take_spare() {
                return Ok((session, generation));
            }
            let opening = Self::open(&*self.opener, self.open_timeout, &generation);
            let spare = || generation.take_spare();
            let opening = self.open_through_gate(&generation, asked, spare, opening);
            if let Some(session) = self.unless_left(&generation, opening).await? {
                return Ok((session, generation));
            }
        }
    }

    /// Returns a session of the current generation that the caller drives. Not for a wrapped pool.
    pub(super) async fn owned_session(&self) -> Result<OwnedSession, Error> {
        let asked = Instant::now();
        loop {
            let generation = self.cluster.primary().await.map_err(Error::without_primary)?;
            let opening = async {
                // The address may change during the wait at the gate.
                let endpoint = generation.endpoint();
                let opening = self.opener.open_owned(&endpoint, Question::Identity, generation.scope.clone());
                admitted(&generation, self.open_timeout, opening).await
            };
            match self.unless_left(&generation, self.open_through_gate(&generation, asked, || None, opening)).await {
                Ok(Some(session)) => {
                    generation.listen_to(&session.notices);
                    return Ok(session);
                }
                Ok(None) => {}
                // The pause after the failure has passed.
                Err(Error::Unavailable(none)) if none.reason() == UnavailableReason::NoSession => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits for `opening`, but not for a dial to a server that has been replaced meanwhile. `None`: it has been.
    async fn unless_left<T>(
        &self,
        generation: &Generation<C>,
        opening: impl Future<Output = Result<Option<T>, Error>>,
    ) -> Result<Option<T>, Error> {
        tokio::select! {
            biased;
            () = self.cluster.left(generation.primary.id) => Ok(None),
            opened = opening => opened,
        }
    }

    /// Makes one attempt through the generation's gate, or takes a spare session. `None`: the generation is no longer
    /// the current one.
    async fn open_through_gate<T>(
        &self,
        generation: &Generation<C>,
        asked: Instant,
        spare: impl Fn() -> Option<T>,
        opening: impl Future<Output = Result<T, ProbeFailure>>,
    ) -> Result<Option<T>, Error> {
        // The gate is never closed, so waiting for it cannot fail.
        let _permit = generation.gate.acquire().await;
        if let Some(session) = spare() {
            return Ok(Some(session));
        }
        // Like the permit, the turn is held during the pause after a failure.
        let _turn = match self.turn(generation, asked).await {
            Ok(turn) => turn,
            Err(refused) => return Err(refused),
        };
        let began = Instant::now();
        match opening.await {
            Ok(session) => {
                generation.opened();
                self.let_in();
                self.cluster.observer().opened(began.elapsed());
                Ok(self.cluster.is_current(generation.primary.id).then_some(session))
            }
            // The permit is held during the pause, so that not every task asks a server that accepts no sessions.
            Err(failure) => {
                self.note_refused(began, &failure);
                Err(self.not_opened(generation, failure).await)
            }
        }
    }

    /// Waits for this caller's turn to log in. If the last log-in was refused or found no free slot, only one is tried
    /// at a time. A refusal answers every caller that asked before the log-in began, so many callers do not cause many
    /// log-ins.
    pub(super) async fn turn(
        &self,
        generation: &Generation<C>,
        asked: Instant,
    ) -> Result<Option<OwnedMutexGuard<()>>, Error> {
        let Some(turn) = self.needs_turn(generation) else {
            return Ok(None);
        };
        let turn = turn.lock_owned().await;
        let at = self
            .log_in_at(generation, asked)
            .map_err(|failure| Error::Refused(Box::new(Refused::new(Some(generation.endpoint()), failure))))?;
        if let Some(at) = at {
            sleep_until(at).await;
        }
        Ok(Some(turn))
    }

    /// Returns the lock to take before the next log-in, if that will most likely be refused or find no free slot.
    pub(super) fn needs_turn(&self, generation: &Generation<C>) -> Option<Arc<tokio::sync::Mutex<()>>> {
        let full = || generation.trouble().map(|failure| failure.kind) == Some(FailureKind::Full);
        let unlikely = self.is_refused() || full();
        unlikely.then(|| Arc::clone(&self.turn))
    }

    /// Returns when the holder of the turn may log in. Fails if a log-in that began after `asked` was refused.
    pub(super) fn log_in_at(
        &self,
        generation: &Generation<C>,
        asked: Instant,
    ) -> Result<Option<Instant>, ProbeFailure> {
        let refused = lock(&self.refused).clone();
        let Some((dialled, failure)) = refused else {
            return Ok(None);
        };
        if failure.kind == FailureKind::Refused && dialled >= asked && !is_young(generation) {
            return Err(failure);
        }
        Ok(self.cluster.log_in_at())
    }

    /// Remembers a refusal, and when its session was dialled. Other failures say nothing about log-ins. Returns whether
    /// it was one.
    pub(super) fn note_refused(&self, dialled: Instant, failure: &ProbeFailure) -> bool {
        let refused = failure.is_refused_log_in();
        if refused {
            *lock(&self.refused) = Some((dialled, failure.clone()));
            self.cluster.log_in_refused(RefusedLogIn { began: dialled, refused: Instant::now() });
        }
        refused
    }

    /// Returns whether the last log-in was refused.
    pub(super) fn is_refused(&self) -> bool {
        lock(&self.refused).is_some()
    }

    pub(super) fn let_in(&self) {
        *lock(&self.refused) = None;
    }

    /// Opens one session of this generation, and checks that its server is the primary.
    pub(super) async fn open(
        opener: &dyn Open<C>,
        within: Duration,
        generation: &Generation<C>,
    ) -> Result<Session<C>, ProbeFailure> {
        let endpoint = generation.endpoint();
        let opening = opener.open(&endpoint, Question::Identity, generation.scope.clone());
        let session = admitted(generation, within, opening).await?;
        generation.listen_to(&session.notices);
        Ok(session)
    }

    /// Handles a session to the primary that could not be opened: suspects the primary, and waits before the next
    /// attempt.
    pub(super) async fn not_opened(&self, generation: &Generation<C>, failure: ProbeFailure) -> Error {
        let (error, pause) = self.failed(generation, failure);
        sleep(pause).await;
        error
    }

    /// Handles a session to the primary that could not be opened: suspects the primary. Returns the callers' error, and
    /// how long to wait before the next attempt.
    pub(super) fn failed(&self, generation: &Generation<C>, failure: ProbeFailure) -> (Error, Duration) {
        let id = generation.primary.id;
        log_safely(|| tracing::debug!(generation = id.get(), "a session could not be opened: {failure}"));
        let refused = failure.is_refused_log_in();
        if failure.kind == FailureKind::Refused && !is_young(generation) {
            let refused = Refused::new(Some(generation.endpoint()), failure);
            return (Error::Refused(Box::new(refused)), Duration::ZERO);
        }
        // A server that refuses a log-in is alive, and the failure of a user's hook says nothing about the server.
        if !refused && failure.kind != FailureKind::Hook {
            self.cluster.suspect(id, Suspicion::Connection);
        }
        let failures = generation.not_opened(failure.clone());
        let rare = matches!(failure.kind, FailureKind::Full | FailureKind::Hook);
        let most = if rare { FULL_PAUSE } else { OPEN_PAUSE.1 };
        let longest = OPEN_PAUSE.0.saturating_mul(2_u32.saturating_pow(failures)).min(most);
        let obstacle = Obstacle::NoSession(Some(failure));
        let unavailable = Unavailable::new(Duration::ZERO, self.cluster.diagnosis(), obstacle, CHECKOUT_TIMEOUT);
        (Error::Unavailable(Box::new(unavailable)), (longest + self.random_up_to(longest)) / 2)
    }
}

/// Waits for a session to be opened, and checks that its server is the generation's primary.
async fn admitted<C: SessionClient, T>(
    generation: &Generation<C>,
    within: Duration,
    opening: impl Future<Output = Result<(T, ServerReport), ProbeFailure>>,
) -> Result<T, ProbeFailure> {
    let (session, report) = timeout(within, opening).await.unwrap_or_else(|_| {
        let message = format!("no session within {within:?} (probe_timeout)");
        Err(ProbeFailure::new(FailureKind::TimedOut, message))
    })?;
    let admitted = generation.primary.admits(&report);
    admitted.map_err(|refusal| ProbeFailure::new(FailureKind::Unreachable, refusal.to_string()))?;
    Ok(session)
}

pub(super) type Turn = Option<OwnedMutexGuard<()>>;

/// Like [`Dialer::turn`], but does not keep the pool alive while it waits. `None`: the pool has been dropped.
pub(super) async fn take_turn<C: SessionClient>(
    dialer: &Weak<Dialer<C>>,
    generation: &Generation<C>,
    started: Instant,
) -> Option<Result<Turn, ProbeFailure>> {
    let Some(turn) = dialer.upgrade()?.needs_turn(generation) else { return Some(Ok(None)) };
    let turn = turn.lock_owned().await;
    let at = match dialer.upgrade()?.log_in_at(generation, started) {
        Ok(at) => at,
        Err(refused) => return Some(Err(refused)),
    };
    if let Some(at) = at {
        sleep_until(at).await;
    }
    Some(Ok(Some(turn)))
}

/// Makes numbers that no other pool makes: the first half is random for each pool, the second half is a counter. The
/// pool's seed does not decide them, because two pools may have the same seed.
struct Nonces {
    pool: u64,
    given: AtomicU64,
}

impl Default for Nonces {
    fn default() -> Self {
        Self { pool: RandomState::new().hash_one(0), given: AtomicU64::new(RandomState::new().hash_one(1)) }
    }
}

impl Nonces {
    fn next(&self) -> Nonce {
        Nonce(u128::from(self.pool) << 64 | u128::from(self.given.fetch_add(1, Ordering::Relaxed)))
    }
}

/// Returns whether there was a failover to this primary a short time ago.
fn is_young<C: SessionClient>(generation: &Generation<C>) -> bool {
    generation.primary.id.get() > 1 && generation.began.elapsed() < REFUSED_PATIENCE
}
