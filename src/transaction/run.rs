//! The loop: attempt, decide, wait, again. Carries out what `decide` says.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::SimpleQueryMessage;
use tracing::Instrument;

use super::decide::{Mode, Next, Stage, decide};
use super::{Transaction, TransactionBuilder};
use crate::classify::{Verdict, classify, classify_chain, commit_refused};
use crate::error::{CommitOutcome, CommitUnknown, Error, Exhausted, InDoubt, RolledBack};
use crate::pool::{Client, Pool};
use crate::retry::GiveUp;
use crate::topology::Suspicion;

/// COMMIT turns into ROLLBACK, without an error, where the transaction had failed. A statement before it makes the
/// server say so, in the same message: 25P02.
const COMMIT: &str = "SELECT 1; COMMIT";
/// In one message: undo, and ask the session whether its server takes writes at all.
const ROLLBACK_AND_ROLE: &str =
    "ROLLBACK; SELECT pg_is_in_recovery() OR current_setting('default_transaction_read_only')::boolean";
/// A session that does not answer its ROLLBACK within this is closed instead.
const ROLLBACK_WITHIN: Duration = Duration::from_secs(2);
/// A source chain longer than this is a loop.
const LINKS: usize = 16;

pub(super) async fn run<T, F, Fut>(options: &TransactionBuilder<'_>, work: F) -> Result<T, Error>
where
    F: FnMut(Transaction) -> Fut,
    Fut: Future<Output = Result<T, Error>>,
{
    let span = tracing::info_span!("transaction", db.system.name = "postgresql", mode = ?options.mode());
    attempts(options, work).instrument(span).await
}

async fn attempts<T, F, Fut>(options: &TransactionBuilder<'_>, mut work: F) -> Result<T, Error>
where
    F: FnMut(Transaction) -> Fut,
    Fut: Future<Output = Result<T, Error>>,
{
    let pool = options.pool;
    let (begin, mode) = (options.begin(), options.mode());
    let mut retries = options.retry.start(Instant::now(), pool.next_seed());
    let mut doubt = false;
    loop {
        let number = retries.attempt();
        let client = match pool.get_until(retries.deadline()).await {
            Ok(client) => client,
            Err(error) => return Err(for_good(error, number - 1, doubt)),
        };
        let span = tracing::debug_span!("attempt", number, generation = client.generation().get());
        let attempt = Attempt { client: Arc::new(client), clean: false, limit: options.retry.attempt_limit() };
        let failed = match attempt.run(&begin, mode, &mut work).instrument(span).await {
            Ok(value) => {
                pool.budget().deposit();
                return Ok(value);
            }
            Err(failed) => failed,
        };
        let Failed { stage, verdict, error } = failed;
        match decide(mode, stage, verdict) {
            Next::Unknown => return Err(unknown(error)),
            Next::Return => return Err(for_good(error, number, doubt)),
            Next::Rerun => {}
        }
        doubt |= stage == Stage::InDoubt && mode != Mode::Read;
        match retries.next(Instant::now(), pool.budget()) {
            Ok(delay) => {
                tracing::debug!(attempt = number, ?verdict, ?delay, "the transaction runs again: {error}");
                sleep(delay).await;
            }
            Err(why) => return Err(given_up(error, number, why, stage, doubt)),
        }
    }
}

/// An error that no re-run would mend. "Not committed" must be true of every attempt, not of the last alone.
fn for_good(error: Error, attempts: u32, doubt: bool) -> Error {
    if !doubt {
        return error;
    }
    let why = "as the next failed for good".to_owned();
    Error::Exhausted(Box::new(Exhausted::new(attempts, why, CommitOutcome::Unknown, error)))
}

fn given_up(error: Error, attempts: u32, why: GiveUp, stage: Stage, doubt: bool) -> Error {
    if why == GiveUp::Attempts(1) {
        return if doubt && stage == Stage::InDoubt { unknown(error) } else { error };
    }
    let outcome = if doubt { CommitOutcome::Unknown } else { CommitOutcome::NotCommitted };
    Error::Exhausted(Box::new(Exhausted::new(attempts, why.to_string(), outcome, error)))
}

fn unknown(error: Error) -> Error {
    match error {
        Error::Database(source) => Error::CommitUnknown(Box::new(CommitUnknown::lost(source))),
        other => other,
    }
}

struct Failed {
    stage: Stage,
    verdict: Verdict,
    error: Error,
}

impl Failed {
    fn before_commit(verdict: Verdict, error: impl Into<Error>) -> Self {
        Self { stage: Stage::Body, verdict, error: error.into() }
    }
}

/// One connection during one attempt. Unless the session is known to be clean, dropping this closes it: so a future
/// that is dropped at any point, or a closure that panics, leaves no open transaction behind.
struct Attempt {
    client: Arc<Client>,
    clean: bool,
    /// Time from BEGIN to COMMIT.
    limit: Duration,
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if !self.clean {
            self.client.poison();
        }
    }
}

impl Attempt {
    async fn run<T, F, Fut>(mut self, begin: &str, mode: Mode, work: &mut F) -> Result<T, Failed>
    where
        F: FnMut(Transaction) -> Fut,
        Fut: Future<Output = Result<T, Error>>,
    {
        match timeout(self.limit, self.body(begin, work)).await {
            Ok(Ok(value)) => self.commit(value).await,
            Ok(Err((verdict, error))) => Err(self.failed(mode, verdict, error).await),
            Err(_) => {
                self.pool().suspect(self.client.generation(), Suspicion::Connection);
                Err(Failed::before_commit(Verdict::Application, Error::TimedOut { after: self.limit }))
            }
        }
    }

    /// BEGIN and the closure.
    async fn body<T, F, Fut>(&self, begin: &str, work: &mut F) -> Result<T, (Verdict, Error)>
    where
        F: FnMut(Transaction) -> Fut,
        Fut: Future<Output = Result<T, Error>>,
    {
        self.client.notices().forget();
        if let Err(error) = self.client.batch_execute(begin).await {
            let verdict = match classify(&error) {
                // Whoever had the connection before left a failed transaction on it.
                Verdict::Aborted => Verdict::ConnectionLost,
                verdict => verdict,
            };
            return Err((verdict, error.into()));
        }
        if self.client.notices().already_in_transaction() {
            // … or one that is open: its COMMIT is not ours to send. Nothing was done yet, so another connection will do.
            return Err((Verdict::ConnectionLost, Error::RolledBack(RolledBack::StrangeSession)));
        }
        work(Transaction::new(Arc::clone(&self.client))).await.map_err(|error| (verdict_of(&error), error))
    }

    async fn commit<T>(&mut self, value: T) -> Result<T, Failed> {
        if self.is_shared() {
            let error = Error::RolledBack(RolledBack::HandleKept);
            return Err(Failed::before_commit(Verdict::Application, error));
        }
        // On a session that has ended nothing is sent: then the transaction is certainly not committed.
        let never_sent = self.client.is_closed();
        let Err(error) = self.client.batch_execute(COMMIT).await else {
            self.clean = true;
            if !self.client.notices().not_replicated() {
                return Ok(value);
            }
            let error = Error::CommitUnknown(Box::new(CommitUnknown::not_replicated()));
            return Err(Failed { stage: Stage::InDoubt, verdict: Verdict::OutcomeUnknown, error });
        };
        self.suspect();
        let verdict = classify(&error);
        if never_sent {
            return Err(Failed::before_commit(verdict, error));
        }
        if !commit_refused(&error) {
            return Err(Failed { stage: Stage::InDoubt, verdict, error: error.into() });
        }
        self.roll_back().await;
        let error = match verdict {
            Verdict::Aborted => Error::RolledBack(RolledBack::FailedInside),
            _ => error.into(),
        };
        Err(Failed { stage: Stage::Refused, verdict, error })
    }

    /// Cleans up after a failure before COMMIT, and finds out what a read-only error was about.
    async fn failed(&mut self, mode: Mode, verdict: Verdict, error: Error) -> Failed {
        self.suspect();
        if self.is_shared() {
            // Whoever holds the handle would go on writing after our ROLLBACK, outside any transaction. So none is sent:
            // the session ends as it is, and all that was done in it with it.
            let own_doing = verdict == Verdict::ReadOnly;
            return Failed::before_commit(if own_doing { Verdict::Application } else { verdict }, error);
        }
        if verdict == Verdict::ReadOnly && mode != Mode::Read {
            let verdict = if self.server_is_read_only().await { verdict } else { Verdict::Application };
            return Failed::before_commit(verdict, error);
        }
        self.roll_back().await;
        let own_doing = verdict == Verdict::ReadOnly;
        Failed::before_commit(if own_doing { Verdict::Application } else { verdict }, error)
    }

    async fn roll_back(&mut self) {
        if !self.client.is_closed() {
            let rolled_back = timeout(ROLLBACK_WITHIN, self.client.batch_execute("ROLLBACK")).await;
            self.clean = matches!(rolled_back, Ok(Ok(())));
        }
    }

    /// Rolls back and asks the session itself: is this a standby, or a primary that is fenced? If not, the transaction
    /// had made itself read-only.
    async fn server_is_read_only(&mut self) -> bool {
        let asked = timeout(ROLLBACK_WITHIN, self.client.simple_query(ROLLBACK_AND_ROLE)).await;
        let Ok(Ok(messages)) = asked else {
            return true;
        };
        let read_only = messages.iter().any(|message| match message {
            SimpleQueryMessage::Row(row) => matches!(row.try_get(0), Ok(Some("t"))),
            _ => false,
        });
        if read_only {
            self.pool().suspect(self.client.generation(), Suspicion::ReadOnly);
        } else {
            self.clean = true;
        }
        read_only
    }

    /// A handle given to the closure is still alive.
    fn is_shared(&self) -> bool {
        Arc::strong_count(&self.client) > 1
    }

    /// A session that ended makes its server suspect; other errors say nothing about it.
    fn suspect(&self) {
        if self.client.is_closed() {
            self.pool().suspect(self.client.generation(), Suspicion::Connection);
        }
    }

    fn pool(&self) -> &Pool {
        self.client.pool()
    }
}

fn verdict_of(error: &Error) -> Verdict {
    match error {
        Error::Database(error) => classify(error),
        Error::Aborted(source) => verdict_of_own(source.as_ref()),
        _ => Verdict::Application,
    }
}

/// The closure's own error may hold a database error, which decides; or the error of another call of a pool, whose word on
/// running again stands: its outcome may be unknown, or its retries are used up.
fn verdict_of_own(error: &(dyn std::error::Error + 'static)) -> Verdict {
    let links = || std::iter::successors(Some(error), |error| error.source()).take(LINKS);
    if links().any(<dyn std::error::Error>::is::<InDoubt>) {
        return Verdict::Application;
    }
    match links().find_map(|link| link.downcast_ref::<Error>()) {
        Some(Error::Database(error)) => classify(error),
        Some(_) => Verdict::Application,
        None => classify_chain(error).unwrap_or(Verdict::Application),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As applications write them: `source()` leads past the wrapped error to what is behind it.
    #[derive(Debug, thiserror::Error)]
    enum App {
        #[error(transparent)]
        Pool(#[from] Error),
        #[error("application")]
        Named(#[source] Error),
    }

    /// The driver makes no error that others can construct; this one comes of a connection string.
    fn driver_error() -> tokio_postgres::Error {
        "host=h port=x".parse::<tokio_postgres::Config>().unwrap_err()
    }

    #[test]
    fn the_doubt_of_another_call_is_met_before_its_lost_connection() {
        for wrap in [App::Pool, App::Named] {
            let doubt = Error::CommitUnknown(Box::new(CommitUnknown::lost(driver_error())));
            let links: Vec<String> =
                std::iter::successors(Some(&wrap(doubt) as &dyn std::error::Error), |e| e.source())
                    .map(ToString::to_string)
                    .collect();
            assert!(links.iter().any(|link| link == "the outcome of a commit is not known"), "{links:?}");
            let doubt = Error::CommitUnknown(Box::new(CommitUnknown::lost(driver_error())));
            assert_eq!(verdict_of(&Error::abort(wrap(doubt))), Verdict::Application);
        }
    }

    #[test]
    fn a_database_error_within_an_own_one_decides() {
        let expected = classify(&driver_error());
        assert_ne!(expected, Verdict::Application, "the test needs a verdict that shows");
        for wrap in [App::Pool, App::Named] {
            assert_eq!(verdict_of(&Error::abort(wrap(Error::Database(driver_error())))), expected);
        }
        assert_eq!(verdict_of(&Error::abort("own")), Verdict::Application);
        assert_eq!(verdict_of(&Error::abort(App::Pool(Error::Closed))), Verdict::Application);
    }
}
