//! The settings of a [`RetryPolicy`], and whether they make sense together.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::error::DbError;

use super::hooks::{Retry, RetryHooks};
use super::{Backoff, Exponential, FAR, Retries};

type MakeBackoff = dyn Fn() -> Box<dyn Backoff> + Send + Sync;

/// How long one call may take, how many attempts it makes, and how long it waits in between.
///
/// A policy only says whether the caller *wants* a re-run. The pool itself decides whether the work may run again at
/// all, so no policy can make a write happen twice.
///
/// [`TransactionBuilder::retry`](crate::TransactionBuilder::retry) gives a call a policy of its own, which replaces all
/// of the pool's policy. Start from [`Pool::retry_policy`](crate::Pool::retry_policy) to change only a part of it.
///
/// There are three presets. Each can be changed further:
///
/// | preset | for | deadline | attempt | delays | in an outage |
/// |---|---|---|---|---|---|
/// | [`interactive`](Self::interactive) | somebody waits | 5 s | 5 s | 10 ms … 250 ms | waits if it is short |
/// | [`batch`](Self::batch) | nobody does | 10 min | no limit | 100 ms … 10 s | waits for its end |
/// | [`none`](Self::none) | your own loop | 30 s | no limit | – | returns the first failure |
///
/// [`new`](Self::new) sets these defaults:
///
/// | setting | default |
/// |---|---|
/// | [`initial_delay`](Self::initial_delay) | 10 ms |
/// | [`factor`](Self::factor) | 2 |
/// | [`max_delay`](Self::max_delay) | 1 s |
/// | [`jitter`](Self::jitter) | full |
/// | [`deadline`](Self::deadline) | 30 s |
/// | [`attempts`](Self::attempts) | no limit |
/// | [`attempt_timeout`](Self::attempt_timeout) | no limit |
/// | [`classify`](Self::classify), [`on_retry`](Self::on_retry) | none |
///
/// The pool refuses values that make no sense together when it is built.
///
/// ```
/// use std::time::Duration;
/// use tokio_postgres_failover::RetryPolicy;
///
/// // A web request, with three seconds instead of five.
/// let web = RetryPolicy::interactive().deadline(Duration::from_secs(3));
/// // A nightly job that waits for an hour.
/// let batch = RetryPolicy::batch().deadline(Duration::from_secs(3600));
/// // No re-runs: the call returns its first error.
/// let once = RetryPolicy::none();
/// # let _ = (web, batch, once);
/// ```
#[derive(Clone)]
pub struct RetryPolicy {
    initial_delay: Duration,
    factor: f64,
    max_delay: Duration,
    jitter: bool,
    seed: Option<u64>,
    pub(super) deadline: Duration,
    pub(super) attempts: Option<u32>,
    attempt_timeout: Option<Duration>,
    schedule: Option<Arc<MakeBackoff>>,
    hooks: RetryHooks,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for RetryPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("RetryPolicy");
        out.field("deadline", &self.deadline)
            .field("attempts", &self.attempts)
            .field("attempt_timeout", &self.attempt_timeout)
            .field("hooks", &self.hooks);
        if self.schedule.is_some() {
            return out.field("schedule", &"own").finish_non_exhaustive();
        }
        out.field("initial_delay", &self.initial_delay)
            .field("factor", &self.factor)
            .field("max_delay", &self.max_delay)
            .field("jitter", &self.jitter)
            .field("seed", &self.seed)
            .finish()
    }
}

impl RetryPolicy {
    /// The defaults of the table above.
    #[must_use]
    pub fn new() -> Self {
        Self {
            initial_delay: Duration::from_millis(10),
            factor: 2.0,
            max_delay: Duration::from_secs(1),
            jitter: true,
            seed: None,
            deadline: Duration::from_secs(30),
            attempts: None,
            attempt_timeout: None,
            schedule: None,
            hooks: RetryHooks::default(),
        }
    }

    /// For work that somebody waits for. A call takes five seconds in all, and no attempt takes longer than that. The
    /// delays are short, so that a call goes on within a quarter of a second after the end of an outage.
    ///
    /// If a failover takes longer, the caller gets an error while the user still waits for it. An attempt that begins
    /// in the last moment may still take its five seconds, and a COMMIT without an answer is investigated for five
    /// more. [`PoolBuilder::checkout_timeout`](crate::PoolBuilder::checkout_timeout) is a separate setting. It limits
    /// `get`, and the wait of a transaction while all connections are in use.
    #[must_use]
    pub fn interactive() -> Self {
        let limit = Duration::from_secs(5);
        Self::new().deadline(limit).attempt_timeout(limit).max_delay(Duration::from_millis(250))
    }

    /// For work that nobody waits for. The deadline of ten minutes is longer than the failovers of all set-ups that the
    /// README names. The delays are long, so that a server that was just promoted serves the users first.
    #[must_use]
    pub fn batch() -> Self {
        Self::new()
            .deadline(Duration::from_secs(600))
            .initial_delay(Duration::from_millis(100))
            .max_delay(Duration::from_secs(10))
    }

    /// One attempt and no re-run. The [`deadline`](Self::deadline) still limits how long that attempt waits for a
    /// connection.
    #[must_use]
    pub fn none() -> Self {
        Self::new().attempts(1)
    }

    /// Upper bound of the wait before the first re-run. Default: 10 ms.
    ///
    /// A failover takes from tens of milliseconds to a minute. A small value costs a few useless attempts, but each of
    /// them waits for the primary anyway. A large value delays a call even if it has only lost one connection. Zero
    /// stays zero for any [`factor`](Self::factor), so each re-run follows immediately.
    #[must_use]
    pub fn initial_delay(mut self, initial_delay: Duration) -> Self {
        self.initial_delay = initial_delay;
        self
    }

    /// The factor by which each delay is longer than the one before. Default: 2. Must be finite and at least 1.
    ///
    /// A larger factor reaches [`max_delay`](Self::max_delay) sooner. With 1, all delays are the same.
    #[must_use]
    pub fn factor(mut self, factor: f64) -> Self {
        self.factor = factor;
        self
    }

    /// Upper bound of every wait. Default: 1 s. Must not be below [`initial_delay`](Self::initial_delay).
    ///
    /// A waiting call notices the end of an outage at most about this much later.
    #[must_use]
    pub fn max_delay(mut self, max_delay: Duration) -> Self {
        self.max_delay = max_delay;
        self
    }

    /// Sets whether each wait is drawn at random between zero and its upper bound. Default: `true`.
    ///
    /// Without jitter, calls that failed together come back together, and load a promoted server all at once.
    #[must_use]
    pub fn jitter(mut self, jitter: bool) -> Self {
        self.jitter = jitter;
        self
    }

    /// Draws the jitter of every call from this `seed`. Default: each call has a seed of its own.
    ///
    /// It is for tests that must see the same delays again. In a service it would make all calls wait for the same
    /// time, which is what jitter prevents.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// How long one call may take in all: waits for a connection, attempts, delays. Default: 30 s. Must not be zero.
    ///
    /// If the next wait would reach the deadline, the call ends at once with its last error. If calls must survive
    /// failovers, set it above the time that a failover takes in your set-up. If calls should fail during a failover,
    /// set it below that time. More than 30 years count as 30 years.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// The most attempts of one call, including the first. Default: no limit except the deadline. Must not be 0.
    ///
    /// This limits the cost of a call that fails for reasons of its own. The deadline is the better limit for an
    /// outage, because ten attempts may be over long before a standby is promoted.
    #[must_use]
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.attempts = Some(attempts);
        self
    }

    /// Takes the delays from a schedule of your own. `make` runs once for each call. Default: [`Exponential`].
    ///
    /// It replaces `initial_delay`, `factor`, `max_delay`, `jitter` and `seed`. `deadline` and `attempts` still hold.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tokio_postgres_failover::RetryPolicy;
    ///
    /// let steady = RetryPolicy::new().schedule(|| std::iter::repeat(Duration::from_millis(200)).take(20));
    /// # let _ = steady;
    /// ```
    #[must_use]
    pub fn schedule<B>(mut self, make: impl Fn() -> B + Send + Sync + 'static) -> Self
    where
        B: Backoff + 'static,
    {
        self.schedule = Some(Arc::new(move || Box::new(make())));
        self
    }

    /// How long one attempt may take from its BEGIN to its COMMIT. Default: no limit.
    ///
    /// An attempt that takes longer ends with [`Error::TimedOut`](crate::Error::TimedOut). The pool tells the server to
    /// stop what it runs and closes the connection, which frees the locks. Nothing is committed, and the work is not
    /// run again. A statement that still runs after the closure, because its future was dropped, counts as a part of
    /// the attempt. COMMIT itself is not cut off, because that would make its outcome unknown. To limit each statement,
    /// set PostgreSQL's own `statement_timeout`, for example by `options=-c statement_timeout=5s` in the connection
    /// string.
    ///
    /// This is true as long as the closure leaves COMMIT to the pool. If the closure commits by itself before the limit
    /// is over, that work stays committed. Then the error is [`Error::EndedInside`](crate::Error::EndedInside), if the
    /// transaction had a mark and the primary answers within half a second.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tokio_postgres_failover::RetryPolicy;
    ///
    /// let policy = RetryPolicy::new().attempt_timeout(Duration::from_secs(5));
    /// # let _ = policy;
    /// ```
    #[must_use]
    pub fn attempt_timeout(mut self, timeout: Duration) -> Self {
        self.attempt_timeout = Some(timeout);
        self
    }

    /// The limit set by [`attempt_timeout`](Self::attempt_timeout), if any.
    pub(crate) fn attempt_limit(&self) -> Option<Duration> {
        self.attempt_timeout.map(|limit| limit.min(FAR))
    }

    /// Checks whether the settings make sense together. The error says what to change.
    pub(crate) fn validate(&self) -> Result<(), String> {
        if self.deadline.is_zero() {
            return Err("the retry deadline is zero, so no call could ever succeed".into());
        }
        if self.attempt_timeout.is_some_and(|timeout| timeout.is_zero()) {
            return Err("the attempt time-out is zero, so no attempt could ever succeed".into());
        }
        if self.attempts == Some(0) {
            return Err("attempts counts the first run, so it must be at least 1".into());
        }
        if self.schedule.is_some() {
            return Ok(());
        }
        if !self.factor.is_finite() || self.factor < 1.0 {
            return Err(format!("the retry factor must be finite and at least 1, and is {}", self.factor));
        }
        if self.max_delay < self.initial_delay {
            return Err(format!("max_delay ({:?}) is below initial_delay ({:?})", self.max_delay, self.initial_delay));
        }
        Ok(())
    }

    /// Starts one call at `now`. `seed` must differ from call to call. A seed that the policy has set is used instead
    /// of it.
    pub(crate) fn start(&self, now: Instant, seed: u64) -> Retries {
        let schedule = if let Some(make) = &self.schedule {
            make()
        } else {
            let delays = Exponential::new(self.initial_delay, self.factor, self.max_delay);
            if self.jitter { Box::new(delays.jitter(self.seed.unwrap_or(seed))) } else { Box::new(delays) }
        };
        Retries {
            schedule,
            began: now,
            deadline: now.checked_add(self.deadline.min(FAR)).unwrap_or(now),
            attempt: 1,
            attempts: self.attempts,
            failed_at: None,
        }
    }

    /// Sets your own decision on database errors. `Some(true)` runs the transaction again, `Some(false)` returns the
    /// error, and `None` leaves the decision to the built-in table. Default: `None` for all errors. A second call
    /// replaces the function.
    ///
    /// The function gets the server's report (with its SQLSTATE) of an attempt that is known **not** to have been
    /// committed: COMMIT was not sent yet, or the transaction was proved to be rolled back. So the function cannot make
    /// a write happen twice, whatever it returns.
    ///
    /// It is not asked in three cases: a connection was lost without a report, a COMMIT got no answer, or the closure's
    /// own error is about *another* call of a pool. Deadline, attempts and budget also limit the re-runs that it wants.
    ///
    /// It does not change what the pool concludes about the server. If a 25006 is returned to the caller, the pool
    /// still looks for the primary.
    ///
    /// It runs within the future of the call, while no lock is held and no transaction is open. It must not block. A
    /// panic in it reaches the caller and leaves nothing behind.
    ///
    /// ```
    /// use tokio_postgres::error::SqlState;
    /// use tokio_postgres_failover::RetryPolicy;
    ///
    /// let policy = RetryPolicy::new().classify(|error| match error.code() {
    ///     // Two calls create the same row: the second run finds it.
    ///     &SqlState::UNIQUE_VIOLATION if error.constraint() == Some("accounts_name_key") => Some(true),
    ///     // RAISE EXCEPTION 'try again' of our own functions.
    ///     code if code.code() == "P0001" => Some(error.message().starts_with("try again")),
    ///     // The caller wants to hear of conflicts.
    ///     &SqlState::T_R_SERIALIZATION_FAILURE => Some(false),
    ///     _ => None,
    /// });
    /// # let _ = policy;
    /// ```
    #[must_use]
    pub fn classify(mut self, classify: impl Fn(&DbError) -> Option<bool> + Send + Sync + 'static) -> Self {
        self.hooks.given().classify = Some(Arc::new(classify));
        self
    }

    /// Sets a hook that is called before the delay of each retry. It gets the number of the failed attempt, its error,
    /// and the delay. The hook can stop the call, which then fails with [`Error::Exhausted`](crate::Error::Exhausted)
    /// that contains the error of the attempt. Default: no hook. A second call replaces the hook.
    ///
    /// It is for counters, for logs, and for reasons to stop that a policy cannot know, such as a shutdown. An attempt
    /// that waits for a primary is not a retry. [`Pool::subscribe`](crate::Pool::subscribe) reports such searches.
    ///
    /// It runs within the future of the call, while no lock is held and no transaction is open. It must not block. A
    /// panic in it reaches the caller and leaves nothing behind.
    ///
    /// ```
    /// use std::ops::ControlFlow;
    /// use std::sync::Arc;
    /// use std::sync::atomic::{AtomicBool, Ordering};
    /// use tokio_postgres_failover::RetryPolicy;
    ///
    /// let shutting_down = Arc::new(AtomicBool::new(false));
    /// let stop = Arc::clone(&shutting_down);
    /// let policy = RetryPolicy::new().on_retry(move |retry| {
    ///     println!("attempt {} failed: {}; again in {:?}", retry.attempt(), retry.cause(), retry.delay());
    ///     if stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    /// });
    /// # let _ = policy;
    /// ```
    #[must_use]
    pub fn on_retry(mut self, hook: impl Fn(&Retry<'_>) -> ControlFlow<()> + Send + Sync + 'static) -> Self {
        self.hooks.given().on_retry = Some(Arc::new(hook));
        self
    }

    /// Returns the user's decision on a database error, from [`RetryPolicy::classify`].
    pub(crate) fn decision_on(&self, error: &DbError) -> Option<bool> {
        self.hooks.classify().and_then(|classify| classify(error))
    }

    /// Returns whether the user's hook lets this retry happen.
    pub(crate) fn allows(&self, retry: &Retry<'_>) -> bool {
        self.hooks.on_retry().is_none_or(|hook| hook(retry).is_continue())
    }
}
