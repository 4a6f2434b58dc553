//! Asks a session for its state after its closure has failed.

use tokio::time::timeout;

use super::attempt::Attempt;
use super::decide::Mode;
use super::ended::Failed;
use super::undo::ROLLBACK_WITHIN;
use super::verdict::{ClosureError, Session, is_misfit, judge, perhaps_stale};
use crate::classify::{Cure, Verdict, ends_session};
use crate::error::{Error, RolledBack};
use crate::server::SessionClient;

/// This statement fails if the server has aborted the transaction. It needs no planning.
const PROBE: &str = "SHOW transaction_isolation";

impl<C: SessionClient> Attempt<C> {
    /// Cleans up after a failed closure, and judges the attempt by the closure's error and by the session.
    pub(super) async fn closure_failed(&mut self, mode: Mode, error: Error) -> Failed {
        let closure_error = ClosureError::of(&error);
        if let Some(report) = closure_error.report() {
            self.client().trail().note_report(report);
        }
        let session = self.session(closure_error).await;
        let mut verdict = judge(closure_error, &session);
        let trail = self.client().trail();
        let misfit = is_misfit(&error);
        if misfit {
            // The closure may have read the value from a row, so the trail does not know the error.
            trail.heal(Cure::Clear);
        }
        let old_types = self.statements || trail.has_old_types();
        let stale = misfit && old_types && matches!(session, Session::Open);
        if verdict == Verdict::Application && (stale || perhaps_stale(closure_error, &session, self.statements)) {
            trail.heal(Cure::Clear);
            verdict = Verdict::Stale;
        }
        self.cleaned_up(mode, Failed { session, ..Failed::new(verdict, error) }).await
    }

    /// Judges an attempt whose closure succeeded but whose session ended before COMMIT was sent.
    pub(super) async fn ended_before_commit(&self, error: Error) -> Failed {
        let session = self.ended().await;
        let verdict = judge(ClosureError::of(&error), &session);
        Failed { session, ..Failed::new(verdict, error) }
    }

    /// Returns the state of the session after COMMIT's message failed with this error, which may be the server's or the
    /// driver's.
    pub(super) async fn session_after(&self, error: &tokio_postgres::Error) -> Session {
        match error.as_db_error().filter(|report| ends_session(report)) {
            Some(report) => Session::Ended(Some(report.clone())),
            None if self.client().is_closed() => self.ended().await,
            None => Session::Open,
        }
    }

    /// Judges an attempt whose closure hid an error, so that COMMIT found the transaction aborted. The transaction is
    /// rolled back already.
    pub(super) async fn failed_inside(&mut self) -> Failed {
        let error = Error::RolledBack(RolledBack::FailedInside);
        let Some(report) = self.client().trail().last() else {
            return Failed::new(Verdict::Aborted, error);
        };
        let session = Session::Aborted(report);
        let verdict = match judge(ClosureError::Nothing, &session) {
            // The server accepts writes, and did so when the transaction began. So that had made itself read-only.
            Verdict::ReadOnly if !self.server_is_read_only().await && !self.is_known_to_begin_read_only() => {
                Verdict::Application
            }
            verdict => verdict,
        };
        Failed { session, ..Failed::new(verdict, error) }
    }

    /// Finds out the state of the session after the closure has failed. Sends a question only if the decision depends
    /// on the answer.
    async fn session(&mut self, closure_error: ClosureError<'_>) -> Session {
        let last = self.client().trail().last();
        if last.as_ref().is_some_and(ends_session) || self.client().is_closed() || self.client().is_evicted() {
            return self.ended().await;
        }
        let Some(last) = last else { return Session::Open };
        if closure_error.report().is_some_and(|report| report.code() == last.code())
            || matches!(closure_error, ClosureError::OtherCall)
        {
            return Session::Open;
        }
        match self.is_aborted().await {
            true if self.client().is_closed() => self.ended().await,
            true => Session::Aborted(last),
            false => Session::Open,
        }
    }

    /// Returns the state of a session that has ended, with the server's last report if there was one.
    async fn ended(&self) -> Session {
        let last = self.client().trail().last();
        match last.filter(ends_session) {
            Some(report) => Session::Ended(Some(report)),
            None => Session::Ended(self.client().notices().end().last_words().await),
        }
    }

    /// Returns whether the server has aborted the transaction. Returns `true` as well if the session does not answer,
    /// or cannot be asked because the closure kept the handle.
    async fn is_aborted(&self) -> bool {
        self.is_shared()
            || !matches!(timeout(ROLLBACK_WITHIN, self.client().driver().batch_execute(PROBE)).await, Ok(Ok(())))
    }
}
