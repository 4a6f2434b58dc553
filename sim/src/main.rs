//! The whole crate in a deterministic simulation. `sim/README.md` says what is simulated, and how to read a trace.
//!
//! `make sim SEEDS=1000` runs many seeds, `make sim SEED=42 TRACE=1` tells the story of one.

mod block;
mod columns;
mod coverage;
mod done;
mod durable;
mod extended;
mod faults;
mod ledger;
mod listen;
mod load;
mod log;
mod long;
mod manager;
mod mutants;
mod net;
mod node;
mod oracle;
mod proto;
mod questions;
mod reach;
#[cfg(test)]
mod reality;
mod rng;
mod run;
mod script;
mod server;
mod session;
mod setup;
mod sql;
#[cfg(test)]
mod tests;
mod trace;
mod work;
mod world;

use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mutants::{all_mutants, plant};
use run::run;
use script::{Script, shrink};
use trace::Counts;

fn setting<T: FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok()?.parse().ok()
}

/// The processor's time that this process has taken: other programs may share the machine.
fn processor() -> Duration {
    let text = std::fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    Duration::from_nanos(text.split(' ').next().and_then(|nanos| nanos.parse().ok()).unwrap_or(0))
}

fn main() -> ExitCode {
    if cfg!(not(all(failover_sim, tokio_unstable))) {
        eprintln!("built without its flags, so a seed is not repeatable: use `make sim`");
    }
    if std::env::args().nth(1).as_deref() == Some("mutants") {
        return all_mutants();
    }
    if std::env::args().nth(1).as_deref() == Some("long") {
        return long::long();
    }
    plant(&std::env::var("MUTANT").unwrap_or_default());
    if let Some(text) = setting::<String>("SEED") {
        let Some(script) = Script::parse(&text) else {
            eprintln!("SEED is a number, perhaps with rounds=1,2 and callers=0,1");
            return ExitCode::FAILURE;
        };
        return one(&script);
    }
    many(setting("FIRST").unwrap_or(1), setting("SEEDS").unwrap_or(100))
}

/// Runs one seed, and tells its story if `TRACE` is set or something is wrong.
fn one(script: &Script) -> ExitCode {
    let outcome = match run(script, true) {
        Ok(outcome) => outcome,
        Err(error) => {
            eprintln!("no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    if std::env::var_os("TRACE").is_some() {
        outcome.trace.iter().for_each(|line| println!("{line}"));
    }
    outcome.counts.lines().iter().for_each(|line| println!("{line}"));
    println!("seed {script}: {} failovers in {:?} of the simulation", outcome.failovers, outcome.simulated);
    told(script, &outcome.violations)
}

/// Prints the violations of a seed, and the least of its story that has the first of them.
fn told(script: &Script, violations: &[String]) -> ExitCode {
    let Some(first) = violations.first() else { return ExitCode::SUCCESS };
    for violation in violations {
        println!("VIOLATION with seed {script}: {violation}");
    }
    let least = if std::env::var_os("SHRINK").is_some() { shrink(script, first) } else { script.clone() };
    println!("`make sim SEED=\"{least}\" TRACE=1` tells the story");
    ExitCode::FAILURE
}

/// Ends the process if a seed takes so much of the processor: its clock does not move on any more. A usual seed takes a
/// tenth of a second.
const STANDS_STILL: Duration = Duration::from_secs(20);

fn watch(running: Arc<AtomicU64>) {
    let mut since = (running.load(Ordering::Relaxed), processor());
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let seed = running.load(Ordering::Relaxed);
            if seed != since.0 {
                since = (seed, processor());
            } else if processor().saturating_sub(since.1) > STANDS_STILL {
                println!("VIOLATION with seed {seed}: the simulation stands still");
                std::process::exit(1);
            }
        }
    });
}

fn many(first: u64, seeds: u64) -> ExitCode {
    let (limit, stops) = (setting("LIMIT").map(Duration::from_secs), std::env::var_os("STOP").is_some());
    let began = Instant::now();
    let (mut counts, mut failovers, mut simulated, mut bad) = (Counts::default(), 0, Duration::ZERO, Vec::new());
    let mut done = 0;
    let running = Arc::new(AtomicU64::new(first));
    watch(Arc::clone(&running));
    for seed in first..first.saturating_add(seeds) {
        if limit.is_some_and(|limit| began.elapsed() >= limit) || (stops && !bad.is_empty()) {
            break;
        }
        running.store(seed, Ordering::Relaxed);
        let script = Script::whole(seed);
        match run(&script, false) {
            Ok(outcome) => {
                counts.add(&outcome.counts);
                failovers += outcome.failovers;
                simulated += outcome.simulated;
                if !outcome.violations.is_empty() {
                    told(&script, &outcome.violations);
                    bad.push(seed);
                }
            }
            Err(error) => eprintln!("seed {seed}: no runtime: {error}"),
        }
        done += 1;
    }
    let (took, processor) = (began.elapsed(), processor());
    for line in counts.lines() {
        println!("{line}");
    }
    println!(
        "{done} seeds from {first}: {failovers} failovers in {took:.1?}, of which {processor:.1?} of processor, \
         {:.0} a second of it; {simulated:.0?} simulated",
        f64::from(u32::try_from(failovers).unwrap_or(u32::MAX)) / processor.as_secs_f64()
    );
    if std::env::var_os("PART").is_some() {
        long::summary(first, done, failovers, processor, &bad);
    }
    let unseen = coverage::unseen(&counts);
    for line in coverage::lines(&counts) {
        println!("{line}");
    }
    if !unseen.is_empty() {
        println!("never seen: {}", unseen.join("; "));
    }
    if bad.is_empty() {
        let has_seen_all = unseen.is_empty() || done < coverage::ENOUGH;
        return if has_seen_all { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    println!("{} seeds have violations: {bad:?}", bad.len());
    ExitCode::FAILURE
}
