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

/// The driver closes a session a moment before its task has noted why.
const NOTED_WITHIN: Duration = Duration::from_secs(1);

/// How a session ended, as far as its server said so while no statement was under way. The driver hands such a report to
/// its own task alone; the next statement is told that the connection is closed.
#[derive(Debug, Default)]
pub(crate) struct End {
    report: Mutex<Option<DbError>>,
    /// A task of this crate's drives the session.
    driven: AtomicBool,
    over: CancellationToken,
}

impl End {
    /// From now on somebody tells of the end.
    pub(super) fn driven(&self) {
        self.driven.store(true, Ordering::Release);
    }

    /// The driver has ended with this error.
    pub(super) fn ended_with(&self, error: &Error) {
        if let Some(report) = error.as_db_error() {
            self.set(report);
        }
    }

    /// A notice that may be the last that is heard.
    pub(super) fn noticed(&self, notice: &DbError) {
        if announces_end(notice) {
            self.set(notice);
        }
    }

    pub(super) fn over(&self) {
        self.over.cancel();
    }

    fn set(&self, report: &DbError) {
        *lock(&self.report) = Some(report.clone());
    }

    /// What the server said at the end of a session which is closed. Cancel-safe.
    pub(crate) async fn last_words(&self) -> Option<DbError> {
        if self.driven.load(Ordering::Acquire) {
            let _ = timeout(NOTED_WITHIN, self.over.cancelled()).await;
        }
        self.report()
    }

    /// What was noted so far.
    pub(crate) fn report(&self) -> Option<DbError> {
        lock(&self.report).clone()
    }
}
