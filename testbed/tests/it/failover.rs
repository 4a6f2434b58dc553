//! Promotion, and the old primary's return.

use std::time::{Duration, Instant};

use testbed::{Cluster, Node};
use tokio_postgres::Client;

use crate::value;

const TIMELINE: &str = "SELECT substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)";

async fn insert(session: &Client, id: i32) {
    session.execute("INSERT INTO t VALUES ($1)", &[&id]).await.unwrap();
}

#[tokio::test]
async fn writes_go_on_after_a_failover_and_the_old_primary_rejoins() {
    let cluster = Cluster::start().await;
    let session = cluster.direct(Node(0)).await;
    session.batch_execute("CREATE TABLE t (id int)").await.unwrap();
    insert(&session, 1).await;
    cluster.kill(Node(0)).await;
    assert!(!cluster.is_running(Node(0)));

    let candidate = cluster.most_advanced_standby().await;
    let begun = Instant::now();
    let promotion = cluster.promote_timed(candidate).await;
    assert!(promotion.accepted_at > begun && promotion.took < Duration::from_secs(20));
    assert_eq!(cluster.primary(), candidate);

    // Waits for the other standby, which follows the new primary by now or soon.
    let session = cluster.direct(candidate).await;
    insert(&session, 2).await;
    cluster.restart_as_standby(Node(0)).await;
    cluster.wait_streaming(candidate, 2).await;
    insert(&session, 3).await;
    for standby in cluster.nodes().into_iter().filter(|node| *node != candidate) {
        cluster.wait_replayed(standby).await;
        assert_eq!(value::<i64>(&cluster.direct(standby).await, "SELECT count(*) FROM t").await, 3, "{standby:?}");
    }
}

#[tokio::test]
async fn the_last_node_waits_for_nobody() {
    let cluster = Cluster::builder().nodes(2).start().await;
    cluster.kill(Node(0)).await;
    cluster.promote(Node(1)).await;
    cluster.direct(Node(1)).await.batch_execute("CREATE TABLE t (id int)").await.unwrap();
    cluster.restart_as_standby(Node(0)).await;
    let names: String = value(&cluster.direct(Node(1)).await, "SHOW synchronous_standby_names").await;
    assert_eq!(names, "ANY 1 (n0)");
}

#[tokio::test]
async fn an_old_primary_started_as_it_is_is_a_second_primary() {
    let cluster = Cluster::builder().nodes(2).asynchronous().start().await;
    cluster.kill(Node(0)).await;
    cluster.promote(Node(1)).await;
    cluster.start_node(Node(0)).await;
    let (zombie, primary) = (cluster.direct(Node(0)).await, cluster.direct(Node(1)).await);
    for session in [&zombie, &primary] {
        session.batch_execute("CREATE TABLE t (id int)").await.unwrap();
    }
    assert!(value::<String>(&zombie, TIMELINE).await < value::<String>(&primary, TIMELINE).await);
    cluster.restart_as_standby(Node(0)).await;
    assert!(value::<bool>(&cluster.direct(Node(0)).await, "SELECT pg_is_in_recovery()").await);
}

#[tokio::test]
async fn a_standby_that_is_ahead_of_the_new_primary_is_copied_anew() {
    let cluster = Cluster::builder().asynchronous().start().await;
    cluster.kill(Node(1)).await;
    let session = cluster.direct(Node(0)).await;
    session.batch_execute("CREATE TABLE t (id int)").await.unwrap();
    cluster.wait_replayed(Node(2)).await;
    cluster.kill(Node(0)).await;
    cluster.start_node(Node(1)).await;
    assert_eq!(cluster.most_advanced_standby().await, Node(2));
    cluster.promote(Node(1)).await;
    cluster.restart_as_standby(Node(2)).await;
    let found: bool = value(&cluster.direct(Node(2)).await, "SELECT to_regclass('t') IS NOT NULL").await;
    assert!(!found, "the table that only the old primary and one standby had");
}

#[tokio::test]
async fn a_switch_over_loses_nothing() {
    let cluster = Cluster::start().await;
    cluster.direct(Node(0)).await.batch_execute("CREATE TABLE t (id int)").await.unwrap();
    cluster.switch_over(Node(2)).await;
    cluster.wait_streaming(Node(2), 2).await;
    insert(&cluster.direct(Node(2)).await, 1).await;
}
