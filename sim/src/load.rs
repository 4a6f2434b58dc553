//! The callers: which calls they make, and what each answer promises. `work.rs` has what their closures do.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tokio_postgres_failover::view::State;
use tokio_postgres_failover::{CommitOutcome, Error, Pool};
use tokio_util::sync::CancellationToken;

use crate::oracle::Expect;
use crate::rng::Rng;
use crate::work::{Act, Plan, Promise, RAISED, transaction};
use crate::world::Sim;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Transaction,
    /// Its caller drops it at some moment.
    Dropped,
    /// A connection, and one statement that is its own transaction.
    Get,
    /// A connection, waited for with little patience.
    Impatient,
}

struct Kind {
    weight: u64,
    name: &'static str,
    how: How,
    promise: Promise,
    act: Act,
}

const fn kind(weight: u64, name: &'static str, how: How, promise: Promise, act: Act) -> Kind {
    Kind { weight, name, how, promise, act }
}

/// Each kind of call, by weight.
static KINDS: [Kind; 25] = [
    kind(30, "exactly once", How::Transaction, Promise::Exactly, Act::Plain),
    kind(8, "ledger", How::Transaction, Promise::Ledger, Act::Plain),
    kind(8, "at most once", How::Transaction, Promise::AtMostOnce, Act::Plain),
    kind(8, "idempotent", How::Transaction, Promise::Idempotent, Act::Plain),
    kind(8, "read", How::Transaction, Promise::Read, Act::Plain),
    kind(8, "dropped", How::Dropped, Promise::Exactly, Act::Plain),
    kind(3, "ledger, dropped", How::Dropped, Promise::Ledger, Act::Plain),
    kind(3, "aborting", How::Transaction, Promise::Any, Act::Aborts),
    kind(9, "raising", How::Transaction, Promise::Any, Act::Raises),
    kind(2, "going on after an error", How::Transaction, Promise::Any, Act::GoesOn),
    kind(2, "swallowing an error", How::Transaction, Promise::Exactly, Act::Swallows),
    kind(3, "committing itself", How::Transaction, Promise::Exactly, Act::Commits),
    kind(2, "committing itself, ledger", How::Transaction, Promise::Ledger, Act::Commits),
    kind(1, "committing itself, read", How::Transaction, Promise::Read, Act::Commits),
    kind(2, "committing itself, at most once", How::Transaction, Promise::AtMostOnce, Act::Commits),
    kind(1, "committing itself, idempotent", How::Transaction, Promise::Idempotent, Act::Commits),
    kind(2, "rolling back itself", How::Transaction, Promise::Exactly, Act::RollsBack),
    kind(2, "rolling back itself, at most once", How::Transaction, Promise::AtMostOnce, Act::RollsBack),
    kind(6, "pipelining", How::Transaction, Promise::Exactly, Act::Pipelines),
    kind(3, "pipelining, at most once", How::Transaction, Promise::AtMostOnce, Act::Pipelines),
    kind(3, "insisting", How::Transaction, Promise::AtMostOnce, Act::Insists),
    kind(1, "deallocating", How::Transaction, Promise::Exactly, Act::Deallocates),
    kind(4, "nesting", How::Transaction, Promise::Exactly, Act::Nests),
    kind(12, "get", How::Get, Promise::Exactly, Act::Plain),
    kind(8, "impatient get", How::Impatient, Promise::Exactly, Act::Plain),
];

/// How much longer than its deadline a transaction may take: its last attempt is not cut short, and may wait for a
/// server that is silent or for a standby that is away. Then its COMMIT is settled for at least five seconds.
const LAST_ATTEMPT: Duration = Duration::from_secs(40);
/// The same for a checkout, whose deadline is strict. Timers have a resolution of a millisecond.
const STRICT: Duration = Duration::from_millis(3);

/// How the counts name a COMMIT that an administrator has made go on without its standby.
pub(crate) const CANCELLED_WAITS: &str = "cancelled waits for a standby";

pub(crate) const CHECKOUT: Duration = Duration::from_secs(6);

fn plan(rng: &mut Rng, kind: &Kind, call: i64) -> Plan {
    let patience = if rng.chance(50) { 30 } else { 4000 };
    let slow = if rng.chance(12) { rng.millis(1, 800) } else { Duration::ZERO };
    let any = [Promise::Exactly, Promise::Ledger, Promise::AtMostOnce, Promise::Idempotent, Promise::Read];
    let promise = if kind.promise == Promise::Any { any[rng.index(any.len())] } else { kind.promise };
    Plan {
        call,
        promise,
        act: kind.act,
        // What is written outside of a transaction is not written together.
        rows: match kind.act {
            Act::RollsBack => 1,
            Act::Pipelines => 2,
            _ => 1 + rng.index(2),
        },
        extended: rng.chance(30),
        slow,
        deadline: rng.millis(1000, 12_000),
        drop_after: rng.millis(0, patience),
        seed: rng.next(),
        raises: rng.index(RAISED.len()),
        at_commit: rng.chance(50),
        tells: kind.promise == Promise::Exactly && kind.act == Act::Plain && rng.chance(50),
        word: [None, None, Some(true), Some(false)][rng.index(4)],
    }
}

/// Calls until it is stopped.
pub(crate) async fn caller(sim: Arc<Sim>, pool: Pool, calls: Arc<AtomicI64>, stop: CancellationToken) {
    while !stop.is_cancelled() {
        let (think, kind, plan) = {
            let mut world = sim.lock();
            let sleeps = world.setup.sleeps;
            let rng = &mut world.rng;
            let kind = &KINDS[rng.weighted(KINDS.iter().map(|kind| kind.weight))];
            let think = if sleeps && rng.chance(40) { rng.millis(2000, 9000) } else { rng.millis(50, 2500) };
            let mut plan = plan(rng, kind, calls.fetch_add(1, Ordering::Relaxed));
            // What is sent on a wrapped pool's sessions is not seen: docs/exactly-once.md, the fourth case.
            if plan.act.ends() && world.setup.wrapped {
                plan.act = Act::Plain;
            }
            (think, kind, plan)
        };
        sleep(think).await;
        let began = Instant::now();
        sim.lock().say(|| format!("call {} begins, {}, {:?}", plan.call, kind.name, plan.promise));
        let outcome = one(&sim, &pool, &calls, kind.how, plan).await;
        let mut world = sim.lock();
        world.counts.note("calls", format!("{} {outcome}", kind.name));
        if let Some(reason) = outcome.strip_prefix("CommitUnknown(") {
            world.counts.note("unknown", reason.trim_end_matches(')'));
        }
        world.say(|| format!("call {} ends after {:?}: {outcome}", plan.call, began.elapsed()));
    }
}

async fn one(sim: &Arc<Sim>, pool: &Pool, calls: &AtomicI64, how: How, plan: Plan) -> String {
    let began = Instant::now();
    let (expect, outcome, limit) = match how {
        How::Get | How::Impatient => match checked_out(sim, pool, how, plan).await {
            Some((expect, outcome)) => (expect, outcome, None),
            None => return "Unavailable".to_owned(),
        },
        How::Dropped => match timeout(plan.drop_after, transaction(sim, pool, calls, plan)).await {
            Ok(result) => expected(plan, &result),
            Err(_) => (Expect::AtMostOnce, "was dropped".to_owned(), None),
        },
        How::Transaction => {
            let result = transaction(sim, pool, calls, plan).await;
            check(sim, plan, &result);
            if plan.tells && result.is_ok() {
                sim.lock().told.sent(plan.call, began);
            }
            expected(plan, &result)
        }
    };
    let limit = limit
        .map(|()| plan.deadline + LAST_ATTEMPT + if plan.act == Act::Nests { LAST_ATTEMPT } else { Duration::ZERO });
    let took = began.elapsed();
    let mut world = sim.lock();
    if let Some(limit) = limit.filter(|limit| took > *limit) {
        world.oracle.violation(format!("call {} took {took:?}, and its limit was {limit:?}", plan.call));
    }
    if plan.promise == Promise::Read && matches!(how, How::Transaction | How::Dropped) {
        return outcome;
    }
    let rows = if matches!(how, How::Get | How::Impatient) { 1 } else { plan.rows };
    // A wrapped pool's warnings are not seen, as `Pool::wrap` says. Then `Ok` does not say that a standby has it.
    let unseen = world.setup.wrapped && world.counts.of("seen", CANCELLED_WAITS) > 0;
    let expect = match expect {
        Expect::Once if unseen => Expect::AtMostOnce,
        Expect::AtLeastOnce if unseen => Expect::Any,
        expect => expect,
    };
    if expect == Expect::Once && world.setup.synchronous {
        let copies = world.nodes.iter().filter(|node| node.log.has(plan.call)).count();
        if copies < 2 {
            world.oracle.violation(format!("call {} was answered `Ok`, and {copies} servers have it", plan.call));
        }
    }
    world.oracle.answered(plan.call, rows, expect);
    outcome
}

/// Gets a connection, and uses it. `None`: there was none in time.
async fn checked_out(sim: &Arc<Sim>, pool: &Pool, how: How, plan: Plan) -> Option<(Expect, String)> {
    let (began, call) = (Instant::now(), plan.call);
    let patience = if how == How::Get { CHECKOUT } else { plan.drop_after };
    let got = pool.get_within(patience).await;
    let took = began.elapsed();
    if took > patience + STRICT {
        let violation = format!("the checkout of call {call} took {took:?}, and its deadline was {patience:?}");
        sim.lock().oracle.violation(violation);
    }
    let client = got.ok()?;
    let view = pool.status().view;
    if !matches!(view.state, State::Primary { .. }) || client.generation() != view.generation {
        let was = client.generation();
        sim.lock().oracle.violation(format!("call {call} got a connection of generation {was}: {view:?}"));
    }
    let sql = format!("INSERT INTO payments VALUES ({call}, 1)");
    Some(match timeout(plan.deadline, client.batch_execute(&sql)).await {
        // Such a statement is reported as done, with a warning that nobody looks at.
        Ok(Ok(())) if sim.lock().counts.of("seen", CANCELLED_WAITS) > 0 => (Expect::AtMostOnce, "Ok".to_owned()),
        Ok(Ok(())) => (Expect::Once, "Ok".to_owned()),
        Ok(Err(error)) => (Expect::AtMostOnce, format!("failed {:?}", error.code().map(|code| code.code().to_owned()))),
        Err(_) => (Expect::AtMostOnce, "gave up".to_owned()),
    })
}

/// Checks a transaction's answer for what no answer may be, whatever is in the table in the end.
fn check(sim: &Sim, plan: Plan, result: &Result<(), Error>) {
    let call = plan.call;
    let said = match result {
        Ok(()) if plan.act.ends() => Some("`Ok`, and its closure had ended its transaction itself".to_owned()),
        Ok(()) if plan.act == Act::Swallows => Some("`Ok`, and its transaction had failed".to_owned()),
        Err(Error::EndedInside(_)) if !plan.act.ends() => Some("that its closure ended it".to_owned()),
        Err(Error::Database(error)) => {
            let code = error.code().map_or("", |code| code.code());
            let own = plan.raised() == Some(code);
            match code {
                "40001" | "40P01" if plan.word.is_none() => Some(format!("{code}, which another run helps against")),
                "25006" if !own => Some(format!("{code}, which another primary helps against")),
                _ => None,
            }
        }
        _ => None,
    };
    if let Some(said) = said {
        sim.lock().oracle.violation(format!("call {call} was answered {said}"));
    }
}

/// What a result promises, its name, and whether the call has a limit.
fn expected(plan: Plan, result: &Result<(), Error>) -> (Expect, String, Option<()>) {
    let expect = match (plan.promise, result) {
        (Promise::Idempotent, Ok(())) => Expect::AtLeastOnce,
        (_, Ok(())) => Expect::Once,
        (_, Err(error)) if error.commit_outcome() == CommitOutcome::NotCommitted => Expect::Never,
        (Promise::Idempotent, Err(_)) => Expect::Any,
        (_, Err(_)) => Expect::AtMostOnce,
    };
    (expect, result.as_ref().map_or_else(name, |()| "Ok".to_owned()), Some(()))
}

fn name(error: &Error) -> String {
    match error {
        Error::CommitUnknown(unknown) => format!("CommitUnknown({:?})", unknown.reason()),
        Error::Database(error) => format!("Database {}", error.code().map_or("lost", |code| code.code())),
        error => format!("{error:?}").split(':').next().unwrap_or_default().to_owned(),
    }
}
