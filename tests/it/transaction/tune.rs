//! What a user sets: presets, a word of its own on errors, the hook, the policy of one call, and names of Fly's DNS.

use std::ops::ControlFlow;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use testbed::{Answer, Cluster, Dns, Node};
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres_failover::fly::{Fly, FlyMachine};
use tokio_postgres_failover::resolve::{HickoryResolver, ResolveError};
use tokio_postgres_failover::retry::Retry;
use tokio_postgres_failover::{CommitOutcome, Error, Guarantee, Pool, RetryPolicy};

use crate::support::load::{LONG, by_name, by_url};
use crate::support::{PATIENCE, Runs, close_gate, committing, insert, sql, started, started_single, stored};

/// What the hook was told.
#[derive(Debug, PartialEq)]
struct Seen {
    attempt: u32,
    delay: Duration,
    elapsed: Duration,
    cause: String,
    outcome: CommitOutcome,
}

/// A hook that remembers, and stops the call after so many retries.
#[derive(Clone, Default)]
struct Hook(Arc<Mutex<Vec<Seen>>>);

impl Hook {
    fn policy(&self, policy: RetryPolicy, allowed: usize) -> RetryPolicy {
        let seen = Arc::clone(&self.0);
        policy.on_retry(move |retry: &Retry<'_>| {
            let mut seen = seen.lock().unwrap();
            seen.push(Seen {
                attempt: retry.attempt(),
                delay: retry.delay(),
                elapsed: retry.elapsed(),
                cause: retry.cause().to_string(),
                outcome: retry.commit_outcome(),
            });
            if seen.len() > allowed { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
    }

    fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

async fn one_node() -> (Cluster, Pool) {
    let cluster = started_single().await;
    let pool = by_url(cluster.url_hosts()).build().unwrap();
    (cluster, pool)
}

/// A transaction whose first run is in the midst of a statement when the primary dies; the next ones are short.
fn across_a_failover<'a>(
    cluster: &'a Cluster,
    pool: &'a Pool,
    policy: Option<RetryPolicy>,
) -> LocalBoxFuture<'a, (Result<(), Error>, u32)> {
    // Boxed, as it is large.
    async move {
        let (runs, running) = (Runs::default(), Notify::new());
        let mut builder = pool.build_transaction();
        if let Some(policy) = policy {
            builder = builder.retry(policy);
        }
        let work = builder.run(async |tx| {
            insert(&tx, 1).await?;
            if runs.begin() == 1 {
                running.notify_one();
                tx.batch_execute("SELECT pg_sleep(600)").await?;
            }
            Ok(())
        });
        let fault = async {
            running.notified().await;
            cluster.kill(cluster.primary()).await;
            cluster.promote_timed(cluster.most_advanced_standby().await).await;
        };
        let (result, ()) = timeout(LONG, Box::pin(async { tokio::join!(work, fault) })).await.expect("the call ends");
        (result, runs.count())
    }
    .boxed_local()
}

/// Fails with this SQLSTATE, as a function of the user's own may.
fn raise(code: &str) -> String {
    format!("DO $$ BEGIN RAISE EXCEPTION 'try again' USING ERRCODE = '{code}'; END $$")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_hook_sees_each_retry_of_a_failover() {
    let cluster = started().await;
    let hook = Hook::default();
    let pool = by_name(&cluster).retry(hook.policy(RetryPolicy::batch(), usize::MAX)).build().unwrap();
    let (result, runs) = across_a_failover(&cluster, &pool, None).await;
    result.unwrap();
    assert_eq!(stored(&cluster).await, [1]);
    let seen = hook.0.lock().unwrap();
    println!("{seen:?}");
    // An attempt may end before its closure has begun, so there may be more retries than runs.
    assert!(!seen.is_empty() && seen.len() + 1 >= runs as usize && runs >= 2, "{runs} runs");
    for (number, it) in seen.iter().enumerate() {
        assert_eq!((it.attempt as usize, it.outcome), (number + 1, CommitOutcome::NotCommitted));
        assert!(it.delay <= Duration::from_secs(10) && !it.cause.is_empty());
    }
    assert!(seen.is_sorted_by_key(|it| it.elapsed));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_hook_ends_a_call_with_its_last_error() {
    let cluster = started().await;
    let hook = Hook::default();
    let pool = by_name(&cluster).retry(hook.policy(RetryPolicy::new(), 0)).build().unwrap();
    let (result, runs) = across_a_failover(&cluster, &pool, None).await;
    let error = result.unwrap_err();
    let Error::Exhausted(exhausted) = &error else { panic!("{error:?}") };
    assert_eq!((exhausted.attempts(), runs, hook.count()), (1, 1, 1));
    assert!(matches!(exhausted.last_error(), Error::Database(_)), "{error:?}");
    assert!(error.to_string().contains("on_retry said stop"), "{error}");
    assert_eq!(error.commit_outcome(), CommitOutcome::NotCommitted);
    assert_eq!(stored(&cluster).await, [0_i64; 0]);
}

/// Work that may be applied twice is run again after a COMMIT without an answer; the hook is told, and its stop keeps
/// the doubt.
#[tokio::test]
async fn the_hook_is_told_of_a_doubt() {
    let (cluster, pool) = one_node().await;
    let gate = close_gate(&cluster).await;
    let hook = Hook::default();
    let work = pool
        .build_transaction()
        .guarantee(Guarantee::AtLeastOnce)
        .retry(hook.policy(RetryPolicy::new(), 0))
        .run(async |tx| insert(&tx, 1).await);
    let cut = async {
        let pid = committing(&gate).await;
        gate.execute("SELECT pg_terminate_backend($1)", &[&pid]).await.unwrap();
    };
    let (result, ()) = timeout(PATIENCE, async { tokio::join!(work, cut) }).await.unwrap();
    assert_eq!(hook.0.lock().unwrap()[0].outcome, CommitOutcome::Unknown);
    assert_eq!(result.unwrap_err().commit_outcome(), CommitOutcome::Unknown);
}

/// A panic of the user's functions goes to the caller: nothing is stored, no session is left in a transaction.
#[tokio::test]
async fn a_panic_in_a_hook_leaves_nothing_open() {
    let (cluster, pool) = one_node().await;
    for policy in [
        RetryPolicy::new().on_retry(|_| panic!("of the user's own")),
        RetryPolicy::new().classify(|_| panic!("of the user's own")),
    ] {
        let work = pool.build_transaction().retry(policy).run(async |tx| {
            insert(&tx, 1).await?;
            Ok(tx.batch_execute(&raise("40001")).await?)
        });
        let panic = AssertUnwindSafe(work).catch_unwind().await.unwrap_err();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"of the user's own"));
        let open = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND state LIKE 'idle in%'";
        let open: i64 = cluster.direct(Node(0)).await.query_one(open, &[]).await.unwrap().get(0);
        assert_eq!((open, pool.status().size, pool.status().available), (0, 1, 1));
    }
    pool.transaction(async |tx| insert(&tx, 2).await).await.unwrap();
    assert_eq!(stored(&cluster).await, [2]);
}

/// P0001 is run again, 40001 is not, 57014 is left to the built-in table; each in the call that says so.
#[tokio::test]
async fn a_users_word_goes_before_the_table() {
    let (cluster, pool) = one_node().await;
    let own = || {
        RetryPolicy::new().classify(|error| match error.code() {
            code if code.code() == "P0001" => Some(error.message() == "try again"),
            &SqlState::T_R_SERIALIZATION_FAILURE => Some(false),
            _ => None,
        })
    };
    // (the code, with the user's word, without it): how often it is run when the first two runs fail.
    for (code, with, without) in [("P0001", 3, 1), ("40001", 1, 3), ("40P01", 3, 3), ("57014", 1, 1)] {
        for (policy, expected) in [(own(), with), (RetryPolicy::new(), without)] {
            let runs = Runs::default();
            let result = pool
                .build_transaction()
                .retry(policy)
                .run(async |tx| {
                    insert(&tx, 1).await?;
                    if runs.begin() < 3 {
                        tx.batch_execute(&raise(code)).await?;
                    }
                    Ok(())
                })
                .await;
            assert_eq!(runs.count(), expected, "{code}");
            let failed = result.err().and_then(|error| error.code().map(|code| code.code().to_owned()));
            assert_eq!(failed.as_deref(), (expected == 1).then_some(code));
        }
    }
    // Once for each of the four that got through.
    assert_eq!(stored(&cluster).await, [1; 4]);
}

/// Also where the server refuses at COMMIT, and where the closure wraps the error into one of its own.
#[tokio::test]
async fn a_users_word_counts_for_a_refused_commit_and_a_wrapped_error() {
    let (cluster, pool) = one_node().await;
    sql(&cluster, "ALTER TABLE entries ADD UNIQUE (id) DEFERRABLE INITIALLY DEFERRED; INSERT INTO entries VALUES (1)")
        .await;
    let policy = RetryPolicy::new().classify(|error| (*error.code() == SqlState::UNIQUE_VIOLATION).then_some(true));
    let runs = Runs::default();
    let taken = async |tx: tokio_postgres_failover::Transaction| insert(&tx, i64::from(runs.begin())).await;
    pool.build_transaction().retry(policy.clone()).run(taken).await.unwrap();
    assert_eq!((runs.count(), stored(&cluster).await), (2, vec![1, 2]));

    let runs = Runs::default();
    let wrapped = pool.build_transaction().retry(policy).run(async |tx| {
        tx.batch_execute("SET CONSTRAINTS ALL IMMEDIATE").await?;
        let id = i64::from(runs.begin());
        tx.execute("INSERT INTO entries VALUES ($1)", &[&id]).await.map_err(|error| Error::abort(Box::new(error)))?;
        Ok(())
    });
    wrapped.await.unwrap();
    assert_eq!((runs.count(), stored(&cluster).await), (3, vec![1, 2, 3]));
}

/// A COMMIT without an answer stays what it is, whatever the user's word would be: it is not even asked.
#[tokio::test]
async fn no_word_runs_an_unknown_commit_again() {
    let (cluster, pool) = one_node().await;
    let gate = close_gate(&cluster).await;
    let (runs, asked) = (Runs::default(), Arc::new(AtomicU32::new(0)));
    let asks = Arc::clone(&asked);
    let policy = RetryPolicy::new().classify(move |_| {
        asks.fetch_add(1, Ordering::SeqCst);
        Some(true)
    });
    let work = pool.build_transaction().guarantee(Guarantee::AtMostOnce).retry(policy).run(async |tx| {
        runs.begin();
        insert(&tx, 1).await
    });
    let cut = async {
        let pid = committing(&gate).await;
        // The server's report (57P01) comes in place of COMMIT's answer.
        gate.execute("SELECT pg_terminate_backend($1)", &[&pid]).await.unwrap();
    };
    let (result, ()) = timeout(PATIENCE, async { tokio::join!(work, cut) }).await.unwrap();
    let error = result.unwrap_err();
    assert!(matches!(error, Error::CommitUnknown(_)), "{error:?}");
    assert_eq!((runs.count(), asked.load(Ordering::SeqCst)), (1, 0));
}

/// The call's policy replaces the pool's, hook and all; and `retry_policy` gives it to start from.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_calls_policy_replaces_the_pools() {
    let cluster = started().await;
    let (pools, calls) = (Hook::default(), Hook::default());
    let pool = by_name(&cluster).retry(pools.policy(RetryPolicy::none(), 9)).build().unwrap();
    let (result, runs) = across_a_failover(&cluster, &pool, Some(calls.policy(RetryPolicy::new(), 9))).await;
    result.unwrap();
    assert!(runs >= 2 && calls.count() >= 1, "{runs} runs");
    assert_eq!((pools.count(), stored(&cluster).await), (0, vec![1]));

    let fails = async |tx: tokio_postgres_failover::Transaction| Ok(tx.batch_execute(&raise("40001")).await?);
    let error = pool.transaction(fails).await.unwrap_err();
    assert_eq!((error.code(), pools.count()), (Some(&SqlState::T_R_SERIALIZATION_FAILURE), 0), "{error:?}");
    let twice = pool.retry_policy().clone().attempts(2);
    let error = pool.build_transaction().retry(twice).run(fails).await.unwrap_err();
    let Error::Exhausted(exhausted) = &error else { panic!("{error:?}") };
    assert_eq!((exhausted.attempts(), pools.count()), (2, 1));
}

/// Each preset across a failover, as its name says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn presets_across_a_failover() {
    for (policy, survives) in
        [(RetryPolicy::interactive(), true), (RetryPolicy::batch(), true), (RetryPolicy::none(), false)]
    {
        // The failover of a slow machine may take longer than the five seconds of the first one: then there is another
        // one.
        for round in 1..=3 {
            let cluster = started().await;
            let pool = by_name(&cluster).retry(policy.clone()).build().unwrap();
            pool.connect().await.unwrap();
            let began = Instant::now();
            let (result, runs) = across_a_failover(&cluster, &pool, None).await;
            if survives && round < 3 && result.is_err() && began.elapsed() >= Duration::from_secs(5) {
                continue;
            }
            match result {
                Ok(()) => assert!(survives && runs >= 2, "{policy:?}: {runs}"),
                Err(error) => {
                    assert!(!survives && runs == 1 && matches!(error, Error::Database(_)), "{policy:?}: {error:?}");
                }
            }
            assert_eq!(stored(&cluster).await, if survives { vec![1] } else { vec![] });
            break;
        }
    }
}

/// An outage that goes on: the interactive call tells of it, the batch call waits for it to end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn presets_in_a_long_outage() {
    let (cluster, pool) = one_node().await;
    pool.connect().await.unwrap();
    cluster.kill(Node(0)).await;
    let batch = tokio::spawn({
        let pool = pool.clone();
        async move { pool.build_transaction().retry(RetryPolicy::batch()).run(async |tx| insert(&tx, 1).await).await }
    });
    let interactive = pool.build_transaction().retry(RetryPolicy::interactive()).run(async |tx| insert(&tx, 2).await);
    let error = timeout(LONG, interactive).await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Unavailable(_) | Error::Exhausted(_)), "{error:?}");
    assert!(!batch.is_finished());
    let error = pool.get_within(Duration::from_millis(200)).await.unwrap_err();
    let Error::Unavailable(unavailable) = &error else { panic!("{error:?}") };
    // The pool's own limit is thirty seconds.
    assert!(unavailable.waited() < Duration::from_secs(20), "{:?}", unavailable.waited());
    cluster.start_node(Node(0)).await;
    timeout(LONG, batch).await.unwrap().unwrap().unwrap();
    assert_eq!(stored(&cluster).await, [1]);
}

#[cfg(feature = "backoff")]
mod with_backoff {
    use backoff::ExponentialBackoffBuilder;
    use backoff::backoff::{Backoff, Stop};

    use super::*;

    /// One of the user's own, shared by all calls: it must be reset for each.
    #[derive(Clone)]
    struct Own {
        left: u32,
        asked: Arc<AtomicU32>,
    }

    impl Backoff for Own {
        fn reset(&mut self) {
            self.left = 1000;
        }

        fn next_backoff(&mut self) -> Option<Duration> {
            self.asked.fetch_add(1, Ordering::SeqCst);
            self.left = self.left.checked_sub(1)?;
            Some(Duration::from_millis(5))
        }
    }

    /// The schedules of the `backoff` crate, one of the user's own, and one in a box, each across a real failover.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn schedules_of_the_backoff_crate_ride_through_a_failover() {
        let asked = Arc::new(AtomicU32::new(0));
        let own = Own { left: 0, asked: Arc::clone(&asked) };
        let boxed = own.clone();
        for policy in [
            RetryPolicy::new()
                .backoff(|| ExponentialBackoffBuilder::new().with_initial_interval(Duration::from_millis(5)).build()),
            RetryPolicy::new().backoff(move || own.clone()),
            RetryPolicy::new().backoff(move || -> Box<dyn Backoff + Send> { Box::new(boxed.clone()) }),
        ] {
            let cluster = started().await;
            let pool = by_name(&cluster).build().unwrap();
            let (result, runs) = across_a_failover(&cluster, &pool, Some(policy)).await;
            result.unwrap();
            assert!(runs >= 2, "{runs} runs");
            assert_eq!(stored(&cluster).await, [1]);
        }
        assert!(asked.load(Ordering::SeqCst) >= 2);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_schedule_that_stops_ends_the_call() {
        let cluster = started().await;
        let pool = by_name(&cluster).build().unwrap();
        let (result, runs) = across_a_failover(&cluster, &pool, Some(RetryPolicy::new().backoff(|| Stop {}))).await;
        let error = result.unwrap_err();
        assert!(error.to_string().contains("the retry schedule has ended"), "{error}");
        assert_eq!((runs, error.commit_outcome()), (1, CommitOutcome::NotCommitted));
    }
}

/// The names as Fly's DNS would answer them, asked on a name server and port of the user's choice.
#[tokio::test]
async fn flys_names_lead_to_the_primary() {
    let cluster = Cluster::start().await;
    let dns = cluster.dns();
    let members: Vec<_> = cluster.nodes().into_iter().map(|node| cluster.addr(node)).collect();
    for fly in [Fly::app("my-pg"), Fly::app("my-pg").region("ams"), Fly::app("my-pg").nearest(2)] {
        dns.answer_name(&fly.host(), Answer::Addresses(members.clone()));
        let pool = by_url(format!("postgres://app@{}:{}/app", fly.host(), cluster.port()));
        let pool = pool.dns_servers([dns.addr()]).build().unwrap();
        pool.get().await.unwrap();
        assert!(dns.queries_for(&fly.host()) > 0);
    }
    // The app itself was never asked for when a region or the nearest were meant.
    assert!(dns.queries_for("pg.internal") == 0);
}

/// `vms.<app>.internal`, in strings of 255 bytes as DNS cuts them.
#[tokio::test]
async fn flys_machines_are_listed() {
    let dns = Dns::start(([127, 0, 0, 1], 0).into()).await;
    let resolver = HickoryResolver::with_name_servers([dns.addr()]);
    let name = Fly::app("my-pg").machines();
    let error = resolver.text(&name).await.unwrap_err();
    assert!(matches!(error, ResolveError::NotFound { .. }), "{error:?}");
    dns.answer_name(&name, Answer::Empty);
    let error = resolver.text(&name).await.unwrap_err();
    assert!(matches!(error, ResolveError::NoAddresses { .. }), "{error:?}");
    dns.answer_name(&name, Answer::Text(vec!["148e21 ams,9185".to_owned(), "ab cdg".to_owned()]));
    let records = resolver.text(&name).await.unwrap();
    let machines: Vec<_> = records.iter().flat_map(|record| FlyMachine::read(record).unwrap()).collect();
    let machines: Vec<_> = machines.iter().map(|it| (it.id.as_str(), it.region.as_str())).collect();
    assert_eq!(machines, [("148e21", "ams"), ("9185ab", "cdg")]);
}
