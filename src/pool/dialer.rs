//! Opens sessions of the current generation, for whoever needs one: the pool, and those who settle a commit.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::settling::Settlers;
use crate::cluster::{Cluster, Generation};
use crate::commit::Nonce;
use crate::error::{Error, Obstacle, Refused, Unavailable};
use crate::retry::Exponential;
use crate::server::{Open, Session, SessionClient};
use crate::topology::{FailureKind, ProbeFailure, Question, Suspicion};

/// Pauses between tries to open a session to a primary that is known and takes none.
const OPEN_PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

pub(super) struct Dialer<C> {
    pub(super) cluster: Cluster<C>,
    pub(super) opener: Arc<dyn Open<C>>,
    pub(super) open_timeout: Duration,
    pub(super) settlers: Settlers<C>,
    seeds: AtomicU64,
    nonces: Nonces,
}

impl<C: SessionClient> Dialer<C> {
    pub(super) fn new(cluster: Cluster<C>, opener: Arc<dyn Open<C>>, open_timeout: Duration, seed: u64) -> Self {
        Self {
            cluster,
            opener,
            open_timeout,
            settlers: Settlers::default(),
            seeds: AtomicU64::new(seed),
            nonces: Nonces::default(),
        }
    }

    pub(super) fn random_up_to(&self, most: Duration) -> Duration {
        Exponential::new(most, 1.0, most).jitter(self.next_seed()).next().unwrap_or_default()
    }

    /// A seed for one decision's jitter: different each time, the same series again for the same seed of the pool.
    pub(super) fn next_seed(&self) -> u64 {
        self.seeds.fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed)
    }

    pub(super) fn next_nonce(&self) -> Nonce {
        self.nonces.next()
    }

    /// A session of the current generation.
    pub(super) async fn session(&self) -> Result<(Session<C>, Arc<Generation<C>>), Error> {
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
    async fn open_through_gate(&self, generation: &Generation<C>) -> Result<Option<Session<C>>, Error> {
        // The gate is never closed, so waiting for it cannot fail.
        let _permit = generation.gate.acquire().await;
        if let Some(session) = generation.take_spare() {
            return Ok(Some(session));
        }
        let began = Instant::now();
        match self.open(generation).await {
            Ok(session) => {
                generation.opened();
                self.cluster.observer().opened(began.elapsed());
                Ok(self.cluster.is_current(generation.primary.id).then_some(session))
            }
            // The permit is held through the pause: a server that takes no sessions is not asked by everybody.
            Err(failure) => Err(self.not_opened(generation, failure).await),
        }
    }

    /// Opens one session of this generation and lets its server prove that it is the one.
    async fn open(&self, generation: &Generation<C>) -> Result<Session<C>, ProbeFailure> {
        let endpoint = generation.endpoint();
        let opening = self.opener.open(&endpoint, Question::Identity, generation.scope.clone());
        let (session, report) = timeout(self.open_timeout, opening).await.unwrap_or_else(|_| {
            let message = format!("no session within {:?}", self.open_timeout);
            Err(ProbeFailure::new(FailureKind::TimedOut, message))
        })?;
        let admitted = generation.primary.admits(&report);
        admitted.map_err(|refusal| ProbeFailure::new(FailureKind::Unreachable, refusal.to_string()))?;
        Ok(session)
    }

    /// A session to the primary could not be had: doubts the primary, and waits before the caller may try again.
    pub(super) async fn not_opened(&self, generation: &Generation<C>, failure: ProbeFailure) -> Error {
        let id = generation.primary.id;
        tracing::debug!(generation = id.get(), "a session could not be opened: {failure}");
        if failure.kind == FailureKind::Refused {
            return Error::Refused(Box::new(Refused::new(Some(generation.endpoint()), failure)));
        }
        self.cluster.suspect(id, Suspicion::Connection);
        let failures = generation.not_opened(failure.clone());
        let longest = OPEN_PAUSE.0.saturating_mul(2_u32.saturating_pow(failures)).min(OPEN_PAUSE.1);
        sleep((longest + self.random_up_to(longest)) / 2).await;
        let obstacle = Obstacle::NoSession(Some(failure));
        Error::Unavailable(Box::new(Unavailable::new(Duration::ZERO, self.cluster.diagnosis(), obstacle)))
    }
}

/// Words that no other pool gives out: a random half for the pool, and a number. A seed that a caller sets does not decide
/// them, as two pools may have the same one.
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
