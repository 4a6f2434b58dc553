//! Deliberate faults in the crate, by the names that `planted!` has there. The simulation must find each one.

/// The names, and what each one breaks.
pub(crate) const MUTANTS: [(&str, &str); 14] = [
    (
        "settles by the status alone",
        "src/transaction/settle.rs: an id that was given out again counts as the transaction's",
    ),
    ("does not confirm", "src/transaction/settle.rs: `Ok` before a standby has the commit"),
    ("runs again in doubt", "src/transaction/decide.rs: work whose COMMIT is in doubt runs again"),
    ("takes zombies", "src/topology/primary.rs: an older timeline is no reason to refuse a server"),
    ("takes an error for a commit", "src/transaction/finish.rs: every answer to COMMIT proves it"),
    ("cancels commits", "src/pool/dialer.rs: a COMMIT under way is cancelled"),
    ("waits beyond deadlines", "src/pool/checkout.rs: a checkout takes 50 ms longer"),
    ("gives up at once", "src/topology/search.rs: a suspended primary's connections are closed immediately"),
    ("takes a cancelled wait for a commit", "src/transaction/attempt.rs: the warning is ignored"),
    ("guesses that it was not committed", "src/commit.rs: what cannot be proved counts as not committed"),
    ("takes silence for a refusal", "src/transaction/finish.rs: a COMMIT without an answer counts as refused"),
    (
        "does not wait for a commit in progress",
        "src/transaction/settle.rs: what is in progress counts as not committed",
    ),
    ("ignores what is in the log", "src/commit.rs: another record in the mark's place counts as the mark"),
    ("hands out while suspended", "src/pool/connection.rs: an idle connection of a suspended primary is handed out"),
];

/// Plants a fault in the crate. Without the simulation's flags, there is none to plant.
pub(crate) fn plant(mutant: &str) {
    #[cfg(failover_sim)]
    tokio_postgres_failover::simulation::plant(mutant);
    let _ = mutant;
}
