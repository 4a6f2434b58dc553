//! Writers under load, whose every answer is held against what the table holds afterwards.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use testbed::{Cluster, History, Verdict, eventually};
use tokio::task::JoinSet;
use tokio_postgres_failover::{CommitOutcome, Error, Pool, PoolBuilder, State};

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
    failures: Vec<Failure>,
    /// When each writer was last acknowledged, by writer: all its successes.
    successes: Vec<Vec<Instant>>,
}

/// A write that failed.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) error: Error,
    /// When the call began.
    pub(crate) began: Instant,
    /// When its error had come.
    pub(crate) at: Instant,
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
    /// The errors themselves, with when they came.
    pub(crate) failures: Vec<Failure>,
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

/// A pool of 8 that finds the cluster by its DNS name.
pub(crate) fn by_name(cluster: &Cluster) -> PoolBuilder {
    by_url(cluster.url()).dns_servers([cluster.dns().addr()])
}

/// A pool of 8. Its jitter is another one in each run; a failed test shows which.
pub(crate) fn by_url(url: String) -> PoolBuilder {
    let seed = RandomState::new().hash_one(0);
    println!("seed {seed}");
    Pool::builder(url).unwrap().max_size(8).seed(seed)
}

/// The number of the pool's newest generation.
pub(crate) fn generation(pool: &Pool) -> u64 {
    pool.status().view.generation.get()
}

/// Waits until the pool has no verified primary any more.
pub(crate) async fn primary_lost(pool: &Pool) {
    eventually("the pool has lost its primary", Duration::from_secs(20), async || {
        !matches!(pool.status().view.state, State::Primary { .. })
    })
    .await;
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
                    let began = Instant::now();
                    let answer = one(&pool, write, id).await;
                    record.lock().unwrap().note(writer, id, began, answer);
                }
            });
        }
        Self { stop, writers: tasks, record }
    }

    /// [`Load::start`], and waits until the writers are at full speed.
    pub(crate) async fn warm(pool: &Pool, writers: usize, write: Write) -> Self {
        let load = Self::start(pool, writers, write);
        let enough = 50 + writers;
        eventually("the writers have warmed up", Duration::from_secs(30), async || load.acknowledged() > enough).await;
        load
    }

    /// How many writes were acknowledged so far.
    pub(crate) fn acknowledged(&self) -> usize {
        self.record.lock().unwrap().successes.iter().map(Vec::len).sum()
    }

    /// Waits until every writer was acknowledged after `since`.
    pub(crate) async fn all_written_since(&self, since: Instant) {
        eventually("every writer writes again", Duration::from_secs(30), async || {
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
        Outcome {
            verdict: record.history.check(&stored),
            errors: record.failures.iter().map(|failure| failure.error.to_string()).collect(),
            failures: record.failures,
            successes: record.successes,
        }
    }
}

impl Record {
    fn note(&mut self, writer: usize, id: i64, began: Instant, answer: Result<(), Error>) {
        let at = Instant::now();
        match answer {
            Ok(()) => {
                self.history.acknowledged(id);
                self.successes[writer].push(at);
            }
            Err(error) => {
                match error.commit_outcome() {
                    CommitOutcome::NotCommitted => self.history.refused(id),
                    _ => self.history.unknown(id),
                }
                self.failures.push(Failure { error, began, at });
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

    /// Every error is a commit that was in flight when the primary died: the call had begun before `died`, and its error
    /// came before `accepted`, when the first write was possible elsewhere. And no answer was a lie.
    pub(crate) fn assert_only_in_flight_unknown(&self, died: Instant, accepted: Instant) {
        for failure in &self.failures {
            assert!(matches!(failure.error, Error::CommitUnknown(_)), "{failure:?}");
            assert!(failure.began < died && failure.at < accepted, "{failure:?}; died {died:?}, accepted {accepted:?}");
        }
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
