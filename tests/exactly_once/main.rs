//! The proof that a transaction is committed exactly once: connections are cut at every point of COMMIT, servers crash,
//! primaries are killed, and every answer is held against what is stored in the end. For both settlers: the one that reads
//! the WAL, and the ledger.
//!
//! `cargo test` runs it small; `make exactly-once` with these numbers. Environment:
//! - `CUTS=1000`: so many connections are cut between COMMIT and its answer, for each settler.
//! - `FAILOVERS=200`: so many primaries are killed, where commits wait for a standby.
//! - `ASYNC=100`: so many more are killed where commits do not wait, and a standby is promoted that lacks some of them. What
//!   the dead primary had acknowledged, and nobody else had, is `allowed_loss`; the pool cannot know of it.
//! - `SEED=7`: the same order of faults and pauses again. Unless told it comes from the clock.
//! - `SETTLER=wal`: this one alone.
//! - `RUST_LOG=tokio_postgres_failover=debug` shows what the pool does.
//!
//! The last lines are the result. The exit code is not zero when something was lost, doubled or untrue, when a call got
//! stuck or failed, when the ledger did not know an outcome, or when no outcome was in doubt.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

#[path = "../soak/command.rs"]
mod command;
mod cuts;
#[path = "../soak/dice.rs"]
mod dice;
mod failovers;
mod trace;
mod writers;

use std::env;
use std::io;
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::time::Instant;

use futures_util::FutureExt;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use cuts::Cuts;
use failovers::{Failovers, Replication};
use writers::{Outcome, Settler};

const NAME: &str = "exactly_once";

/// How much of everything.
#[derive(Clone, Copy)]
struct Numbers {
    cuts: u64,
    failovers: u64,
    without_waiting: u64,
}

/// What is wrong, and the lines to end with.
#[derive(Default)]
struct Report {
    faults: Vec<String>,
    lines: Vec<String>,
}

fn main() -> ExitCode {
    if !command::wanted(NAME, &env::args().skip(1).collect::<Vec<_>>()) {
        return ExitCode::SUCCESS;
    }
    let settling = Targets::new().with_target("tokio_postgres_failover", LevelFilter::INFO);
    // Silent unless RUST_LOG asks.
    let log = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_filter(EnvFilter::from_default_env());
    tracing_subscriber::registry().with(trace::Listener.with_filter(settling)).with(log).init();
    let numbers = Numbers {
        cuts: command::variable("CUTS").unwrap_or(40),
        failovers: command::variable("FAILOVERS").unwrap_or(3),
        without_waiting: command::variable("ASYNC").unwrap_or(2),
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    if runtime.block_on(prove(command::seed(), numbers)) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs everything and says what came of it; whether that was as it should be.
async fn prove(seed: u64, numbers: Numbers) -> bool {
    let begun = Instant::now();
    println!("\nrunning 1 test\nseed={seed}");
    let only: Option<String> = command::variable("SETTLER");
    let mut report = Report::default();
    for settler in [Settler::Wal, Settler::Ledger] {
        if only.as_ref().is_none_or(|only| only == settler.name()) {
            report.waiting(settler, numbers, seed).await;
        }
    }
    for settler in [Settler::Wal, Settler::Ledger] {
        if only.as_ref().is_none_or(|only| only == settler.name()) && numbers.without_waiting > 0 {
            report.without_waiting(settler, numbers.without_waiting, seed).await;
        }
    }
    for fault in &report.faults {
        println!("FAILED: {fault}");
    }
    let passed = report.faults.is_empty() && !report.lines.is_empty();
    command::report(NAME, passed, begun);
    for line in report.lines {
        println!("{line}");
    }
    passed
}

impl Report {
    /// The cuts, and the failovers where commits wait for a standby.
    async fn waiting(&mut self, settler: Settler, numbers: Numbers, seed: u64) {
        let name = settler.name();
        let mut all = Outcome::default();
        let (mut of_commits, mut made) = (0, 0);
        if numbers.cuts > 0 {
            println!("settler={name}: {} cuts of commits", numbers.cuts);
            let begun = Instant::now();
            if let Some(cuts) = self.ended(cuts::run(settler, numbers.cuts, seed)).await {
                let Cuts { by_kind, crashes, outcome, .. } = cuts;
                of_commits = cuts.of_commits;
                let kinds: Vec<String> = by_kind.iter().map(|(kind, cuts)| format!("{kind} {cuts}")).collect();
                println!("settler={name} cuts: {}; the server crashed at {crashes} of them", kinds.join(", "));
                self.look(&format!("settler={name} cuts"), settler, &outcome, begun);
                all.add(outcome);
            }
        }
        if numbers.failovers > 0 {
            println!("settler={name}: {} failovers", numbers.failovers);
            let begun = Instant::now();
            let run = failovers::run(settler, Replication::Synchronous, numbers.failovers, seed);
            if let Some(failovers) = self.ended(run).await {
                made = failovers.made;
                println!("settler={name} failovers: {}", reused(&failovers));
                self.look(&format!("settler={name} failovers"), settler, &failovers.outcome, begun);
                all.add(failovers.outcome);
            }
        }
        let counts = counts(&all);
        self.lines.push(format!("settler={name} cuts={of_commits} failovers={made} {counts}"));
    }

    /// The failovers where commits do not wait.
    async fn without_waiting(&mut self, settler: Settler, wanted: u64, seed: u64) {
        let (name, begun) = (settler.name(), Instant::now());
        println!("settler={name}: {wanted} failovers, asynchronous");
        let run = failovers::run(settler, Replication::Asynchronous, wanted, seed);
        let Some(failovers) = self.ended(run).await else { return };
        println!("settler={name} async: {}", reused(&failovers));
        self.look(&format!("settler={name} async"), settler, &failovers.outcome, begun);
        let (made, allowed) = (failovers.made, failovers.outcome.allowed_loss);
        let counts = counts(&failovers.outcome);
        self.lines.push(format!("settler={name} async failovers={made} allowed_loss={allowed} {counts}"));
    }

    /// A step of the test bed that does not come about panics; the other parts are still of interest.
    async fn ended<T>(&mut self, part: impl Future<Output = Result<T, String>>) -> Option<T> {
        let ended = AssertUnwindSafe(part).catch_unwind().await;
        let fault = match ended {
            Ok(Ok(result)) => return Some(result),
            Ok(Err(fault)) => fault,
            Err(_) => "the test bed gave up, see above".to_owned(),
        };
        self.faults.push(fault);
        None
    }

    /// Says what a part came to, and notes what is wrong with it.
    fn look(&mut self, part: &str, settler: Settler, outcome: &Outcome, begun: Instant) {
        let Outcome { acknowledged, refused, failed, stuck, settled, unknown, .. } = outcome;
        println!(
            "{part}: in doubt and settled: {} committed, {} not committed; unknown: {unknown:?}; acknowledged: \
             {acknowledged}, refused: {refused}, stuck: {stuck}; {:.0} s",
            settled.committed,
            settled.not_committed,
            begun.elapsed().as_secs_f64()
        );
        let Outcome { lost, doubled, untrue, .. } = outcome;
        let unknowns = outcome.unknowns();
        let faults = [
            (!lost.is_empty(), format!("lost {lost:?}")),
            (!doubled.is_empty(), format!("doubled {doubled:?}")),
            (!untrue.is_empty(), format!("untrue {untrue:?}")),
            (*stuck > 0, format!("{stuck} calls were stuck")),
            (*failed > 0, format!("{failed} calls should have been run again")),
            (settler == Settler::Ledger && unknowns > 0, format!("the ledger did not know {unknowns}")),
            (settled.committed + settled.not_committed == 0, "nothing was in doubt".to_owned()),
        ];
        self.faults.extend(faults.into_iter().filter(|(wrong, _)| *wrong).map(|(_, what)| format!("{part}: {what}")));
    }
}

fn reused(failovers: &Failovers) -> String {
    let (reused, not_committed) = (failovers.reused, failovers.outcome.settled.not_committed);
    format!(
        "of {not_committed} transactions that were found not to be committed {reused} had an id that means another one now"
    )
}

fn counts(outcome: &Outcome) -> String {
    let Outcome { lost, doubled, untrue, .. } = outcome;
    format!("lost={} doubled={} untrue={} unknown={}", lost.len(), doubled.len(), untrue.len(), outcome.unknowns())
}
