//! What a server says in one session besides its answers, and who is told about it.
//!
//! This module decides nothing. The session's driver notes what the server says, and the holder of the connection reads
//! it.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::Notification;
use tokio_postgres::error::{DbError, SqlState};

use super::{Activity, End};
use crate::sync::{lock, log_safely};
use crate::topology::{ServerSession, shortened};

/// The longest wait until a driver's task has seen all requests of its session.
const SEEN_WITHIN: Duration = Duration::from_secs(1);

/// Is told how a session of the pool has ended. The driver's task calls this immediately, even while a caller holds the
/// connection.
pub(crate) trait SessionEndListener: Send {
    /// `lost`: the server or the network has ended the session, not this side.
    fn session_ended(&self, lost: bool);
}

/// The listener for the end of a session.
#[derive(Default)]
enum EndListener {
    #[default]
    Nobody,
    Somebody(Box<dyn SessionEndListener>),
    /// The session has ended.
    Left,
}

impl fmt::Debug for EndListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EndListener")
    }
}

/// What the server said in one session besides its answers. A notice comes before the answer that it belongs to, and
/// the driver's task notes it before it passes that answer on.
#[derive(Debug, Default)]
pub(crate) struct Notices {
    already_in_transaction: AtomicBool,
    not_replicated: AtomicBool,
    /// The session belongs to the pool, so its traffic counts for the pool.
    pooled: AtomicBool,
    /// Grows whenever something is sent or received on the session. It stays 0 if the driver is not this crate's.
    traffic: AtomicU64,
    end_listener: Mutex<EndListener>,
    /// What receives the session's notifications, if anything does.
    sink: OnceLock<Arc<dyn NotificationSink>>,
    end: End,
    /// What the server calls this session.
    pub(crate) session: OnceLock<ServerSession>,
    /// What is under way on the session, if its driver is this crate's.
    pub(crate) activity: Arc<Activity>,
}

/// Receives the notifications of one session. The driver task calls it, so it must not wait.
pub(crate) trait NotificationSink: fmt::Debug + Send + Sync {
    /// A NOTIFY on one of the session's channels.
    fn notified(&self, notification: Notification);
    /// The session has ended, and no more notifications follow.
    fn ended(&self);
}

impl Notices {
    pub(super) fn note(&self, notice: &DbError) {
        self.end.noticed(notice);
        if *notice.code() == SqlState::ACTIVE_SQL_TRANSACTION {
            self.already_in_transaction.store(true, Ordering::Release);
        }
        // The message may be translated, and all warnings have the same code. So recognise this warning by its routine
        // (`syncrep.c`).
        if notice.routine() == Some("SyncRepWaitForLSN") {
            self.not_replicated.store(true, Ordering::Release);
        }
        log_safely(|| tracing::debug!(code = notice.code().code(), "{}", shortened(notice.message().to_owned())));
    }

    /// Makes this a session of the pool: from now on its traffic counts for the pool, and `listener` is told of its
    /// end.
    pub(crate) fn pool(&self, listener: Box<dyn SessionEndListener>) {
        self.pooled.store(true, Ordering::Relaxed);
        let mut end_listener = lock(&self.end_listener);
        match *end_listener {
            EndListener::Left => listener.session_ended(false),
            _ => *end_listener = EndListener::Somebody(listener),
        }
    }

    /// Tells the listener that the session has ended. Only the first call counts, because it knows the reason.
    pub(super) fn ended(&self, lost: bool) {
        let end_listener = std::mem::replace(&mut *lock(&self.end_listener), EndListener::Left);
        if let EndListener::Somebody(listener) = end_listener {
            listener.session_ended(lost);
        }
    }

    /// Counts that the driver's task runs, because something is sent or received.
    pub(super) fn count_traffic(&self) {
        // Only this task writes it.
        self.traffic.store(self.traffic() + 1, Ordering::Relaxed);
    }

    /// Counts that something was sent or received for a caller. `pool` is the counter of all sessions of the pool.
    pub(super) fn count_work(&self, pool: &AtomicU64) {
        if self.pooled.load(Ordering::Relaxed) {
            pool.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Notes that the driver's task ends, and wakes everything that waits for that.
    pub(super) fn over(&self) {
        self.end.over();
        self.ended(false);
        self.activity.end();
        if let Some(sink) = self.sink.get() {
            sink.ended();
        }
    }

    /// Passes on a notification that the server sent on one of the session's channels.
    pub(super) fn notified(&self, notification: Notification) {
        if let Some(sink) = self.sink.get() {
            sink.notified(notification);
        }
    }

    /// Sends notifications to `sink` from now on. A session has one sink, so only the first call counts.
    pub(crate) fn deliver_to(&self, sink: Arc<dyn NotificationSink>) {
        let _ = self.sink.set(sink);
    }

    /// Clears earlier notices, so that they are not attributed to the next statement.
    pub(crate) fn forget(&self) {
        self.already_in_transaction.store(false, Ordering::Release);
        self.not_replicated.store(false, Ordering::Release);
    }

    /// A number that changes whenever something is sent or received on this session.
    pub(crate) fn traffic(&self) -> u64 {
        self.traffic.load(Ordering::Relaxed)
    }

    /// Waits until the session's driver has seen all requests, but not for long. Cancel-safe.
    pub(crate) async fn requests_are_seen(&self) {
        let _ = timeout(SEEN_WITHIN, self.activity.settles()).await;
    }

    /// Returns whether this crate sees what the session sends and receives.
    pub(crate) fn are_driven(&self) -> bool {
        self.traffic() > 0
    }

    /// What the server calls this session. `None` if the server has not said it, or if a proxy may give the same
    /// session of the server to others: then the log-in has shown another process than the answer to the question.
    pub(crate) fn server_session(&self) -> Option<ServerSession> {
        self.session.get().copied().filter(|session| self.activity.pid() == Some(session.pid))
    }

    /// Returns whether this session is one session of the server as long as it lasts.
    pub(crate) fn is_direct(&self) -> bool {
        self.server_session().is_some()
    }

    /// What the server said when it ended the session.
    pub(crate) fn end(&self) -> &End {
        &self.end
    }

    /// Returns whether a BEGIN found a transaction already open.
    pub(crate) fn already_in_transaction(&self) -> bool {
        self.already_in_transaction.load(Ordering::Acquire)
    }

    /// Returns whether a COMMIT gave up waiting for a synchronous standby.
    pub(crate) fn not_replicated(&self) -> bool {
        self.not_replicated.load(Ordering::Acquire)
    }
}
