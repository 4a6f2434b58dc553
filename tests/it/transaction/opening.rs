//! BEGIN travels with the first statement: it costs no round trip, and nothing runs outside of the transaction.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::{FutureExt, SinkExt, TryStreamExt};
use testbed::{Cluster, Node, Tap, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres_failover::error::Ending;
use tokio_postgres_failover::ledger::Ledger;
use tokio_postgres_failover::{Error, Guarantee, Pool, PoolBuilder, RetryPolicy, Transaction};

use crate::commit::finish::{single, with_ledger};
use crate::support::load::LONG;
use crate::support::{PATIENCE, Runs, insert, sql, stored};

/// Longer than the test.
const NEVER: Duration = Duration::from_secs(3600);

fn guarantees() -> [Guarantee; 4] {
    [Guarantee::ExactlyOnce, Guarantee::AtMostOnce, Guarantee::AtLeastOnce, Guarantee::Ledger(Ledger::default())]
}

fn builder(addr: SocketAddr) -> PoolBuilder {
    let builder = Pool::builder(format!("postgres://app@{addr}/app")).unwrap().max_size(1);
    builder.heartbeat_interval(NEVER).patrol_interval(NEVER)
}

/// Returns whether BEGIN travels. Up to 13 the server does not report a fence, so a BEGIN without a mark asks for it.
async fn travels(cluster: &Cluster, guarantee: &Guarantee) -> bool {
    let is_marked = matches!(guarantee, Guarantee::ExactlyOnce | Guarantee::Ledger(_));
    is_marked || cluster.version().await >= 14
}

/// The pool's session has begun a transaction before, so the next BEGIN travels.
async fn warm(pool: &Pool, guarantee: &Guarantee) {
    for _ in 0..2 {
        let call = pool.build_transaction().guarantee(guarantee.clone());
        call.run(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await.unwrap();
    }
}

async fn tap(cluster: &Cluster) -> Tap {
    Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await
}

#[tokio::test]
async fn one_statement_takes_two_round_trips() {
    let cluster = with_ledger(single()).await;
    let tap = tap(&cluster).await;
    for together in [true, false] {
        let pool = builder(tap.addr()).begin_with_first_statement(together).build().unwrap();
        for guarantee in guarantees() {
            let round_trips = if together && travels(&cluster, &guarantee).await { 2 } else { 3 };
            warm(&pool, &guarantee).await;
            tap.reset();
            let call = pool.build_transaction().guarantee(guarantee.clone());
            call.run(async |tx| Ok(tx.batch_execute("INSERT INTO entries VALUES (1)").await?)).await.unwrap();
            assert_eq!(tap.counts().round_trips, round_trips, "{guarantee:?} {together}: {:?}", tap.counts());
            tap.reset();
            let call = pool.build_transaction().guarantee(guarantee.clone());
            call.run(async |tx| {
                let insert = tx.prepare_cached(PREPARED).await?;
                tx.execute(&insert, &[&2_i64]).await?;
                Ok(())
            })
            .await
            .unwrap();
            // The statement is prepared once in each session.
            let prepared = u64::from(guarantee == Guarantee::ExactlyOnce);
            assert_eq!(tap.counts().round_trips, round_trips + prepared, "{guarantee:?} {together}");
            tap.reset();
            pool.build_transaction().guarantee(guarantee.clone()).run(async |_| Ok(())).await.unwrap();
            assert_eq!(tap.counts().round_trips, 2, "a closure that sends nothing: {guarantee:?} {together}");
            tap.reset();
            let call = pool.build_transaction().guarantee(guarantee.clone());
            call.run(async |_| Err::<(), _>(Error::abort("no"))).await.unwrap_err();
            assert_eq!(
                tap.counts().round_trips,
                round_trips - 1,
                "a closure that only fails: {guarantee:?} {together}"
            );
            let session = "INSERT INTO entries VALUES (3)";
            pool.get().await.unwrap().batch_execute(session).await.unwrap();
            assert_eq!(tap.counts().connections, 0, "its session is kept: {guarantee:?} {together}");
        }
        tap.reset();
        pool.read(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await.unwrap();
        assert_eq!(tap.counts().round_trips, if together { 2 } else { 3 }, "a read: {together}");
    }
    assert_eq!(stored(&cluster).await, [[1; 8], [2; 8], [3; 8]].concat());
}

/// A proxy that, while it is told to, makes each BEGIN fail that travels: the server gets a word that it does not know.
/// A BEGIN in a message of its own passes.
struct Spoiler {
    addr: SocketAddr,
    spoils: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Spoiler {
    async fn start(cluster: &Cluster) -> Self {
        let listener = TcpListener::bind(SocketAddr::new(cluster.spare_addr(0), 0)).await.unwrap();
        let (addr, server, spoils) = (listener.local_addr().unwrap(), cluster.socket_addr(Node(0)), Arc::default());
        let passing = Arc::clone(&spoils);
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(pass(client, server, Arc::clone(&passing)));
            }
        });
        Self { addr, spoils, task }
    }
}

impl Drop for Spoiler {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(client: TcpStream, server: SocketAddr, spoils: Arc<AtomicBool>) {
    let Ok(server) = TcpStream::connect(server).await else { return };
    client.set_nodelay(true).unwrap();
    server.set_nodelay(true).unwrap();
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let there = async {
        let mut bytes = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = from_client.read(&mut bytes).await {
            // The name of the statement is empty, and its text follows.
            let begins = bytes[..length].windows(6).position(|it| it == b"\0BEGIN");
            if let Some(at) = begins.filter(|_| spoils.load(Ordering::SeqCst)) {
                bytes[at + 4] = b'U';
            }
            if to_server.write_all(&bytes[..length]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = there => {}
        _ = copy(&mut from_server, &mut to_client) => {}
    }
}

/// How a closure begins that inserts 1 and 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Simple,
    Prepares,
    Prepared,
    Joins,
    /// The same. The first request of the first one has a Sync.
    JoinsPreparing,
    /// It takes no notice of errors.
    Blind,
    /// It drops the future of its first statement.
    Drops,
    Stream,
    Copies,
    /// The same, with a statement that is prepared.
    CopiesPrepared,
    Savepoint,
}

const SHAPES: [Shape; 11] = [
    Shape::Simple,
    Shape::Prepares,
    Shape::Prepared,
    Shape::Joins,
    Shape::JoinsPreparing,
    Shape::Blind,
    Shape::Drops,
    Shape::Stream,
    Shape::Copies,
    Shape::CopiesPrepared,
    Shape::Savepoint,
];

const ONE: &str = "INSERT INTO entries VALUES (1)";
/// What is prepared on a session before its transaction.
const PREPARED: &str = "INSERT INTO entries VALUES ($1)";
const COPY: &str = "COPY entries FROM STDIN";
const TWO: &str = "INSERT INTO entries VALUES (2)";

async fn work(tx: &mut Transaction, shape: Shape) -> Result<(), Error> {
    match shape {
        Shape::Simple => {
            tx.batch_execute(ONE).await?;
            tx.batch_execute(TWO).await?;
        }
        Shape::Prepares => {
            insert(tx, 1).await?;
            insert(tx, 2).await?;
        }
        Shape::Prepared => {
            let statement = tx.prepare_cached(PREPARED).await?;
            tx.execute(&statement, &[&1_i64]).await?;
            tx.execute(&statement, &[&2_i64]).await?;
        }
        Shape::Joins => {
            let (one, two) = tokio::join!(tx.batch_execute(ONE), tx.batch_execute(TWO));
            one.and(two)?;
        }
        Shape::JoinsPreparing => {
            let (one, two) = tokio::join!(insert(tx, 1), tx.batch_execute(TWO));
            one?;
            two?;
        }
        Shape::Blind => {
            let _ = tx.batch_execute(ONE).await;
            let _ = tx.batch_execute(TWO).await;
        }
        Shape::Drops => {
            // The driver queues a request at the first poll.
            let _ = tx.batch_execute(ONE).now_or_never();
            tx.batch_execute(TWO).await?;
        }
        Shape::Stream => {
            let rows = tx.query_raw("SELECT 1", std::iter::empty::<i32>()).await?;
            pin!(rows).try_next().await?;
            tx.batch_execute("INSERT INTO entries VALUES (1), (2)").await?;
        }
        Shape::Copies | Shape::CopiesPrepared => {
            let sink = if shape == Shape::Copies {
                tx.copy_in::<_, &[u8]>(COPY).await?
            } else {
                let statement = tx.prepare_cached(COPY).await?;
                tx.copy_in::<_, &[u8]>(&statement).await?
            };
            let mut sink = pin!(sink);
            sink.send(b"1\n2\n").await?;
            sink.as_mut().finish().await?;
        }
        Shape::Savepoint => {
            let savepoint = tx.savepoint().await?;
            savepoint.batch_execute(ONE).await?;
            savepoint.release().await?;
            let undone = tx.savepoint().await?;
            undone.batch_execute("INSERT INTO entries VALUES (3)").await?;
            undone.rollback().await?;
            tx.batch_execute(TWO).await?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_closure_is_within_its_transaction() {
    let cluster = with_ledger(single()).await;
    for guarantee in guarantees() {
        let pool = builder(cluster.socket_addr(Node(0))).build().unwrap();
        warm(&pool, &guarantee).await;
        for shape in SHAPES {
            for commits in [true, false] {
                let runs = Runs::default();
                let call = pool.build_transaction().guarantee(guarantee.clone());
                let result = call
                    .run(async |mut tx| {
                        runs.begin();
                        work(&mut tx, shape).await?;
                        if commits { Ok(()) } else { Err(Error::abort("no")) }
                    })
                    .await;
                assert_eq!((result.is_ok(), runs.count()), (commits, 1), "{guarantee:?} {shape:?}: {result:?}");
                let expected: &[i64] = if commits { &[1, 2] } else { &[] };
                assert_eq!(stored(&cluster).await, expected, "{guarantee:?} {shape:?}");
                sql(&cluster, "TRUNCATE entries").await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_begin_that_fails_alone_lets_nothing_run() {
    let cluster = with_ledger(single()).await;
    let spoiler = Spoiler::start(&cluster).await;
    for guarantee in guarantees() {
        if !travels(&cluster, &guarantee).await {
            continue;
        }
        for shape in SHAPES {
            for commits in [true, false] {
                spoiler.spoils.store(false, Ordering::SeqCst);
                let pool = builder(spoiler.addr).build().unwrap();
                warm(&pool, &guarantee).await;
                let client = pool.get().await.unwrap();
                client.prepare_cached(PREPARED).await.unwrap();
                client.prepare_cached(COPY).await.unwrap();
                drop(client);
                spoiler.spoils.store(true, Ordering::SeqCst);
                let what = format!("{guarantee:?} {shape:?} {commits}");
                for calls in 1..=2 {
                    let runs = Runs::default();
                    let call = pool.build_transaction().guarantee(guarantee.clone()).run(async |mut tx| {
                        runs.begin();
                        work(&mut tx, shape).await?;
                        if commits { Ok(()) } else { Err(Error::abort("no")) }
                    });
                    let result = timeout(LONG, call).await.unwrap_or_else(|_| panic!("{what} hangs"));
                    assert_eq!(result.is_ok(), commits, "{what}: {result:?}");
                    // The first one has found out that BEGIN does not travel.
                    assert_eq!(runs.count(), 3 - calls, "{what}");
                    let expected: &[i64] = if commits { &[1, 2] } else { &[] };
                    assert_eq!(stored(&cluster).await, expected, "{what}");
                    sql(&cluster, "TRUNCATE entries").await;
                }
            }
        }
    }
}

/// The error of a BEGIN that failed is told if the work may not run again.
#[tokio::test]
async fn a_begin_that_fails_alone_is_told() {
    let cluster = with_ledger(single()).await;
    let spoiler = Spoiler::start(&cluster).await;
    let once = RetryPolicy::new().attempts(1);
    let pool = builder(spoiler.addr).retry(once).build().unwrap();
    warm(&pool, &Guarantee::ExactlyOnce).await;
    spoiler.spoils.store(true, Ordering::SeqCst);
    let error = pool.transaction(async |tx| insert(&tx, 1).await).await.unwrap_err();
    assert_eq!(error.code().map(SqlState::code), Some("42601"), "{error:?}");
    assert!(stored(&cluster).await.is_empty());
    pool.transaction(async |tx| insert(&tx, 1).await).await.unwrap();
}

/// The mark fails, and BEGIN does not. The pool does not see which statement was dropped.
#[tokio::test]
async fn a_mark_that_fails_alone_lets_nothing_run() {
    let cluster = with_ledger(single()).await;
    for shape in SHAPES {
        let pool = builder(cluster.socket_addr(Node(0))).build().unwrap();
        warm(&pool, &Guarantee::ExactlyOnce).await;
        let client = pool.get().await.unwrap();
        let name = "SELECT name FROM pg_prepared_statements WHERE name LIKE 'tokio_postgres_failover%mark%'";
        let name: String = client.query_one(name, &[]).await.unwrap().get(0);
        client.batch_execute(&format!("DEALLOCATE {name}")).await.unwrap();
        drop(client);
        let runs = Runs::default();
        let call = pool.transaction(async |mut tx| {
            runs.begin();
            work(&mut tx, shape).await
        });
        timeout(LONG, call).await.unwrap_or_else(|_| panic!("{shape:?} hangs")).unwrap();
        assert_eq!((runs.count(), stored(&cluster).await), (2, vec![1, 2]), "{shape:?}");
        sql(&cluster, "TRUNCATE entries").await;
    }
}

#[tokio::test]
async fn a_session_without_prepared_statements_costs_no_run() {
    let cluster = with_ledger(single()).await;
    let tap = tap(&cluster).await;
    let pool = builder(tap.addr()).build().unwrap();
    warm(&pool, &Guarantee::ExactlyOnce).await;
    for forgets in ["DEALLOCATE ALL", "deallocate prepare all; SELECT 1", "DISCARD ALL"] {
        pool.get().await.unwrap().batch_execute(forgets).await.unwrap();
        for round_trips in [3, 2] {
            let runs = Runs::default();
            tap.reset();
            pool.transaction(async |tx| {
                runs.begin();
                Ok(tx.batch_execute(ONE).await?)
            })
            .await
            .unwrap();
            assert_eq!((runs.count(), tap.counts().round_trips), (1, round_trips), "{forgets}");
        }
    }
}

/// The server is told again and again to cancel what the session runs, whatever that is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancel_requests_let_nothing_run_outside() {
    let cluster = with_ledger(single()).await;
    sql(&cluster, "ALTER ROLE app SET client_min_messages = error").await;
    for guarantee in guarantees() {
        let pool = builder(cluster.socket_addr(Node(0))).build().unwrap();
        warm(&pool, &guarantee).await;
        let canceller = cluster.direct(Node(0)).await;
        let storm = "DO $$ BEGIN FOR i IN 1..4000 LOOP \
                       PERFORM pg_cancel_backend(pid) FROM pg_stat_activity WHERE usename = 'app' AND state <> 'idle'; \
                       PERFORM pg_stat_clear_snapshot(); \
                     END LOOP; END $$";
        let over = AtomicBool::new(false);
        let (mut committed, mut refused) = (0_usize, 0);
        let calls = async {
            while !over.load(Ordering::SeqCst) {
                let call = pool.build_transaction().guarantee(guarantee.clone()).deadline(LONG);
                let done = call
                    .run(async |tx| {
                        let _ = tx.batch_execute("INSERT INTO entries VALUES (7)").await;
                        Err::<(), _>(Error::abort("no"))
                    })
                    .await;
                assert!(done.is_err());
                let call = pool.build_transaction().guarantee(guarantee.clone()).deadline(LONG);
                match call.run(async |tx| Ok(tx.batch_execute(ONE).await?)).await {
                    Ok(()) => committed += 1,
                    Err(error) => {
                        refused += 1;
                        assert_eq!(error.code().map(SqlState::code), Some("57014"), "{error:?}");
                    }
                }
            }
        };
        let storms = async {
            canceller.batch_execute(storm).await.unwrap();
            over.store(true, Ordering::SeqCst);
        };
        timeout(LONG, async { tokio::join!(calls, storms) }).await.expect("a call hangs");
        println!("{guarantee:?}: {committed} committed, {refused} cancelled");
        assert_eq!(stored(&cluster).await, vec![1; committed], "{guarantee:?}");
        sql(&cluster, "TRUNCATE entries").await;
    }
}

#[tokio::test]
async fn a_closure_that_begins_with_its_own_end_is_told() {
    let cluster = with_ledger(single()).await;
    for guarantee in guarantees() {
        let pool = builder(cluster.socket_addr(Node(0))).build().unwrap();
        warm(&pool, &guarantee).await;
        for (first, ending) in [("COMMIT", Ending::Committed), ("ROLLBACK", Ending::RolledBack)] {
            for extended in [false, true] {
                let call = pool.build_transaction().guarantee(guarantee.clone());
                let error = call
                    .run(async |tx| {
                        if extended {
                            tx.execute(first, &[]).await?;
                        } else {
                            tx.batch_execute(first).await?;
                        }
                        Ok(())
                    })
                    .await
                    .unwrap_err();
                let Error::EndedInside(inside) = error else { panic!("{guarantee:?} {first}: {error:?}") };
                assert_eq!(inside.ending(), ending, "{guarantee:?} {first}");
            }
        }
    }
}

/// The server dies while it carries out the first statement, before it has answered anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_first_answer_that_is_lost_costs_one_run() {
    for guarantee in guarantees() {
        let cluster = with_ledger(single()).await;
        let pool = builder(cluster.socket_addr(Node(0))).build().unwrap();
        warm(&pool, &guarantee).await;
        let lock = cluster.direct(Node(0)).await;
        lock.batch_execute("BEGIN; LOCK TABLE entries").await.unwrap();
        let runs = Runs::default();
        let call = pool.build_transaction().guarantee(guarantee.clone()).deadline(LONG).run(async |tx| {
            runs.begin();
            insert(&tx, 1).await
        });
        let fault = async {
            let waiting = "SELECT FROM pg_locks WHERE NOT granted";
            eventually("the statement waits", PATIENCE, async || !lock.query(waiting, &[]).await.unwrap().is_empty())
                .await;
            cluster.kill(Node(0)).await;
            cluster.start_node(Node(0)).await;
        };
        let (done, ()) = tokio::join!(call, fault);
        done.unwrap();
        assert_eq!((runs.count(), stored(&cluster).await), (2, vec![1]), "{guarantee:?}");
    }
}

/// The call is dropped after so many polls, with its first statement queued, sent, or answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_call_leaves_nothing_behind() {
    let cluster = with_ledger(single()).await;
    let pool = builder(cluster.socket_addr(Node(0))).build().unwrap();
    for guarantee in guarantees() {
        for polls in 1..8 {
            warm(&pool, &guarantee).await;
            let runs = Runs::default();
            let call = pool.build_transaction().guarantee(guarantee.clone()).run(async |tx| {
                runs.begin();
                tx.batch_execute("INSERT INTO entries VALUES (7)").await?;
                tx.batch_execute("SELECT pg_sleep(600)").await?;
                Ok(())
            });
            let mut call = Box::pin(call);
            for _ in 0..polls {
                assert!(call.as_mut().now_or_never().is_none());
                tokio::task::yield_now().await;
            }
            drop(call);
            // The next transaction is this one alone.
            pool.transaction(async |tx| Ok(tx.batch_execute(ONE).await?)).await.unwrap();
            let observer = cluster.direct(Node(0)).await;
            let open = "SELECT FROM pg_stat_activity WHERE usename = 'app' AND xact_start IS NOT NULL";
            eventually("nothing is open", PATIENCE, async || observer.query(open, &[]).await.unwrap().is_empty()).await;
            assert_eq!(stored(&cluster).await, [1], "{guarantee:?} {polls}");
            sql(&cluster, "TRUNCATE entries").await;
        }
    }
}
