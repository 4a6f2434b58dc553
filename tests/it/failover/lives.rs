//! Only *new* sessions fail: what is open serves on, nothing is lost, nothing evicted. And a server that dies in the
//! midst of it is found as ever.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use testbed::{Authority, Cluster, ClusterBuilder, Node, Tap, TurnAway, eventually};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_postgres_failover::view::State;
use tokio_postgres_failover::{Error, Event, Pool, PoolBuilder};

use crate::support::load::{LONG, by_url, create_table, from_env, generation, ms};
use crate::support::{heart_beats, stalls};

/// Of the pools here: a sixtieth of it is a heartbeat, and three times as long new sessions fail.
const DEAD_AFTER: Duration = Duration::from_secs(3);
/// More than the machine stands still, and well within the time that new sessions fail.
const PATIENT: Duration = Duration::from_millis(2500);
/// For what is silent in earnest.
const IMPATIENT: Duration = Duration::from_millis(500);

/// A cluster whose primary is reached through a proxy.
struct Stage {
    tap: Tap,
    cluster: Cluster,
}

impl Stage {
    async fn start() -> Self {
        Self::on(Cluster::builder()).await
    }

    async fn on(cluster: ClusterBuilder) -> Self {
        let cluster = cluster.start().await;
        create_table(&cluster).await;
        let listen = (cluster.spare_addr(0), cluster.port()).into();
        let tap = Tap::start(listen, cluster.socket_addr(cluster.primary())).await;
        Self { tap, cluster }
    }

    fn builder(&self) -> PoolBuilder {
        let standbys = [Node(1), Node(2)].map(|node| self.cluster.socket_addr(node).to_string());
        by_url(format!("postgres://app@{},{}/app", self.tap.addr(), standbys.join(",")))
            .max_size(6)
            .heartbeat_interval(Duration::from_millis(200))
            .heartbeat_timeout(PATIENT)
            .probe_timeout(IMPATIENT)
            .patrol_interval(Duration::from_secs(1))
            .dead_after(DEAD_AFTER)
            // Where it is given up for a slow answer, there is no other one to be had.
            .test_idle_after(Duration::MAX)
    }
}

/// Callers whom the open connections can serve, and what came of it.
struct Callers {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicUsize>,
    tasks: JoinSet<Vec<String>>,
}

impl Callers {
    /// Two hold a connection for good, and two take an idle one again and again. A fifth wants more than there are, and
    /// gets none: that is what makes the pool open sessions.
    async fn start(pool: &Pool) -> Self {
        let (stop, served) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let mut tasks = JoinSet::new();
        let mut held = Vec::new();
        for _ in 0..4 {
            held.push(pool.get().await.unwrap());
        }
        let idle = held.split_off(2);
        for client in held {
            let (stop, served) = (Arc::clone(&stop), Arc::clone(&served));
            tasks.spawn(async move {
                let mut errors = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    match timeout(LONG, client.simple_query("SELECT 1")).await {
                        Ok(Ok(_)) => drop(served.fetch_add(1, Ordering::Relaxed)),
                        Ok(Err(error)) => errors.push(format!("checked out: {error}")),
                        Err(_) => errors.push("checked out: no answer".to_owned()),
                    }
                    sleep(Duration::from_millis(30)).await;
                }
                errors
            });
        }
        for _ in 0..2 {
            let (pool, stop, served) = (pool.clone(), Arc::clone(&stop), Arc::clone(&served));
            tasks.spawn(async move {
                let mut errors = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    match pool.get_within(PATIENT * 2).await {
                        Ok(client) => match client.simple_query("SELECT 1").await {
                            Ok(_) => drop(served.fetch_add(1, Ordering::Relaxed)),
                            Err(error) => errors.push(format!("taken: {error}")),
                        },
                        Err(error) => errors.push(format!("get: {error}")),
                    }
                    sleep(Duration::from_millis(5)).await;
                }
                errors
            });
        }
        let (pool, stopped) = (pool.clone(), Arc::clone(&stop));
        tasks.spawn(async move {
            while !stopped.load(Ordering::Relaxed) {
                let more = (0..3).map(|_| pool.get_within(Duration::from_millis(150)));
                drop(futures_util::future::join_all(more).await);
                sleep(Duration::from_millis(50)).await;
            }
            Vec::new()
        });
        drop(idle);
        Self { stop, served, tasks }
    }

    async fn stop(mut self) -> (usize, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let mut errors = Vec::new();
        while let Some(joined) = self.tasks.join_next().await {
            errors.extend(joined.unwrap());
        }
        (self.served.load(Ordering::Relaxed), errors)
    }
}

/// The heartbeat's question waits for a lock on a catalog, and so does each new session; callers of `get` are answered
/// all the while. So it is when `VACUUM FULL` waits behind an open transaction.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_answers_callers_is_not_left_while_the_question_is_held_up() {
    let stage = Stage::start().await;
    let pool = stage.builder().build().unwrap();
    let held = [pool.get().await.unwrap(), pool.get().await.unwrap()];
    drop(pool.get().await.unwrap());
    let mut events = pool.subscribe();
    let other = stage.cluster.direct(stage.cluster.primary()).await;
    let lock = "BEGIN; LOCK TABLE pg_catalog.pg_db_role_setting IN ACCESS EXCLUSIVE MODE";
    other.batch_execute(lock).await.unwrap();
    let until = Instant::now() + DEAD_AFTER * 2;
    while Instant::now() < until {
        for client in &held {
            timeout(LONG, client.batch_execute("SELECT 1")).await.expect("an answer").unwrap();
        }
        sleep(Duration::from_millis(50)).await;
    }
    let idle = pool.get_within(PATIENT).await.expect("an idle one is handed out");
    idle.batch_execute("SELECT 1").await.unwrap();
    other.batch_execute("ROLLBACK").await.unwrap();
    let seen = std::iter::from_fn(|| futures_util::FutureExt::now_or_never(events.next()).flatten());
    let lost: Vec<Event> =
        seen.filter(|event| matches!(event, Event::PrimaryLost { .. } | Event::Evicted { .. })).collect();
    assert!(lost.is_empty(), "{lost:#?}");
    assert_eq!(generation(&pool), 1);
}

async fn new_sessions_fail(how: TurnAway) {
    new_sessions_fail_over(how, how == TurnAway::HangInTls).await;
}

async fn new_sessions_fail_over(how: TurnAway, encrypted: bool) {
    let authority = Authority::new();
    let cluster = Cluster::builder();
    let cluster = if encrypted { cluster.tls(&authority.issue(&["pg.internal"])) } else { cluster };
    let stage = Stage::on(cluster).await;
    let pool = stage.builder();
    #[cfg(feature = "rustls")]
    let pool = if encrypted { pool.rustls(tokio_postgres_failover::tls::Tls::unverified()) } else { pool };
    let pool = pool.build().unwrap();
    drop(pool.get().await.unwrap());
    let mut events = pool.subscribe();
    let callers = Callers::start(&pool).await;
    heart_beats(&stage.cluster).await;

    stage.tap.turn_away(Some(how));
    let seconds = from_env("SECONDS", DEAD_AFTER.as_secs() * 3);
    sleep(Duration::from_secs(seconds)).await;
    let seen = std::iter::from_fn(|| futures_util::FutureExt::now_or_never(events.next()).flatten());
    let seen: Vec<Event> = seen.collect();
    let lost: Vec<_> =
        seen.iter().filter(|event| matches!(event, Event::PrimaryLost { .. } | Event::Evicted { .. })).collect();
    assert!(lost.is_empty(), "{how:?}: {lost:#?}");
    let (served, errors) = callers.stop().await;
    assert_eq!(errors, Vec::<String>::new(), "{how:?}");
    assert!(served > usize::try_from(seconds).unwrap() * 40, "{how:?}: only {served} were served");
    assert_eq!(generation(&pool), 1);

    // In the midst of it the server dies, and another one is promoted.
    let held = pool.get().await.unwrap();
    let died = stalls::now();
    stage.cluster.kill(Node(0)).await;
    let accepted = stage.cluster.promote_timed(stage.cluster.most_advanced_standby().await).await.accepted_at;
    let client = timeout(LONG, pool.get()).await.unwrap().unwrap();
    client.batch_execute("INSERT INTO entries (id) VALUES (1)").await.unwrap();
    let (took, slack) = (accepted.elapsed(), stalls::slack_since(accepted));
    println!(
        "{how:?}: {served} served; left {} ms after the death, {} ms after the promotion",
        ms(died.elapsed()),
        ms(took)
    );
    assert!(took < Duration::from_secs(10) + slack, "{how:?}: {took:?}");
    assert!(held.simple_query("SELECT 1").await.is_err());
    assert_eq!(generation(&pool), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_sessions_are_refused() {
    new_sessions_fail(TurnAway::Refuse).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_sessions_are_reset() {
    new_sessions_fail(TurnAway::Reset).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_sessions_hang() {
    new_sessions_fail(TurnAway::Hang).await;
}

#[cfg(feature = "rustls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_sessions_hang_in_tls() {
    new_sessions_fail(TurnAway::HangInTls).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_sessions_hang_in_authentication() {
    new_sessions_fail(TurnAway::HangInAuthentication).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_sessions_meet_an_error_that_nobody_knows() {
    new_sessions_fail(TurnAway::Error).await;
}

/// The machine has no process left for another session. The server says so in words that are older than the protocol.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_sessions_get_no_process() {
    new_sessions_fail_over(TurnAway::NoProcess, false).await;
    #[cfg(feature = "rustls")]
    new_sessions_fail_over(TurnAway::NoProcess, true).await;
}

/// A pool that was never let in does not take such a server for another one, nor for one without TLS.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_a_process_for_the_first_session_is_waited_for() {
    let modes = if cfg!(feature = "rustls") { &["disable", "require"][..] } else { &["disable"] };
    for mode in modes {
        let authority = Authority::new();
        let stage = Stage::on(Cluster::builder().tls(&authority.issue(&["pg.internal"]))).await;
        stage.tap.turn_away(Some(TurnAway::NoProcess));
        let address = stage.tap.addr();
        let pool = Pool::builder(format!("postgres://app@{address}/app?sslmode={mode}")).unwrap().build().unwrap();
        let mut text = String::new();
        eventually("the server's words are told", LONG, async || {
            let Err(Error::Unavailable(error)) = pool.get_within(Duration::from_millis(500)).await else {
                panic!("{mode}: it is waited for")
            };
            text = error.to_string();
            text.contains("before the session began")
        })
        .await;
        println!("{text}");
        stage.tap.turn_away(None);
        pool.get_within(LONG).await.unwrap();
    }
}

/// The same, and the server falls silent in the midst of it: its sessions stay open, and nothing comes on them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_falls_silent_while_new_sessions_fail_is_found() {
    for how in [TurnAway::Reset, TurnAway::Hang] {
        falls_silent(how, false).await;
    }
}

/// The same, and the heartbeat has no session any more. The only connection is in use, so the pool can ask nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_falls_silent_while_nobody_can_be_asked_is_found() {
    for how in [TurnAway::Reset, TurnAway::Hang] {
        falls_silent(how, true).await;
    }
}

async fn falls_silent(how: TurnAway, heartbeat_ends: bool) {
    let stage = Stage::start().await;
    let pool = stage.builder().heartbeat_timeout(IMPATIENT).build().unwrap();
    let held = pool.get().await.unwrap();
    let pid: i32 = held.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    heart_beats(&stage.cluster).await;
    stage.tap.turn_away(Some(how));
    if heartbeat_ends {
        end_others(&stage.cluster, pid).await;
    }
    sleep(Duration::from_secs(1)).await;
    // A caller that goes on sending on the session that it holds is no sign of the server.
    let sender = tokio::spawn(async move {
        while !held.is_closed() {
            let _ = timeout(Duration::from_millis(50), held.simple_query("SELECT 1")).await;
        }
    });
    // It may have been suspended for a stall of the machine, and may be so again before the server falls silent.
    let mut events = pool.subscribe();
    let has_primary = async || matches!(pool.status().view.state, State::Primary { .. });
    eventually("it has its primary", LONG, has_primary).await;
    let silent = stalls::now();
    stage.tap.stall(true);
    let lost = timeout(LONG, async { while !matches!(events.next().await.unwrap(), Event::PrimaryLost { .. }) {} });
    lost.await.expect("it is lost");
    println!("{how:?}: lost after {} ms", ms(silent.elapsed()));
    let slack = stalls::slack_since(silent);
    assert!(silent.elapsed() < Duration::from_secs(2) + slack, "{how:?}: {:?}", silent.elapsed());
    let evicted = timeout(LONG, async { while !matches!(events.next().await.unwrap(), Event::Evicted { .. }) {} });
    evicted.await.expect("its connections end");
    let slack = stalls::slack_since(silent);
    assert!(silent.elapsed() < DEAD_AFTER + Duration::from_secs(3) + slack, "{how:?}: {:?}", silent.elapsed());
    timeout(LONG, sender).await.unwrap().unwrap();
}

/// Ends all sessions of the pool but this one.
async fn end_others(cluster: &Cluster, pid: i32) {
    let administrator = cluster.direct(Node(0)).await;
    let others = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'app' AND pid <> $1";
    eventually("the heartbeat's session is ended", LONG, async || {
        administrator.query_one(others, &[&pid]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
}

/// A session takes longer to open than a heartbeat may take: that is no reason to lose the primary.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_connects_do_not_flap() {
    let stage = Stage::start().await;
    stage.tap.turn_away(Some(TurnAway::Delay(Duration::from_millis(1500))));
    let builder = || stage.builder().heartbeat_timeout(Duration::from_secs(1)).probe_timeout(Duration::from_secs(5));
    // A stall may be longer than a heartbeat may take. A flap comes again in each of the seconds.
    stalls::unless_stalled(async || {
        let pool = builder().build().unwrap();
        let mut events = pool.subscribe();
        let taken = pool.get().await.unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            let all = futures_util::future::join_all((0..3).map(|_| pool.get())).await;
            assert!(all.iter().all(Result::is_ok));
            sleep(Duration::from_millis(100)).await;
        }
        drop(taken);
        let seen = std::iter::from_fn(|| futures_util::FutureExt::now_or_never(events.next()).flatten());
        let lost: Vec<Event> = seen.filter(|event| matches!(event, Event::PrimaryLost { .. })).collect();
        if lost.is_empty() { Ok(()) } else { Err(format!("{lost:#?}")) }
    })
    .await;
}

/// The heartbeat's own session is ended while no other can be had: what the pool has open serves on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_the_heart_beat_while_new_sessions_fail_is_no_loss() {
    let stage = Stage::start().await;
    let pool = stage.builder().build().unwrap();
    let client = pool.get().await.unwrap();
    heart_beats(&stage.cluster).await;
    let mut events = pool.subscribe();
    stage.tap.turn_away(Some(TurnAway::Reset));
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    end_others(&stage.cluster, pid).await;
    drop(client);
    let began = Instant::now();
    while began.elapsed() < DEAD_AFTER * 2 {
        let client = pool.get_within(PATIENT).await.unwrap();
        client.simple_query("SELECT 1").await.unwrap();
        drop(client);
        sleep(Duration::from_millis(20)).await;
    }
    let seen = std::iter::from_fn(|| futures_util::FutureExt::now_or_never(events.next()).flatten());
    let lost: Vec<Event> =
        seen.filter(|event| matches!(event, Event::PrimaryLost { .. } | Event::Evicted { .. })).collect();
    assert!(lost.is_empty(), "{lost:#?}");
}

/// The heartbeat's session is ended and no new one can be had, while the only connection checked out is silent, as its
/// statement takes long: the pool's idle connections show that the server lives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connections_speak_for_a_server_that_takes_no_new_session() {
    let stage = Stage::start().await;
    let pool = stage.builder().application_name("speaks").build().unwrap();
    let held = [pool.get().await.unwrap(), pool.get().await.unwrap(), pool.get().await.unwrap()];
    let mut pooled = Vec::new();
    for client in &held {
        pooled.push(client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get::<_, i32>(0));
    }
    let owner = stage.cluster.direct(stage.cluster.primary()).await;
    let others = "FROM pg_stat_activity WHERE application_name = 'speaks' AND pid <> ALL($1)";
    eventually("the heartbeat has its session", LONG, async || {
        owner.query_one(&format!("SELECT count(*) {others}"), &[&pooled]).await.unwrap().get::<_, i64>(0) > 0
    })
    .await;
    let [busy, idle @ ..] = held;
    drop(idle);
    let mut events = pool.subscribe();
    let statement = tokio::spawn(async move {
        let sleeps = DEAD_AFTER.as_secs() * 3;
        busy.batch_execute(&format!("SELECT pg_sleep({sleeps})")).await
    });
    sleep(Duration::from_secs(1)).await;
    stage.tap.turn_away(Some(TurnAway::Reset));
    owner.execute(&format!("SELECT pg_terminate_backend(pid) {others}"), &[&pooled]).await.unwrap();
    // Nobody asks for a connection meanwhile.
    timeout(LONG, statement).await.expect("an answer").unwrap().expect("it was ended");
    let mut seen = std::iter::from_fn(|| futures_util::FutureExt::now_or_never(events.next()).flatten());
    let left = seen.find(|event| matches!(event, Event::PrimaryLost { .. } | Event::Evicted { .. }));
    assert!(left.is_none(), "{left:?}");
    pool.get_within(Duration::from_secs(2)).await.unwrap().batch_execute("SELECT 1").await.unwrap();
}

/// Nobody uses the pool, the heartbeat's session was ended, and new ones hang. As long as an idle session answers, the
/// primary is kept; when nothing answers any more, it is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_pool_leaves_a_silent_primary_that_takes_no_new_session() {
    let stage = Stage::start().await;
    let pool = stage.builder().build().unwrap();
    let held = [pool.get().await.unwrap(), pool.get().await.unwrap()];
    heart_beats(&stage.cluster).await;
    let mut kept = Vec::new();
    for client in &held {
        kept.push(client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get::<_, i32>(0));
    }
    stage.tap.turn_away(Some(TurnAway::Hang));
    let admin = stage.cluster.direct(Node(0)).await;
    let others =
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'app' AND pid <> ALL ($1)";
    eventually("the heart-beat's session is ended", LONG, async || {
        admin.query_one(others, &[&kept]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
    drop(held);
    let mut events = pool.subscribe();
    let seen = timeout(DEAD_AFTER * 2, events.next()).await;
    assert!(seen.is_err(), "an idle session answers: {seen:?}");
    stage.tap.stall(true);
    let lost = timeout(LONG, async { while !matches!(events.next().await.unwrap(), Event::PrimaryLost { .. }) {} });
    lost.await.expect("it is lost");
}
