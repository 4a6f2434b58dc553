//! Calls within the closure of another call. When the outcome of the inner one is unknown, the outer work never runs
//! again: it would do the inner work twice.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use testbed::{Cluster, Node, eventually};
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_postgres_failover::{CommitOutcome, Error, Guarantee, Pool, RetryPolicy, Transaction};

use crate::commit::finish::{KINDS, Kind, pool_of};
use crate::support::load::LONG;
use crate::support::{CONFLICT, PATIENCE, Runs, close_gate, committing, insert, open_gate, server, sql, stored};

/// Who writes to `doomed` loses the session within COMMIT, and who writes to `refused` is refused there with a
/// conflict.
const TRIGGERS: &str = "
    CREATE FUNCTION dies() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END';
    CREATE FUNCTION conflicts() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'made up' USING ERRCODE = '40001'; END $$;
    CREATE TABLE doomed (id bigint);
    CREATE TABLE refused (id bigint);
    CREATE CONSTRAINT TRIGGER dies AFTER INSERT ON doomed DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION dies();
    CREATE CONSTRAINT TRIGGER conflicts AFTER INSERT ON refused DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION conflicts();
    GRANT ALL ON doomed, refused TO app";

const DOOMED: &str = "INSERT INTO doomed VALUES (1)";

async fn prepared() -> Cluster {
    let cluster = server().await;
    sql(&cluster, TRIGGERS).await;
    cluster
}

/// A call whose outcome stays unknown. Nobody hears of that.
async fn in_doubt(pool: &Pool) {
    let call = pool.build_transaction().guarantee(Guarantee::AtMostOnce);
    let error = call.run(async |tx| Ok(tx.batch_execute(DOOMED).await?)).await.unwrap_err();
    assert_eq!(error.commit_outcome(), CommitOutcome::Unknown, "{error:?}");
}

/// What befalls the outer call behind the inner one, such that its work would run again.
#[derive(Clone, Copy, Debug)]
enum Then {
    RefusedAtCommit,
    LostBeforeCommit,
    /// COMMIT's check is not prepared any more.
    CheckIsGone,
    /// Its COMMIT is in doubt, and found not to be committed.
    SettledAsAbsent,
    /// The closure fails with an error that the user's hook lets run again.
    HookAfterAnError,
    /// The closure hides that error, and COMMIT finds the transaction aborted.
    HookAfterAHiddenError,
    Conflict,
    HiddenConflict,
}

const EACH: [Then; 8] = [
    Then::RefusedAtCommit,
    Then::LostBeforeCommit,
    Then::CheckIsGone,
    Then::SettledAsAbsent,
    Then::HookAfterAnError,
    Then::HookAfterAHiddenError,
    Then::Conflict,
    Then::HiddenConflict,
];

impl Then {
    async fn happens(self, tx: &Transaction) -> Result<(), Error> {
        match self {
            Self::RefusedAtCommit => tx.batch_execute("INSERT INTO refused VALUES (1)").await?,
            Self::SettledAsAbsent => tx.batch_execute(DOOMED).await?,
            Self::CheckIsGone => tx.batch_execute("DEALLOCATE ALL").await?,
            Self::LostBeforeCommit => {
                let _ = tx.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())").await;
                eventually("the session is closed", PATIENCE, async || tx.is_closed()).await;
            }
            Self::HookAfterAnError => tx.batch_execute("SELECT 1 / 0").await?,
            Self::Conflict => tx.batch_execute(CONFLICT).await?,
            Self::HookAfterAHiddenError => drop(tx.batch_execute("SELECT 1 / 0").await),
            Self::HiddenConflict => drop(tx.batch_execute(CONFLICT).await),
        }
        Ok(())
    }
}

/// However the outer call ends, and although its closure hides the doubt.
#[tokio::test]
async fn an_inner_call_in_doubt_is_run_again_on_no_path() {
    let cluster = prepared().await;
    for guarantee in [Guarantee::ExactlyOnce, Guarantee::AtMostOnce, Guarantee::AtLeastOnce] {
        for then in EACH {
            let what = format!("{guarantee:?} {then:?}");
            let retry = RetryPolicy::new().classify(|report| (report.code().code() == "22012").then_some(true));
            // On a session of its own, the pool sends no check with COMMIT.
            let kind = if matches!(then, Then::CheckIsGone) { Kind::Wrapped } else { Kind::Own };
            let pool = pool_of(kind, cluster.socket_addr(Node(0)), 2);
            // The only session has prepared COMMIT's check.
            pool.transaction(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await.unwrap();
            let runs = Runs::default();
            let result = pool
                .build_transaction()
                .guarantee(guarantee.clone())
                .retry(retry)
                .run(async |tx| {
                    if runs.begin() > 1 {
                        return Ok(());
                    }
                    in_doubt(&pool).await;
                    then.happens(&tx).await
                })
                .await;
            // Without a mark, the check is not prepared, and nothing is wrong.
            let is_checked = guarantee == Guarantee::ExactlyOnce;
            assert_eq!(runs.count(), 1, "{what}: {result:?}");
            if matches!(then, Then::CheckIsGone) && !is_checked {
                continue;
            }
            // A program that repeats what is "not committed" would do the inner work twice.
            let error = result.expect_err(&what);
            assert_eq!(error.commit_outcome(), CommitOutcome::Unknown, "{what}: {error}");
            println!("{what}: {error}");
            assert!(!error.to_string().contains("run it again"), "{what}: {error}");
        }
    }
}

/// How the outer call ends, such that its work would not run again anyway.
#[derive(Clone, Copy, Debug)]
enum Ends {
    OwnError,
    /// Its own error contains the inner call's.
    Wraps,
    AnError,
    Refused,
    TimeIsOver,
    NoAttemptIsLeft,
    HookForbids,
}

/// An error of the application around the inner call's.
#[derive(Debug, thiserror::Error)]
#[error("the order was not paid")]
struct NotPaid(#[source] Error);

/// A program that repeats what is "not committed" would do the inner work twice.
#[tokio::test]
async fn no_error_says_not_committed_beside_an_inner_call_in_doubt() {
    let cluster = prepared().await;
    for guarantee in [Guarantee::ExactlyOnce, Guarantee::AtMostOnce, Guarantee::AtLeastOnce] {
        for ends in [
            Ends::OwnError,
            Ends::Wraps,
            Ends::AnError,
            Ends::Refused,
            Ends::TimeIsOver,
            Ends::NoAttemptIsLeft,
            Ends::HookForbids,
        ] {
            let what = format!("{guarantee:?} {ends:?}");
            let retry = match ends {
                Ends::TimeIsOver => RetryPolicy::new().attempt_timeout(Duration::from_secs(2)),
                Ends::NoAttemptIsLeft => RetryPolicy::new().attempts(1),
                Ends::HookForbids => RetryPolicy::new().classify(|_| Some(false)),
                _ => RetryPolicy::new(),
            };
            let (pool, runs) = (pool_of(Kind::Own, cluster.socket_addr(Node(0)), 2), Runs::default());
            let call = pool.build_transaction().guarantee(guarantee.clone()).retry(retry).run(async |tx| {
                runs.begin();
                let inner = pool.build_transaction().guarantee(Guarantee::AtMostOnce);
                let inner = inner.run(async |tx| Ok(tx.batch_execute(DOOMED).await?)).await.unwrap_err();
                match ends {
                    Ends::OwnError => return Err(Error::abort("own")),
                    Ends::Wraps => return Err(Error::abort(NotPaid(inner))),
                    Ends::AnError => tx.batch_execute("SELECT 1 / 0").await?,
                    Ends::Refused => drop(tx.batch_execute("SELECT 1 / 0").await),
                    Ends::TimeIsOver => tx.batch_execute("SELECT pg_sleep(60)").await?,
                    Ends::NoAttemptIsLeft | Ends::HookForbids => tx.batch_execute(CONFLICT).await?,
                }
                Ok(())
            });
            let error = timeout(PATIENCE, call).await.expect(&what).expect_err(&what);
            assert_eq!((error.commit_outcome(), runs.count()), (CommitOutcome::Unknown, 1), "{what}: {error}");
            assert!(matches!(error, Error::Exhausted(_)), "{what}: {error:?}");
            println!("{what}: {error}");
            if matches!(ends, Ends::Wraps) {
                assert!(error.downcast_ref::<NotPaid>().is_some(), "{what}");
            }
        }
    }
}

/// The time of the outer call is over while the inner COMMIT is under way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outer_call_whose_time_is_over_tells_of_the_inner_one() {
    let cluster = server().await;
    let gate = close_gate(&cluster).await;
    let pool = pool_of(Kind::Own, cluster.socket_addr(Node(0)), 3);
    let retry = RetryPolicy::new().attempt_timeout(Duration::from_secs(2));
    let work =
        pool.build_transaction().retry(retry).run(async |_| pool.transaction(async |tx| insert(&tx, 1).await).await);
    let error = timeout(PATIENCE, work).await.expect("the call hangs").unwrap_err();
    assert_eq!(error.commit_outcome(), CommitOutcome::Unknown, "{error}");
    open_gate(&gate).await;
    eventually("the inner commit goes on", PATIENCE, async || stored(&cluster).await == [1]).await;
}

/// What the call between the outermost and the innermost one is.
#[derive(Clone, Copy, Debug)]
enum Between {
    Succeeds,
    Fails,
    Reads,
}

/// The outermost call hears of the innermost one, whatever the call between them makes of it.
#[tokio::test]
async fn a_doubt_is_heard_of_through_two_calls() {
    let cluster = prepared().await;
    let pool = pool_of(Kind::Own, cluster.socket_addr(Node(0)), 3);
    for between in [Between::Succeeds, Between::Fails, Between::Reads] {
        let runs = Runs::default();
        let result = pool
            .transaction(async |tx| {
                if runs.begin() > 1 {
                    return Ok(());
                }
                let call = pool.build_transaction().read_only(matches!(between, Between::Reads));
                let call = call.run(async |_| {
                    in_doubt(&pool).await;
                    if matches!(between, Between::Fails) { Err(Error::abort("own")) } else { Ok(()) }
                });
                assert_eq!(call.await.is_ok(), !matches!(between, Between::Fails));
                Ok(tx.batch_execute(CONFLICT).await?)
            })
            .await;
        assert!(result.is_err(), "{between:?}");
        assert_eq!(runs.count(), 1, "{between:?}: {result:?}");
    }
}

/// The outer call of a wrapped pool loses its primary, and its closure is dropped in the midst of the inner COMMIT.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_inner_call_that_is_dropped_is_not_run_again() {
    for through_two in [false, true] {
        let cluster = server().await;
        let gate = close_gate(&cluster).await;
        let outer = pool_of(Kind::Wrapped, cluster.socket_addr(Node(0)), 3);
        let inner = pool_of(Kind::Own, cluster.socket_addr(Node(0)), 2);
        let runs = Runs::default();
        let innermost = async || inner.transaction(async |tx| insert(&tx, 1).await).await;
        let work = outer.transaction(async |_| {
            if runs.begin() > 1 {
                return Ok(());
            }
            if through_two { outer.read(async |_| innermost().await).await } else { innermost().await }
        });
        let fault = async {
            committing(&gate).await;
            outer.forget_cluster();
        };
        let (result, ()) = timeout(PATIENCE, async { tokio::join!(work, fault) }).await.expect("the call hangs");
        assert!(result.is_err(), "{through_two}");
        assert_eq!(runs.count(), 1, "{through_two}: {result:?}");
        open_gate(&gate).await;
        eventually("the inner commit goes on", PATIENCE, async || stored(&cluster).await == [1]).await;
    }
}

/// An inner call between two runs: the first one was rolled back, and the second one has not begun. It is dropped
/// there.
#[tokio::test]
async fn an_inner_call_that_is_dropped_between_two_runs_is_in_no_doubt() {
    let cluster = prepared().await;
    for kind in KINDS {
        let pool = pool_of(kind, cluster.socket_addr(Node(0)), 2);
        let runs = Runs::default();
        let result = pool
            .transaction(async |tx| {
                if runs.begin() > 1 {
                    return Ok(());
                }
                let waits = Arc::new(Notify::new());
                let told = Arc::clone(&waits);
                let policy =
                    RetryPolicy::new().initial_delay(PATIENCE).max_delay(PATIENCE).jitter(false).deadline(LONG);
                let policy = policy.on_retry(move |_| {
                    told.notify_one();
                    ControlFlow::Continue(())
                });
                let call = pool.build_transaction().retry(policy);
                let call = call.run(async |tx| Ok(tx.batch_execute("INSERT INTO refused VALUES (1)").await?));
                tokio::select! {
                    biased;
                    () = waits.notified() => {}
                    result = call => panic!("{result:?}"),
                }
                Ok(tx.batch_execute(CONFLICT).await?)
            })
            .await;
        assert!(result.is_ok(), "{kind:?}: {result:?}");
        assert_eq!(runs.count(), 2, "{kind:?}");
    }
}

/// The caller of `idempotent` has said that its work may be done twice.
#[tokio::test]
async fn the_doubt_of_an_idempotent_inner_call_holds_nobody_up() {
    let cluster = prepared().await;
    let pool = pool_of(Kind::Own, cluster.socket_addr(Node(0)), 2);
    let runs = Runs::default();
    let result = pool
        .transaction(async |tx| {
            if runs.begin() > 1 {
                return Ok(());
            }
            let call = pool.build_transaction().guarantee(Guarantee::AtLeastOnce).retry(RetryPolicy::new().attempts(1));
            let error = call.run(async |tx| Ok(tx.batch_execute(DOOMED).await?)).await.unwrap_err();
            assert_eq!(error.commit_outcome(), CommitOutcome::Unknown, "{error:?}");
            Ok(tx.batch_execute(CONFLICT).await?)
        })
        .await;
    assert!(result.is_ok(), "{result:?}");
    assert_eq!(runs.count(), 2);
}
