//! Tests connections that have been idle for a while before they are handed out. A socket may have died without a sign,
//! because a machine was suspended, or a router forgot the connection.
//!
//! A test belongs to the pool and not to the caller that needed it first. If that caller gives up, the test goes on,
//! and a good connection stays in the pool. So callers that wait for less than a round trip close no connections. If
//! the server does not answer in time, only the tested connection is closed. The others that have been idle for as long
//! are *doubted*: no caller gets one before it has answered. A stall of the server or the network closes none of them,
//! unless others were opened in their place.

use std::sync::Arc;
use std::time::Duration;

use deadpool::managed::Object;
use tokio::time::{Instant, timeout_at};

use super::connection::Connection;
use super::dialer::Dialer;
use super::manager::Manager;
use crate::server::{SessionClient, wall_clock};
use crate::topology::Suspicion;

/// The time limit for the answer on an idle session, which takes a round trip. A slower session is closed, and another
/// one is used.
const ANSWER_WITHIN: Duration = Duration::from_millis(500);
/// The time limit for the answer on a doubted connection. No caller waits for it, so the limit is longer than most
/// stalls.
const DOUBTED_WITHIN: Duration = Duration::from_secs(2);

impl<C: SessionClient> Dialer<C> {
    /// Returns the connection if it may be handed out, and closes it if not. It may have been given back with something
    /// under way that its driver has not seen yet. Or it was idle, or on loan without being used, for so long that its
    /// socket may be dead. Cancel-safe: the test goes on in the background.
    pub(super) async fn tested<T: Tested<C>>(self: &Arc<Self>, tested: T) -> Option<T> {
        let mut testing = Testing { dialer: self, tested: Some(tested), deadline: None };
        let fit = testing.is_fit().await;
        let tested = testing.tested.take()?;
        if fit {
            return Some(tested);
        }
        tested.close();
        None
    }

    /// Returns whether the server has sent nothing on this connection for so long that it must be asked.
    pub(super) fn must_be_tested(&self, connection: &Connection<C>) -> bool {
        self.test_after.is_due(connection.facts().notices.activity.heard_at(), wall_clock())
    }

    /// Returns whether the connection may be handed out. This is for a pool built by hand, whose connections deadpool
    /// itself holds while they are tested.
    pub(super) async fn is_alive(self: &Arc<Self>, connection: &Connection<C>) -> bool {
        !self.must_be_tested(connection) || self.asked(connection, Instant::now() + ANSWER_WITHIN).await
    }

    /// Returns whether the server answers on this connection.
    async fn asked(self: &Arc<Self>, connection: &Connection<C>, deadline: Instant) -> bool {
        let heard_at = connection.facts().notices.activity.heard_at();
        let answers = answers(connection, deadline).await;
        if !answers {
            tracing::debug!("an idle connection gave no answer within {ANSWER_WITHIN:?}; it is closed");
            // The heartbeat's session may be dead, too, so the primary is asked.
            self.cluster.suspect(connection.facts().generation, Suspicion::Connection);
            self.dials.take_silent(heard_at).into_iter().for_each(|silent| self.doubt(silent));
        }
        answers
    }

    /// Tests a connection that no caller needs. Meanwhile another one may be opened in its place for callers that wait.
    fn doubt(self: &Arc<Self>, connection: Connection<C>) {
        let (doubt, dialer) = (self.dials.doubt(), Arc::downgrade(self));
        drop(self.dials.runtime().spawn(async move {
            let fit = answers(&connection, Instant::now() + DOUBTED_WITHIN).await && connection.idle().await;
            if let Some(dialer) = dialer.upgrade().filter(|_| fit) {
                dialer.dials.take_back(connection, doubt);
            }
        }));
    }
}

async fn answers<C: SessionClient>(connection: &Connection<C>, deadline: Instant) -> bool {
    matches!(timeout_at(deadline, connection.check_connection()).await, Ok(Ok(())))
}

/// A connection that can be tested, and what happens to it afterwards.
pub(super) trait Tested<C: SessionClient>: Send + Sync + 'static {
    fn connection(&self) -> &Connection<C>;

    /// Keeps the connection for the next caller.
    fn keep(self, dialer: &Dialer<C>);

    fn close(self);
}

/// A connection that the pool has opened or taken back, but not handed out.
impl<C: SessionClient> Tested<C> for Connection<C> {
    fn connection(&self) -> &Self {
        self
    }

    fn keep(self, dialer: &Dialer<C>) {
        dialer.dials.hand(self);
    }

    fn close(self) {}
}

/// One of the inner pool's idle connections.
impl<C: SessionClient> Tested<C> for Object<Manager<C>> {
    fn connection(&self) -> &Connection<C> {
        self
    }

    fn keep(self, dialer: &Dialer<C>) {
        dialer.give_back(self);
    }

    fn close(self) {
        drop(Self::take(self));
    }
}

/// A test that is under way. If this is dropped before the test has ended, a task goes on with it.
struct Testing<'a, C: SessionClient, T: Tested<C>> {
    dialer: &'a Arc<Dialer<C>>,
    /// Set until the test has ended.
    tested: Option<T>,
    /// Set once the server is asked.
    deadline: Option<Instant>,
}
impl<C: SessionClient, T: Tested<C>> Testing<'_, C, T> {
    async fn is_fit(&mut self) -> bool {
        let Some(tested) = &self.tested else { return false };
        let connection = tested.connection();
        if !connection.idle().await {
            return false;
        }
        if !self.dialer.must_be_tested(connection) {
            return true;
        }
        let deadline = Instant::now() + ANSWER_WITHIN;
        self.deadline = Some(deadline);
        self.dialer.asked(connection, deadline).await
    }
}

impl<C: SessionClient, T: Tested<C>> Drop for Testing<'_, C, T> {
    fn drop(&mut self) {
        let Some(tested) = self.tested.take() else { return };
        let (asked, dialer) = (self.deadline, Arc::downgrade(self.dialer));
        drop(self.dialer.dials.runtime().spawn(async move {
            let connection = tested.connection();
            // If the caller has asked already, only that question is under way on the connection.
            if asked.is_none() && !connection.idle().await {
                return tested.close();
            }
            let Some(dialer) = dialer.upgrade() else { return tested.close() };
            let deadline = asked.unwrap_or_else(|| Instant::now() + ANSWER_WITHIN);
            if dialer.asked(connection, deadline).await && connection.idle().await {
                tested.keep(&dialer);
            } else {
                tested.close();
            }
        }));
    }
}
