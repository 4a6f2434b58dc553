//! Runs the user's hooks on a connection: after it was opened, before it is lent, and after it was given back.
//!
//! A hook is foreign code on a session of the pool. It runs in a task of the pool, within a time limit, and while no
//! caller has the connection. Invariants: a connection is handed on only if its hook returned in time and without a
//! panic, and left the session open, idle and outside of a transaction. Any other connection is closed. No connection
//! is closed because its caller gives up meanwhile. The tests are in `tests/it/checkout/hooks.rs`.

use std::error::Error as StdError;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use deadpool::managed::Object;
use futures_util::FutureExt;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use tracing::Instrument;

use super::connection::Connection;
use super::dialer::{Dialer, InAHook};
use super::manager::Manager;
use crate::classify::explain;
use crate::resolve::BoxFuture;
use crate::server::{Activity, SessionClient, panicked};
use crate::sync::log_safely;
use crate::topology::{FailureKind, ProbeFailure};

/// Undoes what a caller may have set in a session, as deadpool-postgres' `RecyclingMethod::Clean` does: `DISCARD ALL`,
/// except that prepared statements stay.
const RESET: &str = "CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; \
                     SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD TEMP; DISCARD SEQUENCES";

/// Shortest and longest pause after a new connection that `before_acquire` has refused.
const REFUSED_PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

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

    fn acts_on_return(&self) -> bool {
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
    async fn may_be_lent(&self, connection: &Connection<C>) -> Result<bool, ProbeFailure> {
        match &self.before_acquire {
            Some(hook) => self.run("before_acquire", || hook(connection), connection, connection.activity()).await,
            None => Ok(true),
        }
    }

    /// Resets the connection and runs `after_release`, as far as they are set. Returns whether the connection may be
    /// kept.
    async fn may_be_kept(&self, connection: &Connection<C>) -> Result<bool, ProbeFailure> {
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
    async fn is_idle(&self, activity: &Activity) -> bool {
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

/// A connection that belongs to a hook's task. Unless it is kept, it is closed.
struct HookedConnection<C: SessionClient> {
    object: Option<Object<Manager<C>>>,
    dialer: Weak<Dialer<C>>,
    _hooked: InAHook,
}

impl<C: SessionClient> HookedConnection<C> {
    fn new(dialer: &Arc<Dialer<C>>, object: Object<Manager<C>>) -> Self {
        Self { object: Some(object), dialer: Arc::downgrade(dialer), _hooked: dialer.queue.in_a_hook() }
    }

    fn keep(mut self) -> Option<Object<Manager<C>>> {
        self.object.take()
    }
}

impl<C: SessionClient> Drop for HookedConnection<C> {
    fn drop(&mut self) {
        let Some(object) = self.object.take() else { return };
        if let Some(dialer) = self.dialer.upgrade()
            && object.activity().may_be_busy()
        {
            dialer.cancel_running(&object, object.facts());
        }
        drop(Object::take(object));
    }
}

/// A connection on its way to the caller that its hook ran for. If the caller has given up, the next one gets it.
struct Approved<C: SessionClient> {
    object: Option<Object<Manager<C>>>,
    dialer: Weak<Dialer<C>>,
}

impl<C: SessionClient> Drop for Approved<C> {
    fn drop(&mut self) {
        let Some(object) = self.object.take() else { return };
        match self.dialer.upgrade() {
            Some(dialer) => {
                object.activity().give_back();
                dialer.give_back(object);
            }
            None => drop(Object::take(object)),
        }
    }
}

impl<C: SessionClient> Dialer<C> {
    /// Returns whether `before_acquire` is set.
    pub(super) fn has_before_acquire(&self) -> bool {
        self.hooks.as_ref().is_some_and(|hooks| hooks.before_acquire.is_some())
    }

    /// Runs `before_acquire`, and returns the connection if it may be lent. Cancel-safe: the hook runs to its end, and
    /// the connection goes to the next caller.
    pub(super) async fn before_acquire(self: &Arc<Self>, object: Object<Manager<C>>) -> Option<Object<Manager<C>>> {
        let Some(hooks) = self.hooks.clone() else { return Some(object) };
        let new = !object.is_used();
        // What is under way from now on is not left over from an earlier use.
        object.activity().lend();
        let held = HookedConnection::new(self, object);
        let (deliver, delivered) = oneshot::channel();
        let scope = self.cluster.scope().clone();
        let asking = async move {
            let Some(object) = &held.object else { return };
            let failure = match hooks.may_be_lent(object).await {
                Ok(true) => None,
                Ok(false) => Some(hook_failure("before_acquire refused the connection".to_owned())),
                Err(failure) => Some(failure),
            };
            let dialer = held.dialer.clone();
            if let Some(failure) = failure {
                let pause = dialer.upgrade().map(|dialer| dialer.refused_by_hook(new, failure));
                // The connection keeps its slot during the pause. Otherwise its replacements would log in one right
                // after the other.
                return sleep(pause.unwrap_or_default()).await;
            }
            if let Some(dialer) = dialer.upgrade() {
                dialer.refusals.store(0, Ordering::Relaxed);
            }
            // If the caller has given up, dropping this passes the connection on.
            drop(deliver.send(Approved { object: held.keep(), dialer }));
        };
        let asking = async move { scope.run_until_cancelled(asking).await };
        drop(self.queue.runtime().spawn(asking.in_current_span()));
        delivered.await.ok()?.object.take()
    }

    /// Notes why a connection was refused. Returns how long to wait before another one is opened in its place.
    fn refused_by_hook(&self, new: bool, failure: ProbeFailure) -> Duration {
        log_safely(|| tracing::debug!("a connection is closed: {failure}"));
        let Some(generation) = self.cluster.current().filter(|_| new) else { return Duration::ZERO };
        generation.not_opened(failure);
        let refusals = self.refusals.fetch_add(1, Ordering::Relaxed);
        REFUSED_PAUSE.0.saturating_mul(2_u32.saturating_pow(refusals)).min(REFUSED_PAUSE.1)
    }

    /// Takes over a connection that was given back if it must be reset or `after_release` must run. Otherwise returns
    /// it.
    pub(super) fn after_return(self: &Arc<Self>, object: Object<Manager<C>>) -> Option<Object<Manager<C>>> {
        let Some(hooks) = self.hooks.clone().filter(|hooks| hooks.acts_on_return()) else { return Some(object) };
        let (held, scope) = (HookedConnection::new(self, object), self.cluster.scope().clone());
        drop(self.queue.runtime().spawn(async move {
            let Some(object) = &held.object else { return };
            let cleaning = async {
                if !hooks.is_idle(object.activity()).await {
                    return Err(hook_failure("it was given back with something under way".to_owned()));
                }
                hooks.may_be_kept(object).await
            };
            match scope.run_until_cancelled(cleaning).await {
                Some(Ok(true)) => {}
                Some(Err(failure)) => {
                    return log_safely(|| tracing::warn!("a connection that was given back is closed: {failure}"));
                }
                Some(Ok(false)) | None => return,
            }
            let Some(dialer) = held.dialer.upgrade() else { return };
            if let Some(object) = held.keep() {
                object.activity().give_back();
                dialer.give_back(object);
            }
        }));
        None
    }
}
