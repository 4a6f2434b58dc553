//! A pool that grows, shrinks, is emptied of idle connections, and is closed when its work has ended.

use std::time::Duration;

use testbed::{Node, eventually};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_postgres_failover::{Client, Error, Pool, deadpool_postgres, tokio_postgres};

use crate::support::load::{by_name, by_url};
use crate::support::{CONFLICT, PATIENCE, Runs, close_gate, committing, insert, open_gate, server, started, stored};

const SHORT: Duration = Duration::from_millis(300);

async fn take(pool: &Pool, count: usize) -> Vec<Client> {
    let mut taken = Vec::new();
    for _ in 0..count {
        taken.push(pool.get().await.unwrap());
    }
    taken
}

/// The process of the server behind a connection.
async fn pid(client: &Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn a_larger_pool_serves_those_who_wait() {
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).max_size(1).build().unwrap();
    let held = take(&pool, 1).await;
    let waiting = tokio::spawn({
        let pool = pool.clone();
        async move { take(&pool, 3).await }
    });
    eventually("a caller waits", PATIENCE, async || pool.status().waiting > 0).await;
    pool.resize(4).unwrap();
    let taken = timeout(PATIENCE, waiting).await.unwrap().unwrap();
    assert_eq!((pool.status().max_size, pool.status().size), (4, 4));
    assert!(pool.get_within(SHORT).await.is_err(), "four are all");
    drop((held, taken));
}

#[tokio::test]
async fn a_smaller_pool_closes_what_comes_back() {
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).max_size(6).build().unwrap();
    let mut taken = take(&pool, 6).await;
    pool.resize(2).unwrap();
    assert_eq!(pool.status().size, 6, "what is in use stays");
    // With and without callers that wait, to whom connections are handed directly.
    let mut waiters = JoinSet::new();
    for _ in 0..4 {
        let pool = pool.clone();
        waiters.spawn(async move { drop(pool.get().await.unwrap()) });
    }
    eventually("callers wait", PATIENCE, async || pool.status().waiting > 0).await;
    drop(taken.split_off(3));
    drop(taken);
    timeout(PATIENCE, waiters.join_all()).await.unwrap();
    eventually("it has shrunk", PATIENCE, async || pool.status().size <= 2).await;
    let held = take(&pool, 2).await;
    assert!(pool.get_within(SHORT).await.is_err(), "two are all");
    drop(held);
}

/// Growing and shrinking by turns, under load: never more than the largest size, and no caller is forgotten.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_that_changes_its_size_forgets_nobody() {
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).max_size(4).build().unwrap();
    let mut callers = JoinSet::new();
    for _ in 0..16 {
        let pool = pool.clone();
        callers.spawn(async move {
            for _ in 0..20 {
                pool.get().await.unwrap().batch_execute("SELECT 1").await.unwrap();
            }
        });
    }
    for size in [1, 8, 2, 6, 1, 3].into_iter().cycle().take(30) {
        pool.resize(size).unwrap();
        assert!(pool.status().size <= 8, "{}", pool.status().size);
        pool.get().await.unwrap().batch_execute("SELECT 1").await.unwrap();
    }
    timeout(PATIENCE, callers.join_all()).await.expect("a caller was forgotten");
    pool.resize(3).unwrap();
    eventually("it has shrunk", PATIENCE, async || pool.status().size <= 3).await;
    let held = take(&pool, 3).await;
    let open = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND backend_type = 'client backend'";
    let direct = cluster.direct(Node(0)).await;
    eventually("three and the heartbeat's are open", PATIENCE, async || {
        direct.query_one(open, &[]).await.unwrap().get::<_, i64>(0) <= 4
    })
    .await;
    drop(held);
}

#[tokio::test]
async fn an_impossible_size_changes_nothing() {
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).max_size(4).min_idle(2).build().unwrap();
    for size in [0, 1, 1_000_000] {
        let error = pool.resize(size).unwrap_err().to_string();
        assert!(error.contains("max_size"), "{error}");
    }
    assert!(pool.resize(1).unwrap_err().to_string().contains("min_idle"), "it names what stands against it");
    assert_eq!(pool.status().max_size, 4);
}

#[tokio::test]
async fn idle_connections_are_closed_on_demand() {
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).max_size(4).build().unwrap();
    let mut taken = take(&pool, 3).await;
    let held = taken.pop().unwrap();
    let (mut before, kept) = (Vec::new(), pid(&held).await);
    for client in &taken {
        before.push(pid(client).await);
    }
    drop(taken);
    assert_eq!(pool.evict_idle(), 2);
    assert_eq!(pool.status().size, 1);
    assert_eq!(pid(&held).await, kept, "what is in use stays");
    let new = take(&pool, 2).await;
    for client in &new {
        assert!(!before.contains(&pid(client).await), "an old session was handed out");
    }
    drop((held, new));
    let filled = by_url(cluster.url_hosts()).max_size(4).min_idle(2).build().unwrap();
    eventually("two are ready", PATIENCE, async || filled.status().available == 2).await;
    assert_eq!(filled.evict_idle(), 2);
    eventually("two are ready again", PATIENCE, async || filled.status().available == 2).await;
}

#[tokio::test]
async fn a_wrapped_pool_is_resized_and_emptied_too() {
    let cluster = server().await;
    let mut config = deadpool_postgres::Config::new();
    config.url = Some(cluster.url_hosts());
    let existing = config.create_pool(None, tokio_postgres::NoTls).unwrap();
    let pool: Pool = Pool::wrap(existing.clone()).build().unwrap();
    pool.resize(2).unwrap();
    assert_eq!((existing.status().max_size, pool.status().max_size), (2, 2));
    drop(take(&pool, 2).await);
    assert_eq!(pool.evict_idle(), 2);
    assert_eq!(existing.status().size, 0);
    assert!(pool.resize(0).is_err());
    let held = take(&pool, 1).await;
    assert!(!pool.close_within(SHORT).await, "it is in use");
    drop(held);
    assert!(existing.get().await.is_ok(), "the wrapped pool itself stays open");
}

/// A call that has begun goes on, across a failover, while new callers are turned away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closing_pool_lets_work_finish_through_a_failover() {
    let cluster = started().await;
    let pool = by_name(&cluster).build().unwrap();
    let (tell, told) = oneshot::channel();
    let (go, went) = oneshot::channel::<()>();
    let call = tokio::spawn({
        let pool = pool.clone();
        async move {
            let (mut tell, mut went) = (Some(tell), Some(went));
            pool.transaction(|tx| {
                let (tell, went, inner) = (tell.take(), went.take(), pool.clone());
                async move {
                    insert(&tx, 1).await?;
                    if let (Some(tell), Some(went)) = (tell, went) {
                        tell.send(()).unwrap();
                        went.await.unwrap();
                    }
                    // A call within a call that goes on is no new caller.
                    inner.get().await?.batch_execute("SELECT 1").await?;
                    inner.read(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await?;
                    Ok(())
                }
            })
            .await
        }
    });
    told.await.unwrap();
    let closing = tokio::spawn({
        let pool = pool.clone();
        async move { pool.close_within(PATIENCE * 2).await }
    });
    eventually("new callers are turned away", PATIENCE, async || matches!(pool.get().await, Err(Error::Closed))).await;
    assert!(matches!(pool.transaction(async |_| Ok(())).await, Err(Error::Closed)));
    assert!(matches!(pool.connect().await, Err(Error::Closed)));
    assert!(matches!(pool.listen(["x"]).await, Err(Error::Closed)));
    cluster.kill(cluster.primary()).await;
    cluster.promote(cluster.most_advanced_standby().await).await;
    go.send(()).unwrap();
    call.await.unwrap().unwrap();
    assert!(timeout(PATIENCE, closing).await.unwrap().unwrap());
    assert_eq!(stored(&cluster).await, [1]);
}

#[tokio::test]
async fn a_closing_pool_waits_for_clients_and_turns_waiting_callers_away() {
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).max_size(1).build().unwrap();
    let held = take(&pool, 1).await;
    let waiting = tokio::spawn({
        let pool = pool.clone();
        async move { pool.get().await }
    });
    eventually("a caller waits", PATIENCE, async || pool.status().waiting > 0).await;
    let closing = tokio::spawn({
        let pool = pool.clone();
        async move { pool.close_within(PATIENCE).await }
    });
    assert!(matches!(timeout(PATIENCE, waiting).await.unwrap().unwrap(), Err(Error::Closed)));
    held[0].batch_execute("SELECT 1").await.unwrap();
    drop(held);
    assert!(timeout(PATIENCE, closing).await.unwrap().unwrap(), "all had come back");
    let unused = by_url(cluster.url_hosts()).build().unwrap();
    assert!(unused.close_within(PATIENCE).await, "nothing was to be waited for");
    assert!(unused.close_within(PATIENCE).await || unused.get().await.is_err(), "it is closed");
}

/// At the limit the pool is closed whatever is under way; a COMMIT that was sent is not cancelled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closing_pool_waits_no_longer_than_its_limit() {
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).max_size(2).build().unwrap();
    let gate = close_gate(&cluster).await;
    let call = tokio::spawn({
        let pool = pool.clone();
        async move { pool.transaction(async |tx| insert(&tx, 1).await).await }
    });
    committing(&gate).await;
    assert!(!pool.close_within(SHORT).await);
    let error = timeout(PATIENCE, call).await.unwrap().unwrap().unwrap_err();
    assert!(matches!(error, Error::CommitUnknown(_)), "{error:?}");
    open_gate(&gate).await;
    eventually("the COMMIT is carried out", PATIENCE, async || stored(&cluster).await == [1]).await;
}

/// A call that runs again between two connections is waited for.
#[tokio::test]
async fn a_closing_pool_waits_for_a_call_between_two_runs() {
    let cluster = server().await;
    let pool = by_url(cluster.url_hosts()).max_size(1).build().unwrap();
    let runs = Runs::default();
    let (tell, told) = oneshot::channel();
    let mut tell = Some(tell);
    let call = pool.transaction(|tx| {
        let (run, tell) = (runs.begin(), tell.take());
        async move {
            if let Some(tell) = tell {
                tell.send(()).unwrap();
            }
            if run < 4 {
                tx.batch_execute(CONFLICT).await?;
            }
            Ok(())
        }
    });
    let closing = async {
        told.await.unwrap();
        pool.close_within(PATIENCE).await
    };
    let (called, closed) = tokio::join!(call, closing);
    called.unwrap();
    assert!(closed);
    assert_eq!(runs.count(), 4);
}
