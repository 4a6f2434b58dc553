//! Closures that end their transaction themselves where the session tells nothing any more, or leave it in a COPY; and
//! a COMMIT that is sent by hand.

use std::any::Any;
use std::cell::RefCell;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::FutureExt;
use testbed::{Cluster, Cut, Cutter, Node, Tap, eventually};
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};
use tokio_postgres_failover::error::{EndedInside, Ending, RolledBack, Unsettled};
use tokio_postgres_failover::ledger::Ledger;
use tokio_postgres_failover::{CommitOutcome, Error, Guarantee, Pool, RetryPolicy, deadpool_postgres};

use crate::commit::finish::{KINDS, Kind, MANY_ROWS, pool_of, single, with_ledger};
use crate::support::{CONFLICT, PATIENCE, Runs, commits_call, committing, insert, sql, stored};

const KILL: &str = "SELECT pg_terminate_backend(pg_backend_pid())";
/// Key of the advisory lock that a COMMIT under way waits for.
const GATE: i64 = 12;
/// So often a case is played, if the machine stands still each time.
const ROUNDS: u32 = 4;

fn marked() -> [Guarantee; 2] {
    [Guarantee::ExactlyOnce, Guarantee::Ledger(Ledger::default())]
}

fn told(error: &Error, ending: Ending, what: &str) {
    let Error::EndedInside(inside) = error else { panic!("{what}: {error:?}") };
    assert_eq!(EndedInside::ending(inside), ending, "{what}: {error}");
    assert_eq!(error.commit_outcome(), CommitOutcome::Unknown, "{what}");
}

/// The pool holds back the last error of a call for half a second, to ask how the closure has ended its transaction. A
/// machine that stood still for so long gets no answer: then the case is played again. `usual`: how long the call takes
/// by itself.
fn must_play_again(error: &Error, began: Instant, usual: Duration, round: u32) -> bool {
    const ASKED_WITHIN: Duration = Duration::from_millis(500);
    let is_told = matches!(error, Error::EndedInside(inside) if EndedInside::ending(inside) != Ending::Unknown);
    !is_told && round < ROUNDS && began.elapsed() >= usual + ASKED_WITHIN
}

async fn waits(admin: &Client) {
    let waits = "SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND usename = 'app'";
    eventually("COMMIT waits for the standby", PATIENCE, async || !admin.query(waits, &[]).await.unwrap().is_empty())
        .await;
}

/// What is prepared is not over, and another run would do the work twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_was_prepared_before_its_session_ended_is_not_run_again() {
    let cluster = with_ledger(single()).await;
    let admin = cluster.direct(Node(0)).await;
    for kind in KINDS {
        for guarantee in marked() {
            let what = format!("{kind:?} {guarantee:?}");
            let pool = pool_of(kind, cluster.socket_addr(Node(0)), 2);
            let runs = Runs::default();
            let result: Result<(), Error> = pool
                .build_transaction()
                .guarantee(guarantee)
                .retry(RetryPolicy::new().attempts(3))
                .run(async |tx| {
                    let run = runs.begin();
                    insert(&tx, 1).await?;
                    tx.batch_execute(&format!("PREPARE TRANSACTION 'run {run}'")).await?;
                    tx.batch_execute(KILL).await?;
                    Ok(())
                })
                .await;
            told(&result.expect_err(&what), Ending::Prepared, &what);
            assert_eq!(runs.count(), 1, "{what}");
            admin.batch_execute("ROLLBACK PREPARED 'run 1'").await.unwrap();
        }
    }
}

/// The COMMIT of a closure waits for the standby when its connection is lost: the server goes on with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closures_own_commit_that_waits_for_the_standby_is_not_run_again() {
    for guarantee in marked() {
        let what = format!("{guarantee:?}");
        let cluster = with_ledger(Cluster::builder().nodes(2)).await;
        cluster.wait_replayed(Node(1)).await;
        let admin = cluster.direct(Node(0)).await;
        let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
        let pool = pool_of(Kind::Own, tap.addr(), 2);
        pool.connect().await.unwrap();
        cluster.freeze(Node(1));
        let runs = Runs::default();
        let work = pool.build_transaction().guarantee(guarantee).run(async |tx| {
            // A later run would not end while the standby is frozen.
            if runs.begin() == 1 {
                insert(&tx, 1).await?;
                tx.batch_execute("COMMIT").await?;
            }
            Ok(())
        });
        let fault = async {
            waits(&admin).await;
            tap.drop_connections();
        };
        let (result, ()) = timeout(PATIENCE, async { tokio::join!(work, fault) }).await.expect(&what);
        cluster.thaw(Node(1));
        told(&result.expect_err(&what), Ending::Committed, &what);
        assert_eq!(runs.count(), 1, "{what}");
        eventually("the commit goes on", PATIENCE, async || stored(&cluster).await == [1]).await;
    }
}

/// The COMMIT of a closure is in a deferred trigger when its connection is lost. Nothing shows yet how it ends, so the
/// call waits for the end, in its last run, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closures_own_commit_under_way_is_waited_for() {
    let cluster = with_ledger(single()).await;
    commits_call(&cluster, &format!("pg_advisory_xact_lock_shared({GATE})")).await;
    let spellings = [
        "COMMIT",
        " /* the last one */ END",
        "-- the last one\n\tcommit work",
        "-- the last one\rCOMMIT",
        "END; -- that is it",
    ];
    for (kind, guarantee) in marked().into_iter().flat_map(|by| KINDS.map(|kind| (kind, by.clone()))) {
        for (attempts, commit) in [1, 3].into_iter().flat_map(|attempts| spellings.map(|commit| (attempts, commit))) {
            let what = format!("{kind:?}, {guarantee:?}, {attempts} attempts, {commit}");
            for round in 1.. {
                let (began, runs) = (Instant::now(), Runs::default());
                let result = commits_under_way(kind, &cluster, guarantee.clone(), (attempts, commit), &runs).await;
                eventually("the commit goes on", PATIENCE, async || stored(&cluster).await.contains(&1)).await;
                let Err(error) = result else { panic!("{what}: {:?}", stored(&cluster).await) };
                if must_play_again(&error, began, Duration::ZERO, round) {
                    continue;
                }
                told(&error, Ending::Committed, &what);
                assert_eq!((runs.count(), stored(&cluster).await), (1, vec![1]), "{what}");
                break;
            }
        }
    }
}

/// A call whose closure commits itself in its first run, and loses its connection meanwhile.
async fn commits_under_way(
    kind: Kind,
    cluster: &Cluster,
    guarantee: Guarantee,
    (attempts, commit): (u32, &str),
    runs: &Runs,
) -> Result<(), Error> {
    sql(cluster, "TRUNCATE entries").await;
    let gate = cluster.direct(Node(0)).await;
    gate.batch_execute(&format!("SELECT pg_advisory_lock({GATE})")).await.unwrap();
    let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let pool = pool_of(kind, tap.addr(), 2);
    let retry = RetryPolicy::new().attempts(attempts);
    let work = pool.build_transaction().guarantee(guarantee).retry(retry).run(async |tx| {
        // A second run would wait in its own COMMIT for the same lock.
        if runs.begin() == 1 {
            insert(&tx, 1).await?;
            tx.batch_execute(commit).await?;
        }
        Ok(())
    });
    let fault = async {
        committing(&gate).await;
        tap.drop_connections();
        // A settler that was told "in progress" looks whether the session was abandoned. The pool may be too late to
        // ask.
        let asks = "SELECT FROM pg_stat_activity WHERE query LIKE '%idle in transaction%' AND pid <> pg_backend_pid()";
        let asked = async {
            while gate.query(asks, &[]).await.unwrap().is_empty() {
                sleep(Duration::from_millis(3)).await;
            }
        };
        let _ = timeout(Duration::from_secs(1), asked).await;
        gate.batch_execute(&format!("SELECT pg_advisory_unlock({GATE})")).await.unwrap();
    };
    let (result, ()) = timeout(PATIENCE, async { tokio::join!(work, fault) }).await.expect("the call hangs");
    result
}

/// A wrapped pool does not see what the closure has sent. A statement that does not commit is not waited for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_under_way_that_commits_nothing_is_not_waited_for() {
    let cluster = with_ledger(single()).await;
    let waits = format!("pg_advisory_xact_lock_shared({GATE})");
    // The words that end a transaction also stand elsewhere in a statement.
    let statements = [
        format!("SELECT {waits}"),
        format!("SELECT CASE WHEN true THEN {waits} END"),
        format!("SELECT CASE\n    WHEN true THEN {waits}\nEND\nFROM (VALUES (1)) AS v (end_of_commit)"),
        format!("SELECT {waits} AS \"commit\""),
    ];
    for (guarantee, statement) in marked().into_iter().flat_map(|by| statements.clone().map(|text| (by.clone(), text)))
    {
        let gate = cluster.direct(Node(0)).await;
        gate.batch_execute(&format!("SELECT pg_advisory_lock({GATE})")).await.unwrap();
        let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
        let (pool, runs) = (pool_of(Kind::Wrapped, tap.addr(), 2), Runs::default());
        let work = pool.build_transaction().guarantee(guarantee.clone()).run(async |tx| {
            if runs.begin() == 1 {
                tx.batch_execute(&statement).await?;
            }
            Ok(())
        });
        let fault = async {
            committing(&gate).await;
            tap.drop_connections();
        };
        let (result, ()) = timeout(PATIENCE, async { tokio::join!(work, fault) }).await.expect("it is waited for");
        assert!(result.is_ok(), "{guarantee:?} {statement}: {result:?}");
        assert_eq!(runs.count(), 2, "{guarantee:?} {statement}");
        gate.batch_execute(&format!("SELECT pg_advisory_unlock({GATE})")).await.unwrap();
    }
}

/// A wrapped pool does not see what the closure has sent, and the server does not tell in time how its transaction
/// ends. The closure may have ended nothing, so the error does not say that it has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrapped_pool_does_not_say_that_a_closure_ended_what_nobody_can_tell() {
    let cluster = with_ledger(single()).await;
    // To the server's list of sessions, this looks as if it ended the transaction.
    let statement = format!("PREPARE next AS SELECT 1; SELECT pg_advisory_xact_lock_shared({GATE})");
    for (guarantee, attempts) in marked().into_iter().flat_map(|by| [1, 3].map(|attempts| (by.clone(), attempts))) {
        let what = format!("{guarantee:?}, {attempts} attempts");
        let gate = cluster.direct(Node(0)).await;
        gate.batch_execute(&format!("SELECT pg_advisory_lock({GATE})")).await.unwrap();
        let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
        let (pool, runs) = (pool_of(Kind::Wrapped, tap.addr(), 2), Runs::default());
        let retry = RetryPolicy::new().attempts(attempts).deadline(Duration::from_secs(2));
        let work = pool.build_transaction().guarantee(guarantee).retry(retry).run(async |tx| {
            runs.begin();
            Ok(tx.batch_execute(&statement).await?)
        });
        let fault = async {
            committing(&gate).await;
            tap.drop_connections();
        };
        let (result, ()) = timeout(PATIENCE, async { tokio::join!(work, fault) }).await.expect(&what);
        let Err(Error::CommitUnknown(unknown)) = &result else { panic!("{what}: {result:?}") };
        assert_eq!((unknown.reason(), runs.count()), (Unsettled::InProgress, 1), "{what}");
        assert!(unknown.to_string().contains("wrapped pool"), "{what}: {unknown}");
        gate.batch_execute(&format!("SELECT pg_advisory_unlock({GATE})")).await.unwrap();
    }
}

/// The question how a closure has ended its transaction is given up, as a lock holds it up. The session in the midst of
/// it meets nobody else, in a wrapped pool neither.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_was_asked_in_vain_meets_nobody() {
    let cluster = with_ledger(single()).await;
    let mut config = deadpool_postgres::Config::new();
    config.url = Some(format!("postgres://app@{}/app", cluster.socket_addr(Node(0))));
    config.pool = Some(deadpool_postgres::PoolConfig::new(1));
    let existing = config.create_pool(None, NoTls).unwrap();
    let pool: Pool = Pool::wrap(existing.clone()).build().unwrap();
    pool.connect().await.unwrap();
    let admin = cluster.direct(Node(0)).await;
    let call = pool.build_transaction().guarantee(Guarantee::Ledger(Ledger::default()));
    let call = call.retry(RetryPolicy::new().attempts(1)).run(async |tx| {
        insert(&tx, 1).await?;
        let _ = tx.batch_execute(KILL).await;
        // It waits for the end of this transaction.
        admin.batch_execute("BEGIN; LOCK TABLE failover.ledger").await.unwrap();
        Err::<(), _>(Error::abort("own"))
    });
    timeout(PATIENCE, call).await.expect("the call hangs").expect_err("its session was ended");
    admin.batch_execute("COMMIT").await.unwrap();
    let next = timeout(PATIENCE, existing.get()).await.expect("a connection").unwrap();
    let asked = next.simple_query("SELECT now() = statement_timestamp()");
    let rows = timeout(PATIENCE, asked).await.expect("an idle one").unwrap();
    let begun_here = rows.iter().any(|row| matches!(row, SimpleQueryMessage::Row(row) if row.get(0) == Some("t")));
    assert!(begun_here, "it has the transaction of the question");
}

/// What a closure keeps after its own COMMIT.
#[derive(Clone, Copy, Debug)]
enum Keeps {
    Handle,
    Stream,
    /// The handle, and the call fails with an error after which work runs again.
    HandleAndFails,
}

/// The session cannot be asked how the transaction ended, as the closure has kept it. Another one can.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closure_that_committed_itself_and_keeps_its_session_is_told_so() {
    let cluster = with_ledger(single()).await;
    for kind in KINDS {
        for guarantee in marked() {
            for keeps in [Keeps::Handle, Keeps::Stream, Keeps::HandleAndFails] {
                let what = format!("{kind:?} {guarantee:?} {keeps:?}");
                // The pool waits for the session of a stream that is kept.
                let usual = Duration::from_secs(match (keeps, kind) {
                    (Keeps::Stream, Kind::Own) => 2,
                    (Keeps::Stream, Kind::Wrapped) => 5,
                    _ => 0,
                });
                for round in 1.. {
                    sql(&cluster, "TRUNCATE entries").await;
                    let pool = pool_of(kind, cluster.socket_addr(Node(0)), 2);
                    pool.connect().await.unwrap();
                    let (began, runs) = (Instant::now(), Runs::default());
                    let error = commits_and_keeps(&pool, guarantee.clone(), keeps, &runs).await;
                    if must_play_again(&error, began, usual, round) {
                        continue;
                    }
                    told(&error, Ending::Committed, &what);
                    assert_eq!((runs.count(), stored(&cluster).await), (1, vec![1]), "{what}");
                    break;
                }
            }
        }
    }
}

/// The error of a call whose closure commits itself, and keeps something of its session until the call has ended.
async fn commits_and_keeps(pool: &Pool, guarantee: Guarantee, keeps: Keeps, runs: &Runs) -> Error {
    let kept = RefCell::new(Vec::<Box<dyn Any>>::new());
    let work = pool.build_transaction().guarantee(guarantee).run(async |tx| {
        runs.begin();
        insert(&tx, 1).await?;
        tx.batch_execute("COMMIT").await?;
        let result = match keeps {
            Keeps::Handle => Ok(()),
            Keeps::HandleAndFails => tx.batch_execute(CONFLICT).await,
            Keeps::Stream => {
                let rows = tx.query_raw(MANY_ROWS, Vec::<i32>::new()).await?;
                kept.borrow_mut().push(Box::new(rows));
                return Ok(());
            }
        };
        kept.borrow_mut().push(Box::new(tx));
        Ok(result?)
    });
    timeout(PATIENCE, work).await.expect("the call hangs").expect_err("the closure has committed")
}

/// With `exit_on_error`, the check by which COMMIT finds its transaction ends the session instead of failing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closure_that_ends_its_transaction_is_told_so_where_errors_end_sessions() {
    let cluster = with_ledger(single()).await;
    sql(&cluster, "ALTER ROLE app SET exit_on_error = on").await;
    for kind in KINDS {
        for guarantee in marked() {
            let what = format!("{kind:?} {guarantee:?}");
            for round in 1.. {
                sql(&cluster, "TRUNCATE entries").await;
                let pool = pool_of(kind, cluster.socket_addr(Node(0)), 2);
                pool.connect().await.unwrap();
                let (began, runs) = (Instant::now(), Runs::default());
                let work = pool.build_transaction().guarantee(guarantee.clone()).run(async |tx| {
                    runs.begin();
                    insert(&tx, 1).await?;
                    tx.batch_execute("COMMIT; BEGIN; INSERT INTO entries VALUES (2)").await?;
                    Ok(())
                });
                let error = timeout(PATIENCE, work).await.expect(&what).expect_err(&what);
                if must_play_again(&error, began, Duration::ZERO, round) {
                    continue;
                }
                assert!(matches!(error, Error::EndedInside(_)), "{what}: {error:?}");
                assert_eq!((runs.count(), stored(&cluster).await), (1, vec![1]), "{what}");
                break;
            }
        }
    }
}

/// A call whose closure writes a row, and sends these statements after that. It takes so long by itself.
async fn is_told_of_its_commit(
    pool: &Pool,
    guarantee: &Guarantee,
    retry: &RetryPolicy,
    statements: [&str; 2],
    usual: Duration,
    what: &str,
) {
    for round in 1.. {
        let began = Instant::now();
        let call = pool.build_transaction().guarantee(guarantee.clone()).retry(retry.clone());
        let work = call.run(async |tx| {
            insert(&tx, 1).await?;
            for statement in statements {
                tx.batch_execute(statement).await?;
            }
            Ok(())
        });
        let error = work.await.expect_err(what);
        if !must_play_again(&error, began, usual, round) {
            return told(&error, Ending::Committed, what);
        }
    }
}

/// The last run that is allowed, too, says "not committed" only where it is so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_run_that_committed_itself_before_its_session_ended_is_told() {
    let cluster = with_ledger(single()).await;
    for kind in KINDS {
        for guarantee in marked() {
            for ends in ["COMMIT", "COMMIT AND CHAIN", "COMMIT; BEGIN"] {
                let what = format!("{kind:?} {guarantee:?} {ends}");
                let pool = pool_of(kind, cluster.socket_addr(Node(0)), 1);
                pool.connect().await.unwrap();
                let retry = RetryPolicy::new().attempts(1);
                is_told_of_its_commit(&pool, &guarantee, &retry, [ends, KILL], Duration::ZERO, &what).await;
            }
        }
    }
}

/// The mark of a transaction does not show whose COMMIT it was: the closure's, or the pool's that got no answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closure_that_committed_itself_is_told_so_although_the_pools_commit_gets_no_answer() {
    for guarantee in marked() {
        let what = format!("{guarantee:?}");
        let cluster = with_ledger(single()).await;
        let listen = SocketAddr::new(cluster.spare_addr(0), 0);
        let cutter = Cutter::start(listen, cluster.socket_addr(Node(0))).await;
        let pool = pool_of(Kind::Own, cutter.addr(), 2);
        let call = pool.build_transaction().guarantee(guarantee);
        let work = call.run(async |tx| {
            insert(&tx, 1).await?;
            tx.batch_execute("COMMIT").await?;
            cutter.arm(Cut::CommitAnswerDropped);
            Ok(())
        });
        let error = timeout(PATIENCE, work).await.unwrap().expect_err(&what);
        told(&error, Ending::Committed, &what);
        assert_eq!(stored(&cluster).await.len(), 1, "{what}");
    }
}

/// A prepared transaction stays in progress, so no waiting shows how it ends. The closure's message and the pool's
/// COMMIT behind it get no answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_was_prepared_is_not_waited_for() {
    let cluster = with_ledger(single()).await;
    let gate = cluster.direct(Node(0)).await;
    let statements = format!("PREPARE TRANSACTION 'own'; SELECT pg_advisory_xact_lock_shared({GATE})");
    for (kind, guarantee) in marked().into_iter().flat_map(|by| KINDS.map(|kind| (kind, by.clone()))) {
        let what = format!("{kind:?} {guarantee:?}");
        gate.batch_execute(&format!("SELECT pg_advisory_lock({GATE})")).await.unwrap();
        let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
        let pool = pool_of(kind, tap.addr(), 2);
        let retry = RetryPolicy::new().deadline(2 * PATIENCE);
        let work = pool.build_transaction().guarantee(guarantee).retry(retry).run(async |tx| {
            insert(&tx, 1).await?;
            assert!(tx.batch_execute(&statements).now_or_never().is_none(), "{what}");
            Ok(())
        });
        let fault = async {
            committing(&gate).await;
            tap.drop_connections();
        };
        let (result, ()) = timeout(PATIENCE, async { tokio::join!(work, fault) }).await.expect("it is waited for");
        told(&result.expect_err(&what), Ending::Prepared, &what);
        gate.batch_execute(&format!("SELECT pg_advisory_unlock({GATE})")).await.unwrap();
        gate.batch_execute("ROLLBACK PREPARED 'own'").await.unwrap();
    }
}

/// … and so does an attempt whose time is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_that_committed_itself_before_its_time_was_over_is_told() {
    let cluster = with_ledger(single()).await;
    for kind in KINDS {
        for guarantee in marked() {
            let what = format!("{kind:?} {guarantee:?}");
            let pool = pool_of(kind, cluster.socket_addr(Node(0)), 1);
            pool.connect().await.unwrap();
            let limit = Duration::from_secs(2);
            let retry = RetryPolicy::new().attempt_timeout(limit);
            let statements = ["COMMIT", "SELECT pg_sleep(60)"];
            is_told_of_its_commit(&pool, &guarantee, &retry, statements, limit, &what).await;
        }
    }
}

/// Without a mark nobody can ask, but the server has answered the closure's COMMIT.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closure_that_committed_itself_without_a_mark_does_not_run_again() {
    let cluster = with_ledger(single()).await;
    for guarantee in [Guarantee::AtMostOnce, Guarantee::AtLeastOnce] {
        for then in [KILL, "SELECT pg_sleep(60)"] {
            let what = format!("{guarantee:?} {then}");
            sql(&cluster, "TRUNCATE entries").await;
            let pool = pool_of(Kind::Own, cluster.socket_addr(Node(0)), 2);
            let retry = RetryPolicy::new().attempt_timeout(Duration::from_secs(2));
            let call = pool.build_transaction().guarantee(guarantee.clone()).retry(retry);
            let work = call.run(async |tx| {
                insert(&tx, 1).await?;
                tx.batch_execute("COMMIT").await?;
                tx.batch_execute(then).await?;
                Ok(())
            });
            let error = timeout(PATIENCE, work).await.expect(&what).expect_err(&what);
            told(&error, Ending::Committed, &what);
            assert_eq!(stored(&cluster).await, [1], "{what}");
        }
    }
}

/// … and where the pool's COMMIT gets no answer, the closure's own was carried out nevertheless.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closures_own_commit_without_a_mark_is_told_although_the_pools_gets_no_answer() {
    for guarantee in [Guarantee::AtMostOnce, Guarantee::AtLeastOnce] {
        let what = format!("{guarantee:?}");
        let cluster = with_ledger(single()).await;
        let cutter = Cutter::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
        let pool = pool_of(Kind::Own, cutter.addr(), 2);
        let call = pool.build_transaction().guarantee(guarantee);
        let work = call.run(async |tx| {
            insert(&tx, 1).await?;
            tx.batch_execute("COMMIT").await?;
            cutter.arm(Cut::CommitAnswerDropped);
            Ok(())
        });
        let error = timeout(PATIENCE, work).await.unwrap().expect_err(&what);
        told(&error, Ending::Committed, &what);
        assert_eq!(stored(&cluster).await, [1], "{what}");
    }
}

/// The ledger is asked in the same words under any `search_path`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namesake_of_an_operator_hides_no_row_of_the_ledger() {
    let cluster = with_ledger(single()).await;
    sql(
        &cluster,
        "CREATE SCHEMA evil; GRANT USAGE ON SCHEMA evil TO app; \
         CREATE FUNCTION evil.eq(uuid, uuid) RETURNS boolean LANGUAGE sql AS 'SELECT false'; \
         CREATE OPERATOR evil.= (FUNCTION = evil.eq, LEFTARG = uuid, RIGHTARG = uuid); \
         ALTER ROLE app SET search_path = evil, pg_catalog, public",
    )
    .await;
    let pool = pool_of(Kind::Own, cluster.socket_addr(Node(0)), 2);
    let runs = Runs::default();
    let result: Result<(), Error> = pool
        .build_transaction()
        .guarantee(Guarantee::Ledger(Ledger::default()))
        .run(async |tx| {
            // A later run would be committed.
            if runs.begin() == 1 {
                insert(&tx, 1).await?;
                tx.batch_execute("COMMIT").await?;
                tx.batch_execute(KILL).await?;
            }
            Ok(())
        })
        .await;
    told(&result.unwrap_err(), Ending::Committed, "ledger");
    assert_eq!((runs.count(), stored(&cluster).await), (1, vec![1]));
}

/// COPY through a method that knows nothing of it: the server waits for data, and takes COMMIT for a mistake of the
/// protocol. Such work was run again until the deadline.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c6_a_copy_whose_data_nobody_sends_is_refused_at_once() {
    let cluster = with_ledger(single()).await;
    for kind in KINDS {
        for way in ["batch_execute", "execute", "query", "savepoint"] {
            let what = format!("{kind:?} {way}");
            let pool = pool_of(kind, cluster.socket_addr(Node(0)), 1);
            let runs = Runs::default();
            let work = pool.transaction(async |mut tx| {
                runs.begin();
                let copy = "COPY entries FROM STDIN";
                let misread = match way {
                    "batch_execute" => tx.batch_execute(copy).await,
                    "execute" => tx.execute(copy, &[]).await.map(drop),
                    "query" => tx.query(copy, &[]).await.map(drop),
                    _ => tx.savepoint().await?.batch_execute(copy).await,
                };
                assert!(misread.is_err(), "{what}");
                Ok(())
            });
            let error = timeout(PATIENCE, work).await.expect(&what).expect_err(&what);
            assert!(matches!(error, Error::RolledBack(RolledBack::StreamKept)), "{what}: {error:?}");
            assert_eq!((error.commit_outcome(), runs.count()), (CommitOutcome::NotCommitted, 1), "{what}");
            pool.transaction(async |tx| {
                // This one needs no data, and its rows were thrown away.
                assert!(tx.batch_execute("COPY entries TO STDOUT").await.is_err());
                Ok(())
            })
            .await
            .unwrap();
        }
    }
}

/// A COMMIT that is sent on a connection of [`Pool::get`](tokio_postgres_failover::Pool::get) is as little cut off as
/// the pool's own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_commit_by_hand_goes_on_waiting_for_the_standby() {
    for kind in KINDS {
        for way in ["COMMIT", "/* by /* hand */ */ END WORK", "COMMIT; SELECT 1", "execute", "prepared", "transaction"]
        {
            let what = format!("{kind:?} {way}");
            let cluster = with_ledger(Cluster::builder().nodes(2)).await;
            cluster.wait_replayed(Node(1)).await;
            let admin = cluster.direct(Node(0)).await;
            let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
            let pool = pool_of(kind, tap.addr(), 2);
            let mut client = pool.get().await.unwrap();
            let prepared = client.prepare("COMMIT").await.unwrap();
            if way == "prepared" {
                // It was parsed long ago when it counts.
                for _ in 0..3 {
                    client.execute(&prepared, &[]).await.unwrap();
                }
            }
            cluster.freeze(Node(1));
            let work = async {
                if way == "transaction" {
                    let tx = client.transaction().await?;
                    tx.batch_execute("INSERT INTO entries VALUES (1)").await?;
                    return tx.commit().await;
                }
                client.batch_execute("BEGIN; INSERT INTO entries VALUES (1)").await?;
                if way == "prepared" {
                    return client.execute(&prepared, &[]).await.map(drop);
                }
                if way == "execute" {
                    return client.execute("COMMIT", &[]).await.map(drop);
                }
                client.batch_execute(way).await
            };
            tokio::select! {
                result = work => panic!("{what}: no standby has it: {result:?}"),
                () = waits(&admin) => {}
            }
            drop(client);
            let began = Instant::now();
            while began.elapsed() < Duration::from_millis(1500) {
                assert_eq!(stored(&cluster).await, [0_i64; 0], "{what}: it shows, and no standby has it");
                sleep(Duration::from_millis(10)).await;
            }
            assert_eq!(tap.counts().cancels, 0, "{what}");
            cluster.thaw(Node(1));
            eventually("the commit goes on", PATIENCE, async || stored(&cluster).await == [1]).await;
        }
    }
}

/// Dropped before the driver's task has even seen it, which a single thread makes certain.
#[tokio::test]
async fn a_commit_by_hand_that_is_dropped_at_once_is_not_cancelled() {
    for way in ["batch", "transaction", "discard"] {
        let cluster = with_ledger(Cluster::builder().nodes(2)).await;
        cluster.wait_replayed(Node(1)).await;
        let admin = cluster.direct(Node(0)).await;
        let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
        let pool = pool_of(Kind::Own, tap.addr(), 2);
        let mut client = pool.get().await.unwrap();
        cluster.freeze(Node(1));
        if way == "transaction" {
            let tx = client.transaction().await.unwrap();
            tx.batch_execute("INSERT INTO entries VALUES (1)").await.unwrap();
            assert!(tx.commit().now_or_never().is_none());
        } else {
            client.batch_execute("BEGIN; INSERT INTO entries VALUES (1)").await.unwrap();
            assert!(client.batch_execute("COMMIT").now_or_never().is_none());
        }
        if way == "discard" {
            client.discard();
        } else {
            drop(client);
        }
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(1500) {
            let rows = admin.query("SELECT FROM entries", &[]).await.unwrap().len();
            assert_eq!(rows, 0, "{way}: it shows, and no standby has it");
            sleep(Duration::from_millis(10)).await;
        }
        // What is discarded ends before it has sent anything, and may be cancelled.
        assert!(tap.counts().cancels == 0 || way == "discard", "{way}");
        cluster.thaw(Node(1));
    }
}
