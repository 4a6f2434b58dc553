//! Turns a configuration into a pool, or says what is wrong with it.

use std::error::Error as StdError;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use deadpool::managed::{self, QueueMode};
use deadpool_postgres::ClientWrapper;
use tokio::runtime::Handle;
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{Config, NoTls, Socket};

use super::config::{Configuration, IntoConfig, names, targets, template};
use super::dialer::Dialer;
use super::idle::{Idle, Keeper};
use super::options::{CallOptions, checked, not_zero, resolver, seed_or_random};
use super::security::{Security, make_opener};
use super::ssl::Ssl;
use super::{Manager, Pool, Source};
use crate::cluster::{Cluster, Setup};
use crate::commit::Guarantee;
use crate::error::BuildError;
use crate::observe::Observer;
use crate::resolve::Resolve;
use crate::retry::{FAR, RetryBudget, RetryPolicy};
use crate::server::{Ask, Open, Opener, Passwords};
#[cfg(feature = "rustls")]
use crate::tls::Tls;
use crate::topology::Settings;

/// Configures a [`Pool`]. By value; the setters do not fail, [`PoolBuilder::build`] does.
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
    ask_password: Option<Ask>,
    resolver: Option<Arc<dyn Resolve>>,
    dns_servers: Vec<SocketAddr>,
    max_size: usize,
    idle: Idle,
    max_lifetime: Duration,
    test_idle_after: Duration,
    sleep_after: Option<Duration>,
    /// A pool of this crate's own, which knows what is on loan.
    knows_loans: bool,
    gate: usize,
    calls: CallOptions,
    settings: Settings,
    pool_name: Option<String>,
    seed: Option<u64>,
}

impl PoolBuilder {
    pub(super) fn new(config: impl IntoConfig) -> Result<Self, BuildError> {
        let Configuration { config, ssl } = config.into_configuration()?;
        Ok(Self {
            config,
            ssl,
            security: Security::Unsaid,
            ask_password: None,
            resolver: None,
            dns_servers: Vec::new(),
            max_size: 16,
            idle: Idle { timeout: Duration::from_secs(10 * 60), min: 0 },
            max_lifetime: Duration::from_secs(30 * 60),
            test_idle_after: Duration::from_secs(1),
            sleep_after: None,
            knows_loans: false,
            gate: 4,
            calls: CallOptions::default(),
            settings: Settings::default(),
            pool_name: None,
            seed: None,
        })
    }

    /// The most connections handed out at the same time. Default: 16. Further callers wait.
    pub fn max_size(mut self, max_size: usize) -> Self {
        self.max_size = max_size;
        self
    }

    /// How many connections are kept idle, ready for the next callers. Default: 0.
    ///
    /// They are opened ahead of need in the background: when a primary was found, and when callers have taken them; within
    /// [`PoolBuilder::max_size`], and through [`PoolBuilder::connection_gate`]. None of them is closed for being idle.
    pub fn min_idle(mut self, min_idle: usize) -> Self {
        self.idle.min = min_idle;
        self
    }

    /// A connection that has been idle for so long is closed, down to [`PoolBuilder::min_idle`]. Default: 10 min.
    ///
    /// Shorter than what proxies in between allow (Fly's recommends 5 min). Connections are reused last in, first out, so
    /// that a pool shrinks to what the load needs.
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle.timeout = timeout;
        self
    }

    /// A connection is not handed out any more at this age, less up to a tenth, by chance, so that those which were opened
    /// together after a failover are not renewed together. Default: 30 min.
    pub fn max_lifetime(mut self, lifetime: Duration) -> Self {
        self.max_lifetime = lifetime;
        self
    }

    /// A connection on which the server has said nothing for so long is asked before it is handed out: one round trip, for
    /// which it has 500 ms. Default: 1 s. `Duration::MAX`: never.
    ///
    /// For sockets that died without a word: the machine was suspended, a router or a proxy has forgotten them. Without it the
    /// first statement on such a connection waits for `tcp_user_timeout`. One that gives no answer is closed, together with
    /// all that have been idle for as long. Time passes by the wall clock, which goes on while a machine sleeps. Connections
    /// that are used more often are handed out without a round trip.
    pub fn test_idle_after(mut self, idle_for: Duration) -> Self {
        self.test_idle_after = idle_for;
        self
    }

    /// Without a caller for so long the pool sleeps: all its connections are closed, the pool's own included, and no server
    /// and no DNS is asked. Default: never.
    ///
    /// For databases that are suspended or billed while nobody is connected (Neon, Aurora's auto-pause, machines on Fly that
    /// stop). The first caller wakes the pool: a primary is searched and verified anew, as in the first search of all, since
    /// anything may have happened meanwhile. So it waits for that, and for the server to start; give it a
    /// [`PoolBuilder::checkout_timeout`] that has room for both. Connections on loan, [listeners](Pool::listen) and
    /// [detached](crate::Client::detach) sessions keep the pool awake.
    pub fn sleep_after(mut self, without_a_caller: Duration) -> Self {
        self.sleep_after = Some(without_a_caller);
        self
    }

    /// How long [`Pool::get`] and [`Pool::connect`] wait for a primary and a free connection. Default: 30 s.
    ///
    /// Longer than your failover, and callers ride through it: 60 to 75 s on Fly's repmgr clusters, 30 s on Patroni's
    /// defaults. Shorter, and they fail with the list of what each server said.
    ///
    /// A transaction waits for a *primary* until the deadline of its [`RetryPolicy`], so that it lives through a failover,
    /// and for others to give a connection back no longer than this.
    pub fn checkout_timeout(mut self, timeout: Duration) -> Self {
        self.calls.checkout_timeout = timeout;
        self
    }

    /// How transactions are run again. Default: [`RetryPolicy::default`].
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.calls.retry = policy;
        self
    }

    /// What [`Pool::transaction`] guarantees when the connection is lost between COMMIT and its answer. Default:
    /// [`Guarantee::ExactlyOnce`].
    pub fn guarantee(mut self, guarantee: Guarantee) -> Self {
        self.calls.guarantee = guarantee;
        self
    }

    /// The budget that all re-runs of this pool share. Default: [`RetryBudget::default`].
    pub fn retry_budget(mut self, budget: RetryBudget) -> Self {
        self.calls.budget = budget;
        self
    }

    /// Asks this function for the password of each new session, instead of taking one from the connection string: for
    /// secrets that are rotated, and tokens that expire. Default: none.
    ///
    /// It is asked once before each session is opened, of the pool's own sessions too (probes, heart-beat), and nothing is
    /// kept. A search for the primary asks up to a hundred times a second for each server: a provider that calls a slow or
    /// metered service should keep its answer itself for as long as it is good. It must not block, and may be called by
    /// several tasks at a time. Open connections live on, whatever becomes of their password.
    ///
    /// # Errors
    /// A provider that fails, panics or is too slow is asked again for the next try, and the callers wait, like for a
    /// primary: at their deadline they get [`Error::Unavailable`](crate::Error::Unavailable), which says what the provider
    /// said; its error is in the chain of sources where the primary is known. It has three quarters of the shortest of
    /// [`PoolBuilder::probe_timeout`], [`PoolBuilder::heartbeat_timeout`] and a third of [`PoolBuilder::dead_after`]. What the
    /// provider's error says gets into errors and logs: keep the secret out of it.
    ///
    /// A password that the server refuses is told at once, as [`Error::Refused`](crate::Error::Refused), as long as none was
    /// right. After that it is taken for a change under way, and waited for in the same way.
    ///
    /// [`PoolBuilder::build`] fails where the connection string holds a password too.
    ///
    /// # Cancel safety
    /// The future is dropped where its session is too late, or where its primary or the pool has ended. A caller that gives up
    /// leaves it under way: its session is the next caller's.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_postgres_failover::Pool;
    ///
    /// // A secret that an orchestrator renews in a file.
    /// let pool = Pool::builder("postgres://app@my-pg.internal/app")?
    ///     .password_provider(|| async { Ok(tokio::fs::read_to_string("/run/secrets/pg").await?.trim_end().to_owned()) })
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

    /// The TLS connector. Default: none, or with the feature `rustls` what the connection string asks for. Certificates are
    /// checked against the configured host name, although the connection is made to an address.
    ///
    /// What is checked of them is up to the connector: `sslmode=verify-ca` and `verify-full` count as `require`, and
    /// [`PoolBuilder::build`] fails where the connection string has `sslrootcert`, `sslcert` or `sslkey`. Without an
    /// `sslmode` the driver prefers TLS, and goes without where the server offers none.
    ///
    /// A clone of it is asked for each new session, so a [`MakeTlsConnect`] that holds its certificates behind an `Arc` and
    /// reads them anew from time to time rotates them; open connections live on with the old ones.
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

    /// TLS by rustls, required: no session is opened without. Feature `rustls`.
    ///
    /// For what cannot be said in the connection string, where `sslmode=verify-full` and `sslrootcert` do the same. Where
    /// both speak, the stricter check counts. Replaces a connector given to [`PoolBuilder::tls`].
    ///
    /// # Errors
    /// [`PoolBuilder::build`] fails where a file cannot be used, where the connection string says `sslmode=disable` or
    /// `prefer`, and where it holds files that are given here too. A server without TLS, or whose certificate does not pass,
    /// is [`Error::Refused`](crate::Error::Refused) at once.
    #[cfg(feature = "rustls")]
    pub fn rustls(mut self, tls: Tls) -> Self {
        self.security = Security::Rustls(tls);
        self
    }

    /// Asks these name servers (UDP and TCP, on the given ports) instead of the system's, without a search list.
    pub fn dns_servers(mut self, servers: impl IntoIterator<Item = SocketAddr>) -> Self {
        self.dns_servers = servers.into_iter().collect();
        self
    }

    /// Resolves names by your own [`Resolve`]. Default: a [`HickoryResolver`](crate::HickoryResolver) with the system's
    /// configuration.
    pub fn resolver(mut self, resolver: impl Resolve) -> Self {
        self.resolver = Some(Arc::new(resolver));
        self
    }

    /// Shown in `pg_stat_activity`. Default: that of the connection string, else `tokio-postgres-failover`.
    pub fn application_name(mut self, name: impl Into<String>) -> Self {
        self.config.application_name(name);
        self
    }

    /// The pool's name in its figures, with the feature `metrics`: their label `db.client.connection.pool.name`. Default: the
    /// first host of the configuration, its port and the database, as in `my-pg.internal:5432/app`.
    ///
    /// Give each pool of a process a name of its own. Pools of one name share their figures: counts add up, and
    /// `db.client.failover.generation` is that of one of them.
    pub fn pool_name(mut self, name: impl Into<String>) -> Self {
        self.pool_name = Some(name.into());
        self
    }

    /// Pause between two questions to the primary, on a connection of the pool's own. Default: 1 s.
    ///
    /// A closed or refused connection is noticed at once, without it. It is for what sends no sign: a fence, a host that
    /// vanished while no call was under way. While connections are on loan and nothing is heard on any of them for a
    /// twentieth of this, the primary is asked without waiting for the next beat.
    pub fn heartbeat_interval(mut self, interval: Duration) -> Self {
        self.settings.heartbeat = interval;
        self
    }

    /// A primary that leaves a heart-beat unanswered for so long is searched for; what is in flight goes on, so that a
    /// server that was only slow loses nothing. Default: 2 s.
    pub fn heartbeat_timeout(mut self, timeout: Duration) -> Self {
        self.settings.heartbeat_timeout = timeout;
        self
    }

    /// Pause between two looks at DNS and at the other members while the primary is well. Default: 5 s.
    ///
    /// It bounds how long an old primary that is cut off from its peers, but not from us, still gets writes.
    pub fn patrol_interval(mut self, interval: Duration) -> Self {
        self.settings.patrol = interval;
        self
    }

    /// Pause between two probes of one server while there is no primary: shortest, and longest. In between it is one
    /// per cent of the time already lost. Default: 10 ms and 250 ms. Addresses that do not answer are asked less often when
    /// there are more than eight of them.
    ///
    /// A standby to which a session is open looks by itself whether it was promoted, ten times in that pause, and tells at
    /// once: it runs a statement of 50 to 250 ms for it, with `pg_sleep`. Where the role may not call that, it is asked at the
    /// usual pace.
    pub fn poll_interval(mut self, shortest: Duration, longest: Duration) -> Self {
        self.settings.poll = (shortest, longest);
        self
    }

    /// Time for one probe, and for opening one connection: TCP, TLS, authentication and one query. Default: 3 s.
    ///
    /// Each candidate has its own, all at the same time: a silent one costs the others nothing.
    pub fn probe_timeout(mut self, timeout: Duration) -> Self {
        self.settings.probe_timeout = timeout;
        self
    }

    /// The connections of a primary that has been silent for so long are ended, even if no other primary was found.
    /// Default: 20 s.
    pub fn dead_after(mut self, silence: Duration) -> Self {
        self.settings.dead_after = silence;
        self
    }

    /// Keeps a session to each standby while there is a primary, and asks it once in each patrol. Default: yes.
    ///
    /// A session survives its server's promotion, so such a pool notices one within a round trip once it searches, and has its
    /// first connection to the new primary at that moment. It costs each standby a connection from each pool. With `false`
    /// each patrol opens a session to each standby and closes it: for each pool that is up to 24 log-ins a minute in each
    /// standby's log. docs/costs.md has the figures.
    pub fn warm_standbys(mut self, warm: bool) -> Self {
        self.settings.warm_standbys = warm;
        self
    }

    /// How many connections are opened at the same time. Default: 4. A server that was just promoted has other work.
    pub fn connection_gate(mut self, at_once: usize) -> Self {
        self.gate = at_once;
        self
    }

    /// The cluster that this pool belongs to, by what `SELECT system_identifier FROM pg_control_system()` says on its servers.
    /// Default: the one that the first search finds.
    ///
    /// A first search that meets servers of several clusters takes none of them: callers get
    /// [`Error::Refused`](crate::Error::Refused), which names both. Set this where a name or a list of hosts may lead to a
    /// copy: blue/green, a restored backup, a logical subscriber. A server that does not tell its identifier is refused then.
    /// [`Pool::accept_cluster`] changes it later.
    pub fn system_identifier(mut self, system_identifier: u64) -> Self {
        self.settings.system_identifier = Some(system_identifier);
        self
    }

    /// Follows what answers in the cluster's place, when no server of this pool's cluster has answered as its primary for so
    /// long: a cluster with another system identifier (`pg_upgrade`, blue/green, a copy), or this one restored to an older
    /// timeline. Default: never.
    ///
    /// Without it such servers are refused until [`Pool::accept_cluster`] or a restart of the service, as a copy or an old
    /// primary may be reachable while the real one is not: with it, the pool would write to that one then. Choose a time that
    /// is longer than any failover, and longer than a network partition that you want to sit out. Where several clusters
    /// answer, none is followed.
    ///
    /// # Errors
    /// [`PoolBuilder::build`] fails where this is zero, and together with [`PoolBuilder::system_identifier`].
    pub fn accept_new_cluster_after(mut self, silence: Duration) -> Self {
        self.settings.accept_new_cluster_after = Some(silence);
        self
    }

    /// Makes the jitter of this pool repeatable, for tests. Default: random.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Makes the pool. Needs no server, and a tokio runtime, on which it starts its one task.
    pub fn build(self) -> Result<Pool, BuildError> {
        let max_size = self.max_size;
        if max_size == 0 {
            return Err(BuildError::invalid("max_size", "must be at least 1: a pool of none hands out nothing"));
        }
        if self.idle.min > max_size {
            let problem = format!("{} is more than max_size, {max_size}; lower it, or raise max_size", self.idle.min);
            return Err(BuildError::invalid("min_idle", problem));
        }
        not_zero("idle_timeout", self.idle.timeout)?;
        let idle = Idle { timeout: self.idle.timeout.min(FAR), ..self.idle };
        let shared = self.calls.clone().shared(&self.settings)?;
        let manager = Self { knows_loans: true, ..self }.build_manager()?;
        let dialer = Arc::clone(&manager.dialer);
        dialer.cluster.observer().sized(max_size, idle.min);
        let inner = managed::Pool::builder(manager).max_size(max_size).queue_mode(QueueMode::Lifo).build();
        // Building fails only where time-outs are set without a runtime; none are.
        let inner = inner.map_err(|error| BuildError::invalid("deadpool", error.to_string()))?;
        dialer.dials.serve(inner.weak(), max_size);
        let keeper = Keeper {
            idle,
            pool: inner.weak(),
            dialer: Arc::downgrade(&dialer),
            views: dialer.cluster.watch(),
            end: dialer.cluster.scope().clone(),
        };
        tokio::spawn(keeper.run());
        Ok(Pool { source: Source::Own(inner), dialer, shared })
    }

    /// Makes the manager alone, for a deadpool pool built by hand. `max_size`, `checkout_timeout`, `min_idle`,
    /// `idle_timeout`, `sleep_after` and the retry settings are not used.
    pub fn build_manager(mut self) -> Result<Manager, BuildError> {
        checked(&mut self.settings)?;
        let settings = &self.settings;
        not_zero("max_lifetime", self.max_lifetime)?;
        self.sleep_after.map_or(Ok(()), |after| not_zero("sleep_after", after))?;
        if self.gate == 0 {
            return Err(BuildError::invalid("connection_gate", "must be at least 1: nothing passes a closed gate"));
        }
        let targets = targets(&self.config, &self.ssl.hosts)?;
        let make_opener = make_opener(self.security, &self.ssl, &mut self.config)?;
        let template = template(&self.config, make_opener.is_some(), settings.dead_after)?;
        if self.ask_password.is_some() && template.get_password().is_some() {
            let problem = "the connection string holds a password too; remove one of them";
            return Err(BuildError::invalid("password_provider", problem));
        }
        // More than one of its failures must fit into the silence after which connections are ended.
        let shortest = settings.probe_timeout.min(settings.heartbeat_timeout).min(settings.dead_after / 3);
        let names = names(self.pool_name, &targets, &template);
        let passwords = self.ask_password.map(|ask| Passwords::new(ask, shortest));
        let open_timeout = settings.probe_timeout;
        let resolver = resolver(self.resolver, self.dns_servers, targets.names.is_empty())?;
        let seed = seed_or_random(self.seed);
        let opener = match make_opener {
            Some(make_opener) => make_opener(template),
            None => Opener::new(template, NoTls),
        };
        let opener: Arc<dyn Open<ClientWrapper>> = Arc::new(opener.with_passwords(passwords));
        let cluster = Cluster::start(Setup {
            settings: self.settings,
            names: targets.names,
            configured: targets.addresses,
            resolver,
            opener: Arc::clone(&opener),
            gate: self.gate,
            seed,
            observer: Arc::new(Observer::new(names)),
            sleep_after: self.sleep_after.filter(|_| self.knows_loans).map(|after| after.min(FAR)),
        });
        let max_lifetime = self.max_lifetime.min(FAR);
        let dialer = Dialer::new(cluster, opener, open_timeout, seed, Handle::current());
        Ok(Manager::new(Arc::new(dialer.with_ages(max_lifetime, self.test_idle_after))))
    }

    /// What `build_manager` reads from the configuration, without a runtime: names, addresses, and the sessions' template.
    #[cfg(fuzzing)]
    pub(crate) fn read(&self, tls: bool) -> Result<(Vec<(String, u16)>, Vec<String>, Config), BuildError> {
        let targets = targets(&self.config, &self.ssl.hosts)?;
        let template = template(&self.config, tls, self.settings.dead_after)?;
        let names = targets.names.iter().map(|name| (name.host.to_string(), name.port)).collect();
        let addresses = targets.addresses.iter().map(ToString::to_string).collect();
        Ok((names, addresses, template))
    }
}

impl fmt::Debug for PoolBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The configuration is left out: in one that was misread, any part may be a piece of the password.
        f.debug_struct("PoolBuilder").field("max_size", &self.max_size).finish_non_exhaustive()
    }
}
