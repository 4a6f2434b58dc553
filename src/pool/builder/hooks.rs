//! The hooks of a pool, and what it tells of loans: what may be set, and what can be had of it.

use std::error::Error as StdError;
use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::ClientWrapper;

use super::super::hooks::Hooks;
use super::super::options::not_zero;
use super::PoolBuilder;
use crate::error::BuildError;
use crate::resolve::BoxFuture;

impl PoolBuilder {
    /// Runs this on each new connection of the pool before anybody gets it: for session settings, and for types and
    /// statements to be known from the start. Default: nothing.
    ///
    /// It runs once for each connection, in a task of the pool, also for those that
    /// [`min_idle`](PoolBuilder::min_idle) opens ahead, and again after each
    /// [`reset_on_return`](PoolBuilder::reset_on_return). The sessions by which the pool asks its servers, listens and
    /// settles commits are not among them; the connection string's `options` reach those too. While a hook is set,
    /// commits are always settled on sessions of their own, which no hook has seen.
    ///
    /// # Errors
    /// If it fails, panics, does not end within [`hook_timeout`](PoolBuilder::hook_timeout), ends its session, or
    /// leaves a statement under way or a transaction open, the connection is closed. Another one is tried after a pause
    /// that grows to a second. Callers wait meanwhile, and at their deadline
    /// [`Error::Unavailable`](crate::Error::Unavailable) contains what the hook said. It must not block its thread. If
    /// it asks the pool itself for a connection, it may wait for what only its own end would free, until its time limit.
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

    /// Asks this before each checkout whether the connection may be lent: `Ok(false)` closes it, and the caller gets
    /// another one. Default: nothing is asked.
    ///
    /// It is asked for each caller of [`Pool::get`](crate::Pool::get) and each attempt of a transaction, of new
    /// connections too. The pool itself tests what was idle for long
    /// ([`test_idle_after`](PoolBuilder::test_idle_after)) and closes what leads to an older primary, so a hook that only
    /// sends `SELECT 1` adds a round trip and nothing else. Its time is a part of the caller's wait. If the caller gives
    /// up, the hook runs to its end, and the connection goes to the next caller.
    ///
    /// # Errors
    /// An error, a panic, and what else is listed at [`after_connect`](PoolBuilder::after_connect) count as
    /// `Ok(false)`. If new connections are refused too, there is a pause before the next one, and at its deadline the
    /// caller's error contains what the hook said.
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
    /// connection, `Ok(false)` closes it. Default: nothing.
    ///
    /// It runs in a task of the pool: who gives a connection back does not wait, while the connection stays out of the
    /// pool until the hook has ended. It sees what [`Pool::get`](crate::Pool::get) and transactions give back, and not
    /// what was [discarded](crate::Client::discard), [detached](crate::Client::detach), or left busy. When the pool is
    /// closed, hooks under way end with their sessions.
    ///
    /// # Errors
    /// An error, a panic, and what else is listed at [`after_connect`](PoolBuilder::after_connect) close the connection,
    /// and the log says why.
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

    /// Whether a connection that is given back is made as good as new: `SET` and roles, temporary tables, cursors,
    /// advisory locks and `LISTEN` are undone. Prepared statements stay. Default: no.
    ///
    /// It sends what deadpool-postgres' `RecyclingMethod::Clean` sends, but when the connection comes back, so that locks
    /// are free at once and no caller waits for it. [`after_connect`](PoolBuilder::after_connect) runs again after it, as
    /// its settings are undone, too; then [`after_release`](PoolBuilder::after_release). It costs each use of a connection
    /// a round trip in the background. If it fails, the connection is closed, as with a hook.
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

    /// Tells of each checkout that took this long: a line in the log and [`Event::SlowCheckout`](crate::Event) say how
    /// long, and where the caller asked for the connection. Default: never.
    ///
    /// The place is the line of your code with [`Pool::get`](crate::Pool::get), or with the call of the transaction. At
    /// most one is told in each second, with the number of the others, because in an outage each caller's is slow.
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
    pub fn slow_checkout_after(mut self, wait: Duration) -> Self {
        self.calls.slow_checkout_after = Some(wait);
        self
    }

    /// Tells of each connection that is on loan for this long: a line in the log and
    /// [`Event::LongLoan`](crate::Event) say where it was taken, and another line says when it came back. Default:
    /// never.
    ///
    /// Choose more than your slowest use takes: this looks for leaks, as `HikariCP`'s `leakDetectionThreshold` does. It
    /// closes nothing. It costs each checkout a task with a timer.
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
    pub fn leak_after(mut self, on_loan: Duration) -> Self {
        self.calls.leak_after = Some(on_loan);
        self
    }

    /// Checks the hooks. `own`: the pool is this crate's own, which lends connections and takes them back.
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
                    "cannot be had from a manager alone, as a deadpool pool lends its connections itself; give that pool \
                     {instead}, or use `build`"
                );
                return Err(BuildError::invalid(option, problem));
            }
        }
        Ok(hooks.set())
    }
}
