//! What a run tells whoever started it: how far it is, and the command that repeats a case.

use crate::settings::Settings;

/// Progress goes to the screen as it comes.
pub fn say(text: &str) {
    println!("{text}");
}

/// What repeats a case, from the project's root.
pub fn command(settings: &Settings, case: &str, rounds: usize) -> String {
    let quick = if settings.quick { " QUICK=1" } else { "" };
    let (peers, seed, workers) = (&settings.peers, settings.seed, settings.workers);
    format!("make bench {case} PEERS={peers} ROUNDS={rounds} SEED={seed} WORKERS={workers}{quick}")
}
