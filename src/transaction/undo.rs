//! Cleans up after a failed attempt: rolls back, and finds out whether the closure had ended its transaction itself.

use std::time::Duration;

use tokio::time::timeout;

use super::attempt::Attempt;
use super::closures::ClosuresEnd;
use super::decide::Mode;
use super::ended::Failed;
use super::finish::{Answer, Known, Undone, ending};
use crate::classify::Verdict;
use crate::error::{EndedInside, Ending};
use crate::server::SessionClient;
use crate::topology::{Suspicion, UNDISTURBED};

/// Returns SQL that asks whether the session's server accepts writes. A new transaction is read-only in recovery, or by
/// default. The question needs no privilege.
fn role() -> String {
    format!("{UNDISTURBED} SHOW transaction_read_only")
}
/// The time limit for ROLLBACK. If it takes longer, the session is closed instead.
pub(super) const ROLLBACK_WITHIN: Duration = Duration::from_secs(2);

impl<C: SessionClient> Attempt<C> {
    /// Cleans up after a failure before COMMIT, and finds out the cause of a read-only error.
    pub(super) async fn cleaned_up(&mut self, mode: Mode, failed: Failed) -> Failed {
        self.suspect();
        if self.is_shared() {
            // Somebody still holds the transaction's handle. After a ROLLBACK, the holder's further statements would
            // run outside any transaction. So no ROLLBACK is sent: the session is closed, which undoes all its work.
            return own_doing(failed, self.began_read_only(mode));
        }
        if failed.verdict.is_loss() {
            // If the session still exists, it is behind a proxy and reaches another server now. That server knows
            // nothing of this work, so it is not asked.
            self.roll_back().await;
            return failed;
        }
        let role = (failed.verdict == Verdict::ReadOnly && mode != Mode::Read).then(role);
        let known = self.has_begun().then(|| self.known(mode));
        let (undone, server_is_read_only) = self.undo(known, role.as_deref()).await;
        undone.explains(own_doing(failed, server_is_read_only || self.began_read_only(mode)))
    }

    /// Returns whether the transaction could not write from its first statement on, although the call may write. Then
    /// its closure has not made it read-only, even if the server accepts writes by now, because a fence was lifted.
    pub(super) fn began_read_only(&self, mode: Mode) -> bool {
        mode != Mode::Read && (self.is_known_to_begin_read_only() || !self.has_begun())
    }

    /// Returns whether the server has said so, in its answer to BEGIN, or by reporting its setting.
    pub(super) fn is_known_to_begin_read_only(&self) -> bool {
        let reported = self.do_answers_tell() && self.client().notices().activity.was_read_only();
        reported || self.began_read_only.get().is_some()
    }

    pub(super) async fn roll_back(&mut self) {
        // An evicted session is closed anyway, and its server may be frozen. A clean session has been rolled back
        // already.
        if !self.held.clean && !self.client().is_closed() && !self.client().is_evicted() {
            let rolled_back = timeout(ROLLBACK_WITHIN, self.client().run_own("ROLLBACK")).await;
            self.held.clean(matches!(rolled_back, Ok(Ok(()))));
        }
    }

    /// Asks a session without a transaction whether its server is a standby or a fenced primary. If it does not answer,
    /// it counts as one of these.
    pub(super) async fn server_is_read_only(&mut self) -> bool {
        self.held.clean(false);
        let Ok(answer) = timeout(ROLLBACK_WITHIN, Answer::to(self.client(), &role())).await else {
            return true;
        };
        let read_only = answer.values.first().is_none_or(|value| value.as_deref() != Some("off"));
        if read_only {
            self.client().suspect(Suspicion::ReadOnly);
        } else {
            self.held.clean(answer.error.is_none());
        }
        read_only
    }

    /// Rolls back, and finds out whether the closure had already rolled back or committed. `known` is `None` if the
    /// closure was not run.
    ///
    /// With `role`, also asks whether the server is a standby or a fenced primary. If it is neither, the transaction
    /// had made itself read-only. A session that does not answer counts as read-only.
    pub(super) async fn undo(&mut self, known: Option<Known>, role: Option<&str>) -> (Undone, bool) {
        // An evicted session is closed anyway, and its server may be frozen.
        if self.client().is_closed() || self.client().is_evicted() {
            return (Undone::Unanswered, role.is_some());
        }
        let sql = Known::roll_back(known, role);
        let Ok(mut answer) = timeout(ROLLBACK_WITHIN, Answer::to(self.client(), &sql)).await else {
            return (Undone::Unanswered, role.is_some());
        };
        let asked_status = answer.error.is_none() && known.is_some_and(|known| known.status().is_some());
        let status = if asked_status { answer.values.pop().flatten() } else { None };
        let undone = match (Known::undone(known, &answer, status.as_deref()), known) {
            // Whatever was rolled back here, it was not the pool's transaction.
            (Some(_), _) if matches!(self.closures, ClosuresEnd::Left(_)) => {
                Undone::Before(self.ending(status.as_deref()))
            }
            (Some(undone), _) => undone,
            (None, None) => Undone::Unanswered,
            (None, Some(known)) => return (Undone::Before(self.ended_before(known).await), false),
        };
        let is_answered = Known::undone(known, &answer, None) != Some(Undone::Unanswered);
        self.held.clean(is_answered && (answer.error.is_none() || answer.left_idle()));
        let read_only = role.is_some() && answer.values.first().is_none_or(|value| value.as_deref() != Some("off"));
        if read_only {
            self.held.clean(false);
            self.client().suspect(Suspicion::ReadOnly);
        }
        (undone, read_only)
    }

    /// Finds out how the closure ended its transaction. The caller knows that it did. Also rolls back what the closure
    /// may have begun since.
    pub(super) async fn ended_before(&mut self, known: Known) -> Ending {
        let sql = known.status().map_or_else(|| "ROLLBACK".to_owned(), |status| format!("ROLLBACK; {status}"));
        let Ok(answer) = timeout(ROLLBACK_WITHIN, Answer::to(self.client(), &sql)).await else {
            return self.ending(None);
        };
        self.held.clean(answer.error.is_none());
        self.ending(answer.values.first().and_then(Option::as_deref))
    }

    /// How the closure has ended the transaction: by its status if there is one, or else by the answers to the closure.
    fn ending(&self, status: Option<&str>) -> Ending {
        let shown = ending(status);
        match self.closures {
            ClosuresEnd::Left(answered) if shown == Ending::Unknown => answered,
            _ => shown,
        }
    }
}

/// If the transaction made itself read-only, the failure is the application's.
fn own_doing(failed: Failed, server_is_read_only: bool) -> Failed {
    match failed.verdict {
        Verdict::ReadOnly if !server_is_read_only => Failed { verdict: Verdict::Application, ..failed },
        _ => failed,
    }
}

impl Undone {
    /// Replaces the failure if the closure has ended its transaction itself, because that explains more than the error
    /// that followed.
    pub(super) fn explains(self, failed: Failed) -> Failed {
        match self {
            Self::Before(ending) => {
                let error = EndedInside::error(ending, Some(failed.error));
                Failed::new(Verdict::Application, error)
            }
            Self::Here | Self::Unanswered => failed,
        }
    }
}
