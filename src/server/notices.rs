//! What a server says in one session beside its answers, and who is told of it.
//!
//! Decides nothing. The session's driver writes, whoever uses the connection reads.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use tokio_postgres::Notification;
use tokio_postgres::error::{DbError, SqlState};

use super::{Activity, End};
use crate::sync::lock;
use crate::topology::shortened;

/// Told how a session of the pool ended, by the task that drove it: at once, whoever still holds the connection.
pub(crate) trait SessionEndListener: Send {
    /// `lost`: the server or the network ended it, and not this side.
    fn session_ended(&self, lost: bool);
}

/// Who is told of the end of a session.
#[derive(Default)]
enum EndListener {
    #[default]
    Nobody,
    Somebody(Box<dyn SessionEndListener>),
    /// It has ended.
    Left,
}

impl fmt::Debug for EndListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EndListener")
    }
}

/// What the server said beside its answers in one session. A notice comes before the answer that it belongs to, and the
/// driver task notes it before it hands that answer on.
#[derive(Debug, Default)]
pub(crate) struct Notices {
    already_in_transaction: AtomicBool,
    not_replicated: AtomicBool,
    /// The session is one of the pool's, whose traffic shows that the server is there.
    pooled: AtomicBool,
    /// Grows whenever something is sent or received on the session, where its driver is this crate's; 0 where it is not.
    traffic: AtomicU64,
    end_listener: Mutex<EndListener>,
    /// Who hears the session's notifications, if anybody does.
    sink: OnceLock<Arc<dyn NotificationSink>>,
    end: End,
    /// What is under way on the session, where its driver is this crate's.
    pub(crate) activity: Arc<Activity>,
}

/// Hears what one session is notified of. Called by its driver task: must not wait.
pub(crate) trait NotificationSink: fmt::Debug + Send + Sync {
    /// A NOTIFY on one of the session's channels.
    fn notified(&self, notification: Notification);
    /// The session has ended: nothing will come any more.
    fn ended(&self);
}

impl Notices {
    pub(super) fn note(&self, notice: &DbError) {
        tracing::debug!(code = notice.code().code(), "{}", shortened(notice.message().to_owned()));
        self.end.noticed(notice);
        if *notice.code() == SqlState::ACTIVE_SQL_TRANSACTION {
            self.already_in_transaction.store(true, Ordering::Release);
        }
        // Its message is translated and its code is that of all warnings; the routine (`syncrep.c`) is neither.
        if notice.routine() == Some("SyncRepWaitForLSN") {
            self.not_replicated.store(true, Ordering::Release);
        }
    }

    /// From now on the session's traffic counts, and `listener` is told of its end.
    pub(crate) fn pool(&self, listener: Box<dyn SessionEndListener>) {
        self.pooled.store(true, Ordering::Relaxed);
        let mut end_listener = lock(&self.end_listener);
        match *end_listener {
            EndListener::Left => listener.session_ended(false),
            _ => *end_listener = EndListener::Somebody(listener),
        }
    }

    /// The session has ended; whoever says so first is right about the reason.
    pub(super) fn ended(&self, lost: bool) {
        let end_listener = std::mem::replace(&mut *lock(&self.end_listener), EndListener::Left);
        if let EndListener::Somebody(listener) = end_listener {
            listener.session_ended(lost);
        }
    }

    /// The driver's task is at work, because something is sent or received. `pool` counts for all sessions of the pool.
    pub(super) fn count_traffic(&self, pool: &AtomicU64) {
        self.traffic.fetch_add(1, Ordering::Relaxed);
        if self.pooled.load(Ordering::Relaxed) {
            pool.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The driver's task ends: whoever waits for that is told.
    pub(super) fn over(&self) {
        self.end.over();
        self.ended(false);
        self.activity.end();
        if let Some(sink) = self.sink.get() {
            sink.ended();
        }
    }

    /// The server notifies the session of something on one of its channels.
    pub(super) fn notified(&self, notification: Notification) {
        if let Some(sink) = self.sink.get() {
            sink.notified(notification);
        }
    }

    /// `sink` hears from now on. The first stays: a session has one.
    pub(crate) fn deliver_to(&self, sink: Arc<dyn NotificationSink>) {
        let _ = self.sink.set(sink);
    }

    /// What was said before is of no interest to what comes now.
    pub(crate) fn forget(&self) {
        self.already_in_transaction.store(false, Ordering::Release);
        self.not_replicated.store(false, Ordering::Release);
    }

    /// Another number than before, if something was sent or received meanwhile on this session.
    pub(crate) fn traffic(&self) -> u64 {
        self.traffic.load(Ordering::Relaxed)
    }

    /// Is it seen what the session sends and receives?
    pub(crate) fn are_driven(&self) -> bool {
        self.traffic() > 0
    }

    /// What the server said when it ended the session.
    pub(crate) fn end(&self) -> &End {
        &self.end
    }

    /// A BEGIN met a transaction that was open already.
    pub(crate) fn already_in_transaction(&self) -> bool {
        self.already_in_transaction.load(Ordering::Acquire)
    }

    /// A COMMIT gave up waiting for a synchronous standby.
    pub(crate) fn not_replicated(&self) -> bool {
        self.not_replicated.load(Ordering::Acquire)
    }
}
