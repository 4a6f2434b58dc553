//! The callers: work of each guarantee, reads, checkouts, calls that are dropped, and closures that fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tokio_postgres_failover::view::State;
use tokio_postgres_failover::{CommitOutcome, Error, Guarantee, Pool, RetryPolicy};
use tokio_util::sync::CancellationToken;

use crate::oracle::Expect;
use crate::world::Sim;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Exactly,
    AtMostOnce,
    Idempotent,
    /// Exactly once, dropped by its caller at some moment.
    Dropped,
    /// The closure fails after its work.
    Aborts,
    Read,
    /// A connection, and one statement that is its own transaction.
    Get,
    /// A connection, waited for with little patience.
    Impatient,
}

/// Each kind of call, its weight, and its name in the counts.
const KINDS: [(Kind, u64, &str); 8] = [
    (Kind::Exactly, 40, "exactly once"),
    (Kind::AtMostOnce, 8, "at most once"),
    (Kind::Idempotent, 8, "idempotent"),
    (Kind::Dropped, 10, "dropped"),
    (Kind::Aborts, 4, "aborting"),
    (Kind::Read, 8, "read"),
    (Kind::Get, 14, "get"),
    (Kind::Impatient, 8, "impatient get"),
];

/// How much longer than its deadline a transaction may take: its last attempt is not cut short, and may wait for a
/// server that is silent or for a standby that is away. Then its COMMIT is settled for at least five seconds.
const LAST_ATTEMPT: Duration = Duration::from_secs(40);
/// The same for a checkout, whose deadline is strict. Timers have a resolution of a millisecond.
const STRICT: Duration = Duration::from_millis(3);

/// How the counts name a COMMIT that an administrator has made go on without its standby.
pub(crate) const CANCELLED_WAITS: &str = "cancelled waits for a standby";

pub(crate) const CHECKOUT: Duration = Duration::from_secs(6);

/// One call's plan.
#[derive(Clone, Copy, Debug)]
struct Plan {
    call: i64,
    rows: usize,
    extended: bool,
    /// How long the closure waits between its statements.
    slow: Duration,
    deadline: Duration,
    drop_after: Duration,
    seed: u64,
}

/// Calls until it is stopped.
pub(crate) async fn caller(sim: Arc<Sim>, pool: Pool, calls: Arc<AtomicI64>, stop: CancellationToken) {
    while !stop.is_cancelled() {
        let (think, kind, plan) = {
            let mut world = sim.lock();
            let rng = &mut world.rng;
            let kind = KINDS[rng.weighted(KINDS.iter().map(|(_, weight, _)| *weight))];
            let patience = if rng.chance(50) { 30 } else { 4000 };
            let slow = if rng.chance(15) { rng.millis(1, 800) } else { Duration::ZERO };
            let plan = Plan {
                call: calls.fetch_add(1, Ordering::Relaxed),
                rows: 1 + rng.index(2),
                extended: rng.chance(30),
                slow,
                deadline: rng.millis(1000, 12_000),
                drop_after: rng.millis(0, patience),
                seed: rng.next(),
            };
            (rng.millis(50, 1500), kind, plan)
        };
        sleep(think).await;
        let began = Instant::now();
        sim.lock().say(|| format!("call {} begins, {}", plan.call, kind.2));
        let outcome = one(&sim, &pool, kind.0, plan).await;
        let mut world = sim.lock();
        world.counts.note("calls", format!("{} {outcome}", kind.2));
        if let Some(reason) = outcome.strip_prefix("CommitUnknown(") {
            world.counts.note("unknown", reason.trim_end_matches(')'));
        }
        world.say(|| format!("call {} ends after {:?}: {outcome}", plan.call, began.elapsed()));
    }
}

async fn one(sim: &Arc<Sim>, pool: &Pool, kind: Kind, plan: Plan) -> String {
    let began = Instant::now();
    let (expect, outcome, limit) = match kind {
        Kind::Get | Kind::Impatient => {
            let patience = if kind == Kind::Get { CHECKOUT } else { plan.drop_after };
            let got = pool.get_within(patience).await;
            let took = began.elapsed();
            if took > patience + STRICT {
                let call = plan.call;
                let violation = format!("the checkout of call {call} took {took:?}, and its deadline was {patience:?}");
                sim.lock().oracle.violation(violation);
            }
            match got {
                Err(error) => return name(&error),
                Ok(client) => {
                    let view = pool.status().view;
                    if !matches!(view.state, State::Primary { .. }) || client.generation() != view.generation {
                        let was = client.generation();
                        let violation = format!("call {} got a connection of generation {was}: {view:?}", plan.call);
                        sim.lock().oracle.violation(violation);
                    }
                    let sql = format!("INSERT INTO payments VALUES ({}, 1)", plan.call);
                    match timeout(plan.deadline, client.batch_execute(&sql)).await {
                        // Such a statement is reported as done, with a warning that nobody looks at.
                        Ok(Ok(())) if sim.lock().counts.of("seen", CANCELLED_WAITS) > 0 => {
                            (Expect::AtMostOnce, "Ok".to_owned(), None)
                        }
                        Ok(Ok(())) => (Expect::Once, "Ok".to_owned(), None),
                        Ok(Err(error)) => (Expect::AtMostOnce, format!("failed {:?}", error.code()), None),
                        Err(_) => (Expect::AtMostOnce, "gave up".to_owned(), None),
                    }
                }
            }
        }
        Kind::Dropped => match timeout(plan.drop_after, transaction(pool, kind, plan)).await {
            Ok(result) => expected(kind, &result),
            Err(_) => (Expect::AtMostOnce, "was dropped".to_owned(), None),
        },
        _ => expected(kind, &transaction(pool, kind, plan).await),
    };
    if outcome == "EndedInside" {
        let violation = format!("call {} says that its closure ended its transaction", plan.call);
        sim.lock().oracle.violation(violation);
    }
    let limit = limit.map(|()| plan.deadline + LAST_ATTEMPT);
    let took = began.elapsed();
    let mut world = sim.lock();
    if let Some(limit) = limit.filter(|limit| took > *limit) {
        world.oracle.violation(format!("call {} took {took:?}, and its limit was {limit:?}", plan.call));
    }
    let rows = match kind {
        Kind::Read => return outcome,
        Kind::Get | Kind::Impatient => 1,
        _ => plan.rows,
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

/// What a result promises, its name, and whether the call has a limit.
fn expected(kind: Kind, result: &Result<(), Error>) -> (Expect, String, Option<()>) {
    let expect = match (kind, result) {
        (Kind::Idempotent, Ok(())) => Expect::AtLeastOnce,
        (_, Ok(())) => Expect::Once,
        (_, Err(error)) if error.commit_outcome() == CommitOutcome::NotCommitted => Expect::Never,
        (Kind::Idempotent, Err(_)) => Expect::Any,
        (_, Err(_)) => Expect::AtMostOnce,
    };
    (expect, result.as_ref().map_or_else(name, |()| "Ok".to_owned()), Some(()))
}

fn name(error: &Error) -> String {
    match error {
        Error::CommitUnknown(unknown) => format!("CommitUnknown({:?})", unknown.reason()),
        error => format!("{error:?}").split(':').next().unwrap_or_default().to_owned(),
    }
}

async fn transaction(pool: &Pool, kind: Kind, plan: Plan) -> Result<(), Error> {
    let guarantee = match kind {
        Kind::AtMostOnce => Guarantee::AtMostOnce,
        Kind::Idempotent => Guarantee::AtLeastOnce,
        _ => Guarantee::ExactlyOnce,
    };
    let attempts = Arc::new(AtomicI64::new(0));
    let retry = RetryPolicy::new().seed(plan.seed).deadline(plan.deadline);
    let builder = pool.build_transaction().guarantee(guarantee).read_only(kind == Kind::Read).retry(retry);
    builder
        .run(|transaction| {
            let attempt = attempts.fetch_add(1, Ordering::Relaxed) + 1;
            async move {
                for _ in 0..plan.rows {
                    if kind == Kind::Read {
                        transaction.batch_execute("SELECT 1").await?;
                    } else if plan.extended {
                        let sql = "INSERT INTO payments VALUES ($1, $2)";
                        transaction.execute(sql, &[&plan.call, &attempt]).await?;
                    } else {
                        let sql = format!("INSERT INTO payments VALUES ({}, {attempt})", plan.call);
                        transaction.batch_execute(&sql).await?;
                    }
                    if plan.slow.is_zero() {
                        continue;
                    }
                    if plan.seed.is_multiple_of(2) {
                        sleep(plan.slow).await;
                    } else {
                        let sql = format!("SELECT pg_sleep({:.3})", plan.slow.as_secs_f64());
                        transaction.batch_execute(&sql).await?;
                    }
                }
                if kind == Kind::Aborts { Err(Error::abort("the caller changed its mind")) } else { Ok(()) }
            }
        })
        .await
}
