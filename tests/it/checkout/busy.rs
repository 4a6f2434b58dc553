//! A connection with something under way is never handed on: its next user meets an idle session without a transaction.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures_util::{FutureExt, SinkExt, StreamExt};
use testbed::{Cluster, Node, Tap, eventually};
use tokio::time::{Instant, timeout};
use tokio_postgres::{NoTls, SimpleQueryMessage};
use tokio_postgres_failover::session::CancelToken;
use tokio_postgres_failover::{Client, Manager, Pool, deadpool};

use crate::support::PATIENCE;

/// What runs longer than every test.
const SLOW: &str = "SELECT pg_sleep(600)";
const NAME: &str = "busy";

struct Bench {
    cluster: Cluster,
    observer: tokio_postgres::Client,
    pool: Pool,
}

impl Bench {
    async fn new() -> Self {
        let cluster = Cluster::builder().nodes(1).start().await;
        let observer = cluster.direct(Node(0)).await;
        let url = cluster.url_hosts();
        let pool = Pool::builder(url).unwrap().max_size(1).application_name(NAME).build().unwrap();
        Self { cluster, observer, pool }
    }

    async fn get(&self) -> Client {
        timeout(PATIENCE, self.pool.get()).await.expect("a connection").unwrap()
    }

    /// The next caller is served on an idle session, and nothing that ran before runs on.
    async fn next_is_well(&self, what: &str) -> Client {
        let next = self.get().await;
        let idle = timeout(PATIENCE, alone(&next)).await;
        let idle = idle.unwrap_or_else(|_| panic!("{what}: the next caller waits for what was left"));
        assert!(idle, "{what}: the next caller is in a transaction of somebody else's");
        let pid = pid(&next).await;
        eventually(what, PATIENCE, async || self.others_running(pid).await == 0).await;
        next
    }

    async fn others_running(&self, pid: i32) -> i64 {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND pid <> $2 \
                   AND state <> 'idle'";
        self.observer.query_one(sql, &[&NAME, &pid]).await.unwrap().get(0)
    }
}

/// Not in a transaction that began before this statement.
async fn alone(client: &tokio_postgres::Client) -> bool {
    let answer = client.simple_query("SELECT now() = statement_timestamp()").await;
    let Ok(messages) = answer else { return false };
    messages.iter().any(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0) == Some("t"),
        _ => false,
    })
}

async fn pid(client: &Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0)
}

/// Whatever is left under way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_left_under_way_meets_nobody() {
    let bench = Bench::new().await;

    let client = bench.get().await;
    let gone = timeout(Duration::from_millis(50), client.batch_execute(SLOW)).await;
    assert!(gone.is_err());
    drop(client);
    drop(bench.next_is_well("a statement whose caller timed out").await);

    let client = bench.get().await;
    // Made and dropped before anybody else could run.
    assert!(client.batch_execute(SLOW).now_or_never().is_none());
    drop(client);
    drop(bench.next_is_well("a statement whose future was dropped at once").await);

    let client = bench.get().await;
    // Wide: the server sends when it has eight kilobytes.
    let sql =
        "SELECT repeat('x', 1000), pg_sleep(CASE WHEN i > 200 THEN 600 ELSE 0 END) FROM generate_series(1, 300) i";
    let mut rows = Box::pin(client.query_raw(sql, std::iter::empty::<i32>()).await.unwrap());
    let _ = rows.next().now_or_never();
    drop(rows);
    drop(client);
    drop(bench.next_is_well("a stream of rows").await);

    let client = bench.get().await;
    let (one, two) = (client.batch_execute("SELECT 1"), client.batch_execute(SLOW));
    assert!(timeout(Duration::from_millis(50), async { tokio::join!(one, two) }).await.is_err());
    drop(client);
    drop(bench.next_is_well("a pipeline").await);

    let client = bench.get().await;
    client.batch_execute("CREATE TABLE copied (line text)").await.unwrap();
    let mut sink = Box::pin(client.copy_in::<_, &[u8]>("COPY copied FROM STDIN").await.unwrap());
    sink.send(b"one\n").await.unwrap();
    drop(client);
    drop(bench.next_is_well("a COPY that somebody still holds").await);
    drop(sink);

    for sql in ["BEGIN", "BEGIN; SELECT 1/0", "BEGIN; LOCK TABLE copied", "START TRANSACTION READ ONLY"] {
        let client = bench.get().await;
        let _ = client.batch_execute(sql).await;
        drop(client);
        drop(bench.next_is_well(sql).await);
    }
    bench.observer.batch_execute("LOCK TABLE copied IN ACCESS EXCLUSIVE MODE NOWAIT").await.unwrap_err();
    drop(bench.cluster);
}

/// A stream that is still held, all of whose rows have come as far as the driver.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_is_still_held_stops_nobody() {
    let bench = Bench::new().await;
    let client = bench.get().await;
    let sql = "SELECT i, repeat('x', 1000) FROM generate_series(1, 2000) i";
    let rows = Box::pin(client.query_raw(sql, std::iter::empty::<i32>()).await.unwrap());
    drop(client);
    drop(bench.next_is_well("a stream that is held").await);
    drop(rows);
}

/// What good programs do keeps its connection: nothing of this is taken for a request under way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_ends_by_itself_keeps_its_connection() {
    let bench = Bench::new().await;
    let mut client = bench.get().await;
    let mut last = pid(&client).await;
    client.batch_execute("CREATE TABLE kept (line text)").await.unwrap();
    drop(client.transaction().await.unwrap());
    drop(client);
    let mut unkept = Vec::new();
    for round in 0..50 {
        let mut client = bench.get().await;
        let now = pid(&client).await;
        if std::mem::replace(&mut last, now) != now {
            unkept.push(round);
        }
        match round % 5 {
            0 => drop(client.query_one("SELECT $1::int", &[&round]).await.unwrap()),
            1 => drop(client.transaction().await.unwrap()),
            2 => assert!(client.batch_execute("SELECT 1/0").await.is_err()),
            3 => {
                let transaction = client.transaction().await.unwrap();
                transaction.batch_execute("SELECT 1").await.unwrap();
                assert!(transaction.batch_execute("SELECT 1/0").await.is_err());
            }
            _ => {
                let mut sink = Box::pin(client.copy_in("COPY kept FROM STDIN").await.unwrap());
                sink.send(&b"one\n"[..]).await.unwrap();
                sink.as_mut().finish().await.unwrap();
            }
        }
    }
    let two = bench
        .pool
        .transaction(async |tx| Ok(tx.query_one("SELECT pg_backend_pid()", &[]).await?.get::<_, i32>(0)))
        .await;
    // A machine that stands still at the wrong moment looks like a server that does not end its answer. Each kind of
    // work is done ten times.
    unkept.extend((two.unwrap() != last).then_some(50));
    assert!(unkept.len() <= 3, "the connections of these rounds were not kept: {unkept:?}");
}

/// A pool built by hand does not hand such a connection on either.
#[tokio::test]
async fn a_pool_built_by_hand_hands_nothing_on_that_is_busy() {
    let bench = Bench::new().await;
    let manager: Manager = Pool::builder(bench.cluster.url_hosts()).unwrap().build_manager().unwrap();
    let pool = deadpool::managed::Pool::<Manager>::builder(manager).max_size(1).build().unwrap();
    for sql in [SLOW, "BEGIN"] {
        let connection = pool.get().await.unwrap();
        let _ = timeout(Duration::from_millis(50), connection.batch_execute(sql)).await;
        drop(connection);
        let next = timeout(PATIENCE, pool.get()).await.expect("a connection").unwrap();
        assert!(timeout(PATIENCE, alone(&next)).await.expect("an idle one"), "{sql}");
    }
}

/// The next caller is not held up for long by the moment that the end of an answer gets.
#[tokio::test]
async fn the_next_caller_does_not_wait_for_the_statement() {
    let bench = Bench::new().await;
    let client = bench.get().await;
    assert!(timeout(Duration::from_millis(50), client.batch_execute("SELECT pg_sleep(30)")).await.is_err());
    drop(client);
    let began = Instant::now();
    bench.get().await.batch_execute("SELECT 1").await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

/// A session that is discarded is gone, with its lock; one that is detached lives on beside the pool.
#[tokio::test]
async fn sessions_are_discarded_and_detached() {
    let bench = Bench::new().await;
    let client = bench.get().await;
    let first = pid(&client).await;
    client.batch_execute("SELECT pg_advisory_lock(7)").await.unwrap();
    client.discard();
    let next = bench.get().await;
    assert_ne!(pid(&next).await, first);
    eventually("the lock is free", PATIENCE, async || {
        next.query_one("SELECT pg_try_advisory_lock(7)", &[]).await.unwrap().get(0)
    })
    .await;

    let second = pid(&next).await;
    let mut detached = next.detach();
    assert_eq!(bench.pool.status().size, 0);
    let third = bench.get().await;
    assert_ne!(pid(&third).await, second);
    detached.transaction().await.unwrap().commit().await.unwrap();
    detached.batch_execute("CREATE TEMPORARY TABLE kept (line text)").await.unwrap();
    bench.pool.close();
    timeout(PATIENCE, detached.ended()).await.expect("it ends with the pool");
    assert!(detached.is_closed());
}

/// A token from a client cancels, whatever connector is named.
#[tokio::test]
async fn a_token_cancels_what_the_session_runs() {
    let bench = Bench::new().await;
    let client = bench.get().await;
    let token = client.cancel_token();
    let cancelling = tokio::spawn(async move {
        for _ in 0..200 {
            token.cancel_query(NoTls).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let error = timeout(PATIENCE, client.batch_execute(SLOW)).await.expect("cancelled").unwrap_err();
    assert_eq!(error.code(), Some(&tokio_postgres::error::SqlState::QUERY_CANCELED));
    cancelling.abort();
}

/// Runs a statement that `token` cancels.
async fn is_cancelled(client: &tokio_postgres::Client, token: CancelToken) {
    let cancelling = tokio::spawn(async move {
        loop {
            token.cancel_query(NoTls).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let error = timeout(PATIENCE, client.batch_execute(SLOW)).await.expect("cancelled").unwrap_err();
    assert_eq!(error.code(), Some(&tokio_postgres::error::SqlState::QUERY_CANCELED));
    cancelling.abort();
    // It may have been cancelled once more, which ends this statement instead.
    let _ = client.batch_execute("SELECT 1").await;
}

/// So do the tokens of a session that has left its pool, and of a manager's connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_cancels_what_runs_outside_of_the_pool() {
    let bench = Bench::new().await;
    let session = bench.get().await.detach();
    is_cancelled(&session, session.cancel_token()).await;
    let manager: Manager = Pool::builder(bench.cluster.url_hosts()).unwrap().build_manager().unwrap();
    let pool = deadpool::managed::Pool::<Manager>::builder(manager).max_size(1).build().unwrap();
    let connection = pool.get().await.unwrap();
    is_cancelled(&connection, connection.cancel_token()).await;
}

/// A session of its own that is dropped runs nothing on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_detached_session_runs_is_cancelled_when_it_is_dropped() {
    let bench = Bench::new().await;
    let session = bench.get().await.detach();
    assert!(timeout(Duration::from_millis(50), session.batch_execute(SLOW)).await.is_err());
    eventually("it runs", PATIENCE, async || bench.others_running(0).await == 1).await;
    drop(session);
    eventually("it is cancelled", PATIENCE, async || bench.others_running(0).await == 0).await;
}

/// The token of a transaction knows where its server is, unlike the driver's own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_cancels_what_a_transaction_runs() {
    let bench = Bench::new().await;
    for nested in [false, true] {
        let runs = AtomicU32::new(0);
        let work = bench.pool.transaction(async |mut tx| {
            runs.fetch_add(1, Ordering::Relaxed);
            let token = tx.cancel_token();
            let savepoint = tx.savepoint().await?;
            let token = if nested { savepoint.cancel_token() } else { token };
            let cancelling = async {
                loop {
                    token.cancel_query(NoTls).await.unwrap();
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            };
            tokio::select! {
                result = savepoint.batch_execute(SLOW) => Ok(result?),
                () = cancelling => Ok(()),
            }
        });
        let error = timeout(PATIENCE, work).await.expect("cancelled").unwrap_err();
        assert_eq!(error.code(), Some(&tokio_postgres::error::SqlState::QUERY_CANCELED), "{error:?}");
        assert_eq!(runs.into_inner(), 1);
    }
}

/// A connection over which nothing passes any more is not handed on with what nobody has read.
#[tokio::test]
async fn what_the_network_did_not_take_meets_nobody() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let pool = Pool::builder(format!("postgres://app@{}/app", tap.addr())).unwrap().max_size(1).build().unwrap();
    let client = pool.get().await.unwrap();
    tap.stall(true);
    let big = format!("SELECT length('{}')", "x".repeat(8 << 20));
    assert!(timeout(Duration::from_millis(50), client.batch_execute(&big)).await.is_err());
    drop(client);
    tap.stall(false);
    let next = timeout(PATIENCE, pool.get()).await.expect("a connection").unwrap();
    timeout(PATIENCE, next.batch_execute("SELECT 1")).await.expect("an idle one").unwrap();
}

/// With a password, and through TLS: what passes is counted above it.
#[cfg(feature = "rustls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_password_and_through_tls_it_is_the_same() {
    let certificate = testbed::Authority::new().issue(&["localhost"]);
    let cluster = Cluster::builder().nodes(1).password("s3cr3t").tls(&certificate).start().await;
    for sslmode in ["disable", "prefer", "require"] {
        let url = format!("postgres://app:s3cr3t@{}/app?sslmode={sslmode}", cluster.socket_addr(Node(0)));
        let pool = Pool::builder(url).unwrap().max_size(1).build().unwrap();
        let mut first = pid(&pool.get().await.unwrap()).await;
        eventually(&format!("{sslmode}: an idle session is kept"), PATIENCE, async || {
            let again = pid(&pool.get().await.unwrap()).await;
            std::mem::replace(&mut first, again) == again
        })
        .await;
        let client = pool.get().await.unwrap();
        assert!(timeout(Duration::from_millis(50), client.batch_execute(SLOW)).await.is_err());
        drop(client);
        let next = timeout(PATIENCE, pool.get()).await.expect("a connection").unwrap();
        timeout(PATIENCE, next.batch_execute("SELECT 1")).await.expect("an idle one").unwrap();
        assert_ne!(pid(&next).await, first, "{sslmode}");
    }
}
