//! What an attempt that was lost before its COMMIT leaves behind on its server.

use std::net::SocketAddr;
use std::time::Duration;

use testbed::{Cut, Cutter, Node, eventually};
use tokio::time::timeout;
use tokio_postgres_failover::ledger::Ledger;
use tokio_postgres_failover::{CommitOutcome, Error, Guarantee, RetryPolicy};

use crate::commit::finish::{Kind, pool_of, single, with_ledger};
use crate::support::{PATIENCE, Runs, close_gate, insert, open_gate, stored};

/// A path has vanished: the server does not know that the client is gone, and keeps the session with its locks. The
/// next run needs the same locks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_was_lost_before_commit_holds_no_run_up() {
    let cluster = with_ledger(single()).await;
    let cutter = Cutter::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let pool = pool_of(Kind::Own, cutter.addr(), 2);
    pool.connect().await.unwrap();
    let ledger = Guarantee::Ledger(Ledger::default());
    for (id, guarantee) in (1..).zip([Guarantee::ExactlyOnce, ledger, Guarantee::AtMostOnce, Guarantee::AtLeastOnce]) {
        let (cut, runs) = (cutter.arm(Cut::AfterStatementHeld(1)), Runs::default());
        let work = pool.build_transaction().guarantee(guarantee.clone()).run(async |tx| {
            runs.begin();
            tx.batch_execute("LOCK TABLE entries IN SHARE ROW EXCLUSIVE MODE").await?;
            insert(&tx, id).await
        });
        let result = timeout(PATIENCE, work).await.expect("it waits for the locks of its own first run");
        result.unwrap_or_else(|error| panic!("{guarantee:?}: {error}"));
        timeout(PATIENCE, cut.happened()).await.unwrap();
        assert_eq!((runs.count(), stored(&cluster).await), (2, (1..=id).collect()), "{guarantee:?}");
        eventually("the server has ended the session", PATIENCE, async || cutter.held() == 0).await;
    }
}

/// The same, but it was COMMIT that has not reached the server. Idempotent work runs again without a settled outcome.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_whose_commit_did_not_arrive_holds_no_run_up() {
    let cluster = with_ledger(single()).await;
    let cutter = Cutter::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let pool = pool_of(Kind::Own, cutter.addr(), 2);
    pool.connect().await.unwrap();
    let runs = Runs::default();
    // The transaction of the second run has a mark.
    let first = cutter.arm(Cut::CommitUndelivered { server_stays: true });
    let second = cutter.arm(Cut::CommitUndelivered { server_stays: true });
    let work = pool.build_transaction().guarantee(Guarantee::AtLeastOnce).run(async |tx| {
        runs.begin();
        tx.batch_execute("LOCK TABLE entries IN SHARE ROW EXCLUSIVE MODE").await?;
        insert(&tx, 1).await
    });
    let result = timeout(PATIENCE, work).await.expect("it waits for the locks of its own earlier run");
    result.unwrap();
    timeout(PATIENCE, async { (first.happened().await, second.happened().await) }).await.unwrap();
    assert_eq!((runs.count(), stored(&cluster).await), (3, vec![1]));
    eventually("the server has ended the sessions", PATIENCE, async || cutter.held() == 0).await;
}

/// A COMMIT that has arrived is left alone: it waits in a deferred trigger, and the next run waits for its locks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_whose_commit_arrived_is_left_to_it() {
    let cluster = with_ledger(single()).await;
    let gate = close_gate(&cluster).await;
    let cutter = Cutter::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let pool = pool_of(Kind::Own, cutter.addr(), 2);
    pool.connect().await.unwrap();
    let (cut, runs) = (cutter.arm(Cut::CommitHeld), Runs::default());
    let work = pool.build_transaction().guarantee(Guarantee::AtLeastOnce).run(async |tx| {
        let run = runs.begin();
        if run == 2 {
            open_gate(&gate).await;
        }
        insert(&tx, i64::from(run)).await
    });
    timeout(PATIENCE, work).await.expect("the call hangs").unwrap();
    timeout(PATIENCE, cut.happened()).await.unwrap();
    assert_eq!(runs.count(), 2);
    eventually("the first COMMIT goes on", PATIENCE, async || stored(&cluster).await == [1, 2]).await;
    cutter.release();
}

/// The question how a lost run has ended waits for a lock. It does not wait beyond the call's deadline.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_question_that_is_held_up_ends_with_the_deadline() {
    let cluster = with_ledger(single()).await;
    let pool = pool_of(Kind::Own, cluster.socket_addr(Node(0)), 2);
    pool.connect().await.unwrap();
    let (admin, runs) = (cluster.direct(Node(0)).await, Runs::default());
    let call = pool.build_transaction().guarantee(Guarantee::Ledger(Ledger::default()));
    let call = call.retry(RetryPolicy::new().deadline(Duration::from_secs(3))).run(async |tx| {
        runs.begin();
        insert(&tx, 1).await?;
        let _ = tx.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())").await;
        // The answer may come before the end of the session.
        while tx.batch_execute("SELECT 1").await.is_ok() {}
        // It waits for the end of this transaction.
        admin.batch_execute("BEGIN; LOCK TABLE failover.ledger").await.unwrap();
        Ok::<_, Error>(())
    });
    let error = timeout(PATIENCE, call).await.expect("the call hangs").expect_err("its session was ended");
    assert_eq!((error.commit_outcome(), runs.count()), (CommitOutcome::NotCommitted, 1), "{error}");
    admin.batch_execute("COMMIT").await.unwrap();
    pool.transaction(async |tx| insert(&tx, 2).await).await.unwrap();
    assert_eq!(stored(&cluster).await, [2]);
}
