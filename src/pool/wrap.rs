//! Builds a pool around an existing pool of deadpool or bb8. Its manager opens the sessions, and this crate verifies
//! them and runs the work.
//!
//! The manager chooses the server for each new session, so there is only one candidate, [`Address::Wrapped`]. The tests
//! are in `tests/it/checkout/wrap.rs`.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::ClientWrapper;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::dialer::Dialer;
use super::fetches::Wrapped;
use super::options::{Options, checked, seed_or_random, setters};
use super::shared::Shared;
use super::wrapped_pool::{Existing, WrappedPool};
use super::{Pool, Source};
use crate::cluster::{Cluster, Setup};
use crate::commit::Guarantee;
use crate::error::BuildError;
use crate::observe::{Observer, PoolNames};
use crate::resolve::FixedResolver;
use crate::retry::{RetryBudget, RetryPolicy};
use crate::server::{Open, SessionClient};
use crate::topology::{Address, Endpoint, Settings, View};

/// Configures a [wrapped pool](Pool::wrap). Setters take the builder by value and never fail; [`WrapBuilder::build`]
/// reports all errors.
///
/// The wrapped pool itself determines the size, the queue and the recycling. So there are no `after_connect`,
/// `before_acquire`, `after_release` and `reset_on_return` here: give that pool hooks of its own, which run as ever. In
/// deadpool these are `post_create`, `pre_recycle`, `post_recycle` and `RecyclingMethod::Clean`, in bb8
/// `connection_customizer`.
#[must_use = "a builder does nothing until `build` is called"]
pub struct WrapBuilder<C: SessionClient = ClientWrapper> {
    existing: Arc<dyn Existing<C>>,
    options: Options,
}

impl<C: SessionClient> WrapBuilder<C> {
    pub(super) fn new(existing: Arc<dyn Existing<C>>) -> Self {
        let settings = Settings { roaming: true, ..Settings::default() };
        Self { existing, options: Options { settings, ..Options::default() } }
    }

    setters! {
        /// As [`PoolBuilder::checkout_timeout`](crate::PoolBuilder::checkout_timeout): the longest wait for a primary
        /// and a connection. Default: 30 s. If the wrapped pool has a shorter wait time-out, that one ends the wait for
        /// a free connection.
        checkout_timeout;

        /// As [`PoolBuilder::retry`](crate::PoolBuilder::retry).
        retry;

        /// As [`PoolBuilder::retry_budget`](crate::PoolBuilder::retry_budget).
        retry_budget;

        /// As [`PoolBuilder::guarantee`](crate::PoolBuilder::guarantee).
        guarantee;

        /// As [`PoolBuilder::heartbeat_interval`](crate::PoolBuilder::heartbeat_interval). Default: 1 s.
        heartbeat_interval;

        /// As [`PoolBuilder::heartbeat_timeout`](crate::PoolBuilder::heartbeat_timeout). Default: 2 s.
        heartbeat_timeout;

        /// Pause between two checks whether the manager now connects to a newer primary. Each check opens a new
        /// session. Default: 5 s.
        patrol_interval;
    }

    /// Time limit for the manager to open a session, and for its server to say what it is. Default: 3 s.
    ///
    /// A manager that tries several hosts in turn needs time for all of them: give its configuration a
    /// `connect_timeout` that is a fraction of this.
    pub fn probe_timeout(mut self, timeout: Duration) -> Self {
        self.options.settings.probe_timeout = timeout;
        self
    }

    setters! {
        /// As [`PoolBuilder::dead_after`](crate::PoolBuilder::dead_after). Default: 20 s.
        dead_after;

        /// As [`PoolBuilder::system_identifier`](crate::PoolBuilder::system_identifier). Default: the cluster of the
        /// first server that answers.
        system_identifier;

        /// As [`PoolBuilder::accept_new_cluster_after`](crate::PoolBuilder::accept_new_cluster_after). Default: never.
        accept_new_cluster_after;

        /// As [`PoolBuilder::slow_checkout_after`](crate::PoolBuilder::slow_checkout_after). Default: never.
        slow_checkout_after;

        /// As [`PoolBuilder::leak_after`](crate::PoolBuilder::leak_after). Default: never.
        leak_after;

        /// As [`PoolBuilder::pool_name`](crate::PoolBuilder::pool_name). Default: `wrapped`.
        pool_name;

        /// As [`PoolBuilder::seed`](crate::PoolBuilder::seed).
        seed;
    }

    /// Wraps the pool. Starts its tasks on the current tokio runtime, which must exist. Needs no server.
    pub fn build(self) -> Result<Pool<C>, BuildError> {
        let Self { existing, options: Options { calls, mut settings, pool_name, seed } } = self;
        checked(&mut settings)?;
        let calls = calls.state(&settings)?;
        let runtime = Handle::current();
        existing.start(runtime.clone());
        let seed = seed_or_random(seed);
        let open_timeout = settings.probe_timeout;
        let names = PoolNames { pool: pool_name.unwrap_or_else(|| "wrapped".to_owned()), database: String::new() };
        let observer = Arc::new(Observer::new(names));
        observer.sized(existing.status().max_size, 0);
        let cluster = Cluster::start(Setup {
            settings,
            names: Vec::new(),
            configured: vec![Endpoint { host: None, address: Address::Wrapped }],
            resolver: Arc::new(FixedResolver::default()),
            opener: Arc::clone(&existing) as Arc<dyn Open<C>>,
            gate: 1,
            seed,
            observer,
            // The pool never sleeps, because the open connections belong to the wrapped pool.
            sleep_after: None,
        });
        tokio::spawn(evict(Arc::clone(&existing) as Arc<dyn WrappedPool<C>>, cluster.watch()));
        let source = Source::Wrapped(Arc::new(Wrapped::new(Arc::clone(&existing) as _)));
        let dialer = Arc::new(Dialer::new(cluster, existing, open_timeout, seed, runtime));
        Ok(Pool { shared: Arc::new(Shared { source, dialer, calls }) })
    }
}

/// Closes the idle connections of the wrapped pool whenever a generation has ended, even if no caller asks for one.
/// Ends with the cluster's task.
async fn evict<C>(existing: Arc<dyn WrappedPool<C>>, mut views: watch::Receiver<View>) {
    while views.changed().await.is_ok() {
        let id = views.borrow_and_update().generation;
        // The program's log and its manager may panic here. That costs only this one eviction.
        let _ = catch_unwind(AssertUnwindSafe(|| existing.evict_for(id)));
    }
}

impl<C: SessionClient> fmt::Debug for WrapBuilder<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WrapBuilder").field("status", &self.existing.status()).finish_non_exhaustive()
    }
}
