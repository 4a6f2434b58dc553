//! Servers that crash more than once, or are restarted more than once, on one timeline.

use testbed::{Background, Cluster, Cut, Node};
use tokio_postgres::Client;
use tokio_postgres_failover::error::Unsettled;
use tokio_postgres_failover::{Guarantee, Pool};

use super::{Answer, Case, RIGHTS, Right, SEVERAL, Scene, burn_ids, write_no_more};
use crate::support::bench::single;
use crate::support::insert;

const UNDELIVERED: Cut = Cut::CommitUndelivered { server_stays: false };

/// Shut down and started several times, each seen by the pool, or none: equal statistics show that nothing was lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_clean_restarts_are_seen_through() {
    for (cut, answer) in [(Cut::CommitAnswerDropped, Answer::Committed), (UNDELIVERED, Answer::Lost)] {
        for seen in [false, true] {
            let case = Case::new(single(), Right::Nothing).await;
            let version = case.bench.cluster.version().await;
            let (steps, restarts) = if seen { (3, 1) } else { (1, 3) };
            let step = async |scene: &Scene, _| {
                for _ in 0..restarts {
                    restart(&scene.cluster).await;
                }
            };
            let answer = if version < 15 {
                Answer::Unknown(&[Unsettled::Restarted, Unsettled::SeveralFailovers])
            } else {
                answer
            };
            case.assert_in_steps(cut, steps, step, answer).await;
        }
    }
}

/// A clean one.
async fn restart(cluster: &Cluster) {
    cluster.stop_fast(cluster.primary()).await;
    cluster.start_node(cluster.primary()).await;
}

/// A crash among them loses the mark, whose id is given away: statistics tell, and without the function nothing is
/// guessed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_among_clean_restarts_is_noticed() {
    for right in RIGHTS {
        let case = Case::new(single(), right).await;
        let cluster = &case.bench.cluster;
        burn_ids(cluster).await;
        write_no_more(cluster).await;
        let fault = async |scene: &Scene| {
            scene.cluster.crash(Node(0)).await;
            scene.assert_replayed(false).await;
            scene.give_id_away().await;
            for _ in 0..2 {
                restart(&scene.cluster).await;
            }
            scene.assert_trap().await;
        };
        let answer = match right {
            Right::Function => Answer::Lost,
            _ => Answer::Unknown(&[Unsettled::Restarted, Unsettled::SeveralFailovers]),
        };
        case.assert(UNDELIVERED, fault, answer).await;
    }
}

/// A crash loop: the first crash loses the mark, its id is given away, and the last replay ends behind the mark.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_loop_that_lost_the_mark_is_settled_by_the_log() {
    for crashes in [2, 3] {
        let case = Case::new(single(), Right::Function).await;
        let cluster = &case.bench.cluster;
        burn_ids(cluster).await;
        write_no_more(cluster).await;
        let fault = async |scene: &Scene| {
            scene.cluster.crash(Node(0)).await;
            scene.assert_replayed(false).await;
            scene.give_id_away().await;
            scene.pass_mark().await;
            for _ in 1..crashes {
                scene.cluster.crash(Node(0)).await;
            }
            scene.assert_replayed(true).await;
            scene.assert_trap().await;
        };
        case.assert(UNDELIVERED, fault, Answer::Lost).await;
    }
}

/// The first crash loses the mark, its id is given away, and the log goes on with a new segment: where the mark was is
/// nothing but zeros, without a page's header.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_segment_over_a_lost_mark_is_read_as_one() {
    let case = Case::new(single(), Right::Function).await;
    let cluster = &case.bench.cluster;
    burn_ids(cluster).await;
    cluster.direct(Node(0)).await.batch_execute("SELECT pg_switch_wal()").await.unwrap();
    write_no_more(cluster).await;
    // The room for what is written in the next life, before the segment is left.
    emit(&cluster.direct(Node(0)).await, 300_000).await;
    let fault = async |scene: &Scene| {
        scene.cluster.crash(Node(0)).await;
        scene.assert_replayed(false).await;
        scene.give_id_away().await;
        let server = scene.cluster.direct(Node(0)).await;
        let sql = "SELECT pg_walfile_name(pg_switch_wal()) = pg_walfile_name($1::text::pg_lsn)";
        let same: bool = server.query_one(sql, &[&scene.doubt().mark]).await.unwrap().get(0);
        assert!(same, "the mark was in another segment");
        super::write_wal(&scene.cluster, 10).await;
        scene.cluster.crash(Node(0)).await;
        scene.assert_replayed(true).await;
        scene.assert_trap().await;
    };
    case.assert(UNDELIVERED, fault, Answer::Lost).await;
}

/// A crash loop that the pool has seen, and no function: nothing is guessed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_loop_that_the_pool_has_seen_is_not_guessed() {
    for right in [Right::Monitor, Right::Nothing] {
        let case = Case::new(single(), right).await;
        let cluster = &case.bench.cluster;
        burn_ids(cluster).await;
        let step = async |scene: &Scene, _| {
            scene.cluster.crash(Node(0)).await;
            scene.assert_replayed(true).await;
        };
        case.assert_in_steps(Cut::CommitAnswerDropped, 2, step, SEVERAL).await;
    }
}

/// A crash loop behind a commit that was done, or behind a mark that was written; the pool sees all of it, or nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_loop_that_lost_nothing_is_settled_by_the_log() {
    for (cut, answer) in [(Cut::CommitAnswerDropped, Answer::Committed), (UNDELIVERED, Answer::Lost)] {
        for times in [2, 3] {
            for seen in [false, true] {
                let case = Case::new(single(), Right::Function).await;
                let (steps, crashes) = if seen { (times, 1) } else { (1, times) };
                let step = async |scene: &Scene, step| {
                    if step == 0 {
                        super::write_wal(&scene.cluster, 1).await;
                    }
                    for _ in 0..crashes {
                        scene.cluster.crash(Node(0)).await;
                    }
                    scene.assert_replayed(true).await;
                };
                case.assert_in_steps(cut, steps, step, answer).await;
            }
        }
    }
}

/// The mark is lost in a crash, its id is given away, and then a standby that has all of that is promoted: the mark's
/// timeline is an ancestor that ends behind the mark.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_before_a_promotion_is_settled_by_the_log() {
    for archive in [false, true] {
        let cluster = Cluster::builder().nodes(2).asynchronous();
        let case = Case::new(if archive { cluster.archive() } else { cluster }, Right::Function).await;
        let cluster = &case.bench.cluster;
        burn_ids(cluster).await;
        write_no_more(cluster).await;
        let fault = async |scene: &Scene| {
            scene.cluster.crash(Node(0)).await;
            scene.assert_replayed(false).await;
            scene.give_id_away().await;
            scene.pass_mark().await;
            scene.cluster.wait_streaming(Node(0), 1).await;
            scene.cluster.wait_replayed(Node(1)).await;
            scene.cluster.kill(Node(0)).await;
            scene.cluster.promote(Node(1)).await;
            scene.assert_replayed(true).await;
            scene.assert_trap().await;
        };
        case.assert(UNDELIVERED, fault, Answer::Lost).await;
    }
}

/// The mark is lost in a crash. In the next life another pool's transaction has the same id, and its mark ends at the
/// very same position. Then the server crashes again, so that its last replay ends behind the mark: only the nonce
/// tells.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mark_at_the_very_same_position_is_told_by_its_nonce() {
    let case = Case::new(single(), Right::Function).await;
    let cluster = &case.bench.cluster;
    burn_ids(cluster).await;
    // What a transaction reads for the first time may write, too.
    case.bench.pool.transaction(async |tx| insert(&tx, 7).await).await.unwrap();
    case.bench.pool.transaction(async |tx| insert(&tx, 8).await).await.unwrap();
    // It writes a record of its own every 15 seconds, which would be between the position and the mark on a slow
    // machine.
    cluster.stop_background(Node(0), Background::BackgroundWriter).await;
    let server = cluster.direct(Node(0)).await;
    // Nor has whoever reads the catalogue anything to tidy up there, in this life and the next.
    for tidy in ["DELETE FROM entries", "VACUUM", "CHECKPOINT"] {
        server.batch_execute(tidy).await.unwrap();
    }
    write_no_more(cluster).await;
    // In the next life this is the room for what comes before the other mark.
    emit(&server, 300_000).await;
    while !(2000..6000).contains(&(position(&server).await % 8192)) {
        emit(&server, 500).await;
    }
    let begins = position(&server).await;
    drop(server);
    let history = async |scene: &Scene| {
        scene.cluster.crash(Node(0)).await;
        scene.assert_replayed(false).await;
        reuse_position(scene, begins).await;
        scene.assert_trap().await;
        scene.cluster.crash(Node(0)).await;
        scene.assert_replayed(true).await;
        scene.assert_trap().await;
    };
    case.assert(UNDELIVERED, history, Answer::Lost).await;
}

/// Another pool commits a transaction whose mark begins where the lost one began, with the same id.
async fn reuse_position(scene: &Scene, begins: i64) {
    let doubt = scene.doubt();
    scene.cluster.stop_background(Node(0), Background::BackgroundWriter).await;
    let other = Pool::builder(format!("postgres://app@{}/app", scene.cluster.socket_addr(Node(0)))).unwrap();
    let other = other.max_size(1).build().unwrap();
    let mark = async || {
        let call = other.build_transaction().guarantee(Guarantee::ExactlyOnce);
        let marked = call.run(async |tx| {
            let sql = "SELECT pg_current_xact_id()::text::bigint, pg_current_wal_insert_lsn()::text";
            let row = tx.query_one(sql, &[]).await?;
            insert(&tx, 7).await?;
            tx.execute("DELETE FROM entries WHERE id = 7", &[]).await?;
            Ok((row.get::<_, i64>(0), row.get::<_, String>(1)))
        });
        marked.await.unwrap()
    };
    mark().await;
    let server = scene.cluster.direct(Node(0)).await;
    let next = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint";
    while server.query_one(next, &[]).await.unwrap().get::<_, i64>(0) < doubt.xid {
        server.batch_execute("SELECT pg_current_xact_id()").await.unwrap();
    }
    pad(&server, begins).await;
    assert_eq!(mark().await, (doubt.xid, doubt.mark), "the other mark is not at the same position");
}

/// A record of WAL with so much text.
async fn emit(server: &Client, text: i64) {
    let sql = format!("SELECT pg_logical_emit_message(false, 'testbed', repeat('x', {text}))");
    server.batch_execute(&sql).await.unwrap();
}

/// Where the next record begins.
async fn position(server: &Client) -> i64 {
    let sql = "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint";
    server.query_one(sql, &[]).await.unwrap().get(0)
}

/// Writes records until the next one begins at this position, which is in the midst of a page.
async fn pad(server: &Client, until: i64) {
    let begun = position(server).await;
    emit(server, 0).await;
    // Of a record without text.
    let least = position(server).await - begun;
    loop {
        let left = until - position(server).await;
        match left {
            0 => return,
            1500.. => emit(server, (left - 1000).min(4000)).await,
            _ if left > least + 160 => emit(server, 40).await,
            _ if left >= least => emit(server, left - least).await,
            _ => panic!("{left} bytes are left, and a record has {least}"),
        }
    }
}
