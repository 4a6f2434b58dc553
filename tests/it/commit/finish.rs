//! How a transaction is finished: what COMMIT's answer proves, what nobody may cut off, and closures that end it
//! themselves.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::pin::pin;
use std::time::Duration;

use futures_util::future::join_all;
use futures_util::{SinkExt, StreamExt};
use testbed::{Cluster, ClusterBuilder, Cut, Cutter, Node, Pooler, Reply, Script, Tap, eventually};
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::{Client, CopyInSink, NoTls};
use tokio_postgres_failover::error::RolledBack;
use tokio_postgres_failover::ledger::Ledger;
use tokio_postgres_failover::{
    CommitOutcome, Error, Guarantee, Pool, RetryPolicy, Transaction, TransactionBuilder, deadpool_postgres,
};

use crate::support::bench::install_ledger;
use crate::support::{CONFLICT, PATIENCE, Runs, insert, sql, stored};

/// The pool's last cancel request for a session comes half a second after the first.
const CANCELS_ARE_OVER: Duration = Duration::from_millis(1500);
/// Our COMMIT, of whichever guarantee. A settler that reads the log sends another text.
const COMMITS: &str = "query LIKE '%; COMMIT' AND query NOT LIKE '%emit_message%'";

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    Own,
    Wrapped,
}

pub(crate) const KINDS: [Kind; 2] = [Kind::Own, Kind::Wrapped];

pub(crate) fn pool_of(kind: Kind, addr: SocketAddr, max_size: usize) -> Pool {
    let url = format!("postgres://app@{addr}/app");
    if kind == Kind::Own {
        return Pool::builder(url).unwrap().max_size(max_size).build().unwrap();
    }
    let mut config = deadpool_postgres::Config::new();
    config.url = Some(url);
    config.pool = Some(deadpool_postgres::PoolConfig::new(max_size));
    Pool::wrap(config.create_pool(None, NoTls).unwrap()).build().unwrap()
}

/// A cluster with the table that [`insert`] fills, and a ledger.
pub(crate) async fn with_ledger(builder: ClusterBuilder) -> Cluster {
    let cluster = builder.start().await;
    sql(&cluster, "CREATE TABLE entries (id bigint); GRANT ALL ON entries TO app").await;
    install_ledger(&cluster).await;
    cluster
}

pub(crate) fn single() -> ClusterBuilder {
    Cluster::builder().nodes(1).setting("max_prepared_transactions", "9")
}

async fn tapped(cluster: &Cluster) -> Tap {
    Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await
}

/// The variant's name, as its `Debug` shows it.
fn name(error: &Error) -> String {
    format!("{error:?}").split(':').next().unwrap_or_default().to_owned()
}

async fn waits_for_the_standby(admin: &Client) {
    let waits = format!("SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND {COMMITS}");
    eventually("COMMIT waits for the standby", PATIENCE, async || !admin.query(&waits, &[]).await.unwrap().is_empty())
        .await;
}

/// K7 under every setting that hides warnings: the wait was cancelled, so nothing is `Ok` before the standby has it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k7_a_cancelled_wait_is_noticed_whatever_the_role_lets_through() {
    let cluster = with_ledger(Cluster::builder().nodes(2)).await;
    let admin = cluster.direct(Node(0)).await;
    for level in ["error", "warning", "notice", "log", "debug5"] {
        let set = format!("ALTER ROLE app SET client_min_messages = '{level}'; ALTER ROLE app SET lc_messages = 'C'");
        admin.batch_execute(&set).await.unwrap();
        cluster.wait_replayed(Node(1)).await;
        let pool = pool_of(Kind::Own, cluster.socket_addr(Node(0)), 2);
        pool.connect().await.unwrap();
        for guarantee in [
            Guarantee::ExactlyOnce,
            Guarantee::Ledger(Ledger::default()),
            Guarantee::AtMostOnce,
            Guarantee::AtLeastOnce,
        ] {
            println!("{level} {guarantee:?}");
            let settles = !matches!(guarantee, Guarantee::AtMostOnce | Guarantee::AtLeastOnce);
            cluster.freeze(Node(1));
            // A settler has five seconds, so a longer deadline takes no time.
            let policy = RetryPolicy::new().deadline(Duration::from_secs(5)).attempts(1);
            let call = pool.build_transaction().guarantee(guarantee).retry(policy);
            let work = call.run(async |tx| insert(&tx, 1).await);
            let fault = async {
                waits_for_the_standby(&admin).await;
                // Every wait of the pool's, the settlers' too.
                let cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity \
                              WHERE wait_event = 'SyncRep' AND usename = 'app'";
                let began = Instant::now();
                while began.elapsed() < if settles { Duration::from_secs(4) } else { Duration::from_secs(1) } {
                    admin.query(cancel, &[]).await.unwrap();
                    sleep(Duration::from_millis(20)).await;
                }
            };
            let (result, ()) = timeout(PATIENCE, async { tokio::join!(work, fault) }).await.unwrap();
            cluster.thaw(Node(1));
            let error = result.expect_err("no standby has it");
            assert_eq!(error.commit_outcome(), CommitOutcome::Unknown, "{level}: {error}");
        }
    }
}

/// A server that fails behind the commit record reports that error, and only then that the transaction was committed,
/// with the PANIC that ends it. Here it may not remove a file that the transaction has made stale.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_behind_the_commit_record_is_no_refusal() {
    let cluster = with_ledger(single()).await;
    let admin = cluster.direct(Node(0)).await;
    let sql = "SELECT current_setting('data_directory') || '/base/' || oid FROM pg_database WHERE datname = 'app'";
    let folder = PathBuf::from(admin.query_one(sql, &[]).await.unwrap().get::<_, String>(0));
    let may_write = |may: bool| {
        let mode = if may { 0o700 } else { 0o500 };
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let url = format!("postgres://postgres@{}/app", cluster.socket_addr(Node(0)));
    let pool = Pool::builder(url).unwrap().max_size(2).build().unwrap();
    for (index, guarantee) in [Guarantee::ExactlyOnce, Guarantee::Ledger(Ledger::default())].into_iter().enumerate() {
        let (runs, what) = (Runs::default(), format!("{guarantee:?}"));
        let work = pool.build_transaction().guarantee(guarantee).run(async |tx| {
            runs.begin();
            insert(&tx, 1).await?;
            let grants = if index == 0 { "GRANT SELECT" } else { "REVOKE SELECT" };
            let to = if index == 0 { "TO" } else { "FROM" };
            tx.batch_execute(&format!("{grants} ON pg_catalog.pg_class {to} app")).await?;
            may_write(false);
            Ok(())
        });
        let fault = async {
            let panics = async || cluster.log(Node(0)).await.matches("it was already committed").count() > index;
            eventually("the server panics", PATIENCE, panics).await;
            may_write(true);
        };
        let (result, ()) = timeout(PATIENCE * 2, async { tokio::join!(work, fault) }).await.expect(&what);
        result.unwrap_or_else(|error| panic!("{what}: {error:?}"));
        assert_eq!((stored(&cluster).await.len(), runs.count()), (index + 1, 1), "{what}");
    }
}

/// A caller that gives up must not make the server show a commit that no standby has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_call_leaves_its_commit_waiting_for_the_standby() {
    for kind in KINDS {
        for closes in [false, true] {
            println!("{kind:?}, the pool is closed: {closes}");
            let cluster = with_ledger(Cluster::builder().nodes(2)).await;
            cluster.wait_replayed(Node(1)).await;
            let (admin, tap) = (cluster.direct(Node(0)).await, tapped(&cluster).await);
            let pool = pool_of(kind, tap.addr(), 2);
            pool.connect().await.unwrap();
            cluster.freeze(Node(1));
            tokio::select! {
                result = pool.transaction(async |tx| insert(&tx, 1).await) => panic!("no standby has it: {result:?}"),
                () = waits_for_the_standby(&admin) => {
                    if closes {
                        pool.close();
                    }
                }
            }
            let began = Instant::now();
            while began.elapsed() < CANCELS_ARE_OVER {
                assert_eq!(stored(&cluster).await, [0_i64; 0], "{kind:?}: it shows, and no standby has it");
                sleep(Duration::from_millis(10)).await;
            }
            assert_eq!(tap.counts().cancels, 0);
            cluster.thaw(Node(1));
            eventually("the commit goes on", PATIENCE, async || stored(&cluster).await == [1]).await;
        }
    }
}

/// The same for a settler's COMMIT, and for what the attempt's limit or the policy's deadline ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_limit_cuts_a_commits_wait() {
    for kind in KINDS {
        let cluster = with_ledger(Cluster::builder().nodes(2)).await;
        cluster.wait_replayed(Node(1)).await;
        // A slow machine may need the shorter time for what comes before COMMIT.
        let is_limited = commit_outlasts(&cluster, kind, Duration::from_millis(300)).await
            || commit_outlasts(&cluster, kind, Duration::from_secs(5)).await;
        assert!(is_limited, "{kind:?}: no COMMIT was sent");
    }
}

/// A COMMIT waits for the standby for longer than this. `false`: the time was over before it was sent.
async fn commit_outlasts(cluster: &Cluster, kind: Kind, limit: Duration) -> bool {
    let (admin, tap) = (cluster.direct(Node(0)).await, tapped(cluster).await);
    let pool = pool_of(kind, tap.addr(), 2);
    pool.connect().await.unwrap();
    cluster.freeze(Node(1));
    let began = Instant::now();
    let call = pool.build_transaction().retry(RetryPolicy::new().attempt_timeout(limit).deadline(limit));
    let mut work = pin!(call.run(async |tx| insert(&tx, 1).await));
    let early = tokio::select! {
        result = &mut work => Some(result),
        () = waits_for_the_standby(&admin) => None,
    };
    if let Some(result) = early {
        cluster.thaw(Node(1));
        let error = result.expect_err("no standby has it");
        assert_eq!(error.commit_outcome(), CommitOutcome::NotCommitted, "{kind:?}: {error}");
        assert!(began.elapsed() >= limit, "{kind:?}: {error}");
        return false;
    }
    let watch = async {
        let end = (began + limit).max(Instant::now()) + CANCELS_ARE_OVER;
        while Instant::now() < end {
            assert_eq!(stored(cluster).await, [0_i64; 0], "{kind:?}: it shows, and no standby has it");
            sleep(Duration::from_millis(10)).await;
        }
        cluster.thaw(Node(1));
    };
    let (result, ()) = timeout(PATIENCE, async { tokio::join!(work, watch) }).await.unwrap();
    result.unwrap();
    assert_eq!((tap.counts().cancels, stored(cluster).await), (0, vec![1]));
    true
}

fn guarantees() -> [Option<Guarantee>; 5] {
    [
        Some(Guarantee::ExactlyOnce),
        Some(Guarantee::Ledger(Ledger::default())),
        Some(Guarantee::AtMostOnce),
        Some(Guarantee::AtLeastOnce),
        None,
    ]
}

fn call<'a>(pool: &'a Pool, guarantee: Option<&Guarantee>) -> TransactionBuilder<'a> {
    match guarantee {
        Some(guarantee) => pool.build_transaction().guarantee(guarantee.clone()),
        None => pool.build_transaction().read_only(true),
    }
}

/// What a closure may do to its own transaction, and which rows are there afterwards. In a read nothing is written in
/// it.
const ENDS: &[(&str, &[i64], &str)] = &[
    ("INSERT INTO entries VALUES (1); ROLLBACK", &[], "RolledBack"),
    ("INSERT INTO entries VALUES (1); ABORT", &[], "RolledBack"),
    ("INSERT INTO entries VALUES (1); COMMIT", &[1], "Committed"),
    ("INSERT INTO entries VALUES (1); END", &[1], "Committed"),
    ("INSERT INTO entries VALUES (1); ROLLBACK AND CHAIN", &[], "RolledBack"),
    ("INSERT INTO entries VALUES (1); COMMIT AND CHAIN", &[1], "Committed"),
    ("INSERT INTO entries VALUES (1); COMMIT AND CHAIN; INSERT INTO entries VALUES (2)", &[1], "Committed"),
    ("INSERT INTO entries VALUES (1); COMMIT; BEGIN", &[1], "Committed"),
    ("INSERT INTO entries VALUES (1); COMMIT; BEGIN; INSERT INTO entries VALUES (2)", &[1], "Committed"),
    ("INSERT INTO entries VALUES (1); ROLLBACK; BEGIN; INSERT INTO entries VALUES (2)", &[], "RolledBack"),
    ("INSERT INTO entries VALUES (1); COMMIT; BEGIN; SAVEPOINT a; INSERT INTO entries VALUES (2)", &[1], "Committed"),
    ("SAVEPOINT a; INSERT INTO entries VALUES (1); COMMIT", &[1], "Committed"),
    ("INSERT INTO entries VALUES (1); COMMIT; CALL commits()", &[1, 3], "Committed"),
    ("INSERT INTO entries VALUES (1); COMMIT; DO 'BEGIN CALL commits();END'", &[1, 3], "Committed"),
    ("INSERT INTO entries VALUES (1); PREPARE TRANSACTION 'left'", &[], "Prepared"),
    ("INSERT INTO entries VALUES (1); ROLLBACK; INSERT INTO entries VALUES (3)", &[3], "RolledBack"),
];

const PROCEDURE: &str = "CREATE OR REPLACE PROCEDURE commits() LANGUAGE plpgsql AS \
                         'BEGIN INSERT INTO entries VALUES (3); COMMIT; END'";

/// One statement after the other, as a program sends them.
async fn one_by_one(tx: &Transaction, statements: &str) -> Result<(), Error> {
    for statement in statements.split("; ").map(str::trim) {
        tx.batch_execute(statement).await?;
    }
    Ok(())
}

async fn cleared(admin: &Client) {
    let left = admin.query("SELECT gid FROM pg_prepared_xacts", &[]).await.unwrap();
    for row in left {
        admin.batch_execute(&format!("ROLLBACK PREPARED '{}'", row.get::<_, String>(0))).await.unwrap();
    }
    admin.batch_execute("TRUNCATE entries").await.unwrap();
}

/// A closure that ends its transaction itself is told so: never `Ok`, never run again, and never "not committed".
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closure_that_ends_its_transaction_is_told_so() {
    let cluster = with_ledger(single()).await;
    for kind in KINDS {
        closures_are_told(&cluster, kind, cluster.socket_addr(Node(0))).await;
    }
}

/// So it is behind a pooler, where another session may answer next. There COMMIT's message has a check.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closure_that_ends_its_transaction_behind_a_pooler_is_told_so() {
    let cluster = with_ledger(single()).await;
    let pooler = Pooler::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    closures_are_told(&cluster, Kind::Own, pooler.addr()).await;
}

async fn closures_are_told(cluster: &Cluster, kind: Kind, addr: SocketAddr) {
    let admin = cluster.direct(Node(0)).await;
    admin.batch_execute(PROCEDURE).await.unwrap();
    for level in ["notice", "error"] {
        admin.batch_execute(&format!("ALTER ROLE app SET client_min_messages = '{level}'")).await.unwrap();
        let pool = pool_of(kind, addr, 2);
        for guarantee in guarantees() {
            for (statements, rows, how) in ENDS {
                for at_once in [true, false] {
                    let what = format!("{level} {kind:?} {guarantee:?}: {statements}, at once: {at_once}");
                    // A read cannot write before it has ended its transaction.
                    let statements = match guarantee {
                        Some(_) => (*statements).to_owned(),
                        None => statements.replace("INSERT INTO entries VALUES (1)", "SELECT 1"),
                    };
                    if at_once && statements.contains("CALL") {
                        // A procedure that commits has to come alone.
                        continue;
                    }
                    if guarantee.is_none() && statements.contains("(2)") && statements.contains("CHAIN") {
                        // The chained transaction is read-only, too.
                        continue;
                    }
                    let runs = Runs::default();
                    let result = call(&pool, guarantee.as_ref())
                        .run(async |tx| {
                            runs.begin();
                            if at_once {
                                tx.batch_execute(&statements).await?;
                            } else {
                                one_by_one(&tx, &statements).await?;
                            }
                            Ok(())
                        })
                        .await;
                    let error = result.expect_err(&what);
                    assert_eq!(name(&error), "EndedInside", "{what}: {error}");
                    assert_eq!(error.commit_outcome(), CommitOutcome::Unknown, "{what}: {error}");
                    assert_eq!(runs.count(), 1, "{what}");
                    let text = error.to_string();
                    let marked = matches!(guarantee, Some(Guarantee::ExactlyOnce | Guarantee::Ledger(_)));
                    // The answers show each end.
                    let shown = kind == Kind::Own;
                    let expected = match *how {
                        _ if !marked && !shown => "ended its transaction itself",
                        "Committed" => "committed its transaction itself",
                        "Prepared" => "PREPARE TRANSACTION",
                        _ => "rolled its transaction back itself",
                    };
                    assert!(text.contains(expected), "{what}: {text}");
                    let rows: Vec<i64> = match guarantee {
                        Some(_) => rows.to_vec(),
                        None => rows.iter().copied().filter(|row| *row != 1).collect(),
                    };
                    let mut found = stored(cluster).await;
                    if guarantee.is_none() {
                        // A read is told afterwards: what it began by hand may have been committed.
                        found.retain(|row| *row != 2);
                    }
                    assert_eq!(found, rows, "{what}");
                    cleared(&admin).await;
                }
            }
        }
        let status = pool.status();
        assert_eq!((status.size, status.view.generation.get()), (status.available, 1));
    }
}

/// The pool cannot read this text as the server does, so it cannot see that the transaction was rolled back and another
/// one has begun.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_that_no_text_shows_is_never_ok() {
    let cluster = with_ledger(single()).await;
    for kind in KINDS {
        let pool = pool_of(kind, cluster.socket_addr(Node(0)), 2);
        for guarantee in guarantees().into_iter().flatten() {
            let (runs, what) = (Runs::default(), format!("{kind:?} {guarantee:?}"));
            let result = call(&pool, Some(&guarantee))
                .run(async |tx| {
                    runs.begin();
                    insert(&tx, 1).await?;
                    tx.batch_execute("SET LOCAL standard_conforming_strings = off").await?;
                    Ok(tx.batch_execute(r"SELECT '\''; ROLLBACK AND CHAIN; --'").await?)
                })
                .await;
            let error = result.expect_err(&what);
            assert_eq!(name(&error), "EndedInside", "{what}: {error}");
            assert_eq!((runs.count(), stored(&cluster).await.len()), (1, 0), "{what}: {error}");
        }
    }
}

/// … and the error that it fails with afterwards is not the whole story.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closure_that_ends_its_transaction_and_fails_is_not_run_again() {
    let cluster = with_ledger(single()).await;
    let admin = cluster.direct(Node(0)).await;
    let kill = "SELECT pg_terminate_backend(pg_backend_pid())";
    for kind in KINDS {
        let pool = pool_of(kind, cluster.socket_addr(Node(0)), 2);
        for guarantee in guarantees().into_iter().flatten() {
            let marked = matches!(guarantee, Guarantee::ExactlyOnce | Guarantee::Ledger(_));
            for ends in ["COMMIT", "COMMIT AND CHAIN", "COMMIT; BEGIN"] {
                for fails in [CONFLICT, "SELECT 1 / 0", kill, "own"] {
                    let what = format!("{kind:?} {guarantee:?}: {ends}; {fails}");
                    let known = marked || fails != kill || kind == Kind::Own;
                    if !known {
                        // Nobody can tell: nobody watches the session, and an unmarked transaction leaves nothing
                        // behind but on that.
                        continue;
                    }
                    let runs = Runs::default();
                    let result: Result<(), Error> = call(&pool, Some(&guarantee))
                        .run(async |tx| {
                            runs.begin();
                            tx.batch_execute("INSERT INTO entries VALUES (1)").await?;
                            tx.batch_execute(ends).await?;
                            if fails == "own" {
                                return Err(Error::abort("own"));
                            }
                            tx.batch_execute(fails).await?;
                            Ok(())
                        })
                        .await;
                    let error = result.expect_err(&what);
                    assert_eq!(name(&error), "EndedInside", "{what}: {error}");
                    assert_eq!((runs.count(), stored(&cluster).await), (1, vec![1]), "{what}");
                    assert_eq!(error.commit_outcome(), CommitOutcome::Unknown);
                    cleared(&admin).await;
                }
            }
        }
    }
}

/// COMMIT checks for its transaction by a statement that the session has prepared. Where the closure takes that away,
/// or the role may not call what it asks for, nothing is lost, doubled or untrue.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_check_of_commit_every_answer_is_true() {
    let revoke = "REVOKE EXECUTE ON FUNCTION pg_catalog.pg_current_xact_id_if_assigned() FROM PUBLIC";
    for (deallocates, revoked) in [("; DEALLOCATE ALL", false), ("; DEALLOCATE ALL", true), ("", true)] {
        let cluster = with_ledger(single()).await;
        let admin = cluster.direct(Node(0)).await;
        if revoked {
            admin.batch_execute(revoke).await.unwrap();
        }
        for kind in KINDS {
            for guarantee in guarantees().into_iter().flatten() {
                for (ends, expected) in [("", "Ok"), ("; COMMIT", "EndedInside"), ("; COMMIT; BEGIN", "EndedInside")] {
                    let what = format!("{kind:?} {guarantee:?} {deallocates}{ends}, revoked: {revoked}");
                    let pool = pool_of(kind, cluster.socket_addr(Node(0)), 1);
                    // The second call finds a session that was used, and what the first has learned.
                    for nth in 0..2 {
                        let runs = Runs::default();
                        let work = call(&pool, Some(&guarantee)).run(async |tx| {
                            runs.begin();
                            let insert = format!("INSERT INTO entries VALUES (1){deallocates}{ends}");
                            Ok(tx.batch_execute(&insert).await?)
                        });
                        let result = work.await.map_or_else(|error| name(&error), |()| "Ok".to_owned());
                        assert_eq!((&*result, stored(&cluster).await), (expected, vec![1]), "{what}");
                        let most = if expected == "Ok" && nth == 0 { 4 } else { 1 };
                        assert!(runs.count() <= most, "{what}: {} runs", runs.count());
                        admin.batch_execute("TRUNCATE entries").await.unwrap();
                    }
                }
            }
        }
    }
}

/// A closure that goes on in a failed transaction of its own is not told "rolled back" alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_transaction_behind_a_commit_of_the_closures_own_is_told_apart() {
    let cluster = with_ledger(single()).await;
    for kind in KINDS {
        let pool = pool_of(kind, cluster.socket_addr(Node(0)), 2);
        let result = pool
            .transaction(async |tx| {
                tx.batch_execute("INSERT INTO entries VALUES (1); COMMIT; BEGIN").await?;
                let _ = tx.batch_execute("SELECT 1 / 0").await;
                Ok(())
            })
            .await;
        let error = result.unwrap_err();
        assert_eq!(name(&error), "EndedInside", "{error}");
    }
}

async fn kept_copy(tx: &Transaction) -> Result<std::pin::Pin<Box<CopyInSink<std::io::Cursor<Vec<u8>>>>>, Error> {
    let mut sink = Box::pin(tx.copy_in("COPY entries FROM STDIN").await?);
    sink.send(std::io::Cursor::new(b"7\n".to_vec())).await?;
    Ok(sink)
}

/// More than the sockets between the two hold.
pub(crate) const MANY_ROWS: &str = "SELECT repeat('x', 1000) FROM generate_series(1, 100000)";

/// C6 for what holds a request open without holding the handle. The cases wait for a while each, so they run side by
/// side.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c6_a_kept_stream_is_refused_and_named() {
    let cluster = with_ledger(single()).await;
    for kind in KINDS {
        let mut cases = Vec::new();
        for guarantee in guarantees() {
            for stream in ["copy in", "rows", "typed rows", "copy out", "simple"] {
                let read = guarantee.is_none();
                let few = kind == Kind::Wrapped || !(read || guarantee == Some(Guarantee::ExactlyOnce));
                if (read && stream == "copy in") || (few && !["copy in", "rows"].contains(&stream)) {
                    continue;
                }
                cases.push(a_stream_is_kept(&cluster, kind, guarantee.clone(), stream));
            }
        }
        join_all(cases).await;
        assert_eq!(stored(&cluster).await, [0_i64; 0]);
    }
}

async fn a_stream_is_kept(cluster: &Cluster, kind: Kind, guarantee: Option<Guarantee>, stream: &str) {
    let what = format!("{kind:?} {guarantee:?} {stream}");
    let pool = pool_of(kind, cluster.socket_addr(Node(0)), 1);
    pool.connect().await.unwrap();
    let runs = Runs::default();
    let work = call(&pool, guarantee.as_ref()).run(async |tx| {
        runs.begin();
        let kept: Box<dyn std::any::Any> = match stream {
            "copy in" => Box::new(kept_copy(&tx).await?),
            "rows" => Box::new(tx.query_raw(MANY_ROWS, Vec::<i32>::new()).await?),
            "typed rows" => Box::new(tx.query_typed_raw::<i32, _>(MANY_ROWS, []).await?),
            "copy out" => Box::new(tx.copy_out(&format!("COPY ({MANY_ROWS}) TO STDOUT")).await?),
            _ => Box::new(tx.simple_query_raw(MANY_ROWS).await?),
        };
        Ok(kept)
    });
    let result = timeout(PATIENCE, work).await.unwrap_or_else(|_| panic!("{what}: it hangs"));
    let error = result.map(drop).expect_err(&what);
    assert!(matches!(error, Error::RolledBack(_)), "{what}: {error:?}");
    assert!(error.to_string().contains("stream"), "{what}: {error}");
    assert_eq!((error.commit_outcome(), runs.count()), (CommitOutcome::NotCommitted, 1), "{what}");
    // The one connection of the pool is free again.
    pool.read(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await.expect(&what);
}

/// A stream that was read, dropped or finished within the closure is in nobody's way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c6_a_stream_that_ends_in_the_closure_is_committed() {
    let cluster = with_ledger(single()).await;
    for kind in KINDS {
        let pool = pool_of(kind, cluster.socket_addr(Node(0)), 1);
        pool.transaction(async |tx| {
            kept_copy(&tx).await?.as_mut().finish().await?;
            let mut rows = Box::pin(tx.query_raw("SELECT generate_series(1, 100000)", Vec::<i32>::new()).await?);
            rows.next().await;
            Ok(())
        })
        .await
        .unwrap();
        assert_eq!(stored(&cluster).await, [7]);
        sql(&cluster, "TRUNCATE entries").await;
    }
}

/// The server sends a part of the rows, and then is busy for longer than a kept stream is waited for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c6_a_dropped_stream_of_a_slow_statement_is_committed() {
    let cluster = with_ledger(single()).await;
    let pool = pool_of(Kind::Own, cluster.socket_addr(Node(0)), 1);
    let slow = "SELECT repeat('x', 9000) UNION ALL SELECT pg_sleep(4)::text";
    let runs = Runs::default();
    let work = pool.transaction(async |tx| {
        runs.begin();
        insert(&tx, 1).await?;
        drop(tx.query_raw(slow, Vec::<i32>::new()).await?);
        Ok(())
    });
    timeout(PATIENCE, work).await.expect("it hangs").expect("nothing is kept");
    assert_eq!((runs.count(), stored(&cluster).await), (1, vec![1]));
}

/// The limit of an attempt counts until COMMIT can be sent: a statement that nobody waits for any more does not hold it
/// up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c2_a_dropped_statement_holds_no_attempt_beyond_its_limit() {
    let cluster = with_ledger(single()).await;
    let pool = pool_of(Kind::Own, cluster.socket_addr(Node(0)), 1);
    pool.connect().await.unwrap();
    for dropped in ["statement", "stream"] {
        let limit = RetryPolicy::new().attempt_timeout(Duration::from_secs(2));
        let runs = Runs::default();
        let work = pool.build_transaction().retry(limit).run(async |tx| {
            runs.begin();
            insert(&tx, 1).await?;
            if dropped == "stream" {
                let slow = "SELECT repeat('x', 9000) UNION ALL SELECT pg_sleep(600)::text";
                drop(tx.query_raw(slow, Vec::<i32>::new()).await?);
            } else {
                let statement = tx.batch_execute("SELECT pg_sleep(600)");
                assert!(timeout(Duration::from_millis(100), statement).await.is_err());
            }
            Ok(())
        });
        let error = timeout(PATIENCE, work).await.expect("it hangs").expect_err("the limit is over");
        assert!(matches!(error, Error::TimedOut { .. }), "{dropped}: {error:?}");
        assert_eq!((error.commit_outcome(), runs.count()), (CommitOutcome::NotCommitted, 1), "{dropped}");
        assert_eq!(stored(&cluster).await, [0_i64; 0], "{dropped}");
    }
}

/// A handle is refused whatever else is kept with it.
#[tokio::test]
async fn c6_the_handle_is_named_first() {
    let cluster = with_ledger(single()).await;
    let pool = pool_of(Kind::Own, cluster.socket_addr(Node(0)), 1);
    let error = pool.transaction(async |tx| Ok((kept_copy(&tx).await?, tx))).await.map(drop).unwrap_err();
    assert!(matches!(error, Error::RolledBack(RolledBack::HandleKept)), "{error:?}");
}

/// COMMIT's answer, cut after each of its bytes: as soon as the server has said that it committed, nothing is in doubt.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn k2_a_commit_that_is_answered_is_ok_whatever_becomes_of_the_session() {
    // What says that the session is ready for the next query.
    const READY: usize = 6;
    for guarantee in [Guarantee::AtMostOnce, Guarantee::ExactlyOnce] {
        let cluster = with_ledger(single()).await;
        let listen = SocketAddr::new(cluster.spare_addr(0), 0);
        let cutter = Cutter::start(listen, cluster.socket_addr(Node(0))).await;
        let pool = pool_of(Kind::Own, cutter.addr(), 2);
        let mut answered = Vec::new();
        for passed in 0..150 {
            let cut = cutter.arm(Cut::CommitAnswerHalf(passed));
            let result = timeout(PATIENCE, call(&pool, Some(&guarantee)).run(async |tx| insert(&tx, 1).await)).await;
            timeout(PATIENCE, cut.happened()).await.unwrap();
            match result.unwrap() {
                Ok(()) => answered.push(passed),
                Err(Error::CommitUnknown(_)) if guarantee == Guarantee::AtMostOnce => {}
                Err(error) => panic!("{passed} bytes: {error}"),
            }
        }
        assert_eq!(stored(&cluster).await.len(), 150, "each is stored once");
        if guarantee == Guarantee::AtMostOnce {
            let first = answered[0];
            assert_eq!(answered, (first..150).collect::<Vec<_>>(), "what was said stays said");
            assert!(150 - first >= READY, "COMMIT's own answer proves it: {first}");
        }
    }
}

/// What a server may say to COMMIT's message, and what it proves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_behind_commits_own_answer_is_no_refusal() {
    let late = || Reply::Error {
        sqlstate: "58P01".to_owned(),
        severity: "ERROR".to_owned(),
        routine: Some("SlruReportIOError".to_owned()),
        message: "could not access status of transaction".to_owned(),
    };
    let none = || Reply::Rows { columns: Vec::new(), rows: Vec::new(), tag: "SELECT 0".to_owned() };
    let said = [
        ("late", vec![Reply::done("SET"), none(), Reply::done("COMMIT"), late()]),
        ("at commit", vec![Reply::done("SET"), none(), late()]),
        ("before", vec![Reply::done("SET"), late()]),
    ];
    for (when, replies) in said {
        let script = Script::start(([127, 0, 0, 1], 0).into(), move |sql| {
            if sql.ends_with("; COMMIT") { Reply::Several(replies.clone()) } else { Script::honest(sql) }
        })
        .await;
        let pool = pool_of(Kind::Own, script.addr(), 2);
        let runs = Runs::default();
        let result = pool
            .build_transaction()
            .guarantee(Guarantee::AtMostOnce)
            .run(async |tx| {
                runs.begin();
                Ok(tx.batch_execute("INSERT").await?)
            })
            .await;
        assert_eq!(result.is_ok(), when == "late", "{when}: {result:?}");
        assert_eq!(runs.count(), 1, "{when}");
        if let Err(error) = result {
            assert_eq!(error.commit_outcome(), CommitOutcome::NotCommitted, "{when}: {error}");
        }
    }
}

/// A proxy may keep back a message that begins with SET, and answer that alone. Then nothing was committed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_without_that_to_commit_proves_nothing() {
    let none = || Reply::Rows { columns: Vec::new(), rows: Vec::new(), tag: "SELECT 0".to_owned() };
    for replies in [vec![Reply::done("SET")], vec![Reply::done("SET"), none()]] {
        let script = Script::start(([127, 0, 0, 1], 0).into(), move |sql| {
            if sql.ends_with("; COMMIT") { Reply::Several(replies.clone()) } else { Script::honest(sql) }
        })
        .await;
        let pool = pool_of(Kind::Own, script.addr(), 2);
        let call = pool.build_transaction().guarantee(Guarantee::AtMostOnce);
        let result = call.run(async |tx| Ok(tx.batch_execute("INSERT").await?)).await;
        let error = result.expect_err("nothing was committed");
        assert_eq!(error.commit_outcome(), CommitOutcome::Unknown, "{error}");
    }
}
