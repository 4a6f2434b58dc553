//! Callers that wait for less time than a connect takes: dials belong to the pool, and finish without them.

use std::future::pending;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::{FutureExt, poll};
use testbed::{Cluster, Node, Path, Tap, TurnAway, eventually};
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres_failover::resolve::BoxFuture;
use tokio_postgres_failover::view::State;
use tokio_postgres_failover::{Client, Error, Manager, Pool, PoolBuilder, deadpool};

use crate::support::PATIENCE;
use crate::support::stalls::unless_stalled;

/// What a log-in takes here, and less, which is what the callers have.
const LOG_IN: Duration = Duration::from_millis(400);
const SHORT: Duration = Duration::from_millis(300);
const NAME: &str = "impatient";

struct Bench {
    cluster: Cluster,
    path: Path,
    observer: tokio_postgres::Client,
}

impl Bench {
    async fn new() -> Self {
        let cluster = Cluster::builder().nodes(1).start().await;
        let path = Path::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
        let observer = cluster.direct(Node(0)).await;
        Self { cluster, path, observer }
    }

    fn builder(&self) -> PoolBuilder {
        Pool::builder(format!("postgres://app@{}/app", self.path.addr())).unwrap().application_name(NAME)
    }

    /// With a primary that is not lost while the machine stands still, and no patrols, whose sessions would be counted.
    fn unhurried(&self) -> PoolBuilder {
        self.builder().heartbeat_timeout(PATIENCE).patrol_interval(PATIENCE * 10)
    }

    /// Sessions of the pool at the server.
    async fn sessions(&self) -> i64 {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1";
        self.observer.query_one(sql, &[&NAME]).await.unwrap().get(0)
    }
}

async fn pid(client: &Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0)
}

/// A growing pool: each caller holds what it got, and none has the time that a log-in takes. The first may fail, while
/// its dial goes on for the second.
#[tokio::test]
async fn a_dial_outlives_the_caller_that_needed_it() {
    let bench = Bench::new().await;
    bench.path.delay_log_ins(LOG_IN);
    let pool = bench.unhurried().max_size(4).build().unwrap();
    pool.connect().await.unwrap();
    let mut held = vec![pool.get().await.unwrap()];
    for round in 0..3 {
        let first = pool.get_within(SHORT).await;
        let failed = first.is_err();
        held.extend(first.ok());
        if failed {
            let second = pool.get_within(PATIENCE).await;
            held.push(second.unwrap_or_else(|error| panic!("round {round}, the second caller: {error}")));
        }
    }
    assert_eq!(held.len(), 4);
    assert_eq!(pool.status().size, 4);
    // Whose dial was thrown away would have had another one. The heartbeat has one or two sessions of its own.
    assert!(bench.path.accepted() <= 4 + 2, "{} connections were opened", bench.path.accepted());
}

/// Thirty callers at the same time, over and over: from the second wave on nobody fails, unless the machine stands
/// still, and no dial was thrown away.
#[tokio::test]
async fn waves_of_impatient_callers_are_served_from_the_second_on() {
    let bench = Bench::new().await;
    bench.path.delay_log_ins(LOG_IN);
    let pool = bench.unhurried().max_size(8).connection_gate(8).build().unwrap();
    pool.connect().await.unwrap();
    let wave = async || {
        let callers = (0..30).map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move { pool.get_within(SHORT).await.map(drop) })
        });
        let mut failed = 0;
        for caller in callers.collect::<Vec<_>>() {
            failed += usize::from(caller.await.unwrap().is_err());
        }
        failed
    };
    wave().await;
    unless_stalled(async || match (wave().await, wave().await) {
        (0, 0) => Ok(()),
        (one, other) => Err(format!("{one} of 30 failed, and then {other}")),
    })
    .await;
    // The heartbeat has one or two sessions of its own.
    assert!(bench.path.accepted() <= 8 + 3, "{} connections were opened", bench.path.accepted());
}

/// Who waits for a dial takes a connection that is given back meanwhile, and the dial is the next one's.
#[tokio::test]
async fn who_waits_for_a_dial_takes_what_is_given_back() {
    let bench = Bench::new().await;
    let pool = bench.builder().max_size(2).build().unwrap();
    let one = pool.get().await.unwrap();
    let first = pid(&one).await;
    // Longer than the test has patience for, and a time-out of the pool's own that does not matter.
    bench.path.delay_log_ins(PATIENCE * 3);
    let waits = tokio::spawn({
        let pool = pool.clone();
        async move { pool.get().await }
    });
    eventually("a caller waits", PATIENCE, async || pool.status().waiting == 1).await;
    drop(one);
    let two = timeout(PATIENCE, waits).await.expect("it takes the other connection").unwrap().unwrap();
    assert_eq!(pid(&two).await, first);
    assert!(pool.status().size <= 2);
}

/// A connection is given back with a statement on its way, to a caller that gives up at that moment: the next caller
/// does not meet the statement.
#[tokio::test]
async fn what_was_given_to_a_caller_that_gave_up_is_idle() {
    let bench = Bench::new().await;
    let pool = bench.builder().max_size(2).build().unwrap();
    let one = pool.get().await.unwrap();
    let first = pid(&one).await;
    bench.path.delay_log_ins(LOG_IN);
    // Nothing else runs until the next caller waits: this runtime has one thread.
    let mut waits = Box::pin(pool.get());
    assert!(poll!(waits.as_mut()).is_pending());
    assert!(one.batch_execute("BEGIN; SELECT pg_sleep(600)").now_or_never().is_none());
    drop(one);
    drop(waits);
    let next = timeout(PATIENCE, pool.get()).await.expect("there is a dial").unwrap();
    let asked = timeout(PATIENCE, pid(&next)).await.expect("another caller's statement is under way");
    assert_ne!(asked, first);
}

/// A dial ends while its primary is suspended, and its caller, on a machine that is busy, sees nothing of that: it is
/// served as soon as the primary is verified again.
#[tokio::test]
async fn what_arrived_during_a_suspension_is_handed_out_after_it() {
    for by_hand in [false, true] {
        let bench = Bench::new().await;
        let builder = bench.builder().heartbeat_interval(Duration::from_millis(200));
        // The primary is suspended before the dial arrives, and on a machine that stands still not before it began.
        let builder = builder.heartbeat_timeout(Duration::from_millis(1500)).probe_timeout(Duration::from_secs(12));
        let builder = builder.dead_after(Duration::from_secs(60)).max_size(2);
        // The first keeps what it has.
        let (watched, waits): (_, [BoxFuture<'static, ()>; 2]) = if by_hand {
            let manager = builder.build_manager().unwrap();
            let pool = deadpool::managed::Pool::<Manager>::builder(manager).max_size(2).build().unwrap();
            let (one, two) = (pool.clone(), pool.clone());
            let seen = pool.clone();
            let state: Box<dyn Fn() -> String> = Box::new(move || format!("{:?}", seen.manager()));
            let first = async move {
                let _one = one.get().await.unwrap();
                pending::<()>().await;
            };
            (state, [Box::pin(first), Box::pin(async move { drop(two.get().await.unwrap()) })])
        } else {
            let pool = builder.build().unwrap();
            let (one, two) = (pool.clone(), pool.clone());
            let state: Box<dyn Fn() -> String> = Box::new(move || format!("{:?}", pool.status().view));
            let first = async move {
                let _one = one.get().await.unwrap();
                pending::<()>().await;
            };
            (state, [Box::pin(first), Box::pin(async move { drop(two.get().await.unwrap()) })])
        };
        let [first, mut waits] = waits;
        let first = tokio::spawn(first);
        let is_primary = || watched().contains("state: Primary");
        eventually("there is a primary", PATIENCE, async || is_primary()).await;
        eventually("the first has its connection", PATIENCE, async || bench.sessions().await > 0).await;
        sleep(Duration::from_millis(300)).await;
        bench.path.vanish();
        bench.path.delay_log_ins(Duration::from_secs(4));
        let accepted = bench.path.accepted();
        assert!(poll!(waits.as_mut()).is_pending());
        eventually("its dial is under way", PATIENCE, async || bench.path.accepted() > accepted).await;
        bench.path.delay_log_ins(PATIENCE * 3);
        let sessions = bench.sessions().await;
        assert!(is_primary(), "{}", watched());
        eventually("it is suspended", PATIENCE, async || !is_primary()).await;
        eventually("the dial has arrived", PATIENCE, async || bench.sessions().await > sessions).await;
        // What the dial received shows that the server lives; so does the next question.
        bench.path.delay_log_ins(Duration::ZERO);
        eventually("it is the primary again", PATIENCE, async || is_primary()).await;
        let served = timeout(PATIENCE / 2, waits.as_mut()).await;
        assert!(served.is_ok(), "by hand: {by_hand}: nobody serves it: {}", watched());
        first.abort();
    }
}

/// Callers that wait for dials are served in the order in which they came.
#[tokio::test]
async fn waiters_are_served_in_their_order() {
    let bench = Bench::new().await;
    let pool = bench.builder().max_size(4).build().unwrap();
    let one = pool.get().await.unwrap();
    bench.path.delay_log_ins(PATIENCE * 3);
    let served = Arc::new(AtomicUsize::new(0));
    let mut waiting = Vec::new();
    for place in 0..3 {
        let (pool, served) = (pool.clone(), Arc::clone(&served));
        waiting.push(tokio::spawn(async move {
            let client = pool.get().await.unwrap();
            let before = served.fetch_add(1, Ordering::SeqCst);
            drop(client);
            (place, before)
        }));
        let all = waiting.len();
        eventually("it waits", PATIENCE, async || bench_waiting(&waiting, all)).await;
        // Registered in this order, as this runtime has one thread.
        tokio::task::yield_now().await;
    }
    drop(one);
    for task in waiting {
        let (place, before) = timeout(PATIENCE, task).await.expect("served").unwrap();
        assert_eq!(place, before);
    }
}

/// A dial that fails costs nobody its place in the queue.
#[tokio::test]
async fn waiters_keep_their_places_when_dials_fail() {
    const WAITERS: usize = 5;
    let cluster = Cluster::builder().nodes(1).start().await;
    let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let builder = Pool::builder(format!("postgres://app@{}/app", tap.addr())).unwrap().max_size(WAITERS + 1);
    let pool = builder.connection_gate(1).patrol_interval(PATIENCE * 100).build().unwrap();
    let _held = pool.get().await.unwrap();
    for round in 0..3 {
        tap.turn_away(Some(TurnAway::Reset));
        tap.reset();
        let served = Arc::new(AtomicUsize::new(0));
        let mut waiting = Vec::new();
        for place in 0..WAITERS {
            let (pool, served) = (pool.clone(), Arc::clone(&served));
            waiting.push(tokio::spawn(async move {
                let client = pool.get_within(PATIENCE).await.unwrap();
                (place, served.fetch_add(1, Ordering::SeqCst), client)
            }));
            // Registered in this order, as this runtime has one thread.
            tokio::task::yield_now().await;
        }
        eventually("some dials have failed", PATIENCE, async || tap.counts().connections > 6).await;
        tap.turn_away(None);
        for task in waiting {
            let (place, before, client) = timeout(PATIENCE, task).await.expect("served").unwrap();
            assert_eq!(place, before, "round {round}");
            // The next round needs new ones.
            drop(client.detach());
        }
    }
}

fn bench_waiting<T>(tasks: &[tokio::task::JoinHandle<T>], all: usize) -> bool {
    tasks.iter().filter(|task| !task.is_finished()).count() == all
}

/// Callers that give up at random moments, and hold what they got for random times: never more than `max_size` sessions
/// at the server, no dial is thrown away, and afterwards each caller is served.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_callers_that_give_up_opens_no_more_than_max_size() {
    const MAX_SIZE: usize = 5;
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| RandomState::new().hash_one(0));
    println!("SEED={seed}");
    let bench = Bench::new().await;
    bench.path.delay_log_ins(Duration::from_millis(60));
    let pool = bench.builder().max_size(MAX_SIZE).min_idle(2).max_lifetime(Duration::from_millis(700)).build().unwrap();
    pool.connect().await.unwrap();
    let end = Arc::new(AtomicBool::new(false));
    let got = Arc::new(AtomicUsize::new(0));
    let callers: Vec<_> = (0..40_u64)
        .map(|caller| {
            let (pool, end, got) = (pool.clone(), Arc::clone(&end), Arc::clone(&got));
            tokio::spawn(async move {
                let mut random = seed ^ caller.wrapping_mul(0x9E37_79B9_7F4A_7C15);
                let mut next = move |most: u64| {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (random >> 33) % most
                };
                while !end.load(Ordering::SeqCst) {
                    let patience = Duration::from_millis(next(120));
                    if let Ok(Ok(client)) = timeout(patience, pool.get()).await {
                        got.fetch_add(1, Ordering::SeqCst);
                        sleep(Duration::from_millis(next(30))).await;
                        drop(client);
                    }
                }
            })
        })
        .collect();
    let began = Instant::now();
    // The pool's, the heartbeat's, and the session that found the primary until it is taken. One that has reached its
    // age is closed before the next is opened; its backend may take a moment to end.
    let most = i64::try_from(MAX_SIZE).unwrap() + 2;
    let (mut above, mut larger, mut looks) = (0, 0, 0);
    let is_enough = |looks: usize| looks > 50 && got.load(Ordering::SeqCst) > 100;
    while began.elapsed() < Duration::from_secs(4) || (began.elapsed() < PATIENCE && !is_enough(looks)) {
        looks += 1;
        above = if bench.sessions().await > most { above + 1 } else { 0 };
        assert!(above < 40, "seed {seed}: more than {most} sessions in {above} looks one after the other");
        // The status is read in two steps, in between which a connection may move.
        let status = pool.status();
        larger = if status.size > MAX_SIZE { larger + 1 } else { 0 };
        assert!(larger < 3, "seed {seed}: {status:?}");
        sleep(Duration::from_millis(5)).await;
    }
    end.store(true, Ordering::SeqCst);
    for caller in callers {
        caller.await.unwrap();
    }
    assert!(is_enough(looks), "seed {seed}: {looks} looks, {got:?} connections");
    let mut held = Vec::new();
    for _ in 0..MAX_SIZE {
        held.push(pool.get().await.unwrap());
    }
    assert!(matches!(pool.get_within(SHORT).await, Err(Error::Unavailable(_))), "seed {seed}: one more than max_size");
}

/// `min_idle` connections are opened before anybody asks for one, and again when callers have taken them.
#[tokio::test]
async fn min_idle_is_filled_ahead_of_need() {
    let bench = Bench::new().await;
    // Untested, they are had at once.
    let pool = bench.unhurried().max_size(6).min_idle(3).test_idle_after(Duration::MAX).build().unwrap();
    eventually("three are ready", PATIENCE, async || pool.status().available == 3).await;
    bench.path.delay_log_ins(LOG_IN);
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(pool.get_within(SHORT).await.expect("one that was opened ahead"));
    }
    eventually("three more are ready", PATIENCE, async || pool.status().available == 3).await;
    for _ in 0..3 {
        held.push(pool.get_within(SHORT).await.expect("one that was opened ahead"));
    }
    let status = pool.status();
    assert_eq!((status.size, status.available), (6, 0), "within max_size");
}

/// A failover onto a server whose log-ins take longer than its callers have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_onto_a_slow_server_recovers_with_short_deadlines() {
    let cluster = Cluster::builder().nodes(2).start().await;
    let path = Path::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(1))).await;
    path.delay_log_ins(LOG_IN);
    let url = format!("postgres://app@{},{}/app", cluster.socket_addr(Node(0)), path.addr());
    let pool = Pool::builder(url).unwrap().max_size(8).build().unwrap();
    pool.connect().await.unwrap();
    cluster.kill(Node(0)).await;
    cluster.promote(Node(1)).await;
    let held = Arc::new(AtomicUsize::new(0));
    let callers: Vec<_> = (0..8)
        .map(|_| {
            let (pool, held) = (pool.clone(), Arc::clone(&held));
            tokio::spawn(async move {
                let began = Instant::now();
                while began.elapsed() < PATIENCE {
                    if let Ok(client) = pool.get_within(SHORT).await
                        && client.query_one("SELECT 1", &[]).await.is_ok()
                    {
                        held.fetch_add(1, Ordering::SeqCst);
                        return Some(client);
                    }
                }
                None
            })
        })
        .collect();
    for caller in callers {
        assert!(caller.await.unwrap().is_some(), "{held:?} of 8 got a connection");
    }
}

/// A refusal ends the wait of all who wait for a dial, at once.
#[tokio::test]
async fn a_refusal_reaches_all_waiters() {
    let bench = Bench::new().await;
    let pool = bench.unhurried().max_size(8).connection_gate(1).build().unwrap();
    let _held = pool.get().await.unwrap();
    let _spare = pool.get().await.unwrap();
    // A primary of which no session is left in which it could be asked is lost.
    eventually("the heart-beat has its session", PATIENCE, async || bench.sessions().await >= 3).await;
    bench.observer.batch_execute("ALTER ROLE app CONNECTION LIMIT -1").await.unwrap();
    let admin = bench.cluster.direct(Node(0)).await;
    admin.batch_execute("ALTER ROLE app NOLOGIN").await.unwrap();
    let callers: Vec<_> = (0..5)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move { pool.get_within(PATIENCE).await.map(drop) })
        })
        .collect();
    for caller in callers {
        let error = caller.await.unwrap().unwrap_err();
        assert!(matches!(error, Error::Refused(_)), "{error}");
    }
}

/// A pool built by hand gains too: what a caller gave up is there for the next one.
#[tokio::test]
async fn a_pool_built_by_hand_keeps_the_dials_of_those_who_gave_up() {
    let bench = Bench::new().await;
    bench.path.delay_log_ins(LOG_IN);
    let manager = bench.builder().build_manager().unwrap();
    let pool = deadpool::managed::Pool::<Manager>::builder(manager).max_size(2).build().unwrap();
    let mut got = Vec::new();
    for _ in 0..20 {
        if let Ok(Ok(connection)) = timeout(SHORT, pool.get()).await {
            got.push(connection);
        }
        if got.len() == 2 {
            return;
        }
    }
    panic!("{} of 2 connections in 20 tries", got.len());
}

/// A connection comes back while its primary is suspended, and a caller that waits for a dial, on a machine that is
/// busy, sees nothing of that: it is served as soon as the primary is verified again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_came_back_during_a_suspension_is_handed_out_after_it() {
    let bench = Bench::new().await;
    let limit = Duration::from_millis(300);
    let builder = bench.builder().heartbeat_interval(limit).heartbeat_timeout(limit).patrol_interval(PATIENCE * 10);
    let builder = builder.test_idle_after(PATIENCE * 10).probe_timeout(PATIENCE * 10).dead_after(PATIENCE * 10);
    let pool = builder.max_size(2).build().unwrap();
    let one = pool.get().await.unwrap();
    let first = pid(&one).await;
    sleep(limit * 2).await;
    bench.path.delay_log_ins(PATIENCE * 10);
    let accepted = bench.path.accepted();
    let mut waits = Box::pin(pool.get());
    assert!(poll!(waits.as_mut()).is_pending());
    eventually("its dial is under way", PATIENCE, async || bench.path.accepted() > accepted).await;
    let is_primary = || matches!(pool.status().view.state, State::Primary { .. });
    bench.path.hold(true);
    eventually("it is suspended", PATIENCE, async || !is_primary()).await;
    drop(one);
    bench.path.hold(false);
    eventually("it is the primary again", PATIENCE, async || is_primary()).await;
    let served = timeout(PATIENCE, waits).await.expect("nobody serves it").unwrap();
    assert_eq!(pid(&served).await, first);
}
