//! Eight writers of all kinds, and what they were told.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use testbed::{History, Verdict, lock};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;
use tokio_postgres_failover::ledger::Ledger;
use tokio_postgres_failover::view::Evidence;
use tokio_postgres_failover::{CommitOutcome, Error, Guarantee, Pool};

use crate::entries;

/// The longest that a manager takes, and what the pool adds.
const RECOVERY: Duration = Duration::from_secs(60);
/// A call that takes longer than its deadline and the time after which a silent server counts as dead is stuck.
const STUCK_AFTER: Duration = Duration::from_secs(120);
/// Pause between two calls of one writer. It leaves two processor cores room for three servers and their managers.
const PACE: Duration = Duration::from_millis(5);
/// Of each writer, before anything happens.
const WARM: usize = 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// `transaction`, settled by the write-ahead log.
    Transaction,
    /// `transaction`, settled by the ledger.
    Ledger,
    /// `idempotent`, keyed by the caller's id.
    Idempotent,
    /// `get`, and one statement by hand. An error of that statement says nothing of its outcome.
    Get,
}

const WRITERS: [Kind; 8] = {
    use Kind::{Get, Idempotent, Ledger, Transaction};
    [Transaction, Ledger, Idempotent, Get, Transaction, Ledger, Idempotent, Get]
};

/// Writers at work.
pub(crate) struct Writers {
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
}

struct Shared {
    pool: Pool,
    stop: AtomicBool,
    next: AtomicI64,
    history: History,
    record: Mutex<Record>,
}

#[derive(Default)]
struct Record {
    /// By writer: what was answered with success, and when.
    acknowledged: [Vec<(Instant, i64)>; WRITERS.len()],
    unknown: Vec<String>,
    errors: Vec<String>,
}

/// What the writers were told.
pub(crate) struct Answers {
    history: History,
    record: Record,
}

/// The tables, the ledger and the history function, for the pool's role.
pub(crate) async fn prepare(client: &Client) {
    entries::create_tables(client).await;
    Ledger::default().install(client).await.expect("the ledger");
    Evidence::install(client).await.expect("sql/history.sql");
    let grants = "GRANT USAGE ON SCHEMA failover TO app;
                  GRANT SELECT, INSERT, UPDATE, DELETE ON failover.ledger TO app;
                  GRANT EXECUTE ON FUNCTION failover.wal_history TO app";
    client.batch_execute(grants).await.expect("GRANT");
}

impl Writers {
    /// Starts them; returns when each of them is at work.
    pub(crate) async fn warm(pool: &Pool) -> Self {
        let shared = Arc::new(Shared {
            pool: pool.clone(),
            stop: AtomicBool::new(false),
            next: AtomicI64::new(1),
            history: History::new(),
            record: Mutex::default(),
        });
        let mut tasks = JoinSet::new();
        for writer in 0..WRITERS.len() {
            tasks.spawn(write(Arc::clone(&shared), writer));
        }
        let writers = Self { shared, tasks };
        let warm = async {
            while writers.shared.record().acknowledged.iter().any(|acknowledged| acknowledged.len() < WARM) {
                sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(RECOVERY, warm).await.expect("the writers get to work");
        writers
    }

    /// Waits until every writer had success after `since`.
    pub(crate) async fn recovered(&self, since: Instant) -> Result<(), String> {
        let all = async {
            while self.shared.record().recovery(since, &[]).is_none() {
                sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(RECOVERY, all).await.map_err(|_| {
            let candidates: Vec<_> = self.shared.pool.candidates().iter().map(ToString::to_string).collect();
            format!("not all writers wrote within {RECOVERY:?}: {:?}; {candidates:#?}", self.shared.pool.status())
        })
    }

    /// Lets the calls under way end.
    pub(crate) async fn stop(mut self) -> Answers {
        self.shared.stop.store(true, Ordering::Relaxed);
        while let Some(writer) = self.tasks.join_next().await {
            writer.expect("a writer does not panic");
        }
        let shared = Arc::into_inner(self.shared).expect("the writers have ended");
        Answers { history: shared.history, record: shared.record.into_inner().unwrap() }
    }
}

impl Record {
    fn recovery(&self, since: Instant, lost: &[i64]) -> Option<(Duration, Duration)> {
        let first = |acknowledged: &Vec<(Instant, i64)>| {
            let later = &acknowledged[acknowledged.partition_point(|(at, _)| *at <= since)..];
            later.iter().find(|(_, id)| lost.binary_search(id).is_err()).map(|(at, _)| *at - since)
        };
        let firsts = self.acknowledged.iter().map(first).collect::<Option<Vec<_>>>()?;
        Some((*firsts.iter().min()?, *firsts.iter().max()?))
    }
}

impl Answers {
    pub(crate) fn check(&self, stored: &[(i64, i64)]) -> Verdict {
        self.history.check(stored)
    }

    /// When these were answered.
    pub(crate) fn times(&self, ids: &[i64]) -> Vec<Instant> {
        let all = self.record.acknowledged.iter().flatten();
        all.filter(|(_, id)| ids.binary_search(id).is_ok()).map(|(at, _)| *at).collect()
    }

    /// From `since` to the first success that was not lost, of the first writer and of the last one. `lost` is in
    /// order.
    pub(crate) fn recovery(&self, since: Instant, lost: &[i64]) -> Option<(Duration, Duration)> {
        self.record.recovery(since, lost)
    }

    /// The longest time between two successes, of whomever.
    pub(crate) fn longest_gap(&self, begun: Instant) -> Duration {
        let mut times: Vec<_> = self.record.acknowledged.iter().flatten().map(|(at, _)| *at - begun).collect();
        times.sort_unstable();
        let (Some(first), Some(last)) = (times.first(), times.last()) else { return Duration::MAX };
        testbed::longest_gap(*first, times.iter().copied(), *last)
    }

    pub(crate) fn unknown(&self) -> &[String] {
        &self.record.unknown
    }

    /// Those that a caller should not have seen.
    pub(crate) fn errors(&self) -> &[String] {
        &self.record.errors
    }
}

async fn write(shared: Arc<Shared>, writer: usize) {
    while !shared.stop.load(Ordering::Relaxed) {
        let id = shared.next.fetch_add(1, Ordering::Relaxed);
        let answer = timeout(STUCK_AFTER, one(&shared.pool, WRITERS[writer], id)).await;
        shared.note(writer, id, answer.ok());
        sleep(PACE).await;
    }
}

/// What became of one write.
enum Answer {
    Committed,
    /// By the pool.
    Failed(Error),
    /// The statement of somebody who has a connection for himself.
    ByHand,
}

async fn one(pool: &Pool, kind: Kind, id: i64) -> Answer {
    let answer = match kind {
        Kind::Transaction => pool.transaction(async |tx| entries::plain(&tx, id).await).await,
        Kind::Ledger => {
            let transaction = pool.build_transaction().guarantee(Guarantee::Ledger(Ledger::default()));
            transaction.run(async |tx| entries::plain(&tx, id).await).await
        }
        Kind::Idempotent => pool.idempotent(async |tx| entries::keyed(&tx, id).await).await,
        Kind::Get => match pool.get().await {
            Ok(client) if client.execute("INSERT INTO entries (id) VALUES ($1)", &[&id]).await.is_err() => {
                return Answer::ByHand;
            }
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        },
    };
    answer.map_or_else(Answer::Failed, |()| Answer::Committed)
}

impl Shared {
    fn record(&self) -> MutexGuard<'_, Record> {
        lock(&self.record)
    }

    /// `None`: the call did not end in time, so nobody knows.
    fn note(&self, writer: usize, id: i64, answer: Option<Answer>) {
        let now = Instant::now();
        let mut record = self.record();
        match answer {
            Some(Answer::Committed) => {
                self.history.acknowledged(id);
                record.acknowledged[writer].push((now, id));
            }
            Some(Answer::ByHand) => self.history.unknown(id),
            Some(Answer::Failed(error)) => {
                if error.commit_outcome() == CommitOutcome::NotCommitted {
                    self.history.refused(id);
                } else {
                    self.history.unknown(id);
                }
                let told = format!("{:?}, id {id}: {error}", WRITERS[writer]);
                if matches!(error, Error::CommitUnknown(_)) {
                    record.unknown.push(told);
                } else {
                    record.errors.push(told);
                }
            }
            None => {
                self.history.unknown(id);
                record.errors.push(format!("{:?}, id {id}: stuck", WRITERS[writer]));
            }
        }
    }
}
