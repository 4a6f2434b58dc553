//! The errors that the statements of one session have met, and whether its prepared statements are still usable.
//!
//! The driver gives an error only to the caller of the statement. So this crate's handles note it on its way. Errors on
//! the bare driver's client are not seen.

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use deadpool_postgres::{ClientWrapper, StatementCache};
use tokio_postgres::Error;
use tokio_postgres::error::{DbError, SqlState};

use crate::classify::{Cure, stale, stale_report, unexpected};
use crate::server::SessionClient;
use crate::sync::lock;

/// The trail of one session.
#[derive(Debug, Default)]
pub(crate) struct Trail {
    /// The last error that did not merely follow from the one before.
    last: Mutex<Option<DbError>>,
    /// Another call of a pool, made within this transaction, has an unknown outcome.
    doubt: AtomicBool,
    /// The cache of prepared statements, if the client has a known one.
    cache: Option<Arc<StatementCache>>,
    /// The driver must forget the types that it has read.
    forget_types: AtomicBool,
    /// The driver did not expect the server's answer to a statement.
    misread: AtomicBool,
    /// No other caller may use the session.
    retired: AtomicBool,
}

impl Trail {
    pub(super) fn of<C: SessionClient>(client: &C) -> Self {
        Self { cache: wrapper(client).map(|client| Arc::clone(&client.statement_cache)), ..Self::default() }
    }

    /// Forgets what was noted, so that it is not attributed to the next use.
    pub(crate) fn forget(&self) {
        *lock(&self.last) = None;
        self.doubt.store(false, Ordering::Release);
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

    /// Notes a report that was found in an error of the session's user, and did not pass the handles.
    pub(crate) fn note_report(&self, report: &DbError) {
        if let Some(cure) = stale_report(report) {
            self.heal(cure);
        }
    }

    /// The error of the last statement that did not fail because of an earlier one.
    pub(crate) fn last(&self) -> Option<DbError> {
        lock(&self.last).clone()
    }

    pub(crate) fn has_misread(&self) -> bool {
        self.misread.load(Ordering::Acquire)
    }

    pub(crate) fn note_doubt(&self) {
        self.doubt.store(true, Ordering::Release);
    }

    pub(crate) fn has_doubt(&self) -> bool {
        self.doubt.load(Ordering::Acquire)
    }

    /// Returns whether there are known prepared statements from an earlier use.
    pub(crate) fn has_statements(&self) -> bool {
        self.cache.as_ref().is_some_and(|cache| cache.size() > 0)
    }

    /// Returns whether its prepared statements can be cleared.
    pub(crate) fn can_clear(&self) -> bool {
        self.cache.is_some()
    }

    /// From now on its statements are prepared anew. If that is impossible, no other caller gets the session.
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

    /// Call this before the session is used again.
    pub(super) fn freshen(&self, client: &tokio_postgres::Client) {
        if self.forget_types.swap(false, Ordering::AcqRel) {
            client.clear_type_cache();
        }
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

/// The trails of a pool's sessions, idle or on loan, for changes to all of them.
#[derive(Debug, Default)]
pub(super) struct Trails(Mutex<Vec<Weak<Trail>>>);

impl Trails {
    pub(super) fn add(&self, trail: &Arc<Trail>) {
        let mut trails = lock(&self.0);
        // Search it only when the vector would grow, so that adding stays cheap.
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
        let trails = Trails::default();
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
