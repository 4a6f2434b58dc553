//! Connections that have been idle: tested before they are handed out, where their sockets may have died without a
//! word.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;

use testbed::{Cluster, Node, Path, Tap, eventually};
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres_failover::view::State;
use tokio_postgres_failover::{Manager, Pool, PoolBuilder, deadpool};

use crate::sessions::versions::has_idle_session_timeout;
use crate::support::PATIENCE;
use crate::support::stalls::unless_stalled;

/// Far below `tcp_user_timeout`, which is what a statement on a dead socket waits for.
const SOON: Duration = Duration::from_secs(8);
const IDLE: Duration = Duration::from_millis(300);

struct Bench {
    _cluster: Cluster,
    path: Path,
}

impl Bench {
    async fn new() -> Self {
        let cluster = Cluster::builder().nodes(1).start().await;
        let path = Path::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
        Self { _cluster: cluster, path }
    }

    fn builder(&self) -> PoolBuilder {
        // The heartbeat would find out by itself; a machine that wakes up has not sent one yet.
        let builder = Pool::builder(format!("postgres://app@{}/app", self.path.addr())).unwrap().max_size(8);
        builder.heartbeat_interval(Duration::from_secs(3600)).patrol_interval(Duration::from_secs(3600))
    }
}

/// A machine that was suspended: all sockets are dead, and nobody was told. The first statements do not wait for TCP.
#[tokio::test]
async fn the_first_statements_after_a_resume_do_not_wait_for_tcp() {
    let bench = Bench::new().await;
    let pool = bench.builder().test_idle_after(IDLE).build().unwrap();
    let mut held = Vec::new();
    for _ in 0..8 {
        held.push(pool.get().await.unwrap());
    }
    drop(held);
    bench.path.vanish();
    sleep(IDLE * 2).await;
    let began = Instant::now();
    let callers = (0..8).map(|_| {
        let pool = pool.clone();
        tokio::spawn(async move { pool.get().await.unwrap().batch_execute("SELECT 1").await.unwrap() })
    });
    for caller in callers.collect::<Vec<_>>() {
        timeout(SOON, caller).await.expect("it waits for TCP").unwrap();
    }
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
}

/// So for callers that have less time than the test of a connection takes: the second finds new ones.
#[tokio::test]
async fn impatient_callers_get_past_dead_connections() {
    let bench = Bench::new().await;
    let pool = bench.builder().max_size(20).test_idle_after(IDLE).build().unwrap();
    let mut held = Vec::new();
    for _ in 0..20 {
        held.push(pool.get().await.unwrap());
    }
    drop(held);
    bench.path.vanish();
    sleep(IDLE * 2).await;
    // Three, and more on a machine that stands still.
    let mut failed = 0;
    while pool.get_within(Duration::from_millis(200)).await.is_err() {
        failed += 1;
        assert!(failed < 15, "each dead connection costs a caller");
    }
}

/// A caller with less time than a round trip takes shows nothing about the connection that is tested for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn impatient_callers_close_no_good_connections() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let admin = cluster.direct(Node(0)).await;
    let sessions = async || {
        let sql = "SELECT pid FROM pg_stat_activity WHERE application_name = 'idle' ORDER BY pid";
        admin.query(sql, &[]).await.unwrap().iter().map(|row| row.get::<_, i32>(0)).collect::<Vec<_>>()
    };
    for used in [true, false] {
        let never = Duration::from_secs(3600);
        let url = format!("postgres://app@{}/app", tap.addr());
        let builder = Pool::builder(url).unwrap().max_size(4).min_idle(4).application_name("idle");
        let pool = builder.heartbeat_interval(never).patrol_interval(never).test_idle_after(IDLE).build().unwrap();
        // The test that a caller leaves has half a second for its answer.
        unless_stalled(async || {
            eventually("four are ready", PATIENCE, async || pool.status().available == 4).await;
            if used {
                let mut held = Vec::new();
                for _ in 0..4 {
                    held.push(pool.get().await.unwrap());
                }
            }
            sleep(IDLE * 2).await;
            let before = sessions().await;
            tap.stall(true);
            for _ in 0..3 {
                assert!(pool.get_within(Duration::from_millis(30)).await.is_err(), "used: {used}");
            }
            tap.stall(false);
            eventually("four are there again", PATIENCE, async || pool.status().available == 4).await;
            for _ in 0..4 {
                pool.get().await.unwrap().batch_execute("SELECT 1").await.unwrap();
            }
            let after = sessions().await;
            if after == before { Ok(()) } else { Err(format!("used: {used}: {before:?} became {after:?}")) }
        })
        .await;
        pool.close();
        eventually("the pool's sessions have ended", PATIENCE, async || sessions().await.is_empty()).await;
    }
}

/// A stall that is shorter than what kills a server costs the connection that was tested, and no other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stall_closes_one_idle_connection_at_most() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let admin = cluster.direct(Node(0)).await;
    let url = format!("postgres://app@{}/app", tap.addr());
    let builder = Pool::builder(url).unwrap().max_size(8).min_idle(8).application_name("stalls");
    let pool = builder.heartbeat_interval(Duration::from_secs(3600)).test_idle_after(IDLE).build().unwrap();
    eventually("eight are ready", PATIENCE, async || pool.status().available == 8).await;
    let sessions = async || {
        let sql = "SELECT pid FROM pg_stat_activity WHERE application_name = 'stalls'";
        admin.query(sql, &[]).await.unwrap().iter().map(|row| row.get::<_, i32>(0)).collect::<HashSet<_>>()
    };
    // Whoever is doubted has two seconds, which begin half a second after the test did.
    unless_stalled(async || {
        let before = sessions().await;
        sleep(IDLE * 2).await;
        tap.stall(true);
        let waits = tokio::spawn({
            let pool = pool.clone();
            async move { pool.get_within(PATIENCE).await.map(drop) }
        });
        // The test of the connection takes half a second.
        sleep(Duration::from_millis(700)).await;
        tap.stall(false);
        waits.await.unwrap().unwrap();
        eventually("eight are there again", PATIENCE, async || pool.status().available == 8).await;
        let ended = before.difference(&sessions().await).count();
        if ended <= 2 { Ok(()) } else { Err(format!("{ended} sessions of {} have ended", before.len())) }
    })
    .await;
}

/// So it is under a burst: as many callers as there are connections wait during the stall, and get those.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stall_under_a_burst_of_callers_closes_one_idle_connection_at_most() {
    const ALL: usize = 12;
    let cluster = Cluster::builder().nodes(1).start().await;
    let path = Path::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let admin = cluster.direct(Node(0)).await;
    let url = format!("postgres://app@{}/app", path.addr());
    let builder = Pool::builder(url).unwrap().max_size(ALL).min_idle(ALL).application_name("burst");
    let pool = builder.heartbeat_interval(Duration::from_secs(3600)).test_idle_after(IDLE).build().unwrap();
    eventually("all are ready", PATIENCE, async || pool.status().available == ALL).await;
    let sessions = async || {
        let sql = "SELECT pid FROM pg_stat_activity WHERE application_name = 'burst'";
        admin.query(sql, &[]).await.unwrap().iter().map(|row| row.get::<_, i32>(0)).collect::<HashSet<_>>()
    };
    let before = sessions().await;
    sleep(IDLE * 2).await;
    // What is dialled meanwhile takes longer than the stall.
    path.delay_log_ins(Duration::from_secs(2));
    path.hold(true);
    let waiting: Vec<_> = (0..ALL)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move {
                let client = pool.get_within(PATIENCE).await.unwrap();
                client.batch_execute("SELECT 1").await.unwrap();
                client
            })
        })
        .collect();
    // The test of the first connection takes half a second.
    sleep(Duration::from_millis(900)).await;
    path.hold(false);
    let mut held = Vec::new();
    for caller in waiting {
        held.push(caller.await.unwrap());
    }
    // Never more than the pool may have, once what was doubted is back.
    eventually("what is too much is closed", PATIENCE, async || sessions().await.len() <= ALL + 1).await;
    let ended = before.difference(&sessions().await).count();
    assert!(ended <= 1, "{ended} sessions of {} have ended", before.len());
}

/// What callers take and keep is replaced, before another caller has to wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_callers_keep_is_replaced_by_others_that_are_idle() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let pool = Pool::builder(cluster.url_hosts()).unwrap().max_size(16).min_idle(4).build().unwrap();
    let is_filled = async || pool.status().available == 4;
    let mut held = Vec::new();
    for _ in 0..3 {
        eventually("four are idle", PATIENCE, is_filled).await;
        held.push(pool.get().await.unwrap());
        held.push(pool.get().await.unwrap());
    }
    eventually("four are idle", PATIENCE, is_filled).await;
    // So it is for those that were given back and taken again.
    held.truncate(2);
    eventually("all are idle", PATIENCE, async || pool.status().available >= 8).await;
    for _ in 0..6 {
        held.push(pool.get().await.unwrap());
    }
    eventually("four are idle", PATIENCE, async || pool.status().available >= 4).await;
}

/// A pool built by hand tests its connections too.
#[tokio::test]
async fn a_pool_built_by_hand_tests_idle_connections() {
    let bench = Bench::new().await;
    let manager = bench.builder().test_idle_after(IDLE).build_manager().unwrap();
    let pool = deadpool::managed::Pool::<Manager>::builder(manager).max_size(1).build().unwrap();
    drop(pool.get().await.unwrap());
    bench.path.vanish();
    sleep(IDLE * 2).await;
    let using = async { pool.get().await.unwrap().batch_execute("SELECT 1").await.unwrap() };
    timeout(SOON, using).await.expect("it waits for TCP");
}

/// So are those that were opened ahead of need, and those that are given back to somebody who waits.
#[tokio::test]
async fn connections_that_do_not_come_from_the_idle_ones_are_tested_too() {
    let bench = Bench::new().await;
    let pool = bench.builder().min_idle(4).test_idle_after(IDLE).build().unwrap();
    eventually("four are ready", PATIENCE, async || pool.status().available >= 4).await;
    bench.path.vanish();
    sleep(IDLE * 2).await;
    let using = async { pool.get().await.unwrap().batch_execute("SELECT 1").await.unwrap() };
    timeout(SOON, using).await.expect("it waits for TCP");

    let pool = bench.builder().max_size(2).test_idle_after(IDLE).build().unwrap();
    let one = pool.get().await.unwrap();
    bench.path.delay_log_ins(PATIENCE);
    let waits = tokio::spawn({
        let pool = pool.clone();
        async move { pool.get().await.unwrap().batch_execute("SELECT 1").await.unwrap() }
    });
    eventually("a caller waits", PATIENCE, async || pool.status().waiting == 1).await;
    bench.path.vanish();
    bench.path.delay_log_ins(Duration::ZERO);
    sleep(IDLE * 2).await;
    drop(one);
    timeout(SOON, waits).await.expect("it waits for TCP").unwrap();
}

/// What was used lately is handed out without a message, and what was idle for a while is asked once and kept.
#[tokio::test]
async fn only_what_was_idle_is_asked() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let never = Duration::from_secs(3600);
    let pool = Pool::builder(format!("postgres://app@{}/app", tap.addr())).unwrap().max_size(1);
    let pool = pool.heartbeat_interval(never).patrol_interval(never).test_idle_after(PATIENCE).build().unwrap();
    pool.get().await.unwrap().batch_execute("SELECT 1").await.unwrap();
    tap.reset();
    for _ in 0..10 {
        drop(pool.get().await.unwrap());
    }
    pool.get().await.unwrap().batch_execute("SELECT 1").await.unwrap();
    assert_eq!(tap.counts().round_trips, 1);

    let pool = Pool::builder(format!("postgres://app@{}/app", tap.addr())).unwrap().max_size(1);
    let pool = pool.heartbeat_interval(never).patrol_interval(never).test_idle_after(Duration::from_millis(1)).build();
    let pool = pool.unwrap();
    let pid =
        async || pool.get().await.unwrap().query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get::<_, i32>(0);
    // A statement that was prepared is closed after its answer, and a test has half a second.
    unless_stalled(async || {
        let first = pid().await;
        sleep(Duration::from_millis(100)).await;
        tap.reset();
        drop(pool.get().await.unwrap());
        let asked = tap.counts().round_trips;
        let kept = pid().await == first;
        if asked == 1 && kept { Ok(()) } else { Err(format!("asked {asked} times, kept: {kept}")) }
    })
    .await;
}

fn is_asleep(pool: &Pool) -> bool {
    matches!(pool.status().view.state, State::Asleep)
}

/// Without a caller nothing is open at the server, and nothing is asked of it or of DNS; the first caller wakes the
/// pool.
#[tokio::test]
async fn a_pool_without_callers_sleeps_until_the_next_one() {
    let cluster = Cluster::builder().nodes(2).start().await;
    let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let other = Tap::start(SocketAddr::new(cluster.spare_addr(1), 0), cluster.socket_addr(Node(1))).await;
    let url = format!("postgres://app@{},{}/app", tap.addr(), other.addr());
    let builder = Pool::builder(url).unwrap().application_name("sleeper").min_idle(2).warm_standbys(true);
    let quick = Duration::from_millis(50);
    let builder = builder.heartbeat_interval(quick).patrol_interval(quick).sleep_after(Duration::from_millis(400));
    let pool = builder.build().unwrap();
    let first = pool.get().await.unwrap();
    // A connection checked out keeps it awake.
    sleep(Duration::from_millis(900)).await;
    assert!(!is_asleep(&pool));
    first.batch_execute("SELECT 1").await.unwrap();
    drop(first);

    let sessions = async || {
        let mut all = 0;
        for node in [Node(0), Node(1)] {
            let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'sleeper'";
            all += cluster.direct(node).await.query_one(sql, &[]).await.unwrap().get::<_, i64>(0);
        }
        all
    };
    eventually("it sleeps", PATIENCE, async || is_asleep(&pool)).await;
    eventually("nothing is open", PATIENCE, async || sessions().await == 0).await;
    eventually("nothing is kept", PATIENCE, async || (pool.status().size, pool.status().available) == (0, 0)).await;
    tap.reset();
    other.reset();
    sleep(Duration::from_secs(1)).await;
    let (counts, others) = (tap.counts(), other.counts());
    assert_eq!((counts.connections, counts.round_trips), (0, 0), "{counts:?}");
    assert_eq!((others.connections, others.round_trips), (0, 0), "{others:?}");

    let woken = timeout(PATIENCE, pool.get()).await.expect("it wakes").unwrap();
    woken.batch_execute("SELECT 1").await.unwrap();
    assert_eq!(woken.generation().get(), 2, "what was verified before the sleep is not handed out");
    drop(woken);
    eventually("it sleeps again", PATIENCE, async || is_asleep(&pool)).await;
    timeout(PATIENCE, pool.transaction(async |tx| Ok(tx.batch_execute("SELECT 1").await?))).await.unwrap().unwrap();
    pool.connect().await.unwrap();
}

/// The pool wakes, and leads to the second timeline.
async fn wakes_to_the_successor(pool: &Pool) -> Result<(), String> {
    let client = timeout(PATIENCE, pool.get()).await.expect("it wakes").unwrap();
    let sql = "SELECT substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)";
    let timeline: String = client.query_one(sql, &[]).await.unwrap().get(0);
    if timeline == "00000002" { Ok(()) } else { Err(format!("it leads to timeline {timeline}")) }
}

/// A standby was promoted while the pool slept, and the old primary still takes writes: the first caller is not led
/// there. The others have a tenth of a second to object to it, which passes on a machine that stands still.
#[tokio::test]
async fn a_zombie_of_the_time_of_sleep_is_not_believed() {
    unless_stalled(async || {
        let cluster = Cluster::start().await;
        let builder = Pool::builder(cluster.url_hosts()).unwrap().sleep_after(Duration::from_millis(300));
        let pool = builder.build().unwrap();
        drop(pool.get().await.unwrap());
        eventually("it sleeps", PATIENCE, async || is_asleep(&pool)).await;
        let successor = cluster.most_advanced_standby().await;
        cluster.promote(successor).await;
        wakes_to_the_successor(&pool).await
    })
    .await;
}

/// So where one name leads to the primary alone, and DNS answers later than the old primary.
#[tokio::test]
async fn a_zombie_that_the_name_led_to_before_the_sleep_is_not_believed() {
    unless_stalled(async || {
        let cluster = Cluster::start().await;
        let of = |node| cluster.addr(node);
        cluster.dns().set(&[of(cluster.primary())]);
        let builder = Pool::builder(cluster.url()).unwrap().dns_servers([cluster.dns().addr()]);
        let pool = builder.sleep_after(Duration::from_millis(300)).build().unwrap();
        drop(pool.get().await.unwrap());
        eventually("it sleeps", PATIENCE, async || is_asleep(&pool)).await;
        let successor = cluster.most_advanced_standby().await;
        cluster.promote(successor).await;
        cluster.dns().set(&[of(successor)]);
        cluster.dns().delay(Duration::from_millis(40));
        wakes_to_the_successor(&pool).await
    })
    .await;
}

/// The server, or something in between, closes what is idle, and the pool opens it anew: nobody needed that.
#[tokio::test]
async fn idle_connections_that_the_server_closes_keep_no_pool_awake() {
    let cluster = Cluster::builder().nodes(1).start().await;
    if !has_idle_session_timeout(&cluster).await {
        return;
    }
    let direct = cluster.direct(Node(0)).await;
    direct.batch_execute("ALTER ROLE app SET idle_session_timeout = '200ms'").await.unwrap();
    let builder = Pool::builder(cluster.url_hosts()).unwrap().application_name("sleeper").min_idle(2);
    let quick = Duration::from_millis(50);
    let builder = builder.heartbeat_interval(quick).patrol_interval(quick);
    let pool = builder.sleep_after(Duration::from_millis(600)).build().unwrap();
    drop(pool.get().await.unwrap());
    eventually("it sleeps", PATIENCE, async || is_asleep(&pool)).await;
}

/// What nobody waits for is not searched either; a listener and a detached session keep the pool awake.
#[tokio::test]
async fn a_search_sleeps_and_a_listener_does_not() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let nobody = Pool::builder(format!("postgres://app@{}:1/app", cluster.spare_addr(0))).unwrap();
    let nobody = nobody.sleep_after(Duration::from_millis(200)).build().unwrap();
    eventually("the search sleeps", PATIENCE, async || is_asleep(&nobody)).await;
    assert!(nobody.get_within(Duration::from_millis(300)).await.is_err());

    let pool = Pool::builder(cluster.url_hosts()).unwrap().sleep_after(Duration::from_millis(300)).build().unwrap();
    let mut listener = pool.listen(["orders"]).await.unwrap();
    let detached = pool.get().await.unwrap().detach();
    sleep(Duration::from_millis(900)).await;
    assert!(!is_asleep(&pool));
    detached.batch_execute("NOTIFY orders").await.unwrap();
    timeout(PATIENCE, listener.recv()).await.expect("heard").unwrap().unwrap();
    drop(listener);
    sleep(Duration::from_millis(900)).await;
    assert!(!is_asleep(&pool));
    drop(detached);
    eventually("it sleeps", PATIENCE, async || is_asleep(&pool)).await;
}
