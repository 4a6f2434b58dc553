//! How an attempt can end, and what becomes of a COMMIT that was not answered.

use tokio::time::Instant;

use super::closures::ClosuresEnd;
use super::decide::{Mode, Next, Stage, decide};
use super::earlier::Earlier;
use super::settle::{SettleKey, SettleOutcome, settle};
use super::verdict::{Session, judge_absent};
use crate::classify::Verdict;
use crate::commit::Unsettled;
use crate::error::{CommitUnknown, EndedInside, Ending, Error, RolledBack};
use crate::pool::Pool;
use crate::server::SessionClient;
use crate::topology::{GenerationId, ServerSession};

/// How an attempt ended.
pub(super) enum Ended<T> {
    Committed(T),
    Failed(Stage, Failed),
    InDoubt(Unanswered<T>),
    /// COMMIT was sent, and the settler found that it is not in the history of the primary. `Failed` says why the
    /// answer to COMMIT was lost.
    Absent(Earlier<T>, Failed),
    /// As `Absent`, but no other history can contain it either, because the server that it began on says so. That
    /// server is the primary of this generation.
    Aborted(GenerationId, Failed),
    /// COMMIT was sent, and its outcome could not be found out.
    Unknown(Error),
}

pub(super) struct Failed {
    pub(super) verdict: Verdict,
    pub(super) error: Error,
    /// The state of the session after the closure has failed.
    pub(super) session: Session,
    /// The session has answered the end of the transaction, or could not be asked because the closure kept it.
    pub(super) answered: bool,
}

impl Failed {
    pub(super) fn new(verdict: Verdict, error: impl Into<Error>) -> Self {
        Self { verdict, error: error.into(), session: Session::Open, answered: true }
    }
}

/// An attempt whose COMMIT was sent, but no answer shows the outcome.
pub(super) struct Unanswered<T> {
    pub(super) value: T,
    pub(super) mark: Option<SettleKey>,
    /// What the closure had sent before.
    pub(super) closures: ClosuresEnd,
    /// The session, if its server may keep it, and when the closure began.
    pub(super) session: Option<(ServerSession, Instant)>,
    pub(super) failed: Failed,
}

impl<T> Unanswered<T> {
    /// Settles the commit if `decide` says [`Next::Settle`] and the attempt has left a mark. Otherwise it stays in
    /// doubt, and `run.rs` asks `decide` once more for what follows.
    pub(super) async fn settled<C: SessionClient>(self, pool: &Pool<C>, mode: Mode, deadline: Instant) -> Ended<T> {
        if decide(mode, Stage::InDoubt, self.failed.verdict, None) != Next::Settle {
            return Ended::InDoubt(self);
        }
        let Self { value, mark: Some(mark), closures, failed, .. } = self else { return Ended::InDoubt(self) };
        let Failed { verdict, error, session, .. } = failed;
        // Boxed, because it is rare and large, and would otherwise enlarge the future of every call.
        match Box::pin(settle(pool, &mark, deadline)).await {
            // The mark does not show whose COMMIT it was, but the closure has sent one.
            Ok((SettleOutcome::Committed, _)) if closures.is_sent() => {
                Ended::Unknown(EndedInside::error(Ending::Committed, None))
            }
            Ok((SettleOutcome::Committed, _)) => Ended::Committed(value),
            Ok((SettleOutcome::Prepared, _)) => Ended::Unknown(EndedInside::error(Ending::Prepared, Some(error))),
            // The mark says nothing about the statements behind the end of the transaction.
            Ok((SettleOutcome::NotCommitted | SettleOutcome::Aborted, _)) if closures == ClosuresEnd::WithMore => {
                Ended::Unknown(EndedInside::error(Ending::Unknown, Some(error)))
            }
            Ok((outcome @ (SettleOutcome::NotCommitted | SettleOutcome::Aborted), absent_from)) => {
                let error = match error {
                    Error::CommitUnknown(_) => Error::RolledBack(RolledBack::LostWithPrimary),
                    error => error,
                };
                let verdict = judge_absent(verdict, &session);
                let failed = Failed { session, ..Failed::new(verdict, error) };
                if outcome == SettleOutcome::Aborted {
                    return Ended::Aborted(absent_from, failed);
                }
                Ended::Absent(Earlier { mark, value, closures, absent_from }, failed)
            }
            // The pool does not know which COMMIT this is about, or whether the transaction was prepared.
            Err(why) if closures.is_sent() => {
                Ended::Unknown(EndedInside::error(Ending::Unknown, Some(unknown(error, why))))
            }
            Err(why) => Ended::Unknown(unknown(error, why)),
        }
    }
}

impl<T> Ended<T> {
    pub(super) fn before_commit(verdict: Verdict, error: impl Into<Error>) -> Self {
        Self::Failed(Stage::Body, Failed::new(verdict, error))
    }
}

/// Makes the call's error from one that leaves the outcome of COMMIT open.
pub(super) fn unknown(error: Error, why: Unsettled) -> Error {
    match error {
        Error::Database(source) => Error::CommitUnknown(Box::new(CommitUnknown::new(Some(source), why))),
        // This error already says why: the session was evicted, or the commit was not replicated. Only what a settler
        // has found replaces that reason.
        Error::CommitUnknown(unknown) if why != Unsettled::NoMark => {
            Error::CommitUnknown(Box::new(unknown.because(why)))
        }
        other => other,
    }
}
