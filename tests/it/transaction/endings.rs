//! The reason for which a server ends a session is kept: what would come again is run once and says what to do, what a
//! failover causes is run again.

use std::time::Duration;

use testbed::{Cluster, Cut, Cutter, Node, PgBouncer, eventually};
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres_failover::{CommitOutcome, Error, Pool, PoolBuilder, RetryPolicy, Transaction, deadpool_postgres};

use crate::sessions::versions::has_idle_session_timeout;
use crate::support::{PATIENCE, Runs, commits_call, insert, server, stored};

#[derive(Debug, PartialEq, thiserror::Error)]
#[error("sold out")]
struct SoldOut;

fn builder(cluster: &Cluster, options: &str) -> PoolBuilder {
    Pool::builder(format!("postgres://app@{}/app{options}", cluster.socket_addr(Node(0)))).unwrap().max_size(2)
}

/// Does nothing until the server has ended the session.
async fn idle(tx: &Transaction) {
    eventually("the session is closed", PATIENCE, async || tx.is_closed()).await;
}

/// What a closure does when it was idle for too long.
#[derive(Clone, Copy, Debug)]
enum Then {
    /// Another statement, whose error it passes on.
    Statement,
    /// Nothing: COMMIT finds out.
    Commit,
    /// An error of its own.
    Own,
    /// A text.
    Text,
}

const THEN: [Then; 4] = [Then::Statement, Then::Commit, Then::Own, Then::Text];

async fn do_then(tx: &Transaction, then: Then) -> Result<(), Error> {
    match then {
        Then::Statement => insert(tx, 2).await,
        Then::Commit => Ok(()),
        Then::Own => Err(Error::abort(SoldOut)),
        Then::Text => Err(Error::abort(insert(tx, 2).await.unwrap_err().to_string())),
    }
}

/// `idle_in_transaction_session_timeout`: 25 runs in 30 s once, and "connection closed" at the end.
#[tokio::test]
async fn a_limit_that_would_end_the_next_run_too_ends_the_call() {
    let cluster = server().await;
    let pool = builder(&cluster, "?options=-c%20idle_in_transaction_session_timeout%3D100ms").build().unwrap();
    for then in THEN {
        for read in [false, true] {
            let runs = Runs::default();
            let result = pool
                .build_transaction()
                .read_only(read)
                .run(async |tx| {
                    runs.begin();
                    // Only now is a transaction open.
                    tx.batch_execute("SELECT 1").await?;
                    idle(&tx).await;
                    do_then(&tx, then).await
                })
                .await;
            let error = result.unwrap_err();
            println!("{then:?}: {} runs: {error}", runs.count());
            assert_eq!(runs.count(), 1, "{then:?}: {error}");
            let Error::SessionEnded(ended) = &error else { panic!("{then:?}: {error:?}") };
            assert_eq!(ended.setting(), Some("idle_in_transaction_session_timeout"));
            assert_eq!(ended.report().code().code(), "25P03");
            assert_eq!(error.code().unwrap().code(), "25P03");
            assert_eq!(error.commit_outcome(), CommitOutcome::NotCommitted);
            for word in ["25P03", "idle_in_transaction_session_timeout", "before or after", "rolled back"] {
                assert!(error.to_string().contains(word), "{error} lacks {word:?}");
            }
            if matches!(then, Then::Own) {
                assert_eq!(error.downcast_ref::<SoldOut>(), Some(&SoldOut));
                assert_eq!(error.downcast::<SoldOut>().unwrap(), SoldOut);
            }
        }
    }
    assert_eq!(stored(&cluster).await, [0_i64; 0]);
}

/// A deferred trigger makes COMMIT take longer than a limit allows. `statement_timeout` is over before COMMIT ends the
/// transaction. `transaction_timeout`, of PostgreSQL 17, ends the session instead of an answer: the call finds out that
/// nothing was committed, and does not run the work again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_that_ends_commit_ends_the_call() {
    let cluster = server().await;
    commits_call(&cluster, "pg_sleep(2)").await;
    let known = "SELECT name FROM pg_settings WHERE name IN ('statement_timeout', 'transaction_timeout')";
    for row in cluster.direct(Node(0)).await.query(known, &[]).await.unwrap() {
        let limit: &str = row.get(0);
        // Less than COMMIT takes, and more than a slow machine needs for what comes before it.
        let pool = builder(&cluster, &format!("?options=-c%20{limit}%3D1500ms")).build().unwrap();
        let runs = Runs::default();
        let work = pool.transaction(async |tx| {
            runs.begin();
            insert(&tx, 1).await
        });
        let result = work.await;
        println!("{limit}: {} runs: {result:?}", runs.count());
        assert_eq!(runs.count(), 1, "{limit}");
        if limit == "statement_timeout" {
            result.unwrap();
            continue;
        }
        let error = result.unwrap_err();
        assert_eq!(error.commit_outcome(), CommitOutcome::NotCommitted, "{error}");
        assert_eq!(error.code().map(SqlState::code), Some("25P04"), "{error:?}");
    }
    assert_eq!(stored(&cluster).await, [1]);
}

/// The next caller is not told of what ended a session that somebody left in a transaction.
#[tokio::test]
async fn what_ended_a_session_before_it_was_used_costs_nobody_anything() {
    let cluster = server().await;
    // In this session alone: the next caller's must not end before it is used.
    let idle_inside = "SET idle_in_transaction_session_timeout = '100ms'; BEGIN";
    let idle_outside = has_idle_session_timeout(&cluster).await.then_some("SET idle_session_timeout = '100ms'");
    let pool = builder(&cluster, "?application_name=victim").max_size(1).build().unwrap();
    for limit in [Some(idle_inside), idle_outside] {
        let client = pool.get().await.unwrap();
        if let Some(limit) = limit {
            client.batch_execute(limit).await.unwrap();
        } else {
            cluster.terminate_backends(Node(0), "victim").await;
        }
        eventually("the session is closed", PATIENCE, async || client.is_closed()).await;
        drop(client);
        let runs = Runs::default();
        pool.transaction(async |tx| {
            runs.begin();
            insert(&tx, 1).await
        })
        .await
        .unwrap();
        assert_eq!(runs.count(), 1);
    }
}

/// `idle_session_timeout`, or an administrator where there is none, of a connection that its user keeps.
#[tokio::test]
async fn a_user_of_get_is_told_how_the_session_ended() {
    let cluster = server().await;
    let limits_idleness = has_idle_session_timeout(&cluster).await;
    let pool = builder(&cluster, "?application_name=victim").build().unwrap();
    let client = pool.get().await.unwrap();
    assert!(client.session_end().await.is_none());
    if limits_idleness {
        // Not for the sessions to come: they must not end before they are used.
        client.batch_execute("SET idle_session_timeout = '100ms'").await.unwrap();
    } else {
        cluster.terminate_backends(Node(0), "victim").await;
    }
    eventually("the session is closed", PATIENCE, async || client.is_closed()).await;
    assert!(client.batch_execute("SELECT 1").await.unwrap_err().is_closed());
    let code = if limits_idleness { "57P05" } else { "57P01" };
    assert_eq!(client.session_end().await.unwrap().code().code(), code);

    // A report that was the answer to a statement is kept, too.
    let client = pool.get().await.unwrap();
    let error = client.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())").await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "57P01");
    assert_eq!(client.session_end().await.unwrap().code().code(), "57P01");
}

/// An administrator, or a shutdown: run again, whatever the closure makes of it; and the reason is told where nothing
/// is.
#[tokio::test]
async fn what_an_administrator_ended_is_run_again() {
    let cluster = server().await;
    let pool = builder(&cluster, "?application_name=victim").build().unwrap();
    for then in THEN {
        let runs = Runs::default();
        pool.transaction(async |tx| {
            if runs.begin() == 1 {
                cluster.terminate_backends(Node(0), "victim").await;
                idle(&tx).await;
                return do_then(&tx, then).await;
            }
            insert(&tx, 1).await
        })
        .await
        .unwrap();
        assert_eq!(runs.count(), 2, "{then:?}");

        let once = pool.build_transaction().retry(RetryPolicy::none());
        let ended = once.run(async |tx| {
            cluster.terminate_backends(Node(0), "victim").await;
            idle(&tx).await;
            do_then(&tx, then).await
        });
        let error = ended.await.unwrap_err();
        assert_eq!(error.code().unwrap().code(), "57P01", "{then:?}: {error:?}");
        assert!(error.to_string().contains("57P01"), "{error}");
    }
    assert_eq!(stored(&cluster).await, [1, 1, 1, 1]);
}

/// The crash of another backend comes as a warning, and the session's end without a word.
#[tokio::test]
async fn a_crash_is_known_by_its_warning_and_run_again() {
    let cluster = server().await;
    let pool = builder(&cluster, "").build().unwrap();
    let held = pool.get().await.unwrap();
    for then in THEN {
        let runs = Runs::default();
        pool.transaction(async |tx| {
            if runs.begin() == 1 {
                cluster.kill_backend(Node(0)).await;
                idle(&tx).await;
                return do_then(&tx, then).await;
            }
            insert(&tx, 1).await
        })
        .await
        .unwrap();
        assert_eq!(runs.count(), 2, "{then:?}");
    }
    assert_eq!(held.session_end().await.unwrap().code().code(), "57P02");
    assert_eq!(stored(&cluster).await, [1, 1, 1, 1]);
}

/// What a function of the user's raises, with the code that a server's last warning has, is not taken for that warning.
#[tokio::test]
async fn a_warning_of_the_users_announces_no_end() {
    let cluster = server().await;
    let cutter = Cutter::start((cluster.spare_addr(0), cluster.port()).into(), cluster.socket_addr(Node(0))).await;
    let pool = Pool::builder(format!("postgres://app@{}/app", cutter.addr())).unwrap().max_size(2).build().unwrap();
    for (level, code) in [("NOTICE", "57P01"), ("WARNING", "57P01"), ("WARNING", "57P02")] {
        let client = pool.get().await.unwrap();
        let raise = format!("DO $$ BEGIN RAISE {level} 'not the end' USING ERRCODE = '{code}'; END $$");
        client.batch_execute(&raise).await.unwrap();
        let cut = cutter.arm(Cut::CommitAnswerDropped);
        client.batch_execute("BEGIN").await.unwrap();
        client.batch_execute("COMMIT").await.expect_err("the answer is lost");
        timeout(PATIENCE, cut.happened()).await.unwrap();
        eventually("the session is closed", PATIENCE, async || client.is_closed()).await;
        assert!(client.session_end().await.is_none(), "{level} {code}");
    }
}

/// A closure that ends its transaction by itself and is then idle for too long.
#[tokio::test]
async fn an_idle_session_outside_of_its_transaction_is_not_run_again() {
    let cluster = server().await;
    if !has_idle_session_timeout(&cluster).await {
        return;
    }
    let pool = builder(&cluster, "?options=-c%20idle_session_timeout%3D100ms").build().unwrap();
    let runs = Runs::default();
    let error = pool
        .transaction(async |tx| -> Result<(), Error> {
            runs.begin();
            tx.batch_execute("ROLLBACK").await?;
            idle(&tx).await;
            Err(Error::abort(SoldOut))
        })
        .await
        .unwrap_err();
    assert_eq!(runs.count(), 1, "{error}");
    assert!(error.to_string().contains("idle_session_timeout"), "{error}");
    assert!(error.downcast_ref::<SoldOut>().is_some());
}

/// The limits of a pooler come under one SQLSTATE: its texts tell.
#[tokio::test]
async fn the_limits_of_a_pooler_end_the_call_too() {
    if !PgBouncer::is_installed() {
        return println!("no PgBouncer here");
    }
    let cluster = server().await;
    let server = cluster.socket_addr(Node(0));
    for (setting, slow) in [("query_timeout", true), ("idle_transaction_timeout", false)] {
        let bouncer = PgBouncer::builder("session")
            .setting(setting, "1")
            .start(&cluster, cluster.spare_addr(0), &server.ip().to_string(), server.port())
            .await;
        let pool = Pool::builder(bouncer.url()).unwrap().max_size(2).build().unwrap();
        let runs = Runs::default();
        let error = pool
            .transaction(async |tx| {
                runs.begin();
                if slow {
                    tx.batch_execute("SELECT pg_sleep(60)").await?;
                } else {
                    idle(&tx).await;
                }
                insert(&tx, 1).await
            })
            .await
            .unwrap_err();
        println!("{setting}: {} runs: {error}", runs.count());
        // The limit may be over in BEGIN, where the machine stands still for so long.
        assert!(runs.count() <= 1, "{setting}: {error}");
        assert!(error.to_string().contains(setting), "{error}");
    }
}

/// A wrapped pool's driver tells nothing: what its statements are told is what the attempt is judged by.
#[tokio::test]
async fn a_wrapped_pool_knows_what_its_statements_were_told() {
    let cluster = server().await;
    let mut config = deadpool_postgres::Config::new();
    config.url = Some(format!("postgres://app@{}/app", cluster.socket_addr(Node(0))));
    let runtime = Some(deadpool_postgres::Runtime::Tokio1);
    let pool: Pool = Pool::wrap(config.create_pool(runtime, tokio_postgres::NoTls).unwrap()).build().unwrap();
    let error = pool
        .build_transaction()
        .retry(RetryPolicy::none())
        .deadline(Duration::from_secs(20))
        .run(async |tx| {
            let _ = tx.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())").await;
            Err::<(), _>(Error::abort(SoldOut))
        })
        .await
        .unwrap_err();
    assert_eq!(error.code().unwrap().code(), "57P01", "{error:?}");
}
