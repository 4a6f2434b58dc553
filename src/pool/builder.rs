//! Turns a configuration into a pool, or reports what is wrong with it.

mod build;
mod hooks;
#[cfg(fuzzing)]
mod read;

use std::error::Error as StdError;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::ClientWrapper;
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{Config, Socket};

#[cfg(doc)]
use super::Pool;
use super::config::{Configuration, IntoConfig};
use super::hooks::Hooks;
use super::idle::Idle;
use super::options::{Options, setters};
use super::security::Security;
use super::ssl::Ssl;
use crate::commit::Guarantee;
use crate::connect::Connect;
use crate::error::BuildError;
use crate::resolve::Resolve;
use crate::retry::{RetryBudget, RetryPolicy};
use crate::server::{Opener, PasswordProvider};
#[cfg(feature = "rustls")]
use crate::tls::Tls;

/// Configures a [`Pool`]. Setters take the builder by value and never fail; [`PoolBuilder::build`] reports all errors.
///
/// ```no_run
/// # fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use std::time::Duration;
/// use tokio_postgres_failover::{Pool, RetryPolicy};
///
/// let pool = Pool::builder("postgres://app@my-pg.internal/app")?
///     .max_size(32)
///     .checkout_timeout(Duration::from_secs(10))
///     .retry(RetryPolicy::new().deadline(Duration::from_secs(90)))
///     .build()?;
/// # Ok(())
/// # }
/// ```
#[must_use = "a builder does nothing until `build` is called"]
pub struct PoolBuilder {
    config: Config,
    ssl: Ssl,
    security: Security,
    connector: Option<Arc<dyn Connect>>,
    ask_password: Option<PasswordProvider>,
    /// What a password file says. It counts only without a provider.
    password_file: Option<Result<String, BuildError>>,
    resolver: Option<Arc<dyn Resolve>>,
    dns_servers: Option<Vec<SocketAddr>>,
    probe_timeout: Option<Duration>,
    max_size: usize,
    idle: Idle,
    max_lifetime: Duration,
    test_idle_after: Duration,
    sleep_after: Option<Duration>,
    /// The pool is this crate's own, so it knows which connections are checked out.
    knows_checkouts: bool,
    gate: usize,
    hooks: Hooks<ClientWrapper>,
    options: Options,
}

impl PoolBuilder {
    pub(super) fn new(config: impl IntoConfig) -> Result<Self, BuildError> {
        let Configuration { config, ssl, password_file } = config.into_configuration()?;
        Ok(Self {
            config,
            ssl,
            security: Security::Unsaid,
            connector: None,
            ask_password: None,
            password_file,
            resolver: None,
            dns_servers: None,
            probe_timeout: None,
            max_size: 16,
            idle: Idle { timeout: Duration::from_secs(10 * 60), min: 0 },
            max_lifetime: Duration::from_secs(30 * 60),
            test_idle_after: Duration::from_secs(1),
            sleep_after: None,
            knows_checkouts: false,
            gate: 4,
            hooks: Hooks::default(),
            options: Options::default(),
        })
    }

    /// The most connections handed out at the same time. Default: 16. Further callers wait.
    pub fn max_size(mut self, max_size: usize) -> Self {
        self.max_size = max_size;
        self
    }

    /// The number of connections kept idle, ready for the next callers. Default: 0.
    ///
    /// They are opened in advance in the background: when a primary was found, and when callers have taken some. They
    /// count towards [`PoolBuilder::max_size`], and are opened through [`PoolBuilder::connection_gate`].
    /// [`PoolBuilder::idle_timeout`] does not close them.
    pub fn min_idle(mut self, min_idle: usize) -> Self {
        self.idle.min = min_idle;
        self
    }

    /// The time after which an idle connection is closed, down to [`PoolBuilder::min_idle`] connections. Default: 10
    /// min.
    ///
    /// Make it shorter than the time that proxies in between allow (Fly's proxy recommends 5 min). The connection that
    /// came back last is used first, so the others become idle, and the pool shrinks to what the load needs.
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle.timeout = timeout;
        self
    }

    /// The age from which a connection is no longer handed out. Default: 30 min. A random time of up to a tenth is
    /// subtracted, so that connections that were opened together after a failover do not expire together.
    pub fn max_lifetime(mut self, lifetime: Duration) -> Self {
        self.max_lifetime = lifetime;
        self
    }

    /// The time of silence after which an idle connection is tested before it is handed out. The test is one round
    /// trip, for which the server has 500 ms. Default: 1 s. `Duration::MAX`: never.
    ///
    /// This finds sockets that died without a sign, because the machine was suspended, or a router or a proxy forgot
    /// them. Without it, the first statement on such a connection waits for `tcp_user_timeout`. If a connection gives
    /// no answer, another one is used, and all connections that have been idle for as long are tested before a caller
    /// gets one of them. A connection that gives no answer within another 2 s is closed. If a caller gives up during a
    /// test, the test goes on. Time is measured by the wall clock, which goes on while a machine sleeps. Connections
    /// that are used more often are handed out without a round trip.
    pub fn test_idle_after(mut self, idle_for: Duration) -> Self {
        self.test_idle_after = idle_for;
        self
    }

    /// The time without a caller after which the pool sleeps: all its connections are closed, including the pool's own,
    /// and neither servers nor DNS are asked. Default: never.
    ///
    /// This is for databases that are suspended, or cost nothing, while no client is connected (Neon, Aurora's
    /// auto-pause, Fly machines that stop). The first caller wakes the pool. The pool then searches for a primary and
    /// verifies it as at the very first start, because another server may have been promoted meanwhile. The caller
    /// waits for the search and for the server's start, so set a [`PoolBuilder::checkout_timeout`] that is longer than
    /// both. Connections checked out, [listeners](Pool::listen), and [detached](crate::Client::detach) and
    /// [dialled](Pool::dial) sessions keep the
    /// pool awake.
    pub fn sleep_after(mut self, without_a_caller: Duration) -> Self {
        self.sleep_after = Some(without_a_caller);
        self
    }

    setters! {
        /// How long [`Pool::get`] and [`Pool::connect`] wait for a primary and a free connection. Default: 30 s.
        ///
        /// If it is longer than your failover (60 to 75 s on Fly's repmgr clusters, 30 s with Patroni's defaults),
        /// callers see a pause. If it is shorter, they fail with a list of each server's last answer.
        ///
        /// A transaction waits for a *primary* until the deadline of its [`RetryPolicy`], so that it survives a
        /// failover. If other callers use all connections, it waits no longer than this time-out.
        checkout_timeout;

        /// Sets whether and when failed transactions run again. Default: [`RetryPolicy::default`].
        retry;

        /// What [`Pool::transaction`] guarantees if the connection is lost between COMMIT and its answer. Default:
        /// [`Guarantee::ExactlyOnce`].
        guarantee;

        /// Sets whether BEGIN travels together with the first statement of a transaction. Default: `true`.
        ///
        /// Then a transaction of one statement takes two round trips instead of three. If BEGIN fails, the server
        /// carries out nothing of what was sent with it: the session is closed, the work runs again, and for a minute
        /// BEGIN is sent by itself. This is done only on sessions that lead directly to the server. The first
        /// transaction of a session with [`Guarantee::ExactlyOnce`] or [`Guarantee::Ledger`] begins by itself.
        ///
        /// Choose `false` if something between the pool and the server does not forward the messages of the extended
        /// protocol as they come.
        begin_with_first_statement;

        /// The budget that all re-runs of this pool share. Default: [`RetryBudget::default`].
        retry_budget;
    }

    /// Asks this function for the password of each new session, instead of taking it from the connection string. Use it
    /// for secrets that are rotated, and tokens that expire. Default: none.
    ///
    /// The provider is asked once before each session is opened, including the pool's own sessions (probes, heartbeat),
    /// and the password is not kept. A search for the primary asks up to a hundred times a second for each server, so a
    /// provider that calls a slow or metered service should cache its answer for as long as it is valid. It must not
    /// block, and may be called by several tasks at a time. Open connections stay open when their password changes.
    ///
    /// # Errors
    /// If the provider fails, panics or is too slow, it is asked again for the next attempt, and the callers wait as
    /// they do for a primary. At their deadline they get [`Error::Unavailable`](crate::Error::Unavailable), which
    /// contains the text of the provider's error. If the primary is known, the provider's error itself is in the chain
    /// of sources. The provider's time limit is three quarters of the shortest of [`PoolBuilder::probe_timeout`],
    /// [`PoolBuilder::heartbeat_timeout`] and a third of [`PoolBuilder::dead_after`]. The text of its error gets into
    /// errors and logs, so keep the secret out of it.
    ///
    /// If the server refuses a password before any was accepted, callers get [`Error::Refused`](crate::Error::Refused)
    /// immediately. If a password was accepted before, the pool takes a refusal as a sign that the password is being
    /// changed. Callers then wait in the same way, and a password is tried once a second.
    ///
    /// [`PoolBuilder::build`] fails if the connection string or `PGPASSWORD` contains a password as well. A password
    /// file that [`Pool::from_env`] has found is not used.
    ///
    /// # Cancel safety
    /// The provider's future is dropped if opening its session takes too long, if the primary is replaced, or if the
    /// pool ends. If a caller gives up, the future goes on, and the session goes to the next caller.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_postgres_failover::Pool;
    ///
    /// // An orchestrator renews this secret in a file.
    /// let pool = Pool::builder("postgres://app@my-pg.internal/app")?
    ///     .password_provider(|| async {
    ///         let secret = tokio::fs::read_to_string("/run/secrets/pg").await?;
    ///         Ok(secret.trim_end().to_owned())
    ///     })
    ///     .build()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn password_provider<F, Fut, P>(mut self, provider: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<P, Box<dyn StdError + Send + Sync>>> + Send + 'static,
        P: Into<Vec<u8>>,
    {
        self.ask_password = Some(Box::new(move || {
            let asked = provider();
            Box::pin(async move { asked.await.map(Into::into) })
        }));
        self
    }

    /// The TLS connector. Default: none, or with the feature `rustls` what the connection string asks for. Certificates
    /// are checked against the configured host name, although the connection is made to an address.
    ///
    /// The connector decides what is checked: `sslmode=verify-ca` and `verify-full` count as `require`, and
    /// [`PoolBuilder::build`] fails if the connection string has `sslrootcert`, `sslcert` or `sslkey`. Without an
    /// `sslmode`, the driver prefers TLS, and does without it if the server offers none.
    ///
    /// Each new session uses a clone of the connector. To rotate certificates, use a [`MakeTlsConnect`] that holds them
    /// behind an `Arc` and reads them again from time to time. Open connections stay open with the old certificates.
    pub fn tls<T>(mut self, connector: T) -> Self
    where
        T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
        T::Stream: Send,
        T::TlsConnect: Send,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        self.security = Security::Own(Box::new(|template| Opener::new(template, connector)));
        self
    }

    /// Requires TLS, with rustls: no session is opened without it. Feature `rustls`.
    ///
    /// Use it for settings that a connection string cannot express. For all others, `sslmode` and `sslrootcert` in the
    /// connection string do the same. If both are given, the stricter check counts. This replaces a connector given to
    /// [`PoolBuilder::tls`].
    ///
    /// # Errors
    /// [`PoolBuilder::build`] fails if a file cannot be used, if the connection string has `sslmode=disable` or
    /// `prefer`, or if it names files that are given here too. A server without TLS, or one whose certificate fails the
    /// check, leads to [`Error::Refused`](crate::Error::Refused) at once.
    #[cfg(feature = "rustls")]
    pub fn rustls(mut self, tls: Tls) -> Self {
        self.security = Security::Rustls(tls);
        self
    }

    /// Opens every stream to a server with this connector, instead of TCP or a Unix socket: for sessions, probes and
    /// cancel requests. Default: none.
    ///
    /// Use it for a SOCKS proxy, an SSH tunnel or vsock; [`Connect`] has an example. Names are still resolved by the
    /// pool's [`PoolBuilder::resolver`]. `sslmode`, [`PoolBuilder::rustls`] and the like encrypt over the connector's
    /// stream, with the feature `rustls`. `keepalives` and `tcp_user_timeout` have no effect.
    ///
    /// # Errors
    /// [`PoolBuilder::build`] fails if [`PoolBuilder::tls`] is set too, because that connector encrypts only the
    /// driver's own sockets. If the connector fails or panics, the server counts as unreachable for now.
    pub fn connector(mut self, connector: impl Connect) -> Self {
        self.connector = Some(Arc::new(connector));
        self
    }

    /// Asks these name servers (UDP and TCP, on the given ports) instead of the system's, without a search list.
    ///
    /// They are ignored if [`PoolBuilder::resolver`] is used as well. A
    /// [`HickoryResolver::with_name_servers`](crate::resolve::HickoryResolver::with_name_servers) takes them instead.
    /// `build` refuses an empty list.
    pub fn dns_servers(mut self, servers: impl IntoIterator<Item = SocketAddr>) -> Self {
        self.dns_servers = Some(servers.into_iter().collect());
        self
    }

    /// Resolves names with your own [`Resolve`]. Default: a [`HickoryResolver`](crate::resolve::HickoryResolver) with
    /// the system's configuration.
    ///
    /// It is asked instead of any name server, so [`PoolBuilder::dns_servers`] is ignored then.
    pub fn resolver(mut self, resolver: impl Resolve) -> Self {
        self.resolver = Some(Arc::new(resolver));
        self
    }

    /// The name shown in `pg_stat_activity`. Default: that in the connection string, or else `tokio-postgres-failover`.
    pub fn application_name(mut self, name: impl Into<String>) -> Self {
        self.config.application_name(name);
        self
    }

    setters! {
        /// The pool's name in its metrics (feature `metrics`): their label `db.client.connection.pool.name`. Default:
        /// the first host of the configuration, its port and the database, as in `my-pg.internal:5432/app`.
        ///
        /// Give each pool of a process a different name. Pools with the same name share their metrics: their counts are
        /// added up, and `db.client.failover.generation` shows the generation of one of them.
        pool_name;

        /// Pause between two heartbeats, which ask the primary on a connection that the pool keeps for them. Default: 1
        /// s.
        ///
        /// The pool notices a closed or refused connection immediately, without the heartbeat. The heartbeat finds
        /// failures that give no sign: a fence, or a host that vanished while no call was under way. If connections are
        /// checked out, and all are silent for a twentieth of this time, the pool asks the primary without waiting for
        /// the next heartbeat.
        heartbeat_interval;

        /// The time without an answer to a heartbeat after which the pool searches for a primary. Default: 2 s. Work
        /// under way continues, so if the server was only slow, nothing is lost.
        heartbeat_timeout;

        /// Pause between two checks of DNS and of the other members while the primary is well. Default: 5 s.
        ///
        /// It limits how long this pool still writes to an old primary that is cut off from its peers, but not from
        /// this pool.
        patrol_interval;
    }

    /// Shortest and longest pause between two probes of one server while there is no primary. In between, the pause is
    /// one per cent of the time without a primary. Default: 10 ms and 250 ms. If there are more than eight addresses
    /// that do not answer, those are asked less often.
    ///
    /// A standby with an open session checks for its own promotion ten times in that pause, and reports it immediately.
    /// For this it runs a statement with `pg_sleep` that takes 50 to 250 ms. If the role may not call `pg_sleep`, the
    /// standby is asked at the usual pace.
    pub fn poll_interval(mut self, shortest: Duration, longest: Duration) -> Self {
        self.options.settings.poll = (shortest, longest);
        self
    }

    /// Time limit for one probe, and for opening one connection: TCP, TLS, authentication and one query. Default: the
    /// `connect_timeout` of the connection string, or else 3 s.
    ///
    /// All candidates are probed at the same time, each with this limit, so a silent one does not delay the others.
    pub fn probe_timeout(mut self, timeout: Duration) -> Self {
        self.probe_timeout = Some(timeout);
        self
    }

    setters! {
        /// The time of silence after which the connections of a primary are ended, even if no other primary was found.
        /// Default: 20 s.
        dead_after;
    }

    /// Whether to keep a session to each standby while there is a primary, and to ask it in each patrol. Default: yes.
    ///
    /// A session survives its server's promotion. So the search notices the promotion within a round trip, and this
    /// session is the first connection to the new primary. The cost is one connection per pool to each standby. With
    /// `false`, each patrol opens a session to each standby and closes it, so each pool logs in to each standby up to
    /// 24 times a minute. docs/costs.md has the figures.
    pub fn warm_standbys(mut self, warm: bool) -> Self {
        self.options.settings.warm_standbys = warm;
        self
    }

    /// Whether the names or addresses lead to proxies, each of which may lead a new session to another server: HAProxy,
    /// a Kubernetes Service, a virtual address, RDS Proxy. Default: no.
    ///
    /// If a standby is promoted while the old primary still answers, only a new session shows it where the new primary
    /// is behind the same address. With `true`, each [patrol](PoolBuilder::patrol_interval) opens a session to the
    /// primary's address and closes it, up to 24 times a minute with the defaults. With `false`, it does so if the pool
    /// sees no other server, and otherwise once a minute. Set it if the connection string names such a proxy and other
    /// servers beside it, for instance the `-rw` and the `-ro` service of CloudNativePG.
    ///
    /// ```
    /// # fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_postgres_failover::Pool;
    ///
    /// let pool = Pool::builder("postgres://app@pg-rw.db.svc,pg-ro.db.svc/app")?.proxied(true).build()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn proxied(mut self, proxied: bool) -> Self {
        self.options.settings.proxied = proxied;
        self
    }

    /// The most connections that are opened at the same time. Default: 4; `usize::MAX`: no limit. A newly promoted
    /// server should not be flooded.
    pub fn connection_gate(mut self, at_once: usize) -> Self {
        self.gate = at_once;
        self
    }

    setters! {
        /// The pool's cluster, as `SELECT system_identifier FROM pg_control_system()` returns it on its servers.
        /// Default: the cluster that the first search finds.
        ///
        /// If the first search finds servers of several clusters, it accepts none of them, and callers get
        /// [`Error::Refused`](crate::Error::Refused), which lists the servers. So set this if a name or a list of hosts
        /// may lead to a copy: blue/green, a restored backup, a logical subscriber. A server that withholds its
        /// identifier is then refused. [`Pool::accept_cluster`] changes the cluster later.
        system_identifier;

        /// Follows another primary if no server of this pool's cluster has answered as its primary for this long. The
        /// other primary may belong to a cluster with another system identifier (`pg_upgrade`, blue/green, a copy), or
        /// to this cluster, restored to an older timeline. Default: never.
        ///
        /// Without this, such servers are refused until [`Pool::accept_cluster`] or a restart of the service. The
        /// danger is that a copy or an old primary is reachable while the real primary is not: with this setting the
        /// pool would then write to it. Choose a time that is longer than any failover, and longer than a network
        /// partition that the pool should survive. If several clusters answer, none is followed. The time counts only
        /// while the pool searches and asks its servers: not while it sleeps, and not while its process or machine is
        /// stopped.
        ///
        /// # Errors
        /// [`PoolBuilder::build`] fails if this is zero, or if [`PoolBuilder::system_identifier`] is set too.
        accept_new_cluster_after;

        /// Makes the jitter of this pool repeatable, for tests. Default: random.
        seed;
    }
}

impl fmt::Debug for PoolBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The configuration is left out, because if it was misread, any part of it may be a piece of the password.
        f.debug_struct("PoolBuilder").field("max_size", &self.max_size).finish_non_exhaustive()
    }
}
