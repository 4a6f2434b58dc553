//! Finds out what became of a transaction whose COMMIT was not answered: asks the primary, as often as it takes, until the
//! rule in [`crate::commit`] knows or the deadline is over.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use super::run::Held;
use crate::classify::not_offered;
use crate::commit::ledger::Ledger;
use crate::commit::wal::{self, Backend};
use crate::commit::{Located, Marker, Settled, Unsettled, ledger_remembers, locate};
use crate::error::Error;
use crate::pool::Pool;
use crate::retry::Exponential;
use crate::topology::GenerationId;

/// A doubt that comes up at the end of a call's time is still looked into for so long: a wrong "unknown" costs its caller
/// more than a late answer.
const AT_LEAST: Duration = Duration::from_secs(5);
const PAUSE: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(250));

/// What a transaction can be asked for by.
#[derive(Debug)]
pub(super) struct Mark {
    pub(super) by: Settler,
    pub(super) backend: Backend,
    pub(super) generation: GenerationId,
    pub(super) began: Instant,
}

#[derive(Debug)]
pub(super) enum Settler {
    Wal(Marker),
    Ledger(Ledger, String),
}

/// What became of it, once that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Committed,
    NotCommitted,
}

/// Cancel-safe: a settler does nothing that another could not do again.
pub(super) async fn settle(pool: &Pool, mark: &Mark, deadline: Instant) -> Result<Outcome, Unsettled> {
    let deadline = deadline.max(Instant::now() + AT_LEAST);
    let mut pauses = Exponential::new(PAUSE.0, 2.0, PAUSE.1).jitter(pool.next_seed());
    let mut reason = Unsettled::NoPrimary;
    let rounds = async {
        loop {
            if let Some(settled) = round(pool, mark, deadline, &mut reason).await {
                return settled;
            }
            sleep(pauses.next().unwrap_or(PAUSE.1)).await;
        }
    };
    // Around the loop, not in it: a round that begins late ends at once, and without an answer.
    let settled = timeout_at(deadline, rounds).await;
    if let Ok(settled) = settled {
        tracing::info!(?settled, "a commit without an answer was settled");
    }
    settled.unwrap_or(Err(reason))
}

/// One question; `None`: ask again, and if there is no time left, `reason` is why.
async fn round(
    pool: &Pool,
    mark: &Mark,
    deadline: Instant,
    reason: &mut Unsettled,
) -> Option<Result<Outcome, Unsettled>> {
    let mut held = match pool.get_until(deadline).await {
        Ok(client) => Held::new(client),
        Err(Error::Unavailable(_)) => return None,
        Err(_) => return Some(Err(Unsettled::NoPrimary)),
    };
    match question(&held, mark).await {
        Ok(Settled::InProgress) => {
            *reason = Unsettled::InProgress;
            // Its process is on this server only if this is still the server that it began on.
            let here = held.client().generation() == mark.generation;
            let clean = !here || wal::end_abandoned(held.client(), mark.backend).await.is_ok();
            held.clean(clean);
            None
        }
        Ok(Settled::Committed) => {
            *reason = Unsettled::NotReplicated;
            confirmed(&mut held, mark, Outcome::Committed).await
        }
        Ok(Settled::NotCommitted) => {
            *reason = Unsettled::InProgress;
            confirmed(&mut held, mark, Outcome::NotCommitted).await
        }
        Ok(Settled::Unknown(why)) => {
            held.clean(true);
            Some(Err(why))
        }
        Err(Some(error)) if !not_offered(&error) => None,
        Err(_) => Some(Err(Unsettled::NotOffered)),
    }
}

async fn question(held: &Held, mark: &Mark) -> Result<Settled, Option<tokio_postgres::Error>> {
    let client = held.client();
    match &mark.by {
        Settler::Wal(marker) => {
            let primaries_since = client.generation().get().saturating_sub(mark.generation.get());
            match locate(marker, &wal::look(client, primaries_since).await?) {
                Located::Here => Ok(wal::status(client, marker.xid).await?.into()),
                Located::Lost => Ok(Settled::NotCommitted),
                Located::Unclear(why) => Ok(Settled::Unknown(why)),
            }
        }
        Settler::Ledger(ledger, id) => {
            if !ledger_remembers(mark.began.elapsed(), ledger.kept_for()) {
                return Ok(Settled::Unknown(Unsettled::TooOld));
            }
            Ok(ledger.ask(client, id).await?)
        }
    }
}

/// Waits until the synchronous standbys have what was found: a successor must not say otherwise.
async fn confirmed(held: &mut Held, mark: &Mark, outcome: Outcome) -> Option<Result<Outcome, Unsettled>> {
    let client = held.client();
    client.notices().forget();
    let waited = match (&mark.by, outcome) {
        // What is not in the log cannot be waited for.
        (Settler::Wal(_), Outcome::NotCommitted) => Ok(()),
        (Settler::Wal(_), Outcome::Committed) => wal::confirm(client).await,
        (Settler::Ledger(ledger, id), _) => ledger.confirm(client, id).await,
    };
    let confirmed = waited.is_ok() && !client.notices().not_replicated();
    held.clean(waited.is_ok());
    confirmed.then_some(Ok(outcome))
}
