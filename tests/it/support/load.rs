//! Writers under load, whose every answer is held against what the table holds afterwards.

use std::env;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use testbed::{Cluster, History, Node, Verdict, eventually};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_postgres_failover::view::State;
use tokio_postgres_failover::{Client, CommitOutcome, Error, Pool, PoolBuilder};
use tracing_subscriber::EnvFilter;

use crate::support::{insert, stalls};

/// Ten times and more of what an idle machine takes: a busy one passes, a time-out that nobody should have waited for
/// does not. What it really took is printed; docs/figures.md has it.
pub(crate) const PROMPT: Duration = Duration::from_secs(2);
/// For what comes at once on an idle machine.
pub(crate) const LONG: Duration = Duration::from_secs(90);

/// How the writers write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Write {
    /// `idempotent`, keyed by the caller's id.
    Idempotent,
    /// `transaction`, without any unique key.
    Transaction,
    /// The same with a statement that is prepared in it, and not kept for the next one.
    Uncached,
    /// One like that, and one that is `idempotent`, by turns.
    Both,
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

/// A pool of 8 that finds the cluster by its DNS name.
pub(crate) fn by_name(cluster: &Cluster) -> PoolBuilder {
    by_url(cluster.url()).dns_servers([cluster.dns().addr()])
}

/// A pool of 8. Its jitter is another one in each run; a failed test shows which. `RUST_LOG` shows what it logs.
pub(crate) fn by_url(url: String) -> PoolBuilder {
    // Fails for each pool but the first: there is one log for all tests.
    let _ = tracing_subscriber::fmt().with_env_filter(EnvFilter::from_default_env()).with_test_writer().try_init();
    let seed = RandomState::new().hash_one(0);
    println!("seed {seed}");
    Pool::builder(url).unwrap().max_size(8).seed(seed)
}

/// The number of the pool's newest generation.
pub(crate) fn generation(pool: &Pool) -> u64 {
    pool.status().view.generation.get()
}

/// A number from the environment, for a run that is longer than the usual one.
pub(crate) fn from_env(name: &str, usual: u64) -> u64 {
    env::var(name).map_or(usual, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number, not {text:?}")))
}

/// A time that a test shortens, unless the environment asks for the pool's own: `None` is not to be set.
pub(crate) fn unless_default(name: &str, usual: Duration) -> Option<Duration> {
    match env::var(name) {
        Ok(text) if text == "default" => None,
        Ok(text) => panic!("{name} is `default` or not set, not {text:?}"),
        Err(_) => Some(usual),
    }
}

/// Milliseconds, to a tenth.
pub(crate) fn ms(duration: Duration) -> String {
    format!("{:.1}", duration.as_secs_f64() * 1000.0)
}

/// The same time of several rounds, shown as its median, the smallest and the largest.
#[derive(Default)]
pub(crate) struct Spread(pub(crate) Vec<Duration>);

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let (Some(min), Some(max)) = (sorted.first(), sorted.last()) else { return f.write_str("none") };
        let median = (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2;
        write!(f, "{} ({} – {}) ms", ms(median), ms(*min), ms(*max))
    }
}

/// A statement that ends only with its connection.
pub(crate) struct Hung(JoinHandle<Instant>);

impl Hung {
    pub(crate) fn on(client: Client) -> Self {
        Self(tokio::spawn(async move {
            client.batch_execute("SELECT pg_sleep(600)").await.expect_err("nobody waits ten minutes");
            Instant::now()
        }))
    }

    pub(crate) fn hangs(&self) -> bool {
        !self.0.is_finished()
    }

    /// Waits for its end; tells when that was.
    pub(crate) async fn released(self) -> Instant {
        timeout(LONG, self.0).await.expect("the call hangs for ever").unwrap()
    }
}

/// The address of the server behind the connection that is handed out now.
pub(crate) async fn server_of(pool: &Pool) -> String {
    let client = pool.get().await.unwrap();
    client.query_one("SELECT host(inet_server_addr())", &[]).await.unwrap().get(0)
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
        // How much the machine stood still is asked by those who wait for the writers.
        stalls::watch();
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

    /// From `since` to the first acknowledged write of anybody, and to that of the last writer.
    pub(crate) fn recovery(&self, since: Instant) -> (Duration, Duration) {
        recovery(&self.record.lock().unwrap().successes, since)
    }

    /// When the newest acknowledged write was answered.
    pub(crate) fn last_acknowledged(&self) -> Instant {
        let record = self.record.lock().unwrap();
        record.successes.iter().filter_map(|times| times.last()).max().copied().expect("a write")
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
        Write::Both if id % 2 == 0 => {
            pool.idempotent(async |tx| {
                tx.execute("INSERT INTO keyed (id) VALUES ($1) ON CONFLICT DO NOTHING", &[&id]).await?;
                Ok(())
            })
            .await
        }
        Write::Uncached | Write::Both => pool.transaction(async |tx| insert(&tx, id).await).await,
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
        recovery(&self.successes, since)
    }
}

fn recovery(successes: &[Vec<Instant>], since: Instant) -> (Duration, Duration) {
    let firsts = successes.iter().map(|times| {
        let later = times.partition_point(|at| *at <= since);
        times.get(later).map_or(Duration::MAX, |at| *at - since)
    });
    let firsts: Vec<Duration> = firsts.collect();
    (firsts.iter().min().copied().unwrap(), firsts.iter().max().copied().unwrap())
}

/// Silences the primary (`silence(node, true)`) under eight writers and a call that hangs, and promotes a standby: at
/// once, and after a second and a half, `ROUNDS` times each. Nobody may stay stuck on the silent server, or go back to
/// it when it is heard again.
///
/// The pool has nine connections or more.
pub(crate) async fn silent_primaries_hold_nobody(
    cluster: &Cluster,
    pool: &Pool,
    fault: &str,
    silence: impl Fn(Node, bool),
) {
    let rounds = from_env("ROUNDS", 1);
    let load = Load::warm(pool, 8, Write::Transaction).await;
    for delay in [Duration::ZERO, Duration::from_millis(1500)] {
        let [mut promoted, mut released, mut first, mut all] = [const { Spread(Vec::new()) }; 4];
        let mut prompt = PROMPT;
        for round in 1..=rounds {
            // At another moment between two heartbeats in each round.
            sleep(Duration::from_millis(round * 370 % 1000)).await;
            let hung = Hung::on(pool.get().await.unwrap());
            let old = cluster.primary();
            silence(old, true);
            let silent = Instant::now();
            sleep(delay).await;
            assert!(hung.hangs(), "silence alone ends nothing");
            let promotion = cluster.promote_timed(cluster.most_advanced_standby().await).await;
            let accepted = promotion.accepted_at;
            load.all_written_since(accepted).await;
            promoted.0.push(accepted - silent);
            released.0.push(hung.released().await.saturating_duration_since(accepted));
            let (first_write, all_writers) = load.recovery(accepted);
            first.0.push(first_write);
            all.0.push(all_writers);
            prompt = prompt.max(PROMPT + stalls::slack_since(accepted));
            let last = |spread: &Spread| ms(spread.0[spread.0.len() - 1]);
            println!(
                "round={round} fault={fault} promoted_after={} released_ms={} first_write_ms={} all_writers_ms={}",
                last(&promoted),
                last(&released),
                last(&first),
                last(&all)
            );

            let found = pool.status().view.changed.at;
            silence(old, false);
            let heard = stalls::now();
            while heard.elapsed() < Duration::from_secs(1) {
                assert_eq!(server_of(pool).await, cluster.addr(cluster.primary()).to_string());
            }
            // The new primary may be suspended for a stall of the machine.
            if stalls::lost_since(heard) < PROMPT / 2 {
                assert_eq!(pool.status().view.changed.at, found, "{:?}", pool.status().view);
            }
            cluster.restart_as_standby(old).await;
            load.all_written_since(Instant::now()).await;
        }
        println!(
            "{fault}, {rounds} rounds, {} ms until the promotion began: accepted writes {promoted} after the fault; \
             from then on: hanging call released {released}, first write {first}, all 8 writers {all}",
            delay.as_millis()
        );
        assert!(released.0.iter().chain(&all.0).all(|took| *took < prompt), "somebody was stuck");
    }
    load.stop(cluster).await.assert_flawless();
    assert_eq!(generation(pool), 2 * rounds + 1);
}

/// Stalls of a second and a half (`stall(node, true)`), one after the other, `STALL_SECONDS` long, under load and
/// beside an open transaction: nothing is lost, ended or even suspended.
///
/// The pool has the default settings, and more connections than the eight writers need.
pub(crate) async fn stalls_are_no_failure(cluster: &Cluster, pool: &Pool, fault: &str, stall: impl Fn(Node, bool)) {
    let stalling = Duration::from_secs(from_env("STALL_SECONDS", 10));
    let load = Load::warm(pool, 8, Write::Transaction).await;
    let mut client = pool.get().await.unwrap();
    let transaction = client.transaction().await.unwrap();
    transaction.batch_execute("INSERT INTO entries (id) VALUES (-1)").await.unwrap();
    let found = pool.status().view.changed.at;
    let (begun, mut stalled, mut lost) = (stalls::now(), 0, Duration::ZERO);
    while begun.elapsed() < stalling {
        let silent = Instant::now();
        stall(cluster.primary(), true);
        sleep(Duration::from_millis(1500)).await;
        stall(cluster.primary(), false);
        stalled += 1;
        load.all_written_since(Instant::now()).await;
        lost = lost.max(stalls::lost_since(silent));
        // At another moment between two heartbeats each time.
        sleep(Duration::from_millis(700)).await;
    }
    transaction.commit().await.expect("what was under way goes on");
    drop(client);
    let outcome = load.stop(cluster).await;
    println!(
        "{fault}: {stalled} stalls of 1.5 s within {:?}: {} writes, {} errors, {} generation(s), suspended: {}",
        begun.elapsed(),
        outcome.verdict.acknowledged,
        outcome.errors.len(),
        generation(pool),
        pool.status().view.changed.at != found
    );
    outcome.assert_flawless();
    assert_eq!(generation(pool), 1);
    // With what the machine stood still itself, one may have been as long as `heartbeat_timeout`, which is 2 s.
    if lost < Duration::from_millis(400) && stalls::lost_since(begun) < Duration::from_millis(1500) {
        assert_eq!(pool.status().view.changed.at, found, "{:?}", pool.status().view);
    }
}
