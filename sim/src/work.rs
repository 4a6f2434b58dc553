//! What the closures of the load do: their statements, and how they fail, end their transactions or call the pool
//! again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use tokio::time::sleep;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres_failover::ledger::Ledger;
use tokio_postgres_failover::{CommitOutcome, Error, Guarantee, Pool, RetryPolicy, Transaction};

use crate::oracle::Expect;
use crate::world::Sim;

/// What the caller asks of the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Promise {
    Exactly,
    Ledger,
    AtMostOnce,
    Idempotent,
    Read,
    /// One of them, by chance.
    Any,
}

/// What the closure does besides its statements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    Plain,
    /// It fails after its work with an error of its own.
    Aborts,
    /// In its first run the server refuses a statement, or the COMMIT, with one of [`RAISED`].
    Raises,
    /// A statement fails, and it sends another one nevertheless.
    GoesOn,
    /// A statement fails, and it returns `Ok`.
    Swallows,
    /// It sends a COMMIT of its own.
    Commits,
    /// It rolls back, and writes outside of the transaction after that.
    RollsBack,
    /// It sends its statements without waiting for their answers.
    Pipelines,
    /// Its first statement fails, and it sends others nevertheless.
    Insists,
    /// It drops all prepared statements, those of the pool, too.
    Deallocates,
    /// It makes another call of the pool.
    Nests,
}

/// An error that the server raises on demand, as a function or a deferred trigger does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Raised {
    pub(crate) code: &'static str,
    pub(crate) message: &'static str,
    pub(crate) routine: &'static str,
    /// It ends the session.
    pub(crate) fatal: bool,
}

/// The first row is a violated constraint, the second and the third are conflicts.
pub(crate) const RAISED: [Raised; 11] = [
    raised("23505", "duplicate key value violates unique constraint", "_bt_check_unique", false),
    raised("40001", "could not serialize access", "ExecUpdate", false),
    raised("40P01", "deadlock detected", "DeadLockReport", false),
    // A pooler's, about the server behind it.
    raised("57P03", "the database system is not yet accepting connections", "", false),
    raised("53300", "too many connections for role", "", false),
    raised("25006", "cannot execute UPDATE in a read-only transaction", "PreventCommandIfReadOnly", false),
    raised("08007", "the outcome of the remote transaction is unknown", "pgfdw_report_error", false),
    raised("0A000", "cached plan must not change result type", "RevalidateCachedQuery", false),
    raised("57P01", "terminating connection due to administrator command", "ProcessInterrupts", true),
    raised("28P01", "password authentication failed for user \"app\"", "auth_failed", true),
    // Bytes that are no message of the protocol.
    raised("garbage", "", "", true),
];

const fn raised(code: &'static str, message: &'static str, routine: &'static str, fatal: bool) -> Raised {
    Raised { code, message, routine, fatal }
}

/// One call's plan.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) call: i64,
    pub(crate) promise: Promise,
    pub(crate) act: Act,
    pub(crate) rows: usize,
    pub(crate) extended: bool,
    /// How long the closure waits between its statements.
    pub(crate) slow: Duration,
    pub(crate) deadline: Duration,
    pub(crate) drop_after: Duration,
    pub(crate) seed: u64,
    /// Which of [`RAISED`], and whether COMMIT meets it.
    pub(crate) raises: usize,
    pub(crate) at_commit: bool,
    /// It tells the listener of itself.
    pub(crate) tells: bool,
    /// What `RetryPolicy::classify` says about it.
    pub(crate) word: Option<bool>,
}

impl Act {
    /// Returns whether the closure ends its transaction itself.
    pub(crate) fn ends(self) -> bool {
        matches!(self, Self::Commits | Self::RollsBack)
    }
}

impl Plan {
    pub(crate) fn raised(&self) -> Option<&'static str> {
        (self.act == Act::Raises).then(|| RAISED[self.raises].code)
    }
}

/// What the closures of one call have met.
#[derive(Debug, Default)]
struct Met {
    attempts: AtomicI64,
    /// The user has said that the work is not to run again.
    refused: AtomicBool,
    /// The server has refused what would fail again.
    fails_again: AtomicBool,
    /// The outcome of a call within the closure is unknown.
    inner_doubt: AtomicBool,
}

/// Counts a closure that holds a connection.
struct Holds(Arc<Sim>);

impl Holds {
    fn new(sim: &Arc<Sim>) -> Self {
        sim.lock().holding += 1;
        Self(Arc::clone(sim))
    }
}

impl Drop for Holds {
    fn drop(&mut self) {
        self.0.lock().holding -= 1;
    }
}

pub(crate) async fn transaction(sim: &Arc<Sim>, pool: &Pool, calls: &AtomicI64, plan: Plan) -> Result<(), Error> {
    let guarantee = match plan.promise {
        Promise::AtMostOnce => Guarantee::AtMostOnce,
        Promise::Idempotent => Guarantee::AtLeastOnce,
        Promise::Ledger => Guarantee::Ledger(Ledger::default()),
        Promise::Exactly | Promise::Read | Promise::Any => Guarantee::ExactlyOnce,
    };
    let met = Arc::new(Met::default());
    let mut retry = RetryPolicy::new().seed(plan.seed).deadline(plan.deadline);
    if let (Some(word), Some(code)) = (plan.word, plan.raised()) {
        retry = retry.classify(move |report| (report.code().code() == code).then_some(word));
    }
    let builder = pool.build_transaction().guarantee(guarantee).read_only(plan.promise == Promise::Read).retry(retry);
    let result = builder
        .run(|transaction| {
            let attempt = met.attempts.fetch_add(1, Ordering::Relaxed) + 1;
            run_again(sim, &met, plan, attempt);
            let closure = Closure { sim: Arc::clone(sim), pool: pool.clone(), met: Arc::clone(&met), plan, attempt };
            async move {
                let _holds = Holds::new(&closure.sim);
                closure.statements(&transaction).await?;
                closure.end(transaction, calls).await
            }
        })
        .await;
    let denies = result.as_ref().is_err_and(|error| error.commit_outcome() == CommitOutcome::NotCommitted);
    if denies && met.inner_doubt.load(Ordering::Relaxed) {
        let violation = format!("call {} says \"not committed\", and a call within it is in doubt", plan.call);
        sim.lock().oracle.violation(violation);
    }
    result
}

/// Checks that nothing forbids this run of the closure.
fn run_again(sim: &Sim, met: &Met, plan: Plan, attempt: i64) {
    let mut world = sim.lock();
    let call = plan.call;
    world.say(|| format!("call {call} runs, attempt {attempt}"));
    if met.inner_doubt.load(Ordering::Relaxed) {
        world.oracle.violation(format!("call {call} runs again, and a call within it is in doubt"));
    }
    if met.refused.load(Ordering::Relaxed) {
        world.oracle.violation(format!("call {call} runs again, and its policy said that it must not"));
    }
    // A session that ends just then is a reason to run again.
    if met.fails_again.load(Ordering::Relaxed) && world.is_quiet_for(Duration::from_secs(5)) {
        world.oracle.violation(format!("call {call} runs again after an error that would come again"));
    }
}

/// The SQLSTATE of the server's error.
fn code_of<T>(answer: &Result<T, tokio_postgres::Error>) -> Option<&str> {
    answer.as_ref().err()?.code().map(SqlState::code)
}

struct Closure {
    sim: Arc<Sim>,
    pool: Pool,
    met: Arc<Met>,
    plan: Plan,
    attempt: i64,
}

impl Closure {
    async fn statements(&self, transaction: &Transaction) -> Result<(), Error> {
        let Plan { call, slow, .. } = self.plan;
        if self.plan.act == Act::Pipelines {
            let sql = format!("INSERT INTO payments VALUES ({call}, {})", self.attempt);
            // The first request of this one has a Sync, so a server that has refused it carries out what follows.
            let (prepares, values): (_, [&(dyn ToSql + Sync); 2]) =
                ("INSERT INTO payments VALUES ($1, $2)", [&call, &self.attempt]);
            let (one, two) = tokio::join!(transaction.execute(prepares, &values), transaction.batch_execute(&sql));
            one?;
            return Ok(two?);
        }
        if self.plan.act == Act::Insists {
            // What it does about the error does not matter.
            let _ = transaction.batch_execute("SELECT 1").await;
        }
        for _ in 0..self.plan.rows {
            if self.plan.promise == Promise::Read {
                transaction.batch_execute("SELECT 1").await?;
            } else if self.plan.extended {
                let sql = "INSERT INTO payments VALUES ($1, $2)";
                transaction.execute(sql, &[&call, &self.attempt]).await?;
            } else {
                let sql = format!("INSERT INTO payments VALUES ({call}, {})", self.attempt);
                transaction.batch_execute(&sql).await?;
            }
            if slow.is_zero() {
                continue;
            }
            if self.plan.seed.is_multiple_of(2) {
                sleep(slow).await;
            } else {
                transaction.batch_execute(&format!("SELECT pg_sleep({:.3})", slow.as_secs_f64())).await?;
            }
        }
        Ok(())
    }

    async fn end(&self, transaction: Transaction, calls: &AtomicI64) -> Result<(), Error> {
        match self.plan.act {
            Act::Plain if self.plan.tells => {
                Ok(transaction.batch_execute(&format!("SELECT pg_notify('calls', '{}')", self.plan.call)).await?)
            }
            Act::Plain | Act::Pipelines | Act::Insists => Ok(()),
            Act::Aborts => Err(Error::abort("the caller changed its mind")),
            Act::Raises if self.attempt > 1 => Ok(()),
            Act::Raises => self.raise(&transaction).await,
            Act::GoesOn => {
                // The server says why.
                let _ = transaction.batch_execute("SELECT raise('23505')").await;
                Ok(transaction.batch_execute("SELECT 1").await?)
            }
            Act::Swallows => {
                let _ = transaction.batch_execute("SELECT raise('23505')").await;
                Ok(())
            }
            Act::Commits => Ok(transaction.batch_execute("COMMIT").await?),
            Act::RollsBack => self.roll_back(&transaction).await,
            Act::Deallocates => Ok(transaction.batch_execute("DEALLOCATE ALL").await?),
            Act::Nests => self.nest(calls).await,
        }
    }

    async fn roll_back(&self, transaction: &Transaction) -> Result<(), Error> {
        let again = format!("INSERT INTO payments VALUES ({}, {})", self.plan.call, self.attempt);
        if self.plan.extended {
            transaction.batch_execute("ROLLBACK").await?;
            return Ok(transaction.batch_execute(&again).await?);
        }
        Ok(transaction.batch_execute(&format!("ROLLBACK; {again}")).await?)
    }

    async fn raise(&self, transaction: &Transaction) -> Result<(), Error> {
        let code = RAISED[self.plan.raises].code;
        let when = if self.plan.at_commit { "raise_at_commit" } else { "raise" };
        let answer = transaction.batch_execute(&format!("SELECT {when}('{code}')")).await;
        // A server that shuts down ends the session with an error of its own, of which the policy has said nothing.
        let raised = !self.plan.at_commit && code_of(&answer) == Some(code);
        if raised && self.plan.word == Some(false) {
            self.met.refused.store(true, Ordering::Relaxed);
        }
        if (raised || self.plan.at_commit) && self.plan.word.is_none() && code == "23505" {
            self.met.fails_again.store(true, Ordering::Relaxed);
        }
        Ok(answer?)
    }

    /// Makes another call. It has a number of its own in each run of this closure.
    async fn nest(&self, calls: &AtomicI64) -> Result<(), Error> {
        let inner = calls.fetch_add(1, Ordering::Relaxed);
        self.sim.lock().oracle.answered(inner, 1, Expect::AtMostOnce);
        let retry = RetryPolicy::new().seed(self.plan.seed ^ 1).deadline(self.plan.deadline);
        let sql = format!("INSERT INTO payments VALUES ({inner}, 1)");
        let sql = &sql;
        let builder = self.pool.build_transaction().guarantee(Guarantee::AtMostOnce).retry(retry);
        let done = builder.run(|transaction| async move { Ok(transaction.batch_execute(sql).await?) }).await;
        let expect = match &done {
            Ok(()) => Expect::Once,
            Err(error) if error.commit_outcome() == CommitOutcome::NotCommitted => Expect::Never,
            Err(_) => {
                self.met.inner_doubt.store(true, Ordering::Relaxed);
                Expect::AtMostOnce
            }
        };
        self.sim.lock().oracle.answered(inner, 1, expect);
        // Some closures hide what became of it, or tell of it in their own words.
        match done {
            Err(_) if self.plan.extended => Ok(()),
            Err(_) if self.plan.seed.is_multiple_of(2) => Err(Error::abort("the call within has failed")),
            done => done,
        }
    }
}
