//! How often the pool asks where asking does not help: nobody knows the name, or the server refuses the log-in.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use testbed::{Answer, Cluster, Dns, Garbage, Node, Tap, eventually};
use tokio_postgres_failover::error::UnavailableReason;
use tokio_postgres_failover::view::State;
use tokio_postgres_failover::{Error, Pool};

use crate::support::PATIENCE;

/// How long the questions are counted.
const COUNTED: Duration = Duration::from_secs(4);

/// D1: whatever asks for a primary in a loop, a name that nobody knows is looked up about once a second, and `listen`
/// is told as soon as `get` is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_name_is_no_storm_of_questions() {
    let dns = Dns::start(([127, 0, 0, 1], 0).into()).await;
    dns.answer(Answer::NxDomain);
    let build = || Pool::builder("postgres://app@pg.internal/app").unwrap().dns_servers([dns.addr()]).build().unwrap();
    let (pool, began) = (build(), Instant::now());
    let error = pool.listen(["orders"]).await.map(drop).unwrap_err();
    assert!(began.elapsed() < PATIENCE / 2, "listen waits for {:?}", began.elapsed());
    let Error::Unavailable(unavailable) = &error else { panic!("{error:?}") };
    assert_eq!(unavailable.reason(), UnavailableReason::Dns);
    for how in ["get", "connect", "listen", "a transaction"] {
        let before = dns.queries();
        let began = Instant::now();
        while began.elapsed() < COUNTED {
            let tried = match how {
                "get" => pool.get().await.map(drop),
                "connect" => pool.connect().await,
                "listen" => pool.listen(["orders"]).await.map(drop),
                _ => pool.transaction(async |_| Ok(())).await,
            };
            assert!(matches!(tried, Err(Error::Unavailable(_))), "{how}: {tried:?}");
        }
        let queries = dns.queries() - before;
        println!("{how}: {queries} queries in {:?}", began.elapsed());
        // One question for each family.
        let seconds = began.elapsed().as_secs();
        assert!(queries <= 2 * (seconds + 2), "{how}: {queries} queries in {seconds} s");
    }
}

/// The same for servers of which waiting makes nothing else: what speaks another protocol.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_in_a_loop_does_not_hurry_what_is_no_server() {
    let stranger = Garbage::start(([127, 0, 0, 1], 0).into(), b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
    let tap = Tap::start(([127, 0, 0, 1], 0).into(), stranger.addr()).await;
    let pool = Pool::builder(format!("postgres://app@{}/app", tap.addr())).unwrap().build().unwrap();
    assert!(matches!(pool.get().await, Err(Error::Refused(_))));
    tap.reset();
    let began = Instant::now();
    while began.elapsed() < COUNTED {
        assert!(matches!(pool.get().await, Err(Error::Refused(_))));
    }
    let (connections, seconds) = (tap.counts().connections, began.elapsed().as_secs());
    println!("{connections} connections in {:?}", began.elapsed());
    // Each question may take two: one is to find out who answers.
    assert!(connections <= 10 * (seconds + 1), "{connections} connections in {seconds} s");
}

/// C9, C10: a password provider that was right once and is wrong now is tried once a second, whatever the number of
/// servers and callers, while there is a primary and while one is searched for; the callers wait, and are served when
/// it is right.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_that_goes_wrong_is_no_storm_of_log_ins() {
    let cluster = Cluster::builder().nodes(3).password("first").start().await;
    let mut taps = Vec::new();
    for node in cluster.nodes() {
        taps.push(Tap::start(([127, 0, 0, 1], 0).into(), cluster.socket_addr(node)).await);
    }
    let hosts: Vec<_> = taps.iter().map(|tap| tap.addr().to_string()).collect();
    let gives = Arc::new(Mutex::new("first"));
    let vault = Arc::clone(&gives);
    let pool = Pool::builder(format!("postgres://app@{}/app", hosts.join(",")))
        .unwrap()
        .patrol_interval(PATIENCE * 30)
        .password_provider(move || {
            let password = *vault.lock().unwrap();
            async move { Ok(password) }
        })
        .build()
        .unwrap();
    let held = pool.get().await.unwrap();
    let owner = cluster.direct(Node(0)).await;
    let mine: i32 = held.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'";
    eventually("the heartbeat has its session", PATIENCE, async || {
        owner.query_one(sessions, &[]).await.unwrap().get::<_, i64>(0) >= 2
    })
    .await;
    owner.batch_execute("ALTER ROLE app PASSWORD 'second'").await.unwrap();
    for node in cluster.nodes().into_iter().skip(1) {
        cluster.wait_replayed(node).await;
    }
    for searching in [false, true] {
        if searching {
            let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app' AND pid <> $1";
            owner.execute(end, &[&mine]).await.unwrap();
            let state = || pool.status().view.state;
            eventually("it is searched for", PATIENCE, async || matches!(state(), State::Searching { .. })).await;
        }
        taps.iter().for_each(Tap::reset);
        let began = Instant::now();
        let callers: Vec<_> = (0..16)
            .map(|_| {
                let pool = pool.clone();
                tokio::spawn(async move { pool.get_within(COUNTED).await.map(drop) })
            })
            .collect();
        for caller in callers {
            let waited = caller.await.unwrap();
            assert!(matches!(waited, Err(Error::Unavailable(_))), "searching: {searching}: {waited:?}");
        }
        let (took, startups) = (began.elapsed(), taps.iter().map(|tap| tap.counts().startups).sum::<u64>());
        println!("searching: {searching}: {startups} log-ins in {took:?}");
        // The pace allows two in a row at first.
        assert!(startups <= took.as_secs() + 3, "searching: {searching}: {startups} log-ins in {took:?}");
    }
    *gives.lock().unwrap() = "second";
    let client = pool.get_within(PATIENCE).await.unwrap();
    assert_eq!(client.generation(), held.generation());
    held.batch_execute("SELECT 1").await.unwrap();
}
