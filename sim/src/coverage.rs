//! What a long run must have seen. A row that it never sees is a fault of the simulation, unless the row says why.

use crate::faults::all;
use crate::trace::Counts;

/// After so many seeds, each row must have been seen.
pub(crate) const ENOUGH: u64 = 1000;

type Row = (&'static str, &'static str, Option<&'static str>);

const WHOLE_ROLE: Option<&str> = Some("the role may read and call everything");
const LOST_SHOWS: Option<&str> = Some("a server that lacks the id lacks the mark, too, and its last replay shows that");
const ONE_CLUSTER: Option<&str> = Some("there is one cluster");

/// Group and name of a count, or what its name begins with, and why it is not seen. The groups from `transitions` on
/// are counted by the crate itself, where its code says `seen!`.
const ROWS: &[Row] = &[
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
    ("seen", "vain promotions", None),
    ("listener", "notifications", None),
    ("listener", "gaps", None),
    ("events", "PrimaryFound", None),
    ("events", "PrimaryLost", None),
    ("events", "Evicted replaced", None),
    ("events", "Evicted demoted", Some("a server ends its sessions before it becomes a standby, and no address moves")),
    ("events", "Evicted fenced", None),
    ("events", "Evicted silent", None),
    ("events", "Evicted asleep", None),
    ("events", "SearchSlow", None),
    ("events", "Fenced", None),
    ("events", "ZombieRefused", None),
    ("events", "SecondPrimary", Some("each timeline has one primary")),
    ("events", "StrangerRefused", Some("there is one cluster")),
    ("unknown", "NoMark", None),
    ("unknown", "SeveralFailovers", None),
    ("unknown", "Unproven", None),
    ("unknown", "Restarted", None),
    ("unknown", "OtherHistory", Some("each timeline number has one history")),
    ("unknown", "OtherCluster", Some("there is one cluster")),
    ("unknown", "Forgotten", Some("no transaction is old enough")),
    ("unknown", "InProgress", None),
    ("unknown", "NotReplicated", None),
    ("unknown", "NoPrimary", None),
    ("unknown", "Closed", Some("no pool is closed while it has calls")),
    ("unknown", "Failed", None),
    ("unknown", "NotOffered", Some("the role may call each function")),
    ("unknown", "TooOld", None),
    ("transitions", "known to suspended, silent: true", None),
    ("transitions", "known to suspended, silent: false", None),
    ("transitions", "suspended to known, silent: true", None),
    ("transitions", "suspended to known, silent: false", None),
    ("transitions", "suspended to lost, silent", None),
    ("transitions", "suspended to lost, fenced", None),
    ("transitions", "known to another primary", None),
    ("transitions", "suspended to another primary", None),
    ("transitions", "searching to known, suspended: true", None),
    ("transitions", "searching to known, suspended: false", None),
    ("transitions", "known or suspended to asleep", None),
    ("transitions", "searching to asleep", None),
    ("transitions", "asleep to searching", None),
    ("adopted because", "verified as the primary", None),
    ("adopted because", "a server on a newer timeline is writable", None),
    ("adopted because", "the address leads to another primary", None),
    ("adopted because", "a server that tells its cluster is writable", WHOLE_ROLE),
    ("findings", "Lives", None),
    ("findings", "SessionEnded", None),
    ("findings", "NewSessionsFail", None),
    ("findings", "Gone", None),
    ("answers", "primary", None),
    ("answers", "Standby", None),
    ("answers", "Fenced", None),
    ("answers", "Zombie", None),
    ("answers", "OtherCluster", ONE_CLUSTER),
    ("answers", "Unidentified", WHOLE_ROLE),
    ("answers", "NoTimeline", WHOLE_ROLE),
    ("answers", "Unreachable", None),
    ("answers", "TimedOut", None),
    ("answers", "NotNow", None),
    ("answers", "Full", None),
    ("answers", "Refused", None),
    ("answers", "Errored", None),
    ("answers", "SeveralClusters", ONE_CLUSTER),
    ("evidence", "Function", None),
    ("evidence", "Files", None),
    ("evidence", "Checkpoint", None),
    ("settle", "Here Some(InProgress)", None),
    ("settle", "Here Some(Committed)", None),
    ("settle", "Here Some(Aborted)", None),
    ("settle", "Here Some(Forgotten)", Some("no transaction is old enough")),
    ("settle", "Here None", Some("each timeline number has one history")),
    ("settle", "Lost", None),
    ("settle", "NotYet", Some("a later life has on its disk what an earlier one has written")),
    ("settle", "Unclear(Restarted) None", LOST_SHOWS),
    ("settle", "Unclear(Restarted) Some", None),
    ("settle", "Unclear(SeveralFailovers) None", LOST_SHOWS),
    ("settle", "Unclear(SeveralFailovers) Some", None),
    ("settle", "Unclear(Unproven)", None),
    ("settle", "Unclear(OtherHistory)", Some("each timeline number has one history")),
    ("settle", "Unclear(OtherCluster)", ONE_CLUSTER),
    ("ledger", "Own, old: false", None),
    ("ledger", "Own, old: true", None),
    ("ledger", "Fence, old: false", None),
    ("ledger", "Fence, old: true", None),
    ("openings", "Done", None),
    ("openings", "Failed", None),
    ("openings", "Strange", Some("no server sends an answer to what was not asked")),
    ("answers to COMMIT", "Committed { answered: true }", None),
    ("answers to COMMIT", "Committed { answered: false }", None),
    ("answers to COMMIT", "NotOurs { committed: true }", None),
    ("answers to COMMIT", "NotOurs { committed: false }", None),
    ("answers to COMMIT", "Refused { over: true }", None),
    ("answers to COMMIT", "Refused { over: false }", None),
    ("answers to COMMIT", "Unchecked", WHOLE_ROLE),
    ("answers to COMMIT", "Unprepared", None),
    ("answers to COMMIT", "Nothing", None),
];

const VERDICTS: [&str; 11] = [
    "ConnectionLost",
    "NotNow",
    "Full",
    "ReadOnly",
    "Conflict",
    "OutcomeUnknown",
    "Aborted",
    "Stale",
    "Refused",
    "NotPostgres",
    "Application",
];

/// Rows of `decide` that no run of a closure reaches, and why.
const NOT_DECIDED: &[(&str, &str, &str)] = &[
    ("Body", "NotPostgres", "such bytes end the session, and its end decides"),
    ("Refused", "Aborted", "the session tells by which error the transaction was aborted, and that decides"),
];

/// A row of `decide`: its name, how often it was used, and why it is not used.
type Decided = (String, u64, Option<&'static str>);

/// The rows of `decide`. The crate counts its questions as `mode stage verdict word`.
fn decided(counts: &Counts) -> Vec<Decided> {
    let times = |wanted: &dyn Fn(&[&str]) -> bool| -> u64 {
        let names = counts.names("decide").filter(|name| wanted(&name.splitn(4, ' ').collect::<Vec<_>>()));
        names.map(|name| counts.of("decide", name)).sum()
    };
    let mut rows = Vec::new();
    for mode in ["Exactly", "Once", "Idempotent", "Read"] {
        rows.push((format!("{mode} InDoubt"), times(&|words| words[0] == mode && words[1] == "InDoubt"), None));
    }
    for stage in ["Body", "Refused"] {
        for word in ["Some(true)", "Some(false)"] {
            rows.push((format!("{stage} {word}"), times(&|words| words[1] == stage && words[3] == word), None));
        }
        for verdict in VERDICTS {
            let why = NOT_DECIDED.iter().find(|(its, own, _)| *its == stage && *own == verdict).map(|(.., why)| *why);
            let is_it = |words: &[&str]| words[1] == stage && words[2] == verdict && words[3] == "None";
            rows.push((format!("{stage} {verdict}"), times(&is_it), why));
        }
    }
    rows
}

/// How many rows were seen, and why some are not.
pub(crate) fn lines(counts: &Counts) -> Vec<String> {
    let decided = decided(counts);
    let table: Vec<String> = decided.iter().map(|(name, times, _)| format!("{name} {times}")).collect();
    let excused = ROWS.iter().filter_map(|(group, name, why)| why.map(|why| format!("{group} {name}: {why}")));
    let excused =
        excused.chain(decided.iter().filter_map(|(name, _, why)| why.map(|why| format!("decide {name}: {why}"))));
    vec![
        format!("rows of decide: {}", table.join(", ")),
        format!("not to be seen: {}", excused.collect::<Vec<_>>().join("; ")),
    ]
}

/// The rows that should have been seen and were not.
pub(crate) fn unseen(counts: &Counts) -> Vec<String> {
    let rows = ROWS.iter().filter(|(.., why)| why.is_none()).map(|(group, name, _)| (*group, *name));
    let faults = all().map(|fault| ("faults", fault.name));
    let is_it =
        |seen: &str, name: &str| seen.strip_prefix(name).is_some_and(|rest| !rest.starts_with(char::is_alphanumeric));
    let rows = rows.chain(faults).filter(|(group, name)| !counts.names(group).any(|seen| is_it(seen, name)));
    let rows = rows.map(|(group, name)| format!("{group}: {name}"));
    let decided = decided(counts).into_iter().filter(|(_, times, why)| *times == 0 && why.is_none());
    rows.chain(decided.map(|(name, ..)| format!("decide: {name}"))).collect()
}
