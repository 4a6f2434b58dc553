//! Dropping a future, at whatever await, leaves no open transaction, no lock, no running statement and no task.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::join_all;
use testbed::{Cluster, Node, eventually};
use tokio::runtime::Handle;
use tokio::task::{JoinSet, yield_now};
use tokio::time::timeout;
use tokio_postgres::NoTls;
use tokio_postgres_failover::retry::RetryBudget;
use tokio_postgres_failover::view::State;
use tokio_postgres_failover::{Error, Pool, PoolBuilder, Transaction, deadpool_postgres};

use crate::support::{CONFLICT, PATIENCE};

const NAME: &str = "cancelled";
const MAX_SIZE: usize = 4;
/// What runs longer than every test: gone from the server only if it was cancelled.
const SLOW: &str = "SELECT pg_sleep(600)";

struct Bench {
    cluster: Cluster,
    observer: tokio_postgres::Client,
    pool: Pool,
    tasks_before: usize,
    /// The cluster's task, the one that closes idle connections, the heartbeat's session; and the one that found the
    /// primary, where nobody has taken it.
    tasks_own: usize,
}

fn builder(addr: SocketAddr) -> PoolBuilder {
    Pool::builder(format!("postgres://app@{addr}/app")).unwrap().max_size(MAX_SIZE).application_name(NAME)
}

fn alive_tasks() -> usize {
    Handle::current().metrics().num_alive_tasks()
}

/// Another's pool, wrapped.
fn wrapped(addr: SocketAddr) -> Pool {
    let mut config = deadpool_postgres::Config::new();
    config.url = Some(format!("postgres://app@{addr}/app"));
    config.application_name = Some(NAME.to_owned());
    config.pool = Some(deadpool_postgres::PoolConfig::new(MAX_SIZE));
    Pool::wrap(config.create_pool(None, NoTls).unwrap()).build().unwrap()
}

impl Bench {
    async fn new() -> Self {
        Self::of(|addr| builder(addr).build().unwrap(), 3).await
    }

    async fn wrapped() -> Self {
        Self::of(wrapped, 4).await
    }

    async fn of(pool: impl Fn(SocketAddr) -> Pool, tasks_own: usize) -> Self {
        let cluster = Cluster::builder().nodes(1).start().await;
        let observer = cluster.direct(Node(0)).await;
        let create = "CREATE TABLE parts (work bigint, part int); GRANT ALL ON parts TO app";
        observer.batch_execute(create).await.unwrap();
        let tasks_before = alive_tasks();
        let pool = pool(cluster.socket_addr(Node(0)));
        pool.connect().await.unwrap();
        Self { cluster, observer, pool, tasks_before, tasks_own }
    }

    async fn count(&self, sql: &str) -> i64 {
        self.observer.query_one(sql, &[]).await.unwrap().get(0)
    }

    /// What must hold once everything was dropped; ends the pool.
    async fn ends_clean(self) {
        let sessions = format!("SELECT count(*) FROM pg_stat_activity WHERE application_name = '{NAME}'");
        eventually("no transaction is open and no statement runs", PATIENCE, async || {
            self.count(&format!("{sessions} AND state <> 'idle'")).await == 0
        })
        .await;
        let locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' OR relation = 'parts'::regclass";
        eventually("no lock is held", PATIENCE, async || self.count(locks).await == 0).await;
        let torn = "SELECT count(*) FROM (SELECT FROM parts GROUP BY work HAVING count(*) <> 2) torn";
        assert_eq!(self.count(torn).await, 0, "a transaction landed in part, or twice");

        // All connections can be had at the same time, and none of them is in a transaction.
        let mut clients = Vec::new();
        for _ in 0..MAX_SIZE {
            let client = timeout(PATIENCE, self.pool.get()).await.unwrap().unwrap();
            client.batch_execute("BEGIN; SELECT 1; COMMIT").await.unwrap();
            clients.push(client);
        }
        drop(clients);
        let status = self.pool.status();
        assert_eq!((status.size, status.available, status.waiting), (MAX_SIZE, MAX_SIZE, 0));
        assert_eq!(status.view.generation.get(), 1, "nobody is evicted");
        let most = self.tasks_before + self.tasks_own + MAX_SIZE;
        eventually("no task is left behind", PATIENCE, async || alive_tasks() <= most).await;

        let Self { cluster, observer, pool, tasks_before, .. } = self;
        drop(pool);
        eventually("no session is left", PATIENCE, async || {
            observer.query_one(&sessions, &[]).await.unwrap().get::<_, i64>(0) == 0
        })
        .await;
        eventually("the pool's tasks have ended", PATIENCE, async || alive_tasks() <= tasks_before).await;
        drop(cluster);
    }
}

/// Polls the future at most `polls` times and drops it then.
async fn cut_after<F: Future>(polls: usize, future: F) -> Option<F::Output> {
    let mut future = Box::pin(future);
    let mut polled = 0;
    poll_fn(move |context| {
        polled += 1;
        match future.as_mut().poll(context) {
            Poll::Ready(value) => Poll::Ready(Some(value)),
            Poll::Pending if polled >= polls => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// Two parts that belong together, several statements, a lock, a savepoint, and a wait in the server.
async fn work(mut tx: Transaction, id: i64) -> Result<(), Error> {
    tx.execute("INSERT INTO parts VALUES ($1, 1)", &[&id]).await?;
    tx.execute("SELECT pg_advisory_xact_lock($1)", &[&(id % 4)]).await?;
    let savepoint = tx.savepoint().await?;
    savepoint.execute("INSERT INTO parts VALUES ($1, 3)", &[&id]).await?;
    savepoint.rollback().await?;
    tx.batch_execute("SELECT pg_sleep(0.002)").await?;
    tx.execute("INSERT INTO parts VALUES ($1, 2)", &[&id]).await?;
    Ok(())
}

/// The same for a transaction that may not write.
async fn look(tx: Transaction, id: i64) -> Result<i64, Error> {
    tx.execute("SELECT pg_advisory_xact_lock($1)", &[&(id % 4)]).await?;
    tx.batch_execute("SELECT pg_sleep(0.002)").await?;
    Ok(tx.query_one("SELECT count(*) FROM parts WHERE work = $1", &[&id]).await?.get(0))
}

/// Runs each kind of call, cut off by `cut`, which tells whether the call came to its end; returns how many did.
async fn run_all<C, F>(bench: &Bench, points: usize, cut: C) -> u64
where
    C: Fn(usize, futures_util::future::BoxFuture<'static, Result<(), Error>>) -> F + Send + Sync + Clone + 'static,
    F: Future<Output = bool> + Send,
{
    let ids = Arc::new(AtomicU64::new(1));
    let ended = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    for lane in 0..3 * MAX_SIZE {
        let (pool, ids, ended, cut) = (bench.pool.clone(), Arc::clone(&ids), Arc::clone(&ended), cut.clone());
        tasks.spawn(async move {
            for point in (1..=points).filter(|point| point % MAX_SIZE == lane / 3) {
                let id = i64::try_from(ids.fetch_add(1, Ordering::Relaxed)).unwrap();
                let pool = pool.clone();
                let call = match lane % 3 {
                    0 => async move { pool.transaction(async |tx| work(tx, id).await).await }.boxed(),
                    1 => async move { pool.idempotent(async |tx| work(tx, id).await).await }.boxed(),
                    _ => async move { pool.read(async |tx| look(tx, id).await).await.map(drop) }.boxed(),
                };
                ended.fetch_add(u64::from(cut(point, call).await), Ordering::Relaxed);
            }
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    ended.load(Ordering::Relaxed)
}

/// C1, acceptance 12: dropped after the n-th poll, for each n up to beyond the end of the call.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c1_dropped_at_every_poll() {
    dropped_at_every_poll(Bench::new().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c1_dropped_at_every_poll_of_a_wrapped_pool() {
    dropped_at_every_poll(Bench::wrapped().await).await;
}

async fn dropped_at_every_poll(bench: Bench) {
    let ended = run_all(&bench, 60, async |polls, call| match cut_after(polls, call).await {
        Some(result) => {
            result.unwrap();
            true
        }
        None => false,
    })
    .await;
    assert!(ended > 0, "no call was polled to its end, so the last awaits were not reached");
    assert!(ended < 3 * 60, "no call was dropped");
    bench.ends_clean().await;
}

/// C1, acceptance 12: dropped after a time, where the task's polls do not tell the points apart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c1_dropped_at_many_times() {
    let bench = Bench::new().await;
    let ended = run_all(&bench, 100, async |point, call| {
        // Every microsecond up to a thousand is hit by some point, in an order that is always the same.
        let micros = (point as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 50;
        match timeout(Duration::from_micros(micros), call).await {
            Ok(result) => {
                result.unwrap();
                true
            }
            Err(_) => false,
        }
    })
    .await;
    assert!(ended < 3 * 100, "no call was dropped");
    bench.ends_clean().await;
}

/// C1: a dropped `get` gives back its place in the queue, and the connection that was being opened for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c1_get_dropped_at_every_poll() {
    let bench = Bench::new().await;
    let mut tasks = JoinSet::new();
    for lane in 0..8_usize {
        let pool = bench.pool.clone();
        tasks.spawn(async move {
            for polls in (1..=25).filter(|polls| polls % 8 == lane) {
                // Ends the connection at each turn, so that the next `get` opens one.
                if let Some(client) = cut_after(polls, pool.get()).await {
                    let client = client.unwrap();
                    let _ = client.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())").await;
                    // A connection that is given back before its end is seen would be handed out again.
                    let seen = async {
                        while !client.is_closed() {
                            yield_now().await;
                        }
                    };
                    timeout(PATIENCE, seen).await.unwrap();
                }
                let _ = timeout(Duration::from_micros(polls as u64 * 200), pool.get()).await;
            }
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    bench.ends_clean().await;
}

/// C1, C2: a statement that would run for ten minutes, holding a lock, is cancelled on the server when its call is
/// dropped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c1_the_server_is_told_to_stop() {
    let bench = Bench::new().await;
    let slow = async |tx: Transaction| {
        tx.batch_execute("SELECT pg_advisory_xact_lock(1); LOCK parts IN ACCESS SHARE MODE").await?;
        tx.batch_execute(SLOW).await?;
        Ok(())
    };
    let running = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = '{NAME}' AND query = '{SLOW}' AND state = \
         'active'"
    );
    for call in 0..3 {
        let pool = bench.pool.clone();
        let task = tokio::spawn(async move {
            match call {
                0 => pool.transaction(slow).await,
                1 => pool.idempotent(slow).await,
                _ => pool.build_transaction().run(slow).await,
            }
        });
        eventually("the statement runs", PATIENCE, async || bench.count(&running).await == 1).await;
        task.abort();
        eventually("the statement is cancelled", PATIENCE, async || bench.count(&running).await == 0).await;
    }
    bench.ends_clean().await;
}

/// C1, C2: the same at once after it was sent, when the cancel request may overtake the statement.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c1_the_cancel_request_does_not_come_too_early() {
    let bench = Bench::new().await;
    for round in 0..60_u64 {
        let call = bench.pool.transaction(async |tx| Ok(tx.batch_execute(SLOW).await?));
        assert!(timeout(Duration::from_micros(300 + round * 50), call).await.is_err());
    }
    bench.ends_clean().await;
}

/// C2: a time-out within the closure: the busy session is not used again, and its statement is cancelled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c2_a_timed_out_statement_is_cancelled() {
    let bench = Bench::new().await;
    let error = bench
        .pool
        .transaction(async |tx| {
            tx.execute("INSERT INTO parts VALUES (1, 1)", &[]).await?;
            timeout(Duration::from_millis(50), tx.batch_execute(SLOW)).await.map_err(Error::abort)??;
            Ok(())
        })
        .await
        .unwrap_err();
    assert!(error.downcast_ref::<tokio::time::error::Elapsed>().is_some(), "{error:?}");
    bench.ends_clean().await;
}

/// C3: a panic in the closure goes on to the caller; the transaction is rolled back and its connection closed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c3_a_panic_rolls_back() {
    let bench = Bench::new().await;
    let pids = std::sync::Mutex::new(Vec::new());
    for late in [false, true] {
        let call = bench.pool.idempotent(async |tx| -> Result<(), Error> {
            if late {
                tx.execute("INSERT INTO parts VALUES (1, 1)", &[]).await?;
                let pid: i32 = tx.query_one("SELECT pg_backend_pid()", &[]).await?.get(0);
                pids.lock().unwrap().push(pid);
            }
            panic!("of the closure's own");
        });
        let panic = AssertUnwindSafe(call).catch_unwind().await.unwrap_err();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"of the closure's own"));
    }
    let pid = pids.lock().unwrap()[0];
    eventually("its session is closed", PATIENCE, async || {
        bench.count(&format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}")).await == 0
    })
    .await;
    assert_eq!(bench.count("SELECT count(*) FROM parts").await, 0);
    bench.ends_clean().await;
}

/// C1: a call dropped while the pool searches, or waits for a free connection, leaves the queue.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c1_dropped_while_it_waits() {
    let bench = Bench::new().await;
    let mut held = Vec::new();
    for _ in 0..MAX_SIZE {
        held.push(bench.pool.get().await.unwrap());
    }
    for polls in 1..=3 {
        assert!(
            cut_after(polls, async {
                tokio::select! {
                    biased;
                    _ = bench.pool.transaction(async |_| Ok(())) => {}
                    () = async { loop { yield_now().await } } => {}
                }
            })
            .await
            .is_none()
        );
    }
    assert_eq!(bench.pool.status().waiting, 0);
    drop(held);
    bench.ends_clean().await;

    let pool = builder(([127, 0, 0, 1], 1).into()).build().unwrap();
    let mut waiting = JoinSet::new();
    for _ in 0..20 {
        let pool = pool.clone();
        waiting.spawn(async move { pool.get().await.map(drop) });
    }
    eventually("they wait", PATIENCE, async || pool.status().waiting > 0).await;
    waiting.shutdown().await;
    assert_eq!((pool.status().waiting, pool.status().size), (0, 0));
    assert!(matches!(pool.status().view.state, State::Searching { .. }));
}

/// Calls that wait for the budget and are dropped give back what they were promised.
#[tokio::test]
async fn a_call_dropped_while_it_waits_for_the_budget_keeps_no_token() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let budget = RetryBudget::new(1, 1).ratio(0.0);
    let pool = builder(cluster.socket_addr(Node(0))).retry_budget(budget).build().unwrap();
    let dropped = (0..20).map(|_| {
        let waits = pool.transaction(async |tx| Ok(tx.batch_execute(CONFLICT).await?));
        timeout(Duration::from_secs(1), waits)
    });
    for ended in join_all(dropped).await {
        assert!(ended.is_err(), "{ended:?}");
    }
    // The next one has its turn within the deadline.
    let runs = AtomicU64::new(0);
    let next = pool.build_transaction().deadline(Duration::from_secs(5)).run(async |tx| {
        let first = runs.fetch_add(1, Ordering::Relaxed) == 0;
        Ok(tx.batch_execute(if first { CONFLICT } else { "SELECT 1" }).await?)
    });
    next.await.unwrap();
}
