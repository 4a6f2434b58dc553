//! One fetch from a wrapped pool. This task gets a connection, asks which server it leads to, and gives it to a caller
//! in the queue of `fetches.rs`.

use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{Clearance, Fetched, Queue, Wrapped};
use crate::cluster::Generation;
use crate::error::Error;
use crate::pool::counted::Counted;
use crate::pool::dialer::Dialer;
use crate::pool::facts::Facts;
use crate::pool::trail::Trail;
use crate::pool::wrapped_pool::{Getting, NoObject, WrappedObject};
use crate::server::{Notices, SessionClient};
use crate::sync::{lock, log_safely};
use crate::topology::{FailureKind, GenerationId, ProbeFailure, Refusal, Suspicion};

/// If a connection has not shown for this long which server it leads to, and nobody waits for it, it is given up.
const ASKED_FOR: Duration = Duration::from_secs(1);

/// A connection with a question under way. Dropping this closes the connection, because it must not go back before the
/// answer has come.
struct UnansweredObject<C>(Option<Box<dyn WrappedObject<C>>>);

impl<C> Drop for UnansweredObject<C> {
    fn drop(&mut self) {
        if let Some(object) = self.0.take() {
            object.discard();
        }
    }
}

/// A fetch that is counted as under way.
pub(super) struct Fetching<C: SessionClient> {
    wrapped: Arc<Wrapped<C>>,
    id: GenerationId,
    counted: bool,
    young: bool,
}

impl<C: SessionClient> Drop for Fetching<C> {
    fn drop(&mut self) {
        let wrapped = Arc::clone(&self.wrapped);
        let mut queue = wrapped.queue();
        self.leave(&mut queue);
        // Each caller needs a fetch, however this one has ended. If there are too few, drop the sender of the first
        // caller, which then asks again.
        let lacking = queue.generation == self.id && queue.fetches < queue.waiters.len();
        let left = if lacking { queue.waiters.pop_front() } else { None };
        drop(queue);
        wrapped.existing.returns().waiting.fetch_sub(usize::from(left.is_some()), Ordering::SeqCst);
    }
}

impl<C: SessionClient> Fetching<C> {
    pub(super) fn new(wrapped: Arc<Wrapped<C>>, queue: &mut Queue<C>, id: GenerationId) -> Self {
        let counted = queue.generation == id;
        queue.fetches += usize::from(counted);
        queue.young += usize::from(counted);
        Self { wrapped, id, counted, young: counted }
    }

    fn leave(&mut self, queue: &mut Queue<C>) {
        if queue.generation == self.id {
            queue.fetches -= usize::from(self.counted);
            queue.young -= usize::from(self.young);
        }
        (self.counted, self.young) = (false, false);
    }

    /// Notes that this fetch takes long, so that no caller relies on it. Starts another fetch at the same time, unless
    /// the wrapped pool has no room.
    fn grow_old(&mut self, dialer: &Weak<Dialer<C>>, generation: &Arc<Generation<C>>) {
        let wrapped = Arc::clone(&self.wrapped);
        let status = wrapped.existing.status();
        let mut queue = wrapped.queue();
        if queue.generation != self.id {
            return;
        }
        queue.young -= usize::from(self.young);
        self.young = false;
        let lacking = queue.young < queue.waiters.len() && status.size < status.max_size;
        let other = lacking.then(|| Self::new(Arc::clone(&wrapped), &mut queue, self.id));
        drop(queue);
        if let (Some(other), Some(dialer)) = (other, dialer.upgrade()) {
            spawn(&dialer, other, generation, None);
        }
    }

    /// Returns whether more fetches are under way than callers wait. If so, this fetch no longer counts.
    fn is_surplus(&mut self) -> bool {
        self.leave_if(|queue| queue.fetches > queue.waiters.len())
    }

    /// Leaves if callers wait for none of the fetches that try next. Those that hang do not count.
    fn is_unneeded(&mut self) -> bool {
        let young = self.young;
        self.leave_if(|queue| if young { queue.young } else { queue.fetches } > queue.waiters.len())
    }

    fn leave_if(&mut self, surplus: impl Fn(&Queue<C>) -> bool) -> bool {
        let wrapped = Arc::clone(&self.wrapped);
        let mut queue = wrapped.queue();
        let surplus = queue.generation != self.id || surplus(&queue);
        if surplus {
            self.leave(&mut queue);
        }
        surplus
    }

    /// Gets connections until one leads to the primary, and gives that one to a caller. Ends early if nobody waits.
    async fn run(
        mut self,
        dialer: &Weak<Dialer<C>>,
        generation: &Arc<Generation<C>>,
        mut getting: Option<Getting<C>>,
    ) -> Option<()> {
        let wrapped = Arc::clone(&self.wrapped);
        let mut until = None;
        loop {
            let started = Instant::now();
            let mut cleared = None;
            let get = if let Some(getting) = getting.take() {
                getting
            } else {
                match wrapped.clearance(dialer, generation, started, until).await? {
                    Ok(clearance) => cleared = clearance,
                    Err(refused) => {
                        wrapped.refused(generation, &refused, started);
                        if self.is_surplus() {
                            return None;
                        }
                        continue;
                    }
                }
                // The callers may have given up meanwhile.
                if cleared.is_some() && self.is_unneeded() {
                    return None;
                }
                Arc::clone(&wrapped.existing).get()
            };
            // The log-in begins only now, so it answers those who have asked during the wait for it, too.
            let began = Instant::now();
            let failure = match self.wait_for(get, &mut cleared, dialer, generation).await? {
                Ok(object) => match self.identify(dialer, generation, object, &mut cleared).await? {
                    Ok(fetched) if fetched.object.is_evicted() => {
                        fetched.object.discard();
                        continue;
                    }
                    Ok(fetched) => {
                        wrapped.hand(fetched);
                        return Some(());
                    }
                    Err(Some(failure)) => failure,
                    Err(None) => continue,
                },
                Err(NoObject::Failed(failure)) => failure,
                Err(NoObject::HeldBack) => continue,
                Err(NoObject::Closed) => {
                    let dialer = dialer.upgrade()?;
                    wrapped.closed(&dialer);
                    return None;
                }
                Err(NoObject::NoneFree) => {
                    let strong = dialer.upgrade()?;
                    wrapped.none_free(&strong, began);
                    drop(strong);
                    if self.is_surplus() {
                        return None;
                    }
                    continue;
                }
            };
            let pause = {
                let dialer = dialer.upgrade()?;
                if dialer.note_refused(began, &failure) {
                    wrapped.turned_away.notify_waiters();
                }
                let (error, pause) = dialer.failed(generation, failure.clone());
                if matches!(error, Error::Refused(_)) {
                    wrapped.refused(generation, &failure, began);
                }
                pause
            };
            until = Some(Instant::now() + pause);
            *lock(&wrapped.next_at) = until;
            drop(cleared);
            if self.is_surplus() {
                return None;
            }
        }
    }

    /// Waits for the wrapped pool. Meanwhile gives connections that come back to callers that wait. `None`: nobody
    /// waits any more.
    async fn wait_for(
        &mut self,
        mut getting: Getting<C>,
        cleared: &mut Option<Clearance<'_>>,
        dialer: &Weak<Dialer<C>>,
        generation: &Arc<Generation<C>>,
    ) -> Option<Result<Box<dyn WrappedObject<C>>, NoObject>> {
        let within = dialer.upgrade()?.open_timeout;
        let mut old_at = Instant::now() + within;
        let wrapped = Arc::clone(&self.wrapped);
        // It waits for a slot, or logs in. If another log-in is refused meanwhile, this one would most likely be too.
        let mut turned_away = pin!(wrapped.turned_away.notified());
        if cleared.is_none() && dialer.upgrade()?.is_refused() {
            return Some(getting.as_mut().now_or_never().unwrap_or(Err(NoObject::HeldBack)));
        }
        loop {
            tokio::select! {
                biased;
                () = turned_away.as_mut(), if cleared.is_none() => return Some(Err(NoObject::HeldBack)),
                got = getting.as_mut() => return Some(got),
                () = wrapped.existing.returns().changed.notified() => wrapped.serve_idle(dialer, generation).await,
                () = sleep_until(old_at) => {
                    if self.is_surplus() {
                        return None;
                    }
                    // A connect that hangs must not hold up the log-ins of others.
                    *cleared = None;
                    self.grow_old(dialer, generation);
                    old_at = Instant::now() + within;
                }
            }
        }
    }

    /// Finds out which server a connection leads to. Each connection is asked once in each generation. `Err(None)`: try
    /// the next connection. The outer `None`: nobody waits any more.
    async fn identify(
        &mut self,
        dialer: &Weak<Dialer<C>>,
        generation: &Arc<Generation<C>>,
        object: Box<dyn WrappedObject<C>>,
        cleared: &mut Option<Clearance<'_>>,
    ) -> Option<Result<Fetched<C>, Option<ProbeFailure>>> {
        let object = match self.wrapped.as_known(generation, object) {
            Ok(fetched) => return Some(Ok(fetched)),
            Err(object) => object,
        };
        if object.is_used() && object.is_closed() {
            object.discard();
            return Some(Err(None));
        }
        let (key, used) = (object.key(), object.is_used());
        let address = generation.endpoint().address;
        let (opener, within) = dialer.upgrade().map(|dialer| (Arc::clone(&dialer.opener), dialer.open_timeout))?;
        let queue = dialer.upgrade().map(|dialer| Arc::clone(&dialer.queue))?;
        // Whoever waits meanwhile is told so. A new connection is no idle one.
        let _tested = used.then(|| Counted::new(queue.tested()));
        let mut asked = UnansweredObject(Some(object));
        let answer = {
            let object = asked.0.as_deref()?;
            let mut asking = pin!(timeout(within, opener.ask(&address, object, None)));
            loop {
                tokio::select! {
                    biased;
                    answer = asking.as_mut() => break answer,
                    () = sleep(ASKED_FOR) => {
                        if self.is_surplus() {
                            return None;
                        }
                        *cleared = None;
                        self.grow_old(dialer, generation);
                    }
                }
            }
        };
        let report = answer.unwrap_or_else(|_| {
            let message = format!("no answer within {within:?}");
            Err(ProbeFailure::new(FailureKind::TimedOut, message))
        });
        let admitted = report.map_err(|failure| (true, failure)).and_then(|report| {
            let refused = |refusal: Refusal| ProbeFailure::new(FailureKind::Unreachable, refusal.to_string());
            generation.primary.admits(&report).map_err(|refusal| (false, refused(refusal)))
        });
        let dialer = dialer.upgrade()?;
        if let Err((silent, failure)) = admitted {
            // A used connection may still lead to the previous primary. Its failure does not show where a new one would
            // connect.
            if !used {
                return Some(Err(Some(failure)));
            }
            log_safely(|| tracing::debug!(generation = self.id.get(), "a used connection is closed: {failure}"));
            if silent {
                dialer.cluster.suspect(self.id, Suspicion::Connection);
            }
            return Some(Err(None));
        }
        let object = asked.0.take()?;
        if !used {
            generation.opened();
            dialer.let_in();
        }
        let trail = Arc::new(Trail::of::<C>(&object, used));
        self.wrapped.trails.add(&trail);
        let facts = Arc::new(Facts::new(generation, Arc::new(Notices::default()), trail));
        self.wrapped.remember(key, &facts);
        Some(Ok(Fetched { object, facts, generation: Arc::clone(generation) }))
    }
}

/// Runs a fetch on the pool's runtime. The fetch ends with the generation.
pub(super) fn spawn<C: SessionClient>(
    dialer: &Arc<Dialer<C>>,
    fetching: Fetching<C>,
    generation: &Arc<Generation<C>>,
    getting: Option<Getting<C>>,
) {
    let (weak, generation) = (Arc::downgrade(dialer), Arc::clone(generation));
    drop(dialer.queue.runtime().spawn(async move {
        let scope = generation.scope.clone();
        scope.run_until_cancelled(fetching.run(&weak, &generation, getting)).await;
    }));
}
