//! What a server said when it ended a session.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::Error;
use tokio_postgres::error::DbError;
use tokio_util::sync::CancellationToken;

use crate::classify::announces_end;
use crate::sync::lock;

/// How long to wait for the reason. The driver closes a session a moment before its task notes the reason.
const NOTED_WITHIN: Duration = Duration::from_secs(1);

/// How a session has ended, if its server reported that while no statement was under way. The driver gives such a
/// report only to the task that drives it. The next statement merely fails with "connection closed".
#[derive(Debug, Default)]
pub(crate) struct End {
    report: Mutex<Option<DbError>>,
    /// A task of this crate drives the session.
    driven: AtomicBool,
    over: CancellationToken,
}

impl End {
    /// Notes that a driver task runs, which will report the end.
    pub(super) fn driven(&self) {
        self.driven.store(true, Ordering::Release);
    }

    /// Notes that the driver ended with this error.
    pub(super) fn ended_with(&self, error: &Error) {
        if let Some(report) = error.as_db_error() {
            self.set(report);
        }
    }

    /// Notes a notice that announces the end of the session, because it may be the last message.
    pub(super) fn noticed(&self, notice: &DbError) {
        if announces_end(notice) {
            self.set(notice);
        }
    }

    pub(super) fn over(&self) {
        self.over.cancel();
    }

    /// Waits until the driver has ended. Only for a session that a task of this crate drives. Cancel-safe.
    pub(crate) async fn wait(&self) {
        self.over.cancelled().await;
    }

    fn set(&self, report: &DbError) {
        *lock(&self.report) = Some(report.clone());
    }

    /// Returns what the server said when it ended this session, which is closed. Cancel-safe.
    pub(crate) async fn last_words(&self) -> Option<DbError> {
        if self.driven.load(Ordering::Acquire) {
            let _ = timeout(NOTED_WITHIN, self.over.cancelled()).await;
        }
        self.report()
    }

    /// What has been noted so far.
    pub(crate) fn report(&self) -> Option<DbError> {
        lock(&self.report).clone()
    }
}
