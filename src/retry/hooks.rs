//! What a user can add to a policy: decisions on errors, and a hook that is called before each retry.
//!
//! This module decides nothing. The table in `transaction/decide.rs` says when the user's decision counts.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::error::DbError;

use super::{Retries, RetryPolicy};
use crate::error::{CommitOutcome, Error};

type Classify = dyn Fn(&DbError) -> Option<bool> + Send + Sync;
type OnRetry = dyn Fn(&Retry<'_>) -> ControlFlow<()> + Send + Sync;

/// The user's hooks. Boxed to the size of one pointer, because the future of each call contains its policy.
#[derive(Clone, Default)]
pub(super) struct Hooks(Option<Arc<Given>>);

#[derive(Clone, Default)]
struct Given {
    classify: Option<Arc<Classify>>,
    on_retry: Option<Arc<OnRetry>>,
}

impl Hooks {
    fn classify(&self) -> Option<&Classify> {
        self.0.as_ref()?.classify.as_deref()
    }

    fn on_retry(&self) -> Option<&OnRetry> {
        self.0.as_ref()?.on_retry.as_deref()
    }

    fn given(&mut self) -> &mut Given {
        Arc::make_mut(self.0.get_or_insert_default())
    }
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooks")
            .field("classify", &self.classify().is_some())
            .field("on_retry", &self.on_retry().is_some())
            .finish()
    }
}

/// An attempt that failed and is about to be run again, as [`RetryPolicy::on_retry`] sees it.
#[derive(Clone, Copy, Debug)]
pub struct Retry<'a> {
    attempt: u32,
    cause: &'a Error,
    delay: Duration,
    elapsed: Duration,
    outcome: CommitOutcome,
}

impl<'a> Retry<'a> {
    /// Describes the retry of the call `at`, which the policy and the budget have already granted.
    pub(crate) fn new(at: &Retries, cause: &'a Error, delay: Duration, outcome: CommitOutcome) -> Self {
        Self { attempt: at.attempt().saturating_sub(1), cause, delay, elapsed: at.began.elapsed(), outcome }
    }

    /// Which attempt failed. The first is 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// What it failed with. Ask [`Error::code`] for the SQLSTATE.
    #[must_use]
    pub fn cause(&self) -> &'a Error {
        self.cause
    }

    /// How long the call waits before the next attempt. The attempt then still needs a connection. The time that
    /// settling a commit took is subtracted already.
    #[must_use]
    pub fn delay(&self) -> Duration {
        self.delay
    }

    /// How long the call has taken so far.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.elapsed
    }

    /// Returns whether an attempt so far may have been committed. It is [`CommitOutcome::Unknown`] only with
    /// [`Guarantee::AtLeastOnce`](crate::Guarantee::AtLeastOnce), because no other work runs again in that case.
    #[must_use]
    pub fn commit_outcome(&self) -> CommitOutcome {
        self.outcome
    }
}

impl RetryPolicy {
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
    /// and the delay. The hook can stop the call, which then fails with [`Error::Exhausted`] that contains the error of
    /// the attempt. Default: no hook. A second call replaces the hook.
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
