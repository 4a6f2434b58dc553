//! Every wait ends: at its deadline with an error that explains itself, or at once where waiting is no use; and what is
//! silent delays nobody but itself.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use testbed::{Blackhole, Cluster, Eof, Node, Silent, Tap, eventually};
use tokio::task::JoinSet;
use tokio_postgres::NoTls;
use tokio_postgres_failover::error::{Unavailable, UnavailableReason};
use tokio_postgres_failover::view::{CandidateReport, State};
use tokio_postgres_failover::{CommitOutcome, Error, Pool, PoolBuilder, RetryPolicy};

use crate::support::PATIENCE;

const DEADLINE: Duration = Duration::from_millis(800);

/// With [`DEADLINE`] for all that waits.
fn builder(url: &str) -> PoolBuilder {
    Pool::builder(url).unwrap().checkout_timeout(DEADLINE).retry(RetryPolicy::new().deadline(DEADLINE))
}

fn url_of(addr: SocketAddr) -> String {
    format!("postgres://app@{addr}/app")
}

/// Ten per cent, and what a loaded machine takes to wake up, after a timer that ran beside.
fn assert_at_deadline(elapsed: Duration, timer: Duration) {
    let (earliest, latest) = (DEADLINE * 9 / 10, timer * 11 / 10 + Duration::from_millis(700));
    assert!(
        elapsed >= earliest && elapsed <= latest,
        "the deadline is {DEADLINE:?}, which a timer took {timer:?} for: the end came after {elapsed:?}"
    );
}

/// What a call returns, how long it takes, and how long a timer of [`DEADLINE`] takes beside it.
async fn beside_a_timer<T>(call: impl Future<Output = T>) -> (T, Duration, Duration) {
    let began = Instant::now();
    let timed = async { (call.await, began.elapsed()) };
    let beside = async {
        tokio::time::sleep(DEADLINE).await;
        began.elapsed()
    };
    let ((returned, elapsed), slept) = tokio::join!(timed, beside);
    (returned, elapsed, slept)
}

/// Runs a call that ends at the deadline, and returns what it returned.
async fn ends_at_the_deadline<T>(call: impl Future<Output = T>) -> T {
    let (returned, elapsed, timer) = beside_a_timer(call).await;
    assert_at_deadline(elapsed, timer);
    returned
}

/// Waits until all that the pool asks has been heard of, which a caller with a deadline may not see on a busy machine.
async fn each_has_answered(pool: &Pool) {
    eventually("each candidate has answered", PATIENCE, async || {
        let candidates = pool.candidates();
        !candidates.is_empty() && candidates.iter().all(|candidate| candidate.answer.is_some())
    })
    .await;
}

fn unavailable(error: Error) -> Unavailable {
    assert_eq!(error.commit_outcome(), CommitOutcome::NotCommitted);
    match error {
        Error::Unavailable(unavailable) => *unavailable,
        other => panic!("{other:?}"),
    }
}

/// All three calls at once, as each takes the whole deadline. Returns their texts.
async fn each_ends_at_the_deadline(pool: &Pool, reason: UnavailableReason) -> [String; 3] {
    let timed = async |call: &str| {
        let began = Instant::now();
        let error = ends_at_the_deadline(async {
            match call {
                "get" => pool.get().await.map(drop).unwrap_err(),
                "connect" => pool.connect().await.unwrap_err(),
                // Boxed: three of these futures on one stack are too large for it.
                _ => Box::pin(pool.transaction(async |tx| Ok(tx.batch_execute("SELECT 1").await?))).await.unwrap_err(),
            }
        })
        .await;
        let took = began.elapsed();
        let unavailable = unavailable(error);
        assert_eq!(unavailable.reason(), reason, "{call}: {unavailable}");
        assert_at_deadline(unavailable.waited(), took);
        unavailable.to_string()
    };
    tokio::join!(timed("get"), timed("connect"), timed("transaction")).into()
}

/// Acceptance 7, all dead: the error lists each candidate, and that it refuses.
#[tokio::test]
async fn all_dead_ends_at_the_deadline() {
    let cluster = Cluster::start().await;
    let pool = builder(&cluster.url_hosts()).build().unwrap();
    eventually("there is a primary", PATIENCE, async || pool.connect().await.is_ok()).await;
    for node in cluster.nodes() {
        cluster.kill(node).await;
    }
    // Nobody is told that a server died while nothing is asked of it: the next heartbeat sees it.
    eventually("the loss is seen", PATIENCE, async || {
        let refuses = |candidate: &CandidateReport| {
            candidate.answer.as_ref().is_some_and(|it| it.to_string().contains("refused"))
        };
        matches!(pool.status().view.state, State::Searching { .. }) && pool.candidates().iter().all(refuses)
    })
    .await;
    for text in each_ends_at_the_deadline(&pool, UnavailableReason::NoPrimary).await {
        for node in cluster.nodes() {
            assert!(text.contains(&cluster.socket_addr(node).to_string()), "{text}");
        }
        assert_eq!(text.matches("refused").count(), 3, "{text}");
    }
}

/// Acceptance 7, standbys only: the error says of each that it is one.
#[tokio::test]
async fn standbys_only_end_at_the_deadline() {
    let cluster = Cluster::start().await;
    cluster.kill(Node(0)).await;
    let pool = builder(&cluster.url_hosts()).build().unwrap();
    each_has_answered(&pool).await;
    for text in each_ends_at_the_deadline(&pool, UnavailableReason::NoPrimary).await {
        for node in [1, 2] {
            let said = format!("{}: standby", cluster.socket_addr(Node(node)));
            assert!(text.contains(&said), "{text}");
        }
        assert!(text.contains(&cluster.socket_addr(Node(0)).to_string()) && text.contains("promote"), "{text}");
    }
}

/// Acceptance 7, D1: no address at all is an error about DNS, with what DNS said.
#[tokio::test]
async fn an_empty_dns_answer_ends_at_the_deadline() {
    let dns = testbed::Dns::start(([127, 0, 0, 1], 0).into()).await;
    dns.answer(testbed::Answer::Empty);
    let pool = builder("postgres://app@pg.internal/app").dns_servers([dns.addr()]).build().unwrap();
    eventually("DNS has answered", PATIENCE, async || pool.dns_failure().is_some()).await;
    for text in each_ends_at_the_deadline(&pool, UnavailableReason::Dns).await {
        assert!(text.contains("DNS: ") && text.contains("pg.internal") && text.contains("name servers"), "{text}");
    }
    dns.answer(testbed::Answer::NxDomain);
    eventually("the newer answer is reported", PATIENCE, async || {
        let unavailable = unavailable(pool.connect().await.unwrap_err());
        unavailable.dns_failure().is_some_and(|failure| failure.contains("NXDOMAIN"))
    })
    .await;
}

/// Silence is an answer, too: the error says of each candidate that nothing came.
#[tokio::test]
async fn the_error_names_the_silent_ones() {
    let silent = Silent::start(([127, 0, 0, 1], 0).into()).await;
    let eof = Eof::start(([127, 0, 0, 1], 0).into()).await;
    let url = format!("postgres://app@{},{}/app", silent.addr(), eof.addr());
    let pool = builder(&url).probe_timeout(Duration::from_millis(200)).build().unwrap();
    each_has_answered(&pool).await;
    for text in each_ends_at_the_deadline(&pool, UnavailableReason::NoPrimary).await {
        assert!(text.contains(&silent.addr().to_string()) && text.contains("no answer within 200ms"), "{text}");
        assert!(text.contains(&eof.addr().to_string()), "{text}");
    }
}

/// Acceptance 7, C8: while 500 tasks wait, a server is asked once an interval, whatever it is like.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_waiting_tasks_are_one_search() {
    let cluster = Cluster::builder().nodes(2).asynchronous().start().await;
    cluster.kill(Node(0)).await;
    let standby = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(1))).await;
    let eof = Eof::start(SocketAddr::new(cluster.spare_addr(1), 0)).await;
    let silent = Silent::start(SocketAddr::new(cluster.spare_addr(2), 0)).await;
    let interval = Duration::from_millis(100);
    let pool = builder(&format!("postgres://app@{},{},{}/app", standby.addr(), eof.addr(), silent.addr()))
        .poll_interval(interval, interval)
        // A loaded machine must not let the standby look silent: its session would be closed and made anew.
        .probe_timeout(Duration::from_secs(10))
        .build()
        .unwrap();
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for task in 0..500 {
        let pool = pool.clone();
        tasks.spawn(async move {
            let error = match task % 2 {
                0 => pool.get().await.map(drop).unwrap_err(),
                _ => pool.transaction(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await.unwrap_err(),
            };
            unavailable(error).waited()
        });
    }
    while let Some(waited) = tasks.join_next().await {
        assert!(waited.unwrap() >= DEADLINE * 9 / 10);
    }
    let (counts, closed, hung) = (standby.counts(), eof.accepted(), silent.accepted());
    let elapsed = began.elapsed();
    // The pauses are spread by a quarter, so that many pools do not ask in step.
    let most = 1 + elapsed.as_millis() / (interval * 3 / 4).as_millis();
    // The standby has a session, on which it is asked three times as often.
    for (name, asked, most) in
        [("standby", counts.round_trips, 3 * most), ("eof", closed, most), ("silent", hung, most)]
    {
        assert!(u128::from(asked) <= most, "{name} was asked {asked} times in {elapsed:?}, not {most}");
    }
    // A search that lasts for long looks each second where a new session leads to.
    assert!(counts.startups <= 1 + elapsed.as_secs(), "a standby's session is kept: {counts:?} in {elapsed:?}");
    // The search goes on without the callers: on a machine that stood still they had no time to see much of it.
    eventually("each is asked again", PATIENCE, async || {
        standby.counts().round_trips >= 3 && eof.accepted() >= 3 && silent.accepted() >= 1
    })
    .await;
}

/// Acceptance 7: a pool whose connections are all in use says so, and names its size.
#[tokio::test]
async fn an_exhausted_pool_says_so() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let pool = builder(&cluster.url_hosts()).max_size(2).build().unwrap();
    let _held = (pool.get_within(PATIENCE).await.unwrap(), pool.get_within(PATIENCE).await.unwrap());
    let unavailable = unavailable(ends_at_the_deadline(pool.get()).await.unwrap_err());
    assert_eq!(unavailable.reason(), UnavailableReason::PoolExhausted);
    let text = unavailable.to_string();
    assert!(text.contains("all 2 connections") && text.contains("max_size"), "{text}");
}

/// S11: a server that is full: no eviction, its own words in the error, and the pool grows when there is room.
#[tokio::test]
async fn s11_a_full_server_keeps_what_is_open() {
    let cluster = Cluster::builder().nodes(1).setting("max_connections", "12").start().await;
    let builder = builder(&cluster.url_hosts()).max_size(8).heartbeat_interval(Duration::from_millis(50));
    // So that no primary is lost on a machine that stands still: the callers would be told of that.
    let pool = builder.heartbeat_timeout(Duration::from_secs(10)).build().unwrap();
    let open = pool.get_within(PATIENCE).await.unwrap();
    let backend: i32 = open.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    // Whether the heartbeat has its own session by now or finds no slot for it must not matter.
    let mut others = Vec::new();
    while let Ok((client, connection)) = tokio_postgres::connect(&url_of(cluster.socket_addr(Node(0))), NoTls).await {
        tokio::spawn(connection);
        others.push(client);
        assert!(others.len() < 12, "the server is never full");
    }
    assert!(!others.is_empty());

    // A session that ended while the slots were taken leaves one, which serves one caller. On a machine that stood
    // still a caller's time may be up before the server was asked.
    let mut kept = Vec::new();
    let mut unanswered = 0;
    let text = loop {
        match beside_a_timer(pool.get()).await {
            (Ok(connection), ..) => kept.push(connection),
            (Err(error), elapsed, timer) => {
                assert_at_deadline(elapsed, timer);
                let unavailable = unavailable(error);
                assert_eq!(unavailable.reason(), UnavailableReason::NoSession, "{unavailable}");
                let text = unavailable.to_string();
                if text.contains("53300") {
                    break text;
                }
                unanswered += 1;
                assert!(unanswered < 5, "{text}");
            }
        }
    };
    assert!(kept.len() <= 2, "{} callers found a slot at a full server", kept.len());
    assert!(text.contains("max_connections"), "{text}");
    assert!(text.contains("remaining connection slots") || text.contains("too many clients"), "{text}");

    let still: i32 = open.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    assert_eq!((still, pool.status().view.generation.get()), (backend, 1), "nobody is evicted");

    drop(others);
    let more = pool.get_within(PATIENCE).await.unwrap();
    assert_ne!(more.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get::<_, i32>(0), backend);
}

/// C7: closing ends the waiting at once, and the work in flight.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c7_closing_ends_everything() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let pool = Pool::builder(cluster.url_hosts()).unwrap().max_size(2).application_name("c7").build().unwrap();
    let held = pool.get().await.unwrap();
    let own = pool.clone();
    let working = tokio::spawn(async move {
        own.transaction(async |tx| {
            tx.batch_execute("SELECT pg_sleep(600)").await?;
            Ok(())
        })
        .await
    });
    eventually("the work is in flight", PATIENCE, async || pool.status().size == 2).await;
    let waiting: Vec<_> = (0..10)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move { pool.get().await.map(drop) })
        })
        .collect();
    eventually("ten callers wait", PATIENCE, async || pool.status().waiting == 10).await;

    let began = Instant::now();
    pool.close();
    for waiter in waiting {
        let error = waiter.await.unwrap().unwrap_err();
        assert!(matches!(error, Error::Closed), "{error:?}");
    }
    let error = working.await.unwrap().unwrap_err();
    assert_eq!(error.commit_outcome(), CommitOutcome::NotCommitted, "{error:?}");
    eventually("the connection in use has ended", PATIENCE, async || held.is_closed()).await;
    assert!(began.elapsed() < Duration::from_secs(10), "far below the deadline of 30 s");
    for error in [pool.get().await.map(drop).unwrap_err(), pool.connect().await.unwrap_err()] {
        assert!(matches!(error, Error::Closed), "{error:?}");
    }
    let error = pool.transaction(async |_| Ok(())).await.unwrap_err();
    assert!(matches!(error, Error::Closed), "{error:?}");
    no_session_left(&cluster, "c7").await;
}

/// C7: closing while there is no primary ends the search and its waiters.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c7_closing_ends_a_search() {
    let silent = Silent::start(([127, 0, 0, 1], 0).into()).await;
    let pool = Pool::builder(url_of(silent.addr())).unwrap().build().unwrap();
    let (getter, connecter) = (pool.clone(), pool.clone());
    let waiting = [
        tokio::spawn(async move { getter.get().await.map(drop) }),
        tokio::spawn(async move { connecter.connect().await }),
    ];
    eventually("a probe is under way", PATIENCE, async || silent.accepted() > 0 && pool.status().waiting > 0).await;
    pool.close();
    for waiter in waiting {
        let error = tokio::time::timeout(PATIENCE, waiter).await.unwrap().unwrap().unwrap_err();
        assert!(matches!(error, Error::Closed), "{error:?}");
    }
}

/// C7: the last handle's drop ends every session and every task, with connections idle, in use, and being opened.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c7_a_dropped_pool_leaves_nothing() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let before = tasks();
    let pool = Pool::builder(cluster.url_hosts())
        .unwrap()
        .application_name("c7")
        .heartbeat_interval(Duration::from_millis(20))
        .build()
        .unwrap();
    let idle = (pool.get().await.unwrap(), pool.get().await.unwrap());
    drop(idle);
    let in_use = pool.get().await.unwrap();
    let own = pool.clone();
    let opening = tokio::spawn(async move {
        let _two = (own.get().await, own.get().await);
        std::future::pending::<()>().await;
    });
    eventually("three are out", PATIENCE, async || pool.status().available == 0).await;
    opening.abort();
    drop(pool);
    in_use.batch_execute("SELECT 1").await.unwrap();
    drop(in_use);
    no_session_left(&cluster, "c7").await;
    eventually("no task is left", PATIENCE, async || tasks() <= before).await;
}

async fn no_session_left(cluster: &Cluster, application_name: &str) {
    let observer = cluster.direct(Node(0)).await;
    let sql = "SELECT FROM pg_stat_activity WHERE application_name = $1";
    eventually("no session is left", PATIENCE, async || {
        observer.query(sql, &[&application_name]).await.unwrap().is_empty()
    })
    .await;
}

/// The probe's own limit in the tests below; what takes less was not held up by a silent candidate, although the
/// machine may have stood still.
const PROBE: Duration = Duration::from_secs(20);
const UNDELAYED: Duration = Duration::from_secs(8);

/// Acceptance 8: candidates that are silent, that drop packets and that hang up do not delay the one that answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_candidates_delay_nobody() {
    let cluster = Cluster::start().await;
    let silent = Silent::start(SocketAddr::new(cluster.spare_addr(0), 0)).await;
    let blackhole = Blackhole::start(SocketAddr::new(cluster.spare_addr(1), 0)).await;
    let eof = Eof::start(SocketAddr::new(cluster.spare_addr(2), 0)).await;
    let hosts: Vec<_> = cluster.nodes().into_iter().map(|node| cluster.socket_addr(node).to_string()).collect();
    let url = format!("postgres://app@{},{},{},{}/app", silent.addr(), blackhole.addr(), eof.addr(), hosts.join(","));
    let pool = Pool::builder(url).unwrap().probe_timeout(PROBE).build().unwrap();
    let began = Instant::now();
    pool.connect().await.unwrap();
    pool.get().await.unwrap().batch_execute("SELECT 1").await.unwrap();
    assert!(began.elapsed() < UNDELAYED, "{:?}", began.elapsed());

    // And a failover, which asks all of them anew.
    cluster.kill(Node(0)).await;
    eventually("the loss is seen", PATIENCE, async || matches!(pool.status().view.state, State::Searching { .. }))
        .await;
    let promotion = cluster.promote_timed(cluster.most_advanced_standby().await).await;
    pool.transaction(async |tx| Ok(tx.batch_execute("CREATE TEMP TABLE t (id int)").await?)).await.unwrap();
    assert!(promotion.accepted_at.elapsed() < UNDELAYED, "{:?}", promotion.accepted_at.elapsed());
    assert!(silent.accepted() > 0, "the silent one was never asked");
}

/// Acceptance 8, each alone and named first: so that none hides behind the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_kind_of_silence_alone_delays_nobody() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let silent = Silent::start(SocketAddr::new(cluster.spare_addr(0), 0)).await;
    let blackhole = Blackhole::start(SocketAddr::new(cluster.spare_addr(1), 0)).await;
    let eof = Eof::start(SocketAddr::new(cluster.spare_addr(2), 0)).await;
    for trap in [silent.addr(), blackhole.addr(), eof.addr()] {
        let url = format!("postgres://app@{trap},{}/app", cluster.socket_addr(Node(0)));
        let pool = Pool::builder(url).unwrap().probe_timeout(PROBE).build().unwrap();
        let began = Instant::now();
        pool.connect().await.unwrap();
        assert!(began.elapsed() < UNDELAYED, "{trap}: {:?}", began.elapsed());
        assert_eq!(pool.status().view.generation.get(), 1);
    }
}
