//! The setters for a pool's hooks and for its reports on checkouts, and the check which hooks a kind of pool supports.

use std::error::Error as StdError;
use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::ClientWrapper;

use super::super::hooks::Hooks;
use super::super::options::{CallOptions, not_zero, setters};
use super::PoolBuilder;
use crate::error::BuildError;
use crate::resolve::BoxFuture;

impl PoolBuilder {
    /// Runs this on each new connection of the pool before anybody gets it. Use it for session settings, and to load
    /// types and prepare statements in advance. Default: nothing.
    ///
    /// It runs in a task of the pool, once for each connection, including those that
    /// [`min_idle`](PoolBuilder::min_idle) opens in advance, and again after each
    /// [`reset_on_return`](PoolBuilder::reset_on_return). It does not run on the sessions by which the pool asks its
    /// servers, listens and settles commits. Settings that those need as well belong into the connection string's
    /// `options`. While a hook is set, commits are settled on sessions of their own, which no hook has seen. Only if
    /// the server gives no further session, the pool asks on an idle connection. Its questions name everything by its
    /// schema, so a hook's `search_path` does not matter to them.
    ///
    /// # Errors
    /// If it fails, panics, does not end within [`hook_timeout`](PoolBuilder::hook_timeout), ends its session, or
    /// leaves a statement under way or a transaction open, the connection is closed. The pool tries another one after a
    /// pause that grows up to a second. Callers wait meanwhile, and at their deadline
    /// [`Error::Unavailable`](crate::Error::Unavailable) contains the hook's error. It must not block its thread. It
    /// should not ask the same pool for a connection: the only free one may be the one that it holds, and then it waits
    /// until its time limit.
    ///
    /// ```no_run
    /// # fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_postgres_failover::Pool;
    ///
    /// let pool = Pool::builder("postgres://app@my-pg.internal/app")?
    ///     .after_connect(|client| {
    ///         Box::pin(async move {
    ///             client.batch_execute("SET search_path = shop, public; SET statement_timeout = '5s'").await?;
    ///             // Its types are read now, and not by the first caller.
    ///             client.prepare_cached("SELECT state FROM orders WHERE id = $1").await?;
    ///             Ok(())
    ///         })
    ///     })
    ///     .build()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn after_connect<F>(mut self, hook: F) -> Self
    where
        F: for<'a> Fn(&'a ClientWrapper) -> BoxFuture<'a, Result<(), Box<dyn StdError + Send + Sync>>>
            + Send
            + Sync
            + 'static,
    {
        self.hooks.after_connect = Some(Box::new(hook));
        self
    }

    /// Asks this hook before each checkout whether the connection may be lent. After `Ok(false)`, the pool closes the
    /// connection, and the caller gets another one. Default: no hook.
    ///
    /// It is asked for each call of [`Pool::get`](crate::Pool::get) and each attempt of a transaction, even if the
    /// connection is new. The pool itself tests connections that were idle for long
    /// ([`test_idle_after`](PoolBuilder::test_idle_after)) and closes those that lead to an older primary, so a hook
    /// that only sends `SELECT 1` adds a round trip and nothing else. The time that it takes is part of the caller's
    /// wait. If the caller gives up, the hook runs to its end, and the connection goes to the next caller.
    ///
    /// # Errors
    /// An error, a panic and the other failures that [`after_connect`](PoolBuilder::after_connect) lists count as
    /// `Ok(false)`. If the hook refuses new connections too, the pool pauses before it opens the next one. At its
    /// deadline, the caller gets an error that contains the hook's.
    ///
    /// ```no_run
    /// # fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_postgres_failover::Pool;
    ///
    /// let pool = Pool::builder("postgres://app@my-pg.internal/app")?
    ///     .before_acquire(|client| {
    ///         Box::pin(async move {
    ///             let row = client.query_one("SELECT current_setting('app.version', true)", &[]).await?;
    ///             Ok(row.get::<_, Option<&str>>(0) == Some("2"))
    ///         })
    ///     })
    ///     .build()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn before_acquire<F>(mut self, hook: F) -> Self
    where
        F: for<'a> Fn(&'a ClientWrapper) -> BoxFuture<'a, Result<bool, Box<dyn StdError + Send + Sync>>>
            + Send
            + Sync
            + 'static,
    {
        self.hooks.before_acquire = Some(Box::new(hook));
        self
    }

    /// Runs this on each connection that is given back, before the next caller may have it. `Ok(true)` keeps the
    /// connection, and `Ok(false)` closes it. Default: nothing.
    ///
    /// It runs in a task of the pool, so the caller that gives a connection back does not wait. The connection stays
    /// out of the pool until the hook has ended. The hook runs on connections that came from
    /// [`Pool::get`](crate::Pool::get) or a transaction. It does not run on one that was
    /// [discarded](crate::Client::discard) or [detached](crate::Client::detach), or that was given back with something
    /// under way. When the pool is closed, running hooks end together with their sessions.
    ///
    /// # Errors
    /// After an error, a panic or another failure that [`after_connect`](PoolBuilder::after_connect) lists, the
    /// connection is closed, and the log says why.
    ///
    /// ```no_run
    /// # fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_postgres_failover::Pool;
    ///
    /// let pool = Pool::builder("postgres://app@my-pg.internal/app")?
    ///     .after_release(|client| {
    ///         Box::pin(async move {
    ///             // A session that has collected many prepared statements is replaced by a new one.
    ///             let few = client.query_one("SELECT count(*) < 1000 FROM pg_prepared_statements", &[]).await?;
    ///             Ok(few.get(0))
    ///         })
    ///     })
    ///     .build()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn after_release<F>(mut self, hook: F) -> Self
    where
        F: for<'a> Fn(&'a ClientWrapper) -> BoxFuture<'a, Result<bool, Box<dyn StdError + Send + Sync>>>
            + Send
            + Sync
            + 'static,
    {
        self.hooks.after_release = Some(Box::new(hook));
        self
    }

    /// Whether to reset a connection that is given back. A reset undoes `SET` and roles, temporary tables, cursors,
    /// advisory locks and `LISTEN`. Prepared statements stay. Default: no.
    ///
    /// It sends what deadpool-postgres' `RecyclingMethod::Clean` sends. But it sends that when the connection comes
    /// back, so that locks are free at once and no caller waits for the reset. Then
    /// [`after_connect`](PoolBuilder::after_connect) runs again, because the reset has undone its settings, too, and
    /// after that [`after_release`](PoolBuilder::after_release). Each use of a connection costs one round trip more, in
    /// the background. If the reset fails, the connection is closed, as with a hook.
    ///
    /// ```no_run
    /// # fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_postgres_failover::Pool;
    ///
    /// let pool = Pool::builder("postgres://app@my-pg.internal/app")?.reset_on_return(true).build()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn reset_on_return(mut self, reset: bool) -> Self {
        self.hooks.reset_on_return = reset;
        self
    }

    /// Time limit of each run of a hook. Default: 5 s. At the limit the hook's future is dropped, its statement is
    /// cancelled and its connection is closed.
    ///
    /// ```no_run
    /// # fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use std::time::Duration;
    /// use tokio_postgres_failover::Pool;
    ///
    /// let pool = Pool::builder("postgres://app@my-pg.internal/app")?
    ///     .after_connect(|client| Box::pin(async move { Ok(client.batch_execute("CALL warm_up()").await?) }))
    ///     .hook_timeout(Duration::from_secs(20))
    ///     .build()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn hook_timeout(mut self, timeout: Duration) -> Self {
        self.hooks.within = timeout;
        self
    }

    setters! {
        /// Reports each checkout that took at least this long, even if it failed then. A line in the log and
        /// [`Event::SlowCheckout`](crate::Event) say how long it took, and where the caller asked for the connection.
        /// Default: never.
        ///
        /// The place is the line of your code that calls [`Pool::get`](crate::Pool::get), or that starts the
        /// transaction. In an outage every checkout is slow, so at most one is reported per second. The line in the log
        /// has the number of the others.
        ///
        /// ```no_run
        /// # fn example() -> Result<(), Box<dyn std::error::Error>> {
        /// use std::time::Duration;
        /// use tokio_postgres_failover::Pool;
        ///
        /// let pool = Pool::builder("postgres://app@my-pg.internal/app")?
        ///     .slow_checkout_after(Duration::from_secs(2))
        ///     .build()?;
        /// # Ok(())
        /// # }
        /// ```
        slow_checkout_after;

        /// Reports each connection that is checked out for this long. A line in the log and
        /// [`Event::LongCheckout`](crate::Event) say where it was taken, and another line says when it came back.
        /// Default: never.
        ///
        /// Choose a longer time than your slowest use takes: the purpose is to find leaks, as with `HikariCP`'s
        /// `leakDetectionThreshold`. It closes nothing. Each checkout then costs a task with a timer.
        ///
        /// ```no_run
        /// # fn example() -> Result<(), Box<dyn std::error::Error>> {
        /// use std::time::Duration;
        /// use tokio_postgres_failover::Pool;
        ///
        /// let pool = Pool::builder("postgres://app@my-pg.internal/app")?.leak_after(Duration::from_secs(60)).build()?;
        /// # Ok(())
        /// # }
        /// ```
        leak_after;
    }

    /// Refuses reports that nobody would make. `own`: as for the hooks.
    pub(super) fn usable_reports(calls: &CallOptions, own: bool) -> Result<(), BuildError> {
        let unheard = [
            ("slow_checkout_after", calls.slow_checkout_after.is_some(), "measure its `get`"),
            ("leak_after", calls.leak_after.is_some(), "watch its objects"),
        ];
        for (option, is_set, instead) in unheard {
            if is_set && !own {
                let problem = format!(
                    "cannot be had from a manager alone, as a deadpool pool lends its connections itself; {instead}, \
                     or use `build`"
                );
                return Err(BuildError::invalid(option, problem));
            }
        }
        Ok(())
    }

    /// Checks the hooks. `own`: the pool is this crate's own, so it lends the connections itself and takes them back.
    pub(super) fn usable_hooks(
        hooks: Hooks<ClientWrapper>,
        own: bool,
    ) -> Result<Option<Arc<Hooks<ClientWrapper>>>, BuildError> {
        not_zero("hook_timeout", hooks.within)?;
        let unheard = [
            ("before_acquire", hooks.before_acquire.is_some(), "a pre_recycle hook"),
            ("after_release", hooks.after_release.is_some(), "a pre_recycle hook, which runs before the next use"),
            ("reset_on_return", hooks.reset_on_return, "a pre_recycle hook that resets the session"),
        ];
        for (option, is_set, instead) in unheard {
            if is_set && !own {
                let problem = format!(
                    "cannot be had from a manager alone, as a deadpool pool lends its connections itself; give that \
                     pool {instead}, or use `build`"
                );
                return Err(BuildError::invalid(option, problem));
            }
        }
        Ok(hooks.set())
    }
}
