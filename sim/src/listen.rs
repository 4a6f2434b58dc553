//! LISTEN and NOTIFY: the servers' part, and a listener of the pool that must not miss anything without being told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tokio_postgres_failover::Pool;
use tokio_postgres_failover::listen::Message;

use crate::done::Done;
use crate::net::lock;
use crate::session::Session;
use crate::sql::{SqlError, Statement, between};
use crate::world::Sim;

/// The listener is told of a lost subscription within this time.
const NOTICED_WITHIN: Duration = Duration::from_secs(40);

/// The load's channel.
const CHANNEL: &str = "calls";

/// What a session has not been sent yet.
#[derive(Debug, Default)]
pub(crate) struct Mail {
    pub(crate) arrived: Notify,
    waiting: Mutex<Vec<i64>>,
}

impl Mail {
    pub(crate) fn put(&self, call: i64) {
        lock(&self.waiting).push(call);
        self.arrived.notify_one();
    }

    pub(crate) fn take(&self) -> Vec<i64> {
        std::mem::take(&mut *lock(&self.waiting))
    }
}

pub(crate) fn statement(text: &str) -> Option<Statement> {
    if let Some(call) = between(text, "SELECT pg_notify('calls', '", "'") {
        return Some(Statement::Notify(call.parse().ok()?));
    }
    if text.starts_with("LISTEN ") {
        return Some(Statement::Listen);
    }
    if text.starts_with("SELECT pg_catalog.set_config('idle_session_timeout'") {
        return Some(Statement::Stay);
    }
    text.starts_with("SELECT pg_listening_channels()").then_some(Statement::Channels)
}

impl Session {
    pub(crate) fn listen(&self) -> Result<Done, SqlError> {
        self.not_during_recovery("LISTEN")?;
        self.of_node(|node| node.backends.get_mut(&self.pid).map(|backend| backend.listens = true));
        Ok(Done::tag("LISTEN"))
    }

    pub(crate) fn channels(&self) -> Done {
        let listens = self.of_node(|node| node.backends.get(&self.pid).is_some_and(|backend| backend.listens));
        if listens { Done::row(vec![Some(CHANNEL.to_owned())]) } else { Done::nothing(1) }
    }

    /// The server tells those who listen once the transaction is committed.
    pub(crate) fn tell(&self, calls: &[i64]) {
        self.of_node(|node| {
            for backend in node.backends.values().filter(|backend| backend.listens) {
                for call in calls {
                    backend.mail.put(*call);
                }
            }
        });
    }
}

/// What was told, and what the listener has received.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// The calls that were answered `Ok` and had told of themselves, and when each of them began.
    sent: BTreeMap<i64, Instant>,
    received: BTreeSet<i64>,
    /// When the listener was last told that it may have missed something.
    gap_at: Option<Instant>,
    listens_since: Option<Instant>,
}

impl Told {
    pub(crate) fn sent(&mut self, call: i64, began: Instant) {
        self.sent.insert(call, began);
    }

    /// The calls that the listener has missed without being told.
    pub(crate) fn missed(&self) -> Vec<i64> {
        let Some(since) = self.listens_since else { return Vec::new() };
        // A connection may have died without a sign, and that is not noticed at once.
        let told = |began: Instant| {
            began < since || began.elapsed() < NOTICED_WITHIN || self.gap_at.is_some_and(|at| at >= began)
        };
        let missed = self.sent.iter().filter(|(call, began)| !self.received.contains(call) && !told(**began));
        missed.map(|(call, _)| *call).collect()
    }
}

/// Listens until the pool is closed.
pub(crate) async fn listener(sim: Arc<Sim>, pool: Pool) {
    let mut listener = loop {
        match pool.listen([CHANNEL]).await {
            Ok(listener) => break listener,
            Err(_) => sleep(Duration::from_millis(500)).await,
        }
    };
    sim.lock().told.listens_since = Some(Instant::now());
    while let Some(item) = listener.recv().await {
        let mut world = sim.lock();
        match item {
            Ok(Message::Notification(notification)) => {
                let call = notification.payload().parse().unwrap_or(0);
                world.say(|| format!("the listener is told of call {call}"));
                world.counts.note("listener", "notifications");
                world.told.received.insert(call);
            }
            Ok(Message::MayHaveGap) => {
                world.say(|| "the listener may have missed something".to_owned());
                world.counts.note("listener", "gaps");
                world.told.gap_at = Some(Instant::now());
            }
            Err(error) => {
                world.say(|| format!("the listener: {error}"));
                world.counts.note("listener", "errors");
            }
        }
    }
}
