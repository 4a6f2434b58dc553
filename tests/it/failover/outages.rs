//! The main job: the primary dies, stalls or moves, and no caller notices more than a pause.

use std::time::{Duration, Instant};

use testbed::{Cluster, Garbage, Node, Promotion, Tap, eventually};
use tokio::time::sleep;
use tokio_postgres_failover::view::State;
use tokio_postgres_failover::{Client, Error, Pool};

use crate::support::load::{
    LONG, Load, Outcome, PROMPT, Write, by_name, by_url, create_table, from_env, generation, primary_lost, server_of,
    silent_primaries_hold_nobody,
};
use crate::support::{stalls, started};

/// Kills the primary and promotes the best standby.
async fn fail_over(cluster: &Cluster) -> Promotion {
    cluster.kill(cluster.primary()).await;
    cluster.promote_timed(cluster.most_advanced_standby().await).await
}

/// Waits for all writers, stops them and holds their answers against the table.
async fn finish(load: Load, cluster: &Cluster, promotion: Promotion) -> Outcome {
    load.all_written_since(Instant::now()).await;
    let slack = stalls::slack_since(promotion.accepted_at);
    let outcome = load.stop(cluster).await;
    let (first, all) = outcome.recovery(promotion.accepted_at);
    println!("first write after {first:?}, all writers after {all:?}; {} acknowledged", outcome.verdict.acknowledged);
    assert!(all < PROMPT + slack, "the last writer wrote only after {all:?}");
    outcome
}

/// S1, R1
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_with_all_members_in_dns() {
    let cluster = started().await;
    let pool = by_name(&cluster).build().unwrap();
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    let promotion = fail_over(&cluster).await;
    finish(load, &cluster, promotion).await.assert_flawless();
    assert_eq!(generation(&pool), 2);
}

/// Sessions of the pool's search in which this server waits for the end of its recovery.
async fn promotion_waits(cluster: &Cluster, node: Node) -> i64 {
    let sql = "SELECT count(*) FROM pg_stat_activity
                WHERE application_name = 'tokio-postgres-failover' AND wait_event = 'PgSleep'";
    cluster.direct(node).await.query_one(sql, &[]).await.unwrap().get(0)
}

/// R1
#[tokio::test]
async fn a_standby_looks_by_itself_whether_it_was_promoted() {
    let cluster = started().await;
    let pool = by_name(&cluster).build().unwrap();
    pool.connect().await.unwrap();
    let standby = cluster.most_advanced_standby().await;
    eventually("the first search is over", LONG, async || promotion_waits(&cluster, standby).await == 0).await;
    cluster.kill(cluster.primary()).await;
    eventually("the standby waits for its promotion", LONG, async || promotion_waits(&cluster, standby).await == 1)
        .await;
    cluster.promote(standby).await;
    pool.connect().await.unwrap();
    eventually("the wait has ended", LONG, async || promotion_waits(&cluster, standby).await == 0).await;
}

/// R1, where the role may not call `pg_sleep`.
#[tokio::test]
async fn a_standby_that_refuses_to_wait_is_found_all_the_same() {
    let cluster = started().await;
    let admin = cluster.direct(cluster.primary()).await;
    admin.batch_execute("REVOKE EXECUTE ON FUNCTION pg_sleep FROM PUBLIC").await.unwrap();
    let pool = by_name(&cluster).build().unwrap();
    let load = Load::warm(&pool, 4, Write::Transaction).await;
    let promotion = fail_over(&cluster).await;
    finish(load, &cluster, promotion).await.assert_flawless();
    let timeline = || match pool.status().view.state {
        State::Primary { report, .. } => report.timeline,
        _ => None,
    };
    eventually("its identity is told as ever", LONG, async || timeline() == Some(2)).await;
}

/// S1, R2
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_with_only_the_primary_in_dns_which_moves_late() {
    let cluster = started().await;
    cluster.dns().set(&[cluster.addr(cluster.primary())]);
    let pool = by_name(&cluster).build().unwrap();
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    let promotion = fail_over(&cluster).await;
    sleep(Duration::from_millis(200)).await;
    // Nobody can find the primary earlier.
    let promotion = Promotion { accepted_at: Instant::now(), ..promotion };
    cluster.dns().set(&[cluster.addr(cluster.primary())]);
    finish(load, &cluster, promotion).await.assert_flawless();
    assert_eq!(generation(&pool), 2);
}

/// S1, R1
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_with_three_hosts_in_the_url_and_no_dns() {
    let cluster = started().await;
    let pool = by_url(cluster.url_hosts()).build().unwrap();
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    let promotion = fail_over(&cluster).await;
    finish(load, &cluster, promotion).await.assert_flawless();
    assert_eq!(generation(&pool), 2);
    assert_eq!(cluster.dns().queries(), 0, "nothing was to be resolved");
}

/// S1, R1, R3: one pool through many failovers. `FAILOVERS=20` for the full number.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_failovers_in_a_row() {
    let failovers = from_env("FAILOVERS", 3);
    let cluster = started().await;
    let pool = by_name(&cluster).build().unwrap();
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    let mut promotions = Vec::new();
    for _ in 0..failovers {
        let old = cluster.primary();
        let promotion = fail_over(&cluster).await;
        load.all_written_since(Instant::now()).await;
        let slack = stalls::slack_since(promotion.accepted_at);
        promotions.push((promotion, slack));
        cluster.restart_as_standby(old).await;
        load.all_written_since(Instant::now()).await;
    }
    let outcome = load.stop(&cluster).await;
    for (promotion, slack) in promotions {
        let (first, all) = outcome.recovery(promotion.accepted_at);
        println!("first write after {first:?}, all writers after {all:?}");
        assert!(all < PROMPT + slack, "the last writer wrote only after {all:?}");
    }
    outcome.assert_flawless();
    assert_eq!(generation(&pool), failovers + 1);
}

/// S1, K2: the same with work that may be applied twice. A re-run that finds its row there writes nothing of its own,
/// and is acknowledged only when a standby has the row.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_with_idempotent_work() {
    let cluster = started().await;
    let pool = by_name(&cluster).build().unwrap();
    let load = Load::warm(&pool, 8, Write::Idempotent).await;
    let promotion = fail_over(&cluster).await;
    finish(load, &cluster, promotion).await.assert_flawless();
}

/// S2, R3, R9
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn planned_switch_over() {
    let cluster = started().await;
    let pool = by_name(&cluster).build().unwrap();
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    let old = cluster.primary();
    cluster.stop_fast(old).await;
    let promotion = cluster.promote_timed(cluster.most_advanced_standby().await).await;
    cluster.restart_as_standby(old).await;
    finish(load, &cluster, promotion).await.assert_flawless();
    assert_eq!(generation(&pool), 2);
}

/// S3
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn immediate_shutdown() {
    let cluster = started().await;
    let pool = by_name(&cluster).build().unwrap();
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    cluster.stop_immediate(cluster.primary()).await;
    let promotion = cluster.promote_timed(cluster.most_advanced_standby().await).await;
    finish(load, &cluster, promotion).await.assert_flawless();
}

/// S5: every session dies, and the server recovers by itself: the same server in its next life.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backend_crash_is_the_next_generation() {
    let cluster = started().await;
    let pool = by_name(&cluster).build().unwrap();
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    let open = pool.get().await.unwrap();
    cluster.kill_backend(cluster.primary()).await;
    // The server ends the others when it has seen that one is dead.
    eventually("the crash has ended the other sessions", LONG, async || open.is_closed()).await;
    drop(open);
    // The standbys stream again before commits are acknowledged again.
    load.all_written_since(Instant::now()).await;
    load.stop(&cluster).await.assert_flawless();
    assert_eq!(generation(&pool), 2);
}

/// S6: it is that session's affair alone; the primary is not even suspended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn terminated_backends_cost_nothing_else() {
    let cluster = started().await;
    // Nobody is silent here: what a stall of the machine keeps back is no reason for doubt.
    let pool = by_name(&cluster).heartbeat_timeout(LONG).build().unwrap();
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    let found = pool.status().view.changed.at;
    let administrator = cluster.direct(cluster.primary()).await;
    for _ in 0..10 {
        let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                   WHERE usename = 'app' AND state <> 'idle' ORDER BY backend_start LIMIT 1";
        administrator.execute(sql, &[]).await.unwrap();
        load.all_written_since(Instant::now()).await;
    }
    // After each loss the pool asks on a new session, and the loss of such a session would be a reason for doubt. The
    // last of them has been answered by then.
    sleep(Duration::from_millis(300)).await;
    // All at once, the heartbeat's own among them.
    let ended = cluster.terminate_backends(cluster.primary(), "tokio-postgres-failover").await;
    assert!(ended >= 8, "{ended} sessions were ended");
    load.all_written_since(Instant::now()).await;
    load.stop(&cluster).await.assert_flawless();
    assert_eq!(generation(&pool), 1);
    assert_eq!(pool.status().view.changed.at, found, "{:?}", pool.status().view);
}

/// S6: the heartbeat's session is one like any other; that it ends says nothing about the primary.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn terminated_heart_beat_is_no_lost_primary() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let pool = by_name(&cluster).heartbeat_interval(Duration::from_millis(100)).heartbeat_timeout(LONG);
    let pool = pool.build().unwrap();
    let client = pool.get().await.unwrap();
    let own = backend_pid_of(&client).await;
    let found = pool.status().view.changed.at;
    let administrator = cluster.direct(Node(0)).await;
    for _ in 0..3 {
        // One that has answered before: the loss of a session that was opened to ask is a reason for doubt.
        let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                   WHERE usename = 'app' AND pid <> $1 AND state = 'idle' AND query LIKE '%pg_is_in_recovery%'";
        eventually("the next heart-beat's session is there, and ended", LONG, async || {
            administrator.execute(sql, &[&own]).await.unwrap() == 1
        })
        .await;
    }
    eventually("the heart beats again", LONG, async || {
        let sql = "SELECT FROM pg_stat_activity WHERE usename = 'app' AND pid <> $1 AND state = 'idle'";
        administrator.execute(sql, &[&own]).await.unwrap() == 1
    })
    .await;
    assert_eq!(backend_pid_of(&client).await, own);
    assert_eq!(generation(&pool), 1);
    assert_eq!(pool.status().view.changed.at, found, "{:?}", pool.status().view);
}

/// S10: "starting up" is an answer to wait by, before the first success and at the deadline.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_that_starts_up_is_waited_for() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let starting = (cluster.spare_addr(0), cluster.port()).into();
    let starting = Garbage::start(starting, fatal("57P03", "the database system is starting up")).await;
    let front = Tap::start((cluster.spare_addr(1), cluster.port()).into(), starting.addr()).await;
    cluster.dns().set(&[front.addr().ip()]);
    let impatient = by_name(&cluster).checkout_timeout(Duration::from_millis(500)).build().unwrap();
    // A slow machine may not get to the answer within the first of these times.
    eventually("the error says that it starts up", LONG, async || {
        let Err(Error::Unavailable(unavailable)) = impatient.get().await else { panic!("nobody can be the primary") };
        println!("{unavailable}");
        unavailable.to_string().contains("the database system is starting up")
    })
    .await;

    let pool = by_name(&cluster).build().unwrap();
    let waiting = tokio::spawn({
        let pool = pool.clone();
        async move { backend_pid(&pool).await }
    });
    let before = starting.accepted();
    eventually("it is asked again and again", LONG, async || starting.accepted() > before + 3).await;
    assert!(!waiting.is_finished());
    front.set_upstream(cluster.socket_addr(Node(0)));
    waiting.await.unwrap();
}

/// S10, S3: the same server, stopped hard and started again, is a new generation of connections.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarted_server_is_the_next_generation() {
    let cluster = Cluster::builder().nodes(1).start().await;
    create_table(&cluster).await;
    let pool = by_name(&cluster).build().unwrap();
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    cluster.stop_immediate(Node(0)).await;
    primary_lost(&pool).await;
    cluster.start_node(Node(0)).await;
    load.all_written_since(Instant::now()).await;
    load.stop(&cluster).await.assert_flawless();
    assert_eq!(generation(&pool), 2);
}

/// R10
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_failovers_within_a_second() {
    let cluster = started().await;
    let pool = by_name(&cluster).build().unwrap();
    let load = Load::warm(&pool, 8, Write::Idempotent).await;
    fail_over(&cluster).await;
    // Else the last server would lack what was acknowledged, and that is no pool's doing.
    for node in cluster.nodes() {
        if node != cluster.primary() && cluster.is_running(node) {
            cluster.wait_replayed(node).await;
        }
    }
    let promotion = fail_over(&cluster).await;
    finish(load, &cluster, promotion).await.assert_flawless();
    // The pool need not have seen the one in between.
    assert!((2..=3).contains(&generation(&pool)), "{:?}", pool.status().view);
    assert_eq!(server_of(&pool).await, cluster.addr(cluster.primary()).to_string());
}

/// S7: the calls that hang on the frozen server end when another one has proved to be the primary. `ROUNDS=20` for
/// figures.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frozen_primary_is_left_for_its_successor() {
    let cluster = started().await;
    let pool = by_name(&cluster).max_size(10).build().unwrap();
    let freeze = |node, on| if on { cluster.freeze(node) } else { cluster.thaw(node) };
    silent_primaries_hold_nobody(&cluster, &pool, "freeze", freeze).await;
}

/// S12: a stall of a second and a half is no failure.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_primary_keeps_its_generation() {
    let cluster = started().await;
    let pool = by_name(&cluster).build().unwrap();
    let load = Load::warm(&pool, 8, Write::Transaction).await;
    let mut client = pool.get().await.unwrap();
    let transaction = client.transaction().await.unwrap();
    transaction.batch_execute("INSERT INTO entries (id) VALUES (-1)").await.unwrap();
    cluster.freeze(cluster.primary());
    sleep(Duration::from_millis(1500)).await;
    cluster.thaw(cluster.primary());
    load.all_written_since(Instant::now()).await;
    transaction.commit().await.expect("what was under way goes on");
    drop(client);
    load.stop(&cluster).await.assert_flawless();
    assert_eq!(generation(&pool), 1);
}

/// C8: no storm of connections meets the new primary, however many callers wait for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_tasks_on_eight_connections() {
    let cluster = Cluster::builder().setting("log_connections", "on").start().await;
    create_table(&cluster).await;
    let pool = by_name(&cluster).build().unwrap();
    let load = Load::warm(&pool, 500, Write::Transaction).await;
    let standby = cluster.most_advanced_standby().await;
    let starts = async || cluster.log(standby).await.matches("connection authorized: user=app").count();
    let before = starts().await;
    let killed = Instant::now();
    cluster.kill(cluster.primary()).await;
    let promotion = cluster.promote_timed(cluster.most_advanced_standby().await).await;
    load.all_written_since(Instant::now()).await;
    let after = starts().await;
    // In a longer search there are more polls, each of which may be a session.
    let polls = usize::try_from(stalls::lost_since(killed).as_millis() / 100).unwrap();
    let outcome = load.stop(&cluster).await;
    println!("connection starts at the new primary: {before} before, {} after", after - before);
    println!("first write after {:?}", outcome.recovery(promotion.accepted_at).0);
    outcome.assert_flawless();
    if cluster.primary() == standby {
        // Eight, the heartbeat's, the one that found it, and room for a patrol and for those ended in the turmoil.
        assert!(after - before <= 24 + polls, "{} connection starts", after - before);
    }
}

async fn backend_pid(pool: &Pool) -> i32 {
    backend_pid_of(&pool.get().await.unwrap()).await
}

async fn backend_pid_of(client: &Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0)
}

/// An error message that ends the session.
fn fatal(code: &str, message: &str) -> Vec<u8> {
    let body = format!("SFATAL\0VFATAL\0C{code}\0M{message}\0\0");
    let length = u32::try_from(body.len() + 4).unwrap();
    [b"E", &length.to_be_bytes()[..], body.as_bytes()].concat()
}
