//! What the statements of one session have failed with, and whether its prepared statements are still of use.
//!
//! The driver hands an error to whoever ran the statement, and to nobody else. So the handles of this crate note it on its
//! way; what is run on the bare driver's client is not seen.

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use deadpool_postgres::{ClientWrapper, StatementCache};
use tokio_postgres::Error;
use tokio_postgres::error::{DbError, SqlState};

use crate::classify::{Cure, stale, stale_report};
use crate::server::SessionClient;
use crate::sync::lock;

/// One session's.
#[derive(Debug, Default)]
pub(crate) struct Trail {
    /// The last error that was no mere consequence of the one before.
    last: Mutex<Option<DbError>>,
    /// The outcome of another call of a pool, made within this transaction, is unknown.
    doubt: AtomicBool,
    /// The cache of prepared statements, where the client has one that is known here.
    cache: Option<Arc<StatementCache>>,
    /// The types that the driver has read about are to be forgotten.
    forget_types: AtomicBool,
    /// Not to be used by anybody else.
    retired: AtomicBool,
}

impl Trail {
    pub(super) fn of<C: SessionClient>(client: &C) -> Self {
        Self { cache: wrapper(client).map(|client| Arc::clone(&client.statement_cache)), ..Self::default() }
    }

    /// What was noted before is of no interest to what comes now.
    pub(crate) fn forget(&self) {
        *lock(&self.last) = None;
        self.doubt.store(false, Ordering::Release);
    }

    /// A statement has failed.
    pub(crate) fn note(&self, error: &Error) {
        if let Some(cure) = stale(error) {
            self.heal(cure);
        }
        let Some(report) = error.as_db_error() else { return };
        let mut last = lock(&self.last);
        if *report.code() != SqlState::IN_FAILED_SQL_TRANSACTION || last.is_none() {
            *last = Some(report.clone());
        }
    }

    /// An error of whoever used the session shows this report, which came past the handles.
    pub(crate) fn note_report(&self, report: &DbError) {
        if let Some(cure) = stale_report(report) {
            self.heal(cure);
        }
    }

    /// What the last statement failed with that did not fail because an earlier one had.
    pub(crate) fn last(&self) -> Option<DbError> {
        lock(&self.last).clone()
    }

    pub(crate) fn note_doubt(&self) {
        self.doubt.store(true, Ordering::Release);
    }

    pub(crate) fn has_doubt(&self) -> bool {
        self.doubt.load(Ordering::Acquire)
    }

    /// Are there prepared statements of an earlier use, as far as is known here?
    pub(crate) fn has_statements(&self) -> bool {
        self.cache.as_ref().is_some_and(|cache| cache.size() > 0)
    }

    /// Can its prepared statements be cleared?
    pub(crate) fn can_clear(&self) -> bool {
        self.cache.is_some()
    }

    /// Its statements are prepared anew from now on. Where that cannot be done, nobody else gets the session.
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

    /// Before somebody uses the session again.
    pub(super) fn freshen(&self, client: &tokio_postgres::Client) {
        if self.forget_types.swap(false, Ordering::AcqRel) {
            client.clear_type_cache();
        }
    }
}

/// Clears the prepared statements of a connection that nobody uses. Whether it can be kept.
pub(super) fn clear_idle<C: SessionClient>(client: &C) -> bool {
    let Some(wrapper) = wrapper(client) else { return false };
    wrapper.statement_cache.clear();
    client.clear_type_cache();
    true
}

/// The client as deadpool-postgres makes it, if it is that.
fn wrapper<C: SessionClient>(client: &C) -> Option<&ClientWrapper> {
    (client as &dyn Any).downcast_ref()
}

/// The sessions of a pool, idle or on loan, for what is to be done to all of them.
#[derive(Debug, Default)]
pub(super) struct Trails(Mutex<Vec<Weak<Trail>>>);

impl Trails {
    pub(super) fn add(&self, trail: &Arc<Trail>) {
        let mut trails = lock(&self.0);
        // Looked through only when the vector would grow, so that adding stays cheap.
        if trails.len() == trails.capacity() {
            trails.retain(|trail| trail.strong_count() > 0);
        }
        trails.push(Arc::downgrade(trail));
    }

    /// Clears the prepared statements of all.
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
        // It has no cache that could be cleared.
        assert!(kept.is_retired());
    }
}
