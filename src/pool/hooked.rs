//! Runs the user's hooks on connections that are lent or given back.
//!
//! A hook runs in a task of the pool, while no caller has the connection. Invariants: a connection is handed on only if
//! its hook succeeded. Any other connection is closed. No connection is closed because its caller gives up meanwhile.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use deadpool::managed::Object;
use tokio::sync::oneshot;
use tokio::time::sleep;
use tracing::Instrument;

use super::dialer::{Dialer, InAHook};
use super::hooks::hook_failure;
use super::manager::Manager;
use crate::server::SessionClient;
use crate::sync::log_safely;
use crate::topology::ProbeFailure;

/// Shortest and longest pause after a new connection that `before_acquire` has refused.
const REFUSED_PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

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
        object.activity().check_out();
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
