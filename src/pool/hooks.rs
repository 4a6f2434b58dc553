//! The user's hooks on a connection: after it was opened, before it is lent, and after it was given back.
//!
//! A hook is foreign code on a session of the pool. It runs within a time limit. It has succeeded only if it returned
//! in time and without a panic, and left the session open, idle and outside of a transaction. `hooked.rs` says what
//! becomes of the connection. The tests are in `tests/it/checkout/hooks.rs`.

use std::error::Error as StdError;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::timeout;

use super::connection::Connection;
use crate::classify::explain;
use crate::resolve::BoxFuture;
use crate::server::{Activity, SessionClient, panicked};
use crate::topology::{FailureKind, ProbeFailure};

/// Undoes what a caller may have set in a session, as deadpool-postgres' `RecyclingMethod::Clean` does: `DISCARD ALL`,
/// except that prepared statements stay.
const RESET: &str = "CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; \
                     SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD TEMP; DISCARD SEQUENCES";

type Boxed = Box<dyn StdError + Send + Sync>;

/// What a user's hook returns.
pub(super) type Hooked<'a, T> = BoxFuture<'a, Result<T, Boxed>>;
type Hook<C, T> = Box<dyn for<'a> Fn(&'a C) -> Hooked<'a, T> + Send + Sync>;

/// The hooks of a pool, of which at least one is set.
pub(super) struct Hooks<C> {
    pub(super) after_connect: Option<Hook<C, ()>>,
    pub(super) before_acquire: Option<Hook<C, bool>>,
    pub(super) after_release: Option<Hook<C, bool>>,
    pub(super) reset_on_return: bool,
    /// The time limit of each run.
    pub(super) within: Duration,
}

impl<C> Default for Hooks<C> {
    fn default() -> Self {
        Self {
            after_connect: None,
            before_acquire: None,
            after_release: None,
            reset_on_return: false,
            within: Duration::from_secs(5),
        }
    }
}

impl<C: SessionClient> Hooks<C> {
    /// Returns the hooks, or `None` if none is set, so that a pool without hooks skips all of this.
    pub(super) fn set(self) -> Option<Arc<Self>> {
        let Self { after_connect, before_acquire, after_release, reset_on_return, .. } = &self;
        let any = after_connect.is_some() || before_acquire.is_some() || after_release.is_some() || *reset_on_return;
        any.then(|| Arc::new(self))
    }

    pub(super) fn acts_on_return(&self) -> bool {
        self.after_release.is_some() || self.reset_on_return
    }

    /// Runs `after_connect` on a session that nobody has had.
    pub(super) async fn run_after_connect(&self, client: &C, activity: &Activity) -> Result<(), ProbeFailure> {
        match &self.after_connect {
            Some(hook) => self.run("after_connect", || hook(client), client, activity).await,
            None => Ok(()),
        }
    }

    /// Returns whether `before_acquire` lets the connection be lent.
    pub(super) async fn may_be_lent(&self, connection: &Connection<C>) -> Result<bool, ProbeFailure> {
        match &self.before_acquire {
            Some(hook) => self.run("before_acquire", || hook(connection), connection, connection.activity()).await,
            None => Ok(true),
        }
    }

    /// Resets the connection and runs `after_release`, as far as they are set. Returns whether the connection may be
    /// kept.
    pub(super) async fn may_be_kept(&self, connection: &Connection<C>) -> Result<bool, ProbeFailure> {
        let activity = connection.activity();
        if self.reset_on_return {
            let reset = || -> Hooked<'_, ()> { Box::pin(async move { Ok(connection.batch_execute(RESET).await?) }) };
            self.run("reset_on_return", reset, connection, activity).await?;
            // The reset has undone what `after_connect` had set.
            self.run_after_connect(connection, activity).await?;
        }
        match &self.after_release {
            Some(hook) => self.run("after_release", || hook(connection), connection, activity).await,
            None => Ok(true),
        }
    }

    /// Runs one hook to its end, and checks in which state it has left the session.
    async fn run<'a, T>(
        &self,
        name: &'static str,
        hook: impl FnOnce() -> Hooked<'a, T>,
        client: &C,
        activity: &Activity,
    ) -> Result<T, ProbeFailure> {
        // The call itself may panic, before there is a future.
        let running = AssertUnwindSafe(async { hook().await }).catch_unwind();
        let returned = match timeout(self.within, running).await {
            Ok(Ok(Ok(returned))) => returned,
            Ok(Ok(Err(error))) => return Err(failed(name, error)),
            Ok(Err(panic)) => return Err(hook_failure(panicked(name, &*panic).message)),
            Err(_) => {
                let limit = self.within;
                return Err(hook_failure(format!("{name} did not end within {limit:?}; see `hook_timeout`")));
            }
        };
        if client.is_closed() {
            return Err(hook_failure(format!("the session had ended when {name} returned")));
        }
        if !self.is_idle(activity).await {
            let left = "left a statement under way or a transaction open; end both in the hook";
            return Err(hook_failure(format!("{name} {left}")));
        }
        Ok(returned)
    }

    /// Returns whether nothing is under way. This is known as soon as the session's driver has seen all requests.
    pub(super) async fn is_idle(&self, activity: &Activity) -> bool {
        timeout(self.within, activity.idle()).await.unwrap_or(false)
    }
}

pub(super) fn hook_failure(message: String) -> ProbeFailure {
    ProbeFailure::new(FailureKind::Hook, message)
}

fn failed(name: &str, error: Boxed) -> ProbeFailure {
    let said = match error.downcast_ref::<tokio_postgres::Error>() {
        Some(driver) => explain(driver),
        None => error.to_string(),
    };
    hook_failure(format!("{name} failed: {said}")).caused_by(Arc::from(error))
}

impl<C> fmt::Debug for Hooks<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooks")
            .field("after_connect", &self.after_connect.is_some())
            .field("before_acquire", &self.before_acquire.is_some())
            .field("after_release", &self.after_release.is_some())
            .field("reset_on_return", &self.reset_on_return)
            .finish_non_exhaustive()
    }
}
