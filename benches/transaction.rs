//! What a transaction with one INSERT costs under each guarantee, as ratios to plain tokio-postgres in the same run.
//!
//! `cargo bench --bench transaction`; ROUNDS, WRITERS and SECONDS change the run, and `COMMIT_DELAY` is how long a COMMIT
//! waits for its disk, in microseconds: on loopback and a fast disk, the processors are what is measured. Each round runs
//! every candidate, forwards or backwards, and each ratio is that of a candidate to the plain one of its own round.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a benchmark that cannot run has to say so")]

use std::env;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use testbed::Cluster;
use tokio::task::JoinSet;
use tokio_postgres_failover::{Guarantee, Ledger, Pool, deadpool_postgres};

const SQL: &str = "INSERT INTO entries (id) VALUES ($1)";

#[derive(Clone)]
enum Candidate {
    Plain(deadpool_postgres::Pool),
    Ours(Pool, Guarantee),
}

impl Candidate {
    async fn run(&self, id: i64) {
        match self {
            Self::Plain(pool) => {
                let mut client = pool.get().await.unwrap();
                let statement = client.prepare_cached(SQL).await.unwrap();
                let transaction = client.transaction().await.unwrap();
                transaction.execute(&statement, &[&id]).await.unwrap();
                transaction.commit().await.unwrap();
            }
            Self::Ours(pool, guarantee) => {
                let work = async |tx: tokio_postgres_failover::Transaction| {
                    let statement = tx.prepare_cached(SQL).await?;
                    tx.execute(&statement, &[&id]).await?;
                    Ok(())
                };
                pool.build_transaction().guarantee(guarantee.clone()).run(work).await.unwrap();
            }
        }
    }
}

/// One candidate's part of one round.
#[derive(Clone, Copy)]
struct Figures {
    /// Median latency of one writer alone.
    latency: f64,
    /// Transactions per second of all writers.
    throughput: f64,
}

fn from_env(name: &str, usual: u64) -> u64 {
    env::var(name).map_or(usual, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number, not {text:?}")))
}

async fn measure(candidate: &Candidate, writers: u64, time: Duration) -> Figures {
    let mut latencies = Vec::new();
    let end = Instant::now() + time;
    while Instant::now() < end {
        let began = Instant::now();
        candidate.run(0).await;
        latencies.push(began.elapsed().as_secs_f64());
    }
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut tasks = JoinSet::new();
    let began = Instant::now();
    for _ in 0..writers {
        let (candidate, stop, done) = (candidate.clone(), Arc::clone(&stop), Arc::clone(&done));
        tasks.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                candidate.run(1).await;
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    tokio::time::sleep(time).await;
    #[expect(clippy::cast_precision_loss, reason = "some thousands")]
    let throughput = done.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    while tasks.join_next().await.is_some() {}
    Figures { latency: median(latencies), throughput }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[tokio::main]
async fn main() {
    let (rounds, writers) = (from_env("ROUNDS", 15), from_env("WRITERS", 16));
    let time = Duration::from_secs_f64(env::var("SECONDS").map_or(1.0, |text| text.parse().unwrap()));
    let delay = from_env("COMMIT_DELAY", 0);
    let cluster = Cluster::builder()
        .nodes(2)
        .setting("fsync", "on")
        .setting("commit_delay", &delay.to_string())
        .setting("commit_siblings", "0")
        .start()
        .await;
    let administrator = cluster.direct(cluster.primary()).await;
    let ledger = Ledger::default();
    ledger.install(&administrator).await.unwrap();
    administrator
        .batch_execute(
            "CREATE TABLE entries (id bigint NOT NULL); GRANT ALL ON entries TO app;
             GRANT USAGE ON SCHEMA failover TO app; GRANT ALL ON failover.ledger TO app",
        )
        .await
        .unwrap();

    let url = format!("postgres://app@{}:{}/app", cluster.addr(cluster.primary()), cluster.port());
    let ours = Pool::builder(url.as_str()).unwrap().max_size(16).build().unwrap();
    let config = deadpool_postgres::ManagerConfig { recycling_method: deadpool_postgres::RecyclingMethod::Fast };
    let manager = deadpool_postgres::Manager::from_config(url.parse().unwrap(), tokio_postgres::NoTls, config);
    let plain = deadpool_postgres::Pool::builder(manager).max_size(16).build().unwrap();
    let candidates = [
        ("plain", Candidate::Plain(plain)),
        ("at most once", Candidate::Ours(ours.clone(), Guarantee::AtMostOnce)),
        ("exactly once", Candidate::Ours(ours.clone(), Guarantee::ExactlyOnce)),
        ("ledger", Candidate::Ours(ours, Guarantee::Ledger(ledger))),
    ];

    let count = candidates.len();
    let mut figures: Vec<Vec<Figures>> = vec![Vec::new(); count];
    for round in 0..usize::try_from(rounds).unwrap() {
        for place in 0..count {
            // Each candidate comes first as often as last.
            let index = if round % 2 == 0 { place } else { count - 1 - place };
            figures[index].push(measure(&candidates[index].1, writers, time).await);
        }
    }
    println!(
        "{rounds} rounds, synchronous standby, fsync on, commit_delay {delay} µs; ratios to plain of the same round, median (min – max)"
    );
    for (index, (name, _)) in candidates.iter().enumerate() {
        let ratio = |of: fn(&Figures) -> f64| {
            let mut ratios: Vec<f64> =
                figures[index].iter().zip(&figures[0]).map(|(it, plain)| of(it) / of(plain)).collect();
            ratios.sort_by(f64::total_cmp);
            format!("{:.3} ({:.3} – {:.3})", ratios[ratios.len() / 2], ratios[0], ratios[ratios.len() - 1])
        };
        println!(
            "{name:>12}: latency {:7.0} µs, ratio {}; {writers} writers {:7.0}/s, ratio {}",
            median(figures[index].iter().map(|it| it.latency).collect()) * 1e6,
            ratio(|it| it.latency),
            median(figures[index].iter().map(|it| it.throughput).collect()),
            ratio(|it| it.throughput),
        );
    }
}
