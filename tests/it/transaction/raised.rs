//! Errors that a function, a trigger, an extension or a worker of the session raises with a code of the server's.

use std::time::Duration;

use testbed::{Cluster, Node, eventually};
use tokio_postgres_failover::{CommitOutcome, Error, Guarantee, Pool, RetryPolicy};

use crate::support::load::by_url;
use crate::support::{PATIENCE, Runs, insert, server, sql, stored};

/// Codes of a server that ends its session, or takes no other, and of an end that is not known.
const ENDS: [&str; 7] = ["57P01", "57P02", "57P03", "57P05", "53300", "08007", "40003"];
const GUARANTEES: [Guarantee; 3] = [Guarantee::ExactlyOnce, Guarantee::AtMostOnce, Guarantee::AtLeastOnce];

/// A call that would run again and again ends soon.
fn pool(cluster: &Cluster) -> Pool {
    let policy = RetryPolicy::new().deadline(Duration::from_secs(5));
    by_url(cluster.url_hosts()).retry(policy).build().unwrap()
}

/// The work ran once and was rolled back, and the caller has the server's error with this code.
fn is_told_once(error: &Error, runs: &Runs, code: &str, what: &str) {
    assert!(matches!(error, Error::Database(_)), "{what}: {error:?}");
    assert_eq!(error.code().unwrap().code(), code, "{what}: {error}");
    assert_eq!((error.commit_outcome(), runs.count()), (CommitOutcome::NotCommitted, 1), "{what}: {error}");
}

/// What a user's function raises is the user's: the session goes on, and another run would meet it again.
#[tokio::test]
async fn a_code_that_a_function_raises_ends_no_session() {
    let cluster = server().await;
    let pool = pool(&cluster);
    for (code, guarantee) in ENDS.into_iter().flat_map(|code| GUARANTEES.map(|guarantee| (code, guarantee))) {
        let what = format!("{code}, {guarantee:?}");
        let (runs, raise) = (Runs::default(), format!("DO $$ BEGIN RAISE 'no' USING ERRCODE = '{code}'; END $$"));
        let call = pool.build_transaction().guarantee(guarantee);
        let work = call.run(async |tx| {
            runs.begin();
            insert(&tx, 1).await?;
            Ok(tx.batch_execute(&raise).await?)
        });
        is_told_once(&work.await.unwrap_err(), &runs, code, &what);
    }
    assert_eq!(stored(&cluster).await, [0_i64; 0]);
}

/// The end of a parallel worker is the server's doing, and comes at ERROR.
#[tokio::test]
async fn the_end_of_a_parallel_worker_is_run_again() {
    let cluster = server().await;
    sql(&cluster, "INSERT INTO entries SELECT generate_series(1, 1000); ANALYZE entries").await;
    let (pool, runs) = (pool(&cluster), Runs::default());
    let work = pool.transaction(async |tx| {
        if runs.begin() > 1 {
            return Ok(());
        }
        tx.batch_execute(
            "SET LOCAL parallel_setup_cost = 0; SET LOCAL parallel_tuple_cost = 0; \
             SET LOCAL min_parallel_table_scan_size = 0; SET LOCAL max_parallel_workers_per_gather = 2; \
             SELECT count(pg_sleep(0.1)) FROM entries WHERE id > 0",
        )
        .await?;
        Ok(())
    });
    let end = async {
        let administrator = cluster.direct(Node(0)).await;
        eventually("a parallel worker was ended", PATIENCE, async || {
            let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'parallel worker'";
            !administrator.query(end, &[]).await.unwrap().is_empty()
        })
        .await;
    };
    let (result, ()) = tokio::join!(work, end);
    result.unwrap();
    assert_eq!(runs.count(), 2);
}

/// What a deferred trigger raises at COMMIT refuses it, whatever the code says of connections: the server itself
/// reports it, and goes on. So nothing is in doubt, and nothing runs again.
#[tokio::test]
async fn a_code_that_a_trigger_raises_at_commit_refuses_it() {
    let cluster = server().await;
    sql(
        &cluster,
        "CREATE FUNCTION raises() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE 'no' USING ERRCODE = current_setting('app.code'); END $$;
         CREATE CONSTRAINT TRIGGER raises AFTER INSERT ON entries DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION raises()",
    )
    .await;
    let pool = pool(&cluster);
    let codes = ENDS.into_iter().chain(["08000", "08001", "08003", "08006", "08P01"]);
    for (code, guarantee) in codes.flat_map(|code| GUARANTEES.map(|guarantee| (code, guarantee))) {
        let what = format!("{code}, {guarantee:?}");
        let (runs, call) = (Runs::default(), pool.build_transaction().guarantee(guarantee));
        let work = call.run(async |tx| {
            runs.begin();
            tx.batch_execute(&format!("SET LOCAL app.code = '{code}'")).await?;
            insert(&tx, 1).await
        });
        is_told_once(&work.await.unwrap_err(), &runs, code, &what);
    }
    assert_eq!(stored(&cluster).await, [0_i64; 0]);
}

/// A deferred trigger says at COMMIT what a failed transaction says before: its own words are returned.
#[tokio::test]
async fn what_a_trigger_raises_at_commit_is_returned() {
    let cluster = server().await;
    sql(
        &cluster,
        "CREATE FUNCTION raises() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE 'the trigger''s words' USING ERRCODE = '25P02'; END $$;
         CREATE CONSTRAINT TRIGGER raises AFTER INSERT ON entries DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION raises()",
    )
    .await;
    let pool = pool(&cluster);
    for guarantee in GUARANTEES {
        let (runs, call) = (Runs::default(), pool.build_transaction().guarantee(guarantee.clone()));
        let work = call.run(async |tx| {
            runs.begin();
            insert(&tx, 1).await
        });
        let error = work.await.unwrap_err();
        assert!(error.to_string().contains("the trigger's words"), "{guarantee:?}: {error}");
        assert_eq!((error.commit_outcome(), runs.count()), (CommitOutcome::NotCommitted, 1), "{guarantee:?}");
    }
    assert_eq!(stored(&cluster).await, [0_i64; 0]);
}
