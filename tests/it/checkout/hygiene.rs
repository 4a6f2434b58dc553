//! What must not happen to a pool or through one: strangers' transactions, stray handles, starvation, a dead task.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use testbed::{Cluster, Tap, eventually};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_postgres_failover::error::Unsettled;
use tokio_postgres_failover::ledger::Ledger;
use tokio_postgres_failover::resolve::{Addresses, BoxFuture, Resolve, ResolveError};
use tokio_postgres_failover::view::State;
use tokio_postgres_failover::{BuildError, CommitOutcome, Error, Event, Guarantee, Pool, PoolBuilder, RetryPolicy};

use crate::support::load::create_table;
use crate::support::started_single;

const SECOND: Duration = Duration::from_secs(1);

fn builder(cluster: &Cluster) -> PoolBuilder {
    Pool::builder(cluster.url()).unwrap().dns_servers([cluster.dns().addr()])
}

async fn stored(cluster: &Cluster) -> i64 {
    cluster.direct(cluster.primary()).await.query_one("SELECT count(*) FROM entries", &[]).await.unwrap().get(0)
}

/// C6: a handle that outlives a closure which failed must not write after the rollback, outside any transaction.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c6_a_stray_handle_writes_nothing_after_a_failed_closure() {
    let cluster = started_single().await;
    let pool = builder(&cluster).max_size(2).build().unwrap();
    let (go, went) = oneshot::channel::<()>();
    let (tell, told) = oneshot::channel();
    let mut stray = Some((went, tell));
    let error = pool
        .transaction::<(), _, _>(|tx| {
            let (went, tell) = stray.take().expect("the closure runs once");
            async move {
                let tx = Arc::new(tx);
                let other = Arc::clone(&tx);
                tokio::spawn(async move {
                    went.await.unwrap();
                    let _ = tell.send(other.execute("INSERT INTO entries (id) VALUES (1)", &[]).await);
                });
                Err(Error::abort("own"))
            }
        })
        .await
        .unwrap_err();
    assert_eq!(error.commit_outcome(), CommitOutcome::NotCommitted);
    go.send(()).unwrap();
    assert!(told.await.unwrap().is_err(), "the session of the stray handle has ended");
    assert_eq!(stored(&cluster).await, 0);
}

/// K7: the server reports a cancelled wait for its standby as a warning and a success; a failover may lose such a
/// commit. It counts when the standby has it, and is unknown if it never gets it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k7_a_cancelled_wait_for_the_standby_counts_once_the_standby_has_it() {
    let cluster = Cluster::builder().nodes(2).start().await;
    create_table(&cluster).await;
    let admin = cluster.direct(cluster.primary()).await;
    Ledger::default().install(&admin).await.unwrap();
    admin.batch_execute("GRANT USAGE ON SCHEMA failover TO app; GRANT ALL ON failover.ledger TO app").await.unwrap();
    let pool = builder(&cluster).build().unwrap();
    pool.connect().await.unwrap();
    let standby = cluster.nodes().into_iter().find(|node| *node != cluster.primary()).unwrap();
    let (mut written, runs) = (0, AtomicUsize::new(0));
    for guarantee in [Guarantee::ExactlyOnce, Guarantee::Ledger(Ledger::default())] {
        for comes_back in [true, false] {
            println!("{guarantee:?}, the standby comes back: {comes_back}");
            cluster.freeze(standby);
            // What the standby does not get is unknown at the deadline.
            let deadline = if comes_back { 10 * SECOND } else { SECOND * 3 / 2 };
            let call = pool.build_transaction().guarantee(guarantee.clone()).deadline(deadline);
            let work = call.run(async |tx| {
                runs.fetch_add(1, Ordering::Relaxed);
                Ok(tx.batch_execute("INSERT INTO entries VALUES (1)").await?)
            });
            let fault = async {
                let waits = "FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query";
                let mut committing = Vec::<i32>::new();
                eventually("the commit's wait is cancelled", 10 * SECOND, async || {
                    let sql = format!("SELECT pid, pg_cancel_backend(pid) {waits} LIKE 'SET LOCAL%; COMMIT'");
                    committing = admin.query(&sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
                    !committing.is_empty()
                })
                .await;
                eventually("the settler waits for the standby", 10 * SECOND, async || {
                    let sql = format!("SELECT {waits} LIKE '%COMMIT' AND pid <> ALL ($1)");
                    !admin.query(&sql, &[&committing]).await.unwrap().is_empty()
                })
                .await;
                if comes_back {
                    cluster.thaw(standby);
                }
            };
            let both = async { tokio::join!(work, fault) };
            let (result, ()) = timeout(20 * SECOND, both).await.unwrap();
            if comes_back {
                result.unwrap();
            } else {
                let error = result.unwrap_err();
                let Error::CommitUnknown(unknown) = &error else { panic!("{error:?}") };
                assert_eq!(unknown.reason(), Unsettled::NotReplicated);
                assert!(error.to_string().contains("synchronous standby"), "{error}");
                cluster.thaw(standby);
            }
            written += 1;
            assert_eq!(
                (runs.load(Ordering::Relaxed), stored(&cluster).await),
                (written, i64::try_from(written).unwrap())
            );
        }
    }
}

/// C1: a caller of `get` that began a transaction by hand and left it open must not have it committed by the next one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c1_a_transaction_left_open_by_hand_is_not_committed_by_the_next_caller() {
    let cluster = started_single().await;
    let pool = builder(&cluster).max_size(1).build().unwrap();
    for left_behind in ["BEGIN; INSERT INTO entries (id) VALUES (7)", "BEGIN; SELECT 1/0"] {
        let client = pool.get().await.unwrap();
        let _ = client.batch_execute(left_behind).await;
        drop(client);
        pool.transaction(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await.unwrap();
        assert_eq!(stored(&cluster).await, 0, "after {left_behind}");
    }
}

/// A transaction that a caller of `get` began twice and ended is no concern of the next one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_connection_was_told_before_does_not_count() {
    let cluster = started_single().await;
    let pool = builder(&cluster).max_size(1).retry(RetryPolicy::none()).build().unwrap();
    pool.get().await.unwrap().batch_execute("BEGIN; BEGIN; COMMIT").await.unwrap();
    pool.transaction(async |tx| Ok(tx.batch_execute("INSERT INTO entries (id) VALUES (1)").await?)).await.unwrap();
    assert_eq!(stored(&cluster).await, 1);
}

/// S11: a server without a slot to spare, not even for the heartbeat, serves those who have one, without a pause.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s11_a_full_server_is_neither_left_nor_stalled() {
    let cluster = started_single().await;
    let admin = cluster.direct(cluster.primary()).await;
    admin.batch_execute("ALTER ROLE app CONNECTION LIMIT 4").await.unwrap();
    let pool = builder(&cluster)
        .max_size(8)
        .heartbeat_interval(Duration::from_millis(200))
        // A machine that stands still is not the server's silence.
        .heartbeat_timeout(10 * SECOND)
        .dead_after(SECOND)
        .checkout_timeout(10 * SECOND)
        .build()
        .unwrap();
    let until = Instant::now() + 4 * SECOND;
    let mut workers = JoinSet::new();
    for _ in 0..12 {
        let pool = pool.clone();
        workers.spawn(async move {
            let mut served = 0;
            while Instant::now() < until {
                pool.get().await.unwrap().query_one("SELECT 1, pg_sleep(0.01)", &[]).await.unwrap();
                served += 1;
            }
            served
        });
    }
    while let Some(served) = workers.join_next().await {
        assert!(served.unwrap() > 0, "a worker starved");
    }
    assert_eq!(pool.status().view.generation.get(), 1, "nobody was evicted");
}

/// A caller whose dial hangs at the old primary is not kept there when the new one is known.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dial_to_the_old_primary_is_left_when_a_new_one_is_found() {
    let cluster = Cluster::start().await;
    let pool = builder(&cluster)
        .probe_timeout(20 * SECOND)
        .heartbeat_interval(Duration::from_millis(100))
        .heartbeat_timeout(Duration::from_millis(300))
        .build()
        .unwrap();
    let _held = pool.get().await.unwrap();
    let old = cluster.primary();
    cluster.freeze(old);
    let waiter = tokio::spawn({
        let pool = pool.clone();
        async move { pool.get().await.map(|client| client.generation().get()) }
    });
    cluster.promote(cluster.most_advanced_standby().await).await;
    let generation = timeout(10 * SECOND, waiter).await.expect("the waiter follows").unwrap().unwrap();
    assert_eq!(generation, 2);
    cluster.thaw(old);
}

/// C7: when the runtime that the pool was built on is gone, it is closed, and does not go on unsupervised.
#[test]
fn c7_a_pool_whose_runtime_has_ended_is_closed() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (outer, inner) = (runtime(), runtime());
    let cluster = outer.block_on(started_single());
    let pool = inner.block_on(async {
        let pool = builder(&cluster).build().unwrap();
        pool.connect().await.unwrap();
        pool
    });
    drop(inner);
    let answer = outer.block_on(async { timeout(10 * SECOND, pool.get()).await });
    assert!(matches!(answer, Ok(Err(Error::RuntimeEnded))), "{answer:?}");
    assert!(matches!(pool.status().view.state, State::Closed));
    // The cluster's own connections live on the outer runtime.
    outer.block_on(async move { drop(cluster) });
}

/// Settings that mean "never" and "no limit" are taken as such.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_longest_durations_are_usable() {
    let cluster = started_single().await;
    let settings: [fn(PoolBuilder) -> PoolBuilder; 15] = [
        |builder| builder.checkout_timeout(Duration::MAX),
        |builder| builder.dead_after(Duration::MAX),
        |builder| builder.patrol_interval(Duration::MAX),
        |builder| builder.heartbeat_interval(Duration::MAX),
        |builder| builder.heartbeat_timeout(Duration::MAX),
        |builder| builder.probe_timeout(Duration::MAX),
        |builder| builder.poll_interval(Duration::MAX, Duration::MAX),
        |builder| builder.idle_timeout(Duration::MAX),
        |builder| builder.max_lifetime(Duration::MAX),
        |builder| builder.test_idle_after(Duration::MAX),
        |builder| builder.sleep_after(Duration::MAX),
        |builder| builder.accept_new_cluster_after(Duration::MAX),
        |builder| builder.retry(RetryPolicy::new().deadline(Duration::MAX).attempt_timeout(Duration::MAX)),
        |builder| builder.connection_gate(usize::MAX),
        |builder| builder.connection_gate(usize::MAX).max_size(1000).min_idle(1),
    ];
    for (index, setting) in settings.into_iter().enumerate() {
        let pool = setting(builder(&cluster)).build().unwrap();
        let client = timeout(10 * SECOND, pool.get()).await;
        assert!(matches!(client, Ok(Ok(_))), "setting {index}: {client:?}");
        let call = timeout(10 * SECOND, pool.transaction(async |tx| Ok(tx.batch_execute("SELECT 1").await?))).await;
        assert!(matches!(call, Ok(Ok(()))), "setting {index}: {call:?}");
    }
}

/// A number that no server can serve is refused, and names its option.
#[tokio::test]
async fn absurd_numbers_are_refused() {
    type Setting = fn(PoolBuilder) -> PoolBuilder;
    let settings: [(&str, Setting); 3] = [
        ("max_size", |builder| builder.max_size(usize::MAX)),
        ("max_size", |builder| builder.max_size(usize::MAX / 64).min_idle(usize::MAX / 64)),
        ("min_idle", |builder| builder.min_idle(usize::MAX)),
    ];
    for (option, setting) in settings {
        let error = setting(Pool::builder("postgres://app@127.0.0.1/app").unwrap()).build().map(drop).unwrap_err();
        assert!(matches!(error, BuildError::Invalid { option: named, .. } if named == option), "{error:?}");
    }
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").user("app");
    let with = |set: fn(&mut tokio_postgres::Config) -> &mut tokio_postgres::Config| {
        let mut config = config.clone();
        set(&mut config);
        Pool::builder(config).unwrap().build().map(drop)
    };
    for (option, built) in [
        ("keepalives_idle", with(|config| config.keepalives_idle(Duration::MAX))),
        ("keepalives_idle", with(|config| config.keepalives_idle(Duration::from_millis(1)))),
        ("keepalives_interval", with(|config| config.keepalives_interval(Duration::from_secs(40_000)))),
        ("keepalives_retries", with(|config| config.keepalives_retries(1000))),
        ("tcp_user_timeout", with(|config| config.tcp_user_timeout(Duration::MAX))),
    ] {
        let error = built.expect_err(option);
        assert!(matches!(error, BuildError::Invalid { option: named, .. } if named == option), "{error:?}");
    }
    with(|config| config.connect_timeout(Duration::MAX)).unwrap();
    with(|config| config.keepalives(false).keepalives_idle(Duration::MAX)).unwrap();
}

/// Rows that are kept for ever are a ledger all the same.
#[tokio::test]
async fn a_ledger_that_is_kept_for_ever_works() {
    let cluster = started_single().await;
    let ledger = Ledger::default().keep(Duration::MAX);
    let pool = builder(&cluster).guarantee(Guarantee::Ledger(ledger.clone())).build().unwrap();
    ledger.install(&pool.get().await.unwrap()).await.unwrap();
    let call = pool.transaction(async |tx| Ok(tx.batch_execute("CREATE TABLE kept (id int)").await?)).await;
    assert!(call.is_ok(), "{call:?}");
}

/// Callers that hold connections when the pool is closed have nothing to cancel, unless something is under way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_pool_cancels_only_what_runs() {
    let cluster = started_single().await;
    let tap = Tap::start(([127, 0, 0, 1], 0).into(), cluster.socket_addr(cluster.primary())).await;
    let pool = Pool::builder(format!("postgres://app@{}/app", tap.addr())).unwrap().max_size(9).build().unwrap();
    let mut held = Vec::new();
    for _ in 0..9 {
        held.push(pool.get().await.unwrap());
    }
    let busy = held.pop().unwrap();
    assert!(timeout(Duration::from_millis(300), busy.batch_execute("SELECT pg_sleep(600)")).await.is_err());
    pool.close();
    drop(held);
    drop(busy);
    let observer = cluster.direct(cluster.primary()).await;
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(600)' AND state = 'active'";
    eventually("what runs is cancelled", 20 * SECOND, async || {
        observer.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
    // A cancel request is sent three times, over about half a second, unless the server takes long for one.
    eventually("a request is sent", 20 * SECOND, async || tap.counts().cancels >= 1).await;
    sleep(SECOND * 3 / 2).await;
    assert!(tap.counts().cancels <= 3, "idle sessions were cancelled: {:?}", tap.counts());
}

/// Answers once, then panics.
struct Faulty {
    asked: AtomicUsize,
    address: IpAddr,
}

impl Resolve for Faulty {
    fn resolve<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Addresses, ResolveError>> {
        assert!(self.asked.fetch_add(1, Ordering::Relaxed) == 0, "a bug in the resolver");
        Box::pin(async { Ok(Addresses::new([self.address])) })
    }
}

/// A panic in a user's resolver costs that one answer, not the pool.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panicking_resolver_does_not_end_the_pool() {
    let cluster = started_single().await;
    let faulty = Arc::new(Faulty { asked: AtomicUsize::new(0), address: cluster.addr(cluster.primary()) });
    let pool =
        builder(&cluster).resolver(Arc::clone(&faulty)).patrol_interval(Duration::from_millis(100)).build().unwrap();
    pool.connect().await.unwrap();
    eventually("the resolver has panicked", 10 * SECOND, async || faulty.asked.load(Ordering::Relaxed) > 2).await;
    cluster.kill(cluster.primary()).await;
    cluster.start_node(cluster.primary()).await;
    let client = timeout(20 * SECOND, pool.get()).await.unwrap().unwrap();
    client.batch_execute("SELECT 1").await.unwrap();
}

/// A connection past its lifetime is not handed out again; the ages at which that happens are spread.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_connection_is_renewed() {
    let cluster = started_single().await;
    let pool = builder(&cluster).max_size(1).max_lifetime(Duration::from_millis(300)).build().unwrap();
    let backend = async || -> i32 {
        let client = pool.get().await.unwrap();
        client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0)
    };
    let mut first = backend().await;
    eventually("a young one is used again", 10 * SECOND, async || {
        let again = backend().await;
        std::mem::replace(&mut first, again) == again
    })
    .await;
    eventually("the connection is renewed", 10 * SECOND, async || backend().await != first).await;
    assert_eq!(pool.status().view.generation.get(), 1);
}

/// Idle connections are closed down to `min_idle`, and the pool that closes them still serves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connections_are_reaped_to_the_minimum() {
    let cluster = started_single().await;
    let pool = builder(&cluster).max_size(6).min_idle(2).idle_timeout(Duration::from_millis(300)).build().unwrap();
    let mut held = Vec::new();
    for _ in 0..6 {
        held.push(pool.get().await.unwrap());
    }
    assert_eq!(pool.status().size, 6);
    drop(held);
    eventually("four of six are closed", 10 * SECOND, async || pool.status().size == 2).await;
    let admin = cluster.direct(cluster.primary()).await;
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tokio-postgres-failover'";
    eventually("the server has seen it", 10 * SECOND, async || {
        // The two, and the heartbeat's.
        admin.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) <= 3
    })
    .await;
    pool.get().await.unwrap().batch_execute("SELECT 1").await.unwrap();
}

/// C2: an attempt past its limit is stopped on the server, its locks are free, and nothing of it is stored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c2_an_attempt_past_its_limit_is_stopped_on_the_server() {
    let cluster = started_single().await;
    let pool = builder(&cluster).max_size(2).build().unwrap();
    let limit = RetryPolicy::new().attempt_timeout(Duration::from_millis(300));
    // What is left of the limit when the closure begins does not depend on a log-in.
    drop(pool.get().await.unwrap());
    let runs = AtomicUsize::new(0);
    let error = pool
        .build_transaction()
        .retry(limit)
        .run(async |tx| {
            runs.fetch_add(1, Ordering::Relaxed);
            tx.batch_execute("INSERT INTO entries (id) VALUES (1); LOCK TABLE keyed; SELECT pg_sleep(600)").await?;
            Ok(())
        })
        .await
        .unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error:?}");
    assert_eq!((error.commit_outcome(), runs.into_inner()), (CommitOutcome::NotCommitted, 1));
    let admin = cluster.direct(cluster.primary()).await;
    eventually("the server has stopped it", 10 * SECOND, async || {
        let sql = "SELECT FROM pg_stat_activity WHERE query LIKE '%pg_sleep(600)%' AND pid <> pg_backend_pid()";
        admin.query(sql, &[]).await.unwrap().is_empty()
    })
    .await;
    pool.transaction(async |tx| Ok(tx.batch_execute("LOCK TABLE keyed NOWAIT").await?)).await.unwrap();
    assert_eq!(stored(&cluster).await, 0);
}

/// With warm sessions, the standby's own becomes the first connection to the promoted server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_warm_session_survives_the_promotion_of_its_standby() {
    let cluster = Cluster::start().await;
    let pool = Pool::builder(cluster.url_hosts()).unwrap().warm_standbys(true).max_size(2).build().unwrap();
    pool.connect().await.unwrap();
    let successor = cluster.most_advanced_standby().await;
    let admin = cluster.direct(successor).await;
    let sql = "SELECT min(pid) FROM pg_stat_activity WHERE application_name = 'tokio-postgres-failover'";
    let warm = async || admin.query_one(sql, &[]).await.unwrap().get::<_, Option<i32>>(0);
    eventually("the standby has a warm session", 10 * SECOND, async || warm().await.is_some()).await;
    let before = warm().await;
    let mut events = pool.subscribe();
    cluster.kill(cluster.primary()).await;
    cluster.promote(successor).await;
    let client = pool.get().await.unwrap();
    assert_eq!(client.generation().get(), 2);
    let searched = loop {
        match timeout(10 * SECOND, events.next()).await.expect("no event comes") {
            Some(Event::PrimaryFound { same_server: false, took, .. }) => break took,
            other => assert!(other.is_some(), "the events have ended"),
        }
    };
    // Whoever comes first serves the caller: this session, or one that was opened meanwhile. A search of more than a
    // second asks on new ones.
    let oldest = warm().await;
    assert!(oldest == before || searched > SECOND * 9 / 10, "{before:?}, and after {searched:?} {oldest:?}");
}
