//! A wrapped pool whose callers give up, or whose server has no room: what was begun for one caller serves the next.

use std::net::SocketAddr;
use std::time::Duration;

use testbed::{Cluster, Node, Path, Tap, eventually};
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres_failover::view::State;
use tokio_postgres_failover::{Client, Pool};

use crate::support::PATIENCE;
use crate::support::stalls::{self, unless_stalled};
use crate::support::wrapped::{Existing, Kind, Setup, over_each_kind};

/// What a log-in takes here, and less, which is what the callers have.
const LOG_IN: Duration = Duration::from_millis(400);
const SHORT: Duration = Duration::from_millis(300);

fn existing<K: Kind>(to: SocketAddr, max_size: u32, tested: bool) -> K::Usual {
    K::usual(&format!("postgres://app@{to}/app"), Setup { tested, ..Setup::of(max_size) })
}

async fn pid(client: &Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0)
}

/// No caller has the time that a connect takes. After some waves each of them is served, and no connect was thrown
/// away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn impatient_callers_of_a_wrapped_pool_are_served() {
    async fn test<K: Kind>() {
        let cluster = Cluster::builder().nodes(1).start().await;
        let path = Path::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
        let existing = existing::<K>(path.addr(), 8, false);
        let builder = existing.wrap().patrol_interval(PATIENCE * 10);
        // A machine that stands still must not bring new sessions for the heartbeat.
        let pool: Pool = builder.heartbeat_timeout(PATIENCE).build().unwrap();
        pool.connect().await.unwrap();
        path.delay_log_ins(LOG_IN);
        let before = path.accepted();
        eventually("a wave of callers is served", PATIENCE, async || {
            let callers = (0..30).map(|_| {
                let pool = pool.clone();
                tokio::spawn(async move { pool.get_within(SHORT).await.is_ok() })
            });
            let mut served = 0;
            for caller in callers.collect::<Vec<_>>() {
                served += usize::from(caller.await.unwrap());
            }
            served == 30
        })
        .await;
        let opened = path.accepted() - before;
        // The heartbeat may have opened one or two of its own.
        assert!(opened <= 8 + 3, "{opened} connections were opened");
    }
    over_each_kind!(test);
}

/// A caller that gives up while its connection is being tested, or asked where it leads to, closes nothing; nor does a
/// primary that is suspended for a moment.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_of_a_wrapped_pool_outlives_the_caller_that_waited_for_it() {
    async fn test<K: Kind>() {
        let cluster = Cluster::builder().nodes(1).start().await;
        let tap = Tap::start((cluster.spare_addr(9), 0).into(), cluster.socket_addr(Node(0))).await;
        for tested in [false, true] {
            // A connection that has not answered for a second is closed if nobody waits for it.
            unless_stalled(async || outlives_its_caller::<K>(&tap, tested).await).await;
        }
    }
    over_each_kind!(test);
}

async fn outlives_its_caller<K: Kind>(tap: &Tap, tested: bool) -> Result<(), String> {
    let existing = existing::<K>(tap.addr(), 1, tested);
    let owned = existing.owned().await;
    let first: i32 = owned.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let pool: Pool = existing
        .wrap()
        .patrol_interval(PATIENCE * 10)
        .heartbeat_interval(Duration::from_millis(100))
        .heartbeat_timeout(Duration::from_secs(1))
        .probe_timeout(Duration::from_secs(6))
        .dead_after(PATIENCE * 3)
        .build()
        .unwrap();
    let is_first = async |client: &Client, when: &str| {
        let is_first = pid(client).await == first;
        if is_first { Ok(()) } else { Err(format!("another connection {when}; tested: {tested}")) }
    };
    pool.connect().await.unwrap();
    drop(owned);
    if tested {
        is_first(&pool.get().await.unwrap(), "although it is known where it leads to").await?;
    }
    tap.stall(true);
    let given_up = pool.get_within(Duration::from_millis(100)).await.is_err();
    tap.stall(false);
    assert!(given_up, "tested: {tested}");
    let client = timeout(PATIENCE, pool.get()).await.unwrap().unwrap();
    is_first(&client, "after a caller gave up").await?;
    drop(client);
    if !tested {
        return Ok(());
    }
    tap.stall(true);
    let waiting = tokio::spawn({
        let pool = pool.clone();
        async move { pool.get().await }
    });
    let searching = || matches!(pool.status().view.state, State::Searching { .. });
    eventually("the primary is suspended", PATIENCE, async || searching()).await;
    tap.stall(false);
    let client = timeout(PATIENCE, waiting).await.unwrap().unwrap().unwrap();
    is_first(&client, "after a suspension").await
}

/// The server has room for four connections, and there are many callers: each of them is served again and again, as
/// connections come back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_server_serves_all_callers_of_a_wrapped_pool() {
    async fn test<K: Kind>() {
        let cluster = Cluster::builder().nodes(1).start().await;
        let tap = Tap::start((cluster.spare_addr(9), 0).into(), cluster.socket_addr(Node(0))).await;
        let existing = existing::<K>(tap.addr(), 16, false);
        let pool: Pool = existing.wrap().patrol_interval(PATIENCE * 10).build().unwrap();
        pool.connect().await.unwrap();
        drop(pool.get().await.unwrap());
        let owner = cluster.direct(Node(0)).await;
        // One of them is the heartbeat's.
        owner.batch_execute("ALTER ROLE app CONNECTION LIMIT 5").await.unwrap();
        tap.reset();
        let began = stalls::now();
        let callers: Vec<_> = (0..20)
            .map(|_| {
                let pool = pool.clone();
                tokio::spawn(async move {
                    let mut longest = Duration::ZERO;
                    for _ in 0..50 {
                        let asked = Instant::now();
                        let client = pool.get().await.unwrap();
                        longest = longest.max(asked.elapsed());
                        sleep(Duration::from_millis(10)).await;
                        drop(client);
                    }
                    longest
                })
            })
            .collect();
        let mut longest = Duration::ZERO;
        for caller in callers {
            longest = longest.max(timeout(PATIENCE * 3, caller).await.expect("a caller is not served").unwrap());
        }
        let (took, startups) = (began.elapsed(), tap.counts().startups);
        println!("1000 times in {took:?}, longest wait {longest:?}, {startups} log-ins");
        // A fiftieth of the time is what a caller waits on average, however fast the machine is: nobody is passed over.
        let most = Duration::from_secs(1) + took / 5 + stalls::slack_since(began);
        assert!(longest < most, "somebody waited for {longest:?} of {took:?}");
        // Each caller may try once at first. Then one of them tries, and the doubted primary is asked on a new session.
        assert!(startups < 40 + 8 * (took.as_secs() + 1), "{startups} log-ins in {took:?}");
    }
    over_each_kind!(test);
}

/// After a while without any success, the next log-in at a full server is rare. Whoever waits for it is served as soon
/// as connections come back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_server_holds_up_nobody_when_connections_come_back() {
    async fn test<K: Kind>() {
        let cluster = Cluster::builder().nodes(1).start().await;
        let existing = existing::<K>(cluster.socket_addr(Node(0)), 40, false);
        let pool: Pool = existing.wrap().patrol_interval(PATIENCE * 10).build().unwrap();
        pool.connect().await.unwrap();
        let mut held = Vec::new();
        for _ in 0..4 {
            held.push(pool.get().await.unwrap());
        }
        let owner = cluster.direct(Node(0)).await;
        // One of them is the heartbeat's.
        owner.batch_execute("ALTER ROLE app CONNECTION LIMIT 5").await.unwrap();
        let callers: Vec<_> = (0..32)
            .map(|_| {
                let pool = pool.clone();
                tokio::spawn(async move {
                    let client = pool.get().await.unwrap();
                    sleep(Duration::from_millis(10)).await;
                    drop(client);
                })
            })
            .collect();
        sleep(Duration::from_secs(5)).await;
        let began = stalls::now();
        drop(held);
        for caller in callers {
            timeout(PATIENCE * 2, caller).await.expect("a caller is not served").unwrap();
        }
        let took = began.elapsed();
        println!("32 callers were served in {took:?}");
        // It takes 80 ms, or some seconds if each round waits for a log-in.
        assert!(took < Duration::from_secs(2) + stalls::slack_since(began), "{took:?}");
    }
    over_each_kind!(test);
}

/// Nobody queues for a connect while a connection of the wrapped pool is idle, even if the pool's own settlers and
/// listeners wait for a slot as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_back_to_a_wrapped_pool_serves_who_waits_for_a_connect() {
    async fn test<K: Kind>() {
        let cluster = Cluster::builder().nodes(1).start().await;
        let path = Path::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
        let existing = existing::<K>(path.addr(), 2, false);
        let pool: Pool = existing.wrap().patrol_interval(PATIENCE * 10).build().unwrap();
        let one = pool.get().await.unwrap();
        let first = pid(&one).await;
        path.delay_log_ins(PATIENCE * 3);
        let accepted = path.accepted();
        let waiting = tokio::spawn({
            let pool = pool.clone();
            async move { pool.get().await }
        });
        eventually("it connects", PATIENCE, async || path.accepted() > accepted).await;
        drop(one);
        let two = timeout(PATIENCE, waiting).await.expect("it takes the other connection").unwrap().unwrap();
        assert_eq!(pid(&two).await, first);
    }
    over_each_kind!(test);
}

/// Callers of a wrapped pool that give up leave nothing behind that takes a slot for good.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connect_that_hangs_is_given_up_when_nobody_waits() {
    async fn test<K: Kind>() {
        let cluster = Cluster::builder().nodes(1).start().await;
        let path = Path::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
        let existing = existing::<K>(path.addr(), 2, false);
        let builder = existing.wrap().patrol_interval(PATIENCE * 10).probe_timeout(Duration::from_secs(1));
        let pool: Pool = builder.build().unwrap();
        pool.connect().await.unwrap();
        path.delay_log_ins(PATIENCE * 30);
        for _ in 0..6 {
            assert!(pool.get_within(Duration::from_millis(100)).await.is_err());
        }
        path.delay_log_ins(Duration::ZERO);
        timeout(PATIENCE, pool.get()).await.expect("a slot is free again").unwrap();
    }
    over_each_kind!(test);
}
