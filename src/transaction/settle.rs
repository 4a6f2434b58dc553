//! Finds out what became of a transaction whose COMMIT was not answered: asks the primary, as often as it takes, until the
//! rule in [`crate::commit`] knows or the deadline is over.

use std::time::Duration;

use tokio::sync::SemaphorePermit;
use tokio::time::{Instant, sleep, timeout_at};

use crate::classify::{explain, not_offered};
use crate::commit::ledger::{Entered, Ledger};
use crate::commit::wal::{self, Backend};
use crate::commit::{Life, Located, Marker, Settled, Unsettled, locate};
use crate::error::Error;
use crate::observe::Settlement;
use crate::pool::{Aside, Pool};
use crate::retry::Exponential;
use crate::server::SessionClient;
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
    /// The server's, where it lets itself be identified.
    pub(super) life: Option<Life>,
}

impl Mark {
    /// Does this session lead to the server that the transaction ran on, in the same life?
    fn is_of<C: SessionClient>(&self, aside: &Aside<C>) -> bool {
        match (&self.life, aside.life()) {
            (Some(then), Some(now)) => then.is(&now),
            _ => self.generation == aside.generation(),
        }
    }
}

#[derive(Debug)]
pub(super) enum Settler {
    Wal(Marker),
    Ledger(Ledger, Entered),
}

/// What became of it, once that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Committed,
    NotCommitted,
}

/// Cancel-safe: a settler does nothing that another could not do again.
pub(super) async fn settle<C: SessionClient>(
    pool: &Pool<C>,
    mark: &Mark,
    deadline: Instant,
) -> Result<Outcome, Unsettled> {
    let began = Instant::now();
    let deadline = deadline.max(began + AT_LEAST);
    let mut pauses = Exponential::new(PAUSE.0, 2.0, PAUSE.1).jitter(pool.next_seed());
    let mut reason = Unsettled::NoPrimary;
    let rounds = async {
        loop {
            if let Some(settled) = round(pool, mark, &mut reason).await {
                return settled;
            }
            sleep(pauses.next().unwrap_or(PAUSE.1)).await;
        }
    };
    // Around the loop, not in it: a round that begins late ends at once, and without an answer.
    let settled = timeout_at(deadline, rounds).await.unwrap_or(Err(reason));
    pool.observer().settled(mark.generation, settled.into(), began.elapsed());
    settled
}

impl From<Result<Outcome, Unsettled>> for Settlement {
    fn from(settled: Result<Outcome, Unsettled>) -> Self {
        match settled {
            Ok(Outcome::Committed) => Self::Committed,
            Ok(Outcome::NotCommitted) => Self::NotCommitted,
            Err(why) => Self::Unknown(why),
        }
    }
}

/// One question; `None`: ask again, and if there is no time left, `reason` is why.
async fn round<C: SessionClient>(
    pool: &Pool<C>,
    mark: &Mark,
    reason: &mut Unsettled,
) -> Option<Result<Outcome, Unsettled>> {
    // Never closed, so waiting for it cannot fail.
    let permit = pool.settlers().acquire().await.ok();
    let aside = match pool.aside().await {
        Ok(aside) => aside,
        Err(Error::Closed) => return Some(Err(Unsettled::NoPrimary)),
        Err(_) => {
            *reason = Unsettled::NoPrimary;
            return None;
        }
    };
    tokio::select! {
        biased;
        answer = ask(&aside, mark, reason, permit) => answer,
        // Sessions of a wrapped pool do not end with their generation, and a server that was left may never answer.
        () = aside.evicted() => None,
    }
}

/// `permit` is held for the question alone: to be confirmed may take long, and costs the server nothing.
async fn ask<C: SessionClient>(
    aside: &Aside<C>,
    mark: &Mark,
    reason: &mut Unsettled,
    permit: Option<SemaphorePermit<'_>>,
) -> Option<Result<Outcome, Unsettled>> {
    let settled = match question(aside, mark).await {
        Ok(settled) => settled,
        Err(Some(error)) if !not_offered(&error) => return None,
        Err(_) => return Some(Err(Unsettled::NotOffered)),
    };
    drop(permit);
    match settled {
        Settled::InProgress => {
            *reason = Unsettled::InProgress;
            if mark.is_of(aside)
                && let Err(error) = wal::end_abandoned(aside.client(), mark.backend).await
            {
                tracing::debug!("an abandoned session could not be ended: {}", explain(&error));
            }
            None
        }
        Settled::Committed => confirmed(aside, mark, Outcome::Committed, reason).await,
        Settled::NotCommitted => confirmed(aside, mark, Outcome::NotCommitted, reason).await,
        Settled::Unknown(why) => Some(Err(why)),
    }
}

async fn question<C: SessionClient>(aside: &Aside<C>, mark: &Mark) -> Result<Settled, Option<tokio_postgres::Error>> {
    let client = aside.client();
    match &mark.by {
        Settler::Wal(marker) => {
            let primaries_since = aside.generation().get().saturating_sub(mark.generation.get());
            match locate(marker, &wal::look(client, primaries_since).await?) {
                Located::Here => Ok(wal::status(client, marker.xid).await?.into()),
                Located::Lost => Ok(Settled::NotCommitted),
                Located::Unclear(why) => Ok(Settled::Unknown(why)),
            }
        }
        Settler::Ledger(ledger, entered) => ledger.ask(client, entered).await,
    }
}

/// Waits until the synchronous standbys have what was found: a successor must not say otherwise.
async fn confirmed<C: SessionClient>(
    aside: &Aside<C>,
    mark: &Mark,
    outcome: Outcome,
    reason: &mut Unsettled,
) -> Option<Result<Outcome, Unsettled>> {
    *reason = Unsettled::NotReplicated;
    let waited = match (&mark.by, outcome) {
        // What is not in the log cannot be waited for.
        (Settler::Wal(_), Outcome::NotCommitted) => Ok(()),
        (Settler::Wal(_), Outcome::Committed) => wal::confirm(aside.client()).await,
        (Settler::Ledger(ledger, _), _) => ledger.confirm(aside.client()).await,
    };
    let confirmed = waited.is_ok() && !aside.notices().not_replicated();
    confirmed.then_some(Ok(outcome))
}
