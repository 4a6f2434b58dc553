//! The segment that held the mark is not there any more: the log cannot be looked at, nor does a file show that the
//! timeline was followed. What else there is decides, or nothing is claimed.

use testbed::{Cut, Node, eventually};
use tokio_postgres_failover::error::Unsettled;

use super::{Answer, Case, RIGHTS, Right, SEVERAL, Scene, asynchronous, burn_ids, checkpoint, recycle, write_wal};
use crate::support::PATIENCE;
use crate::support::bench::{cut_replication, standbys};

/// The transaction runs on the second timeline, and its successor has no file of that any more. Its role without rights
/// goes by what the pool has signed the timeline with.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_parent_of_a_timeline_whose_files_are_gone_is_proved() {
    for right in RIGHTS {
        for lost in [false, true] {
            let case = Case::new(asynchronous(3), right).await;
            let cluster = &case.bench.cluster;
            let first = cluster.fail_over().await;
            let second = cluster.nodes().into_iter().find(|node| *node != first && *node != Node(0)).unwrap();
            checkpoint(cluster, first).await;
            cluster.wait_replayed(second).await;
            checkpoint(cluster, second).await;
            if lost {
                cut_replication(cluster, &[second]).await;
                burn_ids(cluster).await;
            }
            let case = case.turn_to(first).await;
            let fault = async |scene: &Scene| {
                if !lost {
                    scene.cluster.wait_replayed(second).await;
                }
                scene.cluster.kill(first).await;
                scene.cluster.promote(second).await;
                if lost {
                    scene.give_id_away().await;
                }
                recycle(&scene.cluster, 2).await;
                scene.assert_trap().await;
            };
            let answer = if lost { Answer::Lost } else { Answer::Committed };
            case.assert(Cut::CommitAnswerDropped, fault, answer).await;
        }
    }
}

/// After two promotions the history is known, and the log at the mark is not: a crash on its timeline may have lost it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_promotions_over_a_recycled_segment_are_not_guessed() {
    for right in RIGHTS {
        let case = Case::new(asynchronous(3), right).await;
        let fault = async |scene: &Scene| {
            for standby in standbys(&scene.cluster) {
                scene.cluster.wait_replayed(standby).await;
            }
            scene.cluster.fail_over().await;
            scene.cluster.fail_over().await;
            recycle(&scene.cluster, 1).await;
            scene.assert_trap().await;
        };
        case.assert(Cut::CommitAnswerDropped, fault, SEVERAL).await;
    }
}

/// A standby that could not follow the transaction's timeline, has skipped its number, and has recycled what it had
/// before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_timeline_that_was_skipped_is_no_ancestor_when_files_are_gone() {
    for right in RIGHTS {
        let case = Case::new(asynchronous(3), right).await;
        let cluster = &case.bench.cluster;
        cluster.direct(Node(0)).await.batch_execute("SELECT pg_switch_wal()").await.unwrap();
        cluster.stop_following(Node(1)).await;
        burn_ids(cluster).await;
        burn_ids(cluster).await;
        write_wal(cluster, 500).await;
        cluster.wait_replayed(Node(2)).await;
        cluster.kill(Node(0)).await;
        cluster.promote(Node(1)).await;
        eventually("the history file is fetched", PATIENCE, async || cluster.history_of(Node(2), 2).is_some()).await;
        let case = case.turn_to(Node(1)).await;
        let fault = async |scene: &Scene| {
            scene.cluster.kill(Node(1)).await;
            scene.cluster.promote(Node(2)).await;
            recycle(&scene.cluster, 1).await;
            scene.assert_replayed(true).await;
            scene.assert_trap().await;
        };
        let answer = match right {
            Right::Function => Answer::Lost,
            _ => Answer::Unknown(&[Unsettled::Unproven]),
        };
        case.assert(Cut::CommitAnswerDropped, fault, answer).await;
    }
}
