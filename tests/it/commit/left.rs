//! Closures that leave the pool's transaction on a session that is watched. The server's answers show how, whatever
//! happens afterwards and with any guarantee; the text that was sent counts for what was not answered.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::FutureExt;
use testbed::{Cut, Cutter, Node, Tap, eventually};
use tokio::time::{Instant, timeout};
use tokio_postgres_failover::error::{EndedInside, Ending};
use tokio_postgres_failover::ledger::Ledger;
use tokio_postgres_failover::{CommitOutcome, Error, Guarantee, RetryPolicy, Transaction};

use crate::commit::finish::{KINDS, Kind, pool_of, single, with_ledger};
use crate::support::{PATIENCE, Runs, committing, insert, sql, stored};

const KILL: &str = "SELECT pg_terminate_backend(pg_backend_pid())";
/// A server behind a proxy may report the loss of another session so, and its own session stays open.
const LOSS: &str = "DO $$ BEGIN RAISE EXCEPTION 'made up' USING ERRCODE = '08006'; END $$";
/// Key of the advisory lock that a statement under way waits for.
const GATE: i64 = 12;

fn guarantees() -> [Guarantee; 4] {
    let ledger = Guarantee::Ledger(Ledger::default());
    [Guarantee::ExactlyOnce, ledger, Guarantee::AtMostOnce, Guarantee::AtLeastOnce]
}

fn told(error: &Error, ending: Ending, what: &str) {
    let Error::EndedInside(inside) = error else { panic!("{what}: {error:?}") };
    assert_eq!(EndedInside::ending(inside), ending, "{what}: {error}");
    assert_eq!(error.commit_outcome(), CommitOutcome::Unknown, "{what}");
}

/// What a closure sends after its first row, how that ends its transaction, and which rows are there in the end.
const ENDS: &[(&[&str], Ending, &[i64])] = &[
    (&["COMMIT"], Ending::Committed, &[1]),
    (&["COMMIT AND CHAIN", "INSERT INTO entries VALUES (2)"], Ending::Committed, &[1]),
    (&["COMMIT; BEGIN; INSERT INTO entries VALUES (2)"], Ending::Committed, &[1]),
    (&["COMMIT", "INSERT INTO entries VALUES (3)"], Ending::Committed, &[1, 3]),
    (&["ROLLBACK", "INSERT INTO entries VALUES (3)"], Ending::RolledBack, &[3]),
    (&["ROLLBACK; INSERT INTO entries VALUES (3)"], Ending::RolledBack, &[3]),
    (&["ROLLBACK", "INSERT INTO entries VALUES (3)", "BEGIN"], Ending::RolledBack, &[3]),
    (&["PREPARE TRANSACTION 'left'"], Ending::Prepared, &[]),
    // COMMIT rolls a failed transaction back.
    (&["SELECT 1 / 0", "COMMIT", "INSERT INTO entries VALUES (3)"], Ending::RolledBack, &[3]),
];

/// What happens afterwards, such that the work would run again or the error would say "not committed".
#[derive(Clone, Copy, Debug)]
enum Then {
    SessionEnds,
    TimeIsOver,
    /// An error that says a connection was lost, on a session that is open.
    SaysLost,
    /// The closure returns an error of its own.
    Fails,
    /// The pool's own COMMIT gets no answer.
    NoAnswer,
}

const LIMIT: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closure_that_leaves_its_transaction_is_told_how_whatever_follows() {
    let cluster = with_ledger(single()).await;
    let admin = cluster.direct(Node(0)).await;
    let cutter = Cutter::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    for (guarantee, then) in guarantees().into_iter().flat_map(|by| {
        [Then::SessionEnds, Then::TimeIsOver, Then::SaysLost, Then::Fails, Then::NoAnswer]
            .map(|then| (by.clone(), then))
    }) {
        for (statements, ending, rows) in ENDS {
            let what = format!("{guarantee:?} {then:?}: {statements:?}");
            // This one takes its time.
            if matches!(then, Then::TimeIsOver) && statements.len() > 1 && *ending == Ending::Committed {
                continue;
            }
            let (pool, runs) = (pool_of(Kind::Own, cutter.addr(), 2), Runs::default());
            let retry = match then {
                Then::TimeIsOver => RetryPolicy::new().attempt_timeout(LIMIT),
                _ => RetryPolicy::new(),
            };
            let work = pool.build_transaction().guarantee(guarantee.clone()).retry(retry).run(async |tx| {
                runs.begin();
                insert(&tx, 1).await?;
                for statement in *statements {
                    assert_eq!(tx.batch_execute(statement).await.is_ok(), !statement.contains("1 / 0"), "{what}");
                }
                match then {
                    Then::SessionEnds => tx.batch_execute(KILL).await?,
                    Then::TimeIsOver => tx.batch_execute("SELECT pg_sleep(60)").await?,
                    Then::SaysLost => tx.batch_execute(LOSS).await?,
                    Then::Fails => return Err(Error::abort("own")),
                    Then::NoAnswer => drop(cutter.arm(Cut::CommitAnswerDropped)),
                }
                Ok(())
            });
            let began = Instant::now();
            let error = timeout(PATIENCE, work).await.expect(&what).expect_err(&what);
            cutter.disarm();
            // Nobody has to be asked.
            assert!(began.elapsed() < LIMIT + Duration::from_secs(3), "{what}: {:?}", began.elapsed());
            told(&error, *ending, &what);
            assert_eq!((runs.count(), &stored(&cluster).await[..]), (1, *rows), "{what}");
            if *ending == Ending::Prepared {
                admin.batch_execute("ROLLBACK PREPARED 'left'").await.unwrap();
            }
            sql(&cluster, "TRUNCATE entries").await;
        }
    }
}

/// What is sent together with the end of a transaction is stored, although nobody hears of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_sent_behind_an_end_that_is_not_answered_is_not_run_again() {
    let cluster = with_ledger(single()).await;
    let waits = format!("SELECT pg_advisory_xact_lock_shared({GATE})");
    for (guarantee, ends) in
        guarantees().into_iter().flat_map(|by| ["ROLLBACK", "ABORT"].map(|ends| (by.clone(), ends)))
    {
        let what = format!("{guarantee:?} {ends}");
        let gate = cluster.direct(Node(0)).await;
        gate.batch_execute(&format!("SELECT pg_advisory_lock({GATE})")).await.unwrap();
        let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
        let (pool, runs) = (pool_of(Kind::Own, tap.addr(), 2), Runs::default());
        let work = pool.build_transaction().guarantee(guarantee).run(async |tx| {
            if runs.begin() == 1 {
                insert(&tx, 1).await?;
                tx.batch_execute(&format!("{ends}; INSERT INTO entries VALUES (3); {waits}")).await?;
            }
            Ok(())
        });
        let fault = async {
            committing(&gate).await;
            tap.drop_connections();
        };
        let (result, ()) = timeout(PATIENCE, async { tokio::join!(work, fault) }).await.expect(&what);
        told(&result.expect_err(&what), Ending::Unknown, &what);
        gate.batch_execute(&format!("SELECT pg_advisory_unlock({GATE})")).await.unwrap();
        eventually("it is stored", PATIENCE, async || stored(&cluster).await == [3]).await;
        assert_eq!(runs.count(), 1, "{what}");
        sql(&cluster, "TRUNCATE entries").await;
    }
}

/// What a closure sends that looks like an end of its transaction, or hides one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_text_of_what_was_answered_does_not_count() {
    const TAG: &str = "DO $create_orders_table$ BEGIN NULL; END $create_orders_table$; COMMIT; BEGIN";
    const BODY: &str = "CREATE OR REPLACE FUNCTION one() RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT 1; END";
    const UNDONE: &str = "SAVEPOINT a; RELEASE b; COMMIT";
    let cluster = with_ledger(single()).await;
    sql(&cluster, "GRANT CREATE ON SCHEMA public TO app").await;
    let has_bodies = cluster.version().await >= 14;
    let cutter = Cutter::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    for guarantee in [Guarantee::ExactlyOnce, Guarantee::Ledger(Ledger::default())] {
        for (text, ends) in [(TAG, true), (BODY, false), (UNDONE, false)] {
            if text == BODY && !has_bodies {
                continue;
            }
            let what = format!("{guarantee:?} {text}");
            let pool = pool_of(Kind::Own, cutter.addr(), 2);
            let work = pool.build_transaction().guarantee(guarantee.clone()).run(async |mut tx| {
                insert(&tx, 1).await?;
                if text == UNDONE {
                    assert!(tx.savepoint().await?.batch_execute(text).await.is_err(), "{what}");
                } else {
                    tx.batch_execute(text).await?;
                }
                insert(&tx, 2).await?;
                cutter.arm(Cut::CommitAnswerDropped);
                Ok(())
            });
            let result = timeout(PATIENCE, work).await.expect(&what);
            if ends {
                told(&result.expect_err(&what), Ending::Committed, &what);
            } else {
                result.unwrap_or_else(|error| panic!("{what}: {error:?}"));
            }
            assert_eq!(stored(&cluster).await, if ends { vec![1] } else { vec![1, 2] }, "{what}");
            sql(&cluster, "TRUNCATE entries").await;
        }
    }
}

/// Which of its handles a closure uses.
#[derive(Clone, Copy, Debug)]
enum Sends {
    /// It drops the future.
    AndReturns,
    /// It keeps the handle, too.
    AndKeeps,
}

/// The driver has not even seen the closure's COMMIT when the closure returns, which a single thread makes certain.
#[tokio::test]
async fn a_commit_that_nobody_has_seen_yet_is_counted() {
    let cluster = with_ledger(single()).await;
    let cutter = Cutter::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    for guarantee in guarantees() {
        for sends in [Sends::AndReturns, Sends::AndKeeps] {
            let what = format!("{guarantee:?} {sends:?}");
            let pool = pool_of(Kind::Own, cutter.addr(), 2);
            let (kept, runs) = (std::cell::RefCell::new(Vec::<Transaction>::new()), Runs::default());
            let work = pool.build_transaction().guarantee(guarantee.clone()).run(async |tx| {
                runs.begin();
                insert(&tx, 1).await?;
                if matches!(sends, Sends::AndReturns) {
                    cutter.arm(Cut::CommitAnswerDropped);
                }
                assert!(tx.batch_execute("COMMIT").now_or_never().is_none(), "{what}");
                if matches!(sends, Sends::AndKeeps) {
                    kept.borrow_mut().push(tx);
                }
                Ok(())
            });
            let error = timeout(PATIENCE, work).await.expect(&what).expect_err(&what);
            assert!(matches!(error, Error::EndedInside(_)), "{what}: {error:?}");
            assert_eq!(runs.count(), 1, "{what}");
            eventually("the closure's COMMIT is carried out", PATIENCE, async || stored(&cluster).await == [1]).await;
            sql(&cluster, "TRUNCATE entries").await;
        }
    }
}

/// A savepoint ends nothing, whatever the pool or the closure rolls back to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_savepoint_is_no_end() {
    let cluster = with_ledger(single()).await;
    for kind in KINDS {
        for guarantee in guarantees() {
            let (pool, runs) = (pool_of(kind, cluster.socket_addr(Node(0)), 2), Runs::default());
            let result = pool
                .build_transaction()
                .guarantee(guarantee.clone())
                .run(async |mut tx| {
                    insert(&tx, 1).await?;
                    drop(tx.savepoint().await?);
                    tx.batch_execute("SAVEPOINT a; INSERT INTO entries VALUES (2); ROLLBACK TO a").await?;
                    if runs.begin() == 1 {
                        tx.batch_execute(KILL).await?;
                    }
                    Ok(())
                })
                .await;
            result.unwrap_or_else(|error| panic!("{kind:?} {guarantee:?}: {error:?}"));
            assert_eq!((runs.count(), stored(&cluster).await), (2, vec![1]), "{kind:?} {guarantee:?}");
            sql(&cluster, "TRUNCATE entries").await;
        }
    }
}
