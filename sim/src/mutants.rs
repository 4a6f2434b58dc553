//! Deliberate faults in the crate, by the names that `planted!` has there. The simulation must find each one.

use std::io::Read;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// The names, and what each one breaks.
pub(crate) const MUTANTS: &[(&str, &str)] = &[
    (
        "settles by the status alone",
        "src/transaction/settle.rs: an id that was given out again counts as the transaction's",
    ),
    ("does not confirm", "src/transaction/settle.rs: `Ok` before a standby has the commit"),
    ("takes a cancelled confirmation for one", "src/transaction/settle.rs: the settler's warning is ignored"),
    (
        "does not wait for a commit in progress",
        "src/transaction/settle.rs: what is in progress counts as not committed",
    ),
    ("guesses that it was not committed", "src/commit.rs: what cannot be proved counts as not committed"),
    ("ignores what is in the log", "src/commit.rs: another record in the mark's place counts as the mark"),
    ("takes a fence for the work's own row", "src/commit.rs: a settler's row in the ledger counts as a commit"),
    ("takes the work's own row for a fence", "src/commit.rs: a commit in the ledger counts as none"),
    ("takes a locked row for none", "src/settle/ledger.rs: a commit under way counts as not committed"),
    ("runs again in doubt", "src/transaction/decide.rs: work whose COMMIT is in doubt runs again"),
    ("ignores the user's word", "src/transaction/decide.rs: work runs again that the policy forbids"),
    ("returns a conflict", "src/transaction/decide.rs: a serialization failure is returned"),
    ("returns a refusal to write", "src/transaction/decide.rs: a fence's error is returned"),
    ("runs again what would fail again", "src/transaction/decide.rs: a violated constraint is tried again"),
    ("runs again behind a call in doubt", "src/transaction/decide.rs: an inner call's doubt is forgotten"),
    ("hides a doubt", "src/transaction/run.rs: an error of a COMMIT in doubt says that it is not committed"),
    ("forgets a doubt", "src/transaction/run.rs: after a doubt, later errors say that nothing is committed"),
    ("takes an error for a commit", "src/transaction/finish.rs: every answer to COMMIT proves it"),
    ("takes silence for a refusal", "src/transaction/finish.rs: a COMMIT without an answer counts as refused"),
    (
        "takes a failed transaction for a commit",
        "src/transaction/finish.rs: the COMMIT of a failed transaction is `Ok`",
    ),
    ("takes a closure's own end for a commit", "src/transaction/finish.rs: a COMMIT without a transaction is `Ok`"),
    ("does not look for a closure's own COMMIT", "src/transaction/earlier.rs: its work is run twice"),
    ("takes a closure's COMMIT for its own", "src/transaction/left.rs: `Ok` for a closure that committed itself"),
    ("ignores that a closure has ended it", "src/transaction/left.rs: the answers to a closure's COMMIT do not count"),
    (
        "ignores what is sent behind an end",
        "src/transaction/left.rs: what a closure sends together with its ROLLBACK is done twice",
    ),
    (
        "hides the doubt of a call within",
        "src/transaction/run.rs: \"not committed\" although a call within is in doubt",
    ),
    ("says that a closure ended it", "src/transaction/earlier.rs: `EndedInside` for a closure that sent no COMMIT"),
    (
        "says that a wrapped one ended it",
        "src/transaction/earlier.rs: `EndedInside` although nobody knows whether the closure has ended anything",
    ),
    ("takes a cancelled wait for a commit", "src/transaction/attempt.rs: the warning is ignored"),
    (
        "lets a request through before BEGIN is answered",
        "src/server/opening/passage.rs: what follows the first request may run outside of the transaction",
    ),
    (
        "ignores an opening that failed",
        "src/server/opening/passage.rs: a session goes on although its transaction has not begun",
    ),
    ("gives back what is within a transaction", "src/server/activity.rs: an open transaction is not seen"),
    ("hands out while suspended", "src/pool/checkout.rs: an idle connection of a suspended primary is handed out"),
    ("waits beyond deadlines", "src/pool/checkout.rs: a checkout takes 50 ms longer"),
    ("cancels commits", "src/pool/dialer.rs: a COMMIT under way is cancelled"),
    ("opens too many connections", "src/pool/dialer/queue.rs: four times as many as the pool may have"),
    ("takes zombies", "src/topology/primary.rs: an older timeline is no reason to refuse a server"),
    ("takes fenced servers", "src/topology/primary.rs: a fence is no reason to refuse a server"),
    ("forgets the newest timeline", "src/topology/untold.rs: the newest timeline is that of the first primary"),
    ("gives up at once", "src/topology/search.rs: a suspended primary's connections are closed immediately"),
    ("does not resume", "src/topology/search.rs: a suspended primary that answers again stays suspended"),
    ("takes what new sessions meet for silence", "src/topology/lives.rs: open sessions that are answered do not count"),
    ("does not ask the primary", "src/topology.rs: no heartbeat"),
    ("does not ask the others", "src/topology.rs: no patrol"),
    ("leaves the older connections open", "src/cluster/scopes.rs: a generation that has ended is not closed"),
    ("falls asleep over its work", "src/cluster/task.rs: connections checked out keep no pool awake"),
    ("marks no gap", "src/listen.rs: a listener is not told that it may have missed something"),
    ("does not notice a lost subscription", "src/listen.rs: a listener whose session has ended waits for ever"),
    ("does not wake", "src/cluster/task.rs: a pool that sleeps is not woken by a caller"),
];

/// How long the search for one may take.
const LIMIT: Duration = Duration::from_secs(600);
/// A seed that never ends is found by the run itself. Should that fail, the search ends after so much more.
const HANGS_AFTER: Duration = Duration::from_secs(60);

/// Plants a fault in the crate. Without the simulation's flags, there is none to plant.
pub(crate) fn plant(mutant: &str) {
    #[cfg(failover_sim)]
    tokio_postgres_failover::simulation::plant(mutant);
    let _ = mutant;
}

/// Plants each deliberate fault, and runs seeds until it is found. `ONLY` names a part of those that are wanted.
pub(crate) fn all_mutants() -> ExitCode {
    let only = std::env::var("ONLY").unwrap_or_default();
    let limit = std::env::var("LIMIT").ok().and_then(|it| it.parse().ok()).map_or(LIMIT, Duration::from_secs);
    let (mut found, mut survivors) = (0, 0);
    for (mutant, what) in MUTANTS.iter().filter(|(mutant, _)| mutant.contains(&only)) {
        let began = Instant::now();
        if let Some(violation) = violation(mutant, limit) {
            found += 1;
            println!("found in {:.1?}: {mutant}: {violation}", began.elapsed());
        } else {
            survivors += 1;
            println!("NOT FOUND in {:.1?}: {mutant} ({what})", began.elapsed());
        }
    }
    println!("{found} of {} found", found + survivors);
    if survivors == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs seeds with a planted fault in a process of its own, because it may never end.
fn violation(mutant: &str, limit: Duration) -> Option<String> {
    let mut command = Command::new(std::env::current_exe().ok()?);
    command.env("MUTANT", mutant).env("STOP", "1").env("SEEDS", "1000000").env("FIRST", "1");
    command.env("LIMIT", limit.as_secs().to_string()).env_remove("SEED").stdout(Stdio::piped());
    let mut child = command.spawn().ok()?;
    let began = Instant::now();
    while child.try_wait().ok()?.is_none() {
        if began.elapsed() > limit + HANGS_AFTER {
            child.kill().ok()?;
            child.wait().ok()?;
            return Some("the simulation stands still".to_owned());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut text = String::new();
    child.stdout.take()?.read_to_string(&mut text).ok()?;
    text.lines().find_map(|line| line.strip_prefix("VIOLATION with ")).map(str::to_owned)
}
