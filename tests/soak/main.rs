//! The soak: random faults against a real cluster under load, and every answer held against what is stored in the end.
//!
//! `cargo test` runs it for half a minute; `make soak` for longer. Environment:
//! - `MINUTES=5`: for how long faults are injected; 0.5 unless told.
//! - `FAILOVERS=100`: until so many primaries were replaced, however long it takes.
//! - `SEED=7`: the same order of faults and pauses again. Unless told it comes from the clock.
//! - `RUST_LOG=tokio_postgres_failover=debug` shows what the pool does.
//!
//! The last line is the result. The exit code is not zero when a count in it is that should be 0, when a caller got an
//! error other than "the commit's outcome is unknown", or when tasks, sockets or memory grew.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod command;
mod dice;
mod entries;
mod faults;
mod growth;
mod load;

use std::env;
use std::io;
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use testbed::Cluster;
use tokio_postgres_failover::Pool;
use tracing_subscriber::EnvFilter;

use faults::Director;
use load::{Load, Outcome};

/// Fewer than there are workers, so that some wait for a connection, too.
const CONNECTIONS: usize = 8;

/// When to end.
#[derive(Clone, Copy)]
pub(crate) enum Until {
    Failovers(u32),
    Elapsed(Duration),
}

fn main() -> ExitCode {
    if !command::wanted("soak", &env::args().skip(1).collect::<Vec<_>>()) {
        return ExitCode::SUCCESS;
    }
    // Silent unless RUST_LOG asks.
    tracing_subscriber::fmt().with_env_filter(EnvFilter::from_default_env()).with_writer(io::stderr).init();
    let seed = command::seed();
    let until = match command::variable("FAILOVERS") {
        Some(failovers) => Until::Failovers(failovers),
        None => Until::Elapsed(Duration::from_secs_f64(command::variable("MINUTES").unwrap_or(0.5) * 60.0)),
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    if runtime.block_on(soak(seed, until)) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs everything and says what came of it; whether that was as it should be.
async fn soak(seed: u64, until: Until) -> bool {
    let begun = Instant::now();
    println!("\nrunning 1 test\nseed={seed}");
    let cluster = Cluster::start().await;
    entries::create_tables(&cluster.direct(cluster.primary()).await).await;
    let pool = Pool::builder(cluster.url())
        .and_then(|builder| builder.dns_servers([cluster.dns().addr()]).max_size(CONNECTIONS).seed(seed).build())
        .expect("a pool");
    let load = Load::start(&pool, seed);
    let mut director = Director::new(&cluster, &pool, &load, seed);
    // A step of the test bed that does not come about panics; what the callers were told is still to be looked at.
    let faults = AssertUnwindSafe(director.run(until)).catch_unwind().await;
    let mut faults = faults.unwrap_or_else(|_| vec!["the test bed gave up, see above".to_owned()]);
    let failovers = director.failovers();
    let Outcome { verdict, unknown, errors, stuck, dropped } = load.stop(&cluster).await;
    if !verdict.is_true() {
        faults.push(format!("lost {:?}, doubled {:?}, untrue {:?}", verdict.lost, verdict.doubled, verdict.untrue));
    }
    if errors > 0 {
        faults.push(format!("{errors} errors reached the callers, see above"));
    }
    if stuck > 0 {
        faults.push(format!("{stuck} calls or writers were stuck, see above"));
    }
    if verdict.acknowledged == 0 {
        faults.push("nothing was written".to_owned());
    }
    println!("{dropped} calls were dropped half-way, {} of them left a row", verdict.unanswered.len());
    println!("of {unknown} commits of unknown outcome {} are stored", verdict.unknown_stored);
    let passed = faults.is_empty();
    for fault in &faults {
        println!("FAILED: {fault}");
    }
    command::report("soak", passed, begun);
    println!(
        "failovers={failovers} acknowledged={} lost={} doubled={} untrue={} stuck={stuck} seed={seed} \
         unknown={unknown} errors={errors}",
        verdict.acknowledged,
        verdict.lost.len(),
        verdict.doubled.len(),
        verdict.untrue.len(),
    );
    passed
}
