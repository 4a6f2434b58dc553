//! Standbys that are promoted, once, twice and three times, and standbys that could not follow.

use testbed::{Background, Cluster, ClusterBuilder, Cut, Node, eventually};
use tokio_postgres_failover::error::Unsettled;

use super::{Answer, Case, RIGHTS, Right, SEVERAL, Scene, asynchronous, burn_ids, checkpoint, write_wal};
use crate::support::PATIENCE;
use crate::support::bench::{cut_replication, standbys};

/// Fails over so many times; each node that is promoted has all that the one before it had.
async fn fail_over(cluster: &Cluster, times: usize) {
    for _ in 0..times {
        cluster.fail_over().await;
    }
}

/// The transaction that begins on a lagging standby's new timeline; the standby that was ahead of it is promoted then,
/// and skips that timeline, as the number is taken. Its history holds another transaction of the same id, committed.
async fn skipped(right: Right, cluster: ClusterBuilder, archive: bool) {
    let case = Case::new(cluster, right).await;
    let cluster = &case.bench.cluster;
    // What follows is in one segment, which is not full: the lagging standby would get it from the archive.
    cluster.direct(Node(0)).await.batch_execute("SELECT pg_switch_wal()").await.unwrap();
    cluster.stop_following(Node(1)).await;
    // More than the pool signs the other timeline with.
    burn_ids(cluster).await;
    burn_ids(cluster).await;
    write_wal(cluster, 500).await;
    cluster.wait_replayed(Node(2)).await;
    cluster.kill(Node(0)).await;
    cluster.promote(Node(1)).await;
    if archive {
        cluster.wait_archived(2).await;
    } else {
        eventually("the history file is fetched", PATIENCE, async || cluster.history_of(Node(2), 2).is_some()).await;
    }
    let case = case.turn_to(Node(1)).await;
    let fault = async |scene: &Scene| {
        scene.cluster.kill(Node(1)).await;
        scene.cluster.promote(Node(2)).await;
        assert_eq!(scene.cluster.timeline(Node(2)).await, 3, "the second timeline was not skipped");
        scene.assert_replayed(true).await;
        scene.assert_trap().await;
    };
    let answer = match right {
        Right::Function => Answer::Lost,
        _ => Answer::Unknown(&[Unsettled::Unproven]),
    };
    case.assert(Cut::CommitAnswerDropped, fault, answer).await;
}

/// The archive shows that the number of the lost timeline is taken.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_timeline_that_was_skipped_because_of_an_archive_is_no_ancestor() {
    for right in RIGHTS {
        skipped(right, asynchronous(3).archive(), true).await;
    }
}

/// The standby fetched the lost timeline's history file before it found that it cannot follow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_timeline_that_was_skipped_without_an_archive_is_no_ancestor() {
    for right in RIGHTS {
        skipped(right, asynchronous(3), false).await;
    }
}

/// The pool tells what its role may see, from the first heartbeat on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_status_tells_what_the_role_may_see() {
    for right in RIGHTS {
        let case = Case::new(Cluster::builder().nodes(1), right).await;
        let evidence = right.evidence(case.bench.cluster.version().await);
        eventually("the pool has looked", PATIENCE, async || case.bench.pool.status().evidence == Some(evidence)).await;
    }
}

/// Two and three promotions, and the commit is in what was replicated.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_is_found_after_several_promotions() {
    for right in RIGHTS {
        for (promotions, archive) in [(2, false), (2, true), (3, false)] {
            let cluster = asynchronous(promotions + 1);
            let case = Case::new(if archive { cluster.archive() } else { cluster }, right).await;
            let fault = async |scene: &Scene| {
                for standby in standbys(&scene.cluster) {
                    scene.cluster.wait_replayed(standby).await;
                }
                fail_over(&scene.cluster, promotions).await;
                scene.assert_trap().await;
            };
            let answer = if right == Right::Function { Answer::Committed } else { SEVERAL };
            case.assert(Cut::CommitAnswerDropped, fault, answer).await;
        }
    }
}

/// Two and three promotions; the commit got to no standby, and its id is given out again, before the last promotion or
/// behind it. What is replayed at the last promotion ends behind the mark.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_was_lost_before_several_promotions_is_not_taken_for_another() {
    for right in RIGHTS {
        for (promotions, early) in [(2, true), (2, false), (3, true)] {
            let case = Case::new(asynchronous(promotions + 1), right).await;
            let cluster = &case.bench.cluster;
            cut_replication(cluster, &standbys(cluster)).await;
            burn_ids(cluster).await;
            let fault = async |scene: &Scene| {
                fail_over(&scene.cluster, 1).await;
                if early {
                    scene.give_id_away().await;
                }
                scene.pass_mark().await;
                for standby in scene.cluster.nodes() {
                    if scene.cluster.is_running(standby) && standby != scene.cluster.primary() {
                        scene.cluster.wait_replayed(standby).await;
                    }
                }
                fail_over(&scene.cluster, promotions - 1).await;
                if !early {
                    scene.give_id_away().await;
                }
                scene.assert_replayed(true).await;
                scene.assert_trap().await;
            };
            let answer = if right == Right::Function { Answer::Lost } else { SEVERAL };
            case.assert(Cut::CommitAnswerDropped, fault, answer).await;
        }
    }
}

/// The same, and the last replay ends before the mark: whatever happened, the commit cannot be in this history.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_beyond_the_end_of_the_last_replay_is_lost_after_any_number_of_promotions() {
    for right in RIGHTS {
        for promotions in [2, 3] {
            let case = Case::new(asynchronous(promotions + 1), right).await;
            let cluster = &case.bench.cluster;
            cut_replication(cluster, &standbys(cluster)).await;
            burn_ids(cluster).await;
            write_wal(cluster, 3000).await;
            let fault = async |scene: &Scene| {
                fail_over(&scene.cluster, promotions).await;
                scene.give_id_away().await;
                scene.assert_replayed(false).await;
            };
            case.assert(Cut::CommitAnswerDropped, fault, Answer::Lost).await;
        }
    }
}

/// The pool finds each of two new primaries.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_promotions_that_the_pool_has_seen_are_settled() {
    for lost in [false, true] {
        let case = Case::new(asynchronous(3), Right::Function).await;
        let cluster = &case.bench.cluster;
        if lost {
            cut_replication(cluster, &standbys(cluster)).await;
            burn_ids(cluster).await;
        }
        let step = async |scene: &Scene, step| {
            if step == 0 && !lost {
                for standby in standbys(&scene.cluster) {
                    scene.cluster.wait_replayed(standby).await;
                }
            }
            scene.cluster.fail_over().await;
            if step == 1 {
                if lost {
                    scene.give_id_away().await;
                }
                scene.assert_trap().await;
            }
        };
        let answer = if lost { Answer::Lost } else { Answer::Committed };
        case.assert_in_steps(Cut::CommitAnswerDropped, 2, step, answer).await;
    }
}

/// The transaction begins on the second timeline: a role without rights is told by the control file whose child the
/// third is, and by nothing once a checkpoint has written it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_parent_of_a_later_timeline_is_proved() {
    for right in RIGHTS {
        for checkpointed in [false, true] {
            for lost in [false, true] {
                let case = Case::new(asynchronous(3), right).await;
                let cluster = &case.bench.cluster;
                let first = cluster.fail_over().await;
                let second = cluster.nodes().into_iter().find(|node| *node != first && *node != Node(0)).unwrap();
                // Both write the second timeline into their control files.
                checkpoint(cluster, first).await;
                cluster.wait_replayed(second).await;
                checkpoint(cluster, second).await;
                if !checkpointed {
                    cluster.stop_background(second, Background::Checkpointer).await;
                }
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
                    if checkpointed {
                        checkpoint(&scene.cluster, second).await;
                    }
                    if lost {
                        scene.give_id_away().await;
                    }
                    scene.assert_trap().await;
                };
                let answer = if lost { Answer::Lost } else { Answer::Committed };
                case.assert(Cut::CommitAnswerDropped, fault, answer).await;
            }
        }
    }
}

/// Two standbys of one primary are promoted apart, to timelines of the same number. The transaction is committed on one
/// of them; then the other takes over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_split_brain_with_timelines_of_the_same_number_is_settled_by_the_log() {
    for right in RIGHTS {
        let case = Case::new(asynchronous(3), right).await;
        let cluster = &case.bench.cluster;
        cluster.freeze(Node(2));
        cluster.kill(Node(0)).await;
        cluster.promote(Node(1)).await;
        burn_ids(cluster).await;
        let case = case.turn_to(Node(1)).await;
        case.bench.cluster.thaw(Node(2));
        let fault = async |scene: &Scene| {
            scene.cluster.kill(Node(1)).await;
            scene.cluster.promote(Node(2)).await;
            assert_eq!(scene.cluster.timeline(Node(2)).await, 2, "the number was taken");
            scene.give_id_away().await;
            scene.pass_mark().await;
        };
        let answer = if right == Right::Function { Answer::Lost } else { Answer::Unknown(&[Unsettled::OtherHistory]) };
        case.assert(Cut::CommitAnswerDropped, fault, answer).await;
    }
}

/// The same, and the primary that is asked is a standby of the other one, promoted in turn: it does not show by itself
/// that its parent is another second timeline.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_on_the_other_side_of_a_split_brain_is_settled_by_the_log() {
    for right in RIGHTS {
        let case = Case::new(asynchronous(4), right).await;
        let cluster = &case.bench.cluster;
        for apart in [Node(2), Node(3)] {
            cluster.freeze(apart);
        }
        cluster.kill(Node(0)).await;
        cluster.promote(Node(1)).await;
        burn_ids(cluster).await;
        let case = case.turn_to(Node(1)).await;
        for apart in [Node(2), Node(3)] {
            case.bench.cluster.thaw(apart);
        }
        let fault = async |scene: &Scene| {
            scene.cluster.kill(Node(1)).await;
            scene.cluster.promote(Node(2)).await;
            scene.give_id_away().await;
            scene.pass_mark().await;
            scene.cluster.wait_replayed(Node(3)).await;
            scene.cluster.kill(Node(2)).await;
            scene.cluster.promote(Node(3)).await;
            assert_eq!(scene.cluster.timeline(Node(3)).await, 3);
            scene.assert_trap().await;
        };
        if right == Right::Function {
            case.assert(Cut::CommitAnswerDropped, fault, Answer::Lost).await;
        }
    }
}
