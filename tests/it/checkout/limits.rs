//! How long a transaction waits for a connection.

use std::time::{Duration, Instant};

use testbed::{Cluster, Node, eventually};
use tokio::time::timeout;
use tokio_postgres::NoTls;
use tokio_postgres_failover::error::UnavailableReason;
use tokio_postgres_failover::{Error, Pool, RetryPolicy, deadpool_postgres};

use crate::commit::finish::{KINDS, Kind, pool_of};
use crate::support::PATIENCE;
use crate::support::stalls::unless_stalled;

const SHORT: Duration = Duration::from_millis(300);
/// Far above [`SHORT`], and below the deadline of the policy.
const SOON: Duration = Duration::from_secs(10);

async fn single() -> Cluster {
    Cluster::builder().nodes(1).start().await
}

fn impatient(kind: Kind, url: &str, max_size: usize) -> Pool {
    let policy = RetryPolicy::new().deadline(PATIENCE);
    // A primary that is lost for a moment, because the machine stood still, would be what the callers wait for.
    if kind == Kind::Own {
        let builder = Pool::builder(url).unwrap().max_size(max_size).heartbeat_timeout(SOON);
        return builder.checkout_timeout(SHORT).retry(policy).build().unwrap();
    }
    let mut config = deadpool_postgres::Config::new();
    config.url = Some(url.to_owned());
    config.pool = Some(deadpool_postgres::PoolConfig::new(max_size));
    let existing = config.create_pool(None, NoTls).unwrap();
    Pool::wrap(existing).heartbeat_timeout(SOON).checkout_timeout(SHORT).retry(policy).build().unwrap()
}

fn exhausted(error: &Error) -> bool {
    matches!(error, Error::Unavailable(why) if why.reason() == UnavailableReason::PoolExhausted)
}

/// All connections are in use: the checkout timeout is for transactions, too, and is named.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_waits_no_longer_than_a_get_for_those_who_use_all_connections() {
    let cluster = single().await;
    for kind in KINDS {
        let pool = impatient(kind, &format!("postgres://app@{}/app", cluster.socket_addr(Node(0))), 1);
        let held = pool.get_within(PATIENCE).await.unwrap();
        for read in [false, true] {
            let began = Instant::now();
            let call = pool.build_transaction().read_only(read);
            let error = call.run(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await.unwrap_err();
            assert!(exhausted(&error), "{error:?}");
            assert!(began.elapsed() >= SHORT && began.elapsed() < SOON, "{:?}", began.elapsed());
            let text = error.to_string();
            assert!(text.contains("max_size") && text.ends_with("wait longer (checkout_timeout)"), "{text}");
        }
        drop(held);
        eventually("a transaction has the connection", PATIENCE, async || {
            pool.transaction(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await.is_ok()
        })
        .await;
        // A shorter deadline of the policy holds, too.
        let held = pool.get_within(PATIENCE).await.unwrap();
        let call = pool.build_transaction().deadline(Duration::from_millis(50));
        let error = call.run(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await.unwrap_err();
        assert!(exhausted(&error), "{error:?}");
        assert!(error.to_string().ends_with("wait longer (RetryPolicy::deadline)"), "{error}");
        let error = pool.get_within(Duration::from_millis(50)).await.unwrap_err();
        assert!(exhausted(&error), "{error:?}");
        assert!(error.to_string().ends_with("wait longer (Pool::get_within)"), "{error}");
        drop(held);
    }
}

/// A failover may take longer than a checkout: the policy's deadline is what a transaction has for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_survives_a_failover_longer_than_the_checkout_timeout() {
    // Once there is a primary, the second call has the checkout's time-out for the connection of the first.
    unless_stalled(async || {
        let cluster = Cluster::builder().nodes(2).start().await;
        let pool = impatient(Kind::Own, &cluster.url_hosts(), 1);
        pool.transaction(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await.unwrap();
        cluster.wait_replayed(Node(1)).await;
        cluster.kill(Node(0)).await;
        let calls = async {
            // The second one waits for the first one's connection as well.
            tokio::join!(
                pool.transaction(async |tx| Ok(tx.batch_execute("SELECT 1").await?)),
                pool.transaction(async |tx| Ok(tx.batch_execute("SELECT 1").await?)),
            )
        };
        let fault = async {
            tokio::time::sleep(SHORT * 4).await;
            cluster.promote(Node(1)).await;
        };
        let ((first, second), ()) = timeout(PATIENCE, async { tokio::join!(calls, fault) }).await.unwrap();
        first.and(second).map_err(|error| format!("{error:?}"))
    })
    .await;
}

/// A call within a transaction whose connection is the last one is told so at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nested_call_that_could_never_get_a_connection_is_told_at_once() {
    let cluster = single().await;
    for kind in KINDS {
        let pool = pool_of(kind, cluster.socket_addr(Node(0)), 1);
        let began = Instant::now();
        let error = pool
            .transaction(async |tx| {
                tx.batch_execute("SELECT 1").await?;
                pool.read(async |tx| Ok(tx.batch_execute("SELECT 2").await?)).await
            })
            .await
            .unwrap_err();
        assert!(exhausted(&error) && began.elapsed() < SOON, "{error:?}");
        assert!(error.to_string().contains("max_size") && error.to_string().contains("within"), "{error}");
        let error = pool.transaction(async |_| pool.get().await.map(drop)).await.unwrap_err();
        assert!(exhausted(&error) && began.elapsed() < SOON, "{error:?}");

        // Where there is one left, and in another pool, it is had.
        let (pool, other) = (pool_of(kind, cluster.socket_addr(Node(0)), 2), pool);
        let innermost = || Box::pin(pool.get());
        pool.transaction(async |_| Box::pin(other.transaction(async |_| innermost().await.map(drop))).await)
            .await
            .unwrap();
        let nested =
            pool.transaction(async |_| Box::pin(pool.transaction(async |_| innermost().await.map(drop))).await);
        let error = nested.await.unwrap_err();
        assert!(exhausted(&error) && began.elapsed() < SOON, "{error:?}");
    }
}

/// A pool that its owner has closed says so, and not that a transaction of another pool holds its connections.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrapped_pool_that_was_closed_is_not_said_to_be_held_by_a_transaction() {
    let cluster = single().await;
    let outer = pool_of(Kind::Own, cluster.socket_addr(Node(0)), 1);
    let mut config = deadpool_postgres::Config::new();
    config.url = Some(format!("postgres://app@{}/app", cluster.socket_addr(Node(0))));
    let existing = config.create_pool(None, NoTls).unwrap();
    let closed = Pool::wrap(existing.clone()).build().unwrap();
    drop(closed.get().await.unwrap());
    existing.close();
    let by_itself = closed.get_within(SHORT).await.map(drop).unwrap_err();
    let within = outer.transaction(async |_| closed.get_within(SHORT).await.map(drop)).await.unwrap_err();
    assert!(!within.to_string().contains("within hold"), "{within}");
    assert_eq!(std::mem::discriminant(&within), std::mem::discriminant(&by_itself), "{within:?} {by_itself:?}");
}

/// A task of its own may outlive the closure, so it is not told: it waits, and gets the connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_a_closure_spawns_may_wait_for_its_connection() {
    let cluster = single().await;
    let pool = pool_of(Kind::Own, cluster.socket_addr(Node(0)), 1);
    let spawned = pool
        .transaction(async |_| {
            let pool = pool.clone();
            Ok(tokio::spawn(async move { pool.transaction(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await }))
        })
        .await
        .unwrap();
    timeout(PATIENCE, spawned).await.unwrap().unwrap().unwrap();
}
