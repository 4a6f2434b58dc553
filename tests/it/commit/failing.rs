//! A primary that answers a settler's question with an error, or lets no settler log in.

use std::time::Duration;

use testbed::{Cut, Node, eventually};
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_postgres::NoTls;
use tokio_postgres_failover::error::Unsettled;
use tokio_postgres_failover::ledger::Ledger;
use tokio_postgres_failover::{Error, Guarantee, Pool, deadpool_postgres};

use crate::commit::finish::{KINDS, Kind};
use crate::support::bench::{Bench, settlers, single};
use crate::support::load::{LONG, primary_lost};
use crate::support::{PATIENCE, insert, sql, stored};

/// The primary has answered, so the reason is not that there was none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_where_the_question_fails_each_time() {
    let bench = Bench::new(single(), Guarantee::Ledger(Ledger::default())).await;
    sql(
        &bench.cluster,
        "CREATE FUNCTION is_full() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE EXCEPTION 'the disk is full' USING ERRCODE = '53100'; END $$;
         CREATE TRIGGER is_full BEFORE INSERT ON failover.ledger FOR EACH ROW
             WHEN (NEW.fence) EXECUTE FUNCTION is_full()",
    )
    .await;
    bench.cut(Cut::CommitAnswerDropped);
    bench.assert_unknown(bench.call().deadline(Duration::from_secs(4)), Unsettled::Failed).await;
}

/// Whoever locks the ledger's table holds up the question, and that says nothing about the transaction.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_on_the_ledger_is_not_taken_for_a_commit_in_progress() {
    let bench = Bench::new(single(), Guarantee::Ledger(Ledger::default())).await;
    let (holder, watcher) = (bench.cluster.direct(Node(0)).await, bench.cluster.direct(Node(0)).await);
    let begun = Notify::new();
    bench.cut(Cut::CommitAnswerDropped);
    let call = bench.call().deadline(Duration::from_secs(4)).run(async |tx| {
        insert(&tx, 1).await?;
        begun.notify_one();
        eventually("the lock waits for this transaction", PATIENCE, async || {
            let waits = "SELECT FROM pg_locks WHERE relation = 'failover.ledger'::regclass AND NOT granted";
            watcher.execute(waits, &[]).await.unwrap() > 0
        })
        .await;
        Ok(())
    });
    let lock = async {
        begun.notified().await;
        holder.batch_execute("BEGIN; LOCK TABLE failover.ledger IN ACCESS EXCLUSIVE MODE").await.unwrap();
    };
    let (result, ()) = timeout(LONG, async { tokio::join!(call, lock) }).await.expect("the call ends");
    let error = result.unwrap_err();
    let Error::CommitUnknown(unknown) = &error else { panic!("{error:?}") };
    assert_eq!(unknown.reason(), Unsettled::Failed, "{error}");
    bench.assert_all_cut().await;
}

/// A pool that is closed while a commit is in doubt says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_pool_is_why_a_commit_stays_in_doubt() {
    let bench = Bench::new(single(), Guarantee::ExactlyOnce).await;
    bench.cut_with(Cut::CommitAnswerDropped, |cluster| async move { cluster.kill(Node(0)).await });
    let closes = async {
        bench.assert_all_cut().await;
        primary_lost(&bench.pool).await;
        bench.pool.close();
    };
    let (error, ()) = tokio::join!(bench.write(), closes);
    let error = error.unwrap_err();
    let Error::CommitUnknown(unknown) = &error else { panic!("{error:?}") };
    assert_eq!(unknown.reason(), Unsettled::Closed, "{error}");
}

/// What befalls a role that has idle sessions, and how that is taken back.
const REFUSALS: [(&str, &str); 2] = [
    ("ALTER ROLE app CONNECTION LIMIT 0", "ALTER ROLE app CONNECTION LIMIT -1"),
    ("ALTER ROLE app NOLOGIN", "ALTER ROLE app LOGIN"),
];
/// What a caller may leave on its session. It must not change what the settler is told.
const LEFT: &str = "SET default_transaction_isolation = serializable; SET search_path = nowhere; \
                    SET client_min_messages = error; CREATE TEMPORARY TABLE ledger (id int)";

/// No new session can be opened, and callers have used those that are open and idle. One of these can tell as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_is_settled_on_an_open_session_where_log_ins_fail() {
    for (kind, guarantee) in settlers().into_iter().flat_map(|by| KINDS.map(|kind| (kind, by.clone()))) {
        let bench = Bench::new(single(), guarantee).await;
        let pool = if kind == Kind::Own { bench.pool.clone() } else { wrapped(&bench) };
        let mut stored_by_now = Vec::new();
        for (refused, granted) in REFUSALS {
            for (cut, runs) in [(Cut::CommitAnswerDropped, 1), (Cut::CommitUndelivered { server_stays: false }, 2)] {
                let what = format!("{kind:?} {:?} {refused} {cut:?}", bench.guarantee);
                let mut held = Vec::new();
                for _ in 0..4 {
                    let client = pool.get_within(LONG).await.unwrap();
                    client.batch_execute("DISCARD TEMP").await.unwrap();
                    client.batch_execute(LEFT).await.unwrap();
                    held.push(client);
                }
                drop(held);
                sql(&bench.cluster, refused).await;
                bench.cut(cut);
                let begun = bench.runs.count();
                let call = pool.build_transaction().guarantee(bench.guarantee.clone()).deadline(Duration::from_secs(8));
                let call = call.run(async |tx| {
                    bench.runs.begin();
                    tx.batch_execute("SET LOCAL search_path = public").await?;
                    insert(&tx, 1).await
                });
                let result = timeout(LONG, call).await.expect("the call hangs");
                sql(&bench.cluster, granted).await;
                assert!(result.is_ok(), "{what}: {result:?}");
                stored_by_now.push(1);
                assert_eq!(bench.runs.count() - begun, runs, "{what}");
                assert_eq!(stored(&bench.cluster).await, stored_by_now, "{what}");
            }
        }
        bench.assert_all_cut().await;
    }
}

fn wrapped(bench: &Bench) -> Pool {
    let mut config = deadpool_postgres::Config::new();
    config.url = Some(format!("postgres://app@{}/app", bench.cutter.addr()));
    Pool::wrap(config.create_pool(Some(deadpool_postgres::Runtime::Tokio1), NoTls).unwrap()).build().unwrap()
}
