//! The loop: attempt, decide, wait, again. Carries out what `decide` says.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::error::SqlState;
use tracing::{Instrument, Span};

use super::decide::{Mode, Next, Stage, decide};
use super::earlier::{Earlier, Lost, committed_inside, find, shows_primary, unless_denied};
use super::finish::{Answer, Known, OPEN, Proof, Undone, ending};
use super::nested::{self, Inner};
use super::settle::{Mark, Outcome, Settler, settle};
use super::streams::is_free;
use super::verdict::{Bounds, Session, Word, judge_begin, with_reason};
use super::{Transaction, TransactionBuilder};
use crate::classify::{Cure, Verdict, classify, explain, not_offered};
use crate::commit::ledger::{Entering, Ledger, entered};
use crate::commit::wal::{self, Marked, Marking};
use crate::commit::{Nonce, Signature, Unsettled};
use crate::error::{CommitOutcome, CommitUnknown, EndedInside, Ending, Error, Exhausted, RolledBack};
use crate::observe::Observer;
use crate::pool::{Check, Client, Pool, Signing};
use crate::retry::{GiveUp, Retry, RetryPolicy};
use crate::server::SessionClient;
use crate::topology::{Suspicion, UNDISTURBED};

/// Asks the session whether its server takes writes at all: a new transaction is read-only in recovery, or because new ones
/// are. Needs no right.
fn role() -> String {
    format!("{UNDISTURBED} SHOW transaction_read_only")
}
/// Before a BEGIN without a mark, in the same message. What somebody left open on the session is rolled back, as it would be
/// with the session, and not committed by the COMMIT that is to come. The warning about it is not enough: a role's
/// `client_min_messages` may hide it, and the drivers of a wrapped pool are not ours. It has no effect on a clean session.
const CLEAN: &str = "BEGIN; ROLLBACK";
/// A session that does not answer its ROLLBACK within this is closed instead.
pub(super) const ROLLBACK_WITHIN: Duration = Duration::from_secs(2);

pub(super) async fn run<C, T, F, Fut>(options: TransactionBuilder<'_, C>, work: F) -> Result<T, Error>
where
    C: SessionClient,
    F: FnMut(Transaction<C>) -> Fut,
    Fut: Future<Output = Result<T, Error>>,
{
    let span = options.pool.observer().transaction(&options.mode());
    let inner = (options.mode() != Mode::Read).then(Inner::begin);
    let result = attempts(&options, &span, work).instrument(span.clone()).await;
    if let Some(inner) = inner {
        inner.ended(result.as_ref().is_err_and(|error| error.commit_outcome() != CommitOutcome::NotCommitted));
    }
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
    let mut lost = Vec::new();
    let mut bounds = Bounds::default();
    let mut earlier = Vec::new();
    loop {
        let (number, deadline) = (retries.attempt(), retries.deadline());
        let client = match pool.get_for_transaction(deadline).await {
            Ok(client) => client,
            Err(error) => {
                let error = for_good(error, number - 1, doubt);
                return Err(unless_denied(&earlier, |id| pool.is_current(id), error));
            }
        };
        if let Some(error) = committed_inside(&client, &mut lost).await {
            return Err(for_good(error, number - 1, doubt));
        }
        let generation = client.generation();
        match find(pool, &mut earlier, generation, deadline).await {
            Ok(None) => {}
            Ok(Some(value)) => {
                pool.budget().deposit();
                return Ok(value);
            }
            Err(why) => return Err(Error::CommitUnknown(Box::new(CommitUnknown::earlier(why)))),
        }
        let mut mark = None;
        let fresh_after = client.fresh_after();
        if bounds.met_stale() {
            client.trail().heal(Cure::Clear);
        }
        let span = Observer::attempt(span, number, generation, client.watched());
        let attempt = Attempt {
            statements: client.trail().has_statements(),
            held: Held::new(client),
            limit: options.retry.attempt_limit(),
            mark: OnceLock::new(),
            begun: AtomicBool::new(false),
            check: options.pool.check(),
        };
        let ended = async {
            match attempt.run(&begin, mode, &mut work, &mut mark).await {
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
            Ended::Absent(attempt, failed) => {
                earlier.push(attempt);
                (Stage::Refused, failed)
            }
            Ended::InDoubt(in_doubt) => (Stage::InDoubt, in_doubt.failed),
            Ended::Unknown(error) => return Err(error),
        };
        let Failed { verdict, error, session } = failed;
        let end = if let Session::Ended(report) = &session { report.as_ref() } else { None };
        let verdict = bounds.narrow(verdict, end, generation, fresh_after);
        let error = match error {
            // What wrote nothing was not committed either.
            Error::CommitUnknown(_) if mode == Mode::Read => evicted().1,
            error => error,
        };
        let users = if stage == Stage::InDoubt { None } else { users_word(&options.retry, &error, &session) };
        let error = with_reason(error, verdict, session);
        let ended = |error| unless_denied(&earlier, |id| id == generation && shows_primary(verdict), error);
        match decide(mode, stage, verdict, users) {
            Next::Settle | Next::Unknown => {
                pool.observer().not_settled(generation);
                return Err(unknown(error, Unsettled::NoMarker));
            }
            Next::Return => return Err(ended(for_good(error, number, doubt))),
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
                    return Err(ended(given_up(error, number, GiveUp::Hook, stage, doubt)));
                }
                pool.observer().runs_again(number, verdict, delay, &error);
                sleep(delay).await;
                lost.extend(mark.map(|mark| Lost::new(mark, error)));
            }
            Err(why) => return Err(ended(given_up(error, number, why, stage, doubt))),
        }
    }
}

/// What a transaction begins with.
pub(super) struct Begin {
    pub(super) sql: String,
    /// The same where no mark will tell the transaction from another.
    pub(super) unmarked: String,
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
    /// COMMIT was sent, and the primary's history does not have it.
    Absent(Earlier<T>, Failed),
    /// And nobody could tell.
    Unknown(Error),
}

pub(super) struct Failed {
    pub(super) verdict: Verdict,
    pub(super) error: Error,
    /// How the session was found, where the closure had failed.
    pub(super) session: Session,
}

impl Failed {
    fn new(verdict: Verdict, error: impl Into<Error>) -> Self {
        Self { verdict, error: error.into(), session: Session::Open }
    }
}

/// COMMIT was sent, and nothing came back that tells what became of it.
struct Unanswered<T> {
    value: T,
    mark: Option<Mark>,
    failed: Failed,
}

impl<T> Unanswered<T> {
    async fn settled<C: SessionClient>(self, pool: &Pool<C>, mode: Mode, deadline: Instant) -> Ended<T> {
        if decide(mode, Stage::InDoubt, self.failed.verdict, None) != Next::Settle {
            return Ended::InDoubt(self);
        }
        let Self { value, mark: Some(mark), failed } = self else { return Ended::InDoubt(self) };
        let Failed { verdict, error, .. } = failed;
        // Boxed, as it is rare and large, and every waiting call would carry it.
        match Box::pin(settle(pool, &mark, deadline)).await {
            Ok((Outcome::Committed, _)) => Ended::Committed(value),
            Ok((Outcome::NotCommitted, absent_from)) => {
                let error = match error {
                    Error::CommitUnknown(_) => Error::RolledBack(RolledBack::LostWithPrimary),
                    error => error,
                };
                Ended::Absent(Earlier { mark, value, absent_from }, Failed::new(verdict, error))
            }
            Err(why) => Ended::Unknown(unknown(error, why)),
        }
    }
}

impl<T> Ended<T> {
    fn before_commit(verdict: Verdict, error: impl Into<Error>) -> Self {
        Self::Failed(Stage::Body, Failed::new(verdict, error))
    }
}

/// A connection whose session may be left in the midst of something. Unless it is known to be clean, dropping this closes
/// it: so a future that is dropped at any point, or a closure that panics, leaves no open transaction behind.
pub(super) struct Held<C: SessionClient> {
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

    pub(super) fn clean(&mut self, clean: bool) {
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
pub(super) struct Attempt<C: SessionClient> {
    pub(super) held: Held<C>,
    /// Time from BEGIN to COMMIT. Without one no timer is made, which each attempt would set and clear.
    limit: Option<Duration>,
    /// By what the transaction can be asked for, once it has begun.
    mark: OnceLock<Mark>,
    /// The closure was run.
    begun: AtomicBool,
    /// The session had prepared statements when the attempt began.
    pub(super) statements: bool,
    /// How COMMIT looks for the transaction.
    check: Check,
}

/// Why a body gave nothing to commit.
enum Fault {
    /// Something befell it before its closure ran, or from outside.
    Met(Verdict, Error),
    /// The closure failed.
    Closure(Error),
}

impl<C: SessionClient> Attempt<C> {
    /// `lost` gets the mark of an attempt whose session ended before COMMIT was sent.
    async fn run<T, F, Fut>(mut self, begin: &Begin, mode: Mode, work: &mut F, lost: &mut Option<Mark>) -> Ended<T>
    where
        F: FnMut(Transaction<C>) -> Fut,
        Fut: Future<Output = Result<T, Error>>,
    {
        let ended = tokio::select! {
            biased;
            ended = self.body(begin, work) => Ok(ended),
            cut = self.cut_off() => cut.map_or_else(
                || {
                    let (verdict, error) = evicted();
                    Ok(Err(Fault::Met(verdict, error)))
                },
                Err,
            ),
        };
        match ended {
            Ok(Ok(value)) => self.commit(value, mode, begin, lost).await,
            Ok(Err(fault)) => {
                let failed = match fault {
                    Fault::Met(verdict, error) => self.cleaned_up(mode, Failed::new(verdict, error)).await,
                    Fault::Closure(error) => self.closure_failed(mode, error).await,
                };
                if failed.verdict.is_loss() || self.client().is_closed() || self.client().is_evicted() {
                    *lost = self.mark.take();
                }
                Ended::Failed(Stage::Body, failed)
            }
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
    async fn body<T, F, Fut>(&self, begin: &Begin, work: &mut F) -> Result<T, Fault>
    where
        F: FnMut(Transaction<C>) -> Fut,
        Fut: Future<Output = Result<T, Error>>,
    {
        self.client().notices().forget();
        self.client().trail().forget();
        let mark = self.begin(begin).await.map_err(|error| Fault::Met(judge_begin(&error), error))?;
        self.pool().heard(self.client().generation());
        if self.client().notices().already_in_transaction() {
            // Its COMMIT is not ours to send. Nothing was done yet, so another connection will do.
            let strange = Error::RolledBack(RolledBack::StrangeSession);
            return Err(Fault::Met(Verdict::ConnectionLost, strange));
        }
        if let Some(mark) = mark {
            // There is none yet: an attempt begins once.
            let _ = self.mark.set(mark);
        }
        self.begun.store(true, Ordering::Relaxed);
        self.client().trail().forget();
        let trail = Arc::clone(self.client().trail());
        let mut work = pin!(self.pool().holding(work(Transaction::new(Arc::clone(&self.held.client)))));
        let done = poll_fn(|context| nested::poll_within(&trail, work.as_mut(), context)).await;
        done.map_err(Fault::Closure)
    }

    /// BEGIN and the mark, in one message.
    async fn begin(&self, begin: &Begin) -> Result<Option<Mark>, Error> {
        let client = self.client();
        let nonce = self.pool().next_nonce();
        let signature =
            if matches!(begin.marks, Marks::Wal) && self.can_be_marked() { self.signature().await? } else { None };
        let answer = match &begin.marks {
            Marks::Ledger(ledger) => wal::only_row(client, &format!("{}; {}", begin.sql, ledger.enter())).await,
            Marks::Wal | Marks::Write if self.can_be_marked() => self.mark(&begin.sql, nonce).await,
            Marks::Nothing | Marks::Wal | Marks::Write => {
                client.batch_execute(&format!("{CLEAN}; {}", begin.unmarked)).await?;
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
                client.batch_execute(&begin.unmarked).await?;
                return Ok(None);
            }
        };
        let mark = |by, backend| {
            let signature = signature.clone();
            Mark { by, backend, generation: client.generation(), life: client.life(), signature }
        };
        let read = match (&begin.marks, client.life()) {
            (Marks::Ledger(ledger), life) => match entered(life.as_ref(), &row) {
                Ok(Entering::As(entered, backend)) => Ok(Some(mark(Settler::Ledger(ledger.clone(), entered), backend))),
                Ok(Entering::Elsewhere) => return Err(self.elsewhere()),
                Ok(Entering::Joined) => return Err(Error::RolledBack(RolledBack::StrangeSession)),
                Err(bad) => Err(bad),
            },
            (_, Some(life)) => match wal::marker(&life, nonce, &row) {
                Ok(Marked::Elsewhere) => return Err(self.elsewhere()),
                // A wrapped pool's session says so by no notice.
                Ok(Marked::Joined) => return Err(Error::RolledBack(RolledBack::StrangeSession)),
                Ok(Marked::By(marker, backend)) => Ok(Some(mark(Settler::Wal(marker), backend))),
                Ok(Marked::ReadOnly) => Ok(None),
                Err(bad) => Err(bad),
            },
            (_, None) => Ok(None),
        };
        let mark = read.unwrap_or_else(|bad| {
            self.pool().set_unmarked(client.generation(), &bad.to_string());
            None
        });
        if mark.is_none() || self.check == Check::ByShow {
            client.batch_execute(OPEN).await?;
        }
        Ok(mark)
    }

    /// A proxy has led the transaction to another server than the one that its session was verified with.
    fn elsewhere(&self) -> Error {
        self.pool().suspect(self.client().generation(), Suspicion::Connection);
        Error::RolledBack(RolledBack::OtherServer)
    }

    /// What the timeline is signed with, by which a successor shows that it continues it. The first of all continues nothing
    /// else. The first transaction of the pool on a primary signs; those that begin at the same time go without.
    async fn signature(&self) -> Result<Option<Arc<Signature>>, Error> {
        let (client, pool) = (self.client(), self.pool());
        let Some(life) = client.life().filter(|life| life.server.timeline > 1) else { return Ok(None) };
        match pool.signature(client.generation()) {
            Signing::Done(signature) => return Ok(signature),
            Signing::Yours => {}
        }
        match wal::sign(client, &life, pool.next_seed()).await {
            Ok(signature) => {
                let signature = signature.map(Arc::new);
                pool.set_signature(client.generation(), signature.clone());
                Ok(signature)
            }
            Err(error) if error.as_db_error().is_some() && !client.is_closed() => {
                tracing::debug!("the timeline could not be signed: {}", explain(&error));
                client.batch_execute("ROLLBACK").await?;
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
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
            let why = "this role may not read the server's identity: its system identifier, start time and timeline";
            pool.set_unmarked(client.generation(), why);
        }
        client.life().is_some()
    }

    async fn commit<T>(&mut self, value: T, mode: Mode, begin: &Begin, lost: &mut Option<Mark>) -> Ended<T> {
        if self.is_shared() {
            return Ended::before_commit(Verdict::Application, Error::RolledBack(RolledBack::HandleKept));
        }
        if self.client().has_streamed() && !is_free(self.client()).await {
            return Ended::before_commit(Verdict::Application, Error::RolledBack(RolledBack::StreamKept));
        }
        if self.client().is_evicted() {
            *lost = self.mark.take();
            let (verdict, error) = evicted();
            return Ended::before_commit(verdict, error);
        }
        // On a session that has ended nothing is sent: then the transaction is certainly not committed.
        let never_sent = self.client().is_closed();
        let known = self.known(mode);
        let (sql, mark) = (known.commit(self.check), self.mark.take());
        self.client().set_committing(true);
        let answer = tokio::select! {
            biased;
            answer = Answer::to(self.client(), &sql) => answer,
            () = self.client().evicted() => {
                let error = Error::CommitUnknown(Box::new(CommitUnknown::evicted(Unsettled::NoMarker)));
                let failed = Failed::new(Verdict::ConnectionLost, error);
                return Ended::InDoubt(Unanswered { value, mark, failed });
            }
        };
        let proof = known.proof(self.check, &answer);
        self.client().set_committing(proof == Proof::Nothing);
        match (proof, answer.error) {
            (Proof::Committed { answered }, _) => {
                self.held.clean(answered);
                if self.client().notices().not_replicated() {
                    let error = Error::CommitUnknown(Box::new(CommitUnknown::new(None, Unsettled::NotReplicated)));
                    let failed = Failed::new(Verdict::OutcomeUnknown, error);
                    return Ended::InDoubt(Unanswered { value, mark, failed });
                }
                if answered {
                    self.prune(begin);
                }
                Ended::Committed(value)
            }
            (Proof::NotOurs { .. }, _) => {
                let ending = self.ended_before(known).await;
                Ended::before_commit(Verdict::Application, EndedInside::error(ending, None))
            }
            (_, None) => Ended::Committed(value),
            (Proof::Unchecked, Some(error)) => {
                self.pool().check_refused(self.check, &explain(&error));
                self.undo(Some(known), None).await;
                Ended::Failed(Stage::Refused, Failed::new(Verdict::Conflict, error))
            }
            (Proof::Refused { over }, Some(error)) => {
                Ended::Failed(Stage::Refused, self.commit_refused(known, over, error).await)
            }
            (Proof::Nothing, Some(error)) => {
                self.suspect();
                if never_sent {
                    *lost = mark;
                    return Ended::Failed(Stage::Body, self.ended_before_commit(error.into()).await);
                }
                let failed = Failed::new(classify(&error), error);
                Ended::InDoubt(Unanswered { value, mark, failed })
            }
        }
    }

    /// `over`: the transaction is rolled back already.
    async fn commit_refused(&mut self, known: Known, over: bool, error: tokio_postgres::Error) -> Failed {
        self.suspect();
        let verdict = classify(&error);
        let undone = if over {
            self.roll_back().await;
            Undone::Here
        } else {
            self.undo(Some(known), None).await.0
        };
        let failed = match verdict {
            Verdict::Aborted => self.failed_inside().await,
            _ => Failed::new(verdict, error),
        };
        undone.explains(failed)
    }

    fn known(&self, mode: Mode) -> Known {
        match self.mark.get() {
            Some(mark) => Known::ById(mark.backend.xid),
            None if mode == Mode::Read => Known::ByShow,
            None => Known::BySetting,
        }
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
            // Each statement commits by itself.
            held.client().set_committing(true);
            let pruned = tokio::select! {
                biased;
                pruned = ledger.prune_all(held.client()) => pruned,
                () = held.client().evicted() => return,
            };
            held.clean(pruned.is_ok());
            held.client().set_committing(pruned.is_err());
            match pruned {
                Ok(rows) => tracing::debug!(rows, "the ledger was pruned"),
                Err(error) => tracing::warn!("the ledger could not be pruned: {}", explain(&error)),
            }
        });
    }

    /// Cleans up after a failure before COMMIT, and finds out what a read-only error was about.
    pub(super) async fn cleaned_up(&mut self, mode: Mode, failed: Failed) -> Failed {
        self.suspect();
        if self.is_shared() {
            // Whoever holds the handle would go on writing after our ROLLBACK, outside any transaction. So none is sent:
            // the session ends as it is, and all that was done in it with it.
            return own_doing(failed, false);
        }
        if failed.verdict.is_loss() {
            // Of a session that lives on behind a proxy. It leads to another one by now, which knows nothing of this work.
            self.roll_back().await;
            return failed;
        }
        let role = (failed.verdict == Verdict::ReadOnly && mode != Mode::Read).then(role);
        let known = self.begun.load(Ordering::Relaxed).then(|| self.known(mode));
        let (undone, server_is_read_only) = self.undo(known, role.as_deref()).await;
        undone.explains(own_doing(failed, server_is_read_only))
    }

    pub(super) async fn roll_back(&mut self) {
        // One that is evicted is closed anyway, and its server may be frozen. Nor is it sent twice.
        if !self.held.clean && !self.client().is_closed() && !self.client().is_evicted() {
            let rolled_back = timeout(ROLLBACK_WITHIN, self.client().batch_execute("ROLLBACK")).await;
            self.held.clean(matches!(rolled_back, Ok(Ok(()))));
        }
    }

    /// Asks a session without a transaction: is this a standby, or a primary that is fenced? One that does not answer counts
    /// as one of these.
    pub(super) async fn server_is_read_only(&mut self) -> bool {
        self.held.clean(false);
        let Ok(answer) = timeout(ROLLBACK_WITHIN, Answer::to(self.client(), &role())).await else {
            return true;
        };
        let read_only = answer.values.first().is_none_or(|value| value.as_deref() != Some("off"));
        if read_only {
            self.pool().suspect(self.client().generation(), Suspicion::ReadOnly);
        } else {
            self.held.clean(answer.error.is_none());
        }
        read_only
    }

    /// Rolls back, and finds out whether the closure had done so before, or committed. `None`: it was not run.
    ///
    /// With `role`, also asks the session itself: is this a standby, or a primary that is fenced? If not, the transaction
    /// had made itself read-only. One that does not answer counts as read-only.
    async fn undo(&mut self, known: Option<Known>, role: Option<&str>) -> (Undone, bool) {
        // One that is evicted is closed anyway, and its server may be frozen.
        if self.client().is_closed() || self.client().is_evicted() {
            return (Undone::Unanswered, role.is_some());
        }
        let sql = Known::roll_back(known, role);
        let Ok(mut answer) = timeout(ROLLBACK_WITHIN, Answer::to(self.client(), &sql)).await else {
            return (Undone::Unanswered, role.is_some());
        };
        let asked_status = answer.error.is_none() && known.is_some_and(|known| known.status().is_some());
        let status = if asked_status { answer.values.pop().flatten() } else { None };
        let undone = match (Known::undone(&answer, status.as_deref()), known) {
            (Some(undone), _) => undone,
            (None, None) => Undone::Unanswered,
            (None, Some(known)) => return (Undone::Before(self.ended_before(known).await), false),
        };
        self.held.clean(answer.error.is_none() || answer.left_idle());
        let read_only = role.is_some() && answer.values.first().is_none_or(|value| value.as_deref() != Some("off"));
        if read_only {
            self.held.clean(false);
            self.pool().suspect(self.client().generation(), Suspicion::ReadOnly);
        }
        (undone, read_only)
    }

    /// How the closure has ended its transaction, once it is known that it did. Rolls back what it may have begun since.
    async fn ended_before(&mut self, known: Known) -> Ending {
        let sql = known.status().map_or_else(|| "ROLLBACK".to_owned(), |status| format!("ROLLBACK; {status}"));
        let Ok(answer) = timeout(ROLLBACK_WITHIN, Answer::to(self.client(), &sql)).await else {
            return Ending::Unknown;
        };
        self.held.clean(answer.error.is_none());
        ending(answer.values.first().and_then(Option::as_deref))
    }

    /// A handle given to the closure is still alive.
    pub(super) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.held.client) > 1
    }

    /// A session that ended makes its server suspect; other errors say nothing about it.
    pub(super) fn suspect(&self) {
        if self.client().is_closed() {
            self.pool().suspect(self.client().generation(), Suspicion::Connection);
        }
    }

    pub(super) fn client(&self) -> &Client<C> {
        self.held.client()
    }

    fn pool(&self) -> &Pool<C> {
        self.client().pool()
    }
}

/// A transaction that had made itself read-only fails by its own doing.
fn own_doing(failed: Failed, server_is_read_only: bool) -> Failed {
    match failed.verdict {
        Verdict::ReadOnly if !server_is_read_only => Failed { verdict: Verdict::Application, ..failed },
        _ => failed,
    }
}

impl Undone {
    /// The closure's own end of its transaction says more than the error that it met afterwards.
    fn explains(self, failed: Failed) -> Failed {
        match self {
            Self::Before(ending) => {
                let error = EndedInside::error(ending, Some(failed.error));
                Failed::new(Verdict::Application, error)
            }
            Self::Here | Self::Unanswered => failed,
        }
    }
}

/// The generation ended, and the session with it, although no driver of ours could say so.
fn evicted() -> (Verdict, Error) {
    (Verdict::ConnectionLost, Error::RolledBack(RolledBack::LostWithPrimary))
}

/// The user's word on what the server reported of this attempt, to the closure or past it.
fn users_word(policy: &RetryPolicy, error: &Error, session: &Session) -> Option<bool> {
    let word = Word::of(error);
    if matches!(word, Word::OtherCall) && !matches!(error, Error::RolledBack(RolledBack::FailedInside)) {
        return None;
    }
    let asked = word.report().and_then(|report| policy.word_on(report));
    asked.or_else(|| session.report().and_then(|report| policy.word_on(report)))
}
