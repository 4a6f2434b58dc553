//! A wrapped bb8 pool: what bb8 has that deadpool has not, and lacks. `wrap.rs` and `fetches.rs` have what both have.

use std::net::SocketAddr;
use std::time::Duration;

use bb8_postgres::PostgresConnectionManager;
use futures_util::FutureExt;
use testbed::{Cluster, Node, Path, eventually};
use tokio::time::{Instant, timeout};
use tokio_postgres::NoTls;
use tokio_postgres_failover::{BuildError, Error, Pool, bb8};

use crate::support::load::{LONG, Load, Write};
use crate::support::{PATIENCE, server, started};

type Existing = bb8::Pool<PostgresConnectionManager<NoTls>>;

/// As somebody builds it who has read nothing.
fn usual(url: &str, max_size: u32) -> Existing {
    let manager = PostgresConnectionManager::new_from_stringlike(url, NoTls).unwrap();
    bb8::Pool::builder().max_size(max_size).build_unchecked(manager)
}

fn quick(to: SocketAddr, max_size: u32) -> Existing {
    let manager = PostgresConnectionManager::new_from_stringlike(format!("postgres://app@{to}/app"), NoTls).unwrap();
    let builder = bb8::Pool::builder().max_size(max_size).test_on_check_out(false).retry_connection(false);
    builder.build_unchecked(manager)
}

async fn pid(client: &tokio_postgres::Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0)
}

/// bb8 tests each connection before it lends it, and pauses between its connects, unless it is told otherwise.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_under_load_costs_nothing_with_the_defaults_of_bb8() {
    let cluster = started().await;
    let url = format!("{}?target_session_attrs=read-write&connect_timeout=1", cluster.url_hosts());
    let pool = Pool::wrap_bb8(usual(&url, 10)).build().unwrap();
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    let began = Instant::now();
    cluster.kill(cluster.primary()).await;
    cluster.promote_timed(cluster.most_advanced_standby().await).await;
    load.all_written_since(std::time::Instant::now()).await;
    println!("all writers write again {:?} after the fault", began.elapsed());
    load.stop(&cluster).await.assert_flawless();
}

/// A connection keeps its statements between two loans, and the owner's loans.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn statements_are_prepared_once_for_each_connection() {
    let cluster = server().await;
    let existing = quick(cluster.socket_addr(Node(0)), 1);
    let pool = Pool::wrap_bb8(existing.clone()).build().unwrap();
    let prepared = "SELECT count(*) FROM pg_prepared_statements WHERE statement = 'SELECT 4711'";
    let mut pids = Vec::new();
    for _ in 0..3 {
        let client = pool.get().await.unwrap();
        client.prepare_cached("SELECT 4711").await.unwrap();
        assert_eq!(client.query_one(prepared, &[]).await.unwrap().get::<_, i64>(0), 1);
        pids.push(pid(&client).await);
        drop(client);
        pids.push(pid(&existing.get().await.unwrap()).await);
    }
    assert!(pids.iter().all(|pid| *pid == pids[0]), "{pids:?}");
    pool.clear_statement_caches();
    let client = pool.get().await.unwrap();
    client.prepare_cached("SELECT 4711").await.unwrap();
    assert_eq!(pid(&client).await, pids[0]);
}

/// Whatever leaves the pool frees its slot: what is detached, discarded, busy, or given up by a dropped future.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_leaves_a_bb8_pool_frees_its_slot() {
    let cluster = server().await;
    let existing = quick(cluster.socket_addr(Node(0)), 1);
    let pool = Pool::wrap_bb8(existing.clone()).build().unwrap();
    let detached = pool.get().await.unwrap().detach();
    let first = pid(&detached).await;
    let second = pid(&pool.get().await.unwrap()).await;
    assert_ne!(first, second, "the detached one is the caller's own");
    assert_eq!(pid(&detached).await, first, "and lives on");
    pool.get().await.unwrap().discard();
    let third = pid(&pool.get().await.unwrap()).await;
    assert_ne!(third, second);
    let hangs = pool.transaction(async |tx| Ok(tx.batch_execute("SELECT pg_sleep(3600)").await?));
    assert!(timeout(Duration::from_millis(500), hangs).await.is_err());
    let fourth = pid(&pool.get().await.unwrap()).await;
    assert_ne!(fourth, third, "a call that was dropped leaves no connection behind");
    assert_eq!(pool.evict_idle(), 1);
    assert_ne!(pid(&pool.get().await.unwrap()).await, fourth);
    let administrator = cluster.direct(Node(0)).await;
    eventually("nothing is left of the others", PATIENCE, async || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY($1)";
        administrator.query_one(sql, &[&[second, third, fourth].as_slice()]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
    assert_eq!(existing.state().connections, 1);
}

/// C1: a checkout that is dropped at any of its polls loses no connection and no slot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c1_a_checkout_dropped_at_every_poll_loses_no_slot() {
    let cluster = server().await;
    for tested in [false, true] {
        let url = format!("postgres://app@{}/app", cluster.socket_addr(Node(0)));
        let manager = PostgresConnectionManager::new_from_stringlike(url, NoTls).unwrap();
        let existing = bb8::Pool::builder().max_size(2).test_on_check_out(tested).build_unchecked(manager);
        let pool = Pool::wrap_bb8(existing.clone()).build().unwrap();
        pool.connect().await.unwrap();
        for polls in 0..200 {
            let mut getting = Box::pin(pool.get());
            for _ in 0..polls % 8 {
                if getting.as_mut().now_or_never().is_some() {
                    break;
                }
                tokio::task::yield_now().await;
            }
        }
        let both = async { (pool.get().await.unwrap(), pool.get().await.unwrap()) };
        let (one, other) = timeout(PATIENCE, both).await.expect("both slots are free");
        assert_ne!(pid(&one).await, pid(&other).await);
        assert_eq!(existing.state().connections, 2, "tested: {tested}");
    }
}

/// bb8 does not say why it has no connection. Callers are told nevertheless.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_that_is_wrong_from_now_on_is_told() {
    let cluster = Cluster::builder().nodes(1).password("right").start().await;
    let pool = Pool::wrap_bb8(usual(&cluster.url_hosts(), 2)).build().unwrap();
    let _held = pool.get().await.unwrap();
    cluster.direct(Node(0)).await.batch_execute("ALTER ROLE app PASSWORD 'other'").await.unwrap();
    let began = Instant::now();
    let error = pool.get().await.map(drop).unwrap_err();
    println!("told after {:?}: {error}", began.elapsed());
    assert!(matches!(error, Error::Refused(_)), "{error}");
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
}

/// A connect of bb8 that hangs holds up no caller: bb8 itself would try no other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connect_that_hangs_holds_up_no_caller() {
    let cluster = server().await;
    let path = Path::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let existing = quick(path.addr(), 4);
    let pool = Pool::wrap_bb8(existing).patrol_interval(LONG).build().unwrap();
    pool.connect().await.unwrap();
    path.delay_log_ins(LONG * 10);
    let before = path.accepted();
    let waits = tokio::spawn({
        let pool = pool.clone();
        async move { pool.get().await.map(drop) }
    });
    eventually("bb8 connects", PATIENCE, async || path.accepted() > before).await;
    path.delay_log_ins(Duration::ZERO);
    timeout(PATIENCE, waits).await.expect("the caller hangs").unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bb8_pool_has_its_size_for_life() {
    let cluster = server().await;
    let existing = quick(cluster.socket_addr(Node(0)), 2);
    let pool = Pool::wrap_bb8(existing).build().unwrap();
    let error = pool.resize(4).unwrap_err();
    assert!(matches!(error, BuildError::Invalid { .. }) && error.to_string().contains("bb8"), "{error}");
    assert_eq!(pool.status().max_size, 2);
    assert!(matches!(pool.listen(["orders"]).await, Err(Error::Wrapped)));
}
