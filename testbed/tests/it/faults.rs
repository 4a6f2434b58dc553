//! What clients see of each fault.

use std::time::Duration;

use testbed::{Cluster, Node, eventually};
use tokio::time::timeout;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::value;

const SECOND: Duration = Duration::from_secs(1);
const LONG: Duration = Duration::from_secs(30);

async fn write(session: &Client) -> Option<SqlState> {
    let result = session.batch_execute("CREATE TEMP TABLE IF NOT EXISTS t (id int); INSERT INTO t VALUES (1)").await;
    result.err().map(|error| error.code().cloned().unwrap_or(SqlState::CONNECTION_FAILURE))
}

async fn closed(session: &Client) {
    eventually("the session is closed", LONG, async || session.is_closed()).await;
}

#[tokio::test]
async fn a_frozen_server_is_silent_until_it_is_thawed() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let session = cluster.direct(Node(0)).await;
    cluster.freeze(Node(0));
    assert!(cluster.is_running(Node(0)));
    let query = value::<i32>(&session, "SELECT 1");
    tokio::pin!(query);
    assert!(timeout(SECOND / 5, &mut query).await.is_err());
    assert!(timeout(SECOND / 5, cluster.try_direct(Node(0))).await.is_err());
    cluster.thaw(Node(0));
    assert_eq!(timeout(LONG, query).await, Ok(1));

    // Killing works on the frozen, too.
    cluster.freeze(Node(0));
    cluster.kill(Node(0)).await;
    closed(&session).await;
    cluster.start_node(Node(0)).await;
}

#[tokio::test]
async fn read_only_reaches_open_sessions() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let session = cluster.direct(Node(0)).await;
    for _ in 0..2 {
        cluster.set_read_only(Node(0), true).await;
        eventually("25006", LONG, async || write(&session).await == Some(SqlState::READ_ONLY_SQL_TRANSACTION)).await;
        cluster.set_read_only(Node(0), false).await;
        eventually("a write", LONG, async || write(&session).await.is_none()).await;
    }
}

#[tokio::test]
async fn a_read_only_database_is_seen_by_new_sessions_alone() {
    let cluster = Cluster::builder().nodes(2).start().await;
    let open = cluster.direct(Node(0)).await;
    for _ in 0..2 {
        cluster.set_database_read_only(Node(0), true).await;
        assert_eq!(write(&open).await, None);
        assert_eq!(write(&cluster.direct(Node(0)).await).await, Some(SqlState::READ_ONLY_SQL_TRANSACTION));
        cluster.set_database_read_only(Node(0), false).await;
        assert_eq!(write(&cluster.direct(Node(0)).await).await, None);
    }
    // It is replicated, and does not hinder a promotion.
    cluster.set_database_read_only(Node(0), true).await;
    cluster.wait_replayed(Node(1)).await;
    cluster.kill(Node(0)).await;
    cluster.promote(Node(1)).await;
    cluster.set_database_read_only(Node(1), false).await;
}

#[tokio::test]
async fn backends_are_ended_by_their_name() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let (named, other) = (cluster.direct(Node(0)).await, cluster.direct(Node(0)).await);
    named.batch_execute("SET application_name = 'app-1'").await.unwrap();
    assert_eq!(cluster.terminate_backends(Node(0), "app-%").await, 1);
    closed(&named).await;
    assert_eq!(write(&other).await, None);
}

#[tokio::test]
async fn a_killed_backend_ends_all_sessions_and_the_server_recovers() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let session = cluster.direct(Node(0)).await;
    cluster.kill_backend(Node(0)).await;
    closed(&session).await;
    assert_eq!(write(&cluster.direct(Node(0)).await).await, None);
}

#[tokio::test]
async fn there_are_three_ways_to_stop() {
    let cluster = Cluster::builder().nodes(1).start().await;
    cluster.stop_immediate(Node(0)).await;
    assert!(cluster.log(Node(0)).await.contains("received immediate shutdown request"));
    cluster.start_node(Node(0)).await;

    cluster.stop_fast(Node(0)).await;
    assert!(cluster.log(Node(0)).await.contains("received fast shutdown request"));
    cluster.start_node(Node(0)).await;

    let session = cluster.direct(Node(0)).await;
    cluster.stop_smart(Node(0)).await;
    eventually("57P03", LONG, async || {
        let refused = cluster.try_direct(Node(0)).await.err();
        refused.is_some_and(|error| error.code() == Some(&SqlState::CANNOT_CONNECT_NOW))
    })
    .await;
    assert_eq!(write(&session).await, None);
    drop(session);
    eventually("the server exits", LONG, async || !cluster.is_running(Node(0))).await;
}

#[tokio::test]
async fn what_is_not_shipped_dies_with_the_primary() {
    let cluster = Cluster::builder().nodes(2).asynchronous().start().await;
    let session = cluster.direct(Node(0)).await;
    session.batch_execute("CREATE TABLE shipped ()").await.unwrap();
    cluster.wait_replayed(Node(1)).await;
    cluster.stop_shipping(Node(0), Node(1)).await;
    session.batch_execute("CREATE TABLE unshipped ()").await.unwrap();
    cluster.kill(Node(0)).await;
    cluster.promote(Node(1)).await;
    let sql = "SELECT to_regclass('shipped') IS NOT NULL, to_regclass('unshipped') IS NOT NULL";
    let row = cluster.direct(Node(1)).await.query_one(sql, &[]).await.unwrap();
    assert_eq!((row.get(0), row.get(1)), (true, false));
}
