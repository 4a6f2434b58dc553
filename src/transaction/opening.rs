//! How a transaction begins without a round trip of its own: BEGIN and the mark travel with the closure's first
//! request. `server/opening.rs` says why no statement can run outside of the transaction. This file says when they
//! travel, and what the attempt makes of their answers.

use super::attempt::Attempt;
use super::begin::{Begin, MarkKind, Travelling};
use super::ended::Failed;
use super::settle::{SettleBy, SettleKey};
use super::verdict::{ClosureError, Session};
use crate::classify::{Verdict, ends_session};
use crate::commit::Nonce;
use crate::error::{Error, RolledBack, SessionEnded};
use crate::server::{Activity, MarkText, OpeningState, SessionClient};
use crate::settle::ledger::Entering;
use crate::settle::wal::{MarkAnswer, MarkForm, MarkStatement};
use crate::sync::log_safely;

impl<C: SessionClient> Attempt<C> {
    /// Begins the transaction. If possible, BEGIN only waits here, and travels with the closure's first request.
    pub(super) async fn open(&self, begin: &Begin) -> Result<Option<SettleKey>, Error> {
        if self.is_seen_without_transaction().await {
            // Setting it cannot fail, because an attempt begins only once.
            let _ = self.answers_tell.set(());
        }
        self.notice_deallocated();
        if self.travels(begin) { Ok(None) } else { self.begin(begin).await }
    }

    /// If somebody has dropped the session's prepared statements, the mark's must be prepared again.
    fn notice_deallocated(&self) {
        if self.telling().is_some_and(Activity::take_deallocated) {
            self.client().forget_prepared();
        }
    }

    /// Lets BEGIN travel with the closure's first request, if that is possible. Otherwise nothing has happened.
    fn travels(&self, begin: &Begin) -> bool {
        let (client, pool) = (self.client(), self.pool());
        let Some(activity) = self.telling() else { return false };
        if !pool.begins_with_first_statement() || !activity.is_silent() {
            return false;
        }
        if !pool.lacking().may_begin_travel(client.generation()) {
            return false;
        }
        let Some(travelling) = self.mark_that_travels(begin) else { return false };
        let opening = activity.opening();
        let armed = match &travelling {
            Travelling::Unmarked => opening.arm(&begin.sql, None::<MarkText<'_, Nonce>>),
            Travelling::Wal(nonce, _) => {
                let (statement, nonce) = (MarkForm::Direct.prepared(), Some(*nonce));
                opening.arm(&begin.sql, Some(MarkText { statement, nonce }))
            }
            Travelling::Ledger(ledger) => {
                let statement = &*ledger.entry_name();
                opening.arm(&begin.sql, Some(MarkText { statement, nonce: None::<Nonce> }))
            }
        };
        // Setting it cannot fail, because an attempt begins only once.
        armed && self.travelling.set(travelling).is_ok()
    }

    /// Returns the mark of a transaction whose BEGIN travels. `None`: the mark needs a message of its own, as the first
    /// one of a session does. Its answer may say what the role or the server lacks.
    fn mark_that_travels(&self, begin: &Begin) -> Option<Travelling> {
        let (client, pool) = (self.client(), self.pool());
        let marks = match &begin.marks {
            MarkKind::Ledger(ledger) => {
                let prepared = client.entry_statement(ledger.key()) == MarkStatement::Prepared;
                return prepared.then(|| Travelling::Ledger(ledger.clone()));
            }
            MarkKind::Nothing => false,
            MarkKind::Wal | MarkKind::Write => self.can_be_marked(),
        };
        if !marks {
            // Otherwise BEGIN must ask whether the transaction can write.
            let told = begin.read_only || client.notices().activity.tells_read_only();
            return told.then_some(Travelling::Unmarked);
        }
        if self.mark_form() != (MarkForm::Direct, MarkStatement::Prepared) {
            return None;
        }
        let signature = match begin.marks {
            MarkKind::Wal if self.life_to_sign().is_some() => pool.signatures().done(client.generation())?,
            _ => None,
        };
        Some(Travelling::Wal(pool.next_nonce(), signature))
    }

    /// Takes notice of the answers to a BEGIN that travelled, as far as they have come. If the transaction is marked,
    /// it can be found by its mark from now on.
    pub(super) fn learn_mark(&self) {
        let (Some(travelling), Some(activity)) = (self.travelling.get(), self.travels_on()) else { return };
        let Some(row) = activity.opening().take_row() else { return };
        let (client, life) = (self.client(), self.client().life());
        let read = match (travelling, life) {
            (Travelling::Unmarked, _) | (Travelling::Wal(..), None) => return,
            (Travelling::Wal(nonce, signature), Some(life)) => match self.read_mark(&life, *nonce, &row) {
                Ok(MarkAnswer::By(mark, backend)) => Ok((SettleBy::Wal(mark), backend, signature.clone())),
                Ok(MarkAnswer::ReadOnly) => return self.note_read_only(),
                Ok(MarkAnswer::Elsewhere | MarkAnswer::Joined) => return,
                Err(bad) => Err(bad),
            },
            (Travelling::Ledger(ledger), life) => match self.read_entry(life.as_ref(), &row) {
                Ok(Entering::As(entered, backend)) => Ok((SettleBy::Ledger(ledger.clone(), entered), backend, None)),
                Ok(Entering::Elsewhere | Entering::Joined) => return,
                Err(bad) => Err(bad),
            },
        };
        match read {
            Ok((by, backend, signature)) => {
                // Setting it cannot fail, because the row is taken only once.
                let _ = self.mark.set(self.key(by, backend, life, signature));
            }
            Err(bad) => self.pool().lacking().set_unmarked(client.generation(), &bad.to_string()),
        }
    }

    /// What passes on the session, if BEGIN travels there.
    fn travels_on(&self) -> Option<&Activity> {
        self.travelling.get().map(|_| &*self.client().notices().activity)
    }

    /// Returns whether BEGIN has travelled and failed. Then the server has carried out nothing of the closure's.
    pub(super) fn has_not_begun(&self) -> bool {
        self.travels_on().is_some_and(|activity| activity.opening().state() == OpeningState::Failed)
    }

    /// Judges an attempt whose BEGIN has travelled and failed. The work has not begun, so it can begin again, on
    /// another session and with a BEGIN of its own message, which finds out the reason. `closure`: the closure's error,
    /// which is that of BEGIN.
    pub(super) fn not_begun(&self, closure: Option<Error>) -> Failed {
        let client = self.client();
        client.poison();
        let mut error = closure.unwrap_or(Error::RolledBack(RolledBack::FailedInside));
        let report = ClosureError::of(&error).report().cloned().or_else(|| client.trail().last());
        let session = if let Some(report) = report.filter(ends_session) {
            // The closure has hidden the report, or was dropped.
            if ClosureError::of(&error).report().is_none() {
                error = Error::SessionEnded(Box::new(SessionEnded::new(report.clone(), error)));
            }
            Session::Ended(Some(report))
        } else {
            self.pool().lacking().begin_does_not_travel(client.generation());
            log_safely(|| tracing::debug!("BEGIN failed together with the first statement: {error}"));
            Session::Open
        };
        Failed { session, ..Failed::new(Verdict::ConnectionLost, error) }
    }
}
