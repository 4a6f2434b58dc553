//! What a user can add to a policy: decisions on errors, and a hook that is called before each retry.
//!
//! This module decides nothing. The table in `transaction/decide.rs` says when the user's decision counts.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::error::DbError;

use super::Retries;
use crate::error::{CommitOutcome, Error};

type Classify = dyn Fn(&DbError) -> Option<bool> + Send + Sync;
type OnRetry = dyn Fn(&Retry<'_>) -> ControlFlow<()> + Send + Sync;

/// The user's hooks. Boxed to the size of one pointer, because the future of each call contains its policy.
#[derive(Clone, Default)]
pub(super) struct RetryHooks(Option<Arc<Given>>);

#[derive(Clone, Default)]
pub(super) struct Given {
    pub(super) classify: Option<Arc<Classify>>,
    pub(super) on_retry: Option<Arc<OnRetry>>,
}

impl RetryHooks {
    pub(super) fn classify(&self) -> Option<&Classify> {
        self.0.as_ref()?.classify.as_deref()
    }

    pub(super) fn on_retry(&self) -> Option<&OnRetry> {
        self.0.as_ref()?.on_retry.as_deref()
    }

    pub(super) fn given(&mut self) -> &mut Given {
        Arc::make_mut(self.0.get_or_insert_default())
    }
}

impl fmt::Debug for RetryHooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryHooks")
            .field("classify", &self.classify().is_some())
            .field("on_retry", &self.on_retry().is_some())
            .finish()
    }
}

/// An attempt that failed and is about to be run again, as [`RetryPolicy::on_retry`](crate::RetryPolicy::on_retry) sees
/// it.
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
