//! A connection that a caller has checked out, and what happens when it is given back.

mod detached;

pub use detached::Detached;

use std::fmt;
use std::future::pending;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use deadpool::managed::Object;
use deadpool_postgres::ClientWrapper;
use tokio::time::timeout;
use tokio_postgres::error::DbError;

use self::detached::Own;
use super::Pool;
use super::cancel_token::CancelToken;
use super::checkout_reports::CheckoutWatch;
use super::connection::DRAIN_WITHIN;
use super::facts::Facts;
use super::manager::Manager;
use super::trail::Trail;
use super::wrapped_pool::WrappedObject;
use crate::classify::ends_session;
use crate::commit::Life;
use crate::observe::{Stopwatch, Watched};
use crate::server::{Activity, Notices, Scope, SessionClient, SessionEndListener};
use crate::settle::wal::MarkStatement;
use crate::sync::lock;
use crate::topology::{GenerationId, Suspicion};

/// A connection to the primary, checked out from a [`Pool`]. Dropping it gives it back.
///
/// Derefs to deadpool-postgres' `ClientWrapper`, which has `prepare_cached` and `transaction`, and on to
/// [`tokio_postgres::Client`]. It is a [`GenericClient`](crate::GenericClient), as transactions are. From a
/// [wrapped](Pool::wrap) pool, it derefs to that pool's object.
///
/// ```no_run
/// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
/// use tokio_postgres_failover::GenericClient;
///
/// async fn count(client: &impl GenericClient) -> Result<i64, tokio_postgres::Error> {
///     Ok(client.query_one("SELECT count(*) FROM orders", &[]).await?.get(0))
/// }
///
/// let mut client = pool.get().await?;
/// count(&client).await?;
/// let transaction = client.transaction().await?;
/// count(&transaction).await?;
/// # Ok(())
/// # }
/// ```
pub struct Client<C: SessionClient = ClientWrapper> {
    /// Taken only by `drop`.
    checked_out: Option<CheckedOut<C>>,
    /// Keeps the cluster's task alive while the connection is in use.
    pool: Pool<C>,
    checked_out_for: Stopwatch,
    /// A streaming call was made. The caller may stop reading its answer.
    streamed: AtomicBool,
    /// The connection was given back with something under way. This handle waits for its end.
    draining: bool,
    /// Tells where it was taken if it is held for too long.
    _watch: Option<CheckoutWatch>,
}

/// The pool that a connection comes from.
pub(super) enum CheckedOut<C: SessionClient> {
    Own(Object<Manager<C>>),
    /// A connection of a wrapped pool. `scope` ends with the generation; nothing else would end what is under way here.
    /// The connection is observed only while checked out, because its own pool reports nothing about it.
    Wrapped {
        object: Box<dyn WrappedObject<C>>,
        facts: Arc<Facts>,
        watched: Arc<Watched>,
        scope: Scope,
    },
}

impl<C: SessionClient> CheckedOut<C> {
    fn facts(&self) -> &Facts {
        match self {
            Self::Own(object) => object.facts(),
            Self::Wrapped { facts, .. } => facts,
        }
    }

    fn watched(&self) -> &Watched {
        match self {
            Self::Own(object) => object.watched(),
            Self::Wrapped { watched, .. } => watched,
        }
    }

    fn client(&self) -> &C {
        match self {
            Self::Own(object) => object,
            Self::Wrapped { object, .. } => object,
        }
    }

    fn client_mut(&mut self) -> &mut C {
        match self {
            Self::Own(object) => object,
            Self::Wrapped { object, .. } => object,
        }
    }

    pub(super) fn activity(&self) -> &Activity {
        &self.facts().notices.activity
    }

    /// Returns whether the server may still be running something for this session.
    fn may_run_something(&self) -> bool {
        let notices = &self.facts().notices;
        !notices.are_driven() || notices.activity.may_be_busy()
    }

    fn usable(&self) -> bool {
        if self.activity().is_condemned() || self.activity().has_opening() {
            return false;
        }
        let ended = matches!(self, Self::Wrapped { scope, .. } if scope.is_cancelled());
        !ended && !self.client().is_closed() && !self.facts().is_unfit()
    }

    /// Frees the slot now. If the dead connection went back to the pool, it would hold the slot until the next
    /// checkout.
    fn discard(self) {
        match self {
            Self::Own(object) => drop(Object::take(object)),
            Self::Wrapped { object, .. } => object.discard(),
        }
    }
}

impl<C: SessionClient> Client<C> {
    /// The caller counts the checkout. Calls the program's metrics, which may panic.
    pub(super) fn new(checked_out: CheckedOut<C>, pool: Pool<C>, watch: Option<CheckoutWatch>) -> Self {
        checked_out.facts().trail.check_out(checked_out.client());
        let streamed = AtomicBool::new(false);
        Self {
            checked_out_for: checked_out.watched().checked_out(),
            checked_out: Some(checked_out),
            pool,
            streamed,
            draining: false,
            _watch: watch,
        }
    }

    /// Returns the generation that the connection belongs to.
    #[must_use]
    pub fn generation(&self) -> GenerationId {
        self.facts().generation
    }

    /// Ends the session instead of giving it back, so that no other caller gets it. A statement that still runs is
    /// cancelled, and an open transaction is rolled back.
    ///
    /// Use it for a session with state that no other caller should get, such as a temporary table or an advisory lock.
    /// If a statement is under way or a transaction is open when the connection is dropped, the pool does this by
    /// itself.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
    /// let client = pool.get().await?;
    /// if client.batch_execute("SELECT pg_advisory_lock(7)").await.is_err() {
    ///     client.discard();
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn discard(self) {
        self.poison();
    }

    /// Takes the connection out of the pool. It is yours, and no longer counts towards [`PoolBuilder::max_size`].
    ///
    /// Use it for sessions that you hold for long, or whose state no other caller should get. The pool opens a
    /// replacement only when a caller needs one. The session still ends with its primary's generation, with
    /// [`Pool::close`], and when it is dropped. A session of a [wrapped](Pool::wrap) pool only ends when it is dropped:
    /// [`Detached::ended`] says when to do that.
    ///
    /// [`PoolBuilder::max_size`]: crate::PoolBuilder::max_size
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
    /// let session = pool.get().await?.detach();
    /// session.batch_execute("CREATE TEMPORARY TABLE import (line text)").await?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use = "a session that is dropped is closed"]
    pub fn detach(mut self) -> Detached<C> {
        let wanting = self.pool.cluster().want();
        let session = self.checked_out.take().map(|checked_out| {
            self.pool.returned();
            match checked_out {
                CheckedOut::Own(object) => {
                    object.watched().detached(&self.checked_out_for);
                    let mut connection = Object::take(object);
                    connection.leave_the_pool();
                    Own::Ours(connection)
                }
                CheckedOut::Wrapped { object, facts, watched, scope } => {
                    watched.detached(&self.checked_out_for);
                    watched.session_ended(false);
                    Own::Theirs { client: object.take(), facts, scope }
                }
            }
        });
        Detached { session, _wanting: wanting, pool: self.pool.clone() }
    }

    /// Returns a token that can cancel what this session runs. It can be sent to any task.
    ///
    /// Use this one: the token of the driver's own `Client`, behind two derefs, does not know the server's address.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
    /// let client = pool.get().await?;
    /// let token = client.cancel_token();
    /// tokio::spawn(async move { token.cancel().await });
    /// client.batch_execute("SELECT pg_sleep(60)").await?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn cancel_token(&self) -> CancelToken {
        let token = tokio_postgres::Client::cancel_token(self);
        CancelToken::new(&self.pool.shared.dialer.opener, self.facts().endpoint.clone(), token)
    }

    /// Ends the session, so that it never goes back to the pool. Cancels what still runs on the server, except for a
    /// COMMIT.
    pub(crate) fn poison(&self) {
        if self.facts().poisoned.swap(true, Ordering::AcqRel) {
            return;
        }
        // If the pool was closed, the server may still be running something for this session.
        if (!self.is_closed() || self.pool.cluster().is_closed()) && self.checked_out().may_run_something() {
            self.pool.shared.dialer.cancel_running(self, self.facts());
        }
        if let CheckedOut::Own(object) = self.checked_out() {
            object.abort();
        }
    }

    /// Reports a doubt about the primary of the session's generation.
    pub(crate) fn suspect(&self, suspicion: Suspicion) {
        self.pool.suspect(self.generation(), suspicion);
    }

    /// Reports that the primary answered on the session.
    pub(crate) fn heard(&self) {
        self.pool.cluster().heard(self.generation());
    }

    /// Notes that from now on the session may be busy although no caller waits for an answer.
    pub(crate) fn set_streamed(&self) {
        self.streamed.store(true, Ordering::Relaxed);
    }

    pub(crate) fn has_streamed(&self) -> bool {
        self.streamed.load(Ordering::Relaxed)
    }

    /// Set this before a COMMIT is sent, and clear it after the answer.
    pub(crate) fn set_committing(&self, committing: bool) {
        self.facts().committing.store(committing, Ordering::Release);
    }

    /// What passes on the session. `None` if this crate does not drive the session, so that nobody counts.
    pub(crate) fn watched_activity(&self) -> Option<&Activity> {
        let activity = &self.facts().notices.activity;
        (activity.heard_at() > 0).then_some(activity)
    }

    /// Waits until the generation of a wrapped pool's session has ended, because such a session stays open. Waits for
    /// ever on a session of this crate's own pool, which itself ends with the generation. Cancel-safe.
    pub(crate) async fn evicted(&self) {
        match self.checked_out() {
            CheckedOut::Own(_) => pending().await,
            CheckedOut::Wrapped { scope, .. } => scope.cancelled().await,
        }
    }

    /// As [`Self::evicted`], for a COMMIT that was sent: waits until its answer is of no use any more.
    pub(crate) async fn abandoned(&self) {
        match self.checked_out() {
            CheckedOut::Own(_) => pending().await,
            CheckedOut::Wrapped { scope, .. } => scope.abandoned().cancelled().await,
        }
    }

    pub(crate) fn is_evicted(&self) -> bool {
        matches!(self.checked_out(), CheckedOut::Wrapped { scope, .. } if scope.is_cancelled())
    }

    pub(crate) fn pool(&self) -> &Pool<C> {
        &self.pool
    }

    pub(crate) fn watched(&self) -> &Watched {
        self.checked_out().watched()
    }

    /// The identity and the life of the server, if the server shows them.
    pub(crate) fn life(&self) -> Option<Life> {
        self.facts().life()
    }

    /// The system identifier of the server, if the server shows it.
    pub(crate) fn cluster(&self) -> Option<u64> {
        self.facts().cluster()
    }

    /// How this session marks transactions.
    pub(crate) fn mark_statement(&self) -> MarkStatement {
        self.facts().mark_statement()
    }

    pub(crate) fn set_mark_statement(&self, mark_statement: MarkStatement) {
        *lock(&self.facts().mark_statement) = mark_statement;
    }

    /// How this session enters transactions into the ledger with this key.
    pub(crate) fn entry_statement(&self, ledger: u64) -> MarkStatement {
        self.facts().entry_statement(ledger)
    }

    pub(crate) fn set_entry_statement(&self, ledger: u64, statement: MarkStatement) {
        self.facts().set_entry_statement(ledger, statement);
    }

    /// Notes that the session's prepared statements were dropped.
    pub(crate) fn forget_prepared(&self) {
        self.facts().forget_prepared();
    }

    /// Returns whether the session has prepared the check by which a COMMIT looks for its transaction.
    pub(crate) fn check_is_prepared(&self) -> bool {
        self.facts().check_prepared.load(Ordering::Relaxed)
    }

    pub(crate) fn set_check_prepared(&self, prepared: bool) {
        self.facts().check_prepared.store(prepared, Ordering::Relaxed);
    }

    pub(crate) fn notices(&self) -> &Notices {
        &self.facts().notices
    }

    /// The errors of the session's statements.
    pub(crate) fn trail(&self) -> &Arc<Trail> {
        &self.facts().trail
    }

    /// After this number of failures with a stale statement, no connection has one any more, because each failure heals
    /// its connection.
    pub(crate) fn fresh_after(&self) -> u32 {
        if self.trail().can_clear() { 1 } else { u32::try_from(self.pool.status().max_size).unwrap_or(u32::MAX) }
    }

    /// Returns what the server said when it ended this session, if it said anything: for instance "terminating
    /// connection due to idle-session timeout", SQLSTATE 57P05. If the session ends between two statements, the next
    /// statement's error says only that the connection is closed.
    ///
    /// Returns `None` while the session is open, if the connection was lost without a report, or if the connection
    /// comes from a [wrapped](Pool::wrap) pool.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
    /// let client = pool.get().await?;
    /// if let Err(error) = client.batch_execute("SELECT 1").await {
    ///     match client.session_end().await {
    ///         Some(report) => println!("the server ended the session: {report}"),
    ///         None => println!("{error}"),
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn session_end(&self) -> Option<DbError> {
        let met = self.trail().last().filter(ends_session);
        if met.is_some() || !self.is_closed() {
            return met;
        }
        self.notices().end().last_words().await
    }

    pub(super) fn facts(&self) -> &Facts {
        self.checked_out().facts()
    }

    /// If a statement is under way, waits a moment for the end of its answer, in a task. Returns the checkout if there
    /// is nothing to wait for.
    fn drain(&mut self, checked_out: CheckedOut<C>) -> Option<CheckedOut<C>> {
        let ends_by_itself =
            checked_out.activity().is_busy() && !checked_out.activity().in_transaction() && checked_out.usable();
        if self.draining || !ends_by_itself || self.pool.cluster().is_closed() {
            return Some(checked_out);
        }
        let activity = Arc::clone(&checked_out.facts().notices.activity);
        let streamed = AtomicBool::new(false);
        let pool = self.pool.clone();
        let draining = Self {
            checked_out: Some(checked_out),
            pool,
            checked_out_for: self.checked_out_for,
            streamed,
            draining: true,
            _watch: None,
        };
        self.pool.runtime().spawn(async move {
            // The result does not matter, because dropping the connection looks again.
            let _ = timeout(DRAIN_WITHIN, activity.becomes_idle()).await;
            drop(draining);
        });
        None
    }

    #[expect(clippy::expect_used, reason = "the checkout is taken in `drop` alone, after which nobody can ask for it")]
    fn checked_out(&self) -> &CheckedOut<C> {
        self.checked_out.as_ref().expect("a client holds its connection until it is dropped")
    }
}

impl<C: SessionClient> Deref for Client<C> {
    type Target = C;

    fn deref(&self) -> &C {
        self.checked_out().client()
    }
}

impl<C: SessionClient> DerefMut for Client<C> {
    #[expect(clippy::expect_used, reason = "the checkout is taken in `drop` alone, after which nobody can deref")]
    fn deref_mut(&mut self) -> &mut C {
        self.checked_out.as_mut().expect("a client holds its connection until it is dropped").client_mut()
    }
}

impl<C: SessionClient> Drop for Client<C> {
    fn drop(&mut self) {
        let Some(checked_out) = self.checked_out.take() else { return };
        let Some(checked_out) = self.drain(checked_out) else { return };
        self.pool.returned();
        checked_out.watched().given_back(&self.checked_out_for);
        if let CheckedOut::Wrapped { watched, .. } = &checked_out {
            watched.session_ended(false);
        }
        let closed = self.pool.cluster().is_closed();
        let busy = checked_out.activity().is_busy();
        // If the pool was closed, the server may still be running something for this session.
        if (busy || (closed && checked_out.may_run_something())) && !checked_out.facts().is_poisoned() {
            self.pool.shared.dialer.cancel_running(checked_out.client(), checked_out.facts());
        }
        if closed || busy || !checked_out.usable() {
            return checked_out.discard();
        }
        self.pool.give_back(checked_out);
    }
}

impl<C: SessionClient> fmt::Debug for Client<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("generation", &self.generation()).finish_non_exhaustive()
    }
}
