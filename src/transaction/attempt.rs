//! One attempt on one connection: BEGIN, the closure, COMMIT.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::Transaction;
use super::begin::{Begin, MarkKind, Travelling};
use super::closures::ClosuresEnd;
use super::decide::{Mode, Stage};
use super::earlier::Unsent;
use super::ended::{Ended, Failed};
use super::finish::{Answer, CommitProof, Known, Look, Undone};
use super::nested::{self, InnerDoubt};
use super::settle::SettleKey;
use super::streams::{all_is_answered, answers, is_answering, is_free};
use super::verdict::{evicted, judge_absent, judge_begin};
use crate::classify::{Verdict, classify, explain};
use crate::commit::{Nonce, Unsettled};
use crate::error::{CommitUnknown, EndedInside, Ending, Error, RolledBack};
use crate::pool::{Check, Client, Pool};
use crate::server::{Activity, SessionClient};
use crate::settle::wal::MarkStatement;
use crate::topology::Suspicion;

/// The connection of an attempt. Dropping this closes the connection unless `clean` was set. So a future that is
/// dropped at any point, or a closure that panics, leaves no open transaction behind.
pub(super) struct DirtyGuard<C: SessionClient> {
    client: Arc<Client<C>>,
    pub(super) clean: bool,
}

impl<C: SessionClient> DirtyGuard<C> {
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

impl<C: SessionClient> Drop for DirtyGuard<C> {
    fn drop(&mut self) {
        if !self.clean && !planted!("gives back what is within a transaction") {
            self.client.poison();
        }
    }
}

/// One connection during one attempt.
pub(super) struct Attempt<C: SessionClient> {
    pub(super) held: DirtyGuard<C>,
    /// The time limit from BEGIN until COMMIT is sent. `None` saves the attempt from setting and clearing a timer.
    limit: Option<Duration>,
    /// The mark by which the transaction can be found later. Set once the transaction has begun.
    pub(super) mark: OnceLock<SettleKey>,
    /// When the closure has started.
    pub(super) began: OnceLock<Instant>,
    /// The transaction could not write when it began, although the call may write: a fence, or a standby.
    pub(super) began_read_only: OnceLock<()>,
    /// How the closure has ended the transaction, when that was last looked at.
    pub(super) closures: ClosuresEnd,
    /// Set if the pool reads every answer that the closure gets, and has seen that the session had no transaction
    /// before BEGIN. Then these answers show what becomes of the transaction.
    pub(super) answers_tell: OnceLock<()>,
    /// Set if BEGIN travels with the closure's first request.
    pub(super) travelling: OnceLock<Travelling>,
    /// The session had prepared statements when the attempt began.
    pub(super) statements: bool,
    /// How COMMIT checks for the transaction.
    pub(super) check: Check,
    /// The value that `remember` in `finish` writes if COMMIT cannot look for the transaction's id.
    pub(super) run: Nonce,
    /// Whether the outcome of a call within the closure is unknown.
    inner: InnerDoubt,
}

/// Why an attempt does not reach COMMIT.
enum Fault {
    /// BEGIN failed, or the session was evicted.
    Session(Verdict, Error),
    /// BEGIN has travelled and failed. The closure's error, if it returned one.
    NotBegun(Option<Error>),
    /// The closure failed.
    Closure(Error),
    Kept(RolledBack),
}

impl<C: SessionClient> Attempt<C> {
    pub(super) fn new(client: Client<C>, limit: Option<Duration>, inner: InnerDoubt) -> Self {
        Self {
            statements: client.trail().has_statements(),
            check: client.pool().lacking().check(),
            run: client.pool().next_nonce(),
            held: DirtyGuard::new(client),
            limit,
            mark: OnceLock::new(),
            began: OnceLock::new(),
            began_read_only: OnceLock::new(),
            closures: ClosuresEnd::NotSent,
            answers_tell: OnceLock::new(),
            travelling: OnceLock::new(),
            inner,
        }
    }

    /// `lost` receives the transaction if the pool's COMMIT did not run and the server did not confirm a rollback. The
    /// closure may have committed that transaction by itself, so a primary is asked about it.
    pub(super) async fn run<T, F, Fut>(
        mut self,
        begin: &Begin,
        mode: Mode,
        work: &mut F,
        lost: &mut Option<Unsent>,
    ) -> Ended<T>
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
                    Ok(Err(Fault::Session(verdict, error)))
                },
                Err,
            ),
        };
        let ended = match ended {
            Ok(Ok(value)) => self.commit(value, mode, begin, lost).await,
            Ok(Err(fault)) => self.faulted(fault, mode, lost).await,
            Err(after) => {
                self.client().suspect(Suspicion::Connection);
                self.sever().await;
                let failed = Failed::new(Verdict::Application, Error::TimedOut { after });
                self.not_committed(Stage::Body, failed, lost)
            }
        };
        // ROLLBACK may have been the first request. The next user's transaction has an opening of its own.
        self.learn_mark();
        let answered = self.held.clean || self.is_shared();
        match ended {
            Ended::Failed(stage, failed) => Ended::Failed(stage, Failed { answered, ..failed }),
            ended => ended,
        }
    }

    /// Judges an attempt that has not reached COMMIT.
    async fn faulted<T>(&mut self, fault: Fault, mode: Mode, lost: &mut Option<Unsent>) -> Ended<T> {
        if !matches!(fault, Fault::NotBegun(_)) {
            self.wait_for_closures_end().await;
        }
        let failed = match fault {
            // Nothing was carried out, so nothing is rolled back, and nobody is asked about anything.
            Fault::NotBegun(error) => return Ended::Failed(Stage::Body, self.not_begun(error)),
            Fault::Session(verdict, error) => self.cleaned_up(mode, Failed::new(verdict, error)).await,
            Fault::Closure(error) => self.closure_failed(mode, error).await,
            // The session is closed, and so cannot be asked.
            Fault::Kept(kept) => Failed::new(Verdict::Application, Error::RolledBack(kept)),
        };
        if self.is_shared() {
            self.sever().await;
        }
        self.not_committed(Stage::Body, failed, lost)
    }

    /// What passes on the session, if its answers show what becomes of the transaction.
    pub(super) fn telling(&self) -> Option<&Activity> {
        self.client().watched_activity().filter(|_| self.do_answers_tell())
    }

    /// Returns whether the answers that the closure gets show what becomes of the transaction.
    pub(super) fn do_answers_tell(&self) -> bool {
        self.answers_tell.get().is_some()
    }

    /// Returns whether the answers show that the pool's transaction is open.
    fn is_shown_by_answers(&self) -> bool {
        self.telling().is_some_and(|activity| activity.is_quiet_in_transaction() && !activity.has_rolled_back_unseen())
    }

    /// Returns whether the last answer on a session that is watched says that a transaction is open.
    fn is_in_transaction(&self) -> bool {
        self.client().watched_activity().is_none_or(Activity::in_transaction)
    }

    pub(super) fn has_begun(&self) -> bool {
        self.began.get().is_some()
    }

    /// Returns what the closure has kept, if that makes COMMIT impossible.
    async fn kept(&self) -> Option<RolledBack> {
        if self.is_shared() {
            return Some(RolledBack::HandleKept);
        }
        let client = self.client();
        // A server that waits for COPY data swallows the next request. Before PostgreSQL 14 it then answers the COPY
        // alone, and nothing shows that the answer to that request will never come.
        if client.trail().has_misread() && !answers(client).await {
            return Some(RolledBack::StreamKept);
        }
        if self.do_answers_tell() && !all_is_answered(client).await {
            return Some(RolledBack::StreamKept);
        }
        // A statement may still run although its future was dropped, and COMMIT would wait for it beyond the limit.
        let waits = client.has_streamed() || (self.limit.is_some() && is_answering(client).await);
        if waits && !is_free(client).await {
            return Some(RolledBack::StreamKept);
        }
        None
    }

    /// Waits until the closure must end early. Returns the limit if the time is over, or `None` if the session was
    /// evicted.
    async fn cut_off(&self) -> Option<Duration> {
        let Some(limit) = self.limit else {
            self.client().evicted().await;
            return None;
        };
        timeout(limit, self.client().evicted()).await.is_err().then_some(limit)
    }

    /// Runs BEGIN and the closure, and waits for what the closure has left under way.
    async fn body<T, F, Fut>(&self, begin: &Begin, work: &mut F) -> Result<T, Fault>
    where
        F: FnMut(Transaction<C>) -> Fut,
        Fut: Future<Output = Result<T, Error>>,
    {
        self.client().notices().forget();
        self.client().trail().forget();
        let mark = self.open(begin).await.map_err(|error| Fault::Session(judge_begin(&error), error))?;
        if !self.client().notices().are_driven() {
            self.client().heard();
        }
        if self.client().notices().already_in_transaction() {
            // The open transaction is somebody else's, and must not be committed. The work has not begun, so it can
            // begin on another connection.
            return Err(Fault::Session(Verdict::ConnectionLost, Error::RolledBack(RolledBack::StrangeSession)));
        }
        if let Some(mark) = mark {
            // Setting it cannot fail, because an attempt begins only once.
            let _ = self.mark.set(mark);
        }
        self.client().notices().activity.watch();
        let _ = self.began.set(Instant::now());
        self.inner.begin_work();
        self.client().trail().forget();
        let done = {
            let mut work = pin!(self.pool().holding(work(Transaction::new(Arc::clone(&self.held.client)))));
            poll_fn(|context| match nested::poll_within(&self.inner, work.as_mut(), context) {
                // A closure that hides the error of its first statement would go on for nothing.
                Poll::Pending if self.has_not_begun() => Poll::Ready(None),
                done => done.map(Some),
            })
            .await
        };
        let value = match done {
            Some(Ok(value)) => value,
            None => return Err(Fault::NotBegun(None)),
            Some(Err(error)) if self.has_not_begun() => return Err(Fault::NotBegun(Some(error))),
            Some(Err(error)) => return Err(Fault::Closure(error)),
        };
        // If BEGIN has not travelled yet, it does so now.
        let kept = self.kept().await;
        if self.has_not_begun() {
            return Err(Fault::NotBegun(None));
        }
        self.learn_mark();
        kept.map_or(Ok(value), |kept| Err(Fault::Kept(kept)))
    }

    async fn commit<T>(&mut self, value: T, mode: Mode, begin: &Begin, lost: &mut Option<Unsent>) -> Ended<T> {
        if self.client().is_evicted() {
            self.look_at_closure();
            let (verdict, error) = evicted();
            return self.not_committed(Stage::Body, Failed::new(verdict, error), lost);
        }
        // The pool sends no COMMIT on a session that has ended.
        let (closed, before) = (self.client().is_closed(), self.pools_commit());
        let known = self.known(mode);
        if self.do_answers_tell() {
            self.look_at_closure();
        }
        if known == Known::ByAnswers && !closed && !self.is_in_transaction() && self.closures == ClosuresEnd::NotSent {
            // Nobody has seen how it ended.
            self.closures = ClosuresEnd::Left(Ending::Unknown);
        }
        if matches!(self.closures, ClosuresEnd::Left(_)) && !planted!("takes a closure's own end for a commit") {
            let ending = self.ended_before(known).await;
            return Ended::before_commit(Verdict::Application, EndedInside::error(ending, None));
        }
        let look = self.look(known);
        let sql = known.commit(look);
        self.client().set_committing(true);
        let answer = tokio::select! {
            biased;
            answer = Answer::to(self.client(), &sql) => answer,
            () = self.client().abandoned() => {
                let error = Error::CommitUnknown(Box::new(CommitUnknown::evicted(Unsettled::NoMark)));
                self.look_at_closure();
                return self.in_doubt(mode, value, Failed::new(Verdict::ConnectionLost, error));
            }
        };
        self.look_at_closure();
        let proof = known.proof(look, &answer);
        if look == Look::Prepare && answer.completed > 1 {
            self.client().set_check_prepared(true);
        }
        self.client().set_committing(proof == CommitProof::Nothing);
        seen!("answers to COMMIT", "{proof:?}");
        match (proof, answer.error) {
            (CommitProof::Committed { answered }, _) => {
                self.held.clean(answered);
                if self.client().notices().not_replicated() && !planted!("takes a cancelled wait for a commit") {
                    let error = Error::CommitUnknown(Box::new(CommitUnknown::new(None, Unsettled::NotReplicated)));
                    return self.in_doubt(mode, value, Failed::new(Verdict::OutcomeUnknown, error));
                }
                if answered {
                    self.prune(begin);
                }
                Ended::Committed(value)
            }
            (CommitProof::NotOurs { .. }, _) => {
                let ending = self.ended_before(known).await;
                Ended::before_commit(Verdict::Application, EndedInside::error(ending, None))
            }
            (_, None) => {
                let error = Error::CommitUnknown(Box::new(CommitUnknown::incomplete(Unsettled::NoMark)));
                self.in_doubt(mode, value, Failed::new(Verdict::OutcomeUnknown, error))
            }
            (CommitProof::Unchecked, Some(error)) => {
                self.pool().lacking().check_refused(self.check, &explain(&error));
                let failed = self.not_checked(known, error).await;
                self.not_committed(Stage::Refused, failed, lost)
            }
            (CommitProof::Unprepared, Some(error)) => {
                self.pool().lacking().check_is_gone();
                let failed = self.not_checked(known, error).await;
                self.not_committed(Stage::Refused, failed, lost)
            }
            (CommitProof::Refused { over }, Some(error)) => {
                let failed = self.commit_refused(known, over, error).await;
                self.not_committed(Stage::Refused, failed, lost)
            }
            (CommitProof::Nothing, Some(error)) => {
                self.suspect();
                // The session may also have ended before its driver has sent this COMMIT.
                let unsent = before.is_some() && self.client().is_closed() && before == self.pools_commit();
                if closed || unsent {
                    let failed = self.ended_before_commit(error.into()).await;
                    return self.not_committed(Stage::Body, failed, lost);
                }
                let (verdict, session) = (classify(&error), self.session_after(&error).await);
                let failed = Failed { session, ..Failed::new(verdict, error) };
                self.in_doubt(mode, value, failed)
            }
        }
    }

    /// The number of the session's last COMMIT by the pool. `None` if nobody counts.
    fn pools_commit(&self) -> Option<u64> {
        self.client().watched_activity().map(Activity::pools_commit)
    }

    /// Returns how COMMIT looks for the transaction. It prepares the check only if the session has kept the mark's
    /// prepared statement, because then no proxy gives each transaction another session.
    fn look(&self, known: Known) -> Look {
        if known == Known::ByAnswers || self.is_shown_by_answers() {
            return Look::Not;
        }
        let keeps = self.client().mark_statement() == MarkStatement::Prepared;
        match (known, self.check) {
            (Known::ById(_), Check::Prepared) if keeps && self.client().check_is_prepared() => Look::Execute,
            (Known::ById(_), Check::Prepared) if keeps => Look::Prepare,
            (_, check) => Look::Plain(check.max(Check::Full)),
        }
    }

    /// The check before COMMIT failed, so COMMIT did not run. The work runs again, unless the closure had ended its
    /// transaction itself.
    async fn not_checked(&mut self, known: Known, error: tokio_postgres::Error) -> Failed {
        let (undone, _) = self.undo(Some(known), None).await;
        undone.explains(Failed::new(Verdict::Conflict, error))
    }

    /// `over`: the transaction is already rolled back.
    async fn commit_refused(&mut self, known: Known, over: bool, error: tokio_postgres::Error) -> Failed {
        self.suspect();
        let session = self.session_after(&error).await;
        let verdict = judge_absent(classify(&error), &session);
        let undone = if over {
            self.roll_back().await;
            Undone::Here
        } else {
            self.undo(Some(known), None).await.0
        };
        let failed = match verdict {
            // COMMIT was reached, so no earlier statement had failed: a trigger has raised this.
            Verdict::Aborted if !over => self.failed_inside().await,
            _ => Failed { session, ..Failed::new(verdict, error) },
        };
        undone.explains(failed)
    }

    pub(super) fn known(&self, mode: Mode) -> Known {
        match self.mark.get() {
            Some(mark) => Known::ById(mark.backend.xid),
            None if self.do_answers_tell() => Known::ByAnswers,
            None if mode == Mode::Read => Known::ByShow,
            None => Known::BySetting(self.run),
        }
    }

    /// Prunes the ledger from time to time, on the connection that this call no longer needs. It runs in a task, so
    /// that no caller waits for it. The task ends with the session, and so with the pool.
    fn prune(&self, begin: &Begin) {
        let MarkKind::Ledger(ledger) = &begin.marks else {
            return;
        };
        if !self.pool().prunes(ledger) {
            return;
        }
        let (ledger, mut held) = (ledger.clone(), DirtyGuard { client: Arc::clone(&self.held.client), clean: false });
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

    /// Returns whether a handle given to the closure still exists.
    pub(super) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.held.client) > 1
    }

    /// Suspects the server if the session has ended. Other errors say nothing about the server.
    pub(super) fn suspect(&self) {
        if self.client().is_closed() {
            self.client().suspect(Suspicion::Connection);
        }
    }

    pub(super) fn client(&self) -> &Client<C> {
        self.held.client()
    }

    pub(super) fn pool(&self) -> &Pool<C> {
        self.client().pool()
    }
}
