//! The proof that a transaction is committed exactly once: connections are cut at every point of COMMIT, servers crash
//! and restart, primaries are killed, and every answer is held against what is stored in the end. For both settlers:
//! the one that reads the WAL, and the ledger.
//!
//! `cargo test` runs it small; `make exactly-once` with these numbers. Environment:
//! - `CUTS=1000`: so many connections are cut between COMMIT and its answer, for each settler.
//! - `FAILOVERS=200`: so many primaries are killed, where commits wait for a standby.
//! - `ASYNC=100`: so many more are killed where commits do not wait, and a standby is promoted that lacks some of them.
//!   What
//!   the dead primary had acknowledged, and nobody else had, is `allowed_loss`; the pool cannot know of it.
//! - `PROMOTIONS=2`: so many in each round of these: the new primary is killed in turn. `FAILOVERS` and `ASYNC` count
//!   rounds.
//! - `ARCHIVE=1`: all nodes share a WAL archive.
//! - `HISTORY=1`: the pool may use the function of sql/history.sql, which shows the history of the server's log.
//! - `LEASES=3`: so many leaders are killed or demoted, and are back before their lease is over; with the history
//!   function,
//!   unless `HISTORY=0`.
//! - `PACE=25`: a writer pauses for up to so many milliseconds between two calls, 5 unless told. A longer pause leaves
//!   a slow
//!   machine more time for the faults, and each fault meets fewer calls.
//! - `SEED=7`: the same order of faults and pauses again. Unless told it comes from the clock.
//! - `SETTLER=wal`: this one alone.
//! - `RUST_LOG=tokio_postgres_failover=debug` shows what the pool does.
//!
//! The last lines are the result. The exit code is not zero when something was lost, doubled or untrue, when a call got
//! stuck or failed, or when no outcome was in doubt; and when an outcome stayed unknown for the ledger, behind
//! failovers with the history function, or behind leaders that came back within their lease.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

#[path = "../soak/command.rs"]
mod command;
mod cuts;
#[path = "../soak/dice.rs"]
mod dice;
mod failovers;
mod leases;
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
use failovers::{Failovers, Plan, Replication};
use writers::{Outcome, Settler};

const NAME: &str = "exactly_once";

/// How much of everything.
#[derive(Clone, Copy)]
struct Numbers {
    cuts: usize,
    failovers: u64,
    without_waiting: u64,
    leases: u64,
    promotions: u64,
    archive: bool,
    history: bool,
    /// Rounds of two promotions with an archive and the history function, besides the others.
    twice: u64,
}

impl Numbers {
    fn from_environment() -> Self {
        let flag = |name| command::variable::<u8>(name).is_some_and(|number| number > 0);
        let failovers = command::variable("FAILOVERS");
        Self {
            cuts: command::variable("CUTS").unwrap_or(40),
            failovers: failovers.unwrap_or(3),
            without_waiting: command::variable("ASYNC").unwrap_or(2),
            leases: command::variable("LEASES").unwrap_or(3),
            promotions: command::variable("PROMOTIONS").unwrap_or(1).max(1),
            archive: flag("ARCHIVE"),
            history: flag("HISTORY"),
            twice: if failovers.is_none() { 2 } else { 0 },
        }
    }

    fn plan(&self, replication: Replication, rounds: u64) -> Plan {
        let Self { promotions, archive, history, .. } = *self;
        Plan { replication, rounds, promotions, archive, history }
    }
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
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    if runtime.block_on(prove(command::seed(), Numbers::from_environment())) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
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
            report.without_waiting(numbers.plan(Replication::Asynchronous, numbers.without_waiting), seed).await;
        }
        if numbers.twice > 0 {
            let plan =
                Plan { promotions: 2, archive: true, history: true, ..numbers.plan(Replication::Synchronous, 0) };
            report.twice(Plan { rounds: numbers.twice, ..plan }, seed).await;
            report.without_waiting(Plan { rounds: 1, replication: Replication::Asynchronous, ..plan }, seed).await;
        }
        if numbers.leases > 0 {
            report.leases(numbers, seed).await;
        }
        report
    }

    /// The cuts, and the failovers where commits wait for a standby.
    async fn waiting(&mut self, numbers: Numbers, seed: u64) {
        let mut all = Outcome::default();
        let (mut of_commits, mut made) = (0, 0);
        if numbers.cuts > 0 {
            let begun = Instant::now();
            if let Some(cuts) = self.ended(cuts::run(self.settler, numbers.cuts, numbers.history, seed)).await {
                of_commits = cuts.of_commits;
                let Cuts { by_kind, of_settlers, outages, .. } = &cuts;
                self.say(&format!("cuts: {by_kind:?}, {of_settlers} of them while settling, with {outages:?}"));
                self.look("cuts", &cuts.outcome, begun, self.settler == Settler::Ledger);
                all.add(cuts.outcome);
            }
        }
        if numbers.failovers > 0 {
            let plan = numbers.plan(Replication::Synchronous, numbers.failovers);
            if let Some(outcome) = self.failovers("failovers", plan, seed).await {
                made = numbers.failovers;
                all.add(outcome);
            }
        }
        let how = how(&numbers.plan(Replication::Synchronous, 0));
        self.lines.push(format!("{} cuts={of_commits} failovers={made}{how} {}", self.settler, counts(&all)));
    }

    /// Rounds of several promotions, where commits wait for a standby.
    async fn twice(&mut self, plan: Plan, seed: u64) {
        let Some(outcome) = self.failovers("failovers", plan, seed).await else { return };
        self.lines.push(format!("{} failovers={}{} {}", self.settler, plan.rounds, how(&plan), counts(&outcome)));
    }

    /// The failovers where commits do not wait.
    async fn without_waiting(&mut self, plan: Plan, seed: u64) {
        let Some(outcome) = self.failovers("async", plan, seed).await else { return };
        let (allowed, counts, how) = (outcome.allowed_loss, counts(&outcome), how(&plan));
        let made = plan.rounds;
        self.lines.push(format!("{} async failovers={made}{how} allowed_loss={allowed} {counts}", self.settler));
    }

    async fn failovers(&mut self, part: &str, plan: Plan, seed: u64) -> Option<Outcome> {
        let begun = Instant::now();
        let failovers = self.ended(failovers::run(self.settler, plan, seed)).await?;
        self.say(&format!("{part}{}: {}", how(&plan), reused(&failovers)));
        self.look(part, &failovers.outcome, begun, self.settler == Settler::Ledger || plan.history);
        Some(failovers.outcome)
    }

    /// The leaders that are back within their lease.
    async fn leases(&mut self, numbers: Numbers, seed: u64) {
        let begun = Instant::now();
        // Without the function, the pool may come too late to see whose child a later timeline is.
        let history = command::variable::<u8>("HISTORY").is_none_or(|number| number > 0);
        let Numbers { leases, archive, .. } = numbers;
        let run = leases::run(self.settler, leases, archive, history, seed);
        let Some(outcome) = self.ended(run).await else { return };
        self.look("leases", &outcome, begun, true);
        let how = how(&Plan { promotions: 1, history, ..numbers.plan(Replication::Synchronous, 0) });
        self.lines.push(format!("{} leases={leases}{how} {}", self.settler, counts(&outcome)));
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

    /// Says what a part came to, and notes what is wrong with it. `knows`: every outcome can be known.
    fn look(&mut self, part: &str, outcome: &Outcome, begun: Instant, knows: bool) {
        let Outcome { acknowledged, refused, failed, stuck, settled, unknown, .. } = outcome;
        self.say(&format!(
            "{part}: in doubt and settled: {} committed, {} not committed; unknown: {unknown:?}; acknowledged: \
             {acknowledged}, refused: {refused}, stuck: {stuck}; {:.0} s",
            settled.committed,
            settled.not_committed,
            begun.elapsed().as_secs_f64()
        ));
        let Outcome { lost, doubled, untrue, allowed_untrue, .. } = outcome;
        if *allowed_untrue > 0 {
            self.say(&format!("{part}: {allowed_untrue} were not committed in a history that was lost as a whole"));
        }
        let unknowns = outcome.unknowns();
        let faults = [
            (!lost.is_empty(), format!("lost {lost:?}")),
            (!doubled.is_empty(), format!("doubled {doubled:?}")),
            (!untrue.is_empty(), format!("untrue {untrue:?}")),
            (*stuck > 0, format!("{stuck} calls were stuck")),
            (*failed > 0, format!("{failed} calls should have been run again")),
            (knows && unknowns > 0, format!("{unknowns} stayed unknown")),
            (settled.committed + settled.not_committed + unknowns == 0, "nothing was in doubt".to_owned()),
        ];
        let found = faults.into_iter().filter(|(wrong, _)| *wrong);
        self.faults.extend(found.map(|(_, what)| format!("{} {part}: {what}", self.settler)));
    }
}

fn reused(failovers: &Failovers) -> String {
    let (reused, not_committed) = (failovers.reused, failovers.outcome.settled.not_committed);
    format!(
        "of {not_committed} transactions that were found not to be committed {reused} had an id that means another one \
         now"
    )
}

/// What is not as usual in these rounds.
fn how(plan: &Plan) -> String {
    let Plan { promotions, archive, history, .. } = *plan;
    let several = if promotions > 1 { format!(" promotions={promotions}") } else { String::new() };
    let flags = [(archive, " archive=1"), (history, " history=1")];
    let flags: String = flags.into_iter().filter_map(|(is_set, flag)| is_set.then_some(flag)).collect();
    several + &flags
}

fn counts(outcome: &Outcome) -> String {
    let Outcome { lost, doubled, untrue, .. } = outcome;
    format!("lost={} doubled={} untrue={} unknown={}", lost.len(), doubled.len(), untrue.len(), outcome.unknowns())
}
