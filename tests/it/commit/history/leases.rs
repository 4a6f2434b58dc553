//! Leaders that come back before their lease is over: read-only first, then promoted, to the next timeline, and without
//! having streamed from anybody. So does Patroni after the crash of a container, and when it has its quorum again.

use testbed::{Background, Cluster, ClusterBuilder, Cut, Node};
use tokio_postgres_failover::error::Unsettled;

use super::{Answer, Case, RIGHTS, Right, SEVERAL, Scene, burn_ids, checkpoint, write_no_more};
use crate::support::PATIENCE;
use crate::support::bench::{cut_replication, single};

/// What becomes of the COMMIT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    /// It is done.
    Done,
    /// It does not arrive; the mark is in the log that is replayed.
    Undelivered,
    /// Nor is the mark: it was not written when the server was killed.
    Unwritten,
}

/// Rights, each with a checkpoint behind the promotion, as Patroni asks for one, and none of them without one.
const MATRIX: [(Right, bool); 4] =
    [(Right::Function, true), (Right::Monitor, true), (Right::Nothing, true), (Right::Nothing, false)];

const FATES: [Fate; 3] = [Fate::Done, Fate::Undelivered, Fate::Unwritten];

impl Fate {
    fn cut(self) -> Cut {
        match self {
            Self::Done => Cut::CommitAnswerDropped,
            Self::Undelivered | Self::Unwritten => Cut::CommitUndelivered { server_stays: false },
        }
    }

    fn answer(self) -> Answer {
        if self == Self::Done { Answer::Committed } else { Answer::Lost }
    }

    async fn prepare(self, cluster: &Cluster) {
        burn_ids(cluster).await;
        if self == Self::Unwritten {
            write_no_more(cluster).await;
        }
    }

    /// Just before the server is killed.
    async fn decide(self, scene: &Scene) {
        if self == Self::Undelivered {
            super::write_wal(&scene.cluster, 1).await;
        }
    }

    /// When the server is back.
    async fn trap(self, scene: &Scene) {
        scene.assert_replayed(self != Self::Unwritten).await;
        if self == Self::Unwritten {
            scene.give_id_away().await;
        }
    }
}

/// A crash, with every right and with none, and with the checkpoint that Patroni asks for, or without one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_crashed_and_is_back_within_its_lease_is_settled() {
    for (right, checkpointed) in MATRIX {
        for fate in FATES {
            println!("{fate:?}, checkpointed: {checkpointed}");
            let case = Case::new(single(), right).await;
            fate.prepare(&case.bench.cluster).await;
            let fault = async |scene: &Scene| {
                fate.decide(scene).await;
                scene.cluster.restart_within_lease().await;
                if checkpointed {
                    checkpoint(&scene.cluster, Node(0)).await;
                }
                fate.trap(scene).await;
            };
            case.assert(fate.cut(), fault, fate.answer()).await;
        }
    }
}

/// A synchronous cluster with an archive, whose standbys follow the same leader again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_with_standbys_that_is_back_within_its_lease_is_settled() {
    for fate in FATES {
        let case = Case::new(Cluster::builder().archive(), Right::Nothing).await;
        fate.prepare(&case.bench.cluster).await;
        let fault = async |scene: &Scene| {
            fate.decide(scene).await;
            scene.cluster.restart_within_lease().await;
            checkpoint(&scene.cluster, Node(0)).await;
            scene.cluster.wait_streaming(Node(0), 2).await;
            fate.trap(scene).await;
        };
        case.assert(fate.cut(), fault, fate.answer()).await;
    }
}

/// The quorum is lost and regained: a clean shutdown, and the same way back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_was_demoted_and_promoted_again_is_settled() {
    for (right, checkpointed) in MATRIX {
        for fate in [Fate::Done, Fate::Undelivered] {
            let case = Case::new(single(), right).await;
            let version = case.bench.cluster.version().await;
            fate.prepare(&case.bench.cluster).await;
            let fault = async |scene: &Scene| {
                scene.cluster.lose_and_regain_quorum().await;
                if checkpointed {
                    checkpoint(&scene.cluster, Node(0)).await;
                }
                scene.assert_replayed(true).await;
            };
            // Before 15, statistics do not survive the demotion, which is a clean restart.
            let is_proved = version >= 15 || right == Right::Function;
            let answer = if is_proved { fate.answer() } else { Answer::Unknown(&[Unsettled::Restarted]) };
            case.assert(fate.cut(), fault, answer).await;
        }
    }
}

/// The transaction begins on the second timeline, of a leader that was back within its lease before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_later_lease_is_settled() {
    for (right, checkpointed) in MATRIX {
        for fate in FATES {
            println!("{fate:?}, checkpointed: {checkpointed}");
            let case = Case::new(single(), right).await;
            case.bench.cluster.restart_within_lease().await;
            checkpoint(&case.bench.cluster, Node(0)).await;
            let case = case.turn_to(Node(0)).await;
            fate.prepare(&case.bench.cluster).await;
            let fault = async |scene: &Scene| {
                fate.decide(scene).await;
                restart_within_lease(&scene.cluster, checkpointed).await;
                fate.trap(scene).await;
            };
            case.assert(fate.cut(), fault, fate.answer()).await;
        }
    }
}

/// [`Cluster::restart_within_lease`], and the checkpoint after it comes, or it does not come for long.
async fn restart_within_lease(cluster: &Cluster, checkpointed: bool) {
    let leader = cluster.primary();
    cluster.kill(leader).await;
    cluster.start_read_only(leader).await;
    if !checkpointed {
        cluster.stop_background(leader, Background::Checkpointer).await;
    }
    cluster.promote(leader).await;
    if checkpointed {
        checkpoint(cluster, leader).await;
    }
}

/// Twice, and three times, before the pool asks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_leases_are_settled_by_the_log() {
    for times in [2, 3] {
        for fate in FATES {
            let case = Case::new(single(), Right::Function).await;
            fate.prepare(&case.bench.cluster).await;
            let fault = async |scene: &Scene| {
                fate.decide(scene).await;
                scene.cluster.restart_within_lease().await;
                fate.trap(scene).await;
                scene.pass_mark().await;
                for _ in 1..times {
                    scene.cluster.restart_within_lease().await;
                }
                scene.assert_replayed(true).await;
            };
            case.assert(fate.cut(), fault, fate.answer()).await;
        }
    }
}

/// The leader lost the end of its log, came back, was promoted, gave the id away, and crashed on its new timeline. It
/// shows the same as one that has lost nothing: the next timeline, no WAL received, and an end of its last replay
/// behind the mark.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_behind_a_lease_is_not_taken_for_the_lease() {
    for right in RIGHTS {
        for of_backend in [false, true] {
            let case = Case::new(single(), right).await;
            Fate::Unwritten.prepare(&case.bench.cluster).await;
            let fault = async |scene: &Scene| {
                let cluster = &scene.cluster;
                restart_within_lease(cluster, false).await;
                scene.assert_replayed(false).await;
                scene.give_id_away().await;
                scene.pass_mark().await;
                if of_backend {
                    cluster.crash_backend(Node(0), PATIENCE).await;
                } else {
                    cluster.crash(Node(0)).await;
                }
                scene.assert_replayed(true).await;
                scene.assert_trap().await;
            };
            let answer = match right {
                Right::Function => Answer::Lost,
                _ => Answer::Unknown(&[Unsettled::Restarted, Unsettled::SeveralFailovers]),
            };
            case.assert(Fate::Unwritten.cut(), fault, answer).await;
        }
    }
}

/// A standby was promoted, has the commit or lacks it, and was restarted cleanly, or crashed, before the pool asks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_that_was_restarted_is_settled_by_the_log() {
    let cluster = || -> ClusterBuilder { Cluster::builder().nodes(2).asynchronous() };
    for lost in [false, true] {
        for crash in [false, true] {
            let case = Case::new(cluster(), Right::Function).await;
            if lost {
                cut_replication(&case.bench.cluster, &[Node(1)]).await;
            }
            burn_ids(&case.bench.cluster).await;
            let fault = async |scene: &Scene| {
                let cluster = &scene.cluster;
                if !lost {
                    cluster.wait_replayed(Node(1)).await;
                }
                cluster.kill(Node(0)).await;
                cluster.promote(Node(1)).await;
                if lost {
                    scene.give_id_away().await;
                }
                scene.pass_mark().await;
                if crash {
                    cluster.crash(Node(1)).await;
                } else {
                    cluster.stop_fast(Node(1)).await;
                    cluster.start_node(Node(1)).await;
                }
                scene.assert_trap().await;
            };
            let answer = if lost { Answer::Lost } else { Answer::Committed };
            case.assert(Cut::CommitAnswerDropped, fault, answer).await;
        }
    }
}

/// Two returns that the pool has seen, and no right: nothing is guessed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_that_the_pool_has_seen_are_not_guessed() {
    let case = Case::new(single(), Right::Nothing).await;
    Fate::Done.prepare(&case.bench.cluster).await;
    let step = async |scene: &Scene, _| {
        scene.cluster.restart_within_lease().await;
        checkpoint(&scene.cluster, Node(0)).await;
        scene.assert_replayed(true).await;
    };
    case.assert_in_steps(Fate::Done.cut(), 2, step, SEVERAL).await;
}

/// The recovery is done in single-user mode, which nobody sees; then the server is started as a standby on its own log,
/// and promoted. With an archive the shutdown begins a new segment, so the last replay ends far behind the mark, lost
/// or not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_was_recovered_in_single_user_mode_is_not_guessed() {
    for right in [Right::Function, Right::Nothing] {
        for fate in FATES {
            for archive_mode in [true, false] {
                println!("{fate:?}, archive_mode: {archive_mode}");
                let case = Case::new(single(), right).await;
                fate.prepare(&case.bench.cluster).await;
                let fault = async |scene: &Scene| {
                    let cluster = &scene.cluster;
                    fate.decide(scene).await;
                    cluster.kill(Node(0)).await;
                    cluster.recover_in_single_user_mode(Node(0), archive_mode).await;
                    cluster.start_read_only(Node(0)).await;
                    // The pool looks before the first checkpoint.
                    cluster.stop_background(Node(0), Background::Checkpointer).await;
                    cluster.promote(Node(0)).await;
                    scene.assert_replayed(archive_mode || fate != Fate::Unwritten).await;
                    if fate == Fate::Unwritten {
                        scene.give_id_away().await;
                    }
                };
                let answer = match (right, fate, archive_mode) {
                    (Right::Function, ..) | (_, Fate::Unwritten | Fate::Undelivered, false) => fate.answer(),
                    // A new segment hides how far the log went; or less than two checkpoints lie behind the mark.
                    _ => Answer::Unknown(&[Unsettled::Restarted]),
                };
                case.assert(fate.cut(), fault, answer).await;
            }
        }
    }
}

/// The position that tells a recovery which nobody saw is withheld from the role: that is not as if there had been
/// none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recovery_that_may_not_be_looked_for_is_not_ruled_out() {
    let case = Case::new(single(), Right::Nothing).await;
    let cluster = &case.bench.cluster;
    let revoke = "REVOKE EXECUTE ON FUNCTION pg_control_init() FROM public";
    cluster.direct(Node(0)).await.batch_execute(revoke).await.unwrap();
    Fate::Unwritten.prepare(cluster).await;
    let fault = async |scene: &Scene| {
        let cluster = &scene.cluster;
        Fate::Unwritten.decide(scene).await;
        cluster.kill(Node(0)).await;
        cluster.recover_in_single_user_mode(Node(0), true).await;
        cluster.start_read_only(Node(0)).await;
        cluster.stop_background(Node(0), Background::Checkpointer).await;
        cluster.promote(Node(0)).await;
        scene.give_id_away().await;
    };
    case.assert(Fate::Unwritten.cut(), fault, Answer::Unknown(&[Unsettled::Restarted])).await;
}
