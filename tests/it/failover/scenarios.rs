//! Rows of the scenario list that take a fault of their own; docs/scenarios.md says which test belongs to which row.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use futures_util::TryStreamExt as _;
use testbed::{Blackhole, Cluster, Eof, Node, Tap, eventually};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_postgres::IsolationLevel;
use tokio_postgres::error::SqlState;
use tokio_postgres_failover::view::State;
use tokio_postgres_failover::{Client, Error, RetryPolicy};

use crate::support::load::{
    Hung, LONG, Load, Write, by_name, by_url, create_table, generation, primary_lost, silent_primaries_hold_nobody,
    stalls_are_no_failure, unless_default,
};
use crate::support::{heart_beats, stalls, started, started_single};

const SECOND: Duration = Duration::from_secs(1);

async fn pid_of(client: &Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0)
}

async fn server_of(client: &Client) -> String {
    client.query_one("SELECT host(inet_server_addr())", &[]).await.unwrap().get(0)
}

async fn count(client: &tokio_postgres::Client, table: &str) -> i64 {
    client.query_one(&format!("SELECT count(*) FROM {table}"), &[]).await.unwrap().get(0)
}

/// S4: a server that shuts down smartly takes no new session; what is open works on, and growth waits for the next
/// primary.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s4_a_smart_shutdown_leaves_open_sessions_alone() {
    let cluster = started().await;
    let pool = by_name(&cluster).build().unwrap();
    let open = pool.get().await.unwrap();
    let pid = pid_of(&open).await;
    let old = cluster.primary();
    // The heartbeat has a session of its own by now.
    let administrator = cluster.direct(old).await;
    eventually("the heart beats", LONG, async || {
        let sql = "SELECT FROM pg_stat_activity WHERE usename = 'app' AND state = 'idle'";
        administrator.execute(sql, &[]).await.unwrap() >= 2
    })
    .await;
    cluster.stop_smart(old).await;
    eventually("new sessions are refused", LONG, async || cluster.try_direct(old).await.is_err()).await;
    let growth = tokio::spawn({
        let pool = pool.clone();
        async move { pool.get().await.map(|client| (client.generation().get(), client)) }
    });
    for _ in 0..25 {
        sleep(Duration::from_millis(100)).await;
        assert_eq!(pid_of(&open).await, pid, "what is open works on");
        open.execute("INSERT INTO entries (id) VALUES (1)", &[]).await.unwrap();
    }
    assert!(!growth.is_finished(), "no session is to be had");
    assert_eq!(generation(&pool), 1);

    drop(administrator);
    cluster.stop_fast(old).await;
    cluster.promote(cluster.most_advanced_standby().await).await;
    let (generation, client) = timeout(LONG, growth).await.unwrap().unwrap().expect("the next primary is found");
    assert_eq!(generation, 2);
    assert_eq!(server_of(&client).await, cluster.addr(cluster.primary()).to_string());
    eventually("what was open has ended", LONG, async || open.is_closed()).await;
}

/// A proxy in front of each node, by the node's number.
async fn taps(cluster: &Cluster) -> Vec<Tap> {
    let mut taps = Vec::new();
    for (spare, node) in (0..).zip(cluster.nodes()) {
        let listen = (cluster.spare_addr(spare), cluster.port()).into();
        taps.push(Tap::start(listen, cluster.socket_addr(node)).await);
    }
    taps
}

/// S8: the primary's host vanishes: nothing passes any more, and no RST tells. The calls that hang end with the
/// promotion. `ROUNDS=20` for figures.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s8_a_vanished_host_holds_nobody_once_another_is_promoted() {
    let cluster = started().await;
    let paths = taps(&cluster).await;
    // A new connection to a silent proxy is accepted and hears nothing; here not even a connect completes.
    let hole = Blackhole::start((cluster.spare_addr(9), cluster.port()).into()).await;
    let named: Vec<_> = [hole.addr()].into_iter().chain(paths.iter().map(Tap::addr)).map(|addr| addr.ip()).collect();
    cluster.dns().set(&named);
    let pool = by_name(&cluster).max_size(10).build().unwrap();
    silent_primaries_hold_nobody(&cluster, &pool, "vanish", |node, on| paths[node.0].stall(on)).await;
}

/// A proxy that can end one connection and leave the others alone.
struct Lanes {
    addr: SocketAddr,
    /// By the port from which the proxy speaks to the server; true for a RST.
    ends: Arc<Mutex<HashMap<u16, oneshot::Sender<bool>>>>,
    task: JoinHandle<()>,
}

impl Lanes {
    async fn start(listen: SocketAddr, upstream: SocketAddr) -> Self {
        let listener = TcpListener::bind(listen).await.unwrap();
        let ends: Arc<Mutex<HashMap<_, _>>> = Arc::default();
        let kept = Arc::clone(&ends);
        let task = tokio::spawn(async move {
            let mut lanes = JoinSet::new();
            while let Ok((mut client, _)) = listener.accept().await {
                let mut server = TcpStream::connect(upstream).await.unwrap();
                let (end, ended) = oneshot::channel();
                kept.lock().unwrap().insert(server.local_addr().unwrap().port(), end);
                lanes.spawn(async move {
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                        reset = ended => {
                            if reset == Ok(true) {
                                client.set_zero_linger().unwrap();
                            }
                        }
                    }
                });
            }
        });
        Self { addr: listen, ends, task }
    }

    fn end(&self, port: i32, reset: bool) {
        let end = self.ends.lock().unwrap().remove(&u16::try_from(port).unwrap()).expect("a lane");
        end.send(reset).expect("the lane is open");
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// S9: a connection breaks in the middle of a result, by RST and by FIN. It alone: the work is run again, and the other
/// connections, the generation and the primary stay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s9_a_connection_that_breaks_within_a_result_is_one_connection() {
    let cluster = started_single().await;
    let lanes = Lanes::start((cluster.spare_addr(0), cluster.port()).into(), cluster.socket_addr(Node(0))).await;
    cluster.dns().set(&[lanes.addr.ip()]);
    // A slow answer is no reason for doubt here.
    let pool = by_name(&cluster).heartbeat_timeout(LONG).build().unwrap();
    let bystander = pool.get().await.unwrap();
    let pid = pid_of(&bystander).await;
    let found = pool.status().view.changed.at;
    for reset in [true, false] {
        let runs = AtomicU32::new(0);
        let rows = pool.transaction(async |tx| {
            let run = runs.fetch_add(1, Ordering::Relaxed);
            tx.execute("INSERT INTO entries (id) VALUES ($1)", &[&i64::from(reset)]).await?;
            let port: i32 = tx.query_one("SELECT inet_client_port()", &[]).await?.get(0);
            let none: [&str; 0] = [];
            let sql = "SELECT repeat('x', 1000) FROM generate_series(1, 100000)";
            let mut rows = std::pin::pin!(tx.query_raw(sql, none).await?);
            let mut seen = 0_u32;
            while rows.try_next().await?.is_some() {
                seen += 1;
                if run == 0 && seen == 100 {
                    lanes.end(port, reset);
                }
            }
            Ok(seen)
        });
        let rows = timeout(LONG, rows).await.unwrap().expect("the work is run again");
        assert_eq!((rows, runs.into_inner()), (100_000, 2));
        assert_eq!(pid_of(&bystander).await, pid, "another connection was ended");
    }
    assert_eq!(count(&cluster.direct(Node(0)).await, "entries").await, 2);
    assert_eq!(generation(&pool), 1);
    assert_eq!(pool.status().view.changed.at, found, "{:?}", pool.status().view);
}

/// R4b: a standby is promoted while the old primary lives and answers. What the old one still takes is lost; the patrol
/// bounds it. `PATROL=default` for the figure at the pool's own interval.
///
/// The cluster is asynchronous: else the old primary's commits would wait for a standby that follows the new one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r4b_writes_leave_a_primary_that_was_replaced_behind_its_back() {
    let cluster = Cluster::builder().asynchronous().start().await;
    create_table(&cluster).await;
    let builder = by_name(&cluster).max_size(9);
    let (builder, patrol) = match unless_default("PATROL", Duration::from_millis(300)) {
        Some(patrol) => (builder.patrol_interval(patrol), patrol),
        None => (builder, 5 * SECOND),
    };
    let pool = builder.build().unwrap();
    let hung = Hung::on(pool.get().await.unwrap());
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    let still_there = cluster.direct(cluster.primary()).await;
    let accepted = cluster.promote_timed(cluster.most_advanced_standby().await).await.accepted_at;
    // The servers' clock is this one.
    let accepted_by_clock = SystemTime::now() - accepted.elapsed();
    let mut states = pool.watch();
    let view = timeout(LONG, states.wait_for(|view| view.generation.get() == 2)).await.unwrap().unwrap().clone();
    let moved = view.changed.at.into_std().saturating_duration_since(accepted);
    let slack = stalls::slack_since(accepted);
    let released = hung.released().await.saturating_duration_since(accepted);
    assert!(matches!(view.state, State::Primary { .. }), "{view:?}");
    load.all_written_since(Instant::now()).await;
    eventually("what was under way on the old primary is done", LONG, async || {
        let sql =
            "SELECT FROM pg_stat_activity WHERE usename = 'app' AND state <> 'idle' AND query NOT LIKE '%pg_sleep%'";
        still_there.execute(sql, &[]).await.unwrap() == 0
    })
    .await;
    let on_the_old_one = count(&still_there, "entries").await;
    assert!(on_the_old_one > 0, "that it was written to before can be seen");
    sleep(SECOND).await;
    assert_eq!(count(&still_there, "entries").await, on_the_old_one, "the old primary is written to");

    let outcome = load.stop(&cluster).await;
    let sql = "SELECT id, at > $1 FROM entries";
    let taken = still_there.query(sql, &[&accepted_by_clock]).await.unwrap();
    let kept = cluster.direct(cluster.primary()).await.query("SELECT id FROM entries", &[]).await.unwrap();
    let kept: HashSet<i64> = kept.iter().map(|row| row.get(0)).collect();
    let (late, early): (Vec<_>, Vec<_>) =
        taken.iter().filter(|row| !kept.contains(&row.get(0))).partition(|row| row.get::<_, bool>(1));
    println!(
        "writes moved {moved:?} after the promotion (patrol {patrol:?}), a hanging call ended after {released:?}; the \
         new primary lacks {} rows that the old one took after the promotion and {} of before; {} of {} writes were \
         acknowledged and lost",
        late.len(),
        early.len(),
        outcome.verdict.lost.len(),
        outcome.verdict.acknowledged
    );
    assert!(outcome.errors.is_empty(), "{:#?}", outcome.errors);
    assert!(outcome.verdict.doubled.is_empty() && outcome.verdict.untrue.is_empty(), "{:?}", outcome.verdict);
    assert!(moved < 2 * patrol + 2 * SECOND + slack, "{moved:?}");
    assert_eq!(generation(&pool), 2);
}

/// For so long at least the first search waits for other servers, when one is writable.
const OBJECTION: Duration = Duration::from_millis(100);

/// One pool, and one write. An error says that the primary answered too late to be heard, which a busy machine causes;
/// if the primary was in time and the zombie was chosen nevertheless, this panics.
async fn writes_to_the_newer(cluster: &Cluster, id: i64, [hosts, newer]: [&String; 2]) -> Result<(), String> {
    let began = stalls::now();
    let builder = if id % 2 == 0 { by_name(cluster) } else { by_url(hosts.clone()) };
    let pool = builder.build().unwrap();
    pool.transaction(async |tx| Ok(tx.execute("INSERT INTO entries (id) VALUES ($1)", &[&id]).await?)).await.unwrap();
    let client = pool.get().await.unwrap();
    let (server, generation) = (server_of(&client).await, generation(&pool));
    if server == *newer && generation == 1 {
        return Ok(());
    }
    let candidates = pool.candidates();
    let primary = candidates.iter().find(|it| it.endpoint.to_string().contains(newer.as_str()));
    let took = primary.filter(|it| it.answer.is_some()).and_then(|it| it.took);
    let said = candidates.iter().map(|said| format!("{said} after {:?}", said.took)).collect::<Vec<_>>();
    let said = format!("pool {id} is on {server}, in generation {generation}: {said:#?}");
    assert!(took.is_none_or(|took| took >= OBJECTION) || stalls::any_since(began), "{said}");
    Err(said)
}

/// R4: pools that are built when DNS, or the configuration, names a zombie first and the primary second.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r4_a_new_pool_prefers_the_higher_timeline_to_a_zombie_named_first() {
    let cluster = Cluster::builder().asynchronous().nodes(2).start().await;
    create_table(&cluster).await;
    let old = cluster.primary();
    cluster.stop_fast(old).await;
    let new = cluster.most_advanced_standby().await;
    cluster.promote(new).await;
    cluster.start_node(old).await;
    let zombie = cluster.direct(old).await;
    zombie.batch_execute("UPDATE testbed.probe SET writes = writes + 1").await.expect("the zombie takes writes");
    cluster.dns().set(&[cluster.addr(old), cluster.addr(new)]);
    let hosts =
        format!("postgres://app@{}:{port},{}:{port}/app", cluster.addr(old), cluster.addr(new), port = cluster.port());
    for id in 0..20_i64 {
        let deadline = Instant::now() + LONG;
        let mut tries = 0;
        while let Err(said) = writes_to_the_newer(&cluster, id, [&hosts, &cluster.addr(new).to_string()]).await {
            tries += 1;
            println!("pool {id}, try {tries}: the primary was late: {said}");
            assert!(Instant::now() < deadline, "the primary is never in time: {said}");
            zombie.batch_execute("TRUNCATE entries").await.unwrap();
        }
    }
    assert_eq!(count(&zombie, "entries").await, 0);
}

/// R7: a proxy leads to a standby and, from some moment on, each new session to the primary; it ends nobody's session.
/// The pool does not stay with the session that it has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r7_a_proxy_is_not_judged_by_one_session_for_ever() {
    let cluster = Cluster::builder().nodes(2).start().await;
    let proxy = Tap::start((cluster.spare_addr(0), cluster.port()).into(), cluster.socket_addr(Node(1))).await;
    cluster.dns().set(&[proxy.addr().ip()]);
    for warm in [false, true] {
        proxy.set_upstream(cluster.socket_addr(Node(1)));
        let pool = by_name(&cluster).warm_standbys(warm).build().unwrap();
        let waiting = tokio::spawn({
            let pool = pool.clone();
            async move { pool.get().await.map(drop) }
        });
        eventually("the pool has met the standby", LONG, async || {
            pool.candidates().iter().any(|said| said.to_string().contains("standby"))
        })
        .await;
        proxy.set_upstream(cluster.socket_addr(Node(0)));
        waiting.await.unwrap().unwrap();
    }
}

/// R7: a proxy hands out a standby every other moment. Nobody is given it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r7_a_standby_behind_a_proxy_is_never_handed_out() {
    let cluster = Cluster::builder().nodes(2).start().await;
    create_table(&cluster).await;
    let (primary, standby) = (cluster.socket_addr(Node(0)), cluster.socket_addr(Node(1)));
    let proxy = Tap::start((cluster.spare_addr(0), cluster.port()).into(), standby).await;
    cluster.dns().set(&[proxy.addr().ip()]);
    let pool = by_name(&cluster).patrol_interval(Duration::from_millis(200)).build().unwrap();
    let (stop, settled) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
    // How often each of them has looked, and how often after the proxy had settled.
    let looked: Arc<[[AtomicU32; 2]; 4]> = Arc::default();
    let mut takers = JoinSet::new();
    for taker in 0..4_usize {
        let (pool, stop, settled, looked) =
            (pool.clone(), Arc::clone(&stop), Arc::clone(&settled), Arc::clone(&looked));
        takers.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let late = settled.load(Ordering::Relaxed);
                let client = pool.get().await.expect("a primary comes by");
                // A connection may be ended under the question.
                if let Ok(row) = client.query_one("SELECT pg_is_in_recovery()", &[]).await {
                    assert!(!row.get::<_, bool>(0), "a standby was handed out");
                    looked[taker][usize::from(late)].fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }
    for round in 0..20_u64 {
        sleep(Duration::from_millis(60 + 7 * (round % 5))).await;
        proxy.set_upstream(if round % 2 == 0 { primary } else { standby });
        // As a proxy does that marks a server down.
        if round % 3 == 0 {
            proxy.close_connections();
        }
    }
    proxy.set_upstream(primary);
    settled.store(true, Ordering::Relaxed);
    let sum = || looked.iter().flatten().map(|count| count.load(Ordering::Relaxed)).sum::<u32>();
    eventually("each taker goes on after the proxy has settled, and many were looked at", LONG, async || {
        sum() > 100 && looked.iter().all(|[_, late]| late.load(Ordering::Relaxed) > 0)
    })
    .await;
    stop.store(true, Ordering::Relaxed);
    while let Some(taker) = timeout(LONG, takers.join_next()).await.expect("nobody is stuck") {
        taker.unwrap();
    }
    println!("{} connections were looked at, {} opened by the proxy", sum(), proxy.counts().connections);
    assert_eq!(generation(&pool), 1, "it was one server all the time: {:?}", pool.status().view);
}

/// R8: a proxy without a primary behind it accepts and hangs up, before the first connection and in the middle of the
/// work.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r8_a_proxy_that_hangs_up_is_asked_again() {
    let cluster = started_single().await;
    let nobody = Eof::start((cluster.spare_addr(0), cluster.port()).into()).await;
    let proxy = Tap::start((cluster.spare_addr(1), cluster.port()).into(), nobody.addr()).await;
    cluster.dns().set(&[proxy.addr().ip()]);
    let pool = by_name(&cluster).build().unwrap();
    let waiting = tokio::spawn({
        let pool = pool.clone();
        async move { pool.get().await.map(drop) }
    });
    eventually("it is asked again and again", LONG, async || nobody.accepted() > 5).await;
    assert!(!waiting.is_finished(), "it is no error of the caller's");
    proxy.set_upstream(cluster.socket_addr(Node(0)));
    let there = Instant::now();
    timeout(LONG, waiting).await.unwrap().unwrap().expect("there is a primary");
    println!("connected {:?} after there was a primary", there.elapsed());

    let load = Load::warm(&pool, 8, Write::Transaction).await;
    proxy.set_upstream(nobody.addr());
    proxy.close_connections();
    primary_lost(&pool).await;
    sleep(SECOND).await;
    proxy.set_upstream(cluster.socket_addr(Node(0)));
    load.all_written_since(Instant::now()).await;
    load.stop(&cluster).await.assert_flawless();
    assert_eq!(generation(&pool), 1, "it is the same server");
}

const HOT_STANDBY: &str =
    "DO $$ BEGIN RAISE 'cannot use serializable mode in a hot standby' USING ERRCODE = '0A000'; END $$";

/// R12: what a standby says to a serializable BEGIN. From a server that lost its role it is a reason to run again, as
/// it is with 25006; from a healthy primary it is the caller's error, and evicts nobody. The pool never begins on a
/// standby, so here the closure makes the server say it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r12_a_feature_that_a_standby_lacks_is_a_read_only_error() {
    let cluster = started().await;
    let pool = by_name(&cluster).build().unwrap();
    let runs = AtomicU32::new(0);
    let error = pool
        .transaction(async |tx| {
            runs.fetch_add(1, Ordering::Relaxed);
            Ok(tx.batch_execute(HOT_STANDBY).await?)
        })
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::FEATURE_NOT_SUPPORTED), "{error:?}");
    assert_eq!(runs.into_inner(), 1, "a healthy primary means what it says");
    assert_eq!(generation(&pool), 1);

    let old = cluster.primary();
    let runs = AtomicU32::new(0);
    pool.build_transaction()
        .isolation_level(IsolationLevel::Serializable)
        .run(async |tx| {
            if runs.fetch_add(1, Ordering::Relaxed) == 0 {
                cluster.set_read_only(old, true).await;
                cluster.promote(cluster.most_advanced_standby().await).await;
                tx.batch_execute(HOT_STANDBY).await?;
            }
            Ok(tx.execute("INSERT INTO entries (id) VALUES (1)", &[]).await?)
        })
        .await
        .expect("it is run again where it can be");
    assert_eq!(runs.into_inner(), 2);
    assert_eq!(generation(&pool), 2);
    assert_eq!(count(&cluster.direct(cluster.primary()).await, "entries").await, 1);
}

/// S7: a frozen primary and nobody promoted: what hangs is given up after `dead_after`, and the pool works when it
/// thaws. `DEAD_AFTER=default` for the figure with the pool's own settings.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s7_calls_on_a_frozen_primary_without_a_successor_end_after_dead_after() {
    let cluster = started_single().await;
    let builder = by_name(&cluster);
    let (builder, heartbeat, dead_after) = match unless_default("DEAD_AFTER", Duration::from_millis(1500)) {
        Some(dead_after) => {
            let heartbeat = Duration::from_millis(200);
            let builder = builder.heartbeat_interval(heartbeat).heartbeat_timeout(2 * heartbeat);
            (builder.dead_after(dead_after), heartbeat, dead_after)
        }
        None => (builder, SECOND, 20 * SECOND),
    };
    let pool = builder.build().unwrap();
    let hung = Hung::on(pool.get().await.unwrap());
    heart_beats(&cluster).await;
    let beaten = stalls::now();
    sleep(SECOND / 2).await;
    cluster.freeze(Node(0));
    let frozen = Instant::now();
    let work = tokio::spawn({
        let pool = pool.clone();
        let insert = "INSERT INTO entries (id) VALUES (1)";
        async move { pool.transaction(async |tx| Ok(tx.execute(insert, &[]).await?)).await }
    });
    let ended = hung.released().await - frozen;
    println!("the hanging call ended {ended:?} after the freeze, dead_after is {dead_after:?}");
    // It counts from the last answer, which came up to one heartbeat before the freeze; after a stall of the machine it
    // counts anew.
    let slack = stalls::slack_since(beaten);
    assert!(ended + 3 * heartbeat / 2 + slack > dead_after, "too early: {ended:?}");
    assert!(ended < dead_after + SECOND + slack, "too late: {ended:?}");
    assert!(!work.is_finished(), "what can be run again waits for a primary");
    cluster.thaw(Node(0));
    timeout(LONG, work).await.unwrap().unwrap().expect("the server is back");
    assert_eq!(generation(&pool), 2);
    assert_eq!(count(&cluster.direct(Node(0)).await, "entries").await, 1);
}

/// S12: the server stands still for a second and a half, again and again. `STALL_SECONDS=20` for longer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s12_stalls_in_a_row_are_no_failure() {
    let cluster = started().await;
    let pool = by_name(&cluster).max_size(10).build().unwrap();
    let freeze = |node, on| if on { cluster.freeze(node) } else { cluster.thaw(node) };
    stalls_are_no_failure(&cluster, &pool, "server", freeze).await;
}

/// S12: the same of the network.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s12_stalls_of_the_network_in_a_row_are_no_failure() {
    let cluster = started().await;
    let paths = taps(&cluster).await;
    cluster.dns().set(&paths.iter().map(|path| path.addr().ip()).collect::<Vec<_>>());
    let pool = by_name(&cluster).max_size(10).build().unwrap();
    stalls_are_no_failure(&cluster, &pool, "network", |node, on| paths[node.0].stall(on)).await;
}

/// C8: two thousand tasks wait through a failover on a pool of sixteen. All finish; the new primary meets a trickle.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c8_two_thousand_tasks_wait_through_a_failover() {
    const TASKS: i64 = 2000;
    let cluster = Cluster::builder().setting("log_connections", "on").start().await;
    create_table(&cluster).await;
    // Each task has the time that all of them take on a slow machine.
    let patient = RetryPolicy::new().deadline(2 * LONG);
    let pool = by_name(&cluster).max_size(16).checkout_timeout(2 * LONG).retry(patient).build().unwrap();
    pool.connect().await.unwrap();
    cluster.kill(cluster.primary()).await;
    primary_lost(&pool).await;
    let before = resident();
    let mut tasks = JoinSet::new();
    for id in 0..TASKS {
        let pool = pool.clone();
        tasks.spawn(async move {
            pool.idempotent(async |tx| {
                let sql = "INSERT INTO keyed (id) VALUES ($1) ON CONFLICT DO NOTHING";
                Ok::<_, Error>(tx.execute(sql, &[&id]).await?)
            })
            .await
            .map(|_| Instant::now())
        });
    }
    eventually("all wait", LONG, async || pool.status().waiting == usize::try_from(TASKS).unwrap()).await;
    let waiting = resident();
    let successor = cluster.most_advanced_standby().await;
    let (starts_before, _) = starts(&cluster.log(successor).await);
    stalls::watch();
    let promotion = cluster.promote_timed(successor).await;
    sleep(SECOND.saturating_sub(promotion.accepted_at.elapsed())).await;
    let starts_in_a_second = starts(&cluster.log(successor).await).0 - starts_before;
    // In what was more than a second there may be more.
    let polls = usize::try_from(stalls::lost_since(promotion.accepted_at).as_millis() / 100).unwrap();
    let mut last = promotion.accepted_at;
    while let Some(task) = timeout(2 * LONG, tasks.join_next()).await.expect("nobody is stuck") {
        last = last.max(task.unwrap().expect("all finish"));
    }
    let done = last - promotion.accepted_at;
    let (starts_in_all, at_once) = starts(&cluster.log(successor).await);
    println!(
        "{starts_in_a_second} connection starts within the first second, {} in all, at most {at_once} at the same time \
         (gate 4); all {TASKS} tasks done after {done:?}; {} bytes per waiting task",
        starts_in_all - starts_before,
        waiting.saturating_sub(before) / usize::try_from(TASKS).unwrap()
    );
    // Sixteen, the heartbeat's, the one that found it, and some for the polls of the search.
    assert!(starts_in_a_second <= 24 + polls, "{starts_in_a_second} connection starts");
    // The gate's four, and the cluster's own: a probe of the search, or the heartbeat's session.
    assert!(at_once <= 6, "{at_once} connections were being opened at the same time");
    assert_eq!(count(&cluster.direct(successor).await, "keyed").await, TASKS);
    assert_eq!(generation(&pool), 2);
}

/// S11, S12: no slot for a heartbeat, and a stall that costs it the session it had: the pool's own connections still
/// serve.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s11_a_full_server_that_stalls_is_used_again() {
    let cluster = started_single().await;
    let pool = by_name(&cluster).max_size(3).build().unwrap();
    let taken = [pool.get().await.unwrap(), pool.get().await.unwrap(), pool.get().await.unwrap()];
    heart_beats(&cluster).await;
    let administrator = cluster.direct(Node(0)).await;
    administrator.batch_execute("ALTER ROLE app CONNECTION LIMIT 1").await.unwrap();
    drop(taken);
    cluster.freeze(Node(0));
    primary_lost(&pool).await;
    cluster.thaw(Node(0));
    let client = pool.get().await.expect("three connections are open and idle");
    println!("served again; generation {}", client.generation().get());
    client.batch_execute("SELECT 1").await.unwrap();
}

/// How many sessions of the role `app` a server's log tells of, and how many of them were being opened at the same
/// time: from the fork of their backend to the end of authentication.
fn starts(log: &str) -> (usize, usize) {
    fn backend(line: &str) -> Option<&str> {
        Some(line.split_once('[')?.1.split_once(']')?.0)
    }
    let authorized = |line: &&str| line.contains("connection authorized: user=app");
    let ours: HashSet<_> = log.lines().filter(authorized).filter_map(backend).collect();
    let (mut opening, mut most) = (HashSet::new(), 0);
    for line in log.lines() {
        let Some(backend) = backend(line).filter(|backend| ours.contains(backend)) else { continue };
        if line.contains("connection received") {
            opening.insert(backend);
            most = most.max(opening.len());
        } else {
            opening.remove(backend);
        }
    }
    (ours.len(), most)
}

/// Bytes of memory that this process holds.
fn resident() -> usize {
    let statistics = std::fs::read_to_string("/proc/self/statm").unwrap();
    statistics.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}
