//! More than one failover, with an archive and without one.

use std::time::Duration;

use testbed::{Background, Cluster, Node, eventually};
use tokio_postgres::Client;

use crate::value;

async fn table(cluster: &Cluster) {
    cluster.direct(cluster.primary()).await.batch_execute("CREATE TABLE t (id int)").await.unwrap();
}

async fn insert(session: &Client, id: i32) {
    session.execute("INSERT INTO t VALUES ($1)", &[&id]).await.unwrap();
}

async fn stored(session: &Client) -> Vec<i32> {
    session.query("SELECT id FROM t ORDER BY id", &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// The ancestors that a node's history file names.
fn ancestors(cluster: &Cluster, node: Node, timeline: u32) -> Vec<u32> {
    let history = cluster.history_of(node, timeline).expect("a history file");
    history.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect()
}

#[tokio::test]
async fn two_failovers_in_a_row_make_two_timelines() {
    for archive in [false, true] {
        let builder = Cluster::builder();
        let cluster = if archive { builder.archive() } else { builder }.start().await;
        table(&cluster).await;
        assert_eq!(cluster.timeline(Node(0)).await, 1);
        for (id, timeline) in [(1, 2), (2, 3)] {
            insert(&cluster.direct(cluster.primary()).await, id).await;
            let new = cluster.fail_over().await;
            assert_eq!(cluster.timeline(new).await, timeline);
            if archive {
                cluster.wait_archived(timeline).await;
            }
        }
        let last = cluster.primary();
        assert_eq!(stored(&cluster.direct(last).await).await, [1, 2]);
        assert_eq!(ancestors(&cluster, last, 3), [1, 2]);
    }
}

/// The node that is promoted is behind another one. That one cannot follow, stays on the first timeline, and knows that
/// the second is taken: by the archive, or by the history file that it fetched when it tried to follow.
#[tokio::test]
async fn a_standby_that_cannot_follow_takes_the_next_free_timeline() {
    for archive in [false, true] {
        let builder = Cluster::builder().asynchronous();
        let cluster = if archive { builder.archive() } else { builder }.start().await;
        table(&cluster).await;
        cluster.wait_replayed(Node(1)).await;
        cluster.stop_following(Node(1)).await;
        insert(&cluster.direct(Node(0)).await, 1).await;
        cluster.wait_replayed(Node(2)).await;
        cluster.kill(Node(0)).await;
        cluster.promote(Node(1)).await;
        if archive {
            cluster.wait_archived(2).await;
        }
        eventually("the history file is fetched", Duration::from_secs(30), async || {
            archive || cluster.history_of(Node(2), 2).is_some()
        })
        .await;
        assert_eq!(stored(&cluster.direct(Node(1)).await).await, [0; 0]);

        cluster.kill(Node(1)).await;
        cluster.promote(Node(2)).await;
        assert_eq!(cluster.timeline(Node(2)).await, 3, "archive: {archive}");
        assert_eq!(ancestors(&cluster, Node(2), 3), [1], "archive: {archive}");
        assert_eq!(stored(&cluster.direct(Node(2)).await).await, [1]);
    }
}

/// Neither archive nor history file tells it, so it takes the same number.
#[tokio::test]
async fn a_standby_that_does_not_know_takes_the_same_timeline() {
    let cluster = Cluster::builder().asynchronous().start().await;
    cluster.freeze(Node(2));
    cluster.kill(Node(0)).await;
    cluster.promote(Node(1)).await;
    cluster.kill(Node(1)).await;
    cluster.thaw(Node(2));
    cluster.promote(Node(2)).await;
    assert_eq!(cluster.timeline(Node(2)).await, 2);
}

#[tokio::test]
async fn a_leader_that_is_back_within_its_lease_begins_a_timeline() {
    const UNTOLD: &str = "SELECT pg_last_wal_receive_lsn() IS NULL";
    for archive in [false, true] {
        let cluster = if archive { Cluster::builder().archive() } else { Cluster::builder() }.start().await;
        table(&cluster).await;
        insert(&cluster.direct(Node(0)).await, 1).await;
        cluster.restart_within_lease().await;
        assert_eq!((cluster.primary(), cluster.timeline(Node(0)).await), (Node(0), 2));
        cluster.wait_streaming(Node(0), 2).await;
        let session = cluster.direct(Node(0)).await;
        assert!(value::<bool>(&session, UNTOLD).await, "it has streamed from nobody");
        insert(&session, 2).await;

        cluster.lose_and_regain_quorum().await;
        assert_eq!((cluster.primary(), cluster.timeline(Node(0)).await), (Node(0), 3));
        cluster.wait_streaming(Node(0), 2).await;
        let session = cluster.direct(Node(0)).await;
        insert(&session, 3).await;
        assert_eq!(stored(&session).await, [1, 2, 3]);
        for standby in [Node(1), Node(2)] {
            cluster.wait_replayed(standby).await;
            assert_eq!(stored(&cluster.direct(standby).await).await, [1, 2, 3]);
        }
    }
}

#[tokio::test]
async fn a_crash_loses_what_nobody_has_written() {
    let cluster = Cluster::builder().nodes(1).start().await;
    cluster.stop_background(Node(0), Background::WalWriter).await;
    let session = cluster.direct(Node(0)).await;
    session.batch_execute("BEGIN; SELECT pg_logical_emit_message(true, 'testbed', '')").await.unwrap();
    let id: i64 = value(&session, "SELECT pg_current_xact_id()::text::bigint").await;
    let end: String = value(&session, "SELECT pg_current_wal_insert_lsn()::text").await;
    cluster.crash(Node(0)).await;
    let session = cluster.direct(Node(0)).await;
    let lost: bool = value(&session, &format!("SELECT pg_last_wal_replay_lsn() < '{end}'")).await;
    assert!(lost, "the record was written");
    let next: i64 = value(&session, "SELECT pg_current_xact_id()::text::bigint").await;
    assert_eq!(next, id, "the id is free again");
}

#[tokio::test]
async fn without_a_checkpoint_the_control_file_names_the_old_timeline() {
    const WRITTEN: &str = "SELECT timeline_id FROM pg_control_checkpoint()";
    let cluster = Cluster::builder().nodes(2).start().await;
    cluster.stop_background(Node(1), Background::Checkpointer).await;
    cluster.kill(Node(0)).await;
    cluster.promote(Node(1)).await;
    assert_eq!(cluster.timeline(Node(1)).await, 2);
    assert_eq!(value::<i32>(&cluster.direct(Node(1)).await, WRITTEN).await, 1);
}

/// The old primary lives, and has sent the other standby more than the promoted one had: that one cannot follow.
#[tokio::test]
async fn commits_do_not_wait_for_a_standby_that_cannot_follow() {
    let cluster = Cluster::start().await;
    cluster.stop_shipping(Node(0), Node(1)).await;
    let old = cluster.direct(Node(0)).await;
    // A little: what the new primary writes is soon behind it.
    old.batch_execute("SELECT pg_logical_emit_message(true, 'sent', 'to one')").await.unwrap();
    cluster.promote(Node(1)).await;
    let new = cluster.direct(Node(1)).await;
    let commit = new.batch_execute("CREATE TABLE waits_for_nobody (id bigint)");
    tokio::time::timeout(Duration::from_secs(30), commit).await.expect("the commit waits for ever").unwrap();
}
