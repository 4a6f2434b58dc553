//! All trials, and their table: `make managers`.

use std::time::Instant;
use std::{env, fs, process};

use testbed::versions;

use crate::report::{HEAD, row};
use crate::trials::{self, Trial};

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/ran");
/// Which trials ran, for the pages: `RECORD=1` writes it.
const RECORD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/ran/managers.txt");

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "minutes: make managers ROUNDS=3"]
async fn table() {
    let rounds = env::var("ROUNDS").ok().filter(|text| !text.is_empty());
    let rounds: usize = rounds.map_or(1, |text| text.parse().expect("ROUNDS is a number"));
    let wanted = env::var("TRIAL").unwrap_or_default();
    let (mut text, mut broken, mut kept) = (HEAD.to_owned(), 0, Vec::new());
    for trial in trials::all().into_iter().filter(|trial| trial.name.contains(&wanted)) {
        if !trial.is_possible() {
            continue;
        }
        let mut made = Vec::new();
        for number in 1..=rounds {
            let begun = Instant::now();
            // In a task of its own: a step of the test bed that does not come about ends this round alone.
            let one = trial.clone();
            match tokio::spawn(async move { one.round().await }).await {
                Ok(round) => {
                    println!("{} {number}: {} in {:.0} s", trial.name, round.line(), begun.elapsed().as_secs_f64());
                    round.broken.iter().for_each(|what| println!("BROKEN: {}: {what}", trial.name));
                    broken += usize::from(!round.broken.is_empty());
                    made.push(round);
                }
                Err(_panic) => {
                    println!("BROKEN: {}: the test bed gave up, see above", trial.name);
                    broken += 1;
                }
            }
        }
        text += &row(trial.name, &made);
        if made.len() == rounds && made.iter().all(|round| round.broken.is_empty()) {
            kept.push(line(&trial, rounds));
        }
    }
    println!("\n{text}\nrounds with a broken promise: {broken}");
    if env::var_os("RECORD").is_some() {
        record(kept);
    }
    if broken > 0 {
        process::exit(1);
    }
}

/// A trial all of whose rounds kept the promises.
fn line(trial: &Trial, rounds: usize) -> String {
    let (rows, server) = (trial.rows().join(" "), versions::postgresql());
    format!("{} | {rows} | {server} | {} | {rounds}", trial.name, trial.managers())
}

/// A line of the record in place of the older one of the same trial.
fn record(kept: Vec<String>) {
    let name = |line: &str| line.split(" | ").next().unwrap_or_default().to_owned();
    let older = fs::read_to_string(RECORD).unwrap_or_default();
    let is_older = |line: &&str| !kept.iter().any(|new| name(new) == name(line));
    let mut lines: Vec<String> = older.lines().filter(is_older).map(ToOwned::to_owned).collect();
    lines.extend(kept);
    lines.sort();
    // Nothing was recorded before: there is no folder.
    fs::create_dir_all(FOLDER).expect("tests/ran can be made");
    fs::write(RECORD, lines.join("\n") + "\n").expect("tests/ran can be written to");
}
