//! What a long run must have seen. A row that it never sees is a fault of the simulation, unless the row says why.

use crate::faults::FAULTS;
use crate::trace::Counts;

/// After so many seeds, each row must have been seen.
pub(crate) const ENOUGH: u64 = 1000;

/// Group and name of a count, and why it is not seen.
const ROWS: [(&str, &str, Option<&str>); 37] = [
    ("failovers", "promoted", None),
    ("failovers", "recovered", None),
    ("failovers", "restarted", None),
    ("failovers", "recovered from the crash of a backend", None),
    ("crashes within COMMIT", "Written", None),
    ("crashes within COMMIT", "Flushed", None),
    ("crashes within COMMIT", "Confirmed", None),
    ("seen", "zombies", None),
    ("seen", "restarts within a lease", None),
    ("seen", "cancel requests", None),
    ("seen", "cancelled waits for a standby", None),
    ("seen", "calls lost by asynchronous replication", None),
    ("events", "PrimaryFound", None),
    ("events", "PrimaryLost", None),
    ("events", "Evicted replaced", None),
    ("events", "Evicted demoted", Some("a server ends its sessions before it becomes a standby, and no address moves")),
    ("events", "Evicted fenced", None),
    ("events", "Evicted silent", None),
    ("events", "Evicted asleep", Some("the pool does not sleep")),
    ("events", "SearchSlow", None),
    ("events", "Fenced", None),
    ("events", "ZombieRefused", None),
    ("events", "SecondPrimary", Some("each timeline has one primary")),
    ("events", "StrangerRefused", Some("there is one cluster")),
    ("unknown", "NoMarker", None),
    ("unknown", "SeveralFailovers", None),
    ("unknown", "Unproven", None),
    ("unknown", "Restarted", None),
    ("unknown", "OtherHistory", Some("each timeline number has one history")),
    ("unknown", "OtherCluster", Some("there is one cluster")),
    ("unknown", "Forgotten", Some("no transaction is old enough")),
    ("unknown", "InProgress", None),
    ("unknown", "NotReplicated", None),
    ("unknown", "NoPrimary", None),
    ("unknown", "Failed", None),
    ("unknown", "NotOffered", Some("the role may call each function")),
    ("unknown", "TooOld", Some("there is no ledger")),
];

/// The rows that should have been seen and were not.
pub(crate) fn unseen(counts: &Counts) -> Vec<String> {
    let rows = ROWS.iter().filter(|(_, _, why)| why.is_none()).map(|(group, name, _)| (*group, *name));
    let faults = FAULTS.iter().map(|fault| ("faults", fault.name));
    rows.chain(faults)
        .filter(|(group, name)| counts.of(group, name) == 0)
        .map(|(group, name)| format!("{group}: {name}"))
        .collect()
}
