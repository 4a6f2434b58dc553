//! Finds out whether a closure has ended its transaction itself, and judges the attempt by it.

use tokio::time::{Instant, timeout};

use super::attempt::Attempt;
use super::closures::ClosuresEnd;
use super::decide::{Mode, Stage};
use super::earlier::Unsent;
use super::ended::{Ended, Failed, Unanswered};
use super::undo::ROLLBACK_WITHIN;
use super::verdict::with_reason;
use crate::classify::Verdict;
use crate::error::{EndedInside, Ending, Error};
use crate::server::{self, SessionClient};
use crate::topology::ServerSession;

impl<C: SessionClient> Attempt<C> {
    /// Finds out whether the closure has ended the transaction, or has sent something that does. The pool's own COMMIT
    /// does not count, but its own ROLLBACK does, so call this before that.
    fn closures_end(&self) -> ClosuresEnd {
        if !self.has_begun() {
            return ClosuresEnd::NotSent;
        }
        let Some(activity) = self.client().watched_activity() else { return ClosuresEnd::Unwatched };
        // Read this first: a request that is answered meanwhile shows an end.
        let unanswered = activity.unanswered();
        match (activity.transaction_end(), unanswered) {
            (Some(end), _) if !planted!("ignores that a closure has ended it") => ClosuresEnd::left(end),
            (_, server::Unanswered::GoesOn) if !planted!("ignores what is sent behind an end") => ClosuresEnd::WithMore,
            (_, server::Unanswered::GoesOn | server::Unanswered::Commits) => ClosuresEnd::UnderWay,
            // Without a mark, no check before COMMIT can find out what was rolled back.
            (_, server::Unanswered::Nothing)
                if self.do_answers_tell() && self.mark.get().is_none() && activity.has_rolled_back_unseen() =>
            {
                ClosuresEnd::Left(Ending::Unknown)
            }
            (_, server::Unanswered::Nothing) => ClosuresEnd::NotSent,
        }
    }

    /// Finds out how the closure has ended the transaction, after the answer to the pool's own COMMIT, or without one.
    pub(super) fn look_at_closure(&mut self) {
        self.learn_mark();
        self.closures = self.closures_end();
    }

    /// Finds out how the closure has ended the transaction, before the pool rolls back. The session's driver may not
    /// have seen the last requests yet, and the last one may not be answered. The pool's ROLLBACK would wait for these
    /// answers, too.
    pub(super) async fn wait_for_closures_end(&mut self) {
        if !self.has_begun() {
            return;
        }
        self.client().notices().requests_are_seen().await;
        let activity = &self.client().notices().activity;
        if !self.client().is_closed() && !self.is_shared() {
            // The result does not matter, because the closure's end is looked at below.
            let _ = timeout(ROLLBACK_WITHIN, activity.ends_are_answered()).await;
        }
        self.look_at_closure();
    }

    /// Closes the session, and finds out what was sent on it until then. Somebody may still hold the transaction's
    /// handle, and nothing else would stop further statements.
    pub(super) async fn sever(&mut self) {
        self.client().notices().requests_are_seen().await;
        self.client().poison();
        if self.client().watched_activity().is_some() {
            let _ = timeout(ROLLBACK_WITHIN, self.client().notices().activity.until_over()).await;
        }
        self.look_at_closure();
    }

    /// Judges an attempt whose COMMIT by the pool was not carried out. If the closure may have ended the transaction,
    /// the work does not run again in any mode, unless a primary can be asked about the transaction: then `lost`
    /// receives it.
    pub(super) fn not_committed<T>(&mut self, stage: Stage, failed: Failed, lost: &mut Option<Unsent>) -> Ended<T> {
        let rolled_back = self.held.clean && !failed.verdict.is_loss();
        let failed = match self.closures {
            ClosuresEnd::Left(ending) => failed.with_reason().ended_inside(ending),
            ClosuresEnd::UnderWay | ClosuresEnd::WithMore if !rolled_back && self.mark.get().is_none() => {
                failed.with_reason().ended_inside(Ending::Unknown)
            }
            _ => {
                if !rolled_back {
                    *lost = self.unsent();
                }
                failed
            }
        };
        Ended::Failed(stage, failed)
    }

    /// Judges an attempt whose COMMIT by the pool is in doubt. If the closure has ended the transaction, that COMMIT
    /// has done nothing. If nobody can be asked whether it has, the work does not run again in any mode.
    pub(super) fn in_doubt<T>(&mut self, mode: Mode, value: T, failed: Failed) -> Ended<T> {
        let (mark, session) = (self.mark.take(), self.session_left());
        match self.closures {
            ClosuresEnd::Left(_) if planted!("takes a closure's COMMIT for its own") => {
                Ended::InDoubt(Unanswered { value, mark, closures: ClosuresEnd::NotSent, session, failed })
            }
            ClosuresEnd::Left(ending) => Ended::Failed(Stage::Body, failed.ended_inside(ending)),
            ClosuresEnd::UnderWay | ClosuresEnd::WithMore if mark.is_none() || mode != Mode::Exactly => {
                Ended::Failed(Stage::Body, failed.ended_inside(Ending::Unknown))
            }
            closures => Ended::InDoubt(Unanswered { value, mark, closures, session, failed }),
        }
    }

    fn unsent(&mut self) -> Option<Unsent> {
        let (closures, mark) = (self.closures, self.mark.take());
        let session = self.session_left().filter(|_| closures == ClosuresEnd::NotSent);
        Unsent::of(mark, closures, session)
    }

    /// Returns the session that the server may keep although the client has gone, and when the closure began.
    fn session_left(&self) -> Option<(ServerSession, Instant)> {
        // A session that is clean may be in somebody else's use by now.
        let began = self.began.get().filter(|_| !self.held.clean);
        // If BEGIN has travelled, the transaction is younger than the closure, but not younger than this moment.
        let began = began.map(|began| if self.travelling.get().is_some() { Instant::now() } else { *began });
        began.zip(self.client().notices().server_session()).map(|(began, session)| (session, began))
    }
}

impl Failed {
    /// Adds the reason of the session's end to the error.
    fn with_reason(self) -> Self {
        let session = self.session.clone();
        Self { error: with_reason(self.error, self.verdict, session), ..self }
    }

    /// Adds that the closure has ended its transaction itself, unless the error says so already.
    pub(super) fn ended_inside(self, ending: Ending) -> Self {
        if matches!(self.error, Error::EndedInside(_)) {
            return self;
        }
        Self::new(Verdict::Application, EndedInside::error(ending, Some(self.error)))
    }
}
