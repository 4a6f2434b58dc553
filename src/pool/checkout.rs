//! How a caller waits for a connection and gives it back, and which error it gets if there is none.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use deadpool::managed::{self, PoolError};
use tokio::time::{Instant, timeout, timeout_at};

use super::checkout_reports::CallSite;
use super::client::CheckedOut;
use super::counted::Counted;
use super::hooks::hook_failure;
use super::{Client, Manager, Pool, Source};
use crate::error::{CHECKOUT_TIMEOUT, Error, Obstacle, Unavailable};
use crate::server::SessionClient;
use crate::topology::FailureKind;

/// The settings of deadpool with which `get` does not wait for a free slot.
const AT_ONCE: managed::Timeouts = managed::Timeouts { wait: Some(Duration::ZERO), create: None, recycle: None };

/// A wait that is no longer than this needs nothing but a timer. Only a longer one notices that the pool is being
/// closed.
const BRIEF_WAIT: Duration = Duration::from_millis(5);

/// How long an idle connection may take to be handed out. It may be tested first.
const IDLE_WITHIN: Duration = Duration::from_secs(1);

impl<C: SessionClient> Pool<C> {
    /// Returns a connection for a transaction. It waits for a primary until the deadline of the call's policy. That may
    /// be longer than the checkout timeout, so that the call survives a failover. While other callers use all
    /// connections, it waits no longer than [`Pool::get`].
    pub(crate) async fn get_for_transaction(&self, deadline: Instant, place: CallSite) -> Result<Client<C>, Error> {
        self.get_by(|| deadline, "RetryPolicy::deadline", Some(self.shared.calls.checkout_timeout), place).await
    }

    /// `limit` names the setting that the deadline comes from. `in_use` limits the wait while there is a primary and
    /// all connections are in use. While there is no primary, only the deadline limits it.
    pub(super) async fn get_by(
        &self,
        deadline: impl FnOnce() -> Instant,
        limit: &'static str,
        in_use: Option<Duration>,
        place: CallSite,
    ) -> Result<Client<C>, Error> {
        let waits = self.observer().waits();
        let mut checkout = pin!(self.checkout(Some(place), in_use.is_some()));
        // If a connection is idle, the first poll returns it, without reading a clock or creating a timer.
        if let Poll::Ready(checked_out) = poll_fn(|context| Poll::Ready(checkout.as_mut().poll(context))).await {
            waits.ended(&checked_out);
            return checked_out;
        }
        if self.is_held_by_caller() {
            waits.timed_out();
            let obstacle = Obstacle::HeldByCaller { max_size: self.shared.source.status().max_size };
            let unavailable = Unavailable::new(Duration::ZERO, self.cluster().diagnosis(), obstacle, limit);
            return Err(Error::Unavailable(Box::new(unavailable)));
        }
        let (began, deadline) = (Instant::now(), deadline());
        let deadline = if planted!("waits beyond deadlines") { deadline + Duration::from_millis(50) } else { deadline };
        // While there is a primary, no connection is waited for beyond this.
        let full = in_use.map_or(deadline, |longest| deadline.min(began + longest));
        let waited = if let Ok(checked_out) = timeout_at(full.min(began + BRIEF_WAIT), checkout.as_mut()).await {
            Ok(checked_out)
        } else {
            tokio::select! {
                biased;
                waited = self.wait_for(checkout, (began, full, deadline), in_use, limit) => waited,
                () = self.turns_away(in_use.is_some()) => return Err(Error::without_primary(self.cluster().ended())),
            }
        };
        self.waited(began, place);
        let checked_out = match waited {
            Ok(checked_out) => checked_out,
            Err(limit) => {
                waits.timed_out();
                return Err(self.unavailable(began, limit));
            }
        };
        waits.ended(&checked_out);
        checked_out
    }

    /// Waits for the checkout, from `began` until `deadline`. While there is a primary, it waits no longer than
    /// `in_use` for a connection that others use, and so until `full` at first. `Err`: the name of the setting that has
    /// ended the wait.
    async fn wait_for<T>(
        &self,
        mut checkout: Pin<&mut impl Future<Output = T>>,
        (began, full, deadline): (Instant, Instant, Instant),
        in_use: Option<Duration>,
        limit: &'static str,
    ) -> Result<T, &'static str> {
        // Nearly every wait ends before the first limit, so one timer will do until then.
        let mut until = full;
        loop {
            if let Ok(checked_out) = timeout_at(until, checkout.as_mut()).await {
                return Ok(checked_out);
            }
            let Some(longest) = in_use.filter(|_| until < deadline) else { return Err(limit) };
            let Some(since) = self.cluster().primary_since() else {
                tokio::select! {
                    biased;
                    checked_out = checkout.as_mut() => return Ok(checked_out),
                    // If there will be none, the checkout reports why.
                    found = timeout_at(deadline, self.cluster().primary()) => {
                        until = if matches!(found, Ok(Ok(_))) { Instant::now() } else { deadline };
                    }
                }
                continue;
            };
            let managed::Status { size, max_size, .. } = self.shared.source.status();
            let full_until = since.max(began) + longest;
            until = match Instant::now() {
                now if now < full_until => deadline.min(full_until),
                _ if size >= max_size => return Err(CHECKOUT_TIMEOUT),
                now => deadline.min(now + longest),
            };
        }
    }

    /// `begun`: the call that needs the connection had begun before the pool was closed, so it is served even then.
    async fn checkout(&self, place: Option<CallSite>, begun: bool) -> Result<Client<C>, Error> {
        loop {
            // Wait here, not in `recycle`: if a caller gives up inside `recycle`, deadpool closes a good connection.
            if !self.cluster().has_primary() && !planted!("hands out while suspended") {
                self.not_ended()?;
                let _counted = Counted::new(&self.shared.calls.searching);
                if let Err(none) = Box::pin(self.cluster().primary()).await {
                    // A caller may call again immediately, in a loop. Let the cluster's task run in between, so that it
                    // can find a primary.
                    tokio::task::yield_now().await;
                    return Err(Error::without_primary(none));
                }
            }
            let checked_out = match &self.shared.source {
                Source::Own(inner) => self.checkout_own(inner).await?,
                Source::Wrapped(wrapped) => Some(Box::pin(wrapped.checkout(&self.shared.dialer)).await?),
            };
            let Some(checked_out) = checked_out else { continue };
            let client = self.check_out(checked_out, place);
            // Either a closing pool sees the checkout and waits for it, or this sees that the pool is closing.
            if !begun {
                self.is_open()?;
            }
            // Either the cluster's task sees the checkout and stays awake, or this sees that the task is falling
            // asleep. In that case the connection will be closed, so do not hand it out.
            if !self.cluster().is_asleep() {
                return Ok(client);
            }
            drop(client);
            tokio::task::yield_now().await;
        }
    }

    /// Returns an idle or a new connection of this crate's own pool. `None`: the caller must try again.
    async fn checkout_own(&self, inner: &managed::Pool<Manager<C>>) -> Result<Option<CheckedOut<C>>, Error> {
        let object = match inner.get().await {
            Ok(object) => object,
            // There is no primary, and the next round knows whether to wait for one.
            Err(PoolError::Backend(Error::Unavailable(_))) => return Ok(None),
            Err(PoolError::Backend(error)) => return Err(error),
            // The inner pool has no time-outs and no hooks of its own, so this error means that it was closed.
            Err(_) => return Err(Error::without_primary(self.cluster().ended())),
        };
        let (object, tested) = if !object.is_known_idle() || self.shared.dialer.must_be_tested(&object) {
            let Some(object) = Box::pin(self.shared.dialer.tested(object)).await else { return Ok(None) };
            (object, true)
        } else {
            (object, false)
        };
        // The pool's `recycle` has just checked everything else.
        let current = self.cluster().is_current(object.facts().generation) || planted!("hands out while suspended");
        if !current || (tested && !object.may_be_handed_out(self.cluster())) {
            // The connection can be used again if the primary is resumed, so give it back. The next round waits for a
            // primary.
            self.shared.dialer.give_back(object);
            tokio::task::yield_now().await;
            return Ok(None);
        }
        let object = if self.shared.dialer.has_before_acquire() {
            match Box::pin(self.shared.dialer.before_acquire(object)).await {
                Some(object) if object.may_be_handed_out(self.cluster()) => object,
                Some(object) => {
                    object.activity().give_back();
                    self.shared.dialer.give_back(object);
                    tokio::task::yield_now().await;
                    return Ok(None);
                }
                None => return Ok(None),
            }
        } else {
            object
        };
        object.use_it();
        self.shared.dialer.queue.taken();
        Ok(Some(CheckedOut::Own(object)))
    }

    /// Takes back a good connection.
    pub(super) fn give_back(&self, checked_out: CheckedOut<C>) {
        match checked_out {
            CheckedOut::Own(object) => {
                object.given_back();
                if let Some(object) = self.shared.dialer.after_return(object) {
                    object.activity().give_back();
                    self.shared.dialer.give_back(object);
                }
            }
            wrapped @ CheckedOut::Wrapped { .. } => wrapped.activity().give_back(),
        }
    }

    pub(super) fn check_out(&self, checked_out: CheckedOut<C>, place: Option<CallSite>) -> Client<C> {
        checked_out.activity().check_out();
        let client = Client::new(checked_out, self.clone(), place.and_then(|place| self.watch_checkout(place)));
        // Nothing may panic from here on, because only the client's end takes this back.
        self.cluster().check_out();
        client
    }

    /// Returns a connection that no caller has used before, if a slot is free. Waits for a primary without a limit of
    /// its own. Cancel-safe.
    pub(super) async fn get_new(&self) -> Result<Option<Client<C>>, Error> {
        let Source::Own(inner) = &self.shared.source else { return Ok(None) };
        // A hook may have changed what SQL means in a new session.
        if self.shared.dialer.hooks.is_some() {
            return Ok(None);
        }
        // Wait before a slot is taken, so that others can use the slot meanwhile.
        self.cluster().primary().await.map_err(Error::without_primary)?;
        // A pool that was made smaller may have more slots than connections. Who waits in such a slot waits for a
        // connection to be given back, perhaps by a caller that waits for this settler. So take only what is idle then,
        // and wait for a dial no longer than one may take.
        let within =
            if self.shared.dialer.queue.is_spoken_for() { Duration::ZERO } else { self.shared.dialer.open_timeout };
        let Ok(got) = timeout(within, inner.timeout_get(&AT_ONCE)).await else { return Ok(None) };
        match got {
            Ok(object) if self.cluster().is_current(object.facts().generation) && object.use_it() => {
                Ok(Some(self.check_out(CheckedOut::Own(object), None)))
            }
            // A caller may wait for it.
            Ok(object) => {
                self.shared.dialer.give_back(object);
                Ok(None)
            }
            Err(PoolError::Timeout(_)) => Ok(None),
            Err(PoolError::Backend(error)) => Err(error),
            Err(_) => Err(Error::without_primary(self.cluster().ended())),
        }
    }

    /// Returns an idle connection if there is one. Callers may have used it. Cancel-safe.
    pub(super) async fn get_idle(&self) -> Option<Client<C>> {
        if self.shared.source.status().available == 0 {
            return None;
        }
        timeout(IDLE_WITHIN, self.checkout(None, true)).await.ok()?.ok()
    }

    /// `limit` names the setting that has ended the wait.
    fn unavailable(&self, began: Instant, limit: &'static str) -> Error {
        // The pool's runtime may have ended while the caller waited, without waking anybody.
        if self.cluster().is_closed() {
            return Error::without_primary(self.cluster().ended());
        }
        let managed::Status { size, max_size, waiting, .. } = self.shared.source.status();
        let (own, in_use) = (matches!(self.shared.source, Source::Own(_)), self.cluster().in_use());
        // A wrapped pool has other users, who are not counted.
        let free = own && in_use + waiting < max_size;
        let (tests, hooks) =
            (self.shared.dialer.queue.tested().load(Ordering::Relaxed) > 0, self.shared.dialer.queue.hooked() > 0);
        let obstacle = match self.cluster().current() {
            None => Obstacle::NoPrimary,
            Some(_) if in_use < max_size && tests => Obstacle::BeingTested,
            // Its last words, if it refuses connections.
            Some(generation) if in_use < max_size && hooks => {
                let said = generation.trouble().filter(|trouble| trouble.kind == FailureKind::Hook);
                Obstacle::NoSession(
                    said.or_else(|| Some(hook_failure("a hook has not ended yet; see `hook_timeout`".to_owned()))),
                )
            }
            Some(_) if size >= max_size && !free => Obstacle::NoneFree { max_size },
            Some(generation) => Obstacle::NoSession(generation.trouble()),
        };
        Error::Unavailable(Box::new(Unavailable::new(began.elapsed(), self.cluster().diagnosis(), obstacle, limit)))
    }
}

impl<C: SessionClient> Pool<C> {
    /// Fails immediately if the pool has ended. Uses no timer, because the runtime may have ended, too.
    pub(crate) fn not_ended(&self) -> Result<(), Error> {
        if self.cluster().is_closed() { Err(Error::without_primary(self.cluster().ended())) } else { Ok(()) }
    }

    /// Returns the error of a wait for a primary, or for a session outside the pool. Unlike [`Self::unavailable`], it
    /// does not depend on how many connections are in use.
    pub(crate) fn unavailable_beside(&self, began: Instant) -> Error {
        let current = self.cluster().current();
        let obstacle = current.map_or(Obstacle::NoPrimary, |generation| Obstacle::NoSession(generation.trouble()));
        let diagnosis = self.cluster().diagnosis();
        Error::Unavailable(Box::new(Unavailable::new(began.elapsed(), diagnosis, obstacle, CHECKOUT_TIMEOUT)))
    }
}
