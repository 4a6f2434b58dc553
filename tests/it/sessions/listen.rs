//! LISTEN across failovers: what is notified is received, and where something may be missing, that is said.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt;
use testbed::{Cluster, Node, Path, Pooler, Tap, TurnAway, eventually};
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres_failover::error::UnavailableReason;
use tokio_postgres_failover::listen::{Listener, Message};
use tokio_postgres_failover::view::State;
use tokio_postgres_failover::{Error, Pool};

use crate::support::load::{LONG, by_name, by_url, generation};
use crate::support::{PATIENCE, stalls};

/// The sessions that listen, by what they asked last.
const LISTENING: &str =
    "SELECT pid FROM pg_stat_activity WHERE query LIKE '%SELECT pg_listening_channels%' AND pid <> pg_backend_pid()";

/// The next message, in a form that is easily compared: `channel: payload`, or `gap`, or `error`.
async fn next(listener: &mut Listener) -> String {
    let message = timeout(LONG, listener.recv()).await.expect("a message comes");
    match message {
        Some(Ok(Message::Notification(it))) => format!("{}: {}", it.channel(), it.payload()),
        Some(Ok(Message::MayHaveGap)) => "gap".to_owned(),
        Some(Err(error)) => format!("error: {error}"),
        None => "end".to_owned(),
    }
}

async fn notify(pool: &Pool, channel: &str, payload: &str) {
    let client = pool.get_within(LONG).await.unwrap();
    client.execute("SELECT pg_notify($1, $2)", &[&channel, &payload]).await.unwrap();
}

async fn listening(cluster: &Cluster) -> Vec<i32> {
    let rows = cluster.direct(cluster.primary()).await.query(LISTENING, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// The only session that listens. The one before may not have ended yet.
async fn only_listening(cluster: &Cluster) -> i32 {
    let mut pids = Vec::new();
    eventually("one session listens", PATIENCE, async || {
        pids = listening(cluster).await;
        pids.len() == 1
    })
    .await;
    pids[0]
}

/// The pool's checkout timeout may be shorter than a stall of the machine.
async fn listens(pool: &Pool, channel: &str) -> Listener {
    let mut listener = None;
    eventually("it listens", LONG, async || {
        listener = pool.listen([channel]).await.ok();
        listener.is_some()
    })
    .await;
    listener.unwrap()
}

async fn one_node() -> (Cluster, Pool) {
    let cluster = Cluster::builder().nodes(1).start().await;
    let pool = by_url(cluster.url_hosts()).build().unwrap();
    (cluster, pool)
}

/// Before, one mark, after; through two failovers. Nothing else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn notifications_go_on_after_each_failover_behind_one_mark() {
    let cluster = Cluster::start().await;
    let pool = by_name(&cluster).build().unwrap();
    let mut listener = pool.listen(["a", "b"]).await.unwrap();
    for round in 1..=2 {
        let client = pool.get().await.unwrap();
        let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
        client.batch_execute("NOTIFY a, 'before'; NOTIFY elsewhere, 'unheard'").await.unwrap();
        let Some(Ok(Message::Notification(it))) = timeout(LONG, listener.recv()).await.unwrap() else { panic!() };
        assert_eq!((it.channel(), it.payload(), it.process_id()), ("a", "before", pid));
        drop(client);

        let old = cluster.primary();
        cluster.kill(old).await;
        cluster.promote(cluster.most_advanced_standby().await).await;
        assert_eq!(next(&mut listener).await, "gap", "round {round}");
        // A second mark, or anything else, would come before what is notified now.
        notify(&pool, "b", "after").await;
        assert_eq!(next(&mut listener).await, "b: after");
        only_listening(&cluster).await;
        cluster.restart_as_standby(old).await;
    }
    assert_eq!(generation(&pool), 3);
}

/// The host stops without a word: the session ends with its generation, as the pool's do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_primary_is_left_behind() {
    let cluster = Cluster::start().await;
    let pool = by_name(&cluster).build().unwrap();
    let mut listener = pool.listen(["a"]).await.unwrap();
    cluster.freeze(cluster.primary());
    cluster.promote(cluster.most_advanced_standby().await).await;
    assert_eq!(next(&mut listener).await, "gap");
    notify(&pool, "a", "after").await;
    assert_eq!(next(&mut listener).await, "a: after");
}

/// A planned switch: the old primary is stopped, the listener is on the new one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_switch_over_is_a_gap_too() {
    let cluster = Cluster::start().await;
    let pool = by_name(&cluster).build().unwrap();
    let mut listener = pool.listen(["a"]).await.unwrap();
    cluster.switch_over(cluster.most_advanced_standby().await).await;
    assert_eq!(next(&mut listener).await, "gap");
    notify(&pool, "a", "after").await;
    assert_eq!(next(&mut listener).await, "a: after");
}

/// One session lost on a primary that is well: a mark, and no failover.
#[tokio::test]
async fn a_terminated_session_is_replaced() {
    let (cluster, pool) = one_node().await;
    let mut listener = pool.listen(["a"]).await.unwrap();
    for _ in 0..3 {
        let pid = only_listening(&cluster).await;
        cluster.direct(Node(0)).await.execute("SELECT pg_terminate_backend($1)", &[&pid]).await.unwrap();
        assert_eq!(next(&mut listener).await, "gap");
        notify(&pool, "a", "after").await;
        assert_eq!(next(&mut listener).await, "a: after");
    }
    assert_eq!(generation(&pool), 1);
}

/// A proxy that keeps the client's socket open when the session behind it has ended: only the question finds out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_loss_that_a_proxy_hides_is_found() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let listen = SocketAddr::new(cluster.spare_addr(0), cluster.port());
    let pooler = Pooler::start(listen, cluster.socket_addr(Node(0))).await;
    let pool = by_url(format!("postgres://app@{}/app", pooler.addr()));
    let pool = pool.heartbeat_interval(Duration::from_millis(50)).build().unwrap();
    let mut listener = pool.listen(["a"]).await.unwrap();
    let ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'";
    cluster.direct(Node(0)).await.execute(ended, &[]).await.unwrap();
    assert_eq!(next(&mut listener).await, "gap");
}

/// A dropped listener closes its session, and so does one that is dropped while it searches.
#[tokio::test]
async fn a_dropped_listener_closes_its_session() {
    let (cluster, pool) = one_node().await;
    let (one, two) = (pool.listen(["a"]).await.unwrap(), pool.listen(["a"]).await.unwrap());
    assert_eq!(listening(&cluster).await.len(), 2);
    drop(one);
    eventually("its session is closed", PATIENCE, async || listening(&cluster).await.len() == 1).await;
    cluster.kill(Node(0)).await;
    eventually("it is noticed", PATIENCE, async || matches!(pool.status().view.state, State::Searching { .. })).await;
    drop(two);
    cluster.start_node(Node(0)).await;
    pool.connect().await.unwrap();
    drop(pool.listen(["b"]).await.unwrap());
    eventually("no session listens", PATIENCE, async || listening(&cluster).await.is_empty()).await;

    // The last handle of the pool gone, the listener keeps it alive; with the listener everything ends.
    let mut last = pool.listen(["a"]).await.unwrap();
    drop(pool);
    cluster.direct(Node(0)).await.batch_execute("NOTIFY a, 'still'").await.unwrap();
    assert_eq!(next(&mut last).await, "a: still");
    drop(last);
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'";
    eventually("all sessions are closed", PATIENCE, async || {
        let count: i64 = cluster.direct(Node(0)).await.query_one(sessions, &[]).await.unwrap().get(0);
        count == 0
    })
    .await;
}

#[tokio::test]
async fn a_closed_pool_ends_the_stream() {
    let (cluster, pool) = one_node().await;
    let mut listener = pool.listen(["a"]).await.unwrap();
    notify(&pool, "a", "last").await;
    eventually("it has come", PATIENCE, async || format!("{listener:?}").contains("waiting: 1")).await;
    pool.close();
    assert_eq!(next(&mut listener).await, "a: last");
    assert_eq!(next(&mut listener).await, "end");
    assert!(matches!(pool.listen(["a"]).await, Err(Error::Closed)));
    eventually("its session is closed", PATIENCE, async || listening(&cluster).await.is_empty()).await;
}

/// A reader that stops holds up nobody and costs no more than a full backlog; one mark stands for what it missed.
#[tokio::test]
async fn a_slow_reader_gets_a_mark_in_place_of_what_it_missed() {
    let (_cluster, pool) = one_node().await;
    let mut listener = pool.listen(["a"]).await.unwrap();
    let client = pool.get().await.unwrap();
    client.execute("SELECT pg_notify('a', n::text) FROM generate_series(1, 5000) n", &[]).await.unwrap();
    // Up to its capacity, and the mark.
    eventually("it is full", PATIENCE, async || format!("{listener:?}").contains("waiting: 1025")).await;
    for number in 1..=1024 {
        assert_eq!(next(&mut listener).await, format!("a: {number}"));
    }
    assert_eq!(next(&mut listener).await, "gap");
    client.batch_execute("NOTIFY a, '9999'").await.unwrap();
    let mut before = 1024;
    while before < 9999 {
        // The end of the 5,000, if it came after there was room again; in order, and without another mark.
        let number: i32 = next(&mut listener).await.strip_prefix("a: ").unwrap().parse().unwrap();
        assert!(number > before, "{number} after {before}");
        before = number;
    }
}

/// Names are taken as they are; what the server does not take is told at once.
#[tokio::test]
async fn names_of_channels_are_quoted() {
    let (_cluster, pool) = one_node().await;
    let names = ["Für \"Elise\"", "a b; NOTIFY x", "select", "plain", "plain"];
    let mut listener = pool.listen(names).await.unwrap();
    for name in &names[..4] {
        notify(&pool, name, "1").await;
        assert_eq!(next(&mut listener).await, format!("{name}: 1"));
    }
    let error = pool.listen([""]).await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::SYNTAX_ERROR), "{error:?}");
    let error = pool.listen(["nul \0"]).await.unwrap_err();
    assert!(matches!(error, Error::Database(_)), "{error:?}");
}

/// An outage is told after the checkout timeout, and is no end: the listener comes back with the server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_outage_is_told_and_survived() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let pool = by_url(cluster.url_hosts()).checkout_timeout(Duration::from_secs(1)).build().unwrap();
    let mut listener = listens(&pool, "a").await;
    cluster.kill(Node(0)).await;
    // A slow machine may not get to the search within the first second.
    let mut told = next(&mut listener).await;
    while told.starts_with("error") && !told.starts_with("error: no writable primary within") {
        told = next(&mut listener).await;
    }
    assert!(told.starts_with("error: no writable primary within"), "{told}");
    assert!(matches!(pool.listen(["a"]).await, Err(Error::Unavailable(_))));
    cluster.start_node(Node(0)).await;
    // More than one second may have passed, so it may be told again before the mark.
    let mut told = next(&mut listener).await;
    while told.starts_with("error") {
        told = next(&mut listener).await;
    }
    assert_eq!(told, "gap");
    notify(&pool, "a", "after").await;
    assert_eq!(next(&mut listener).await, "a: after");
}

/// A listener that waits before its next try ends at once with the pool.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_pool_ends_the_pause_of_a_listener() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let pool = by_url(cluster.url_hosts()).checkout_timeout(Duration::from_millis(80)).build().unwrap();
    let mut listener = listens(&pool, "a").await;
    cluster.kill(Node(0)).await;
    // By then its pauses are some seconds long.
    for _ in 0..9 {
        let told = next(&mut listener).await;
        assert!(told.starts_with("error"), "{told}");
    }
    pool.close();
    let began = stalls::now();
    let mut told = next(&mut listener).await;
    while told.starts_with("error") {
        told = next(&mut listener).await;
    }
    assert_eq!(told, "end");
    let (took, slack) = (began.elapsed(), stalls::slack_since(began));
    assert!(took < Duration::from_millis(500) + slack, "after {took:?}");
}

/// As a stream, with its combinators; and `recv` loses nothing when it is dropped.
#[tokio::test]
async fn a_listener_is_a_stream() {
    let (_cluster, pool) = one_node().await;
    let mut listener = pool.listen(["a"]).await.unwrap();
    assert!(timeout(Duration::ZERO, listener.recv()).await.is_err());
    for payload in ["1", "2", "3"] {
        notify(&pool, "a", payload).await;
    }
    let payloads = listener.filter_map(async |message| match message {
        Ok(Message::Notification(it)) => Some(it.payload().to_owned()),
        _ => None,
    });
    let payloads: Vec<_> = timeout(LONG, payloads.take(3).collect()).await.unwrap();
    assert_eq!(payloads, ["1", "2", "3"]);
}

/// The session of a listener is none of the pool's: where it cannot be had in time, that all of the pool's are in use
/// is not the reason.
#[tokio::test]
async fn a_listener_without_a_session_is_not_told_that_the_pool_is_exhausted() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let path = Path::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let builder = Pool::builder(format!("postgres://app@{}/app", path.addr())).unwrap().max_size(1);
    // The primary is not to be lost meanwhile, for that would be the reason.
    let builder = builder.heartbeat_timeout(LONG);
    let pool = builder.checkout_timeout(Duration::from_secs(1)).build().unwrap();
    let _held = pool.get_within(LONG).await.unwrap();
    path.delay_log_ins(LONG);
    let error = pool.listen(["orders"]).await.map(drop).unwrap_err();
    let Error::Unavailable(unavailable) = &error else { panic!("{error:?}") };
    assert_eq!(unavailable.reason(), UnavailableReason::NoSession, "{error}");
}

/// A log-in takes longer than a caller waits: the listener's session is not thrown away at each checkout timeout.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listener_more_impatient_than_a_log_in_subscribes() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let tap = Tap::start(([127, 0, 0, 1], 0).into(), cluster.socket_addr(Node(0))).await;
    let builder = by_url(format!("postgres://app@{}/app", tap.addr()));
    let pool = builder.checkout_timeout(Duration::from_millis(300)).build().unwrap();
    tap.turn_away(Some(TurnAway::Delay(Duration::from_millis(600))));
    let mut listener = listens(&pool, "a").await;
    let old = only_listening(&cluster).await;
    cluster.direct(Node(0)).await.execute("SELECT pg_terminate_backend($1)", &[&old]).await.unwrap();
    let mut told = next(&mut listener).await;
    let mut errors = 0;
    while told.starts_with("error") && errors < 30 {
        (told, errors) = (next(&mut listener).await, errors + 1);
    }
    assert_eq!(told, "gap", "after {errors} errors");
    notify(&pool, "a", "after").await;
    assert_eq!(next(&mut listener).await, "a: after");
}

/// A large transaction is delivered slowly, and no answer can come before its end. Nothing of it is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_delivery_is_no_silence() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let path = Path::start(([127, 0, 0, 1], 0).into(), cluster.socket_addr(Node(0))).await;
    let beat = Duration::from_millis(50);
    let pool = by_url(format!("postgres://app@{}/app", path.addr())).heartbeat_interval(beat).build().unwrap();
    let mut listener = pool.listen(["a"]).await.unwrap();
    let old = only_listening(&cluster).await;
    // From now on for some seven seconds; the check has five.
    path.limit_rate(100_000);
    let sql = "SELECT pg_notify('a', n || repeat('x', 7000)) FROM generate_series(1, 100) n";
    cluster.direct(Node(0)).await.batch_execute(sql).await.unwrap();
    for number in 1..=100 {
        let told = next(&mut listener).await;
        assert!(told.starts_with(&format!("a: {number}x")), "{number}: {}", &told[..20.min(told.len())]);
    }
    path.limit_rate(0);
    assert_eq!(only_listening(&cluster).await, old);
}

/// The runtime that `listen` was called on ends. The session belongs to the pool's.
#[test]
fn a_listener_outlives_the_runtime_of_its_caller() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (home, other) = (runtime(), runtime());
    let (cluster, pool) = home.block_on(one_node());
    // The session that found the primary is in use, so that the listener opens one.
    let held = home.block_on(pool.get()).unwrap();
    let mut listener = other.block_on(pool.listen(["a"])).unwrap();
    other.shutdown_background();
    home.block_on(async {
        let old = only_listening(&cluster).await;
        notify(&pool, "a", "after").await;
        assert_eq!(next(&mut listener).await, "a: after");
        assert_eq!(only_listening(&cluster).await, old);
    });
    home.block_on(async move { drop((held, listener, pool, cluster)) });
}
