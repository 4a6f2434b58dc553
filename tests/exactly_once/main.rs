//! The proof that a transaction is committed exactly once: connections are cut at every point of COMMIT, servers crash and
//! restart, primaries are killed, and every answer is held against what is stored in the end. For both settlers: the one
//! that reads the WAL, and the ledger.
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
use futures_util::future::join_all;
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
    cuts: usize,
    failovers: u64,
    without_waiting: u64,
}

/// What one settler has shown: what is wrong, and the lines to end with.
struct Report {
    settler: Settler,
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
    let wanted = |settler: &Settler| only.as_ref().is_none_or(|only| only == settler.name());
    let settlers = [Settler::Wal, Settler::Ledger].into_iter().filter(wanted);
    // At the same time, each on clusters of its own.
    let reports = join_all(settlers.map(|settler| Report::of(settler, numbers, seed))).await;
    for fault in reports.iter().flat_map(|report| &report.faults) {
        println!("FAILED: {fault}");
    }
    let passed = !reports.is_empty() && reports.iter().all(|report| report.faults.is_empty());
    command::report(NAME, passed, begun);
    for line in reports.iter().flat_map(|report| &report.lines) {
        println!("{line}");
    }
    passed
}

impl Report {
    async fn of(settler: Settler, numbers: Numbers, seed: u64) -> Self {
        let mut report = Self { settler, faults: Vec::new(), lines: Vec::new() };
        report.waiting(numbers, seed).await;
        if numbers.without_waiting > 0 {
            report.without_waiting(numbers.without_waiting, seed).await;
        }
        report
    }

    /// The cuts, and the failovers where commits wait for a standby.
    async fn waiting(&mut self, numbers: Numbers, seed: u64) {
        let mut all = Outcome::default();
        let (mut of_commits, mut made) = (0, 0);
        if numbers.cuts > 0 {
            let begun = Instant::now();
            if let Some(cuts) = self.ended(cuts::run(self.settler, numbers.cuts, seed)).await {
                of_commits = cuts.of_commits;
                let Cuts { by_kind, of_settlers, outages, .. } = &cuts;
                self.say(&format!("cuts: {by_kind:?}, {of_settlers} of them while settling, with {outages:?}"));
                self.look("cuts", &cuts.outcome, begun);
                all.add(cuts.outcome);
            }
        }
        if numbers.failovers > 0 {
            let begun = Instant::now();
            let run = failovers::run(self.settler, Replication::Synchronous, numbers.failovers, seed);
            if let Some(failovers) = self.ended(run).await {
                made = failovers.made;
                self.say(&format!("failovers: {}", reused(&failovers)));
                self.look("failovers", &failovers.outcome, begun);
                all.add(failovers.outcome);
            }
        }
        self.lines.push(format!("{} cuts={of_commits} failovers={made} {}", self.settler, counts(&all)));
    }

    /// The failovers where commits do not wait.
    async fn without_waiting(&mut self, wanted: u64, seed: u64) {
        let begun = Instant::now();
        let run = failovers::run(self.settler, Replication::Asynchronous, wanted, seed);
        let Some(failovers) = self.ended(run).await else { return };
        self.say(&format!("async: {}", reused(&failovers)));
        self.look("async", &failovers.outcome, begun);
        let Failovers { made, outcome, .. } = failovers;
        let (allowed, counts) = (outcome.allowed_loss, counts(&outcome));
        self.lines.push(format!("{} async failovers={made} allowed_loss={allowed} {counts}", self.settler));
    }

    fn say(&self, what: &str) {
        println!("{} {what}", self.settler);
    }

    /// A step of the test bed that does not come about panics; the other parts are still of interest.
    async fn ended<T>(&mut self, part: impl Future<Output = Result<T, String>>) -> Option<T> {
        let ended = AssertUnwindSafe(part).catch_unwind().await;
        let fault = match ended {
            Ok(Ok(result)) => return Some(result),
            Ok(Err(fault)) => fault,
            Err(_) => "the test bed gave up, see above".to_owned(),
        };
        self.faults.push(format!("{}: {fault}", self.settler));
        None
    }

    /// Says what a part came to, and notes what is wrong with it.
    fn look(&mut self, part: &str, outcome: &Outcome, begun: Instant) {
        let Outcome { acknowledged, refused, failed, stuck, settled, unknown, .. } = outcome;
        self.say(&format!(
            "{part}: in doubt and settled: {} committed, {} not committed; unknown: {unknown:?}; acknowledged: \
             {acknowledged}, refused: {refused}, stuck: {stuck}; {:.0} s",
            settled.committed,
            settled.not_committed,
            begun.elapsed().as_secs_f64()
        ));
        let Outcome { lost, doubled, untrue, .. } = outcome;
        let unknowns = outcome.unknowns();
        let faults = [
            (!lost.is_empty(), format!("lost {lost:?}")),
            (!doubled.is_empty(), format!("doubled {doubled:?}")),
            (!untrue.is_empty(), format!("untrue {untrue:?}")),
            (*stuck > 0, format!("{stuck} calls were stuck")),
            (*failed > 0, format!("{failed} calls should have been run again")),
            (self.settler == Settler::Ledger && unknowns > 0, format!("the ledger did not know {unknowns}")),
            (settled.committed + settled.not_committed == 0, "nothing was in doubt".to_owned()),
        ];
        let found = faults.into_iter().filter(|(wrong, _)| *wrong);
        self.faults.extend(found.map(|(_, what)| format!("{} {part}: {what}", self.settler)));
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
