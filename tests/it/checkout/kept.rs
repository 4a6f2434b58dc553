//! Good connections stay in the pool, whatever becomes of the callers that were to get them.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::FutureExt;
use testbed::{Cluster, Node, Path, Tap, eventually};
use tokio::time::{sleep, timeout};
use tokio_postgres::NoTls;
use tokio_postgres_failover::deadpool_postgres::{self, RecyclingMethod};
use tokio_postgres_failover::error::UnavailableReason;
use tokio_postgres_failover::view::State;
use tokio_postgres_failover::{Client, Error, Event, Pool, PoolBuilder};

use crate::support::{PATIENCE, heart_beats};

const NEVER: Duration = Duration::from_secs(3600);

async fn single() -> Cluster {
    Cluster::builder().nodes(1).start().await
}

fn builder(to: SocketAddr) -> PoolBuilder {
    Pool::builder(format!("postgres://app@{to}/app")).unwrap()
}

async fn pid(client: &Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0)
}

/// A caller waits for a slot when the primary is suspended, gets the connection that is given back then, and gives up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_gives_up_during_a_suspension_closes_nothing() {
    let cluster = single().await;
    let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let limit = Duration::from_millis(300);
    let builder = builder(tap.addr()).max_size(1).heartbeat_interval(limit).heartbeat_timeout(limit);
    let pool = builder.test_idle_after(NEVER).build().unwrap();
    let held = pool.get().await.unwrap();
    let before = (pid(&held).await, held.generation());
    let waits = tokio::spawn({
        let pool = pool.clone();
        async move { pool.get_within(NEVER).await.map(drop) }
    });
    eventually("it waits for a slot", PATIENCE, async || pool.status().waiting == 1).await;
    tap.stall(true);
    eventually("suspended", PATIENCE, async || matches!(pool.status().view.state, State::Searching { .. })).await;
    drop(held);
    // The slot is free, and the caller knows.
    sleep(limit).await;
    waits.abort();
    assert!(waits.await.unwrap_err().is_cancelled());
    tap.stall(false);
    let client = pool.get_within(PATIENCE).await.unwrap();
    assert_eq!((pid(&client).await, client.generation()), before);
}

/// A transaction was dropped, and its driver has not seen the ROLLBACK yet. A caller that does not wait at all comes
/// first.
#[tokio::test]
async fn who_does_not_wait_for_a_rollback_closes_nothing() {
    let cluster = single().await;
    let pool = builder(cluster.socket_addr(Node(0))).max_size(1).build().unwrap();
    let mut client = pool.get().await.unwrap();
    let before = pid(&client).await;
    drop(client.transaction().await.unwrap());
    drop(client);
    drop(pool.get_within(Duration::ZERO).await);
    let client = pool.get_within(PATIENCE).await.unwrap();
    assert_eq!(pid(&client).await, before);
}

/// `idle_timeout` counts from the time when a connection came back, and not from when it was handed out.
#[tokio::test]
async fn a_connection_that_was_in_use_for_long_is_not_idle_for_long() {
    let cluster = single().await;
    let idle = Duration::from_secs(2);
    let builder = builder(cluster.socket_addr(Node(0))).max_size(1).idle_timeout(idle);
    let pool = builder.build().unwrap();
    let client = pool.get().await.unwrap();
    let before = pid(&client).await;
    sleep(idle * 2).await;
    drop(client);
    // The reaper looks four times in that time.
    sleep(idle * 2 / 5).await;
    let client = pool.get_within(PATIENCE).await.unwrap();
    assert_eq!(pid(&client).await, before);
    // And what is idle for so long is closed.
    drop(client);
    eventually("closed", PATIENCE, async || pool.status().size == 0).await;
}

/// While idle connections are being tested, none is in use, and the error does not say so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connections_that_are_tested_are_not_said_to_be_in_use() {
    let cluster = single().await;
    let path = Path::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let idle = Duration::from_millis(100);
    let builder = builder(path.addr()).max_size(4).min_idle(4).heartbeat_interval(NEVER).test_idle_after(idle);
    let pool = builder.build().unwrap();
    eventually("four are ready", PATIENCE, async || pool.status().available == 4).await;
    // Those that nobody has had, and those that came back.
    for _ in 0..2 {
        sleep(idle * 3).await;
        path.hold(true);
        let error = pool.get_within(idle).await.map(drop).unwrap_err();
        path.hold(false);
        let Error::Unavailable(why) = &error else { panic!("{error}") };
        assert_eq!(why.reason(), UnavailableReason::NoSession, "{error}");
        assert!(error.to_string().contains("tested") && !error.to_string().contains("max_connections"), "{error}");
        let mut held = Vec::new();
        for _ in 0..4 {
            held.push(pool.get_within(PATIENCE).await.unwrap());
        }
    }
}

/// So it is with a wrapped pool, whose connections are asked which server they lead to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_of_a_wrapped_pool_that_are_asked_are_not_said_to_be_in_use() {
    let cluster = single().await;
    let path = Path::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let config = format!("postgres://app@{}/app", path.addr()).parse().unwrap();
    let recycling = deadpool_postgres::ManagerConfig { recycling_method: RecyclingMethod::Fast };
    let manager = deadpool_postgres::Manager::from_config(config, NoTls, recycling);
    let existing = deadpool_postgres::Pool::builder(manager).max_size(1).build().unwrap();
    let pool: Pool = Pool::wrap(existing.clone()).heartbeat_interval(NEVER).patrol_interval(NEVER).build().unwrap();
    pool.connect().await.unwrap();
    drop(existing.get().await.unwrap());
    path.hold(true);
    let error = pool.get_within(Duration::from_millis(300)).await.map(drop).unwrap_err();
    path.hold(false);
    let Error::Unavailable(why) = &error else { panic!("{error}") };
    assert_eq!(why.reason(), UnavailableReason::NoSession, "{error}");
    assert!(error.to_string().contains("tested"), "{error}");
    assert!(pool.get_within(PATIENCE).await.is_ok());
}

/// No session is kept, new ones hang, and of the idle connections all but one are dead without a sign: that one is
/// asked, and shows that the primary lives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_idle_connections_hide_no_living_one() {
    let cluster = single().await;
    let path = Path::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let (beat, silent) = (Duration::from_millis(500), Duration::from_secs(5));
    let builder = builder(path.addr()).max_size(4).heartbeat_interval(beat).heartbeat_timeout(silent);
    let builder = builder.test_idle_after(NEVER).patrol_interval(NEVER).dead_after(NEVER).probe_timeout(beat * 2);
    let pool = builder.build().unwrap();
    let dead = [pool.get().await.unwrap(), pool.get().await.unwrap(), pool.get().await.unwrap()];
    heart_beats(&cluster).await;
    let mut events = pool.subscribe();
    path.vanish();
    let found =
        async { while !matches!(events.next().await.expect("the pool is open"), Event::PrimaryFound { .. }) {} };
    timeout(PATIENCE, found).await.expect("the heartbeat has another session");
    let living = pool.get_within(PATIENCE).await.unwrap();
    let living_pid = pid(&living).await;
    // In this order: the oldest ones are dead.
    drop(dead);
    drop(living);
    path.delay_log_ins(NEVER);
    let owner = cluster.direct(Node(0)).await;
    let others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app' AND pid <> $1";
    owner.execute(others, &[&living_pid]).await.unwrap();
    sleep(silent * 3).await;
    assert!(matches!(pool.status().view.state, State::Primary { .. }), "{:?}", pool.status().view);
    while let Some(Some(event)) = events.next().now_or_never() {
        assert!(!matches!(event, Event::PrimaryLost { .. }), "{event:?}");
    }
}
