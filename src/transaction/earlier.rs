//! Attempts of a call whose COMMIT was in doubt, and was found not to be in the primary's history.
//!
//! That holds for one history. Where replication is asynchronous, a standby that lagged may be promoted first, and one that had
//! the transaction later. So before the work runs on a primary that has not been asked, it is asked.

use tokio::time::Instant;

use super::settle::{Mark, Outcome, settle};
use crate::commit::Unsettled;
use crate::pool::Pool;
use crate::server::SessionClient;
use crate::topology::GenerationId;

/// One of them.
pub(super) struct Earlier<T> {
    pub(super) mark: Mark,
    /// What its closure returned.
    pub(super) value: T,
    /// The generation whose primary does not have it.
    pub(super) absent_from: GenerationId,
}

/// Looks for the earlier attempts of a call in the history of this generation's primary. `Ok(Some)`: one of them was committed.
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
