//! The connections that no caller has at the moment: takes them for a caller, closes those that are too old, and counts
//! those that are doubted.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use deadpool::managed::WeakPool;

use super::{Connection, ConnectionCounts, DialQueue};
use crate::cluster::Cluster;
use crate::server::SessionClient;

impl<C: SessionClient> DialQueue<C> {
    /// Gives idle connections to callers that wait: to one that began to wait just after the connection was given back,
    /// or that waited when it came back during a suspension.
    pub(in crate::pool) fn offer_idle(&self) {
        while self.wanted()
            && let Some(connection) = self.take_idle()
        {
            self.hand(connection);
        }
    }

    /// From now on, none of the connections that exist and are not checked out is handed out.
    pub(in crate::pool) fn evict(&self) {
        self.room.evictions.fetch_add(1, Ordering::AcqRel);
    }

    /// Closes all unusable ready connections, and idle ones while `surplus` is left. Each closed connection reduces
    /// `surplus` by one. Returns how many were closed.
    pub(in crate::pool) fn reap(&self, cluster: &Cluster<C>, idle_for: Duration, surplus: &mut usize) -> usize {
        let mut reaped = Vec::new();
        let mut book = self.book();
        for ready in std::mem::take(&mut book.ready) {
            if ready.connection.stale(cluster) || (*surplus > 0 && ready.since.elapsed() >= idle_for) {
                *surplus = surplus.saturating_sub(1);
                reaped.push(ready);
            } else {
                book.ready.push(ready);
            }
        }
        // Dropping a connection runs foreign code, so release the lock first.
        drop(book);
        reaped.len()
    }

    /// Notes that a caller has taken an idle connection. If too few are left, others are opened.
    pub(in crate::pool) fn taken(&self) {
        let min = self.min_idle.load(Ordering::Relaxed);
        if min == 0 {
            return;
        }
        if self.room.live.load(Ordering::Acquire) >= self.max_size.load(Ordering::Relaxed) {
            return;
        }
        let available = self.pool.get().and_then(WeakPool::upgrade).map_or(min, |pool| pool.status().available);
        if available < min && available + self.ready() < min {
            self.room.changed.notify_one();
        }
    }

    /// Takes out the idle connections that have received nothing since `heard_at`.
    pub(in crate::pool) fn take_silent(&self, heard_at: u64) -> Vec<Connection<C>> {
        let silent = |connection: &Connection<C>| connection.facts().notices.activity.heard_at() <= heard_at;
        let mut taken = Vec::new();
        let mut book = self.book();
        for ready in std::mem::take(&mut book.ready) {
            if silent(&ready.connection) { taken.push(ready.connection) } else { book.ready.push(ready) }
        }
        drop(book);
        if let Some(pool) = self.pool.get().and_then(WeakPool::upgrade) {
            taken.extend(pool.retain(|connection, _| !silent(connection)).removed);
        }
        taken
    }

    pub(in crate::pool) fn min_idle(&self) -> usize {
        self.min_idle.load(Ordering::Relaxed)
    }

    /// Changes how many connections and dials there may be together. Closes ready connections that are too many.
    pub(in crate::pool) fn resize(&self, max_size: usize) {
        let mut book = self.book();
        self.max_size.store(max_size, Ordering::Relaxed);
        let surplus = self.room.live.load(Ordering::Acquire).saturating_sub(max_size).min(book.ready.len());
        let surplus: Vec<_> = book.ready.drain(..surplus).collect();
        // Dropping a connection runs foreign code, so release the lock first.
        drop(book);
        drop(surplus);
        self.room.changed.notify_one();
    }

    /// The number of connections that are being tested for waiting callers.
    pub(in crate::pool) fn tested(&self) -> &AtomicUsize {
        &self.room.tested
    }

    /// The number of connections that a hook of the user's has in its hands.
    pub(in crate::pool) fn hooked(&self) -> usize {
        self.room.hooked.load(Ordering::Relaxed)
    }

    /// Counts one connection as in the hands of a hook for as long as the result exists.
    pub(in crate::pool) fn in_a_hook(&self) -> InAHook {
        self.room.hooked.fetch_add(1, Ordering::Relaxed);
        InAHook(Arc::clone(&self.room))
    }

    pub(in crate::pool) fn doubted(&self) -> usize {
        self.room.doubted.load(Ordering::Acquire)
    }

    /// Counts one connection as doubted for as long as the result exists.
    pub(in crate::pool) fn doubt(&self) -> Doubted {
        self.room.doubted.fetch_add(1, Ordering::AcqRel);
        Doubted(Arc::clone(&self.room))
    }

    /// Takes back a connection that was asked, and perhaps doubted, unless another one has been opened in its place. A
    /// dial under way has opened none yet, so it is the dial that finds no room.
    pub(in crate::pool) fn take_back(
        &self,
        mut connection: Connection<C>,
        doubt: Option<Doubted>,
        cluster: &Cluster<C>,
    ) {
        let mut book = self.book();
        // From now on, it counts towards `max_size` again.
        drop(doubt);
        let surplus = self.gives_way(&mut connection);
        let unwanted = if surplus { Some(connection) } else { self.place(&mut book, connection, cluster) };
        // Dropping a connection runs foreign code, so release the lock first.
        drop(book);
        drop(unwanted);
    }

    /// Returns whether there are more connections than the pool may have, besides those that are doubted. Only who
    /// holds the lock of the book may close one for it: two would close one each.
    pub(super) fn is_overfull(&self) -> bool {
        self.undoubted() > self.max_size.load(Ordering::Relaxed)
    }

    /// Returns whether this connection must be closed, because the pool was made smaller. If so, it does not count any
    /// more.
    pub(in crate::pool) fn is_surplus(&self, connection: &mut Connection<C>) -> bool {
        let _book = self.book();
        self.gives_way(connection)
    }

    /// The number of connections that are not doubted.
    pub(super) fn undoubted(&self) -> usize {
        self.room.live.load(Ordering::Acquire).saturating_sub(self.doubted())
    }

    /// Takes a connection that no caller has, to the primary or to the one that is suspended: the one that was heard
    /// last, because others may be dead without a sign.
    pub(in crate::pool) fn take_any(&self, cluster: &Cluster<C>) -> Option<Connection<C>> {
        let heard_at = |connection: &Connection<C>| connection.facts().notices.activity.heard_at();
        let fit = |connection: &Connection<C>| (!connection.stale(cluster)).then(|| heard_at(connection));
        let mut idle = None;
        if let Some(pool) = self.pool.get().and_then(WeakPool::upgrade) {
            pool.retain(|connection, _| {
                idle = idle.max(fit(connection));
                true
            });
        }
        {
            let mut book = self.book();
            let ready = book.ready.iter().enumerate().max_by_key(|(_, ready)| fit(&ready.connection));
            let ready = ready.filter(|(_, ready)| fit(&ready.connection).is_some_and(|at| Some(at) > idle));
            if let Some((at, _)) = ready {
                return Some(book.ready.remove(at).connection);
            }
        }
        self.take_idle_if(|connection| fit(connection).is_some_and(|at| Some(at) >= idle))
    }

    /// Takes an idle connection of the pool that may be handed out.
    pub(super) fn take_idle(&self) -> Option<Connection<C>> {
        let pool = self.pool.get()?.upgrade()?;
        self.take_idle_if(|connection| connection.may_be_handed_out(&pool.manager().dialer.cluster))
    }

    fn take_idle_if(&self, wanted: impl Fn(&Connection<C>) -> bool) -> Option<Connection<C>> {
        let pool = self.pool.get()?.upgrade()?;
        let mut found = false;
        // `retain` begins with the oldest connection. Any connection will do.
        let taken = pool.retain(|connection, _| {
            let take = !found && wanted(connection);
            found |= take;
            !take
        });
        taken.removed.into_iter().next()
    }
}

/// Counts one connection that a hook of the user's has in its hands.
pub(in crate::pool) struct InAHook(Arc<ConnectionCounts>);

impl Drop for InAHook {
    fn drop(&mut self) {
        self.0.hooked.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counts one doubted connection. It has been idle for as long as another one whose server gave no answer.
pub(in crate::pool) struct Doubted(Arc<ConnectionCounts>);

impl Drop for Doubted {
    fn drop(&mut self) {
        self.0.doubted.fetch_sub(1, Ordering::AcqRel);
        self.0.changed.notify_one();
    }
}
