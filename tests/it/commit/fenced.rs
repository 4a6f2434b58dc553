//! A primary is fenced while a COMMIT is under way on it. A fence keeps back new transactions, and the server goes on
//! with those that have begun. And a fence is lifted before the pool has asked about it.

use std::time::Duration;

use testbed::{Cluster, Node};
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres_failover::error::Unsettled;
use tokio_postgres_failover::{Error, Guarantee, Pool, deadpool_postgres};

use crate::commit::finish::{KINDS, Kind};
use crate::support::load::{LONG, primary_lost};
use crate::support::{Runs, close_gate, committing, insert, open_gate, server, sql, stored};

/// The call's deadline, which ends the search for a primary that can be asked.
const DEADLINE: Duration = Duration::from_secs(6);

fn pool_of(kind: Kind, cluster: &Cluster, dead_after: Duration) -> Pool {
    asking(kind, cluster, dead_after, Duration::from_millis(100))
}

/// A pool that asks its primary nothing before a call does.
fn unaware_pool_of(kind: Kind, cluster: &Cluster) -> Pool {
    asking(kind, cluster, LONG, LONG * 10)
}

fn asking(kind: Kind, cluster: &Cluster, dead_after: Duration, often: Duration) -> Pool {
    let url = cluster.url_hosts();
    if kind == Kind::Own {
        let builder = Pool::builder(url).unwrap().max_size(2).heartbeat_interval(often).patrol_interval(often);
        return builder.dead_after(dead_after).build().unwrap();
    }
    let mut config = deadpool_postgres::Config::new();
    config.url = Some(url);
    config.pool = Some(deadpool_postgres::PoolConfig::new(2));
    let existing = config.create_pool(None, tokio_postgres::NoTls).unwrap();
    let builder = Pool::wrap(existing).heartbeat_interval(often).patrol_interval(often);
    builder.dead_after(dead_after).build().unwrap()
}

/// The answer to COMMIT is waited for, although no work begins there any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_under_way_outlives_a_fence() {
    for kind in KINDS {
        let cluster = server().await;
        let gate = close_gate(&cluster).await;
        let pool = pool_of(kind, &cluster, LONG);
        pool.connect().await.unwrap();
        let runs = Runs::default();
        let call = pool.build_transaction().deadline(DEADLINE).run(async |tx| {
            runs.begin();
            insert(&tx, 1).await
        });
        let fault = async {
            committing(&gate).await;
            cluster.set_read_only(Node(0), true).await;
            primary_lost(&pool).await;
            open_gate(&gate).await;
        };
        let (result, ()) = timeout(LONG, async { tokio::join!(call, fault) }).await.expect("the call hangs");
        assert!(result.is_ok(), "{kind:?}: {result:?}");
        assert_eq!((runs.count(), stored(&cluster).await), (1, vec![1]), "{kind:?}");
        let next = pool.build_transaction().deadline(Duration::from_millis(100));
        assert!(next.run(async |tx| insert(&tx, 2).await).await.is_err(), "{kind:?}: work was begun under the fence");
    }
}

/// So it is for a COMMIT by hand, and a statement that does not commit is ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_by_hand_outlives_a_fence_and_nothing_else_does() {
    let cluster = server().await;
    let gate = close_gate(&cluster).await;
    let pool = pool_of(Kind::Own, &cluster, LONG);
    pool.connect().await.unwrap();
    let (mut one, other) = (pool.get().await.unwrap(), pool.get().await.unwrap());
    let transaction = one.transaction().await.unwrap();
    transaction.execute("INSERT INTO entries VALUES (1)", &[]).await.unwrap();
    let fault = async {
        committing(&gate).await;
        cluster.set_read_only(Node(0), true).await;
        primary_lost(&pool).await;
        open_gate(&gate).await;
    };
    let sleeps = other.batch_execute("SELECT pg_sleep(600)");
    let all = async { tokio::join!(transaction.commit(), sleeps, fault) };
    let (committed, slept, ()) = timeout(LONG, all).await.expect("the statement is not ended");
    assert!(committed.is_ok(), "{committed:?}");
    assert!(slept.is_err());
    assert_eq!(stored(&cluster).await, [1]);
}

/// The fence is lifted, so the same server is the primary again, and answers the COMMIT itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_by_hand_outlives_a_fence_that_is_lifted() {
    let cluster = server().await;
    let gate = close_gate(&cluster).await;
    let pool = pool_of(Kind::Own, &cluster, LONG);
    pool.connect().await.unwrap();
    let mut one = pool.get().await.unwrap();
    let transaction = one.transaction().await.unwrap();
    transaction.execute("INSERT INTO entries VALUES (1)", &[]).await.unwrap();
    let fault = async {
        committing(&gate).await;
        cluster.set_read_only(Node(0), true).await;
        primary_lost(&pool).await;
        cluster.set_read_only(Node(0), false).await;
        pool.connect().await.unwrap();
        open_gate(&gate).await;
    };
    let (committed, ()) = timeout(LONG, async { tokio::join!(transaction.commit(), fault) }).await.expect("it hangs");
    assert!(committed.is_ok(), "{committed:?}");
    assert_eq!(stored(&cluster).await, [1]);
}

/// The wait for the answer has a limit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_a_fenced_server_does_not_answer_is_given_up() {
    for kind in KINDS {
        let cluster = server().await;
        let gate = close_gate(&cluster).await;
        let pool = pool_of(kind, &cluster, Duration::from_secs(1));
        pool.connect().await.unwrap();
        let call = pool.build_transaction().deadline(DEADLINE).run(async |tx| insert(&tx, 1).await);
        let fault = async {
            committing(&gate).await;
            cluster.set_read_only(Node(0), true).await;
        };
        let (result, ()) = timeout(LONG, async { tokio::join!(call, fault) }).await.expect("the call hangs");
        let Err(Error::CommitUnknown(unknown)) = &result else { panic!("{kind:?}: {result:?}") };
        assert_eq!(unknown.reason(), Unsettled::NoPrimary, "{kind:?}");
        open_gate(&gate).await;
    }
}

/// When another server is the primary, it knows best: the COMMIT on the fenced one is not waited for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_under_a_fence_is_left_for_a_successor() {
    let cluster = Cluster::builder().nodes(2).asynchronous().start().await;
    sql(&cluster, "CREATE TABLE entries (id bigint); GRANT ALL ON entries TO app").await;
    let gate = close_gate(&cluster).await;
    cluster.wait_replayed(Node(1)).await;
    let pool = pool_of(Kind::Own, &cluster, LONG);
    pool.connect().await.unwrap();
    let runs = Runs::default();
    let call = pool
        .build_transaction()
        .deadline(LONG)
        .run(async |tx| if runs.begin() == 1 { insert(&tx, 1).await } else { Ok(tx.batch_execute("SELECT 1").await?) });
    let fault = async {
        committing(&gate).await;
        cluster.set_read_only(Node(0), true).await;
        primary_lost(&pool).await;
        cluster.promote(Node(1)).await;
    };
    let (result, ()) = timeout(LONG, async { tokio::join!(call, fault) }).await.expect("the call hangs");
    assert!(result.is_ok(), "{result:?}");
    assert_eq!(runs.count(), 2, "it was not settled by the successor");
}

/// What a closure does after a fence has refused its statement.
#[derive(Clone, Copy, Debug)]
enum Then {
    Returns,
    HidesIt,
    IgnoresIt,
}

/// The server accepts writes again when the pool asks it, but it did not when the transaction began. So the closure has
/// not made its transaction read-only, and the work runs again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_that_met_a_fence_runs_again_although_the_fence_was_lifted() {
    for kind in KINDS {
        let cluster = server().await;
        let mut id = 0;
        for guarantee in [Guarantee::ExactlyOnce, Guarantee::AtMostOnce, Guarantee::AtLeastOnce] {
            for then in [Then::Returns, Then::HidesIt, Then::IgnoresIt] {
                // It notices no fence by itself.
                let pool = unaware_pool_of(kind, &cluster);
                pool.connect().await.unwrap();
                drop(pool.get().await.unwrap());
                cluster.set_read_only(Node(0), true).await;
                let runs = Runs::default();
                let call = pool.build_transaction().guarantee(guarantee.clone()).deadline(LONG);
                let result = call.run(async |tx| {
                    let written = insert(&tx, id).await;
                    if runs.begin() > 1 {
                        return written;
                    }
                    let refused = written.unwrap_err();
                    assert_eq!(refused.code(), Some(&SqlState::READ_ONLY_SQL_TRANSACTION), "{refused:?}");
                    cluster.set_read_only(Node(0), false).await;
                    match then {
                        Then::Returns => Err(refused),
                        Then::HidesIt => Err(Error::abort("it did not work")),
                        Then::IgnoresIt => Ok(()),
                    }
                });
                let result = timeout(LONG, result).await.expect("the call hangs");
                assert!(result.is_ok(), "{kind:?}, {guarantee:?}, {then:?}: {result:?}");
                assert_eq!(runs.count(), 2, "{kind:?}, {guarantee:?}, {then:?}");
                id += 1;
                pool.close();
            }
        }
        assert_eq!(stored(&cluster).await, (0..id).collect::<Vec<_>>(), "{kind:?}");
    }
}
