//! Hands out connections of the current generation, and no others.
//!
//! Decides nothing about servers: what may be handed out is read from the cluster's snapshot. Knows nothing of how the
//! primary was found. Invariants: a checkout does no I/O on an idle connection; a new connection has answered the probe
//! in this generation; a poisoned connection never goes back. Tests: `tests/it/get.rs`, `tests/it/errors.rs`.

mod builder;
mod checkout;
mod client;
mod config;
mod connection;
mod dialer;
mod dials;
mod hosts;
mod idle;
mod lacking;
mod nested;
mod options;
mod security;
mod settling;
mod shared;
mod side_session;
mod ssl;
mod stale;
mod statements;
mod status;
mod trail;
mod typo;
mod wrap;
mod wrapped_pool;

pub use builder::PoolBuilder;
pub use client::{CancelToken, Client, Detached};
pub use config::IntoConfig;
pub use connection::{Connection, Manager};
pub(crate) use lacking::Check;
pub(crate) use settling::{SettleSession, Settling};
pub(crate) use shared::Signing;
pub(crate) use side_session::SideSession;
pub(crate) use statements::{cached_statements, statements};
pub use status::Status;
pub(crate) use trail::Trail;
pub use wrap::WrapBuilder;

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use deadpool::managed;
use deadpool_postgres::ClientWrapper;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use crate::cluster::Cluster;
use crate::commit::Nonce;
use crate::error::{BuildError, Error};
use crate::observe::{Events, Observer};
use crate::retry::{FAR, RetryPolicy};
use crate::server::SessionClient;
use crate::topology::{Accept, CandidateReport, GenerationId, State, Suspicion, View};
use dialer::Dialer;
use shared::Shared;
use wrap::Wrapped;

/// A pool of connections to the primary of one cluster. Cheap to clone; all clones are one pool.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use tokio_postgres_failover::Pool;
///
/// let pool = Pool::builder("postgres://app@my-pg.internal/app")?.max_size(16).build()?;
/// let client = pool.get().await?;
/// let row = client.query_one("SELECT version()", &[]).await?;
/// println!("{}", row.get::<_, String>(0));
/// # Ok(())
/// # }
/// ```
///
/// Up to `max_size` connections are open for the callers, and one more for the heart-beat; for a moment after a failover
/// one more holds the session that found the primary. When the last clone and the last [`Client`] are dropped, everything
/// that the pool started ends.
pub struct Pool<C: SessionClient = ClientWrapper> {
    source: Source<C>,
    dialer: Arc<Dialer<C>>,
    shared: Arc<Shared>,
}

/// Where the connections come from.
enum Source<C: SessionClient> {
    Own(managed::Pool<Manager<C>>),
    Wrapped(Arc<Wrapped<C>>),
}

impl Pool {
    /// Starts a configuration from a connection string, in URL or `key=value` form, or a [`tokio_postgres::Config`].
    ///
    /// Everything that such a configuration carries is honoured, or refused with a [`BuildError`].
    ///
    /// # TLS
    /// With the feature `rustls`, or with a connector given to [`PoolBuilder::tls`], `sslmode` means what it means in libpq:
    ///
    /// | `sslmode` | encrypted | who signed the certificate | its name |
    /// |---|---|---|---|
    /// | not said, `disable` | no | | |
    /// | `prefer` | if the server offers it | not checked | not checked |
    /// | `require` | always | checked if `sslrootcert` is given | not checked |
    /// | `verify-ca` | always | checked, `sslrootcert` must be given | not checked |
    /// | `verify-full` | always | checked | checked against the host of the connection string |
    ///
    /// `sslrootcert` is a PEM file, or `system` for the platform's authorities, which is also what `verify-full` takes
    /// without it (libpq looks into `~/.postgresql` then, and takes `prefer` for an `sslmode` that is not said).
    /// `sslcert` and `sslkey` are the client's own certificate; `channel_binding` and `sslnegotiation` are honoured too.
    /// `PoolBuilder::rustls` takes the same in code.
    ///
    /// ```no_run
    /// # fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_postgres_failover::Pool;
    ///
    /// let url = "postgres://app@my-pg.internal/app?sslmode=verify-full&sslrootcert=/etc/ssl/my-pg-ca.pem";
    /// # #[cfg(feature = "rustls")]
    /// let pool = Pool::builder(url)?.build()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn builder(config: impl IntoConfig) -> Result<PoolBuilder, BuildError> {
        PoolBuilder::new(config)
    }
}

impl<C: SessionClient> Pool<C> {
    /// Starts a configuration around a deadpool pool that is there already: its manager goes on opening the connections,
    /// and this pool verifies them, runs transactions again, settles commits in doubt, and evicts what leads to an older
    /// primary. A `deadpool_postgres::Pool` becomes a [`Pool`] like any other; the pool of another manager becomes one whose
    /// clients are what that manager makes.
    ///
    /// Each connection is asked once in each generation which server is at its other end; after that a checkout does no
    /// I/O of this crate's. Beside the pool's connections the manager opens sessions for the heart-beat, one for each patrol,
    /// and up to four at a time while commits are settled; hooks of the wrapped pool are not run for these.
    ///
    /// What cannot be had without connecting by ourselves, and [`Pool::builder`] has:
    /// - The manager's connecting must lead to the primary by itself: `target_session_attrs=read-write` with all hosts, or a
    ///   name that follows it. Its DNS answers and its time-outs stay what they are. Where it hangs on a host that is frozen, so
    ///   does this pool's search, for [`probe_timeout`](WrapBuilder::probe_timeout) each time.
    /// - A statement under way on a connection from [`Pool::get`] is not ended with its primary, nor is one in a task that a
    ///   closure has spawned: on a frozen host it holds its slot until its socket fails. Set `keepalives` or
    ///   `tcp_user_timeout` in the manager's configuration. Other statements within a transaction of this pool's are ended.
    /// - No [`Pool::listen`]: the driver of each session, which hears notifications, is the manager's.
    /// - The server's notices are not seen: a COMMIT whose wait for a synchronous standby was cancelled by hand is not noticed.
    ///   A transaction that somebody left open on a connection is noticed with
    ///   [`Guarantee::ExactlyOnce`](crate::Guarantee::ExactlyOnce) alone.
    /// - A statement that is given up is cancelled by a request without TLS, as `psql` before version 17 sends it; under
    ///   `sslmode=require` the driver sends none, and the statement runs on until the server notices that its client is gone.
    ///
    /// What the pool knows of a connection it knows until that is closed: the manager's `recycle` may refuse one, and must
    /// not connect it anew in place. Nothing but the wrapped pool's own `timeouts.create` bounds how long a checkout that
    /// connects may take, up to the checkout timeout.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_postgres_failover::{Pool, deadpool_postgres, tokio_postgres};
    ///
    /// let mut config = deadpool_postgres::Config::new();
    /// config.url = Some("postgres://app@a.my-pg.internal,b.my-pg.internal/app?target_session_attrs=read-write".into());
    /// let existing = config.create_pool(None, tokio_postgres::NoTls)?;
    ///
    /// let pool: Pool = Pool::wrap(existing).build()?;
    /// pool.transaction(async |tx| Ok(tx.execute("UPDATE stock SET left = left - 1", &[]).await?)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn wrap<M>(existing: managed::Pool<M>) -> WrapBuilder<M>
    where
        M: managed::Manager<Type = C> + 'static,
        M::Error: StdError + Send + Sync + 'static,
    {
        WrapBuilder::new(existing)
    }

    /// Waits until a primary was found and verified, at most for the checkout timeout. Cancel-safe.
    ///
    /// Optional: `get` and the transactions wait by themselves. Of use at start-up, to fail early and with the reason.
    pub async fn connect(&self) -> Result<(), Error> {
        self.not_ended()?;
        let began = Instant::now();
        match timeout(self.shared.checkout_timeout, self.cluster().primary()).await {
            Ok(found) => found.map(drop).map_err(Into::into),
            Err(_) => Err(self.unavailable(began)),
        }
    }

    /// A connection to the verified primary.
    ///
    /// Waits for a primary and for a free connection, at most for the checkout timeout (30 s unless set); then fails
    /// with [`Error::Unavailable`], which lists each candidate and what it said. Fails at once with [`Error::Refused`]
    /// where the credentials are wrong. An idle connection that was used lately is handed out without a round trip; one that
    /// was idle for [`PoolBuilder::test_idle_after`] (1 s unless set) is asked first. Cancel-safe: a connection that is being
    /// opened for this call is the next caller's then.
    ///
    /// Whoever gives back a connection with a statement under way or a transaction open loses it: the statement is
    /// cancelled, the session closed, and nobody meets what was left. What a session keeps beside that, as `SET`, temporary
    /// tables and advisory locks, the next user finds: undo it, or [discard](Client::discard) the connection.
    ///
    /// A failover ends the connection: its statements then fail with [`tokio_postgres::Error`]s, and the next `get`
    /// gives one to the new primary. To have the work run again instead, use [`Pool::transaction`].
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
    /// let client = pool.get().await?;
    /// let statement = client.prepare_cached("SELECT name FROM users WHERE id = $1").await?;
    /// let row = client.query_one(&statement, &[&7_i64]).await?;
    /// # drop(row);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn get(&self) -> Result<Client<C>, Error> {
        self.get_by(|| Instant::now() + self.shared.checkout_timeout, None).await
    }

    /// Like [`Pool::get`], for this call waiting at most so long instead of the checkout timeout.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
    /// use std::time::Duration;
    ///
    /// // A health check has no time for a failover.
    /// let healthy = pool.get_within(Duration::from_millis(500)).await.is_ok();
    /// # let _ = healthy;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn get_within(&self, timeout: Duration) -> Result<Client<C>, Error> {
        self.get_until(Instant::now() + timeout.min(FAR)).await
    }

    /// What the pool is doing now.
    #[must_use]
    pub fn status(&self) -> Status {
        let managed::Status { max_size, size, available, waiting } = self.source.status();
        // Opened in the background, and not handed out yet.
        let ready = self.dialer.dials.ready();
        let (size, available) = (size + ready, available + ready);
        let waiting = waiting + self.shared.searching.load(Ordering::Relaxed);
        let view = self.cluster().view();
        let fallback = self.shared.lacking.why_unmarked(view.generation);
        let evidence = match &view.state {
            State::Primary { report, .. } => report.evidence,
            _ => None,
        };
        Status { max_size, size, available, waiting, fallback, evidence, view }
    }

    /// Follows the cluster's state: the receiver shows the newest one. To miss nothing in between, see
    /// [`Pool::subscribe`].
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) {
    /// use tokio_postgres_failover::State;
    ///
    /// let mut states = pool.watch();
    /// while states.changed().await.is_ok() {
    ///     let view = states.borrow_and_update().clone();
    ///     match view.state {
    ///         State::Primary { endpoint, .. } => println!("primary: {endpoint}"),
    ///         State::Searching { .. } => println!("no primary: {}", view.changed.why),
    ///         _ => break,
    ///     }
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<View> {
        self.cluster().watch()
    }

    /// Tells of each thing that happens from now on, one after the other: primaries lost and found, connections evicted,
    /// servers refused, commits settled. What is so already is in [`Pool::status`]; the event of a change that it has
    /// just begun to show may still come.
    ///
    /// A reader that falls more than 256 events behind misses the oldest, and is told how many; the pool never waits for it.
    /// The stream ends when the pool is closed or its last clone dropped, and does not keep it alive.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) {
    /// use tokio_postgres_failover::Event;
    ///
    /// let mut events = pool.subscribe();
    /// while let Some(event) = events.next().await {
    ///     match event {
    ///         Event::PrimaryLost { endpoint, why, .. } => println!("lost {endpoint}: {why}"),
    ///         Event::PrimaryFound { endpoint, took, .. } => println!("found {endpoint} after {took:?}"),
    ///         other => println!("{other:?}"),
    ///     }
    /// }
    /// # }
    /// ```
    pub fn subscribe(&self) -> Events {
        self.cluster().subscribe()
    }

    /// Each candidate of the newest search or patrol, and what it said last: for diagnosis. Its answers may be as old as
    /// the last patrol.
    #[must_use]
    pub fn candidates(&self) -> Vec<CandidateReport> {
        self.cluster().diagnosis().candidates
    }

    /// What DNS failed with when it was asked last, if it did.
    #[must_use]
    pub fn dns_failure(&self) -> Option<String> {
        self.cluster().diagnosis().dns
    }

    /// Takes this cluster for the pool's own from now on: after an upgrade by `pg_upgrade`, a switch to another copy
    /// (blue/green), or a restore, without a restart of the service. `system_identifier` is what
    /// `SELECT system_identifier FROM pg_control_system()` says on its servers, and errors that mention a server of another
    /// cluster name it, too.
    ///
    /// Takes effect within a moment. Connections to another cluster end, also those in use; the search that follows takes
    /// servers of this cluster alone, on whatever timeline. That is what lets a pool go on after a restore of its *own*
    /// cluster, whose timeline is older than the one before: call this with the identifier that it had all along. Where the
    /// primary in use belongs to the cluster already, nothing is interrupted. A COMMIT that is in doubt meanwhile stays so:
    /// [`Error::CommitUnknown`].
    ///
    /// Be sure that nobody writes to the old cluster any more. [`PoolBuilder::accept_new_cluster_after`] does the same by
    /// itself after a time. Never waits.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) {
    /// // The blue cluster was switched off, and the name leads to the green one now.
    /// pool.accept_cluster(7_301_827_364_512_345_678);
    /// # }
    /// ```
    pub fn accept_cluster(&self, system_identifier: u64) {
        self.cluster().accept(Accept::Cluster(system_identifier));
    }

    /// Forgets which cluster is the pool's own, and its timeline: the next search takes the one that it finds, as a new pool
    /// would. All connections end, also those in use. Where servers of several clusters answer, callers get
    /// [`Error::Refused`] until only one is left; [`Pool::accept_cluster`] tells which one it is. Never waits.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), tokio_postgres_failover::Error> {
    /// // The database was restored, and the name leads to nothing else.
    /// pool.forget_cluster();
    /// pool.connect().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn forget_cluster(&self) {
        self.cluster().accept(Accept::Any);
    }

    /// Makes every connection, idle or on loan, prepare its statements anew: after a migration, say. Does no I/O.
    ///
    /// A statement that was prepared before a table or a type was changed may be of no use any more (SQLSTATE 0A000, "cached
    /// plan must not change result type"). The pool notices that by itself: in its transactions, which run again then, and in
    /// what is run with the methods of a [`Client`], whose next call finds the connection healed. It does not see the errors
    /// of the client's [`transaction`](deadpool_postgres::ClientWrapper::transaction) and of the driver's client that a
    /// [`Client`] derefs to; nor can it know of an error before somebody meets it. Call this on each of your processes
    /// after a migration, and nobody meets one.
    ///
    /// Clears the [`StatementCache`](deadpool_postgres::StatementCache) of each connection and what the driver has read about
    /// types. Statements that somebody holds stay what they are. Connections of a [wrapped](Pool::wrap) pool whose clients
    /// are no `ClientWrapper`s are closed instead, those on loan when they come back.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), tokio_postgres_failover::Error> {
    /// pool.transaction(async |tx| Ok(tx.batch_execute("ALTER TABLE orders ADD COLUMN note text").await?)).await?;
    /// pool.clear_statement_caches();
    /// # Ok(())
    /// # }
    /// ```
    pub fn clear_statement_caches(&self) {
        match &self.source {
            Source::Own(_) => self.dialer.trails.clear(),
            Source::Wrapped(wrapped) => wrapped.clear_statement_caches(),
        }
    }

    /// Closes the pool at once: waiting callers get [`Error::Closed`], and every connection ends, also one in use.
    /// Finish your work first: the server is told to stop what it still runs, and a statement outside of a transaction that
    /// waits for a synchronous standby is shown to all when its wait is cut off so. Idempotent; affects all clones. A pool that was [wrapped](Pool::wrap) stays open, with the
    /// connections that are idle in it.
    pub fn close(&self) {
        if let Source::Own(inner) = &self.source {
            inner.close();
        }
        self.cluster().close();
    }

    /// The policy of the pool's transactions: a clone of it is where a call's own one starts from.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = pool.retry_policy().clone().attempts(3);
    /// pool.build_transaction().retry(policy).run(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn retry_policy(&self) -> &RetryPolicy {
        &self.shared.retry
    }

    /// A session beside those of the pool. Waits for a primary without a limit of its own. Cancel-safe.
    pub(crate) async fn side_session(&self) -> Result<SideSession<C>, Error> {
        SideSession::open(&self.dialer).await
    }

    /// Do its connections come from another pool?
    pub(crate) fn is_wrapped(&self) -> bool {
        matches!(self.source, Source::Wrapped(_))
    }

    /// For as long as a commit is being settled.
    pub(crate) fn settling(&self) -> Settling<'_, C> {
        Settling::new(self)
    }

    /// A word for one transaction's mark.
    pub(crate) fn next_nonce(&self) -> Nonce {
        self.dialer.next_nonce()
    }

    /// A seed for one call's jitter.
    pub(crate) fn next_seed(&self) -> u64 {
        self.dialer.next_seed()
    }

    pub(crate) fn suspect(&self, id: GenerationId, suspicion: Suspicion) {
        self.cluster().suspect(id, suspicion);
    }

    /// Is this the generation of the primary that callers are given connections to?
    pub(crate) fn is_current(&self, id: GenerationId) -> bool {
        self.cluster().is_current(id)
    }

    /// The primary of this generation has answered.
    pub(crate) fn heard(&self, id: GenerationId) {
        self.cluster().heard(id);
    }

    pub(crate) fn observer(&self) -> &Observer {
        self.cluster().observer()
    }

    fn cluster(&self) -> &Cluster<C> {
        &self.dialer.cluster
    }

    /// Fails at once, without a timer, where the pool has ended: there may be no runtime any more.
    pub(crate) fn not_ended(&self) -> Result<(), Error> {
        if self.cluster().is_closed() { Err(self.cluster().ended().into()) } else { Ok(()) }
    }

    /// Where the pool's tasks run.
    pub(crate) fn runtime(&self) -> &Handle {
        self.dialer.dials.runtime()
    }
}

impl<C: SessionClient> Clone for Pool<C> {
    fn clone(&self) -> Self {
        Self { source: self.source.clone(), dialer: Arc::clone(&self.dialer), shared: Arc::clone(&self.shared) }
    }
}

impl<C: SessionClient> Source<C> {
    fn status(&self) -> managed::Status {
        match self {
            Self::Own(inner) => inner.status(),
            Self::Wrapped(wrapped) => wrapped.status(),
        }
    }
}

impl<C: SessionClient> Clone for Source<C> {
    fn clone(&self) -> Self {
        match self {
            Self::Own(inner) => Self::Own(inner.clone()),
            Self::Wrapped(wrapped) => Self::Wrapped(Arc::clone(wrapped)),
        }
    }
}

impl<C: SessionClient> fmt::Debug for Pool<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("status", &self.status()).finish_non_exhaustive()
    }
}
