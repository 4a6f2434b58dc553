//! Tests the rule with a table, and against a model of servers that crash, lose WAL and reuse transaction ids.

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{RngAlgorithm, TestCaseError, TestCaseResult, TestRng, TestRunner};

use super::*;
use model::{Begun, World};
use node::{FIRST_XID, Node, Truth, lsn};
use op::{Commit, Op, op};

mod calls;
mod histories;
mod model;
mod node;
mod op;
mod rule;
mod search;

const OLD: Server = Server { system_identifier: 77, timeline: 3, started_at: 100 };
/// The same server, started again.
const AGAIN: Server = Server { started_at: 200, ..OLD };
/// A standby that was promoted.
const NEXT: Server = Server { timeline: 4, started_at: 50, ..OLD };

fn life(server: Server, replayed: Option<usize>, stats_reset: Option<i64>) -> Life {
    Life { server, replayed: replayed.map(lsn), stats_reset, ancestor: None }
}

/// A mark that ends at 20, on a server whose replay had ended at `replayed`.
fn mark(replayed: Option<usize>) -> WalMark {
    WalMark { life: life(OLD, replayed, Some(7)), xid: FIRST_XID, lsn: lsn(20), nonce: Nonce(1) }
}

/// The decision if the server shows only what every role may read.
fn located(mark: &WalMark, now: &Now) -> Located {
    locate(mark, now, &Proof::Nothing)
}

/// The answer of a server that has not completed a checkpoint on its own timeline yet.
fn with_ancestor(now: Now, ancestor: u32) -> Now {
    Now { life: Life { ancestor: Some(ancestor), ..now.life }, ..now }
}

fn now(server: Server, replayed: Option<usize>, received: Option<usize>) -> Now {
    Now { life: life(server, replayed, Some(8)), received: received.map(lsn), stopped: None, primaries_since: 1 }
}

/// The kinds of evidence that a pool may base its decision on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// What the server shows.
    Of(Evidence),
    /// What every role may read, and the pool's signature of the timeline. A real pool always has the signature. Here
    /// each kind is tested alone.
    Signature,
}

const EACH: [Kind; 4] =
    [Kind::Of(Evidence::Checkpoint), Kind::Signature, Kind::Of(Evidence::Files), Kind::Of(Evidence::Function)];

/// The decision of a pool with this kind of evidence that has seen this many new primaries.
fn settled_by(kind: Kind, begun: &Begun, asked: &Node, primaries_since: u64) -> SettleVerdict {
    let now = asked.says(primaries_since);
    let evidence = if let Kind::Of(evidence) = kind { evidence } else { Evidence::Checkpoint };
    let wanted = wants_proof(&begun.mark, &now, evidence);
    let proof = if wanted { asked.shows(&begun.mark, evidence) } else { Proof::Nothing };
    let located = match (locate(&begun.mark, &now, &proof), begun.signed) {
        (Located::Unclear(Unsettled::Unproven), Some(signed)) if kind == Kind::Signature => {
            locate(&begun.mark, &now, &Proof::Signature { found: asked.bears(&signed) })
        }
        (located, _) => located,
    };
    answered(located, begun, asked)
}

fn answered(located: Located, begun: &Begun, asked: &Node) -> SettleVerdict {
    match settle(located, asked.xact_status(begun.mark.xid)) {
        // The pool would ask again, so it does not know more yet.
        SettleVerdict::InProgress if located == Located::NotYet => SettleVerdict::Unknown(Unsettled::InProgress),
        settled => settled,
    }
}

fn settled(begun: &Begun, asked: &Node, primaries_since: u64) -> SettleVerdict {
    settled_by(Kind::Of(Evidence::Files), begun, asked, primaries_since)
}

/// The decision of a pool that assumes that each timeline continues the one with the previous number.
fn by_number(begun: &Begun, asked: &Node, primaries_since: u64) -> SettleVerdict {
    match locate(&begun.mark, &asked.says(primaries_since), &Proof::Files { followed: true }) {
        Located::Here => naive(begun, asked),
        located => answered(located, begun, asked),
    }
}

/// The decision of a pool that trusts `pg_xact_status`, and takes the error about an id in the future for "not
/// committed".
fn naive(begun: &Begun, asked: &Node) -> SettleVerdict {
    asked.xact_status(begun.mark.xid).map_or(SettleVerdict::NotCommitted, SettleVerdict::from)
}

fn is_true(answer: SettleVerdict, truth: Truth) -> bool {
    match answer {
        SettleVerdict::Committed => truth == Truth::Committed,
        SettleVerdict::NotCommitted => truth == Truth::NeverHere,
        SettleVerdict::InProgress => truth == Truth::Running,
        SettleVerdict::Unknown(_) => true,
    }
}

fn world(servers: usize, history: &[Op]) -> World {
    archiving(servers, false, history)
}

fn archiving(servers: usize, archive: bool, history: &[Op]) -> World {
    let mut world = World::new(servers, archive);
    for op in history {
        world.apply(*op);
    }
    world
}

/// Plays a history. After each step, calls `ask` for each transaction with each primary that could be asked.
fn ask_always(
    (servers, archive): (usize, bool),
    history: &[Op],
    mut ask: impl FnMut(&World, &Begun, usize) -> TestCaseResult,
) -> TestCaseResult {
    let mut world = World::new(servers, archive).signing();
    for op in history {
        world.apply(*op);
        for begun in world.clients() {
            for asked in world.primaries() {
                ask(&world, begun, asked)?;
            }
        }
    }
    Ok(())
}

fn histories() -> impl Strategy<Value = ((usize, bool), Vec<Op>)> {
    ((2..=4_usize, any::<bool>()), prop::collection::vec(op(), 0..50))
}
