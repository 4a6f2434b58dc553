//! Remembers two kinds of earlier attempts of a call: those whose COMMIT was in doubt and is not in the primary's
//! history, and those whose session ended before the pool sent COMMIT, as the closure may have committed by itself.
//!
//! "Not committed" holds for one history. With asynchronous replication, a standby that lagged may be promoted first,
//! and later another one that has the transaction. So before the work runs on a primary that has not been asked yet,
//! that primary is asked. By the lemma of docs/exactly-once.md, no history then contains two attempts of one call. For
//! the same reason an error means "not committed" only while the primary that said so remains the primary. The tests
//! are `tests/it/history/earlier.rs` and `commit/tests/calls.rs`.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::settle::{Inside, Mark, Outcome, ended_inside, settle};
use crate::classify::Verdict;
use crate::commit::Unsettled;
use crate::error::{CommitUnknown, EndedInside, Error};
use crate::pool::{Client, Pool};
use crate::server::SessionClient;
use crate::topology::GenerationId;

/// How long the error of a call that will not run again is held back at most.
const ASKED_WITHIN: Duration = Duration::from_millis(500);

/// An attempt whose COMMIT was not answered, and that is not in the primary's history.
pub(super) struct Earlier<T> {
    pub(super) mark: Mark,
    /// The value that its closure returned.
    pub(super) value: T,
    /// The generation of the primary that does not have it.
    pub(super) absent_from: GenerationId,
}

/// Looks for a call's earlier attempts in the history of this generation's primary. `Ok(Some)`: one of them was
/// committed.
pub(super) async fn find<C: SessionClient, T>(
    pool: &Pool<C>,
    earlier: &mut Vec<Earlier<T>>,
    generation: GenerationId,
    deadline: Instant,
) -> Result<Option<T>, Unsettled> {
    for index in 0..earlier.len() {
        let Some(attempt) = earlier.get_mut(index).filter(|attempt| attempt.absent_from != generation) else {
            continue;
        };
        // Boxed, as it is rare and large, and every waiting call would carry it.
        match Box::pin(settle(pool, &attempt.mark, deadline)).await? {
            (Outcome::Committed, _) => return Ok(Some(earlier.swap_remove(index).value)),
            (Outcome::NotCommitted, absent_from) => attempt.absent_from = absent_from,
        }
    }
    Ok(None)
}

/// Returns the error of a call, or "unknown" if the primary that said "not committed" is no longer the primary.
pub(super) fn unless_denied<T>(earlier: &[Earlier<T>], by: impl Fn(GenerationId) -> bool, error: Error) -> Error {
    if are_denied(earlier.iter().map(|attempt| attempt.absent_from), by) {
        return error;
    }
    tracing::debug!(%error, "an earlier run may have been committed: the primary that did not have it was lost");
    Error::CommitUnknown(Box::new(CommitUnknown::earlier(Unsettled::NoPrimary)))
}

/// `by` tells whether the primary of a generation is still the primary.
fn are_denied(absent_from: impl IntoIterator<Item = GenerationId>, by: impl Fn(GenerationId) -> bool) -> bool {
    absent_from.into_iter().all(by)
}

/// Returns whether an attempt with this verdict shows that its server was still the primary.
pub(super) fn shows_primary(verdict: Verdict) -> bool {
    !verdict.is_loss() && verdict != Verdict::ReadOnly
}

/// An attempt whose session was lost before the pool sent COMMIT.
pub(super) struct Lost {
    mark: Mark,
    error: Error,
    /// The generation whose primary was last asked about it.
    asked: Option<GenerationId>,
}

impl Lost {
    pub(super) fn new(mark: Mark, error: Error) -> Self {
        Self { mark, error, asked: None }
    }
}

/// Finds out whether a closure committed or prepared one of them itself, which nothing else would show. Asks once on each
/// primary.
pub(super) async fn found_ended<C: SessionClient>(client: &Client<C>, lost: &mut Vec<Lost>) -> Option<Error> {
    let generation = client.generation();
    for index in 0..lost.len() {
        let Some(attempt) = lost.get_mut(index).filter(|attempt| attempt.asked != Some(generation)) else {
            continue;
        };
        match ended_inside(client, &attempt.mark).await {
            Some(Inside::Ended(ending)) => {
                let error = lost.swap_remove(index).error;
                return Some(EndedInside::error(ending, Some(error)));
            }
            Some(Inside::No) => attempt.asked = Some(generation),
            // It is asked about again at the next attempt.
            None => {}
        }
    }
    None
}

/// Returns the error of a call that will not run again. If the closure of its last attempt has ended the transaction itself,
/// the error says so. This is asked only if a primary is there: the call does not wait for one.
pub(super) async fn or_ended_at_last<C: SessionClient>(pool: &Pool<C>, mark: Mark, error: Error) -> Error {
    // This is rare and large. Without the box, every waiting call would carry it.
    let asked = Box::pin(async {
        let client = pool.get_for_transaction(Instant::now() + ASKED_WITHIN).await.ok()?;
        ended_inside(&client, &mark).await
    });
    match timeout(ASKED_WITHIN, asked).await {
        Ok(Some(Inside::Ended(ending))) => EndedInside::error(ending, Some(error)),
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
            assert!(!shows_primary(verdict), "{verdict:?}");
        }
        for verdict in [Verdict::Application, Verdict::Conflict, Verdict::Aborted, Verdict::Stale] {
            assert!(shows_primary(verdict), "{verdict:?}");
        }
    }
}
