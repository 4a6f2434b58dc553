//! All trials, and their table: `make managers`.

use std::env;
use std::process;
use std::time::Instant;

use crate::report::{HEAD, row};
use crate::trials;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "minutes: make managers ROUNDS=3"]
async fn table() {
    let rounds = env::var("ROUNDS").ok().filter(|text| !text.is_empty());
    let rounds: usize = rounds.map_or(1, |text| text.parse().expect("ROUNDS is a number"));
    let wanted = env::var("TRIAL").unwrap_or_default();
    let (mut text, mut broken) = (HEAD.to_owned(), 0);
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
    }
    println!("\n{text}\nrounds with a broken promise: {broken}");
    if broken > 0 {
        process::exit(1);
    }
}
