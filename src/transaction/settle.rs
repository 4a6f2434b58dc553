//! Finds out the outcome of a transaction whose COMMIT was not answered. Asks the primary repeatedly, until the rule in
//! [`crate::commit`] decides or the deadline has passed.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::SemaphorePermit;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::classify::{ends_session, explain, not_offered};
use crate::commit::Ledger;
use crate::commit::{
    self, Life, Located, Proof, SettleVerdict, Signature, Unsettled, WalMark, XactStatus, locate, wants_proof,
};
use crate::error::{Ending, Error};
use crate::observe::SettledOutcome;
use crate::pool::{Client, Pool, SettleGuard, SettleSession};
use crate::retry::Exponential;
use crate::server::SessionClient;
use crate::settle::ledger::Entered;
use crate::settle::lost;
use crate::settle::wal::{self, Backend, EndUnderWay, LogAnswer};
use crate::sync::log_safely;
use crate::topology::GenerationId;

/// The shortest time for settling a commit, even if the call's deadline is earlier. A needless "unknown" costs the
/// caller more than a late answer.
pub(super) const AT_LEAST: Duration = Duration::from_secs(5);
/// How long a settler waits for a confirmation by the standbys before it lets another settler ask.
const HOLD: Duration = Duration::from_millis(50);
const PAUSE: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(250));

/// The mark by which a transaction can be found.
#[derive(Debug)]
pub(super) struct SettleKey {
    pub(super) by: SettleBy,
    pub(super) backend: Backend,
    pub(super) generation: GenerationId,
    /// The system identifier of the server on which the transaction ran, if the server has shown it.
    pub(super) cluster: Option<u64>,
    /// The life of the server on which the transaction ran, if the server was identified.
    pub(super) life: Option<Life>,
    /// The pool's signature of the timeline, written before this transaction.
    pub(super) signature: Option<Arc<Signature>>,
}

impl SettleKey {
    /// Returns whether this session reaches the server on which the transaction ran, in the same life.
    fn is_of<C: SessionClient>(&self, session: &SettleSession<'_, C>) -> bool {
        self.is_life(session.life(), session.generation())
    }

    /// Returns whether this session is known to reach that server in that life. Then its "not committed" is true of
    /// every history, because only that server could have written the commit record.
    fn is_surely_of<C: SessionClient>(&self, session: &SettleSession<'_, C>) -> bool {
        self.life.zip(session.life()).is_some_and(|(then, now)| then.is(&now))
    }

    /// Returns whether this is the system identifier of another cluster. That cluster knows nothing of the transaction.
    fn is_foreign_to(&self, cluster: Option<u64>) -> bool {
        self.cluster.zip(cluster).is_some_and(|(then, now)| then != now)
    }

    pub(super) fn is_life_of<C: SessionClient>(&self, client: &Client<C>) -> bool {
        self.is_life(client.life(), client.generation())
    }

    fn is_life(&self, now: Option<Life>, generation: GenerationId) -> bool {
        match (&self.life, now) {
            (Some(then), Some(now)) => then.is(&now),
            _ => self.generation == generation,
        }
    }
}

/// Where the mark is: in the write-ahead log, or in a ledger's row.
#[derive(Debug)]
pub(super) enum SettleBy {
    Wal(WalMark),
    Ledger(Ledger, Entered),
}

/// The outcome of a transaction that was settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SettleOutcome {
    Committed,
    /// It is not in the history of the primary that was asked.
    NotCommitted,
    /// The server on which it ran says so, in the same life. It is in no history, and never will be.
    Aborted,
    /// `PREPARE TRANSACTION` has stored it. So the closure has ended it itself.
    Prepared,
}

/// Returns the outcome, and the generation of the primary that reported it. Cancel-safe: another settler can repeat
/// whatever this one has done.
pub(super) async fn settle<C: SessionClient>(
    pool: &Pool<C>,
    mark: &SettleKey,
    deadline: Instant,
) -> Result<(SettleOutcome, GenerationId), Unsettled> {
    let began = Instant::now();
    let deadline = deadline.max(began + AT_LEAST);
    let mut pauses = Exponential::new(PAUSE.0, 2.0, PAUSE.1).jitter(pool.next_seed());
    let mut why = WhyNot::default();
    let settling = SettleGuard::new(pool);
    let rounds = async {
        loop {
            if let Some(settled) = round(&settling, mark, began, &mut why).await {
                return settled;
            }
            sleep(pauses.next().unwrap_or(PAUSE.1)).await;
        }
    };
    // The time-out is around the whole loop, so that a round that begins late ends at the deadline, too.
    let settled =
        timeout_at(deadline, rounds).await.unwrap_or_else(|_| Err(why.at_last(|asked| pool.is_current(asked))));
    pool.observer().settled(mark.generation, reported(settled), began.elapsed());
    settled
}

/// Why there is no answer yet.
#[derive(Debug)]
struct WhyNot {
    reason: Unsettled,
    /// The generation whose primary has given this reason.
    asked: Option<GenerationId>,
    /// It waits for a session.
    waits: bool,
}

impl Default for WhyNot {
    fn default() -> Self {
        Self { reason: Unsettled::NoPrimary, asked: None, waits: false }
    }
}

impl WhyNot {
    /// A session to the primary of this generation is there. What an earlier primary has said is no reason any more.
    fn asks(&mut self, generation: GenerationId) {
        self.waits = false;
        if self.asked.replace(generation) != Some(generation) {
            self.reason = Unsettled::NoPrimary;
        }
    }

    /// The reason if no time is left. `is_current` returns whether callers get connections to this primary.
    fn at_last(&self, is_current: impl Fn(GenerationId) -> bool) -> Unsettled {
        if self.waits && !self.asked.is_some_and(is_current) { Unsettled::NoPrimary } else { self.reason }
    }
}

/// The outcome as an event reports it.
fn reported(settled: Result<(SettleOutcome, GenerationId), Unsettled>) -> SettledOutcome {
    match settled {
        Ok((SettleOutcome::Committed, _)) => SettledOutcome::Committed,
        Ok((SettleOutcome::NotCommitted | SettleOutcome::Aborted, _)) => SettledOutcome::NotCommitted,
        // It may still be committed, with COMMIT PREPARED.
        Ok((SettleOutcome::Prepared, _)) => SettledOutcome::Unknown(Unsettled::InProgress),
        Err(why) => SettledOutcome::Unknown(why),
    }
}

/// Asks once. `None`: ask again. `why` is for the case that no time is left.
async fn round<C: SessionClient>(
    settling: &SettleGuard<'_, C>,
    mark: &SettleKey,
    began: Instant,
    why: &mut WhyNot,
) -> Option<Result<(SettleOutcome, GenerationId), Unsettled>> {
    why.waits = true;
    let (mut permit, session) = match settling.session().await {
        Ok(session) => session,
        Err(Error::Closed | Error::RuntimeEnded) => return Some(Err(Unsettled::Closed)),
        Err(_) => return None,
    };
    why.asks(session.generation());
    let (ended, clean) = tokio::select! {
        biased;
        answer = ask(settling, &session, mark, began, &mut why.reason, &mut permit) => answer,
        // The session of a wrapped pool does not end with its generation. Without this, the settler could wait for ever
        // for a server that is no longer the primary.
        () = session.evicted() => (None, false),
    };
    let generation = session.generation();
    // Keep the session before the permit is released, so that the permit's next holder finds it.
    if clean {
        settling.keep(session);
    }
    ended.map(|settled| settled.map(|outcome| (outcome, generation)))
}

/// Returns the outcome, and whether the session can be reused.
async fn ask<C: SessionClient>(
    settling: &SettleGuard<'_, C>,
    session: &SettleSession<'_, C>,
    mark: &SettleKey,
    began: Instant,
    reason: &mut Unsettled,
    permit: &mut Option<SemaphorePermit<'_>>,
) -> (Option<Result<SettleOutcome, Unsettled>>, bool) {
    let settled = match question(session, mark).await {
        Ok(Some(settled)) => settled,
        // A proxy has connected the question to another server. The pool has not verified that server, so its answer
        // must not count.
        Ok(None) => {
            settling.suspect(session.generation());
            *reason = Unsettled::NoPrimary;
            return (None, false);
        }
        Err(Some(error)) if !not_offered(&error) => {
            log_safely(|| tracing::debug!("a commit in doubt could not be asked for: {}", explain(&error)));
            if error.as_db_error().is_some_and(|report| !ends_session(report)) {
                *reason = Unsettled::Failed;
            }
            return (None, false);
        }
        Err(_) if session.is_used() => {
            *reason = Unsettled::NotOffered;
            return (None, false);
        }
        Err(_) => return (Some(Err(Unsettled::NotOffered)), false),
    };
    match settled {
        SettleVerdict::InProgress if planted!("does not wait for a commit in progress") => {
            (Some(Ok(SettleOutcome::NotCommitted)), false)
        }
        SettleVerdict::InProgress if is_prepared(session, mark).await => (Some(Ok(SettleOutcome::Prepared)), false),
        SettleVerdict::InProgress => {
            *reason = Unsettled::InProgress;
            (None, ends_abandoned(session, mark, began.elapsed() > lost::LATE).await)
        }
        SettleVerdict::Committed => holding(permit, confirmed(session, mark, SettleOutcome::Committed, reason)).await,
        SettleVerdict::NotCommitted => {
            let outcome = if mark.is_surely_of(session) { SettleOutcome::Aborted } else { SettleOutcome::NotCommitted };
            holding(permit, confirmed(session, mark, outcome, reason)).await
        }
        SettleVerdict::Unknown(why) => (Some(Err(why)), false),
    }
}

/// Waits for a confirmation. It usually takes a moment, and the next settler then gets this session. If it takes
/// longer, perhaps because a standby is missing, this releases the permit so that other settlers can ask.
async fn holding<T>(permit: &mut Option<SemaphorePermit<'_>>, confirmation: impl Future<Output = T>) -> T {
    let mut confirmation = pin!(confirmation);
    if let Ok(confirmed) = timeout(HOLD, confirmation.as_mut()).await {
        return confirmed;
    }
    *permit = None;
    confirmation.await
}

/// Returns whether the transaction in progress was prepared. Then no waiting would show its outcome.
async fn is_prepared<C: SessionClient>(session: &SettleSession<'_, C>, mark: &SettleKey) -> bool {
    let ends = match &mark.by {
        SettleBy::Wal(_) => wal::ends(session.client(), mark.backend).await,
        // The lock on the row has failed the settler's transaction. In another life of the server, another transaction
        // may have the same id.
        SettleBy::Ledger(..) if mark.is_of(session) => wal::ends_outside(session.client(), mark.backend).await,
        SettleBy::Ledger(..) => return false,
    };
    matches!(ends, Ok(Some(EndUnderWay::Prepared)))
}

/// Ends the abandoned session of the transaction, and the settler's own transaction. Returns whether the settler's
/// session can be reused.
async fn ends_abandoned<C: SessionClient>(session: &SettleSession<'_, C>, mark: &SettleKey, late: bool) -> bool {
    if !mark.is_of(session) {
        return false;
    }
    let ended = lost::end_abandoned(session.client(), mark.backend, late).await;
    if let Err(error) = &ended {
        log_safely(|| tracing::debug!("an abandoned session could not be ended: {}", explain(error)));
    }
    ended.is_ok()
}

/// `Ok(None)`: the server that answered is not the one that was verified for this session. Another cluster is not
/// asked, because a ledger's answer there would be about that cluster, and would leave a fence in its table.
async fn question<C: SessionClient>(
    session: &SettleSession<'_, C>,
    mark: &SettleKey,
) -> Result<Option<SettleVerdict>, Option<tokio_postgres::Error>> {
    if mark.is_foreign_to(session.cluster()) {
        return Ok(Some(SettleVerdict::Unknown(Unsettled::OtherCluster)));
    }
    let client = session.client();
    match &mark.by {
        SettleBy::Wal(marker) => {
            let primaries_since = session.generation().get().saturating_sub(mark.generation.get());
            ask_log(client, session.life(), mark, marker, primaries_since).await
        }
        SettleBy::Ledger(ledger, entered) => ledger.ask(client, session.life(), entered).await,
    }
}

/// `verified` is the life in which the pool verified the session's server. `Ok(None)`: another server answered.
async fn ask_log(
    client: &tokio_postgres::Client,
    verified: Option<Life>,
    mark: &SettleKey,
    marker: &WalMark,
    primaries_since: u64,
) -> Result<Option<SettleVerdict>, Option<tokio_postgres::Error>> {
    let LogAnswer { mut now, status, evidence } = wal::look(client, marker.xid, primaries_since, verified).await?;
    if verified.is_some_and(|verified| !verified.is(&now.life)) {
        return Ok(None);
    }
    remember_ancestor(&mut now.life, verified);
    let wanted = wants_proof(marker, &now, evidence);
    let proof = if wanted { wal::prove(client, marker, evidence).await? } else { Proof::Nothing };
    let located = match (locate(marker, &now, &proof), &mark.signature) {
        (Located::Unclear(Unsettled::Unproven), Some(signature)) => {
            let found = wal::has_signature(client, signature).await?;
            locate(marker, &now, &Proof::Signature { found })
        }
        (located, _) => located,
    };
    seen!("evidence", "{evidence:?}, asked for: {wanted}");
    let located = if planted!("settles by the status alone") { Located::Here } else { located };
    Ok(Some(commit::settle(located, status)))
}

/// Adds what the pool learned earlier. A server shows its previous timeline only until its first checkpoint, and the
/// pool may have verified it before that.
fn remember_ancestor(now: &mut Life, verified: Option<Life>) {
    if let Some(verified) = verified.filter(|verified| verified.is(now)) {
        now.ancestor = now.ancestor.or(verified.ancestor);
    }
}

/// Waits until the synchronous standbys have all that the outcome depends on, so that no successor contradicts it.
/// Returns the outcome, and whether the session can be reused.
async fn confirmed<C: SessionClient>(
    session: &SettleSession<'_, C>,
    mark: &SettleKey,
    outcome: SettleOutcome,
    reason: &mut Unsettled,
) -> (Option<Result<SettleOutcome, Unsettled>>, bool) {
    *reason = Unsettled::NotReplicated;
    session.set_committing(true);
    let waited = match (&mark.by, outcome) {
        // No commit record exists, so there is nothing that the standbys could confirm.
        (SettleBy::Wal(_), SettleOutcome::NotCommitted | SettleOutcome::Aborted | SettleOutcome::Prepared) => {
            let rolled_back = session.client().batch_execute("ROLLBACK").await;
            session.set_committing(false);
            return (Some(Ok(outcome)), rolled_back.is_ok());
        }
        (SettleBy::Wal(_), SettleOutcome::Committed) if planted!("does not confirm") => {
            return (Some(Ok(outcome)), false);
        }
        (SettleBy::Wal(_), SettleOutcome::Committed) => wal::confirm(session.client()).await,
        (SettleBy::Ledger(ledger, _), _) => ledger.confirm(session.client()).await,
    };
    session.set_committing(false);
    let cancelled = session.notices().not_replicated() && !planted!("takes a cancelled confirmation for one");
    let confirmed = waited.unwrap_or(false) && !cancelled;
    (confirmed.then_some(Ok(outcome)), confirmed)
}

/// Asks this session's server whether the closure has ended its transaction itself. The pool asks this before it runs
/// work again for which it has not sent COMMIT. `None`: the server did not say. Leaves the session without a
/// transaction.
pub(super) async fn ended_inside<C: SessionClient>(client: &Client<C>, mark: &SettleKey) -> Option<Inside> {
    if mark.is_foreign_to(client.cluster()) {
        return Some(Inside::OtherCluster);
    }
    let mut asking = SettleQuestion { client, over: false };
    let asked = async {
        let settled = match &mark.by {
            SettleBy::Wal(marker) => {
                let primaries_since = client.generation().get().saturating_sub(mark.generation.get());
                // Usually the transaction was rolled back. Then this question is enough.
                let LogAnswer { now, status, .. } =
                    wal::look(client, marker.xid, primaries_since, client.life()).await.ok()?;
                if matches!(status, None | Some(XactStatus::Aborted)) {
                    return client.life().is_none_or(|life| life.is(&now.life)).then_some(Inside::No);
                }
                ask_log(client, client.life(), mark, marker, primaries_since).await.ok()??
            }
            SettleBy::Ledger(ledger, entered) => {
                let is_there = ledger.has(client, client.life(), entered).await.ok()??;
                // While its transaction is in progress, the row is not visible, so a missing row needs one more
                // question. In another life of the server, that question proves nothing, because another transaction
                // may have the same id.
                match (is_there, mark.is_life_of(client)) {
                    (true, _) => SettleVerdict::Committed,
                    (false, true) => SettleVerdict::InProgress,
                    (false, false) => return Some(Inside::OtherLife),
                }
            }
        };
        Some(match settled {
            SettleVerdict::Committed => Inside::Ended(Ending::Committed),
            SettleVerdict::InProgress => match wal::ends(client, mark.backend).await.ok()? {
                Some(EndUnderWay::Prepared) => Inside::Ended(Ending::Prepared),
                Some(EndUnderWay::Committing) => Inside::Ended(Ending::Committed),
                Some(EndUnderWay::Working) => Inside::Working,
                None => Inside::InProgress,
            },
            SettleVerdict::NotCommitted => Inside::No,
            SettleVerdict::Unknown(why) => Inside::Untold(why),
        })
    };
    let found = tokio::select! {
        biased;
        found = asked => found,
        () = client.evicted() => return None,
    };
    asking.over = client.batch_execute("ROLLBACK").await.is_ok();
    found
}

/// A caller's session on which the pool asks in a transaction. Dropping this in the midst ends the session, so that
/// nobody gets it with the transaction open.
struct SettleQuestion<'a, C: SessionClient> {
    client: &'a Client<C>,
    over: bool,
}

impl<C: SessionClient> Drop for SettleQuestion<'_, C> {
    fn drop(&mut self) {
        if !self.over {
            self.client.poison();
        }
    }
}

/// Whether a closure has ended its transaction itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Inside {
    Ended(Ending),
    /// The server shows the transaction as open. A COMMIT may be under way.
    InProgress,
    /// The server shows the transaction as open, with a statement under way that does not commit.
    Working,
    /// The server shows a transaction with this id that is committed or in progress. It may be another transaction.
    Untold(Unsettled),
    /// The server's ledger has no row of the transaction, and the server is in another life. A settler can find out
    /// more.
    OtherLife,
    /// The closure may have ended the transaction, and no primary could tell.
    Unsettled(Unsettled),
    /// The server belongs to another cluster, which knows nothing of the transaction.
    OtherCluster,
    No,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_that_of_the_primary_that_was_asked_last() {
        let (one, two) = (GenerationId(1), GenerationId(2));
        let mut why = WhyNot { waits: true, ..WhyNot::default() };
        assert_eq!(why.at_last(|_| true), Unsettled::NoPrimary, "none was asked");
        why.asks(one);
        why.reason = Unsettled::InProgress;
        assert_eq!(why.at_last(|_| false), Unsettled::InProgress, "it is being asked");
        why.waits = true;
        assert_eq!(why.at_last(|id| id == one), Unsettled::InProgress, "it takes no further session");
        assert_eq!(why.at_last(|id| id == two), Unsettled::NoPrimary, "its successor takes no session");
        assert_eq!(why.at_last(|_| false), Unsettled::NoPrimary, "nobody has followed it");
        why.asks(one);
        assert_eq!(why.at_last(|_| true), Unsettled::InProgress, "the same primary");
        why.asks(two);
        assert_eq!(why.at_last(|_| true), Unsettled::NoPrimary, "its successor has not said anything yet");
    }
}
