//! Remembers two kinds of earlier attempts of a call. The first kind ([`Earlier`]) had its COMMIT in doubt, and is not
//! in the primary's history. The second kind ([`Lost`]) ended without the pool's COMMIT and without a confirmed
//! rollback; its closure may have committed by itself.
//!
//! "Not committed" is true of one history only. With asynchronous replication, a standby that lagged may be promoted
//! first, and later another standby that has the transaction. So the pool asks each new primary before the work runs on
//! it. By the lemma of docs/exactly-once.md, no history then contains two attempts of one call. For the same reason, an
//! error means "not committed" only while the primary that said so remains the primary. The tests are
//! `tests/it/commit/history/earlier.rs` and `commit/tests/calls.rs`.

use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};

use super::abandoned::whose;
use super::closures::ClosuresEnd;
use super::settle::{AT_LEAST, Inside, SettleKey, SettleOutcome, ended_inside, settle};
use super::verdict::Session;
use crate::classify::{Verdict, explain};
use crate::commit::Unsettled;
use crate::error::{CommitUnknown, EndedInside, Ending, Error};
use crate::pool::{CallSite, Client, Pool};
use crate::server::SessionClient;
use crate::settle::lost::end_lost;
use crate::sync::log_safely;
use crate::topology::{GenerationId, ServerSession};

/// A call that will not run again asks for at most this long before it returns its error.
const ASKED_WITHIN: Duration = Duration::from_millis(500);

/// An attempt whose COMMIT was not answered, and that is not in the primary's history.
pub(super) struct Earlier<T> {
    pub(super) mark: SettleKey,
    /// The value that its closure returned.
    pub(super) value: T,
    /// What the closure had sent before the pool's COMMIT.
    pub(super) closures: ClosuresEnd,
    /// The generation of the primary whose history does not contain it.
    pub(super) absent_from: GenerationId,
}

/// Asks this generation's primary about the call's earlier attempts. `Ok(Some)`: this one of them was committed. For
/// the others, notes that this primary's history does not contain them. Returns the call's error if nobody can tell, or
/// if a closure has prepared one of them.
pub(super) async fn find<C: SessionClient, T>(
    pool: &Pool<C>,
    earlier: &mut Vec<Earlier<T>>,
    generation: GenerationId,
    deadline: Instant,
) -> Result<Option<Earlier<T>>, Error> {
    let mut index = 0;
    while let Some(attempt) = earlier.get_mut(index) {
        if attempt.absent_from == generation {
            index += 1;
            continue;
        }
        // Boxed, because it is rare and large, and would otherwise enlarge the future of every call.
        match Box::pin(settle(pool, &attempt.mark, deadline)).await {
            Ok((SettleOutcome::Committed, _)) => return Ok(Some(earlier.swap_remove(index))),
            Ok((SettleOutcome::NotCommitted, absent_from)) => {
                attempt.absent_from = absent_from;
                index += 1;
            }
            Ok((SettleOutcome::Aborted, _)) => drop(earlier.swap_remove(index)),
            Ok((SettleOutcome::Prepared, _)) => return Err(EndedInside::error(Ending::Prepared, None)),
            Err(why) => return Err(Error::CommitUnknown(Box::new(CommitUnknown::asked_for_earlier(why)))),
        }
    }
    Ok(None)
}

/// Returns the error of a call. If the primary that said "not committed" is no longer the primary, returns
/// `CommitUnknown` instead.
pub(super) fn unless_denied<T>(earlier: &[Earlier<T>], by: impl Fn(GenerationId) -> bool, error: Error) -> Error {
    if are_denied(earlier.iter().map(|attempt| attempt.absent_from), by) {
        return error;
    }
    log_safely(
        || tracing::debug!(%error, "an earlier run may have been committed: the primary that did not have it was lost"),
    );
    Error::CommitUnknown(Box::new(CommitUnknown::earlier(Unsettled::NoPrimary)))
}

/// Returns whether all these generations still have their primary. `by` tells this of one generation.
fn are_denied(absent_from: impl IntoIterator<Item = GenerationId>, by: impl Fn(GenerationId) -> bool) -> bool {
    absent_from.into_iter().all(by)
}

/// Returns whether an attempt that ended so shows that its server was still the primary. The verdict alone does not: it
/// is about the closure's error, which may come from another call.
pub(super) fn shows_primary(verdict: Verdict, session: &Session) -> bool {
    !verdict.is_loss() && verdict != Verdict::ReadOnly && !matches!(session, Session::Ended(_))
}

/// What is left of an attempt whose COMMIT by the pool did not run, and whose rollback the server did not confirm. Its
/// closure may have committed its transaction.
#[derive(Debug)]
pub(super) struct Unsent {
    /// By this a primary can be asked about the transaction.
    mark: Option<SettleKey>,
    closures: ClosuresEnd,
    /// The session, and when the closure began, if nobody has sent a COMMIT on it. The server may not know that the
    /// client has gone.
    session: Option<(ServerSession, Instant)>,
}

impl Unsent {
    /// `None` if nothing is stored, and no session has to be ended.
    pub(super) fn of(
        mark: Option<SettleKey>,
        closures: ClosuresEnd,
        session: Option<(ServerSession, Instant)>,
    ) -> Option<Self> {
        let unsent = Self { mark, closures, session };
        (unsent.mark.is_some() || unsent.session.is_some() || !unsent.is_undone()).then_some(unsent)
    }

    /// Returns whether nothing of it is stored, as far as the pool sees what was sent.
    fn is_undone(&self) -> bool {
        self.closures == ClosuresEnd::NotSent
    }

    /// Finds out whether the closure has ended the transaction itself, if this session's server can tell. A lock on the
    /// ledger may hold the answer up, so the question has a time limit. If the time is over, the session is closed.
    async fn ended<C: SessionClient>(&self, client: &Client<C>, deadline: Instant) -> Option<Inside> {
        if let ClosuresEnd::Left(ending) = self.closures {
            return Some(Inside::Ended(ending));
        }
        let Some(mark) = &self.mark else {
            self.end_session(client).await;
            return Some(if self.closures.is_sent() { Inside::Ended(Ending::Unknown) } else { Inside::No });
        };
        let until = deadline.max(Instant::now() + ASKED_WITHIN);
        let found = timeout_at(until, ended_inside(client, mark)).await.ok().flatten();
        if matches!(found, Some(Inside::InProgress | Inside::Working)) && self.is_undone() {
            self.end_session(client).await;
        }
        self.concluded(client.pool(), mark, found, deadline).await
    }

    /// Ends the transaction's session, so that the next run does not wait for its locks. Nobody has sent a COMMIT on
    /// it.
    async fn end_session<C: SessionClient>(&self, client: &Client<C>) {
        let Some(whose) = whose(self.mark.as_ref(), self.session, client) else { return };
        if let Ok(Err(error)) = timeout(ASKED_WITHIN, end_lost(client, whose)).await {
            log_safely(|| tracing::debug!("a lost session could not be ended: {}", explain(&error)));
        }
    }

    /// Concludes from what [`ended_inside`] has found how the closure has ended the transaction. Asks further questions
    /// if that is not enough.
    async fn concluded<C: SessionClient>(
        &self,
        pool: &Pool<C>,
        mark: &SettleKey,
        found: Option<Inside>,
        deadline: Instant,
    ) -> Option<Inside> {
        let concluded = self.concluded_by_mark(pool, mark, found, deadline).await;
        match concluded {
            // The mark says nothing about the statements behind the end of the transaction.
            Some(Inside::No) if self.closures == ClosuresEnd::WithMore => Some(Inside::Ended(Ending::Unknown)),
            concluded => concluded,
        }
    }

    async fn concluded_by_mark<C: SessionClient>(
        &self,
        pool: &Pool<C>,
        mark: &SettleKey,
        found: Option<Inside>,
        deadline: Instant,
    ) -> Option<Inside> {
        match (&found, self.closures) {
            // Nobody can tell the outcome of a COMMIT that was sent. If the pool has not seen a COMMIT, this counts as
            // if no primary could be asked.
            (Some(Inside::OtherCluster), closures) if closures.is_sent() => {
                return Some(Inside::Ended(Ending::Unknown));
            }
            (
                Some(Inside::InProgress | Inside::Working | Inside::Untold(_)) | None,
                ClosuresEnd::UnderWay | ClosuresEnd::WithMore,
            )
            | (Some(Inside::InProgress), ClosuresEnd::Unwatched)
            | (Some(Inside::OtherLife), _) => {}
            (Some(Inside::Untold(why)), ClosuresEnd::Unwatched) => return Some(Inside::Unsettled(*why)),
            _ => return found,
        }
        // The server may still be busy with the closure's COMMIT, so ask until that has ended. Boxed, because it is
        // rare and large.
        Some(match Box::pin(settle(pool, mark, deadline)).await {
            Ok((SettleOutcome::Committed, _)) => Inside::Ended(Ending::Committed),
            Ok((SettleOutcome::Prepared, _)) => Inside::Ended(Ending::Prepared),
            Ok((SettleOutcome::NotCommitted | SettleOutcome::Aborted, _)) => Inside::No,
            // Its text shows that the closure has sent nothing that commits.
            Err(_) if self.closures == ClosuresEnd::NotSent && !planted!("says that a closure ended it") => {
                return found;
            }
            // The closure may have ended nothing, because the pool does not see what is sent on this session.
            Err(why) if self.closures == ClosuresEnd::Unwatched && !planted!("says that a wrapped one ended it") => {
                Inside::Unsettled(why)
            }
            Err(_) => Inside::Ended(Ending::Unknown),
        })
    }
}

/// An attempt with an [`Unsent`] transaction, after which the work runs again.
pub(super) struct Lost {
    unsent: Unsent,
    error: Error,
    /// The generation whose primary was last asked about it.
    asked: Option<GenerationId>,
}

impl Lost {
    pub(super) fn new(unsent: Unsent, error: Error) -> Self {
        Self { unsent, error, asked: None }
    }

    /// Returns whether nothing of it is stored, as far as the pool sees what was sent.
    pub(super) fn is_undone(&self) -> bool {
        self.unsent.is_undone()
    }
}

/// Returns the call's error if a closure has committed or prepared one of the lost transactions itself. Nothing else
/// would show that. Each primary is asked once.
pub(super) async fn found_ended<C: SessionClient>(
    client: &Client<C>,
    lost: &mut Vec<Lost>,
    deadline: Instant,
) -> Option<Error> {
    let generation = client.generation();
    if planted!("does not look for a closure's own COMMIT") {
        return None;
    }
    for index in 0..lost.len() {
        let Some(attempt) = lost.get_mut(index).filter(|attempt| attempt.asked != Some(generation)) else {
            continue;
        };
        match attempt.unsent.ended(client, deadline).await {
            Some(Inside::Ended(ending)) => {
                let error = lost.swap_remove(index).error;
                return Some(EndedInside::error(ending, Some(error)));
            }
            Some(Inside::Unsettled(why)) => {
                let error = lost.swap_remove(index).error;
                return Some(Error::CommitUnknown(Box::new(CommitUnknown::unwatched(error, why))));
            }
            Some(_) => attempt.asked = Some(generation),
            // The server did not say. The next attempt asks again.
            None => {}
        }
    }
    None
}

/// Returns the error of a call that gets no further connection. If a closure has sent a COMMIT of its own, there is no
/// server to ask about it, and the error says that its outcome is unknown.
pub(super) fn unless_sent(lost: &[Lost], error: Error) -> Error {
    if lost.iter().any(|attempt| attempt.unsent.closures.is_sent()) {
        return EndedInside::error(Ending::Unknown, Some(error));
    }
    error
}

/// Returns the error of a call that will not run again. If the closure of its last attempt has ended the transaction
/// itself, the error says so. The pool asks only if a primary is known. It does not wait for one.
pub(super) async fn or_ended_at_last<C: SessionClient>(
    pool: &Pool<C>,
    place: CallSite,
    unsent: Unsent,
    error: Error,
) -> Error {
    // Its session may keep locks, but no further run waits for them.
    let Some(mark) = &unsent.mark else { return error };
    // Boxed, because it is rare and large, and would otherwise enlarge the future of every call.
    let asked = Box::pin(async {
        let within = Instant::now() + ASKED_WITHIN;
        let client = pool.get_for_transaction(within, place).await.ok()?;
        if unsent.closures != ClosuresEnd::Unwatched {
            return unsent.ended(&client, within).await;
        }
        let found = timeout_at(within, ended_inside(&client, mark)).await.ok().flatten();
        drop(client);
        unsent.concluded(pool, mark, found, within).await
    });
    let limit = match unsent.closures {
        ClosuresEnd::UnderWay | ClosuresEnd::WithMore => AT_LEAST,
        // Only if the transaction is in progress does this take longer than usual, and then its settling ends first.
        ClosuresEnd::Unwatched => AT_LEAST + 2 * ASKED_WITHIN,
        ClosuresEnd::Left(_) | ClosuresEnd::NotSent => ASKED_WITHIN,
    };
    match timeout(limit, asked).await {
        Ok(Some(Inside::Ended(ending))) => EndedInside::error(ending, Some(error)),
        Ok(Some(Inside::Unsettled(why))) => Error::CommitUnknown(Box::new(CommitUnknown::unwatched(error, why))),
        Ok(Some(_)) => error,
        _ if unsent.closures.is_sent() => EndedInside::error(Ending::Unknown, Some(error)),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_is_denied_by_a_primary_alone() {
        let (one, two) = (GenerationId(1), GenerationId(2));
        let denied = |absent_from: &[GenerationId], now: Option<GenerationId>| {
            are_denied(absent_from.iter().copied(), |id| Some(id) == now)
        };
        assert!(denied(&[], None), "no attempt was in doubt");
        assert!(denied(&[two], Some(two)));
        assert!(denied(&[two, two], Some(two)));
        assert!(!denied(&[two], None), "it was lost, and nobody has followed it");
        assert!(!denied(&[one], Some(two)), "its successor was not asked");
        assert!(!denied(&[two, one], Some(two)), "its successor was asked for one of them");
    }

    #[test]
    fn a_session_that_was_lost_shows_no_primary() {
        for verdict in [Verdict::ConnectionLost, Verdict::NotNow, Verdict::OutcomeUnknown, Verdict::ReadOnly] {
            assert!(!shows_primary(verdict, &Session::Open), "{verdict:?}");
        }
        for verdict in [Verdict::Application, Verdict::Conflict, Verdict::Aborted, Verdict::Stale] {
            assert!(shows_primary(verdict, &Session::Open), "{verdict:?}");
            assert!(!shows_primary(verdict, &Session::Ended(None)), "{verdict:?}: the error of another call");
        }
    }
}
