//! Behind a pooler in transaction mode, which leads each transaction to the server that it is told, and tells nobody.

use std::net::SocketAddr;
use std::time::Instant;

use testbed::{Cluster, Node, Pooler, eventually};
use tokio_postgres::error::SqlState;
use tokio_postgres_failover::{Client, Guarantee, PoolBuilder};

use crate::support::bench::{install_ledger, settlers};
use crate::support::load::{Load, Write, by_url, create_table, from_env, generation};
use crate::support::{PATIENCE, Runs, insert, sql, stored};

/// Two servers, one of them synchronous, behind a pooler that leads to the first. A commit takes its time, so that most
/// of the writers are in one when something happens.
async fn behind_pooler() -> (Cluster, Pooler) {
    let cluster = Cluster::builder().nodes(2).start().await;
    create_table(&cluster).await;
    install_ledger(&cluster).await;
    sql(
        &cluster,
        "CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.1); RETURN NULL; END';
         CREATE CONSTRAINT TRIGGER linger AFTER INSERT ON entries DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION linger()",
    )
    .await;
    cluster.wait_replayed(Node(1)).await;
    let listen = SocketAddr::new(cluster.spare_addr(0), cluster.port());
    let pooler = Pooler::start(listen, cluster.socket_addr(Node(0))).await;
    (cluster, pooler)
}

/// A pool that knows the pooler's address, and no server's.
fn through(pooler: &Pooler) -> PoolBuilder {
    by_url(format!("postgres://app@{}/app", pooler.addr()))
}

/// How the other server takes over.
#[derive(Clone, Copy, Debug)]
enum Change {
    /// The pooler pauses meanwhile, and each of its clients is led to the new primary for its next transaction.
    Planned,
    /// The old primary lives on, with commits that wait for a standby that it has no more.
    Split,
    /// The old primary dies with all that is under way.
    Crash,
}

/// Changes the primary behind the pooler, under eight writers, `ROUNDS` times with each settler. No caller sees an
/// error, and every write is stored once.
async fn changes_behind_a_pooler(change: Change) {
    let rounds = from_env("ROUNDS", 5);
    for guarantee in settlers() {
        let (cluster, pooler) = behind_pooler().await;
        let pool = through(&pooler).guarantee(guarantee.clone()).max_size(16).build().unwrap();
        // Half of the sessions wait for work, verified with the primary of before.
        let mut sessions = Vec::new();
        for _ in 0..16 {
            sessions.push(pool.get().await.unwrap());
        }
        drop(sessions);
        let load = Load::warm(&pool, 8, Write::Uncached).await;
        for _ in 0..rounds {
            let (old, new) = (cluster.primary(), cluster.most_advanced_standby().await);
            let before = generation(&pool);
            match change {
                Change::Planned => pooler.pause().await,
                Change::Split => {}
                Change::Crash => cluster.kill(old).await,
            }
            cluster.promote(new).await;
            let switched = Instant::now();
            pooler.set_target(cluster.socket_addr(new));
            load.all_written_since(switched).await;
            eventually("the pool knows the new primary", PATIENCE, async || generation(&pool) > before).await;
            cluster.restart_as_standby(old).await;
            load.all_written_since(Instant::now()).await;
        }
        let outcome = load.stop(&cluster).await;
        println!("{change:?}, {guarantee:?}: {:?}, errors: {:#?}", outcome.verdict, outcome.errors);
        outcome.assert_flawless();
    }
}

/// C11, K2, K4: a planned change behind the pooler, of which it tells nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c11_a_planned_change_behind_a_pooler_doubles_and_loses_nothing() {
    changes_behind_a_pooler(Change::Planned).await;
}

/// C11, K6: the same without a pause, and the old primary lives on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c11_a_pooler_that_turns_away_from_a_living_primary_doubles_and_loses_nothing() {
    changes_behind_a_pooler(Change::Split).await;
}

/// C11, K2, K4: the same after a crash.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c11_a_crash_behind_a_pooler_doubles_and_loses_nothing() {
    changes_behind_a_pooler(Change::Crash).await;
}

/// C11: a session that was verified with one server leads to another one. Work with a mark in the log begins there when
/// that one is verified, too, and not before: the mark would be read as one of the first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c11_marked_work_begins_on_no_server_that_was_not_verified() {
    let (cluster, pooler) = behind_pooler().await;
    let pool = through(&pooler).build().unwrap();
    let runs = Runs::default();
    for id in 1..=2_u32 {
        pool.transaction(async |tx| {
            runs.begin();
            assert!(generation(&pool) >= u64::from(id), "the server is not known");
            insert(&tx, i64::from(id)).await
        })
        .await
        .unwrap();
        if id == 1 {
            cluster.promote(Node(1)).await;
            pooler.set_target(cluster.socket_addr(Node(1)));
        }
    }
    // A slow machine may cost a run more.
    assert!(runs.count() >= 2 && stored(&cluster).await == [1, 2], "{} runs", runs.count());
}

async fn backend(client: &Client) -> i32 {
    client.query_typed("SELECT pg_backend_pid()", &[]).await.unwrap()[0].get(0)
}

/// C11: whatever needs no session works, with parameters and under each guarantee. What a session would have to
/// remember does not, and says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c11_what_works_behind_a_pooler() {
    let (cluster, pooler) = behind_pooler().await;
    let pool = through(&pooler).build().unwrap();
    for guarantee in settlers().into_iter().chain([Guarantee::AtMostOnce, Guarantee::AtLeastOnce]) {
        pool.build_transaction().guarantee(guarantee).run(async |tx| insert(&tx, 1).await).await.unwrap();
    }
    pool.idempotent(async |tx| insert(&tx, 1).await).await.unwrap();
    let count = "SELECT count(*) FROM entries WHERE id = $1";
    let read: i64 = pool.read(async |tx| Ok(tx.query_one(count, &[&1_i64]).await?.get(0))).await.unwrap();
    assert_eq!((read, stored(&cluster).await), (5, vec![1; 5]));

    // A transaction stays on one server session, whatever is prepared in it. The next statement may run on another one.
    let (mut client, mut other) = (pool.get().await.unwrap(), pool.get().await.unwrap());
    let rows = client.query_typed(count, &[(&1_i64, tokio_postgres::types::Type::INT8)]).await.unwrap();
    assert_eq!(rows[0].get::<_, i64>(0), 5);
    client.batch_execute("SELECT 1").await.unwrap();
    let (one, two) = (client.transaction().await.unwrap(), other.transaction().await.unwrap());
    let statement = one.prepare("SELECT pg_backend_pid()").await.unwrap();
    let pid = async || -> i32 { one.query_one(&statement, &[]).await.unwrap().get(0) };
    assert_eq!(pid().await, pid().await);
    drop((one, two));
    eventually("a session of the pool runs on several of the server", PATIENCE, async || {
        backend(&client).await != backend(&client).await
    })
    .await;

    // A prepared statement is on one of them.
    let statement = client.prepare("SELECT 1").await.unwrap();
    let missed = async || client.query(&statement, &[]).await.err().and_then(|error| error.code().cloned());
    eventually("a statement that is not there", PATIENCE, async || {
        missed().await == Some(SqlState::INVALID_SQL_STATEMENT_NAME)
    })
    .await;
    // And that is the end of the statement, not of the connection.
    client.batch_execute("SELECT 1").await.unwrap();
    assert_eq!(generation(&pool), 1);
}
