//! Log-ins that are refused, or hang meanwhile: how often the pool tries, and who is told.

use std::net::SocketAddr;
use std::time::Duration;

use testbed::{Cluster, Node, Path, Tap, eventually};
use tokio::time::{Instant, sleep};
use tokio_postgres::NoTls;
use tokio_postgres_failover::deadpool_postgres::{self, RecyclingMethod};
use tokio_postgres_failover::{Error, Pool};

use crate::support::PATIENCE;
use crate::support::stalls::unless_stalled;

/// What a log-in takes here: long enough for many to be under way together.
const LOG_IN: Duration = Duration::from_millis(400);
/// How long log-ins are counted.
const COUNTED: Duration = Duration::from_secs(5);
/// A patrol would log in as well.
const NEVER: Duration = Duration::from_secs(3600);

fn wrapped(to: SocketAddr, password: &str, max_size: usize) -> Pool {
    let config = format!("postgres://app:{password}@{to}/app").parse().unwrap();
    let recycling = deadpool_postgres::ManagerConfig { recycling_method: RecyclingMethod::Fast };
    let manager = deadpool_postgres::Manager::from_config(config, NoTls, recycling);
    let existing = deadpool_postgres::Pool::builder(manager).max_size(max_size).build().unwrap();
    Pool::wrap(existing).patrol_interval(NEVER).probe_timeout(Duration::from_secs(1)).build().unwrap()
}

fn own(to: SocketAddr, password: &str, max_size: usize) -> Pool {
    let builder = Pool::builder(format!("postgres://app:{password}@{to}/app")).unwrap().max_size(max_size);
    builder.connection_gate(usize::MAX).patrol_interval(NEVER).build().unwrap()
}

/// Asks for so many connections at the same time, each for so long, and returns how many calls were told of a refusal.
async fn refused(pool: &Pool, callers: usize, within: Duration) -> usize {
    let callers: Vec<_> = (0..callers)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move { matches!(pool.get_within(within).await, Err(Error::Refused(_))) })
        })
        .collect();
    let mut refused = 0;
    for caller in callers {
        refused += usize::from(caller.await.unwrap());
    }
    refused
}

/// C9: sixteen log-ins are under way when the password changes. When it is right again, the next log-in does not wait
/// for a second for each of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_ins_refused_together_hold_up_nobody_for_long() {
    for (kind, build) in [("own", own as fn(SocketAddr, &str, usize) -> Pool), ("wrapped", wrapped)] {
        let cluster = Cluster::builder().nodes(1).password("right").start().await;
        let path = Path::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
        let owner = cluster.direct(Node(0)).await;
        let pool = build(path.addr(), "right", 20);
        let _held = pool.get().await.unwrap();
        owner.batch_execute("ALTER ROLE app PASSWORD 'other'").await.unwrap();
        path.delay_log_ins(LOG_IN);
        assert_eq!(refused(&pool, 16, PATIENCE).await, 16, "{kind}");
        path.delay_log_ins(Duration::ZERO);
        owner.batch_execute("ALTER ROLE app PASSWORD 'right'").await.unwrap();
        let began = Instant::now();
        let client = pool.get_within(PATIENCE).await;
        assert!(client.is_ok(), "{kind}: {:?}", client.map(drop));
        println!("{kind}: the next connection after {:?}", began.elapsed());
        assert!(began.elapsed() < Duration::from_secs(4), "{kind}: {:?}", began.elapsed());
    }
}

/// C9: twenty callers in a loop, for whom few connections of a wrapped pool are free, are no storm of log-ins.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_of_a_wrapped_pool_is_no_storm_of_log_ins() {
    let cluster = Cluster::builder().nodes(1).password("right").start().await;
    let tap = Tap::start(([127, 0, 0, 1], 0).into(), cluster.socket_addr(Node(0))).await;
    let owner = cluster.direct(Node(0)).await;
    // At first, and once the password is changed under a pool that works.
    for first in ["wrong", "right"] {
        let pool = wrapped(tap.addr(), first, 3);
        if first == "right" {
            std::mem::forget(pool.get().await.unwrap());
            // The one that is held, and the heartbeat's.
            eventually("the heartbeat has its session", PATIENCE, async || {
                let open = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'";
                owner.query_one(open, &[]).await.unwrap().get::<_, i64>(0) >= 2
            })
            .await;
            owner.batch_execute("ALTER ROLE app PASSWORD 'other'").await.unwrap();
        }
        tap.reset();
        let began = Instant::now();
        let mut told = 0;
        while began.elapsed() < COUNTED {
            told += refused(&pool, 20, PATIENCE).await;
        }
        let startups = tap.counts().startups;
        println!("{first}: {startups} log-ins, {told} calls refused in {:?}", began.elapsed());
        assert!(told >= 20, "everybody is told: {told}");
        assert!(startups <= 10, "{first}: {startups} log-ins in {:?}", began.elapsed());
    }
}

/// A role that may not log in, and a wrapped pool that knows: the next log-in has to wait for its turn.
async fn turned_away() -> (Cluster, Path, tokio_postgres::Client, Pool) {
    let cluster = Cluster::builder().nodes(1).start().await;
    let path = Path::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let owner = cluster.direct(Node(0)).await;
    let pool = wrapped(path.addr(), "", 8);
    std::mem::forget(pool.get().await.unwrap());
    owner.batch_execute("ALTER ROLE app NOLOGIN").await.unwrap();
    assert_eq!(refused(&pool, 1, PATIENCE).await, 1);
    (cluster, path, owner, pool)
}

/// The log-in that was to be tried hangs. The next one is not held up by it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_in_that_hangs_holds_up_no_other() {
    let (_cluster, path, owner, pool) = turned_away().await;
    owner.batch_execute("ALTER ROLE app LOGIN").await.unwrap();
    path.delay_log_ins(NEVER);
    let before = path.accepted();
    let waits = tokio::spawn({
        let pool = pool.clone();
        async move { pool.get_within(PATIENCE).await.map(drop) }
    });
    eventually("a log-in hangs", PATIENCE, async || path.accepted() > before).await;
    path.delay_log_ins(Duration::ZERO);
    waits.await.unwrap().unwrap();
}

/// One log-in answers all who had asked before it began, also those who came while it waited for its turn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_answers_all_who_asked_before_its_log_in() {
    let (_cluster, path, _owner, pool) = turned_away().await;
    // A busy machine may be so slow that the log-in begins too early.
    for _ in 0..8 {
        let before = path.accepted();
        let first = tokio::spawn({
            let pool = pool.clone();
            async move { refused(&pool, 1, PATIENCE).await }
        });
        sleep(Duration::from_millis(50)).await;
        assert_eq!(refused(&pool, 4, PATIENCE).await, 4);
        assert_eq!(first.await.unwrap(), 1);
        if path.accepted() - before == 1 {
            return;
        }
    }
    panic!("it never was one log-in for all of them");
}

/// The server has no room, and all callers have given up. Nobody tries a log-in for them any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_logs_in_at_a_full_server_for_callers_that_gave_up() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let path = Path::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let owner = cluster.direct(Node(0)).await;
    let pool = wrapped(path.addr(), "", 16);
    std::mem::forget(pool.get().await.unwrap());
    // What is open stays open.
    owner.batch_execute("ALTER ROLE app CONNECTION LIMIT 1").await.unwrap();
    // The pause between two log-ins grows until it is longer than what the callers have.
    assert!(pool.get_within(Duration::from_secs(4)).await.is_err());
    assert_eq!(refused(&pool, 12, Duration::from_millis(100)).await, 0);
    let before = path.accepted();
    sleep(Duration::from_secs(4)).await;
    // The primary that is doubted is asked on a new session.
    let since = path.accepted() - before;
    assert!(since <= 2, "{since} log-ins for nobody");
}

/// Eight callers that ask again and again. A stall may keep one waiting for as long as those wait who get no
/// connection.
async fn all_are_served(pool: &Pool) -> Result<(), String> {
    let until = Instant::now() + COUNTED;
    let callers = (0..8).map(|_| {
        let pool = pool.clone();
        tokio::spawn(async move {
            while Instant::now() < until {
                let client = pool.get_within(PATIENCE).await.map_err(|error| error.to_string())?;
                client.batch_execute("SELECT pg_sleep(0.005)").await.unwrap();
            }
            Ok::<(), String>(())
        })
    });
    for caller in callers.collect::<Vec<_>>() {
        caller.await.unwrap()?;
    }
    Ok(())
}

/// New log-ins are refused, and the connections that are open serve those that ask for them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_that_open_connections_can_serve_are_not_refused() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let owner = cluster.direct(Node(0)).await;
    let pool = own(cluster.socket_addr(Node(0)), "", 16);
    let held = (pool.get().await.unwrap(), pool.get().await.unwrap());
    owner.batch_execute("ALTER ROLE app NOLOGIN").await.unwrap();
    drop(held);
    unless_stalled(async || all_are_served(&pool).await).await;
    // Who gets none is told the truth.
    let _held = (pool.get().await.unwrap(), pool.get().await.unwrap());
    assert_eq!(refused(&pool, 3, PATIENCE).await, 3);
}

/// The same of a wrapped pool.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_that_a_wrapped_pools_open_connections_can_serve_are_not_refused() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let owner = cluster.direct(Node(0)).await;
    let pool = wrapped(cluster.socket_addr(Node(0)), "", 16);
    let held = (pool.get().await.unwrap(), pool.get().await.unwrap());
    owner.batch_execute("ALTER ROLE app NOLOGIN").await.unwrap();
    drop(held);
    unless_stalled(async || all_are_served(&pool).await).await;
    // Who gets none is told the truth.
    let _held = (pool.get().await.unwrap(), pool.get().await.unwrap());
    assert_eq!(refused(&pool, 3, PATIENCE).await, 3);
}
