//! The errors of one session's statements, and whether its prepared statements are still usable.
//!
//! The driver gives an error only to the caller of the statement. So this crate's handles note each error that they
//! return. They do not see errors of the driver's own client.

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use deadpool_postgres::{ClientWrapper, StatementCache};
use tokio_postgres::Error;
use tokio_postgres::error::{DbError, SqlState};

use crate::classify::{Cure, stale, stale_report, unexpected};
use crate::server::SessionClient;
use crate::sync::lock;

/// What the pool remembers of one session: the last error of its statements, and whether the statements that it has
/// prepared are still usable.
#[derive(Debug, Default)]
pub(crate) struct Trail {
    /// The last error, without those that only say that the transaction has failed before.
    last: Mutex<Option<DbError>>,
    /// The cache of prepared statements, if the client is a `ClientWrapper`.
    cache: Option<Arc<StatementCache>>,
    /// The driver must forget the types that it has read.
    forget_types: AtomicBool,
    /// Somebody has had the connection.
    checked_out: AtomicBool,
    /// When the connection was lent, the driver may have known types as they were long ago.
    old_types: AtomicBool,
    /// The driver got an answer to a statement that it did not expect.
    misread: AtomicBool,
    /// No other caller may use the session.
    retired: AtomicBool,
}

impl Trail {
    /// `used`: somebody has had the connection before.
    pub(super) fn of<C: SessionClient>(client: &C, used: bool) -> Self {
        let cache = wrapper(client).map(|client| Arc::clone(&client.statement_cache));
        Self { cache, checked_out: AtomicBool::new(used), ..Self::default() }
    }

    /// Forgets what was noted, so that it does not count for the next use of the session.
    pub(crate) fn forget(&self) {
        *lock(&self.last) = None;
        self.misread.store(false, Ordering::Release);
    }

    /// Notes the error of a statement.
    pub(crate) fn note(&self, error: &Error) {
        if let Some(cure) = stale(error) {
            self.heal(cure);
        }
        if unexpected(error) {
            self.misread.store(true, Ordering::Release);
        }
        let Some(report) = error.as_db_error() else { return };
        let mut last = lock(&self.last);
        if *report.code() != SqlState::IN_FAILED_SQL_TRANSACTION || last.is_none() {
            *last = Some(report.clone());
        }
    }

    /// Notes a server's report that was found in the closure's own error. It may come from the driver's own client, so
    /// that the handles have not seen it.
    pub(crate) fn note_report(&self, report: &DbError) {
        if let Some(cure) = stale_report(report) {
            self.heal(cure);
        }
    }

    /// The last error that is not merely the consequence of an earlier one.
    pub(crate) fn last(&self) -> Option<DbError> {
        lock(&self.last).clone()
    }

    pub(crate) fn has_misread(&self) -> bool {
        self.misread.load(Ordering::Acquire)
    }

    /// Returns whether the session has cached prepared statements.
    pub(crate) fn has_statements(&self) -> bool {
        self.cache.as_ref().is_some_and(|cache| cache.size() > 0)
    }

    /// Returns whether the session's prepared statements can be cleared.
    pub(crate) fn can_clear(&self) -> bool {
        self.cache.is_some()
    }

    /// Makes the session prepare its statements again. If that is impossible, no other caller gets the session.
    pub(crate) fn heal(&self, cure: Cure) {
        match (&self.cache, cure) {
            (Some(cache), Cure::Clear) => {
                cache.clear();
                self.forget_types.store(true, Ordering::Release);
            }
            _ => self.retired.store(true, Ordering::Release),
        }
    }

    pub(super) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    /// Call this when somebody gets the connection.
    pub(super) fn check_out(&self, client: &tokio_postgres::Client) {
        let forgotten = self.freshen(client);
        // One caller at a time has the connection.
        let checked_out = self.checked_out.load(Ordering::Relaxed);
        if !checked_out {
            self.checked_out.store(true, Ordering::Relaxed);
        }
        self.old_types.store(checked_out && !forgotten, Ordering::Relaxed);
    }

    /// Returns whether the driver may know types as they were before its present user got the connection.
    pub(crate) fn has_old_types(&self) -> bool {
        self.old_types.load(Ordering::Relaxed)
    }

    /// Call this before the session is used again. Returns whether the driver has forgotten its types.
    pub(super) fn freshen(&self, client: &tokio_postgres::Client) -> bool {
        let forgets = self.forget_types.load(Ordering::Acquire) && self.forget_types.swap(false, Ordering::AcqRel);
        if forgets {
            client.clear_type_cache();
        }
        forgets
    }
}

/// Clears the prepared statements of an unused connection. Returns whether the connection can be kept.
pub(super) fn clear_idle<C: SessionClient>(client: &C) -> bool {
    let Some(wrapper) = wrapper(client) else { return false };
    wrapper.statement_cache.clear();
    client.clear_type_cache();
    true
}

/// Returns the client as deadpool-postgres' `ClientWrapper`, if it is one.
fn wrapper<C: SessionClient>(client: &C) -> Option<&ClientWrapper> {
    (client as &dyn Any).downcast_ref()
}

/// The trails of all sessions of a pool, idle or checked out.
#[derive(Debug, Default)]
pub(super) struct SessionTrails(Mutex<Vec<Weak<Trail>>>);

impl SessionTrails {
    pub(super) fn add(&self, trail: &Arc<Trail>) {
        let mut trails = lock(&self.0);
        // Remove dropped trails only when the vector would grow, so that adding stays cheap.
        if trails.len() == trails.capacity() {
            trails.retain(|trail| trail.strong_count() > 0);
        }
        trails.push(Arc::downgrade(trail));
    }

    /// Clears the prepared statements of all sessions.
    pub(super) fn clear(&self) {
        for trail in lock(&self.0).iter().filter_map(Weak::upgrade) {
            trail.heal(Cure::Clear);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_that_have_ended_are_not_kept() {
        let trails = SessionTrails::default();
        let kept = Arc::new(Trail::default());
        trails.add(&kept);
        for _ in 0..10_000 {
            trails.add(&Arc::default());
        }
        assert!(lock(&trails.0).len() < 100, "{}", lock(&trails.0).len());
        trails.clear();
        // It has no cache that can be cleared.
        assert!(kept.is_retired());
    }
}
