//! The programs of other languages, against real servers: they write, and what they call written is stored.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use failover_bench::event::now_micros;
use failover_bench::external::peers;
use failover_bench::peer::{Peer, Target};
use failover_bench::recorder::Recorder;
use testbed::{Cluster, Node, eventually};

const WORKERS: usize = 4;

fn target(cluster: &Cluster, table: &str, name: Option<String>) -> Target {
    Target {
        hosts: cluster.nodes().into_iter().map(|node| cluster.socket_addr(node)).collect(),
        name,
        dns: cluster.dns().addr(),
        system_dns: false,
        port: cluster.port(),
        pace: Duration::from_millis(5),
        user: "app".into(),
        password: String::new(),
        database: "app".into(),
        table: table.into(),
        workers: WORKERS,
        prefix: table.into(),
    }
}

async fn stored(cluster: &Cluster, table: &str) -> HashSet<String> {
    let client = cluster.direct(cluster.primary()).await;
    let rows = client.query(&format!("SELECT id FROM {table}"), &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// Each program that is installed writes with all workers, reports a failover's errors, follows the primary, and ends
/// when told. Those that are not installed are named.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn programs_write_and_say_so() {
    for peer in peers() {
        match peer.missing().await {
            Some(why) => println!("{}: missing: {why}", peer.name()),
            None => program(peer.as_ref()).await,
        }
    }
}

async fn program(peer: &dyn Peer) {
    let cluster = Cluster::start().await;
    let table = "rows_of_one";
    let sql = format!("CREATE TABLE {table} (id text NOT NULL); GRANT ALL ON {table} TO app");
    cluster.direct(cluster.primary()).await.batch_execute(&sql).await.unwrap();
    // It has no other way to follow a primary.
    let by_name = peer.needs_name();
    cluster.dns().set(&[cluster.addr(cluster.primary())]);
    let target = target(&cluster, table, by_name.then(|| "pg.internal".to_owned()));
    let recorder = Arc::new(Recorder::new(WORKERS));
    let load = peer.start(&target, Arc::clone(&recorder)).await.unwrap();
    let begun = now_micros();
    let all = async || recorder.workers_ok_since(begun) == WORKERS;
    eventually("all workers write", Duration::from_secs(20), all).await;
    assert!(load.memory().unwrap() > 1_000_000);

    cluster.kill(Node(0)).await;
    let next = cluster.most_advanced_standby().await;
    cluster.promote(next).await;
    cluster.dns().set(&[cluster.addr(next)]);
    let promoted = now_micros();
    let all = async || recorder.workers_ok_since(promoted) == WORKERS;
    eventually("all workers write again", Duration::from_mins(1), all).await;
    load.stop().await;

    let (events, stored) = (recorder.events(), stored(&cluster, table).await);
    let (oks, errors): (Vec<_>, Vec<_>) = events.iter().partition(|event| event.outcome.is_ok());
    let lost = oks.iter().filter(|event| !stored.contains(&event.id)).count();
    let back = oks.iter().filter(|event| event.micros > promoted).map(|event| event.micros).min();
    println!(
        "{} ({}): {} rows, {} errors, {lost} lost, first write {:?} ms after the promotion, e.g. {:?}",
        peer.name(),
        peer.version(),
        oks.len(),
        errors.len(),
        back.map(|at| (at - promoted) / 1000),
        errors.first().map(|event| &event.outcome),
    );
    assert_eq!(lost, 0, "what a program calls written is stored");
    assert!(!errors.is_empty(), "{}: a killed primary costs its callers errors", peer.name());
}
