//! Transactions that run again across a failover, and are applied once.
//!
//! The table in `decide` says what follows from a failed attempt. This module does not know how connections are made.
//! Invariants: COMMIT is sent at most once per attempt; after an in-doubt COMMIT nothing is run again unless the caller
//! declared the work idempotent; a connection whose state is not known to be clean never goes back to the pool. The
//! tests are `tests/it/transaction/calls.rs`, `tests/it/transaction/cancel.rs` and `tests/it/failover/outages.rs`.

mod abandoned;
mod attempt;
mod begin;
mod closures;
mod decide;
mod earlier;
mod ended;
mod finish;
mod generic_client;
mod left;
mod marks;
mod nested;
mod opening;
mod run;
mod session;
mod settle;
mod statements;
mod streams;
mod undo;
mod verdict;

use std::fmt;
use std::ops::Deref;
use std::panic::Location;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use deadpool_postgres::ClientWrapper;
use futures_util::FutureExt;
use tokio_postgres::IsolationLevel;

use crate::commit::Guarantee;
use crate::error::Error;
use crate::pool::{CallSite, CancelToken, Client, Pool};
use crate::retry::RetryPolicy;
use crate::server::SessionClient;
use begin::{Begin, MarkKind};
use decide::Mode;
use finish::OPEN;

impl<C: SessionClient> Pool<C> {
    /// Runs `work` in a transaction on the primary and commits it exactly once. If a failover, a serialization failure
    /// or a deadlock ends it before it is committed, it runs again, within the pool's [`RetryPolicy`].
    ///
    /// `Ok` means committed. It also means confirmed by the synchronous standbys, if there are any and
    /// `synchronous_commit` asks for it, as its default does. An error means not committed, except for
    /// [`Error::CommitUnknown`]. If the connection is lost between COMMIT and its answer, the new primary is asked
    /// whether the transaction is in its history, and the work runs again if it is not; see [`Guarantee::ExactlyOnce`].
    /// If even that does not show the outcome, the error is `CommitUnknown`. If your work can be applied twice without
    /// harm, use [`Pool::idempotent`], which runs it again in that case, too.
    ///
    /// Each such transaction writes a mark by which the pool can ask for it later. It does so even if it otherwise only
    /// reads, so use [`Pool::read`] for work that only reads. The mark is also the transaction's first query. So set
    /// the isolation level with [`Pool::build_transaction`]: `SET TRANSACTION ISOLATION LEVEL` within the closure comes
    /// too late.
    ///
    /// The closure may run several times, each time with a new [`Transaction`] at the start of a new transaction, so
    /// cause effects outside of the database only after the call has returned. Its own errors roll back and are
    /// returned unchanged, see [`Error::abort`]. Do not send `COMMIT`, `ROLLBACK` or `BEGIN` in it: the call then fails
    /// with [`Error::EndedInside`].
    ///
    /// The policy's deadline limits the waiting and the start of attempts; it does not cut off a running attempt. While
    /// a primary is known and all connections are in use, [`checkout_timeout`](crate::PoolBuilder::checkout_timeout)
    /// limits the wait as well. A call within the closure of another call needs a connection of its own. If the outer
    /// calls hold all connections, it fails at once. If the outcome of that inner call is unknown, the outer closure
    /// does not run again, even if it hides the error. A call in a task that the closure spawns is not seen, so pass
    /// its error on.
    ///
    /// Cancel-safe: if the future is dropped, the pool asks the server to cancel the statement and closes the
    /// connection, so the transaction is rolled back. After COMMIT was sent, the pool only closes the connection: the
    /// server carries out the COMMIT, and its effect becomes visible when the synchronous standbys have it.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool, sku: String) -> Result<(), Box<dyn std::error::Error>> {
    /// let id: i64 = pool
    ///     .transaction(async |tx| {
    ///         tx.execute("UPDATE stock SET left = left - 1 WHERE sku = $1", &[&sku]).await?;
    ///         let row = tx.query_one("INSERT INTO orders (sku) VALUES ($1) RETURNING id", &[&sku]).await?;
    ///         Ok(row.get(0))
    ///     })
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    #[track_caller]
    pub fn transaction<T, F, Fut>(&self, work: F) -> impl Future<Output = Result<T, Error>>
    where
        F: FnMut(Transaction<C>) -> Fut,
        Fut: Future<Output = Result<T, Error>>,
    {
        run::run(self.build_transaction(), work)
    }

    /// Like [`Pool::transaction`], for work that may be applied more than once. It is run again even if the outcome of
    /// its commit is unknown. If the call fails all the same, [`Error::commit_outcome`] says whether an attempt may
    /// have been committed.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool, id: i64) -> Result<(), Box<dyn std::error::Error>> {
    /// pool.idempotent(async |tx| {
    ///     tx.execute("INSERT INTO payments (id) VALUES ($1) ON CONFLICT (id) DO NOTHING", &[&id]).await?;
    ///     Ok(())
    /// })
    /// .await?;
    /// # Ok(())
    /// # }
    /// ```
    #[track_caller]
    pub fn idempotent<T, F, Fut>(&self, work: F) -> impl Future<Output = Result<T, Error>>
    where
        F: FnMut(Transaction<C>) -> Fut,
        Fut: Future<Output = Result<T, Error>>,
    {
        run::run(self.build_transaction().guarantee(Guarantee::AtLeastOnce), work)
    }

    /// Like [`Pool::transaction`], but read-only, so that it can be run again at any point. A statement that writes
    /// fails with SQLSTATE 25006, and is not run again. Do not make it writable in the closure (`SET TRANSACTION READ
    /// WRITE`), and do not send `NOTIFY` in it. PostgreSQL allows both, but the writes and the notifications may then
    /// happen twice.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
    /// let orders: i64 = pool
    ///     .read(async |tx| Ok(tx.query_one("SELECT count(*) FROM orders", &[]).await?.get(0)))
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    #[track_caller]
    pub fn read<T, F, Fut>(&self, work: F) -> impl Future<Output = Result<T, Error>>
    where
        F: FnMut(Transaction<C>) -> Fut,
        Fut: Future<Output = Result<T, Error>>,
    {
        run::run(self.build_transaction().read_only(true), work)
    }

    /// Starts a transaction with its own options.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
    /// use std::time::Duration;
    /// use tokio_postgres::IsolationLevel;
    ///
    /// pool.build_transaction()
    ///     .isolation_level(IsolationLevel::Serializable)
    ///     .deadline(Duration::from_secs(5))
    ///     .run(async |tx| Ok(tx.batch_execute("UPDATE accounts SET balance = 0").await?))
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    #[track_caller]
    pub fn build_transaction(&self) -> TransactionBuilder<'_, C> {
        TransactionBuilder {
            pool: self,
            place: Location::caller(),
            isolation_level: None,
            read_only: false,
            deferrable: false,
            guarantee: self.guarantee().clone(),
            retry: self.retry_policy().clone(),
        }
    }
}

/// The options of one transaction, from [`Pool::build_transaction`].
#[derive(Debug)]
#[must_use = "a builder does nothing until `run` is called"]
pub struct TransactionBuilder<'a, C: SessionClient = ClientWrapper> {
    pool: &'a Pool<C>,
    /// Where the call was made.
    place: CallSite,
    isolation_level: Option<IsolationLevel>,
    read_only: bool,
    deferrable: bool,
    guarantee: Guarantee,
    retry: RetryPolicy,
}

impl<C: SessionClient> TransactionBuilder<'_, C> {
    /// The isolation level. Default: the server's.
    pub fn isolation_level(mut self, level: IsolationLevel) -> Self {
        self.isolation_level = Some(level);
        self
    }

    /// Begins `READ ONLY`, so the work may run again at any point. `false`, the default, leaves the access mode to the
    /// server. `READ WRITE` is never requested, because that would override a fence.
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Begins `DEFERRABLE`, which is useful with serializable read-only transactions.
    pub fn deferrable(mut self, deferrable: bool) -> Self {
        self.deferrable = deferrable;
        self
    }

    /// What the call promises if the connection is lost between COMMIT and its answer. Default: the pool's guarantee,
    /// which is [`Guarantee::ExactlyOnce`] by default.
    pub fn guarantee(mut self, guarantee: Guarantee) -> Self {
        self.guarantee = guarantee;
        self
    }

    /// The retry policy of this call, which replaces the pool's policy entirely, including its hooks. Default: the
    /// pool's. To change one setting, start from a clone of [`Pool::retry_policy`].
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = policy;
        self
    }

    /// The deadline of this call. It is stored in the call's retry policy, so set the policy first.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.retry = self.retry.deadline(deadline);
        self
    }

    /// Runs `work` with these options; see [`Pool::transaction`].
    pub async fn run<T, F, Fut>(self, work: F) -> Result<T, Error>
    where
        F: FnMut(Transaction<C>) -> Fut,
        Fut: Future<Output = Result<T, Error>>,
    {
        run::run(self, work).await
    }

    fn mode(&self) -> Mode {
        match self.guarantee {
            _ if self.read_only => Mode::Read,
            Guarantee::ExactlyOnce | Guarantee::Ledger(_) => Mode::Exactly,
            Guarantee::AtMostOnce => Mode::Once,
            Guarantee::AtLeastOnce => Mode::Idempotent,
        }
    }

    fn begin(&self) -> Begin {
        let marks = match &self.guarantee {
            _ if self.read_only => MarkKind::Nothing,
            Guarantee::ExactlyOnce => MarkKind::Wal,
            Guarantee::Ledger(ledger) => MarkKind::Ledger(ledger.clone()),
            Guarantee::AtMostOnce | Guarantee::AtLeastOnce => MarkKind::Nothing,
        };
        let mut sql = "BEGIN".to_owned();
        if let Some(level) = self.isolation_level {
            sql.push_str(" ISOLATION LEVEL ");
            sql.push_str(level_name(level));
        }
        if self.read_only {
            sql.push_str(" READ ONLY");
        }
        if self.deferrable {
            sql.push_str(" DEFERRABLE");
        }
        let unmarked = format!("{sql}; {OPEN}");
        Begin { sql, unmarked, marks, read_only: self.read_only }
    }
}

fn level_name(level: IsolationLevel) -> &'static str {
    match level {
        IsolationLevel::ReadUncommitted => "READ UNCOMMITTED",
        IsolationLevel::ReadCommitted => "READ COMMITTED",
        IsolationLevel::RepeatableRead => "REPEATABLE READ",
        // The driver's enum may grow. For an unknown level, the strictest one is safe.
        _ => "SERIALIZABLE",
    }
}

/// The transaction of one attempt, which is given to the closure.
///
/// Derefs to deadpool-postgres' `ClientWrapper` and [`tokio_postgres::Client`]: `query`, `execute`, `prepare_cached`
/// and everything else that takes `&self`. The handle is owned, so that the closure's future can be spawned. If the
/// handle, or anything that borrows from it, still exists after the closure has returned, the transaction is rolled
/// back and the call fails with [`RolledBack::HandleKept`](crate::error::RolledBack::HandleKept).
///
/// Within the closure, read a stream of rows to its end or drop it, and finish a COPY, because COMMIT's answer comes
/// after theirs. If one is kept, the call fails with [`RolledBack::StreamKept`](crate::error::RolledBack::StreamKept).
/// To find that out, a transaction that uses the streaming methods below takes one more round trip, and waits for the
/// rest of a stream that was dropped. A stream that was begun in another way, through the driver's
/// [`GenericClient`](tokio_postgres::GenericClient), is not noticed, and COMMIT waits for its end.
pub struct Transaction<C: SessionClient = ClientWrapper> {
    client: Arc<Client<C>>,
    /// How many savepoints it has tried to set.
    savepoints: AtomicU32,
}

impl<C: SessionClient> Transaction<C> {
    fn new(client: Arc<Client<C>>) -> Self {
        Self { client, savepoints: AtomicU32::new(0) }
    }

    /// Sets a savepoint. A failure after it can be undone without losing the transaction.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
    /// pool.transaction(async |mut tx| {
    ///     let savepoint = tx.savepoint().await?;
    ///     match savepoint.execute("INSERT INTO tags (name) VALUES ('new')", &[]).await {
    ///         Ok(_) => savepoint.release().await?,
    ///         Err(_) => savepoint.rollback().await?,
    ///     }
    ///     Ok(())
    /// })
    /// .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn savepoint(&mut self) -> Result<Savepoint<'_, C>, Error> {
        Ok(self.transaction().await?)
    }

    /// The same as [`Transaction::savepoint`], under the name and with the error that the driver's nested transactions
    /// have, so that helpers written for those compile. Commit it with [`Savepoint::commit`].
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_postgres_failover::{Transaction, tokio_postgres};
    ///
    /// async fn tag(tx: &mut Transaction, name: &str) -> Result<(), tokio_postgres::Error> {
    ///     let nested = tx.transaction().await?;
    ///     nested.execute("INSERT INTO tags (name) VALUES ($1)", &[&name]).await?;
    ///     nested.commit().await
    /// }
    ///
    /// pool.transaction(async |mut tx| Ok(tag(&mut tx, "new").await?)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn transaction(&mut self) -> Result<Savepoint<'_, C>, tokio_postgres::Error> {
        Savepoint::set(&self.client, &self.savepoints).await
    }

    /// Returns a token that can cancel what this session runs, from anywhere. A statement that is cancelled fails with
    /// 57014, and the work does not run again.
    ///
    /// Use the token while the closure runs. Later it may hit COMMIT's wait for a synchronous standby: the commit is
    /// then in doubt, and is settled as usual.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
    /// pool.transaction(async |tx| {
    ///     let token = tx.cancel_token();
    ///     let report = tx.query("SELECT pg_sleep(60)", &[]);
    ///     if tokio::time::timeout(std::time::Duration::from_secs(1), report).await.is_err() {
    ///         token.cancel().await?;
    ///     }
    ///     Ok(())
    /// })
    /// .await?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn cancel_token(&self) -> CancelToken {
        self.client.cancel_token()
    }
}

impl<C: SessionClient> Deref for Transaction<C> {
    type Target = C;

    fn deref(&self) -> &C {
        &self.client
    }
}

impl<C: SessionClient> fmt::Debug for Transaction<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transaction").field("generation", &self.client.generation()).finish_non_exhaustive()
    }
}

/// A savepoint within a [`Transaction`]. Dropping it without [`Savepoint::release`] rolls back to it.
pub struct Savepoint<'a, C: SessionClient = ClientWrapper> {
    client: &'a Client<C>,
    /// The counter of the transaction's savepoints.
    savepoints: &'a AtomicU32,
    /// The number in its name. A name is used once in a transaction: a savepoint that could not be set must not be
    /// taken for an earlier one, because a rollback to that one would revive a failed transaction. Each transaction
    /// counts from one, so that there are only a few different statements for the server's statistics.
    number: u32,
    /// `true` until the savepoint is released or rolled back.
    open: bool,
}

impl<'a, C: SessionClient> Savepoint<'a, C> {
    /// If the future is dropped, the request may be under way, so a rollback to the savepoint follows it.
    async fn set(client: &'a Client<C>, savepoints: &'a AtomicU32) -> Result<Self, tokio_postgres::Error> {
        let number = savepoints.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let mut savepoint = Self { client, savepoints, number, open: true };
        let set = client.batch_execute(&format!("SAVEPOINT {}", savepoint.name())).await;
        savepoint.open = set.is_ok();
        set.map(|()| savepoint)
    }

    /// Sets a savepoint within this one.
    pub async fn savepoint(&mut self) -> Result<Savepoint<'_, C>, Error> {
        Ok(self.transaction().await?)
    }

    /// The same as [`Savepoint::savepoint`]. See [`Transaction::transaction`].
    pub async fn transaction(&mut self) -> Result<Savepoint<'_, C>, tokio_postgres::Error> {
        Savepoint::set(self.client, self.savepoints).await
    }

    /// Ends the savepoint and keeps what was done since it, as a part of the transaction.
    pub async fn release(self) -> Result<(), Error> {
        Ok(self.commit().await?)
    }

    /// The same as [`Savepoint::release`], under the driver's name. Only the transaction's own COMMIT, which the pool
    /// sends, makes it last.
    pub async fn commit(mut self) -> Result<(), tokio_postgres::Error> {
        self.open = false;
        self.client.batch_execute(&format!("RELEASE SAVEPOINT {}", self.name())).await
    }

    /// Undoes what was done since the savepoint. The transaction goes on.
    pub async fn rollback(self) -> Result<(), Error> {
        Ok(self.undone().await?)
    }

    async fn undone(mut self) -> Result<(), tokio_postgres::Error> {
        self.open = false;
        self.client.batch_execute(&self.undo()).await
    }

    /// Returns a token that can cancel what this session runs. See [`Transaction::cancel_token`].
    #[must_use]
    pub fn cancel_token(&self) -> CancelToken {
        self.client.cancel_token()
    }

    fn name(&self) -> String {
        format!("tokio_postgres_failover_{}", self.number)
    }

    fn undo(&self) -> String {
        let name = self.name();
        format!("ROLLBACK TO SAVEPOINT {name}; RELEASE SAVEPOINT {name}")
    }
}

impl<C: SessionClient> Deref for Savepoint<'_, C> {
    type Target = C;

    fn deref(&self) -> &C {
        self.client
    }
}

impl<C: SessionClient> Drop for Savepoint<'_, C> {
    fn drop(&mut self) {
        if self.open {
            // The driver queues a request at the first poll of its future. The answer does not matter.
            let _ = self.client.batch_execute(&self.undo()).now_or_never();
        }
    }
}

impl<C: SessionClient> fmt::Debug for Savepoint<'_, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Savepoint").field("name", &self.name()).finish_non_exhaustive()
    }
}
