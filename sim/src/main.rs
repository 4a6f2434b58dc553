//! The whole crate in a deterministic simulation. `sim/README.md` says what is simulated, and how to read a trace.
//!
//! `make sim SEEDS=1000` runs many seeds, `make sim SEED=42 TRACE=1` tells the story of one.

mod columns;
mod coverage;
mod done;
mod durable;
mod faults;
mod load;
mod log;
mod manager;
mod mutants;
mod net;
mod node;
mod oracle;
mod proto;
mod questions;
mod reach;
mod rng;
mod run;
mod server;
mod session;
mod sql;
#[cfg(test)]
mod tests;
mod trace;
mod world;

use std::process::ExitCode;
use std::str::FromStr;
use std::time::{Duration, Instant};

use mutants::{MUTANTS, plant};
use run::run;
use trace::Counts;

fn setting<T: FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok()?.parse().ok()
}

fn main() -> ExitCode {
    if cfg!(not(all(failover_sim, tokio_unstable))) {
        eprintln!("built without its flags, so a seed is not repeatable: use `make sim`");
    }
    if std::env::args().nth(1).as_deref() == Some("mutants") {
        return all_mutants(setting("SEEDS").unwrap_or(2000));
    }
    plant(&std::env::var("MUTANT").unwrap_or_default());
    if let Some(seed) = setting("SEED") {
        return one(seed);
    }
    let (first, seeds) = (setting("FIRST").unwrap_or(1), setting("SEEDS").unwrap_or(100));
    let limit = setting("LIMIT").map(Duration::from_secs);
    many(first, seeds, limit)
}

/// Runs one seed, and tells its story if `TRACE` is set or something is wrong.
fn one(seed: u64) -> ExitCode {
    let outcome = match run(seed, true) {
        Ok(outcome) => outcome,
        Err(error) => {
            eprintln!("no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    if std::env::var_os("TRACE").is_some() || !outcome.violations.is_empty() {
        outcome.trace.iter().for_each(|line| println!("{line}"));
    }
    outcome.counts.lines().iter().for_each(|line| println!("{line}"));
    println!("seed {seed}: {} failovers in {:?} of the simulation", outcome.failovers, outcome.simulated);
    told(seed, &outcome.violations)
}

fn told(seed: u64, violations: &[String]) -> ExitCode {
    for violation in violations {
        println!("VIOLATION with seed {seed}: {violation}");
    }
    if violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Plants each deliberate fault, and runs seeds until it is found.
fn all_mutants(seeds: u64) -> ExitCode {
    let mut survivors = 0;
    for (mutant, what) in MUTANTS {
        let began = Instant::now();
        plant(mutant);
        let found = (1..=seeds).find_map(|seed| {
            let violation = run(seed, false).ok()?.violations.into_iter().next()?;
            Some((seed, violation))
        });
        if let Some((seed, violation)) = found {
            println!("found in {:.1?}, seed {seed}: {mutant}: {violation}", began.elapsed());
        } else {
            survivors += 1;
            println!("NOT FOUND in {seeds} seeds and {:.1?}: {mutant} ({what})", began.elapsed());
        }
    }
    plant("");
    if survivors == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn many(first: u64, seeds: u64, limit: Option<Duration>) -> ExitCode {
    let began = Instant::now();
    let (mut counts, mut failovers, mut simulated, mut bad) = (Counts::default(), 0, Duration::ZERO, Vec::new());
    let mut done = 0;
    for seed in first..first.saturating_add(seeds) {
        if limit.is_some_and(|limit| began.elapsed() >= limit) {
            break;
        }
        match run(seed, false) {
            Ok(outcome) => {
                counts.add(&outcome.counts);
                failovers += outcome.failovers;
                simulated += outcome.simulated;
                if !outcome.violations.is_empty() {
                    told(seed, &outcome.violations);
                    bad.push(seed);
                }
            }
            Err(error) => eprintln!("seed {seed}: no runtime: {error}"),
        }
        done += 1;
    }
    let took = began.elapsed();
    counts.lines().iter().for_each(|line| println!("{line}"));
    println!(
        "{done} seeds from {first}: {failovers} failovers in {took:.1?}, {:.0} a second; {simulated:.0?} simulated",
        f64::from(u32::try_from(failovers).unwrap_or(u32::MAX)) / took.as_secs_f64()
    );
    let unseen = coverage::unseen(&counts);
    if !unseen.is_empty() {
        println!("never seen: {}", unseen.join("; "));
    }
    if bad.is_empty() {
        let has_seen_all = unseen.is_empty() || done < coverage::ENOUGH;
        return if has_seen_all { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    println!("{} seeds have violations: {bad:?}; `make sim SEED={} TRACE=1` tells the story", bad.len(), bad[0]);
    ExitCode::FAILURE
}
