//! The primary changes its role, or somebody else claims it: what may no longer be used is no longer handed out.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use testbed::{Cluster, Node, Path, Tap, eventually};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tokio_postgres::error::SqlState;
use tokio_postgres_failover::connect::{ByteStream, Connect, Connecting};
use tokio_postgres_failover::error::{Unavailable, UnavailableReason};
use tokio_postgres_failover::view::{Address, Endpoint, State};
use tokio_postgres_failover::{Error, Pool};

use crate::support::load::{
    Hung, LONG, Load, Spread, Write, by_name, by_url, create_table, from_env, generation, ms, primary_lost,
};
use crate::support::{heart_beats, stalls, started};

/// Ten times what the issue asks of the writers after a demotion.
const PROMPT: Duration = Duration::from_secs(1);

/// One connection that was handed out: what its server said of itself.
struct Sighting {
    asked_at: Instant,
    server: String,
    in_recovery: bool,
}

/// Takes connections, some at a time, and asks each where it leads.
struct Watch {
    stop: Arc<AtomicBool>,
    looked: Arc<AtomicUsize>,
    task: JoinHandle<Vec<Sighting>>,
}

impl Watch {
    fn start(pool: &Pool, at_once: usize) -> Self {
        let (stop, looked) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let (pool, stopped, count) = (pool.clone(), Arc::clone(&stop), Arc::clone(&looked));
        let task = tokio::spawn(async move {
            let mut seen = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let taken = join_all((0..at_once).map(|_| pool.get())).await;
                for client in taken {
                    let client = client.expect("a primary comes up");
                    let asked_at = Instant::now();
                    let sql = "SELECT host(inet_server_addr()), pg_is_in_recovery()";
                    // A connection may end under the question: that is what a failover does.
                    if let Ok(row) = client.query_one(sql, &[]).await {
                        seen.push(Sighting { asked_at, server: row.get(0), in_recovery: row.get(1) });
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
            seen
        });
        Self { stop, looked, task }
    }

    /// Every connection from `since` on led to `server`, and none ever to a standby.
    async fn assert_only(self, server: String, since: Instant) {
        // Some that were begun before `since` may be counted after it.
        let enough = self.looked.load(Ordering::Relaxed) + 30;
        eventually("enough were looked at", LONG, async || self.looked.load(Ordering::Relaxed) >= enough).await;
        self.stop.store(true, Ordering::Relaxed);
        let seen = self.task.await.unwrap();
        assert!(seen.iter().all(|sighting| !sighting.in_recovery), "a standby was handed out");
        let late: Vec<_> = seen.iter().filter(|sighting| sighting.asked_at > since).collect();
        assert!(late.len() > 20, "only {} connections were looked at", late.len());
        for sighting in late {
            assert_eq!(sighting.server, server, "{:?} after the change", sighting.asked_at - since);
        }
    }
}

/// R2, R3: DNS names the old primary, a standby by now, for three seconds; the pool knew the members from before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stale_dns_leads_nobody_to_the_demoted_primary() {
    let cluster = started().await;
    let pool = by_name(&cluster).patrol_interval(Duration::from_millis(300)).build().unwrap();
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    let old = cluster.primary();
    let watch = Watch::start(&pool, 1);
    cluster.dns().set(&[cluster.addr(old)]);
    // Asked for A and AAAA: the pool has seen the new answer, which no longer names the others.
    let asked = cluster.dns().queries();
    eventually("the pool asks again", LONG, async || cluster.dns().queries() >= asked + 4).await;

    cluster.kill(old).await;
    let promotion = cluster.promote_timed(cluster.most_advanced_standby().await).await;
    cluster.restart_as_standby(old).await;
    load.all_written_since(Instant::now()).await;
    eventually("three seconds have passed", LONG, async || promotion.accepted_at.elapsed() > Duration::from_secs(3))
        .await;
    cluster.dns().set(&[cluster.addr(cluster.primary())]);
    load.all_written_since(Instant::now()).await;

    let slack = stalls::slack_since(promotion.accepted_at);
    let outcome = load.stop(&cluster).await;
    let (first, all) = outcome.recovery(promotion.accepted_at);
    println!("first write after {first:?}, all writers after {all:?}");
    assert!(all < 2 * PROMPT + slack, "the last writer wrote only after {all:?}");
    outcome.assert_flawless();
    watch.assert_only(cluster.addr(cluster.primary()).to_string(), promotion.accepted_at).await;
    assert_eq!(generation(&pool), 2);
}

/// R3, R6: the primary turns read-only under open connections, and a standby is promoted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn demotion_in_place() {
    let cluster = started().await;
    let pool = by_name(&cluster).build().unwrap();
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    cluster.set_read_only(cluster.primary(), true).await;
    primary_lost(&pool).await;
    let promotion = cluster.promote_timed(cluster.most_advanced_standby().await).await;
    load.all_written_since(Instant::now()).await;
    let slack = stalls::slack_since(promotion.accepted_at);
    let outcome = load.stop(&cluster).await;
    let (first, all) = outcome.recovery(promotion.accepted_at);
    println!("first write after {first:?}, all writers after {all:?}");
    outcome.assert_flawless();
    assert!(all < PROMPT + slack, "the last writer wrote only after {all:?}");
}

/// R5: a fence that open sessions do not feel. A standby takes over, and the fence, which is a row of the catalog, is
/// lifted there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_leave_a_fenced_primary() {
    let cluster = started().await;
    let pool = by_name(&cluster).heartbeat_interval(Duration::from_millis(200)).build().unwrap();
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    let old = cluster.primary();
    cluster.set_database_read_only(old, true).await;
    primary_lost(&pool).await;
    // The old primary lives on, and would ship to one standby what the other, promoted meanwhile, does not have.
    for standby in cluster.nodes().into_iter().filter(|node| *node != old) {
        cluster.stop_shipping(old, standby).await;
    }
    let successor = cluster.most_advanced_standby().await;
    cluster.promote(successor).await;
    cluster.set_database_read_only(successor, false).await;
    let lifted = Instant::now();
    load.all_written_since(lifted).await;
    let watch = Watch::start(&pool, 1);
    eventually("connections were taken for a while", LONG, async || lifted.elapsed() > Duration::from_secs(1)).await;
    watch.assert_only(cluster.addr(successor).to_string(), lifted).await;
    load.stop(&cluster).await.assert_flawless();
}

/// R5: with the default settings, and no successor that would draw it away, the pool leaves a primary within two
/// heartbeats of such a fence, although its open sessions could write on. `ROUNDS=20` for figures.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fenced_primary_is_left_within_two_heart_beats() {
    const HEARTBEAT: Duration = Duration::from_secs(1);
    let cluster = started().await;
    let pool = by_name(&cluster).max_size(9).build().unwrap();
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    // One that is open all the time, and feels nothing of a fence.
    let unaware = cluster.direct(cluster.primary()).await;
    let rounds = from_env("ROUNDS", 1);
    let [mut last_write, mut ended] = [const { Spread(Vec::new()) }; 2];
    let mut slack = Duration::ZERO;
    for round in 1..=rounds {
        // At another moment between two heartbeats in each round.
        sleep(Duration::from_millis(round * 370 % 1000)).await;
        let hung = Hung::on(pool.get().await.unwrap());
        let fenced = Instant::now();
        cluster.set_database_read_only(cluster.primary(), true).await;
        let end = hung.released().await;
        primary_lost(&pool).await;
        unaware.batch_execute("UPDATE testbed.probe SET writes = writes + 1").await.expect("open sessions write on");
        ended.0.push(end - fenced);
        // A writer may be acknowledged while the fence is being made.
        last_write.0.push(load.last_acknowledged().saturating_duration_since(fenced));
        slack = slack.max(stalls::slack_since(fenced));
        println!(
            "round={round} fault=fence ended_ms={} last_write_ms={}",
            ms(ended.0[ended.0.len() - 1]),
            ms(last_write.0[last_write.0.len() - 1])
        );
        cluster.set_database_read_only(cluster.primary(), false).await;
        load.all_written_since(Instant::now()).await;
    }
    println!("fence, {rounds} rounds: generation ended {ended} after it, last write accepted {last_write} after it");
    load.stop(&cluster).await.assert_flawless();
    assert_eq!(generation(&pool), rounds + 1);
    let bound = 2 * HEARTBEAT + Duration::from_secs(1) + slack;
    assert!(ended.0.iter().chain(&last_write.0).all(|took| *took <= bound), "longer than {bound:?}");
}

/// R5, R6: with no other primary, callers wait until their deadline and hear why; afterwards the pool writes again, on
/// sessions that were not opened under the fence, which would stay read-only.
async fn fenced_alone(fence: impl AsyncFn(&Cluster, bool)) {
    let cluster = Cluster::builder().nodes(1).start().await;
    create_table(&cluster).await;
    let deadline = Duration::from_secs(1);
    let pool = by_name(&cluster)
        .heartbeat_interval(Duration::from_millis(200))
        .checkout_timeout(deadline)
        .max_size(4)
        .build()
        .unwrap();
    let opened_before = pool.get_within(LONG).await.unwrap();
    // The heartbeat's session is open as well, and does not feel the fence of the database by itself.
    let administrator = cluster.direct(Node(0)).await;
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND state = 'idle'";
    eventually("the heart-beat has begun", LONG, async || {
        administrator.query_one(sessions, &[]).await.unwrap().get::<_, i64>(0) == 2
    })
    .await;
    fence(&cluster, true).await;
    primary_lost(&pool).await;
    eventually("the sessions of before are ended", LONG, async || opened_before.is_closed()).await;
    drop(opened_before);

    let began = Instant::now();
    assert_fenced(pool.get().await.unwrap_err(), deadline, began.elapsed());
    let began = Instant::now();
    let runs = AtomicU32::new(0);
    let transaction = pool.build_transaction().deadline(deadline).run(async |_| {
        runs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    });
    assert_fenced(transaction.await.unwrap_err(), deadline, began.elapsed());
    assert_eq!(runs.into_inner(), 0, "work was run on a fenced server");
    assert!(matches!(pool.status().view.state, State::Searching { .. }));

    fence(&cluster, false).await;
    let mut taken = Vec::new();
    for id in 0..4_i64 {
        let client = pool.get_within(LONG).await.expect("the fence is lifted");
        let row = client.query_one("SHOW default_transaction_read_only", &[]).await.unwrap();
        assert_eq!(row.get::<_, &str>(0), "off", "a session of the time under the fence");
        client.execute("INSERT INTO entries (id) VALUES ($1)", &[&id]).await.unwrap();
        taken.push(client);
    }
}

fn assert_fenced(error: Error, deadline: Duration, took: Duration) {
    let Error::Unavailable(unavailable) = error else { panic!("{error:?}") };
    let unavailable: &Unavailable = &unavailable;
    assert_eq!(unavailable.reason(), UnavailableReason::Fenced, "{unavailable}");
    let text = unavailable.to_string();
    assert!(text.contains("fenced") && text.contains("default_transaction_read_only"), "{text}");
    assert!(took >= deadline, "{took:?}");
}

/// R6
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fence_of_the_system_without_a_successor() {
    fenced_alone(async |cluster, on| cluster.set_read_only(Node(0), on).await).await;
}

/// R5
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fence_of_the_database_without_a_successor() {
    fenced_alone(async |cluster, on| cluster.set_database_read_only(Node(0), on).await).await;
}

/// Leads the connections that are opened while `on` is set over a path of their own.
struct Detour {
    path: SocketAddr,
    on: Arc<AtomicBool>,
}

impl Connect for Detour {
    fn connect<'a>(&'a self, endpoint: &'a Endpoint) -> Connecting<'a> {
        Box::pin(async move {
            let Address::Tcp(direct) = endpoint.address else { panic!("{endpoint}") };
            let to = if self.on.load(Ordering::SeqCst) { self.path } else { direct };
            Ok(Box::new(TcpStream::connect(to).await?) as Box<dyn ByteStream>)
        })
    }
}

/// R5: the heartbeat's session is dead without a sign, and the server answers the caller. No question on the dead
/// session would show the fence, so the pool opens another one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fence_is_seen_although_the_heart_beats_session_is_dead() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let path = Path::start((cluster.spare_addr(0), 0).into(), cluster.socket_addr(Node(0))).await;
    let on = Arc::new(AtomicBool::new(false));
    let detour = Detour { path: path.addr(), on: Arc::clone(&on) };
    let pool = by_url(format!("postgres://app@{}/app", cluster.socket_addr(Node(0))))
        .connector(detour)
        .max_size(1)
        .heartbeat_interval(Duration::from_millis(500))
        .heartbeat_timeout(Duration::from_secs(1))
        .patrol_interval(Duration::MAX)
        .build()
        .unwrap();
    let client = pool.get().await.unwrap();
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    // Each session but the caller's is opened again, on the path.
    on.store(true, Ordering::SeqCst);
    let others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app' AND pid <> $1";
    cluster.direct(Node(0)).await.execute(others, &[&pid]).await.unwrap();
    heart_beats(&cluster).await;
    assert!(path.accepted() > 0, "the heartbeat is on the path");
    on.store(false, Ordering::SeqCst);
    path.vanish();
    let caller = tokio::spawn(async move {
        let mut answers = 0_u32;
        while client.query_one("SELECT 1", &[]).await.is_ok() {
            answers += 1;
            sleep(Duration::from_millis(10)).await;
        }
        answers
    });
    cluster.set_database_read_only(Node(0), true).await;
    primary_lost(&pool).await;
    assert!(caller.await.unwrap() > 0, "the caller's connection was served");
    let view = pool.status().view;
    assert!(view.changed.why.contains("fenced"), "{view:?}");
}

/// R13: whoever makes his own transaction read-only and writes gets his error, once, and nobody else notices.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn own_read_only_transaction_that_writes_evicts_nobody() {
    let cluster = Cluster::builder().nodes(1).start().await;
    create_table(&cluster).await;
    // Nor is it left for a slow answer.
    let builder = by_name(&cluster).heartbeat_timeout(LONG).test_idle_after(Duration::MAX);
    let pool = builder.max_size(1).build().unwrap();
    let pid = backend_pid(&pool).await;
    let found = pool.status().view.changed.at;
    let runs = AtomicU32::new(0);
    let insert = "INSERT INTO entries (id) VALUES (1)";
    let answers = [
        pool.transaction(async |tx| {
            runs.fetch_add(1, Ordering::Relaxed);
            tx.batch_execute("SET TRANSACTION READ ONLY").await?;
            Ok(tx.batch_execute(insert).await?)
        })
        .await,
        pool.idempotent(async |tx| {
            runs.fetch_add(1, Ordering::Relaxed);
            tx.batch_execute("SET TRANSACTION READ ONLY").await?;
            Ok(tx.batch_execute(insert).await?)
        })
        .await,
        pool.build_transaction()
            .read_only(true)
            .run(async |tx| {
                runs.fetch_add(1, Ordering::Relaxed);
                Ok(tx.batch_execute(insert).await?)
            })
            .await,
    ];
    for answer in answers {
        let error = answer.unwrap_err();
        assert!(matches!(error, Error::Database(_)), "{error:?}");
        assert_eq!(error.code(), Some(&SqlState::READ_ONLY_SQL_TRANSACTION));
    }
    assert_eq!(runs.into_inner(), 3, "each is run once");
    assert_eq!(backend_pid(&pool).await, pid, "the connection was evicted");
    assert_eq!(generation(&pool), 1);
    assert_eq!(pool.status().view.changed.at, found, "{:?}", pool.status().view);
}

/// R14: the error is the caller's to route on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn write_in_read_is_returned() {
    let cluster = Cluster::builder().nodes(1).start().await;
    create_table(&cluster).await;
    // Nor is it left for a slow answer.
    let builder = by_name(&cluster).heartbeat_timeout(LONG).test_idle_after(Duration::MAX);
    let pool = builder.max_size(1).build().unwrap();
    let pid = backend_pid(&pool).await;
    let runs = AtomicU32::new(0);
    let answer = pool.read(async |tx| {
        runs.fetch_add(1, Ordering::Relaxed);
        Ok(tx.batch_execute("INSERT INTO entries (id) VALUES (1)").await?)
    });
    let error = answer.await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::READ_ONLY_SQL_TRANSACTION), "{error:?}");
    assert_eq!(runs.into_inner(), 1);
    assert_eq!(backend_pid(&pool).await, pid, "the connection was evicted");
    assert_eq!(generation(&pool), 1);
}

/// R4: an old primary that comes back writable is refused, also while it is the only writable server, and while new
/// connections are opened all the time. `ZOMBIE_SECONDS=60` for longer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zombie_is_never_used() {
    let beside = Duration::from_secs(from_env("ZOMBIE_SECONDS", 3));
    let cluster = Cluster::builder().asynchronous().setting("log_connections", "on").start().await;
    create_table(&cluster).await;
    let pool = by_name(&cluster)
        .patrol_interval(Duration::from_millis(200))
        .max_size(12)
        .max_lifetime(Duration::from_millis(300))
        .build()
        .unwrap();
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    let old = cluster.primary();
    // A clean stop, as an asynchronous standby need not have what was acknowledged before a kill.
    cluster.stop_fast(old).await;
    let promotion = cluster.promote_timed(cluster.most_advanced_standby().await).await;
    let successor = cluster.primary();
    // Beside the writers, so that the pool grows and shrinks.
    let watch = Watch::start(&pool, 4);
    load.all_written_since(Instant::now()).await;

    cluster.start_node(old).await;
    let zombie = cluster.direct(old).await;
    zombie.batch_execute("UPDATE testbed.probe SET writes = writes + 1").await.expect("the zombie takes writes");
    let rows = async || zombie.query_one("SELECT count(*) FROM entries", &[]).await.unwrap().get::<_, i64>(0);
    let opened = async || cluster.log(successor).await.matches("connection authorized: user=app").count();
    let (before, written_before, opened_before) = (rows().await, load.acknowledged(), opened().await);
    assert!(before > 0, "what was written to it as the primary is there");
    // The zombie first, then last.
    for named in [[old, successor], [successor, old]] {
        cluster.dns().set(&named.map(|node| cluster.addr(node)));
        let begun = Instant::now();
        eventually("half the time beside the zombie", beside + LONG, async || begun.elapsed() > beside / 2).await;
    }
    let opened = opened().await - opened_before;
    assert_eq!(generation(&pool), 2, "{:?}", pool.status().view);

    // A search, in which the zombie alone could be the primary.
    cluster.dns().set(&[cluster.addr(old), cluster.addr(successor)]);
    cluster.kill_backend(successor).await;
    load.all_written_since(Instant::now()).await;
    cluster.stop_immediate(successor).await;
    primary_lost(&pool).await;
    // A slow machine may not get to the zombie's answer within the first of these times.
    eventually("the zombie is refused", LONG, async || {
        let alone = pool
            .build_transaction()
            .deadline(Duration::from_secs(1))
            .run(async |tx| Ok(tx.query_one("SELECT host(inet_server_addr())", &[]).await?.get::<_, String>(0)));
        let error = alone.await.unwrap_err();
        println!("{error}");
        error.to_string().contains("an old primary: timeline 1")
    })
    .await;
    cluster.start_node(successor).await;

    load.all_written_since(Instant::now()).await;
    let written = load.acknowledged() - written_before;
    load.stop(&cluster).await.assert_flawless();
    watch.assert_only(cluster.addr(successor).to_string(), promotion.accepted_at).await;
    let on_the_zombie = rows().await - before;
    println!("{beside:?} beside a zombie, {opened} sessions opened: {written} writes, {on_the_zombie} on the zombie");
    assert_eq!(on_the_zombie, 0, "the zombie was written to");
}

/// R11: another cluster behind the name, first beside the real one, then alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_cluster_behind_the_name_is_refused() {
    let cluster = started().await;
    let foreign = Cluster::builder().nodes(1).foreign().start().await;
    let address = (cluster.spare_addr(0), cluster.port()).into();
    let stranger = Tap::start(address, foreign.socket_addr(Node(0))).await;
    let pool = by_name(&cluster).patrol_interval(Duration::from_millis(100)).build().unwrap();
    let load = Load::warm(&pool, 4, Write::Transaction).await;
    cluster.dns().set(&[address.ip(), cluster.addr(cluster.primary())]);
    eventually("the stranger was asked", LONG, async || stranger.counts().round_trips > 1).await;
    load.all_written_since(Instant::now()).await;
    assert_eq!(generation(&pool), 1, "{:?}", pool.status().view);

    // It is there, it is writable, and nobody else is: a failover must not end on it.
    let promotion = {
        cluster.kill(cluster.primary()).await;
        primary_lost(&pool).await;
        let asked = stranger.counts().round_trips;
        eventually("the stranger was asked in the search", LONG, async || stranger.counts().round_trips > asked).await;
        cluster.promote_timed(cluster.most_advanced_standby().await).await
    };
    load.all_written_since(promotion.accepted_at).await;
    load.stop(&cluster).await.assert_flawless();
    assert_eq!(generation(&pool), 2);

    cluster.dns().set(&[address.ip()]);
    for node in cluster.nodes() {
        if cluster.is_running(node) {
            cluster.kill(node).await;
        }
    }
    primary_lost(&pool).await;
    // A slow machine may not get to its answer within the first of these times.
    eventually("the stranger is refused", LONG, async || {
        let error = pool.get_within(Duration::from_secs(1)).await.unwrap_err();
        assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
        println!("{error}");
        error.to_string().contains("another cluster: system identifier")
    })
    .await;
}

async fn backend_pid(pool: &Pool) -> i32 {
    let client = pool.get().await.unwrap();
    client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0)
}
