//! Finds out what became of a transaction whose COMMIT was not answered: asks the primary, as often as it takes, until the
//! rule in [`crate::commit`] knows or the deadline is over.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::SemaphorePermit;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::classify::{explain, not_offered};
use crate::commit::Ledger;
use crate::commit::{
    self, Life, Located, Marker, Proof, Settled, Signature, Unsettled, XactStatus, locate, wants_proof,
};
use crate::error::Error;
use crate::observe::Settlement;
use crate::pool::{Client, Pool, SettleSession, Settling};
use crate::retry::Exponential;
use crate::server::SessionClient;
use crate::settle::ledger::Entered;
use crate::settle::wal::{self, Backend, Said};
use crate::topology::GenerationId;

/// A doubt that comes up at the end of a call's time is still looked into for so long: a wrong "unknown" costs its caller
/// more than a late answer.
const AT_LEAST: Duration = Duration::from_secs(5);
/// So long a settler waits for a confirmation before it lets another one ask.
const HOLD: Duration = Duration::from_millis(50);
const PAUSE: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(250));

/// What a transaction can be asked for by.
#[derive(Debug)]
pub(super) struct Mark {
    pub(super) by: Settler,
    pub(super) backend: Backend,
    pub(super) generation: GenerationId,
    /// The server's, where it lets itself be identified.
    pub(super) life: Option<Life>,
    /// What the pool has signed the timeline with before.
    pub(super) signature: Option<Arc<Signature>>,
}

impl Mark {
    /// Does this session lead to the server that the transaction ran on, in the same life?
    fn is_of<C: SessionClient>(&self, witness: &SettleSession<'_, C>) -> bool {
        match (&self.life, witness.life()) {
            (Some(then), Some(now)) => then.is(&now),
            _ => self.generation == witness.generation(),
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

/// What became of it, and the generation whose primary said so. Cancel-safe: a settler does nothing that another could not do
/// again.
pub(super) async fn settle<C: SessionClient>(
    pool: &Pool<C>,
    mark: &Mark,
    deadline: Instant,
) -> Result<(Outcome, GenerationId), Unsettled> {
    let began = Instant::now();
    let deadline = deadline.max(began + AT_LEAST);
    let mut pauses = Exponential::new(PAUSE.0, 2.0, PAUSE.1).jitter(pool.next_seed());
    let mut reason = Unsettled::NoPrimary;
    let settling = pool.settling();
    let rounds = async {
        loop {
            if let Some(settled) = round(&settling, mark, began, &mut reason).await {
                return settled;
            }
            sleep(pauses.next().unwrap_or(PAUSE.1)).await;
        }
    };
    // Around the loop, not in it: a round that begins late ends at once, and without an answer.
    let settled = timeout_at(deadline, rounds).await.unwrap_or(Err(reason));
    pool.observer().settled(mark.generation, settled.map(|(outcome, _)| outcome).into(), began.elapsed());
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
    settling: &Settling<'_, C>,
    mark: &Mark,
    began: Instant,
    reason: &mut Unsettled,
) -> Option<Result<(Outcome, GenerationId), Unsettled>> {
    let (mut permit, witness) = match settling.session().await {
        Ok(session) => session,
        Err(Error::Closed | Error::RuntimeEnded) => return Some(Err(Unsettled::NoPrimary)),
        Err(_) => {
            *reason = Unsettled::NoPrimary;
            return None;
        }
    };
    let (ended, clean) = tokio::select! {
        biased;
        answer = ask(settling, &witness, mark, began, reason, &mut permit) => answer,
        // Sessions of a wrapped pool do not end with their generation, and a server that was left may never answer.
        () = witness.evicted() => (None, false),
    };
    let generation = witness.generation();
    // Before the permit ends: whoever has it next finds the session.
    if clean {
        settling.keep(witness);
    }
    ended.map(|settled| settled.map(|outcome| (outcome, generation)))
}

/// And whether the session is fit for another question.
async fn ask<C: SessionClient>(
    settling: &Settling<'_, C>,
    witness: &SettleSession<'_, C>,
    mark: &Mark,
    began: Instant,
    reason: &mut Unsettled,
    permit: &mut Option<SemaphorePermit<'_>>,
) -> (Option<Result<Outcome, Unsettled>>, bool) {
    let settled = match question(witness, mark).await {
        Ok(Some(settled)) => settled,
        // A proxy has led the question to a server that the pool has not verified, and may not use.
        Ok(None) => {
            settling.suspect(witness.generation());
            *reason = Unsettled::NoPrimary;
            return (None, false);
        }
        Err(Some(error)) if !not_offered(&error) => return (None, false),
        Err(_) => return (Some(Err(Unsettled::NotOffered)), false),
    };
    match settled {
        Settled::InProgress => {
            *reason = Unsettled::InProgress;
            (None, ends_abandoned(witness, mark, began.elapsed() > wal::LATE).await)
        }
        Settled::Committed => holding(permit, confirmed(witness, mark, Outcome::Committed, reason)).await,
        Settled::NotCommitted => holding(permit, confirmed(witness, mark, Outcome::NotCommitted, reason)).await,
        Settled::Unknown(why) => (Some(Err(why)), false),
    }
}

/// Mostly a confirmation takes a moment, and the next settler has this session; one that waits for a standby that is not
/// there must not keep the others from asking.
async fn holding<T>(permit: &mut Option<SemaphorePermit<'_>>, confirmation: impl Future<Output = T>) -> T {
    let mut confirmation = pin!(confirmation);
    if let Ok(confirmed) = timeout(HOLD, confirmation.as_mut()).await {
        return confirmed;
    }
    *permit = None;
    confirmation.await
}

/// Ends the settler's transaction too; the session is fit for another one then.
async fn ends_abandoned<C: SessionClient>(witness: &SettleSession<'_, C>, mark: &Mark, late: bool) -> bool {
    if !mark.is_of(witness) {
        return false;
    }
    let ended = wal::end_abandoned(witness.client(), mark.backend, late).await;
    if let Err(error) = &ended {
        tracing::debug!("an abandoned session could not be ended: {}", explain(error));
    }
    ended.is_ok()
}

/// `Ok(None)`: it was not answered by the server that the session was verified with.
async fn question<C: SessionClient>(
    witness: &SettleSession<'_, C>,
    mark: &Mark,
) -> Result<Option<Settled>, Option<tokio_postgres::Error>> {
    let client = witness.client();
    match &mark.by {
        Settler::Wal(marker) => {
            let primaries_since = witness.generation().get().saturating_sub(mark.generation.get());
            ask_log(client, witness.life(), mark, marker, primaries_since).await
        }
        Settler::Ledger(ledger, entered) => ledger.ask(client, witness.life(), entered).await,
    }
}

/// `verified`: the life that the pool has verified the session's server in. `Ok(None)`: this is another one.
async fn ask_log(
    client: &tokio_postgres::Client,
    verified: Option<Life>,
    mark: &Mark,
    marker: &Marker,
    primaries_since: u64,
) -> Result<Option<Settled>, Option<tokio_postgres::Error>> {
    let Said { mut now, status, evidence } = wal::look(client, marker.xid, primaries_since, verified).await?;
    if verified.is_some_and(|verified| !verified.is(&now.life)) {
        return Ok(None);
    }
    remember_ancestor(&mut now.life, verified);
    let wanted = wants_proof(marker, &now, evidence);
    let proof = if wanted { wal::prove(client, marker, evidence).await? } else { Proof::Nothing };
    let located = match (locate(marker, &now, &proof), &mark.signature) {
        (Located::Unclear(Unsettled::Unproven), Some(signature)) => {
            let borne = wal::bears(client, signature).await?;
            locate(marker, &now, &Proof::Signature { borne })
        }
        (located, _) => located,
    };
    Ok(Some(commit::settle(located, status)))
}

/// The server shows the timeline that it came from until its first checkpoint. The pool may have verified it before that.
fn remember_ancestor(now: &mut Life, verified: Option<Life>) {
    if let Some(verified) = verified.filter(|verified| verified.is(now)) {
        now.ancestor = now.ancestor.or(verified.ancestor);
    }
}

/// Waits until the synchronous standbys have what was found: a successor must not say otherwise. And whether the session is
/// fit for another question.
async fn confirmed<C: SessionClient>(
    witness: &SettleSession<'_, C>,
    mark: &Mark,
    outcome: Outcome,
    reason: &mut Unsettled,
) -> (Option<Result<Outcome, Unsettled>>, bool) {
    *reason = Unsettled::NotReplicated;
    witness.set_committing(true);
    let waited = match (&mark.by, outcome) {
        // What is not in the log cannot be waited for.
        (Settler::Wal(_), Outcome::NotCommitted) => {
            let rolled_back = witness.client().batch_execute("ROLLBACK").await;
            witness.set_committing(false);
            return (Some(Ok(outcome)), rolled_back.is_ok());
        }
        (Settler::Wal(_), Outcome::Committed) => wal::confirm(witness.client()).await,
        (Settler::Ledger(ledger, _), _) => ledger.confirm(witness.client()).await,
    };
    witness.set_committing(false);
    let confirmed = waited.is_ok() && !witness.notices().not_replicated();
    (confirmed.then_some(Ok(outcome)), confirmed)
}

/// Was it committed, as far as this session's server can tell? Asked before work runs again of which the pool itself has
/// committed nothing: the closure may have. `None`: the server did not say. Leaves the session without a transaction.
pub(super) async fn was_committed<C: SessionClient>(client: &Client<C>, mark: &Mark) -> Option<bool> {
    let asked = async {
        let settled = match &mark.by {
            Settler::Wal(marker) => {
                let primaries_since = client.generation().get().saturating_sub(mark.generation.get());
                // Mostly not, and then no more is asked.
                let Said { now, status, .. } =
                    wal::look(client, marker.xid, primaries_since, client.life()).await.ok()?;
                if status != Some(XactStatus::Committed) {
                    return client.life().is_none_or(|life| life.is(&now.life)).then_some(false);
                }
                ask_log(client, client.life(), mark, marker, primaries_since).await.ok()??
            }
            Settler::Ledger(ledger, entered) => return ledger.has(client, client.life(), entered).await.ok()?,
        };
        Some(settled == Settled::Committed)
    };
    let committed = tokio::select! {
        biased;
        committed = asked => committed,
        () = client.evicted() => return None,
    };
    // Where that fails, so does BEGIN.
    let _ = client.batch_execute("ROLLBACK").await;
    committed
}
