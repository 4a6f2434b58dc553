//! Those who use the pool: writers whose answers are recorded, readers, and calls that are dropped half-way.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use testbed::{Cluster, History, Verdict, lock};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_postgres_failover::{CommitOutcome, Error, Pool};

use crate::dice::Dice;
use crate::entries;

/// Pause between two calls of one worker. It leaves two processor cores room for three servers.
const PACE: Duration = Duration::from_millis(5);
/// The deadline of a call by the pool's default policy.
const DEADLINE: Duration = Duration::from_secs(30);
/// The pool's own default.
const DEAD_AFTER: Duration = Duration::from_secs(20);
/// What a call may take beyond its deadline and `dead_after` on a loaded machine.
const SLACK: Duration = Duration::from_secs(10);
/// Every writer writes again within this time after a fault.
const RECOVERY: Duration = Duration::from_secs(30);
/// One call of so many is dropped half-way.
const DROPPED: usize = 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// `idempotent`, keyed by the caller's id.
    Idempotent,
    /// `transaction`, without any key: a doubled write shows.
    Transaction,
    /// `read`.
    Read,
    /// `get`, and a query on it.
    Get,
}

const WORKERS: [Kind; 10] = {
    use Kind::{Get, Idempotent, Read, Transaction};
    [Transaction, Transaction, Idempotent, Transaction, Transaction, Idempotent, Transaction, Transaction, Read, Get]
};

/// A running set of workers.
pub(crate) struct Load {
    shared: Arc<Shared>,
    workers: Mutex<JoinSet<()>>,
    watchdog: AbortHandle,
}

struct Shared {
    pool: Pool,
    begun: Instant,
    stop: AtomicBool,
    next: AtomicI64,
    history: History,
    record: Mutex<Record>,
}

#[derive(Default)]
struct Record {
    desks: [Desk; WORKERS.len()],
    unknown: usize,
    errors: usize,
    dropped: usize,
    stuck: usize,
}

/// What one worker is at.
#[derive(Clone, Copy, Default)]
struct Desk {
    /// When the call under way began, and whether it was already called stuck.
    call: Option<(Instant, bool)>,
    succeeded: Option<Instant>,
}

/// What a load came to.
pub(crate) struct Outcome {
    pub(crate) verdict: Verdict,
    /// [`Error::CommitUnknown`], from `transaction`.
    pub(crate) unknown: usize,
    /// All other errors.
    pub(crate) errors: usize,
    pub(crate) stuck: usize,
    pub(crate) dropped: usize,
}

impl Load {
    pub(crate) fn start(pool: &Pool, seed: u64) -> Self {
        let shared = Arc::new(Shared {
            pool: pool.clone(),
            begun: Instant::now(),
            stop: AtomicBool::new(false),
            next: AtomicI64::new(1),
            history: History::new(),
            record: Mutex::default(),
        });
        let mut workers = JoinSet::new();
        for (desk, salt) in (0..WORKERS.len()).zip(1..) {
            workers.spawn(work(Arc::clone(&shared), desk, Dice::new(seed ^ (salt << 32))));
        }
        let watchdog = tokio::spawn(watch(Arc::clone(&shared))).abort_handle();
        Self { shared, workers: Mutex::new(workers), watchdog }
    }

    /// Says what happens, and when.
    pub(crate) fn say(&self, what: &str) {
        self.shared.say(what);
    }

    /// Waits until every worker was served by a call that began after `since`, and says how long that took; `None` when
    /// one of them waited too long. It is stuck then.
    pub(crate) async fn recovered(&self, since: Instant) -> Option<Duration> {
        loop {
            let late: Vec<_> = {
                let record = self.shared.record();
                let served = |desk: &Desk| desk.succeeded.is_some_and(|at| at > since);
                (0..WORKERS.len()).filter(|desk| !served(&record.desks[*desk])).collect()
            };
            if late.is_empty() {
                return Some(since.elapsed());
            }
            if since.elapsed() > RECOVERY {
                for desk in &late {
                    self.shared.stuck(*desk, &format!("did no work for {RECOVERY:?} after the last fault"));
                }
                return None;
            }
            sleep(Duration::from_millis(3)).await;
        }
    }

    /// Lets the workers finish, and holds what they were told against the tables.
    pub(crate) async fn stop(&self, cluster: &Cluster) -> Outcome {
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut workers = std::mem::take(&mut *lock(&self.workers));
        // The watchdog names whom it has to wait for.
        let finished = timeout(limit() + SLACK, async { while workers.join_next().await.is_some() {} });
        if finished.await.is_err() {
            workers.shutdown().await;
        }
        self.watchdog.abort();
        let stored = entries::stored(&cluster.direct(cluster.primary()).await).await;
        let verdict = self.shared.history.check(&stored);
        let record = self.shared.record();
        Outcome {
            verdict,
            unknown: record.unknown,
            errors: record.errors,
            stuck: record.stuck,
            dropped: record.dropped,
        }
    }
}

/// How long a call may take: it may wait until its deadline, and its last attempt hang until the server is given up.
fn limit() -> Duration {
    DEADLINE + DEAD_AFTER + SLACK
}

async fn work(shared: Arc<Shared>, desk: usize, mut dice: Dice) {
    while !shared.stop.load(Ordering::Relaxed) {
        let id = shared.next.fetch_add(1, Ordering::Relaxed);
        shared.record().desks[desk].call = Some((Instant::now(), false));
        let call = one(&shared.pool, WORKERS[desk], id);
        let answer =
            if dice.one_in(DROPPED) { timeout(dice.milliseconds(0, 6), call).await.ok() } else { Some(call.await) };
        shared.note(desk, id, answer);
        sleep(PACE).await;
    }
}

async fn one(pool: &Pool, kind: Kind, id: i64) -> Result<(), Error> {
    match kind {
        Kind::Idempotent => pool.idempotent(async |tx| entries::keyed(&tx, id).await).await,
        Kind::Transaction => pool.transaction(async |tx| entries::plain(&tx, id).await).await,
        Kind::Read => {
            pool.read(async |tx| {
                let statement = tx.prepare_cached("SELECT max(id) FROM keyed").await?;
                tx.query_one(&statement, &[]).await?;
                Ok(())
            })
            .await
        }
        Kind::Get => {
            let client = pool.get().await?;
            // The connection may end under the question: that is what a failover does.
            match client.query_one("SELECT pg_is_in_recovery()", &[]).await {
                Ok(row) if row.get(0) => Err(Error::abort("a standby was handed out")),
                _ => Ok(()),
            }
        }
    }
}

/// Calls stuck what should have ended.
async fn watch(shared: Arc<Shared>) {
    loop {
        sleep(Duration::from_millis(500)).await;
        let now = Instant::now();
        let desks = shared.record().desks;
        for (desk, at) in desks.iter().enumerate() {
            if at.call.is_some_and(|(began, known)| !known && now - began > limit()) {
                shared.stuck(desk, "is in a call that should have ended");
            }
        }
    }
}

impl Shared {
    fn record(&self) -> MutexGuard<'_, Record> {
        lock(&self.record)
    }

    fn say(&self, what: &str) {
        println!("{:7.2} s  {what}", self.begun.elapsed().as_secs_f64());
    }

    /// `None`: the call was dropped half-way, so nobody knows.
    fn note(&self, desk: usize, id: i64, answer: Option<Result<(), Error>>) {
        let kind = WORKERS[desk];
        let writes = matches!(kind, Kind::Idempotent | Kind::Transaction);
        let mut record = self.record();
        record.desks[desk].call = None;
        match answer {
            None => record.dropped += 1,
            Some(Ok(())) => {
                record.desks[desk].succeeded = Some(Instant::now());
                if writes {
                    self.history.acknowledged(id);
                }
            }
            Some(Err(error)) => {
                if writes && error.commit_outcome() == CommitOutcome::NotCommitted {
                    self.history.refused(id);
                } else if writes {
                    self.history.unknown(id);
                }
                if kind == Kind::Transaction && matches!(error, Error::CommitUnknown(_)) {
                    record.unknown += 1;
                } else {
                    record.errors += 1;
                    self.say(&format!("worker {desk}, {kind:?}, id {id}, got an error: {error}"));
                }
            }
        }
    }

    /// Counts a worker as stuck, once for each call, and tells all that is known.
    fn stuck(&self, desk: usize, why: &str) {
        let mut record = self.record();
        let since = match &mut record.desks[desk].call {
            Some((_, true)) => return,
            Some((began, known)) => {
                *known = true;
                Some(began.elapsed())
            }
            None => None,
        };
        record.stuck += 1;
        let kind = WORKERS[desk];
        self.say(&format!("worker {desk}, {kind:?}, {why}; its call is under way since {since:?}"));
        println!("           {:?}", self.pool.status());
        for candidate in self.pool.candidates() {
            println!("           {candidate}");
        }
    }
}
