//! Tests connections that have been idle for a while before they are handed out. A socket may have died without a sign,
//! because a machine was suspended, or a router forgot the connection.
//!
//! A test belongs to the pool and not to the caller that needed it first. If that caller gives up, the test goes on,
//! and a good connection stays in the pool. So a caller whose time limit is shorter than a round trip does not cost the
//! pool a good connection. If the server gives no answer in time, the connection is *doubted*, and so are all others
//! that have been idle for as long. No caller gets a doubted connection before the server has answered on it, and the
//! pool may open another one in its place. A doubted connection without an answer is closed after a while. A short
//! stall of the server or the network closes none: a doubted connection with an answer comes back if `max_size` has
//! room for it. If a dial was begun in its place, the dial then ends without a connection.

use std::pin::pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use deadpool::managed::Object;
use tokio::time::{Instant, timeout, timeout_at};

use super::connection::Connection;
use super::counted::Counted;
use super::dialer::{Dialer, Doubted};
use super::manager::Manager;
use crate::cluster::IdleQuestion;
use crate::server::{SessionClient, wall_clock};
use crate::topology::Suspicion;

/// The time limit for an idle connection's answer, which takes a round trip. If the answer takes longer, the connection
/// is doubted, and another one is used.
const ANSWER_WITHIN: Duration = Duration::from_millis(500);
/// The time limit for the answer on a doubted connection. No caller waits for it, so the limit is longer than most
/// stalls.
const DOUBTED_WITHIN: Duration = Duration::from_secs(2);

impl<C: SessionClient> Dialer<C> {
    /// Tests a connection, and returns it if it may be handed out. Otherwise closes or doubts it. There are two reasons
    /// for a test. A caller may have given the connection back with a request that its driver has not seen yet. Or the
    /// connection was unused, idle or checked out, for so long that its socket may be dead. Cancel-safe: the test goes
    /// on in the background.
    pub(super) async fn tested<T: Tested<C>>(self: &Arc<Self>, tested: T) -> Option<T> {
        let _counted = Counted::new(self.queue.tested());
        let mut testing = Testing { dialer: self, tested: Some(tested), deadline: None };
        let found = testing.find_out().await;
        let tested = testing.tested.take()?;
        if matches!(found, Found::Fit) {
            return Some(tested);
        }
        self.put_aside(tested.take(), &found);
        None
    }

    /// Closes a connection that may not be handed out, or doubts it if its server has only been silent.
    fn put_aside(self: &Arc<Self>, connection: Connection<C>, found: &Found) {
        match found {
            Found::Silent => self.doubt(connection),
            Found::Busy => self.cancel_running(&connection, connection.facts()),
            Found::Fit | Found::Unfit => {}
        }
    }

    /// Returns whether the server has sent nothing on this connection for so long that it must be asked.
    pub(super) fn must_be_tested(&self, connection: &Connection<C>) -> bool {
        self.test_after.is_due(connection.facts().notices.activity.heard_at(), wall_clock())
    }

    /// Returns whether the connection may be handed out. Only the manager of a pool built by hand uses this: there
    /// deadpool itself holds a connection during the test.
    pub(super) async fn is_alive(self: &Arc<Self>, connection: &Connection<C>) -> bool {
        !self.must_be_tested(connection)
            || matches!(self.asked(connection, Instant::now() + ANSWER_WITHIN).await, Found::Fit)
    }

    /// Asks the server on this connection.
    async fn asked(self: &Arc<Self>, connection: &Connection<C>, deadline: Instant) -> Found {
        let heard_at = connection.facts().notices.activity.heard_at();
        let found = answers(connection, deadline).await;
        if !matches!(found, Found::Fit) {
            tracing::debug!("an idle connection gave no answer within {ANSWER_WITHIN:?}, or an error");
            // The session on which the cluster's task asks the primary may be dead, too. So let the task check.
            self.cluster.suspect(connection.facts().generation, Suspicion::Connection);
            self.queue.take_silent(heard_at).into_iter().for_each(|silent| self.doubt(silent));
        }
        found
    }

    /// Asks the primary on an idle connection. If such a question is under way already, asks on another connection: the
    /// socket of the first may be dead without a sign, and then its silence says nothing about the server. An answer is
    /// noted as a sign of life.
    ///
    /// As long as no such question is answered, there is no time limit, because the topology decides whether the
    /// primary is silent. Once a later question is answered, this one must be answered within `DOUBTED_WITHIN`, or its
    /// connection is closed.
    pub(super) fn ask_idle(self: &Arc<Self>) {
        let Some(question) = self.cluster.idle_question() else { return };
        let Some(connection) = self.queue.take_any(&self.cluster) else { return };
        let dialer = Arc::downgrade(self);
        drop(self.queue.runtime().spawn(async move {
            let Some((answered, doubt)) = idle_answer(&connection, &question, &dialer).await else { return };
            if answered {
                question.answered();
            }
            let fit = answered && connection.idle().await;
            if let Some(dialer) = dialer.upgrade().filter(|_| fit) {
                dialer.queue.take_back(connection, doubt, &dialer.cluster);
            }
            drop(question);
        }));
    }

    /// Tests a connection that no caller needs. Meanwhile another one may be opened in its place for callers that wait.
    fn doubt(self: &Arc<Self>, connection: Connection<C>) {
        let (doubt, dialer) = (Some(self.queue.doubt()), Arc::downgrade(self));
        drop(self.queue.runtime().spawn(async move {
            let answered = matches!(answers(&connection, Instant::now() + DOUBTED_WITHIN).await, Found::Fit);
            let fit = answered && connection.idle().await;
            if let Some(dialer) = dialer.upgrade().filter(|_| fit) {
                dialer.queue.take_back(connection, doubt, &dialer.cluster);
            }
        }));
    }
}

/// Asks the server on an idle connection. Waits until the server has answered. Once it has answered a later question,
/// waits for `DOUBTED_WITHIN` at most. Returns whether it has answered, and the doubt if the connection was doubted
/// meanwhile. `None`: the pool has been dropped.
async fn idle_answer<C: SessionClient>(
    connection: &Connection<C>,
    question: &IdleQuestion,
    dialer: &Weak<Dialer<C>>,
) -> Option<(bool, Option<Doubted>)> {
    let generation = connection.facts().generation;
    let (mut doubt, mut was_current, mut outrun) = (None, false, Duration::ZERO);
    let mut asking = pin!(connection.check_connection());
    loop {
        if let Ok(answer) = timeout(ANSWER_WITHIN, asking.as_mut()).await {
            return Some((answer.is_ok(), doubt));
        }
        let dialer = dialer.upgrade()?;
        // The pool may now open another connection in the place of this one. During a suspension it opens none for
        // callers, so a doubt is of no use. Right after a suspension the answer is probably on its way, so wait once
        // more.
        let is_current = dialer.cluster.is_current(generation);
        if is_current && was_current && doubt.is_none() {
            doubt = Some(dialer.queue.doubt());
        }
        was_current = is_current;
        // The server has answered a question that was asked later, but not this one.
        if question.is_outrun() {
            outrun += ANSWER_WITHIN;
        }
        if outrun > DOUBTED_WITHIN {
            return Some((false, doubt));
        }
    }
}

/// What a test of a connection found.
enum Found {
    Fit,
    /// The server has given no answer yet.
    Silent,
    /// Something is under way on it.
    Busy,
    /// It has ended.
    Unfit,
}

async fn answers<C: SessionClient>(connection: &Connection<C>, deadline: Instant) -> Found {
    match timeout_at(deadline, connection.check_connection()).await {
        Ok(Ok(())) => Found::Fit,
        Ok(Err(_)) => Found::Unfit,
        Err(_) => Found::Silent,
    }
}

/// A connection that can be tested, and what happens to it afterwards.
pub(super) trait Tested<C: SessionClient>: Send + Sync + 'static {
    fn connection(&self) -> &Connection<C>;

    /// Keeps the connection for the next caller.
    fn keep(self, dialer: &Dialer<C>);

    /// Takes the connection from where it was.
    fn take(self) -> Connection<C>;
}

/// A connection that the pool has opened or taken back, but not handed out.
impl<C: SessionClient> Tested<C> for Connection<C> {
    fn connection(&self) -> &Self {
        self
    }

    fn keep(self, dialer: &Dialer<C>) {
        dialer.queue.hand(self);
    }

    fn take(self) -> Connection<C> {
        self
    }
}

/// One of the inner pool's idle connections.
impl<C: SessionClient> Tested<C> for Object<Manager<C>> {
    fn connection(&self) -> &Connection<C> {
        self
    }

    fn keep(self, dialer: &Dialer<C>) {
        dialer.give_back(self);
    }

    fn take(self) -> Connection<C> {
        Self::take(self)
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
    async fn find_out(&mut self) -> Found {
        let Some(tested) = &self.tested else { return Found::Unfit };
        let connection = tested.connection();
        let idle = connection.idle().await;
        // If the driver has closed the session, the driver has also sent the cancel request. So nothing is to be
        // cancelled here.
        if !connection.usable() {
            return Found::Unfit;
        }
        if !idle {
            return Found::Busy;
        }
        if !self.dialer.must_be_tested(connection) {
            return Found::Fit;
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
        drop(self.dialer.queue.runtime().spawn(async move {
            let connection = tested.connection();
            // If the caller has sent the question already, nothing else is under way on the connection.
            if asked.is_none() && !connection.idle().await {
                return drop(tested.take());
            }
            let Some(dialer) = dialer.upgrade() else { return drop(tested.take()) };
            let deadline = asked.unwrap_or_else(|| Instant::now() + ANSWER_WITHIN);
            let found = dialer.asked(connection, deadline).await;
            if matches!(found, Found::Fit) && connection.idle().await {
                tested.keep(&dialer);
            } else {
                dialer.put_aside(tested.take(), &found);
            }
        }));
    }
}
