//! The loop: attempt, decide, wait, again. Carries out what `decide` says.

use std::error::Error as StdError;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::SimpleQueryMessage;
use tokio_postgres::error::{DbError, SqlState};
use tracing::{Instrument, Span};

use super::decide::{Mode, Next, Stage, decide};
use super::settle::{Mark, Outcome, Settler, settle};
use super::{Transaction, TransactionBuilder};
use crate::classify::{
    Verdict, classify, classify_chain, commit_refused, explain, links, not_offered, report_in_chain,
};
use crate::commit::ledger::{Ledger, entered};
use crate::commit::wal::{self, Marked, Marking};
use crate::commit::{Nonce, Unsettled};
use crate::error::{CommitOutcome, CommitUnknown, Error, Exhausted, InDoubt, RolledBack};
use crate::observe::Observer;
use crate::pool::{Client, Pool};
use crate::retry::{GiveUp, Retry};
use crate::server::SessionClient;
use crate::topology::{Suspicion, UNDISTURBED};

/// COMMIT turns into ROLLBACK, without an error, where the transaction had failed. A statement before it makes the
/// server say so, in the same message: 25P02. This one needs no planning.
const COMMIT: &str = "SHOW transaction_isolation; COMMIT";
/// In one message: undo, and ask the session whether its server takes writes at all.
fn rollback_and_role() -> String {
    format!(
        "ROLLBACK; {UNDISTURBED} SELECT pg_is_in_recovery() OR current_setting('default_transaction_read_only') = 'on'"
    )
}
/// Before a BEGIN without a mark, in the same message. What somebody left open on the session is rolled back, as it would be
/// with the session, and not committed by the COMMIT that is to come. The warning about it is not enough: a role's
/// `client_min_messages` may hide it, and the drivers of a wrapped pool are not ours. It has no effect on a clean session.
const CLEAN: &str = "BEGIN; ROLLBACK";
/// A session that does not answer its ROLLBACK within this is closed instead.
const ROLLBACK_WITHIN: Duration = Duration::from_secs(2);

pub(super) async fn run<C, T, F, Fut>(options: &TransactionBuilder<'_, C>, work: F) -> Result<T, Error>
where
    C: SessionClient,
    F: FnMut(Transaction<C>) -> Fut,
    Fut: Future<Output = Result<T, Error>>,
{
    let span = options.pool.observer().transaction(&options.mode());
    let result = attempts(options, &span, work).instrument(span.clone()).await;
    if let Err(error) = &result {
        Observer::transaction_failed(&span, error.code().map(SqlState::code), error.kind());
    }
    result
}

async fn attempts<C, T, F, Fut>(options: &TransactionBuilder<'_, C>, span: &Span, mut work: F) -> Result<T, Error>
where
    C: SessionClient,
    F: FnMut(Transaction<C>) -> Fut,
    Fut: Future<Output = Result<T, Error>>,
{
    let pool = options.pool;
    let mode = options.mode();
    let mut begin = options.begin();
    let mut retries = options.retry.start(Instant::now(), pool.next_seed());
    let mut doubt = false;
    loop {
        let (number, deadline) = (retries.attempt(), retries.deadline());
        let client = match pool.get_until(deadline).await {
            Ok(client) => client,
            Err(error) => return Err(for_good(error, number - 1, doubt)),
        };
        let generation = client.generation();
        let span = Observer::attempt(span, number, generation, client.watched());
        let attempt = Attempt { held: Held::new(client), limit: options.retry.attempt_limit() };
        let ended = async {
            match attempt.run(&begin, mode, &mut work).await {
                Ended::InDoubt(in_doubt) => {
                    // Whoever waits for a primary to settle with makes the pause at the same time.
                    retries.failed(Instant::now());
                    in_doubt.settled(pool, mode, deadline).await
                }
                ended => ended,
            }
        };
        let (stage, failed) = match ended.instrument(span).await {
            Ended::Committed(value) => {
                pool.budget().deposit();
                return Ok(value);
            }
            Ended::Failed(stage, failed) => (stage, failed),
            Ended::InDoubt(in_doubt) => (Stage::InDoubt, in_doubt.failed),
            Ended::Unknown(error) => return Err(error),
        };
        let Failed { verdict, error } = failed;
        let error = match error {
            // What wrote nothing was not committed either.
            Error::CommitUnknown(_) if mode == Mode::Read => evicted().1,
            error => error,
        };
        let users = if stage == Stage::InDoubt { None } else { report(&error) };
        let users = users.and_then(|report| options.retry.word_on(report));
        match decide(mode, stage, verdict, users) {
            Next::Settle | Next::Unknown => {
                pool.observer().not_settled(generation);
                return Err(unknown(error, Unsettled::NoMarker));
            }
            Next::Return => return Err(for_good(error, number, doubt)),
            Next::Rerun => {}
        }
        if stage == Stage::InDoubt && mode != Mode::Read {
            doubt = true;
            begin.marks = Marks::Write;
        }
        match retries.next(Instant::now(), pool.budget()) {
            Ok(delay) => {
                let outcome = if doubt { CommitOutcome::Unknown } else { CommitOutcome::NotCommitted };
                if !options.retry.allows(&Retry::new(&retries, &error, delay, outcome), pool.budget()) {
                    return Err(given_up(error, number, GiveUp::Hook, stage, doubt));
                }
                pool.observer().runs_again(number, verdict, delay, &error);
                sleep(delay).await;
            }
            Err(why) => return Err(given_up(error, number, why, stage, doubt)),
        }
    }
}

/// What a transaction begins with.
pub(super) struct Begin {
    pub(super) sql: String,
    pub(super) marks: Marks,
}

/// What is written along with BEGIN.
pub(super) enum Marks {
    Nothing,
    /// A mark that nobody asks for. It makes COMMIT wait for the synchronous standbys although the work may find itself
    /// done, and write nothing.
    Write,
    Wal,
    Ledger(Ledger),
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
        return if doubt && stage == Stage::InDoubt { unknown(error, Unsettled::NoMarker) } else { error };
    }
    let outcome = if doubt { CommitOutcome::Unknown } else { CommitOutcome::NotCommitted };
    Error::Exhausted(Box::new(Exhausted::new(attempts, why.to_string(), outcome, error)))
}

fn unknown(error: Error, why: Unsettled) -> Error {
    match error {
        Error::Database(source) => Error::CommitUnknown(Box::new(CommitUnknown::new(Some(source), why))),
        // It was not lost but left or not replicated, which is reason enough unless a settler found a better one.
        Error::CommitUnknown(unknown) if why != Unsettled::NoMarker => {
            Error::CommitUnknown(Box::new(unknown.because(why)))
        }
        other => other,
    }
}

/// How an attempt ended.
enum Ended<T> {
    Committed(T),
    Failed(Stage, Failed),
    InDoubt(Unanswered<T>),
    /// And nobody could tell.
    Unknown(Error),
}

struct Failed {
    verdict: Verdict,
    error: Error,
}

/// COMMIT was sent, and nothing came back that tells what became of it.
struct Unanswered<T> {
    value: T,
    mark: Option<Mark>,
    failed: Failed,
}

impl<T> Unanswered<T> {
    async fn settled<C: SessionClient>(self, pool: &Pool<C>, mode: Mode, deadline: Instant) -> Ended<T> {
        let (Next::Settle, Some(mark)) = (decide(mode, Stage::InDoubt, self.failed.verdict, None), &self.mark) else {
            return Ended::InDoubt(self);
        };
        let Failed { verdict, error } = self.failed;
        // Boxed, as it is rare and large, and every waiting call would carry it.
        match Box::pin(settle(pool, mark, deadline)).await {
            Ok(Outcome::Committed) => Ended::Committed(self.value),
            Ok(Outcome::NotCommitted) => {
                let error = match error {
                    Error::CommitUnknown(_) => Error::RolledBack(RolledBack::LostWithPrimary),
                    error => error,
                };
                Ended::Failed(Stage::Refused, Failed { verdict, error })
            }
            Err(why) => Ended::Unknown(unknown(error, why)),
        }
    }
}

impl<T> Ended<T> {
    fn before_commit(verdict: Verdict, error: impl Into<Error>) -> Self {
        Self::Failed(Stage::Body, Failed { verdict, error: error.into() })
    }
}

/// A connection whose session may be left in the midst of something. Unless it is known to be clean, dropping this closes
/// it: so a future that is dropped at any point, or a closure that panics, leaves no open transaction behind.
struct Held<C: SessionClient> {
    client: Arc<Client<C>>,
    clean: bool,
}

impl<C: SessionClient> Held<C> {
    fn new(client: Client<C>) -> Self {
        Self { client: Arc::new(client), clean: false }
    }

    fn client(&self) -> &Client<C> {
        &self.client
    }

    fn clean(&mut self, clean: bool) {
        self.clean = clean;
    }
}

impl<C: SessionClient> Drop for Held<C> {
    fn drop(&mut self) {
        if !self.clean {
            self.client.poison();
        }
    }
}

/// One connection during one attempt.
struct Attempt<C: SessionClient> {
    held: Held<C>,
    /// Time from BEGIN to COMMIT. Without one no timer is made, which each attempt would set and clear.
    limit: Option<Duration>,
}

impl<C: SessionClient> Attempt<C> {
    async fn run<T, F, Fut>(mut self, begin: &Begin, mode: Mode, work: &mut F) -> Ended<T>
    where
        F: FnMut(Transaction<C>) -> Fut,
        Fut: Future<Output = Result<T, Error>>,
    {
        let ended = tokio::select! {
            biased;
            ended = self.body(begin, work) => Ok(ended),
            cut = self.cut_off() => cut.map_or(Ok(Err(evicted())), Err),
        };
        match ended {
            Ok(Ok((value, mark))) => self.commit(value, mark, begin).await,
            Ok(Err((verdict, error))) => Ended::Failed(Stage::Body, self.failed(mode, verdict, error).await),
            Err(after) => {
                self.pool().suspect(self.client().generation(), Suspicion::Connection);
                Ended::before_commit(Verdict::Application, Error::TimedOut { after })
            }
        }
    }

    /// Waits for what ends a body before its time: the limit, or the eviction of its session.
    async fn cut_off(&self) -> Option<Duration> {
        let Some(limit) = self.limit else {
            self.client().evicted().await;
            return None;
        };
        timeout(limit, self.client().evicted()).await.is_err().then_some(limit)
    }

    /// BEGIN and the closure.
    async fn body<T, F, Fut>(&self, begin: &Begin, work: &mut F) -> Result<(T, Option<Mark>), (Verdict, Error)>
    where
        F: FnMut(Transaction<C>) -> Fut,
        Fut: Future<Output = Result<T, Error>>,
    {
        self.client().notices().forget();
        let mark = self.begin(begin).await.map_err(|error| {
            let verdict = match (verdict_of(&error), &error) {
                // Whoever had the connection before left a failed transaction on it; or it leads somewhere else by now.
                (Verdict::Aborted, _) | (_, Error::RolledBack(_)) => Verdict::ConnectionLost,
                (verdict, _) => verdict,
            };
            (verdict, error)
        })?;
        if self.client().notices().already_in_transaction() {
            // … or one that is open: its COMMIT is not ours to send. Nothing was done yet, so another connection will do.
            return Err((Verdict::ConnectionLost, Error::RolledBack(RolledBack::StrangeSession)));
        }
        let done = work(Transaction::new(Arc::clone(&self.held.client))).await;
        done.map(|value| (value, mark)).map_err(|error| (verdict_of(&error), error))
    }

    /// BEGIN and the mark, in one message.
    async fn begin(&self, begin: &Begin) -> Result<Option<Mark>, Error> {
        let client = self.client();
        let nonce = self.pool().next_nonce();
        let answer = match &begin.marks {
            Marks::Ledger(ledger) => wal::only_row(client, &format!("{}; {}", begin.sql, ledger.enter())).await,
            Marks::Wal | Marks::Write if self.can_be_marked() => self.mark(&begin.sql, nonce).await,
            Marks::Nothing | Marks::Wal | Marks::Write => {
                client.batch_execute(&format!("{CLEAN}; {}", begin.sql)).await?;
                return Ok(None);
            }
        };
        let row = match answer {
            Ok(row) => row,
            // What a standby does not offer either, like a serializable transaction, says nothing about the primary.
            Err(error) if !not_offered(&error) || classify(&error) == Verdict::ReadOnly => return Err(error.into()),
            Err(error) if matches!(begin.marks, Marks::Ledger(_)) => return Err(Error::Ledger(error)),
            Err(error) => {
                self.pool().set_unmarked(client.generation(), &explain(&error));
                client.batch_execute("ROLLBACK").await?;
                client.batch_execute(&begin.sql).await?;
                return Ok(None);
            }
        };
        let mark = |by, backend| Mark { by, backend, generation: client.generation(), life: client.life() };
        let read = match (&begin.marks, client.life()) {
            (Marks::Ledger(ledger), _) => match entered(&row) {
                Ok(Some((entered, backend))) => Ok(Some(mark(Settler::Ledger(ledger.clone(), entered), backend))),
                Ok(None) => return Err(Error::RolledBack(RolledBack::StrangeSession)),
                Err(bad) => Err(bad),
            },
            (_, Some(life)) => match wal::marker(&life, nonce, &row) {
                Ok(Marked::Elsewhere) => {
                    self.pool().suspect(client.generation(), Suspicion::Connection);
                    return Err(Error::RolledBack(RolledBack::OtherServer));
                }
                // A wrapped pool's session says so by no notice.
                Ok(Marked::Joined) => return Err(Error::RolledBack(RolledBack::StrangeSession)),
                Ok(Marked::By(marker, backend)) => Ok(Some(mark(Settler::Wal(marker), backend))),
                Ok(Marked::ReadOnly) => Ok(None),
                Err(bad) => Err(bad),
            },
            (_, None) => Ok(None),
        };
        Ok(read.unwrap_or_else(|bad| {
            self.pool().set_unmarked(client.generation(), &bad.to_string());
            None
        }))
    }

    async fn mark(&self, begin: &str, nonce: Nonce) -> Result<wal::Row, tokio_postgres::Error> {
        let client = self.client();
        let marking = client.marking();
        match wal::only_row(client, &marking.sql(begin, nonce)).await {
            Ok(row) => {
                if marking == Marking::New {
                    client.set_marking(Marking::Prepared);
                }
                Ok(row)
            }
            Err(error) if marking.failed(&error) => {
                client.set_marking(Marking::Plain);
                client.batch_execute("ROLLBACK").await?;
                wal::only_row(client, &Marking::Plain.sql(begin, nonce)).await
            }
            Err(error) => Err(error),
        }
    }

    fn can_be_marked(&self) -> bool {
        let (client, pool) = (self.client(), self.pool());
        if pool.is_unmarked(client.generation()) {
            return false;
        }
        if client.life().is_none() {
            pool.set_unmarked(client.generation(), "this role may not read the server's identity");
        }
        client.life().is_some()
    }

    async fn commit<T>(&mut self, value: T, mark: Option<Mark>, begin: &Begin) -> Ended<T> {
        if self.is_shared() {
            return Ended::before_commit(Verdict::Application, Error::RolledBack(RolledBack::HandleKept));
        }
        if self.client().is_evicted() {
            let (verdict, error) = evicted();
            return Ended::before_commit(verdict, error);
        }
        // On a session that has ended nothing is sent: then the transaction is certainly not committed.
        let never_sent = self.client().is_closed();
        let answer = tokio::select! {
            biased;
            answer = self.client().batch_execute(COMMIT) => answer,
            () = self.client().evicted() => {
                let error = Error::CommitUnknown(Box::new(CommitUnknown::evicted(Unsettled::NoMarker)));
                let failed = Failed { verdict: Verdict::ConnectionLost, error };
                return Ended::InDoubt(Unanswered { value, mark, failed });
            }
        };
        let Err(error) = answer else {
            self.held.clean(true);
            if self.client().notices().not_replicated() {
                let error = Error::CommitUnknown(Box::new(CommitUnknown::new(None, Unsettled::NotReplicated)));
                let failed = Failed { verdict: Verdict::OutcomeUnknown, error };
                return Ended::InDoubt(Unanswered { value, mark, failed });
            }
            self.prune(begin);
            return Ended::Committed(value);
        };
        self.suspect();
        let verdict = classify(&error);
        if never_sent {
            return Ended::before_commit(verdict, error);
        }
        if !commit_refused(&error) {
            return Ended::InDoubt(Unanswered { value, mark, failed: Failed { verdict, error: error.into() } });
        }
        self.roll_back().await;
        let error = match verdict {
            Verdict::Aborted => Error::RolledBack(RolledBack::FailedInside),
            _ => error.into(),
        };
        Ended::Failed(Stage::Refused, Failed { verdict, error })
    }

    /// From time to time, once the caller's work is done, on the connection that did it: in a task, so that nobody waits.
    /// The task ends with the session, and so with the pool.
    fn prune(&self, begin: &Begin) {
        let Marks::Ledger(ledger) = &begin.marks else {
            return;
        };
        if !self.pool().prunes(ledger) {
            return;
        }
        let (ledger, mut held) = (ledger.clone(), Held { client: Arc::clone(&self.held.client), clean: false });
        tokio::spawn(async move {
            let pruned = tokio::select! {
                biased;
                pruned = ledger.prune_all(held.client()) => pruned,
                () = held.client().evicted() => return,
            };
            held.clean(pruned.is_ok());
            match pruned {
                Ok(rows) => tracing::debug!(rows, "the ledger was pruned"),
                Err(error) => tracing::warn!("the ledger could not be pruned: {}", explain(&error)),
            }
        });
    }

    /// Cleans up after a failure before COMMIT, and finds out what a read-only error was about.
    async fn failed(&mut self, mode: Mode, verdict: Verdict, error: Error) -> Failed {
        self.suspect();
        let server_is_read_only = if self.is_shared() {
            // Whoever holds the handle would go on writing after our ROLLBACK, outside any transaction. So none is sent:
            // the session ends as it is, and all that was done in it with it.
            false
        } else if verdict == Verdict::ReadOnly && mode != Mode::Read {
            self.server_is_read_only().await
        } else {
            self.roll_back().await;
            false
        };
        let own_doing = verdict == Verdict::ReadOnly && !server_is_read_only;
        Failed { verdict: if own_doing { Verdict::Application } else { verdict }, error }
    }

    async fn roll_back(&mut self) {
        // One that is evicted is closed anyway, and its server may be frozen.
        if !self.client().is_closed() && !self.client().is_evicted() {
            let rolled_back = timeout(ROLLBACK_WITHIN, self.client().batch_execute("ROLLBACK")).await;
            self.held.clean(matches!(rolled_back, Ok(Ok(()))));
        }
    }

    /// Rolls back and asks the session itself: is this a standby, or a primary that is fenced? If not, the transaction
    /// had made itself read-only.
    async fn server_is_read_only(&mut self) -> bool {
        let asked = timeout(ROLLBACK_WITHIN, self.client().simple_query(&rollback_and_role())).await;
        let Ok(Ok(messages)) = asked else {
            return true;
        };
        let read_only = messages.iter().any(|message| match message {
            SimpleQueryMessage::Row(row) => matches!(row.try_get(0), Ok(Some("t"))),
            _ => false,
        });
        if read_only {
            self.pool().suspect(self.client().generation(), Suspicion::ReadOnly);
        } else {
            self.held.clean(true);
        }
        read_only
    }

    /// A handle given to the closure is still alive.
    fn is_shared(&self) -> bool {
        Arc::strong_count(&self.held.client) > 1
    }

    /// A session that ended makes its server suspect; other errors say nothing about it.
    fn suspect(&self) {
        if self.client().is_closed() {
            self.pool().suspect(self.client().generation(), Suspicion::Connection);
        }
    }

    fn client(&self) -> &Client<C> {
        self.held.client()
    }

    fn pool(&self) -> &Pool<C> {
        self.client().pool()
    }
}

/// The generation ended, and the session with it, although no driver of ours could say so.
fn evicted() -> (Verdict, Error) {
    (Verdict::ConnectionLost, Error::RolledBack(RolledBack::LostWithPrimary))
}

fn verdict_of(error: &Error) -> Verdict {
    match error {
        Error::Database(error) => classify(error),
        Error::Aborted(source) => {
            let own = of_own(source.as_ref(), |error| Some(classify(error)), classify_chain);
            own.unwrap_or(Verdict::Application)
        }
        _ => Verdict::Application,
    }
}

/// What the server reported of this call, if anything: never of another call of a pool, whose word stands.
fn report(error: &Error) -> Option<&DbError> {
    match error {
        Error::Database(error) => error.as_db_error(),
        Error::Aborted(source) => of_own(source.as_ref(), tokio_postgres::Error::as_db_error, report_in_chain),
        _ => None,
    }
}

/// The closure's own error may hold a database error, which decides; or the error of another call of a pool, whose word on
/// running again stands: its outcome may be unknown, or its retries are used up.
fn of_own<'a, T>(
    error: &'a (dyn StdError + 'static),
    of_driver: impl FnOnce(&'a tokio_postgres::Error) -> Option<T>,
    of_chain: impl FnOnce(&'a (dyn StdError + 'static)) -> Option<T>,
) -> Option<T> {
    if links(error).any(<dyn StdError>::is::<InDoubt>) {
        return None;
    }
    match links(error).find_map(|link| link.downcast_ref::<Error>()) {
        Some(Error::Database(error)) => of_driver(error),
        Some(_) => None,
        None => of_chain(error),
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
            let doubt = Error::CommitUnknown(Box::new(CommitUnknown::new(Some(driver_error()), Unsettled::NoMarker)));
            let links: Vec<String> = links(&wrap(doubt)).map(ToString::to_string).collect();
            assert!(links.iter().any(|link| link == "the outcome of a commit is not known"), "{links:?}");
            let doubt = Error::CommitUnknown(Box::new(CommitUnknown::new(Some(driver_error()), Unsettled::NoMarker)));
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
