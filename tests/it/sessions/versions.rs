//! What differs between the versions of PostgreSQL. A test that has to know the version asks the server.

use std::time::Duration;

use testbed::{Cluster, Cut, Cutter, Node, eventually};
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;
use tokio_postgres_failover::error::Unsettled;
use tokio_postgres_failover::listen::Message;
use tokio_postgres_failover::{Error, Guarantee, Pool};

use crate::support::bench::{Bench, settlers, single};
use crate::support::load::{LONG, by_name, create_table, generation, primary_lost};
use crate::support::{insert, sql, stored};

/// Functions whose parameters are others in some versions.
const CHANGED: [[&str; 2]; 2] = [
    // Up to 16, and since 17.
    ["pg_logical_emit_message(boolean, text, text)", "pg_logical_emit_message(boolean, text, text, boolean)"],
    // Since 14, and up to 13.
    ["pg_terminate_backend(int, bigint)", "pg_terminate_backend(int)"],
];

/// A function of `pg_catalog`, with the parameters that this server gives it.
pub(crate) async fn signature(server: &Client, function: &'static str) -> &'static str {
    let signatures = CHANGED.iter().find(|signatures| signatures.contains(&function));
    for signature in signatures.into_iter().flatten() {
        let sql = "SELECT to_regprocedure('pg_catalog.' || $1) IS NOT NULL";
        if server.query_one(sql, &[signature]).await.unwrap().get(0) {
            return signature;
        }
    }
    function
}

/// Up to 13 the server cannot end a session that is idle outside of a transaction.
pub(crate) async fn has_idle_session_timeout(cluster: &Cluster) -> bool {
    let known = cluster.version().await >= 14;
    if !known {
        println!("this server has no idle_session_timeout");
    }
    known
}

/// PostgreSQL 12 and older have no `pg_current_xact_id`: work is done, nothing is settled, and the pool says why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_before_13_is_named_as_too_old_to_settle_on() {
    let cluster = single().start().await;
    create_table(&cluster).await;
    let hide = "ALTER FUNCTION pg_catalog.pg_current_xact_id() RENAME TO pg_gone";
    sql(&cluster, &format!("SET allow_system_table_mods = on; {hide}")).await;
    let cutter = Cutter::start((cluster.spare_addr(0), cluster.port()).into(), cluster.socket_addr(Node(0))).await;
    let pool = Pool::builder(format!("postgres://app@{}/app", cutter.addr())).unwrap().build().unwrap();
    pool.transaction(async |tx| insert(&tx, 1).await).await.unwrap();
    let why = pool.status().fallback.expect("a reason");
    assert!(why.contains("42883") && why.contains("PostgreSQL 13 is the oldest version"), "{why}");
    let cut = cutter.arm(Cut::CommitAnswerDropped);
    let error = pool.transaction(async |tx| insert(&tx, 2).await).await.unwrap_err();
    timeout(LONG, cut.happened()).await.unwrap();
    let Error::CommitUnknown(unknown) = &error else { panic!("{error:?}") };
    assert_eq!(unknown.reason(), Unsettled::NoMark, "{error}");
    assert_eq!(stored(&cluster).await, [1, 2]);
}

/// `transaction_timeout` (17 and later) ends a session that waits for a promotion for longer, so it is switched off.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_timeout_ends_no_session_in_each_round_of_a_search() {
    let cluster = Cluster::builder().nodes(2).start().await;
    create_table(&cluster).await;
    let limited = cluster.version().await >= 17;
    if limited {
        sql(&cluster, "ALTER ROLE app SET transaction_timeout = '100ms'").await;
    } else {
        println!("this server has no transaction_timeout; the search is the usual one");
    }
    cluster.wait_replayed(Node(1)).await;
    let pool =
        Pool::builder(cluster.url_hosts()).unwrap().heartbeat_interval(Duration::from_millis(200)).build().unwrap();
    pool.transaction(async |tx| insert(&tx, 1).await).await.unwrap();
    cluster.kill(Node(0)).await;
    primary_lost(&pool).await;
    if limited {
        // A dozen rounds and more on an idle machine.
        sleep(Duration::from_secs(4)).await;
    }
    // The server logs the statement of a session that it ends. A slow machine may meet the limit in others, too.
    let log = cluster.log(Node(1)).await;
    let ended = log.matches("SELECT FROM generate_series").count();
    assert!(ended <= 2, "{ended} waits were cut off:\n{log}");
    cluster.promote(Node(1)).await;
    timeout(LONG, pool.transaction(async |tx| insert(&tx, 2).await)).await.unwrap().unwrap();
    assert_eq!((stored(&cluster).await, generation(&pool)), (vec![1, 2], 2));
}

/// `transaction_timeout` ends no settler that has to wait for a lock for longer, so it finds out who holds the lock.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_timeout_ends_no_settler() {
    for guarantee in settlers() {
        let bench = Bench::new(single(), guarantee).await;
        let limited = bench.cluster.version().await >= 17;
        if limited {
            sql(&bench.cluster, "ALTER ROLE app SET transaction_timeout = '200ms'").await;
        } else {
            println!("this server has no transaction_timeout; the commit is settled as usual");
        }
        let pool = by_name(&bench.cluster).build().unwrap();
        bench.cut(Cut::CommitUndelivered { server_stays: true });
        let call = pool.build_transaction().guarantee(bench.guarantee.clone()).run(async |tx| {
            if limited {
                // Otherwise the server would end the abandoned session by itself.
                tx.batch_execute("SET LOCAL transaction_timeout = 0").await?;
            }
            bench.runs.begin();
            insert(&tx, 1).await
        });
        timeout(LONG, call).await.unwrap().unwrap();
        bench.assert_once(2).await;
    }
}

/// What a server says before its first answer: a setting of the role that it cannot apply, and since 17 what a trigger
/// on the log-in says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn notices_at_connect_disturb_nobody() {
    let cluster = single().start().await;
    create_table(&cluster).await;
    sql(&cluster, "CREATE ROLE gone; GRANT gone TO app; ALTER ROLE app SET role = 'gone'; DROP ROLE gone").await;
    if cluster.version().await >= 17 {
        let function = "CREATE FUNCTION public.greets() RETURNS event_trigger LANGUAGE plpgsql AS
                        'BEGIN RAISE NOTICE ''hello''; RAISE WARNING ''you there''; END'";
        let trigger = "CREATE EVENT TRIGGER greets ON login EXECUTE FUNCTION public.greets();
                       ALTER EVENT TRIGGER greets ENABLE ALWAYS";
        sql(&cluster, &format!("{function}; {trigger}")).await;
    }
    let pool = Pool::builder(cluster.url_hosts()).unwrap().build().unwrap();
    let client = pool.get().await.unwrap();
    client.batch_execute("SELECT 1").await.unwrap();
    for guarantee in [Guarantee::ExactlyOnce, Guarantee::AtMostOnce] {
        let call = pool.build_transaction().guarantee(guarantee);
        call.run(async |tx| insert(&tx, 1).await).await.unwrap();
    }
    let mut listener = pool.listen(["news"]).await.unwrap();
    client.batch_execute("NOTIFY news, 'one'").await.unwrap();
    let message = timeout(LONG, listener.recv()).await.unwrap().unwrap().unwrap();
    assert!(matches!(&message, Message::Notification(it) if it.payload() == "one"), "{message:?}");
    assert!(client.session_end().await.is_none());
    eventually("the log has the warning", LONG, async || {
        cluster.log(Node(0)).await.contains("\"gone\" does not exist")
    })
    .await;
    assert_eq!((stored(&cluster).await, generation(&pool)), (vec![1, 1], 1));
}
