//! Transactions against a real server: what is run again, what comes back, and what is stored afterwards.

use std::error::Error as StdError;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use testbed::{Cluster, Node, Tap, eventually};
use tokio::sync::Barrier;
use tokio_postgres::IsolationLevel;
use tokio_postgres::error::SqlState;
use tokio_postgres_failover::error::{RolledBack, Unsettled};
use tokio_postgres_failover::retry::RetryBudget;
use tokio_postgres_failover::{
    CommitOutcome, Error, GenericClient, Guarantee, Pool, PoolBuilder, RetryPolicy, Transaction,
};

use crate::support::{
    CONFLICT, PATIENCE, Runs, close_gate, committing, insert, open_gate, server, sql, stored, wait_gone,
};

fn builder(addr: SocketAddr) -> PoolBuilder {
    Pool::builder(format!("postgres://app@{addr}/app")).unwrap().max_size(4)
}

fn pool(cluster: &Cluster) -> Pool {
    builder(cluster.socket_addr(Node(0))).build().unwrap()
}

async fn backend(pool: &Pool) -> i32 {
    pool.get().await.unwrap().query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0)
}

#[derive(Debug, PartialEq, thiserror::Error)]
#[error("sold out: {left} left")]
struct SoldOut {
    left: i32,
}

/// An application's error with the database's inside, as most applications have one.
#[derive(Debug, thiserror::Error)]
#[error("the order failed")]
struct OrderFailed(#[source] Box<dyn StdError + Send + Sync>);

/// Both ways to end a closure, with what is captured by reference and by move.
#[tokio::test]
async fn a_closure_ends_in_its_last_call_or_in_ok() {
    let cluster = server().await;
    let pool = pool(&cluster);
    let (by_reference, moved) = (vec![1_i64, 2], String::from("three"));

    let count: i64 =
        pool.transaction(async |tx| Ok(tx.query_one("SELECT count(*) FROM entries", &[]).await?.get(0))).await.unwrap();
    assert_eq!(count, 0);

    pool.transaction(async |tx| {
        for id in &by_reference {
            tx.execute("INSERT INTO entries VALUES ($1)", &[id]).await?;
        }
        Ok(())
    })
    .await
    .unwrap();

    let length = pool
        .idempotent(move |tx| {
            // What is moved in stays the closure's, for the next run; `async move |tx|` would lend it, and not compile.
            let moved = moved.clone();
            async move {
                let id = i64::try_from(moved.len()).unwrap();
                insert(&tx, id).await?;
                Ok(id)
            }
        })
        .await
        .unwrap();
    assert_eq!((length, by_reference.len()), (5, 2));

    // The tail is a function of the user's own, with no `Ok(…?)` around it.
    pool.transaction(async |tx| insert(&tx, 6).await).await.unwrap();
    assert_eq!(stored(&cluster).await, [1, 2, 5, 6]);
}

/// A closure is usable from a spawned task, whatever it captures.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_can_be_spawned() {
    let cluster = server().await;
    let pool = pool(&cluster);
    let tasks: Vec<_> = (0..8)
        .map(|id| {
            let pool = pool.clone();
            let label = format!("task {id}");
            tokio::spawn(async move {
                pool.transaction(async |tx| {
                    let statement = tx.prepare_cached("INSERT INTO entries SELECT $1 WHERE $2 <> ''").await?;
                    tx.execute(&statement, &[&i64::from(id), &label]).await?;
                    Ok(())
                })
                .await
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!(stored(&cluster).await, (0..8).collect::<Vec<_>>());
}

/// C4: a closure that swallows a database error does not get an `Ok` for work that was rolled back.
#[tokio::test]
async fn c4_a_swallowed_error_is_no_success() {
    let cluster = server().await;
    let pool = builder(cluster.socket_addr(Node(0))).max_size(1).build().unwrap();
    let before = backend(&pool).await;
    let runs = Runs::default();
    let error = pool
        .transaction(async |tx| {
            runs.begin();
            insert(&tx, 1).await?;
            let _ = tx.execute("SELECT 1 / 0", &[]).await;
            Ok(())
        })
        .await
        .unwrap_err();
    assert!(matches!(error, Error::RolledBack(RolledBack::FailedInside)), "{error:?}");
    assert_eq!(error.commit_outcome(), CommitOutcome::NotCommitted);
    assert!(error.to_string().contains("savepoint"), "{error}");
    assert_eq!(runs.count(), 1);
    assert_eq!(stored(&cluster).await, [0_i64; 0]);
    // The same session again, and no transaction is open on it.
    assert_eq!(backend(&pool).await, before);
    pool.transaction(async |tx| insert(&tx, 2).await).await.unwrap();
    assert_eq!(stored(&cluster).await, [2]);
}

/// C5: the closure's own error rolls back, comes back as it was, and the closure ran once.
#[tokio::test]
async fn c5_the_closures_own_error_comes_back_unchanged() {
    let cluster = server().await;
    let pool = builder(cluster.socket_addr(Node(0))).max_size(1).build().unwrap();
    let before = backend(&pool).await;
    let runs = Runs::default();
    let error = pool
        .idempotent(async |tx| -> Result<(), Error> {
            runs.begin();
            insert(&tx, 1).await?;
            Err(Error::abort(SoldOut { left: 3 }))
        })
        .await
        .unwrap_err();
    assert_eq!(error.to_string(), "sold out: 3 left");
    assert_eq!(error.commit_outcome(), CommitOutcome::NotCommitted);
    assert_eq!(error.downcast_ref::<SoldOut>(), Some(&SoldOut { left: 3 }));
    assert_eq!(error.downcast::<SoldOut>().unwrap(), SoldOut { left: 3 });
    assert_eq!(runs.count(), 1);
    assert_eq!(stored(&cluster).await, [0_i64; 0]);
    assert_eq!(backend(&pool).await, before, "the session is clean and stays");
}

/// C5: what an application has as errors: a boxed one, a string, one of its own by `?`.
#[tokio::test]
async fn c5_boxes_and_strings_are_errors_too() {
    let cluster = server().await;
    let pool = pool(&cluster);
    let boxed: Box<dyn StdError + Send + Sync> = Box::new(SoldOut { left: 0 });
    let mut boxed = Some(boxed);
    // A closure that changes what it captures is a plain one around an `async` block.
    let own = |_| {
        let error = boxed.take().unwrap();
        async { Err::<(), _>(Error::abort(error)) }
    };
    let error = pool.transaction(own).await.unwrap_err();
    assert_eq!(error.downcast::<SoldOut>().unwrap(), SoldOut { left: 0 });

    let error = pool.transaction(async |_| -> Result<(), _> { Err(Error::abort("no such order")) }).await.unwrap_err();
    assert_eq!(error.to_string(), "no such order");
    assert!(error.downcast::<SoldOut>().is_err());

    let error = pool
        .transaction(async |_| {
            let number: i32 = "twelve".parse().map_err(Error::abort)?;
            Ok(number)
        })
        .await
        .unwrap_err();
    assert!(error.downcast_ref::<std::num::ParseIntError>().is_some(), "{error:?}");
}

/// C5, C12: an own error around a retryable database error does not hide it.
#[tokio::test]
async fn c5_a_conflict_within_an_own_error_is_run_again() {
    let cluster = server().await;
    let pool = pool(&cluster);
    let runs = Runs::default();
    pool.transaction(async |tx| {
        insert(&tx, 1).await?;
        if runs.begin() == 1 {
            tx.batch_execute(CONFLICT).await.map_err(|error| Error::abort(OrderFailed(Box::new(error))))?;
        }
        Ok(())
    })
    .await
    .unwrap();
    assert_eq!(runs.count(), 2);
    assert_eq!(stored(&cluster).await, [1]);

    // And one that does not say so is returned, once.
    let runs = Runs::default();
    let error = pool
        .transaction(async |tx| {
            runs.begin();
            tx.batch_execute("SELECT 1 / 0").await.map_err(|error| Error::abort(OrderFailed(Box::new(error))))?;
            Ok(())
        })
        .await
        .unwrap_err();
    assert!(error.downcast_ref::<OrderFailed>().is_some(), "{error:?}");
    assert_eq!(runs.count(), 1);
}

/// C6: a handle that outlives its closure is an error, is of no use any more, and stores nothing.
#[tokio::test]
async fn c6_a_kept_handle_rolls_back() {
    let cluster = server().await;
    let pool = builder(cluster.socket_addr(Node(0))).max_size(1).build().unwrap();
    let kept = Mutex::new(None);
    let error = pool
        .idempotent(async |tx| {
            insert(&tx, 1).await?;
            *kept.lock().unwrap() = Some(tx);
            Ok(())
        })
        .await
        .unwrap_err();
    assert!(matches!(error, Error::RolledBack(RolledBack::HandleKept)), "{error:?}");
    assert_eq!(error.commit_outcome(), CommitOutcome::NotCommitted);
    let kept = kept.into_inner().unwrap().unwrap();
    eventually("the kept handle's session is closed", PATIENCE, async || kept.is_closed()).await;
    assert!(kept.execute("INSERT INTO entries VALUES (2)", &[]).await.is_err());
    drop(kept);
    pool.transaction(async |tx| insert(&tx, 3).await).await.unwrap();
    assert_eq!(stored(&cluster).await, [3]);
}

/// C12: two serializable transactions of which each reads what the other writes: one is run again, both land.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c12_a_serialization_failure_is_run_again() {
    let cluster = server().await;
    let pool = pool(&cluster);
    let (runs, meet) = (Runs::default(), Arc::new(Barrier::new(2)));
    let skew = |id: i64| {
        let (pool, runs, meet) = (pool.clone(), runs.clone(), meet.clone());
        tokio::spawn(async move {
            let own = Runs::default();
            pool.build_transaction()
                .isolation_level(IsolationLevel::Serializable)
                .run(async |tx| {
                    runs.begin();
                    let seen: i64 = tx.query_one("SELECT count(*) FROM entries", &[]).await?.get(0);
                    if own.begin() == 1 {
                        meet.wait().await;
                    }
                    insert(&tx, id * 10 + seen).await
                })
                .await
        })
    };
    let (one, two) = (skew(1), skew(2));
    one.await.unwrap().unwrap();
    two.await.unwrap().unwrap();
    let stored = stored(&cluster).await;
    // The second one in the serial order has seen the first.
    assert!(stored == [10, 21] || stored == [11, 20], "{stored:?}");
    assert!(runs.count() >= 3, "no conflict came about");
    assert_eq!(pool.status().view.generation.get(), 1, "a conflict evicts nobody");
}

/// C12: a real deadlock: its victim is run again, both land once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c12_a_deadlock_is_run_again() {
    let cluster = Cluster::builder().nodes(1).setting("deadlock_timeout", "20ms").start().await;
    sql(
        &cluster,
        "CREATE TABLE stock (id int, left_over int); INSERT INTO stock VALUES (1, 10), (2, 10); GRANT ALL ON stock TO \
         app",
    )
    .await;
    let pool = pool(&cluster);
    let (runs, meet) = (Runs::default(), Arc::new(Barrier::new(2)));
    let take = |order: [i32; 2]| {
        let (pool, runs, meet) = (pool.clone(), runs.clone(), meet.clone());
        tokio::spawn(async move {
            let own = Runs::default();
            pool.transaction(async |tx| {
                runs.begin();
                let [one, other] = order;
                let update = "UPDATE stock SET left_over = left_over - 1 WHERE id = $1";
                tx.execute(update, &[&one]).await?;
                if own.begin() == 1 {
                    meet.wait().await;
                }
                tx.execute(update, &[&other]).await?;
                Ok(())
            })
            .await
        })
    };
    let (one, two) = (take([1, 2]), take([2, 1]));
    one.await.unwrap().unwrap();
    two.await.unwrap().unwrap();
    let rows = cluster.direct(Node(0)).await.query("SELECT left_over FROM stock", &[]).await.unwrap();
    assert_eq!(rows.iter().map(|row| row.get::<_, i32>(0)).collect::<Vec<_>>(), [8, 8]);
    assert!(runs.count() >= 3, "no deadlock came about");
}

/// K1: the connection is lost within the closure: not committed, so it is run again, and lands once.
#[tokio::test]
async fn k1_a_connection_lost_before_commit_is_run_again() {
    let cluster = server().await;
    let pool = builder(cluster.socket_addr(Node(0))).application_name("k1").build().unwrap();
    for (id, statement_after) in [(1_i64, true), (2, false)] {
        let runs = Runs::default();
        pool.transaction(async |tx| {
            insert(&tx, id).await?;
            if runs.begin() == 1 {
                let pid: i32 = tx.query_one("SELECT pg_backend_pid()", &[]).await?.get(0);
                sql(&cluster, &format!("SELECT pg_terminate_backend({pid})")).await;
                if statement_after {
                    tx.batch_execute("SELECT 1").await?;
                } else {
                    // The closure does not notice; COMMIT must not be sent on a session that has ended.
                    eventually("the session is closed", PATIENCE, async || tx.is_closed()).await;
                }
            }
            Ok(())
        })
        .await
        .unwrap();
        assert_eq!(runs.count(), 2);
    }
    assert_eq!(stored(&cluster).await, [1, 2]);
    assert_eq!(pool.status().view.generation.get(), 1, "one lost session is no failover");
}

/// A server on which a COMMIT waits, inside the server, while the returned session holds the lock.
async fn slow_commit() -> (Cluster, tokio_postgres::Client) {
    let cluster = server().await;
    let gate = close_gate(&cluster).await;
    (cluster, gate)
}

/// K2 for `AtMostOnce`: cut off after COMMIT was sent, and the server goes on and commits: unknown, and never run
/// again.
#[tokio::test]
async fn k2_a_commit_cut_off_is_unknown_and_was_committed() {
    let (cluster, gate) = slow_commit().await;
    let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let pool = builder(tap.addr()).build().unwrap();
    let runs = Runs::default();
    let work = pool.build_transaction().guarantee(Guarantee::AtMostOnce).run(async |tx| {
        runs.begin();
        insert(&tx, 1).await
    });
    let cut = async {
        let pid = committing(&gate).await;
        tap.drop_connections();
        pid
    };
    // A run more than there should be waits at the gate for ever.
    let both = async { tokio::join!(work, cut) };
    let (result, pid) = tokio::time::timeout(PATIENCE, both).await.unwrap();
    let error = result.unwrap_err();
    let Error::CommitUnknown(unknown) = &error else { panic!("{error:?}") };
    assert_eq!(unknown.reason(), Unsettled::NoMark);
    assert_eq!(error.commit_outcome(), CommitOutcome::Unknown);
    assert!(error.to_string().contains("may or may not"), "{error}");
    assert_eq!(runs.count(), 1);
    open_gate(&gate).await;
    wait_gone(&gate, pid).await;
    assert_eq!(stored(&cluster).await, [1], "the commit did land");
}

/// K2 for `AtMostOnce`, the other outcome: the server ends the backend within COMMIT. Unknown, and not committed.
#[tokio::test]
async fn k2_a_backend_ended_in_commit_is_unknown_and_was_not_committed() {
    let (cluster, gate) = slow_commit().await;
    let pool = pool(&cluster);
    let runs = Runs::default();
    let work = pool.build_transaction().guarantee(Guarantee::AtMostOnce).run(async |tx| {
        runs.begin();
        insert(&tx, 1).await
    });
    let cut = async {
        let pid = committing(&gate).await;
        gate.execute("SELECT pg_terminate_backend($1)", &[&pid]).await.unwrap();
        pid
    };
    // A run more than there should be waits at the gate for ever.
    let both = async { tokio::join!(work, cut) };
    let (result, pid) = tokio::time::timeout(PATIENCE, both).await.unwrap();
    let error = result.unwrap_err();
    let Error::CommitUnknown(unknown) = &error else { panic!("{error:?}") };
    assert_eq!(unknown.reason(), Unsettled::NoMark);
    assert_eq!(error.commit_outcome(), CommitOutcome::Unknown);
    assert_eq!(runs.count(), 1);
    wait_gone(&gate, pid).await;
    assert_eq!(stored(&cluster).await, [0_i64; 0]);
}

/// K2 for `idempotent`: run again although the first COMMIT did land, and the answer is `Ok`.
#[tokio::test]
async fn k2_idempotent_work_is_run_again() {
    let (cluster, gate) = slow_commit().await;
    let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let pool = builder(tap.addr()).build().unwrap();
    let runs = Runs::default();
    let work = pool.idempotent(async |tx| {
        runs.begin();
        insert(&tx, 1).await
    });
    let cut = async {
        committing(&gate).await;
        tap.drop_connections();
        open_gate(&gate).await;
    };
    let (result, ()) = tokio::join!(work, cut);
    result.unwrap();
    assert_eq!(runs.count(), 2);
    // The table has no key, so this shows both runs: "applied more than once" is what the caller allowed.
    eventually("both commits have ended", PATIENCE, async || stored(&cluster).await == [1, 1]).await;
}

/// K2 for `idempotent` without attempts left: the outcome stays unknown, and the error says so.
#[tokio::test]
async fn k2_idempotent_work_that_may_not_run_again_is_unknown() {
    let (cluster, gate) = slow_commit().await;
    let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let pool = builder(tap.addr()).build().unwrap();
    for policy in [RetryPolicy::none(), RetryPolicy::new().schedule(std::iter::empty)] {
        let call = pool.build_transaction().guarantee(Guarantee::AtLeastOnce).retry(policy);
        let work = call.run(async |tx| insert(&tx, 1).await);
        let cut = async {
            let pid = committing(&gate).await;
            tap.drop_connections();
            gate.execute("SELECT pg_terminate_backend($1)", &[&pid]).await.unwrap();
            wait_gone(&gate, pid).await;
        };
        let (result, ()) = tokio::join!(work, cut);
        assert_eq!(result.unwrap_err().commit_outcome(), CommitOutcome::Unknown);
    }
}

/// K2 for `read`: what a serializable transaction has read holds only if its COMMIT succeeds, so it reads again.
#[tokio::test]
async fn k2_a_read_is_run_again() {
    let cluster = server().await;
    let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let pool = builder(tap.addr()).build().unwrap();
    pool.connect().await.unwrap();
    let ended = Runs::default();
    let work = pool.read(async |tx| {
        let value: i32 = tx.query_one("SELECT 7", &[]).await?.get(0);
        if ended.count() == 0 {
            tap.stall(true);
        }
        ended.begin();
        Ok(value)
    });
    let cut = async {
        // COMMIT is sent in the same turn in which the closure ends, and nothing answers it.
        eventually("the closure has ended", PATIENCE, async || ended.count() == 1).await;
        tap.drop_connections();
        tap.stall(false);
    };
    let (value, ()) = tokio::join!(work, cut);
    assert_eq!(value.unwrap(), 7);
    assert_eq!(ended.count(), 2);

    // It may not run again, and there is nothing to be in doubt about.
    let cut = Runs::default();
    let error = pool
        .build_transaction()
        .read_only(true)
        .retry(RetryPolicy::none())
        .run(async |tx| {
            tap.drop_connections();
            cut.begin();
            tx.batch_execute("SELECT 1").await?;
            Ok(())
        })
        .await
        .unwrap_err();
    assert_eq!((cut.count(), error.commit_outcome()), (1, CommitOutcome::NotCommitted), "{error:?}");
}

/// K8: a deferred constraint that fails at COMMIT is an error of the application's: once, and not committed.
#[tokio::test]
async fn k8_a_constraint_that_fails_at_commit_is_returned() {
    let cluster = server().await;
    sql(&cluster, "ALTER TABLE entries ADD UNIQUE (id) DEFERRABLE INITIALLY DEFERRED").await;
    let pool = builder(cluster.socket_addr(Node(0))).max_size(1).build().unwrap();
    let before = backend(&pool).await;
    let runs = Runs::default();
    for guarantee in [Guarantee::AtMostOnce, Guarantee::AtLeastOnce] {
        let call = pool.build_transaction().guarantee(guarantee);
        let error = call
            .run(async |tx| {
                runs.begin();
                insert(&tx, 1).await?;
                insert(&tx, 1).await
            })
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Database(_)), "{error:?}");
        assert_eq!(error.code(), Some(&SqlState::UNIQUE_VIOLATION));
        assert_eq!(error.commit_outcome(), CommitOutcome::NotCommitted);
    }
    assert_eq!(runs.count(), 2);
    assert_eq!(backend(&pool).await, before, "the session is clean and stays");
    assert_eq!(stored(&cluster).await, [0_i64; 0]);
}

/// K9: a serialization failure that shows only at COMMIT is run again.
#[tokio::test]
async fn k9_a_conflict_at_commit_is_run_again() {
    let cluster = server().await;
    // A sequence is not rolled back: the first COMMIT fails, the second does not.
    sql(
        &cluster,
        "CREATE SEQUENCE tries;
         CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
             IF nextval('tries') = 1 THEN RAISE EXCEPTION 'made up' USING ERRCODE = '40001'; END IF;
             RETURN NULL;
         END $$;
         CREATE CONSTRAINT TRIGGER conflict AFTER INSERT ON entries DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION conflict()",
    )
    .await;
    let pool = pool(&cluster);
    let runs = Runs::default();
    pool.transaction(async |tx| {
        runs.begin();
        insert(&tx, 1).await
    })
    .await
    .unwrap();
    assert_eq!(runs.count(), 2);
    assert_eq!(stored(&cluster).await, [1]);
}

/// Savepoints keep or undo a part: released, rolled back, nested, dropped, and after an error.
#[tokio::test]
async fn savepoints_undo_a_part() {
    let cluster = server().await;
    let pool = pool(&cluster);
    pool.transaction(async |mut tx| {
        insert(&tx, 1).await?;

        let released = tx.savepoint().await?;
        released.execute("INSERT INTO entries VALUES (2)", &[]).await?;
        released.release().await?;

        let undone = tx.savepoint().await?;
        undone.execute("INSERT INTO entries VALUES (300)", &[]).await?;
        undone.rollback().await?;

        let mut outer = tx.savepoint().await?;
        outer.execute("INSERT INTO entries VALUES (4)", &[]).await?;
        let inner = outer.savepoint().await?;
        inner.execute("INSERT INTO entries VALUES (500)", &[]).await?;
        inner.rollback().await?;
        let inner = outer.savepoint().await?;
        inner.execute("INSERT INTO entries VALUES (6)", &[]).await?;
        inner.release().await?;
        outer.release().await?;

        let mut outer = tx.savepoint().await?;
        let inner = outer.savepoint().await?;
        inner.execute("INSERT INTO entries VALUES (700)", &[]).await?;
        inner.release().await?;
        // Takes what was released within it along.
        drop(outer);

        let failing = tx.savepoint().await?;
        assert!(failing.execute("SELECT 1 / 0", &[]).await.is_err());
        drop(failing);

        insert(&tx, 8).await
    })
    .await
    .unwrap();
    assert_eq!(stored(&cluster).await, [1, 2, 4, 6, 8]);
}

/// Takes two steps, each in a savepoint, and does not look at errors.
async fn careless(client: &mut impl GenericClient) {
    for id in [2_i64, 3] {
        let Ok(step) = client.transaction().await else { continue };
        let _ = step.execute("INSERT INTO entries VALUES ($1::bigint / 0)", &[&id]).await;
        let _ = step.commit().await;
    }
}

/// A savepoint that cannot be set, as the transaction has failed, does not roll back to an earlier one of its name:
/// that would revive the transaction, and the call would return `Ok` for a part of its work.
#[tokio::test]
async fn a_savepoint_that_cannot_be_set_revives_nothing() {
    let cluster = server().await;
    let pool = pool(&cluster);
    for nested in [false, true] {
        let result = pool
            .transaction(async |mut tx| {
                insert(&tx, 1).await?;
                if nested {
                    let mut outer = tx.savepoint().await?;
                    careless(&mut outer).await;
                    let _ = outer.release().await;
                } else {
                    careless(&mut tx).await;
                }
                Ok(())
            })
            .await;
        assert_eq!(stored(&cluster).await, [0_i64; 0], "{result:?}");
        let error = result.expect_err("a statement has failed");
        assert!(matches!(error, Error::RolledBack(RolledBack::FailedInside)), "{error:?}");
    }
}

/// The same if the future that sets the savepoint is dropped: its request may be under way, so a rollback to it
/// follows. The earlier savepoint may be nested in another one, or be the user's own.
#[tokio::test]
async fn a_savepoint_whose_future_was_dropped_revives_nothing() {
    let cluster = server().await;
    let pool = pool(&cluster);
    let fails = async |client: &tokio_postgres::Client| {
        client.batch_execute("INSERT INTO entries VALUES (1 / 0)").await.expect_err("the server divides by zero");
    };
    for way in ["plain", "nested", "own"] {
        let result = pool
            .transaction(async |mut tx| {
                insert(&tx, 1).await?;
                let dropped = match way {
                    "plain" => {
                        let earlier = tx.savepoint().await?;
                        fails(&earlier).await;
                        earlier.release().await.expect_err("the transaction has failed");
                        tx.savepoint().now_or_never().is_none()
                    }
                    "nested" => {
                        let mut outer = tx.savepoint().await?;
                        let earlier = outer.savepoint().await?;
                        fails(&earlier).await;
                        earlier.release().await.expect_err("the transaction has failed");
                        let dropped = outer.savepoint().now_or_never().is_none();
                        outer.release().await.expect_err("the transaction has failed");
                        dropped
                    }
                    _ => {
                        tx.batch_execute("SAVEPOINT failover_1").await?;
                        fails(&tx).await;
                        tx.savepoint().now_or_never().is_none()
                    }
                };
                assert!(dropped, "{way}");
                Ok(())
            })
            .await;
        assert_eq!(stored(&cluster).await, [0_i64; 0], "{way}: {result:?}");
        let error = result.expect_err("a statement has failed");
        assert!(matches!(error, Error::RolledBack(RolledBack::FailedInside)), "{way}: {error:?}");
    }
    // A savepoint that was set although its future was dropped is gone, with nothing but itself.
    pool.transaction(async |mut tx| {
        insert(&tx, 1).await?;
        assert!(tx.savepoint().now_or_never().is_none());
        insert(&tx, 2).await
    })
    .await
    .unwrap();
    assert_eq!(stored(&cluster).await, [1, 2]);
}

/// The options of a transaction reach the server, and READ WRITE is never asked for: it would break through a fence.
#[tokio::test]
async fn options_reach_the_server() {
    let cluster = Cluster::builder().nodes(1).setting("log_statement", "all").start().await;
    let pool = pool(&cluster);
    let show = async |tx: Transaction| -> Result<[String; 3], Error> {
        let sql = "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only'),
                          current_setting('transaction_deferrable')";
        let row = tx.query_one(sql, &[]).await?;
        Ok([row.get(0), row.get(1), row.get(2)])
    };
    assert_eq!(pool.transaction(show).await.unwrap(), ["read committed", "off", "off"]);
    assert_eq!(pool.idempotent(show).await.unwrap(), ["read committed", "off", "off"]);
    assert_eq!(pool.read(show).await.unwrap(), ["read committed", "on", "off"]);
    assert_eq!(pool.build_transaction().read_only(false).run(show).await.unwrap(), ["read committed", "off", "off"]);
    let all = pool.build_transaction().isolation_level(IsolationLevel::Serializable).read_only(true).deferrable(true);
    assert_eq!(all.run(show).await.unwrap(), ["serializable", "on", "on"]);
    for (level, name) in [
        (IsolationLevel::ReadUncommitted, "read uncommitted"),
        (IsolationLevel::ReadCommitted, "read committed"),
        (IsolationLevel::RepeatableRead, "repeatable read"),
        (IsolationLevel::Serializable, "serializable"),
    ] {
        let shown = pool.build_transaction().isolation_level(level).run(show).await.unwrap();
        assert_eq!(shown, [name, "off", "off"]);
    }
    let log = cluster.log(Node(0)).await.to_uppercase();
    assert!(log.contains("BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE"), "the log is of no use: {log}");
    assert!(!log.contains("READ WRITE"), "{log}");
}

/// R14: a statement that writes within `read` gets 25006 back, once, and nobody is evicted.
#[tokio::test]
async fn r14_a_write_in_a_read_is_returned() {
    let cluster = server().await;
    let pool = builder(cluster.socket_addr(Node(0))).max_size(1).build().unwrap();
    let before = backend(&pool).await;
    let runs = Runs::default();
    let error = pool
        .read(async |tx| {
            runs.begin();
            insert(&tx, 1).await
        })
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::READ_ONLY_SQL_TRANSACTION), "{error:?}");
    assert_eq!(runs.count(), 1);
    assert_eq!(backend(&pool).await, before, "the session stays");
    assert_eq!(pool.status().view.generation.get(), 1);
}

/// Fails with a conflict for ever, and counts.
async fn conflicts(call: tokio_postgres_failover::TransactionBuilder<'_>) -> (Error, u32) {
    let runs = Runs::default();
    let result = call
        .run(async |tx| {
            runs.begin();
            tx.batch_execute(CONFLICT).await?;
            Ok(())
        })
        .await;
    (result.unwrap_err(), runs.count())
}

/// The policy's limits end a call, and the error names the limit, the attempts and the last error.
#[tokio::test]
async fn the_retry_policy_ends_a_call() {
    let cluster = server().await;
    let quick = RetryPolicy::new().initial_delay(Duration::ZERO).max_delay(Duration::ZERO);
    let addr = cluster.socket_addr(Node(0));
    let pool = builder(addr).retry(quick.clone().attempts(3)).build().unwrap();
    let exhausted = |error: &Error, attempts: u32, word: &str| {
        let Error::Exhausted(exhausted) = error else { panic!("{error:?}") };
        assert_eq!(exhausted.attempts(), attempts, "{error}");
        assert_eq!(exhausted.last_error().code(), Some(&SqlState::T_R_SERIALIZATION_FAILURE));
        assert_eq!(error.code(), Some(&SqlState::T_R_SERIALIZATION_FAILURE));
        assert_eq!(error.commit_outcome(), CommitOutcome::NotCommitted);
        let text = error.to_string();
        assert!(text.contains(word) && text.contains("made up") && text.contains(&attempts.to_string()), "{text}");
    };

    let (error, runs) = conflicts(pool.build_transaction()).await;
    assert_eq!(runs, 3);
    exhausted(&error, 3, "allows 3 attempts");

    // No re-run: the plain error.
    let (error, runs) = conflicts(pool.build_transaction().retry(RetryPolicy::none())).await;
    assert_eq!(runs, 1);
    assert!(matches!(error, Error::Database(_)), "{error:?}");

    // A schedule that stops.
    let two = RetryPolicy::new().schedule(|| [Duration::ZERO; 2].into_iter());
    let (error, runs) = conflicts(pool.build_transaction().retry(two)).await;
    assert_eq!(runs, 3);
    exhausted(&error, 3, "schedule");

    // A deadline of the call's own. A slow machine may need the shorter one for the first run.
    for deadline in [300, 3000].map(Duration::from_millis) {
        let began = Instant::now();
        let (error, runs) = conflicts(pool.build_transaction().retry(quick.clone()).deadline(deadline)).await;
        let took = began.elapsed();
        // The pool's own deadline is thirty seconds.
        assert!(took >= deadline * 9 / 10 && took < deadline + Duration::from_secs(10), "{took:?}");
        if runs > 1 {
            exhausted(&error, runs, "deadline");
            break;
        }
        assert!(deadline < Duration::from_secs(1), "one run took {took:?}");
    }

    // The budget: two re-runs for all calls together, and nothing flows back.
    let thrifty = builder(addr).retry(quick).retry_budget(RetryBudget::new(2, 0).ratio(0.0)).build().unwrap();
    let (error, runs) = conflicts(thrifty.build_transaction()).await;
    assert_eq!(runs, 3);
    exhausted(&error, 3, "budget");
    let (error, runs) = conflicts(thrifty.build_transaction()).await;
    assert_eq!(runs, 1);
    exhausted(&error, 1, "budget");
    // First runs take nothing from it.
    thrifty.transaction(async |tx| insert(&tx, 1).await).await.unwrap();
}
