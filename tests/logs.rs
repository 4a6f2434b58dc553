//! `docs/logs.md` says what the logs say during a failover. This runs one, and compares.
//!
//! This test has a process of its own, as `spans.rs` has, because `tracing` decides once for a whole process what is of
//! interest.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

mod collected;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use collected::Collected;
use testbed::{Cluster, eventually};
use tokio::task::JoinSet;
use tokio_postgres_failover::Pool;

const PATIENCE: Duration = Duration::from_secs(60);
const WRITERS: usize = 8;
/// What each failover logs, in this order.
const ALWAYS: [&str; 2] = ["WARN primary lost ", "INFO primary found "];

/// The lines that the page shows under its first heading.
fn shown() -> Vec<String> {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/logs.md")).unwrap();
    let (_, section) = page.split_once("\n## A failover, line by line\n").expect("the section is there");
    let section = section.split("\n## ").next().unwrap();
    let blocks = section.split("```text\n").skip(1).filter_map(|block| block.split("\n```").next());
    blocks.flat_map(str::lines).map(str::to_owned).collect()
}

/// A line without what differs from one failover to the next: each number is 0, the fields of spans and a server's own
/// words are left out.
fn shape(line: &str) -> String {
    let line = match (line.find("transaction{"), line.find("}: ")) {
        (Some(begins), Some(ends)) => format!("{}transaction{}", &line[..begins], &line[ends + 1..]),
        _ => line.to_owned(),
    };
    let said = [" why=", "no primary yet: "].into_iter().filter_map(|word| Some(line.find(word)? + word.len())).min();
    let mut shape = String::new();
    for letter in line[..said.unwrap_or(line.len())].trim().chars() {
        let (digit, after_one) = (letter.is_ascii_digit(), shape.ends_with('0'));
        if !(digit && after_one) {
            shape.push(if digit { '0' } else { letter });
        }
    }
    shape
}

#[test]
fn shapes_leave_out_what_differs() {
    let line = "INFO transaction{mode=Exactly attempts=1 …}: settled elapsed_ms=592 outcome=Committed";
    assert_eq!(shape(line), "INFO transaction: settled elapsed_ms=0 outcome=Committed");
    assert_eq!(shape(" WARN primary lost generation=12 why=\"closed 7\""), "WARN primary lost generation=0 why=");
    assert!(shown().len() >= 6, "{:?}", shown());
}

#[test]
fn a_failover_logs_what_the_page_shows() {
    let log = Collected::default();
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::INFO)
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .with_writer(log.clone())
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(fails_over());
    let lines: Vec<String> = log.text().lines().map(|line| line.trim().to_owned()).collect();
    println!("{}", lines.join("\n"));
    let shown: BTreeSet<String> = shown().iter().map(|line| shape(line)).collect();
    let others: Vec<&String> = lines.iter().filter(|line| !shown.contains(&shape(line))).collect();
    assert!(others.is_empty(), "docs/logs.md does not show these lines: {others:#?}\nbut these: {shown:#?}");
    // The first line is about the first primary.
    let mut rest = lines.iter().skip(1);
    for always in ALWAYS {
        assert!(rest.any(|line| line.starts_with(always)), "no line begins with `{always}`");
    }
}

/// Kills a primary under load. Ends when every writer has written to the next one.
async fn fails_over() {
    let cluster = Cluster::start().await;
    let sql = "CREATE TABLE entries (id bigint); GRANT ALL ON entries TO app";
    cluster.direct(cluster.primary()).await.batch_execute(sql).await.unwrap();
    let pool = Pool::builder(cluster.url_hosts()).unwrap().max_size(WRITERS).build().unwrap();
    let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new([const { AtomicU32::new(0) }; WRITERS]));
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let (pool, stop, written) = (pool.clone(), Arc::clone(&stop), Arc::clone(&written));
        writers.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let work = pool.transaction(async |tx| {
                    tx.execute("INSERT INTO entries (id) VALUES (1)", &[]).await?;
                    Ok(())
                });
                work.await.unwrap();
                written[writer].fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    all_write(&written).await;
    cluster.kill(cluster.primary()).await;
    cluster.promote_timed(cluster.most_advanced_standby().await).await;
    all_write(&written).await;
    stop.store(true, Ordering::Relaxed);
    while let Some(writer) = writers.join_next().await {
        writer.unwrap();
    }
    pool.close();
}

/// Waits until each writer has written twice from now on. The first write may have been under way.
async fn all_write(written: &[AtomicU32; WRITERS]) {
    let now = || written.each_ref().map(|count| count.load(Ordering::Relaxed));
    let before = now();
    eventually("every writer writes", PATIENCE, async || {
        now().iter().zip(before).all(|(now, before)| *now > before + 1)
    })
    .await;
}
