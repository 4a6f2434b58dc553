//! One open session, and the task that drives it until its scope ends.

use std::future::poll_fn;
use std::ops::{Deref, DerefMut};
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use deadpool_postgres::ClientWrapper;
use futures_util::future::BoxFuture;
use tokio::task::AbortHandle;
use tokio_postgres::{Client, Error};

use super::{Activity, Notices, Scope};
use crate::classify::explain;
use crate::sync::{lock, log_safely};

/// Reads and writes the socket of one session until it ends.
pub(super) type Driver = BoxFuture<'static, Result<(), Error>>;

/// The client of a session: deadpool-postgres' `ClientWrapper`, or the object of another deadpool pool. Implemented for
/// every type that derefs to a [`tokio_postgres::Client`].
pub trait SessionClient: DerefMut<Target = Client> + Send + Sync + 'static {}

impl<C: DerefMut<Target = Client> + Send + Sync + 'static> SessionClient for C {}

/// One open session. Dropping it closes the socket.
pub(crate) struct Session<C = ClientWrapper> {
    pub(crate) client: Guarded<C>,
    /// Ends the driver although the client is still held. `None` for a wrapped pool's session, which this crate does
    /// not drive.
    pub(crate) abort: Option<AbortHandle>,
    /// When this scope ends, all its sessions end, except those of a wrapped pool, which this crate does not drive.
    pub(crate) scope: Scope,
    pub(crate) notices: Arc<Notices>,
}

type OnDrop<C> = Box<dyn FnOnce(&mut C) + Send + Sync>;

/// A client, and a function that runs before the client is dropped.
pub(crate) struct Guarded<C> {
    client: C,
    on_drop: Option<OnDrop<C>>,
}

impl<C> Guarded<C> {
    pub(crate) fn new(client: C) -> Self {
        Self { client, on_drop: None }
    }

    pub(crate) fn with_on_drop(client: C, on_drop: impl FnOnce(&mut C) + Send + Sync + 'static) -> Self {
        Self { client, on_drop: Some(Box::new(on_drop)) }
    }
}

impl<C> Drop for Guarded<C> {
    fn drop(&mut self) {
        if let Some(on_drop) = self.on_drop.take() {
            // This calls foreign code, perhaps in the cluster's task, so a panic must not spread.
            let _ = std::panic::catch_unwind(AssertUnwindSafe(|| on_drop(&mut self.client)));
        }
    }
}

impl<C> Deref for Guarded<C> {
    type Target = C;

    fn deref(&self) -> &C {
        &self.client
    }
}

impl<C> DerefMut for Guarded<C> {
    fn deref_mut(&mut self) -> &mut C {
        &mut self.client
    }
}

/// Notes the end of a session when the future of its driver is dropped, even if the driver was aborted. This exists
/// from the first poll of the driver on.
struct AtTheEnd(Arc<Notices>);

impl Drop for AtTheEnd {
    fn drop(&mut self) {
        self.0.over();
    }
}

/// Drives a session until its scope ends. If the connection was given back and something is still under way, this
/// closes the session and spawns `cancelling`.
pub(super) async fn drive(
    driver: Driver,
    scope: Scope,
    notices: Arc<Notices>,
    traffic: Arc<AtomicU64>,
    cancelling: impl Future<Output = ()> + Send + 'static,
) {
    let (ended, busy) = drive_until_end(driver, scope, &notices, &traffic).await;
    if let Err(error) = ended {
        log_safely(|| tracing::debug!("a session ended: {}", explain(&error)));
    }
    // Do not cancel a COMMIT: that would end its wait for a synchronous standby.
    if busy && !notices.activity.is_committing() {
        tokio::spawn(cancelling);
        log_safely(|| {
            tracing::debug!(
                "a connection was given back with something under way: it is closed, and that is cancelled"
            );
        });
    }
}

/// Drives a session until it or its scope ends, or the connection was given back with something under way. Returns how
/// the session ended, and whether something was under way.
pub(super) async fn drive_until_end(
    mut driver: Driver,
    scope: Scope,
    notices: &Arc<Notices>,
    traffic: &AtomicU64,
) -> (Result<(), Error>, bool) {
    let at_the_end = AtTheEnd(Arc::clone(notices));
    notices.end().driven();
    let activity = &notices.activity;
    let scope_waker = Arc::new(ScopeWaker { rung: AtomicBool::new(true), driver: Mutex::new(Waker::noop().clone()) });
    let waker = Waker::from(Arc::clone(&scope_waker));
    let mut counted = Counted::waker(activity, Waker::noop());
    let mut task = Waker::noop().clone();
    let (mut left, mut abandoned) = (pin!(scope.cancelled()), pin!(scope.abandoned().cancelled()));
    let (mut leaving, mut finishing, mut busy) = (false, false, false);
    // Data to send, received data and the scope's waker are all that wakes the driver.
    let ended = poll_fn(|context| {
        // A task nearly always has the same waker.
        if !task.will_wake(context.waker()) {
            task.clone_from(context.waker());
            counted = Counted::waker(activity, &task);
            lock(&scope_waker.driver).clone_from(&task);
        }
        if scope_waker.rung.load(Ordering::Acquire) && scope_waker.rung.swap(false, Ordering::AcqRel) {
            let mut context = Context::from_waker(&waker);
            if abandoned.as_mut().poll(&mut context).is_ready() {
                return Poll::Ready(Ok(()));
            }
            leaving = leaving || left.as_mut().poll(&mut context).is_ready();
        }
        notices.count_traffic();
        let woken = activity.before_poll();
        let worked = activity.is_working();
        let polled = driver.as_mut().poll(&mut Context::from_waker(&counted));
        // Only work keeps the pool awake, not what the server sends by itself, such as the end of an idle session.
        if worked || activity.is_working() {
            notices.count_work(traffic);
        }
        busy = activity.polled(woken) && polled.is_pending();
        // A COMMIT that was sent is worth its answer, which nobody else may be able to give.
        finishing = activity.is_committing() || (finishing && activity.is_finishing());
        if busy || (leaving && !finishing && polled.is_pending()) { Poll::Ready(Ok(())) } else { polled }
    })
    .await;
    if let Err(error) = &ended {
        at_the_end.0.end().ended_with(error);
        at_the_end.0.ended(true);
    }
    (ended, busy)
}

/// Counts the driver's wake-ups. Each one stands for a new request or for received data.
struct Counted {
    activity: Arc<Activity>,
    task: Waker,
}

impl Counted {
    fn waker(activity: &Arc<Activity>, task: &Waker) -> Waker {
        Waker::from(Arc::new(Self { activity: Arc::clone(activity), task: task.clone() }))
    }
}

impl Wake for Counted {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.activity.wake();
        self.task.wake_by_ref();
    }
}

/// Tells a driver that the scope of its session has ended. Checking the scope takes a lock that all sessions of a
/// generation share. So a driver checks it only when this waker was woken, not each time that something is sent or
/// received.
struct ScopeWaker {
    rung: AtomicBool,
    /// It stays here when it is used, because a scope may ring twice before the driver has looked.
    driver: Mutex<Waker>,
}

impl Wake for ScopeWaker {
    fn wake(self: Arc<Self>) {
        self.rung.store(true, Ordering::Release);
        // Waking may run the task at once, so release the lock first.
        let driver = lock(&self.driver).clone();
        driver.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicU32);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// The end of a scope and its abandonment may come before the driver has looked, and while it looks.
    #[test]
    fn each_ring_wakes_the_driver() {
        let woken = Arc::new(Woken::default());
        let driver = Mutex::new(Waker::from(Arc::clone(&woken)));
        let waker = Waker::from(Arc::new(ScopeWaker { rung: AtomicBool::new(false), driver }));
        waker.wake_by_ref();
        waker.wake_by_ref();
        assert_eq!(woken.0.load(Ordering::SeqCst), 2);
    }
}
