//! The loop of a call: attempt, decide, wait, repeat. It carries out what `decide` says.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_postgres::error::SqlState;
use tracing::{Instrument, Span};

use super::abandoned::{Abandoned, end_all};
use super::attempt::Attempt;
use super::begin::MarkKind;
use super::decide::{Mode, Next, Stage, decide, unless_in_doubt};
use super::earlier::{
    Earlier, Lost, Unsent, find, found_ended, or_ended_at_last, shows_primary, unless_denied, unless_sent,
};
use super::ended::{Ended, Failed, unknown};
use super::nested::{Inner, InnerDoubt};
use super::verdict::{Bounds, ClosureError, Session, evicted, with_reason};
use super::{Transaction, TransactionBuilder};
use crate::classify::Cure;
use crate::commit::Unsettled;
use crate::error::{CommitOutcome, EndedInside, Ending, Error, Exhausted, RolledBack};
use crate::observe::{Observer, Operation};
use crate::pool::{Client, Pool};
use crate::retry::{GiveUp, Retry, RetryPolicy};
use crate::server::SessionClient;

/// Runs one call: makes its attempts, reports its failure, and tells an outer call if the outcome is unknown.
pub(super) async fn run<C, T, F, Fut>(options: TransactionBuilder<'_, C>, work: F) -> Result<T, Error>
where
    C: SessionClient,
    F: FnMut(Transaction<C>) -> Fut,
    Fut: Future<Output = Result<T, Error>>,
{
    let _call = options.pool.begin_call()?;
    let span = options.pool.observer().transaction(&options.mode());
    let timed = options.pool.observer().times(Operation::Transaction);
    // An outer call, if there is one, must learn of a doubt about this call, even if this future is dropped.
    let inner = Inner::begin(matches!(options.mode(), Mode::Exactly | Mode::Once));
    let (mut unsent, mut number, doubt) = (None, 0, inner.doubt());
    let attempts = attempts(&options, &span, &mut unsent, &mut number, doubt.clone(), work);
    let result = match attempts.instrument(span.clone()).await {
        Ok(value) => Ok(value),
        Err(error) => Err({
            let error = match unsent {
                Some(unsent) => or_ended_at_last(options.pool, options.place, unsent, error).await,
                None => error,
            };
            beside_a_call_within(error, number, doubt.is_noted())
        }),
    };
    inner.ended(result.as_ref().is_err_and(|error| error.commit_outcome() != CommitOutcome::NotCommitted));
    let failure = result.as_ref().err().map(|error| (error.code().map(SqlState::code), error.kind()));
    if let Some((code, kind)) = failure {
        Observer::transaction_failed(&span, code, kind);
    }
    timed.call_ended(failure);
    result
}

/// Lets a connection forget its prepared statements, and the types that it knows.
fn prepare_anew<C: SessionClient>(client: &Client<C>) {
    client.trail().heal(Cure::Clear);
    // A statement that is not prepared by hand must not use the old types, either.
    let _ = client.fresh();
}

/// Makes the attempts of a call. After each failed one, `decide` says what follows.
///
/// `unsent` receives the last attempt's transaction if the pool's COMMIT did not run and the server did not confirm a
/// rollback. The closure may have committed that transaction by itself, so a primary is asked about it. `count` gets
/// the number of attempts. `inner`: whether the outcome of a call within the closure is unknown.
async fn attempts<C, T, F, Fut>(
    options: &TransactionBuilder<'_, C>,
    span: &Span,
    unsent: &mut Option<Unsent>,
    count: &mut u32,
    inner: InnerDoubt,
    mut work: F,
) -> Result<T, Error>
where
    C: SessionClient,
    F: FnMut(Transaction<C>) -> Fut,
    Fut: Future<Output = Result<T, Error>>,
{
    let (pool, mode) = (options.pool, options.mode());
    let mut begin = options.begin();
    let mut retries = options.retry.start(Instant::now(), pool.next_seed());
    let (mut doubt, mut bounds) = (false, Bounds::default());
    let (mut lost, mut earlier, mut abandoned) = (Vec::new(), Vec::new(), Vec::new());
    loop {
        let (number, deadline) = (retries.attempt(), retries.deadline());
        *count = number;
        let client = match pool.get_for_transaction(deadline, options.place).await {
            Ok(client) => client,
            Err(error) => {
                let error = unless_sent(&lost, for_good(error, number - 1, doubt));
                return Err(unless_denied(&earlier, |id| pool.is_current(id), error));
            }
        };
        if let Some(error) = found_ended(&client, &mut lost, deadline).await {
            return Err(for_good(error, number - 1, doubt));
        }
        end_all(&client, &mut abandoned).await;
        let generation = client.generation();
        if let Some(attempt) = find(pool, &mut earlier, generation, deadline).await? {
            return committed_earlier(pool, attempt);
        }
        let fresh_after = client.fresh_after();
        if bounds.met_stale() {
            prepare_anew(&client);
        }
        let span = Observer::attempt(span, number, generation, client.watched());
        let attempt = Attempt::new(client, options.retry.attempt_limit(), inner.clone());
        let ended = async {
            match attempt.run(&begin, mode, &mut work, unsent).await {
                Ended::InDoubt(in_doubt) => {
                    // The pause before the next attempt starts now. Settling takes time, and the pause must not be
                    // added to that.
                    retries.failed(Instant::now());
                    in_doubt.settled(pool, mode, deadline).await
                }
                ended => ended,
            }
        };
        // `absent_from` is the generation whose primary has just said that this attempt is not committed.
        let (stage, failed, absent_from) = match ended.instrument(span).await {
            Ended::Committed(value) => {
                pool.budget().deposit();
                return Ok(value);
            }
            Ended::Failed(stage, failed) => (stage, failed, None),
            Ended::Aborted(generation, failed) => (Stage::Refused, failed, Some(generation)),
            Ended::Absent(attempt, failed) => {
                let absent_from = attempt.absent_from;
                earlier.push(attempt);
                (Stage::Refused, failed, Some(absent_from))
            }
            Ended::InDoubt(in_doubt) => {
                abandoned.push(Abandoned::new(in_doubt.mark, in_doubt.session));
                (Stage::InDoubt, in_doubt.failed, None)
            }
            Ended::Unknown(error) => return Err(error),
        };
        let Failed { verdict, error, session, answered } = failed;
        let end = if let Session::Ended(report) = &session { report.as_ref() } else { None };
        let verdict = bounds.narrow(verdict, end, generation, fresh_after);
        let error = if mode == Mode::Read { of_a_read(error) } else { error };
        // An error may say "not committed" only while the primary that said so is still the primary. This attempt shows
        // that of its own generation only if its session has answered to the end.
        let shown = answered && shows_primary(verdict, &session) && !pool.has_left(generation);
        let users = if stage == Stage::InDoubt { None } else { users_decision(&options.retry, &error, &session) };
        // `with_reason` may wrap the error in `SessionEnded`, and that means "not committed". So an error in doubt
        // stays as it is.
        let error = if stage == Stage::InDoubt { error } else { with_reason(error, verdict, session) };
        let denies = |id| Some(id) == absent_from || (id == generation && shown);
        let ended = |error| unless_denied(&earlier, denies, error);
        let decided = decide(mode, stage, verdict, users);
        match unless_in_doubt(decided, mode, stage, inner.is_noted()) {
            // Settling was tried above. `Settle` arrives here only if the attempt left no mark.
            Next::Settle | Next::Unknown if planted!("hides a doubt") => return Err(error),
            Next::Settle | Next::Unknown => {
                pool.observer().not_settled(generation);
                return Err(unknown(error, Unsettled::NoMark));
            }
            Next::Return if decided == Next::Rerun => return Err(ended(by_a_call_within(error, number))),
            Next::Return => return Err(ended(for_good(error, number, doubt))),
            Next::Rerun => {}
        }
        if stage == Stage::InDoubt && mode != Mode::Read {
            doubt = !planted!("forgets a doubt");
            // From now on each attempt writes, so that its COMMIT waits for the standbys (see `MarkKind::Write`).
            begin.marks = MarkKind::Write;
        }
        match retries.next(Instant::now(), pool.budget()) {
            Ok(delay) => {
                let outcome = if doubt { CommitOutcome::Unknown } else { CommitOutcome::NotCommitted };
                // The hook and the log are the program's and may panic. Then the token goes back.
                let promised = pool.budget().promised();
                if !options.retry.allows(&Retry::new(&retries, &error, delay, outcome)) {
                    return Err(ended(given_up(error, number, retries.limit(), GiveUp::Hook, stage, doubt)));
                }
                pool.observer().runs_again(number, verdict, delay, &error);
                lost.extend(unsent.take().map(|unsent| Lost::new(unsent, error)));
                inner.rest_if(!doubt && lost.iter().all(Lost::is_undone) && earlier.is_empty());
                sleep(delay).await;
                promised.spend();
            }
            Err(why) => return Err(ended(given_up(error, number, retries.limit(), why, stage, doubt))),
        }
    }
}

/// Makes the call's result from an earlier attempt that was committed. If its closure had ended the transaction itself,
/// that COMMIT was not the pool's.
fn committed_earlier<C: SessionClient, T>(pool: &Pool<C>, attempt: Earlier<T>) -> Result<T, Error> {
    if attempt.closures.is_sent() {
        return Err(EndedInside::error(Ending::Committed, None));
    }
    pool.budget().deposit();
    Ok(attempt.value)
}

/// Makes the call's error from an error that allows no further attempt. If an earlier attempt is in doubt, wraps the
/// error in `Exhausted` with an unknown outcome, because an error may say "not committed" only if no attempt was
/// committed.
fn for_good(error: Error, attempts: u32, doubt: bool) -> Error {
    if !doubt {
        return error;
    }
    let why = "the last error allows no further attempt".to_owned();
    Error::Exhausted(Box::new(Exhausted::new(attempts, why, CommitOutcome::Unknown, error)))
}

/// A `read` commits nothing, so `CommitUnknown` would be wrong. What failed is that the session was lost.
fn of_a_read(error: Error) -> Error {
    if matches!(error, Error::CommitUnknown(_)) { evicted().1 } else { error }
}

/// Makes the call's error from one after which the work would run again, if its closure has made a call in doubt.
fn by_a_call_within(error: Error, attempts: u32) -> Error {
    Error::Exhausted(Box::new(Exhausted::by_a_call_within(attempts, error)))
}

/// Makes the call's error if the outcome of a call within its closure is unknown (`inner`). The error must not say "not
/// committed" then: a program that repeats the call would do the inner work twice.
fn beside_a_call_within(error: Error, attempts: u32, inner: bool) -> Error {
    if !inner || error.commit_outcome() != CommitOutcome::NotCommitted || planted!("hides the doubt of a call within") {
        return error;
    }
    Error::Exhausted(Box::new(Exhausted::beside_a_call_within(attempts, error)))
}

/// Makes the call's error after the policy, the budget or the hook has refused another attempt.
fn given_up(error: Error, attempts: u32, limit: Duration, why: GiveUp, stage: Stage, doubt: bool) -> Error {
    if why == GiveUp::Attempts(1) {
        return if doubt && stage == Stage::InDoubt { unknown(error, Unsettled::NoMark) } else { error };
    }
    let outcome = if doubt { CommitOutcome::Unknown } else { CommitOutcome::NotCommitted };
    Error::Exhausted(Box::new(Exhausted::new(attempts, why.explain(limit), outcome, error)))
}

/// Asks the user's `RetryPolicy::classify` about the server's report. Takes the report from the error, or else from the
/// session, because the closure may have hidden it.
fn users_decision(policy: &RetryPolicy, error: &Error, session: &Session) -> Option<bool> {
    let closure_error = ClosureError::of(error);
    // Such an error is not the server's report on this attempt. `FailedInside` is an exception: the closure hid the
    // report, but the session has it.
    if matches!(closure_error, ClosureError::OtherCall) && !matches!(error, Error::RolledBack(RolledBack::FailedInside))
    {
        return None;
    }
    let asked = closure_error.report().and_then(|report| policy.decision_on(report));
    asked.or_else(|| session.report().and_then(|report| policy.decision_on(report)))
}
