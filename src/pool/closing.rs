//! How a pool is closed: at once, or when all work has ended.

use std::future::pending;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;

use super::{Pool, Source};
use crate::error::Error;
use crate::retry::FAR;
use crate::server::SessionClient;

/// What a closing pool waits for.
#[derive(Default)]
pub(super) struct Closing {
    /// New callers are turned away. Every call reads it, and it is written once.
    begun: AtomicBool,
    begins: Notify,
    /// The number of calls of `transaction`, `read` and the like that are under way, whether or not they have a
    /// connection at the moment.
    calls: AtomicUsize,
    /// A call has ended, or a connection has come back.
    changed: Notify,
}

impl Closing {
    // All orderings here, and those of the count of connections checked out, are `SeqCst`. So either a call that ends
    // sees that the pool is closing, or the closing pool sees the end.
    fn has_begun(&self) -> bool {
        self.begun.load(Ordering::SeqCst)
    }

    fn begin(&self) {
        self.begun.store(true, Ordering::SeqCst);
        self.begins.notify_waiters();
    }

    /// Waits until the pool is being closed. Cancel-safe.
    async fn begins(&self) {
        let mut begins = pin!(self.begins.notified());
        begins.as_mut().enable();
        if !self.has_begun() {
            begins.await;
        }
    }

    fn ended(&self) {
        if self.has_begun() {
            self.changed.notify_waiters();
        }
    }
}

/// A call that a closing pool waits for.
pub(crate) struct Call<'a>(&'a Closing);

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::SeqCst);
        self.0.ended();
    }
}

impl<C: SessionClient> Pool<C> {
    /// Closes the pool immediately: waiting callers get [`Error::Closed`], and every connection ends, even one in use.
    /// [`Pool::close_within`] lets work finish first. The server is asked to cancel what still runs. If a statement
    /// outside a transaction is waiting for a synchronous standby, the cancel request ends that wait, and the
    /// statement's effect becomes visible. Closing is idempotent, and closes all clones. A [wrapped](Pool::wrap) pool
    /// stays open, with its idle connections and those in use: only transactions of this pool end.
    pub fn close(&self) {
        self.shared.calls.closing.begin();
        if let Source::Own(inner) = &self.shared.source {
            inner.close();
        }
        self.cluster().close();
    }

    /// Turns new callers away, lets what is under way finish, and then closes the pool as [`Pool::close`] does. At the
    /// limit it closes the pool anyway. Returns whether everything had finished before.
    ///
    /// From the call on, [`Pool::get`], [`Pool::connect`](crate::Pool::connect),
    /// [`Pool::listen`](crate::Pool::listen), [`Pool::dial`](crate::Pool::dial) and new transactions fail with
    /// [`Error::Closed`], and so do callers that wait in one of the first four. A transaction that has begun goes on as
    /// usual: it waits, runs again across a failover, settles its COMMIT, and may make further calls in its closure.
    /// The pool waits for these calls and for each [`Client`](crate::Client). It does not wait for listeners and
    /// [detached](crate::Client::detach) or [dialled](crate::Pool::dial) sessions, which end when it is closed. Affects
    /// all clones.
    ///
    /// A job that makes several calls counts as a new caller between two of them. So let the jobs of your program
    /// finish first, while the pool is open, and close the pool afterwards: [recipe 9](crate::docs::recipes) does.
    ///
    /// # Cancel safety
    /// If the future is dropped, the pool stays open for what is under way, and turns new callers away. Call it again,
    /// or close the pool.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) {
    /// use std::time::Duration;
    ///
    /// if !pool.close_within(Duration::from_secs(20)).await {
    ///     eprintln!("closed with work under way; it was rolled back, except a COMMIT that was sent already");
    /// }
    /// # }
    /// ```
    pub async fn close_within(&self, limit: Duration) -> bool {
        let closing = &self.shared.calls.closing;
        closing.begin();
        let finished = async {
            loop {
                let mut changed = pin!(closing.changed.notified());
                changed.as_mut().enable();
                if self.is_unused() {
                    return true;
                }
                tokio::select! {
                    () = changed => {}
                    () = self.cluster().scope().cancelled() => return false,
                }
            }
        };
        let finished = timeout(limit.min(FAR), finished).await.unwrap_or(false);
        self.close();
        finished
    }

    fn is_unused(&self) -> bool {
        self.shared.calls.closing.calls.load(Ordering::SeqCst) == 0 && self.cluster().in_use() == 0
    }

    /// Fails if the pool takes no new callers. A call within one of the pool's transactions is not a new caller.
    pub(crate) fn is_open(&self) -> Result<(), Error> {
        if self.shared.calls.closing.has_begun() && !self.is_within_a_call() {
            return Err(Error::without_primary(self.cluster().ended()));
        }
        Ok(())
    }

    /// Begins a call that a closing pool waits for.
    pub(crate) fn begin_call(&self) -> Result<Call<'_>, Error> {
        let closing = &self.shared.calls.closing;
        closing.calls.fetch_add(1, Ordering::SeqCst);
        let call = Call(closing);
        self.is_open().map(|()| call)
    }

    /// Waits until a caller that waits for a connection must be turned away. `begun`: its call has begun already.
    /// Cancel-safe.
    pub(super) async fn turns_away(&self, begun: bool) {
        if begun || self.is_within_a_call() {
            return pending().await;
        }
        self.shared.calls.closing.begins().await;
    }

    /// Waits for the result of `work`, unless the pool begins to close before. Cancel-safe if `work` is.
    pub(crate) async fn unless_closing<T>(&self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        tokio::select! {
            biased;
            done = work => done,
            () = self.turns_away(false) => Err(Error::without_primary(self.cluster().ended())),
        }
    }

    /// A connection checked out was given back.
    pub(super) fn returned(&self) {
        self.cluster().returned();
        self.shared.calls.closing.ended();
    }
}
