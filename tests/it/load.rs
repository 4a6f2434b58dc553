//! Writers under load, whose every answer is held against what the table holds afterwards.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use testbed::{Cluster, History, Verdict};
use tokio::task::JoinSet;
use tokio_postgres_failover::{CommitOutcome, Error, Pool};

/// How the writers write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Write {
    /// `idempotent`, keyed by the caller's id.
    Idempotent,
    /// `transaction`, without any unique key.
    Transaction,
}

#[derive(Default)]
struct Record {
    history: History,
    errors: Vec<String>,
    /// When each writer was last acknowledged, by writer: all its successes.
    successes: Vec<Vec<Instant>>,
}

/// A running set of writers.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    writers: JoinSet<()>,
    record: Arc<Mutex<Record>>,
}

/// What a load came to.
pub(crate) struct Outcome {
    pub(crate) verdict: Verdict,
    pub(crate) errors: Vec<String>,
    successes: Vec<Vec<Instant>>,
}

/// Makes the table that the writers fill; without a key, so that a doubled write shows.
pub(crate) async fn create_table(cluster: &Cluster) {
    let client = cluster.direct(cluster.primary()).await;
    client
        .batch_execute(
            "CREATE TABLE IF NOT EXISTS entries (id bigint NOT NULL, at timestamptz DEFAULT now());
             CREATE TABLE IF NOT EXISTS keyed (id bigint PRIMARY KEY, at timestamptz DEFAULT now());
             GRANT ALL ON entries, keyed TO app",
        )
        .await
        .unwrap();
}

impl Load {
    pub(crate) fn start(pool: &Pool, writers: usize, write: Write) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let record = Arc::new(Mutex::new(Record { successes: vec![Vec::new(); writers], ..Record::default() }));
        let next = Arc::new(AtomicI64::new(1));
        let mut tasks = JoinSet::new();
        for writer in 0..writers {
            let (pool, stop, record, next) = (pool.clone(), stop.clone(), record.clone(), next.clone());
            tasks.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let id = next.fetch_add(1, Ordering::Relaxed);
                    let answer = one(&pool, write, id).await;
                    record.lock().unwrap().note(writer, id, answer);
                }
            });
        }
        Self { stop, writers: tasks, record }
    }

    /// How many writes were acknowledged so far.
    pub(crate) fn acknowledged(&self) -> usize {
        self.record.lock().unwrap().successes.iter().map(Vec::len).sum()
    }

    /// Waits until every writer was acknowledged after `since`.
    pub(crate) async fn all_written_since(&self, since: Instant) {
        testbed::eventually("every writer writes again", Duration::from_secs(30), async || {
            let record = self.record.lock().unwrap();
            record.successes.iter().all(|times| times.last().is_some_and(|at| *at > since))
        })
        .await;
    }

    /// Stops the writers, waits for them, and reads the table back.
    pub(crate) async fn stop(mut self, cluster: &Cluster) -> Outcome {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(writer) = self.writers.join_next().await {
            writer.unwrap();
        }
        let client = cluster.direct(cluster.primary()).await;
        let rows = client
            .query(
                "SELECT id, count(*) FROM (SELECT id FROM entries UNION ALL SELECT id FROM keyed) e GROUP BY id",
                &[],
            )
            .await
            .unwrap();
        let stored: Vec<(i64, i64)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        let record = std::mem::take(&mut *self.record.lock().unwrap());
        Outcome { verdict: record.history.check(&stored), errors: record.errors, successes: record.successes }
    }
}

impl Record {
    fn note(&mut self, writer: usize, id: i64, answer: Result<(), Error>) {
        match answer {
            Ok(()) => {
                self.history.acknowledged(id);
                self.successes[writer].push(Instant::now());
            }
            Err(error) => {
                match error.commit_outcome() {
                    CommitOutcome::NotCommitted => self.history.refused(id),
                    _ => self.history.unknown(id),
                }
                self.errors.push(error.to_string());
            }
        }
    }
}

async fn one(pool: &Pool, write: Write, id: i64) -> Result<(), Error> {
    match write {
        Write::Idempotent => {
            pool.idempotent(async |tx| {
                let statement = tx.prepare_cached("INSERT INTO keyed (id) VALUES ($1) ON CONFLICT DO NOTHING").await?;
                tx.execute(&statement, &[&id]).await?;
                Ok(())
            })
            .await
        }
        Write::Transaction => {
            pool.transaction(async |tx| {
                let statement = tx.prepare_cached("INSERT INTO entries (id) VALUES ($1)").await?;
                tx.execute(&statement, &[&id]).await?;
                Ok(())
            })
            .await
        }
    }
}

impl Outcome {
    /// No error reached a caller, nothing was lost, doubled or lied about.
    pub(crate) fn assert_flawless(&self) {
        assert!(self.errors.is_empty(), "errors reached the callers: {:#?}", self.errors);
        assert!(self.verdict.is_true(), "{:?}", self.verdict);
        assert!(self.verdict.acknowledged > 0, "nothing was written");
    }

    /// From `since` to the first acknowledged write of anybody, and to that of the last writer.
    pub(crate) fn recovery(&self, since: Instant) -> (Duration, Duration) {
        let firsts: Vec<Duration> = self
            .successes
            .iter()
            .map(|times| times.iter().find(|at| **at > since).map_or(Duration::MAX, |at| *at - since))
            .collect();
        (firsts.iter().min().copied().unwrap(), firsts.iter().max().copied().unwrap())
    }
}
