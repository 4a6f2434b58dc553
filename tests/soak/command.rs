//! What a test with a `main` of its own is told, by its environment and by `cargo test`, and what it answers.

use std::env;
use std::time::{Instant, SystemTime};

/// What decides the order of faults and pauses: `SEED`, or else the clock.
pub(crate) fn seed() -> u64 {
    let clock = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs();
    variable("SEED").unwrap_or_else(clock)
}

/// A number of the environment; empty is unset.
pub(crate) fn variable<T: std::str::FromStr>(name: &str) -> Option<T> {
    let text = env::var(name).ok().filter(|text| !text.is_empty())?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text}: say a number")))
}

/// Reads the arguments of `cargo test`: with a filter for other tests this one stays out, and `--list` names it.
pub(crate) fn wanted(name: &str, arguments: &[String]) -> bool {
    let (mut filters, mut skipped, mut listed, mut exact, mut ignored) = (Vec::new(), false, false, false, false);
    let mut rest = arguments.iter().map(String::as_str);
    while let Some(argument) = rest.next() {
        match argument {
            "--list" => listed = true,
            "--exact" => exact = true,
            "--ignored" => ignored = true,
            "--skip" => skipped |= rest.next().is_some_and(|pattern| name.contains(pattern)),
            "--test-threads" | "--format" | "--color" | "--logfile" | "--shuffle-seed" | "-Z" => {
                let _value = rest.next();
            }
            option if option.starts_with('-') => {}
            filter => filters.push(filter),
        }
    }
    let matches = |filter: &&str| if exact { name == *filter } else { name.contains(*filter) };
    let chosen = !ignored && !skipped && (filters.is_empty() || filters.iter().any(matches));
    if listed && chosen {
        println!("{name}: test");
    }
    chosen && !listed
}

/// The last lines of a test that `cargo test` did not run itself, in its words; `name` is the test's.
pub(crate) fn report(name: &str, passed: bool, begun: Instant) {
    let word = if passed { "ok" } else { "FAILED" };
    println!("test {name} ... {word}\n");
    println!(
        "test result: {word}. {} passed; {} failed; 0 ignored; 0 measured; 0 filtered out; finished in {:.2}s\n",
        u8::from(passed),
        u8::from(!passed),
        begun.elapsed().as_secs_f64()
    );
}
