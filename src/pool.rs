//! Hands out connections of the current generation, and no others.
//!
//! The pool decides nothing about servers: the cluster's snapshot says which connections may be handed out. It does not
//! know how the primary was found. Invariants: a checkout does no I/O on an idle connection that was used recently; a
//! new connection has answered the probe in this generation; a poisoned connection never goes back to the pool. The
//! tests are `tests/it/checkout/get.rs` and `tests/it/observe/errors.rs`.

mod builder;
mod cancel_token;
mod checkout;
mod checkout_reports;
mod client;
mod closing;
mod config;
mod connection;
mod counted;
mod dial;
mod dialer;
mod env;
mod facts;
mod fetches;
mod generic_client;
mod hooked;
mod hooks;
mod hosts;
mod idle;
mod lacking;
mod manager;
mod nested;
mod options;
mod pruning;
mod room;
mod security;
mod settling;
mod shared;
mod side_session;
mod signing;
mod sizes;
mod ssl;
mod stale;
mod startup;
mod statements;
mod status;
mod test_after;
mod trail;
mod typo;
mod wrap;
#[cfg(feature = "bb8")]
mod wrapped_bb8;
mod wrapped_pool;

pub use builder::PoolBuilder;
pub use cancel_token::CancelToken;
pub(crate) use checkout_reports::CallSite;
pub use client::{Client, Detached};
pub use config::IntoConfig;
pub use connection::Connection;
pub use dial::SessionDriver;
pub(crate) use generic_client::{Commits, generic_client};
pub use generic_client::{GenericClient, GenericTransaction};
pub(crate) use lacking::{Check, UNIDENTIFIED};
pub use manager::Manager;
pub(crate) use settling::{SettleGuard, SettleSession};
pub(crate) use side_session::SideSession;
pub(crate) use signing::SignatureState;
pub(crate) use statements::{cached_statements, statement_methods, statements};
pub use status::Status;
pub use wrap::WrapBuilder;

use std::error::Error as StdError;
use std::fmt;
use std::panic::Location;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use deadpool::managed;
use deadpool_postgres::ClientWrapper;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use crate::cluster::Cluster;
use crate::error::{BuildError, CHECKOUT_TIMEOUT, Error};
use crate::observe::Events;
use crate::retry::{FAR, RetryPolicy};
use crate::server::SessionClient;
use crate::topology::{Accept, CandidateReport, State, View};
use fetches::Wrapped;
use shared::Shared;
use wrapped_pool::ExistingPool;

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
/// The pool opens up to `max_size` connections for its callers, and one more for the heartbeat. For a moment after a
/// failover, it also holds the session that found the primary. Everything that the pool has started ends when the last
/// clone and the last [`Client`] are dropped.
pub struct Pool<C: SessionClient = ClientWrapper> {
    shared: Arc<Shared<C>>,
}

/// Where the pool's connections come from.
enum Source<C: SessionClient> {
    Own(managed::Pool<Manager<C>>),
    Wrapped(Arc<Wrapped<C>>),
}

impl Pool {
    /// Starts a configuration from a connection string, in URL or `key=value` form, or a [`tokio_postgres::Config`].
    ///
    /// All options of such a configuration are honoured, or refused with a [`BuildError`]. They have libpq's meaning:
    /// in a connection string, `tcp_user_timeout` is in milliseconds, and `connect_timeout` limits opening a session as
    /// a whole ([`PoolBuilder::probe_timeout`]).
    ///
    /// # TLS
    /// With the feature `rustls`, or with a connector given to [`PoolBuilder::tls`], `sslmode` has libpq's meaning:
    ///
    /// | `sslmode` | encrypted | who signed the certificate | its name |
    /// |---|---|---|---|
    /// | not given, `disable` | no | | |
    /// | `prefer` | if the server offers it | not checked | not checked |
    /// | `require` | always | checked if `sslrootcert` is given | not checked |
    /// | `verify-ca` | always | checked, `sslrootcert` must be given | not checked |
    /// | `verify-full` | always | checked | checked against the host of the connection string |
    ///
    /// `sslrootcert` is a PEM file, or `system` for the platform's authorities. Without it, `verify-full` uses the
    /// platform's authorities, too. (libpq differs: it then looks into `~/.postgresql`, and its default `sslmode` is
    /// `prefer`.) `sslcert` and `sslkey` are the client's own certificate; `channel_binding` and `sslnegotiation` are
    /// honoured too. `PoolBuilder::rustls` takes the same settings in code.
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
    /// Starts a configuration around an existing deadpool pool. Its manager still opens the connections. This pool
    /// verifies them, runs transactions again, settles commits in doubt, and evicts connections to an older primary. A
    /// `deadpool_postgres::Pool` becomes an ordinary [`Pool`]. The pool of another manager becomes one whose clients
    /// are that manager's objects.
    ///
    /// In each generation, each connection is asked once which server it is connected to. After that, a checkout does
    /// no I/O of this crate's own. Besides the pool's connections, the manager opens sessions for the heartbeat, one
    /// for each patrol, and up to four at a time for settling commits. The wrapped pool's hooks are not run for these
    /// sessions.
    ///
    /// These features of [`Pool::builder`] need connections of this crate's own, and are missing here:
    /// - The manager itself must connect to the primary: give it `target_session_attrs=read-write` with all hosts, or a
    ///   name that follows the primary. Its DNS answers and its time-outs stay as they are. If its connecting hangs on
    ///   a frozen host, so does this pool's search, for [`probe_timeout`](WrapBuilder::probe_timeout) each time.
    /// - When the primary is lost, statements in this pool's transactions are ended. But a statement on a connection
    ///   from [`Pool::get`], or in a task that a closure has spawned, goes on. On a frozen host, it holds its slot
    ///   until its socket fails. So set `keepalives` or `tcp_user_timeout` in the manager's configuration.
    /// - [`Pool::close`] ends transactions, but not a connection from [`Pool::get`] that is in use. A
    ///   [detached](Client::detach) session ends with nothing but its drop: watch
    ///   [`Detached::ended`](crate::session::Detached::ended), or it goes on writing to an old primary.
    /// - There is no [`Pool::listen`], because the sessions' driver, which receives notifications, belongs to the
    ///   manager.
    /// - The pool does not see the server's notices. So it does not notice if an administrator cancels a COMMIT's wait
    ///   for a synchronous standby. It notices a transaction that was left open on a connection only with
    ///   [`Guarantee::ExactlyOnce`](crate::Guarantee::ExactlyOnce).
    /// - An abandoned statement is cancelled by a request without TLS, as `psql` before version 17 sends it. Under
    ///   `sslmode=require` the driver sends no such request, and the statement runs on until the server notices that
    ///   its client is gone.
    ///
    /// What the pool knows about a connection is valid until the connection is closed. So the manager's `recycle` may
    /// refuse a connection, but must not reconnect it in place. If a caller gives up while the manager connects, the
    /// connection goes to the next caller. If nobody waits, the pool gives up connecting after
    /// [`probe_timeout`](WrapBuilder::probe_timeout).
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_postgres_failover::{Pool, deadpool_postgres, tokio_postgres};
    ///
    /// let mut config = deadpool_postgres::Config::new();
    /// let url = "postgres://app@a.my-pg.internal,b.my-pg.internal/app?target_session_attrs=read-write";
    /// config.url = Some(url.to_owned());
    /// let existing = config.create_pool(None, tokio_postgres::NoTls)?;
    ///
    /// let pool: Pool = Pool::wrap(existing).build()?;
    /// pool.transaction(async |tx| Ok(tx.execute("UPDATE stock SET left = left - 1", &[]).await?)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn wrap<M>(existing: managed::Pool<M>) -> WrapBuilder<C>
    where
        M: managed::Manager<Type = C> + 'static,
        M::Error: StdError + Send + Sync + 'static,
    {
        WrapBuilder::new(Arc::new(ExistingPool::new(existing)))
    }

    /// Waits until a primary was found and verified, but no longer than the checkout timeout. Cancel-safe.
    ///
    /// Calling this is optional, because `get` and the transactions wait by themselves. Call it at start-up to fail
    /// early, with an error that says why.
    pub async fn connect(&self) -> Result<(), Error> {
        self.is_open()?;
        self.not_ended()?;
        let began = Instant::now();
        let finding = async {
            match timeout(self.shared.calls.checkout_timeout, self.cluster().primary()).await {
                Ok(found) => found.map(drop).map_err(Error::without_primary),
                Err(_) => Err(self.unavailable_beside(began)),
            }
        };
        self.unless_closing(finding).await
    }

    /// Returns a connection to the verified primary.
    ///
    /// Waits for a primary and for a free connection, but no longer than the checkout timeout (30 s by default). Then
    /// it fails with [`Error::Unavailable`], which lists each candidate and its last answer. If the credentials are
    /// wrong, it fails with [`Error::Refused`]: at once, or after a second or two if other connections are open, which
    /// may come back meanwhile. A recently used idle connection is handed out without a round trip; one that was idle
    /// for [`PoolBuilder::test_idle_after`] (1 s by default) is tested first. Cancel-safe: a connection that was being
    /// opened for this call goes to the next caller.
    ///
    /// If a connection is given back with a statement under way or a transaction open, the statement is cancelled and
    /// the session is closed, so that no other caller gets it. Any other state of the session, such as `SET`, temporary
    /// tables and advisory locks, stays for the next caller. Undo it, or [discard](Client::discard) the connection.
    ///
    /// A failover ends the connection: its statements then fail with [`tokio_postgres::Error`]s, and the next `get`
    /// returns a connection to the new primary. To have the work run again instead, use [`Pool::transaction`].
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
    #[track_caller]
    pub fn get(&self) -> impl Future<Output = Result<Client<C>, Error>> + Send {
        let place = Location::caller();
        async move {
            self.is_open()?;
            self.get_by(|| Instant::now() + self.shared.calls.checkout_timeout, CHECKOUT_TIMEOUT, None, place).await
        }
    }

    /// Like [`Pool::get`], but waits at most this long instead of the checkout timeout.
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
    #[track_caller]
    pub fn get_within(&self, timeout: Duration) -> impl Future<Output = Result<Client<C>, Error>> + Send {
        let place = Location::caller();
        async move {
            self.is_open()?;
            let deadline = Instant::now() + timeout.min(FAR);
            self.get_by(|| deadline, "Pool::get_within", None, place).await
        }
    }

    /// Returns the pool's present state.
    #[must_use]
    pub fn status(&self) -> Status {
        let managed::Status { max_size, size, available, waiting } = self.shared.source.status();
        // The inner pool does not count these connections, which wait for the next caller.
        let ready = self.shared.dialer.queue.ready();
        let (size, available) = (size + ready, available + ready);
        let waiting = waiting + self.shared.calls.searching.load(Ordering::Relaxed);
        let view = self.cluster().view();
        let fallback = self.shared.calls.lacking.why_unmarked(view.generation);
        let evidence = match &view.state {
            State::Primary { report, .. } => report.evidence,
            _ => None,
        };
        Status { max_size, size, available, waiting, fallback, evidence, view }
    }

    /// Returns a receiver of the cluster's state. It shows only the newest state; to get every change, use
    /// [`Pool::subscribe`].
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) {
    /// use tokio_postgres_failover::view::State;
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

    /// Streams each event from now on, in order: primaries lost and found, connections evicted, servers refused,
    /// commits settled. The present state is in [`Pool::status`]. It may already show a change whose event follows.
    ///
    /// A reader that falls more than 256 events behind misses the oldest ones, and is told how many. The pool never
    /// waits for a reader. The stream ends when the pool is closed or its last clone is dropped; a stream does not keep
    /// the pool alive.
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

    /// Returns each candidate of the newest search or patrol with its last answer, for diagnosis. The answers may be as
    /// old as the last patrol.
    #[must_use]
    pub fn candidates(&self) -> Vec<CandidateReport> {
        self.cluster().diagnosis().candidates
    }

    /// Returns the error of the last DNS query, if it failed.
    #[must_use]
    pub fn dns_failure(&self) -> Option<String> {
        self.cluster().diagnosis().dns
    }

    /// Makes this cluster the pool's own. This needs no restart of the service. Use it after an upgrade by
    /// `pg_upgrade`, a switch to another copy (blue/green), or a restore. `system_identifier` is what `SELECT
    /// system_identifier FROM pg_control_system()` returns on its servers. Errors that mention a server of another
    /// cluster name it, too.
    ///
    /// Takes effect within a moment. Connections to another cluster end, even those in use, and the search that follows
    /// accepts only servers of this cluster, on any timeline. So after a restore of the pool's *own* cluster to an
    /// older timeline, call this with the identifier that the pool already has. If the primary in use belongs to the
    /// cluster, nothing is interrupted. A COMMIT that is in doubt at this time fails with [`Error::CommitUnknown`].
    ///
    /// Make sure that nothing writes to the old cluster any more. [`PoolBuilder::accept_new_cluster_after`] does the
    /// same automatically after a time. Never waits.
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

    /// Forgets which cluster is the pool's own, and its timeline. The next search accepts the cluster that it finds, as
    /// a new pool would. All connections end, even those in use. If servers of several clusters answer, callers get
    /// [`Error::Refused`] until only one is left, or [`Pool::accept_cluster`] says which one is meant. Never waits.
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

    /// Makes every connection, idle or checked out, prepare its statements again, for instance after a migration. Does
    /// no I/O.
    ///
    /// A statement that was prepared before a table or a type was changed may no longer work (SQLSTATE 0A000, "cached
    /// plan must not change result type"). The pool notices such errors by itself: its transactions then run again, and
    /// after an error of a [`Client`]'s own methods the connection is repaired for the next call. It does not see the
    /// errors of the client's [`transaction`](deadpool_postgres::ClientWrapper::transaction), or of the driver's client
    /// that a [`Client`] derefs to. It does not see either that [`Row::try_get`](tokio_postgres::Row::try_get) fails
    /// with [`WrongType`](tokio_postgres::types::WrongType) because a type has changed (`ALTER TYPE … ADD VALUE`): call
    /// this after such an error. It also learns of an error only when the first caller gets it. To avoid that error,
    /// call this in each of your processes after a migration.
    ///
    /// Clears the [`StatementCache`](deadpool_postgres::StatementCache) of each connection, and what the driver has
    /// read about types. Statements that callers hold stay as they are. If the clients of a [wrapped](Pool::wrap) pool
    /// are not `ClientWrapper`s, its connections are closed instead: idle ones immediately, those checked out when they
    /// come back.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), tokio_postgres_failover::Error> {
    /// pool.transaction(async |tx| Ok(tx.batch_execute("ALTER TABLE orders ADD COLUMN note text").await?)).await?;
    /// pool.clear_statement_caches();
    /// # Ok(())
    /// # }
    /// ```
    pub fn clear_statement_caches(&self) {
        match &self.shared.source {
            Source::Own(_) => self.shared.dialer.trails.clear(),
            Source::Wrapped(wrapped) => wrapped.clear_statement_caches(),
        }
    }

    /// Returns the retry policy of the pool's transactions. Clone it to derive a policy for one call.
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
        &self.shared.calls.retry
    }

    fn cluster(&self) -> &Cluster<C> {
        &self.shared.dialer.cluster
    }
}

impl<C: SessionClient> Clone for Pool<C> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
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

impl<C: SessionClient> fmt::Debug for Pool<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("status", &self.status()).finish_non_exhaustive()
    }
}
