//! What is known about one session of the pool.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use super::trail::Trail;
use crate::cluster::Generation;
use crate::commit::{Life, Server};
use crate::server::{Notices, SessionClient};
use crate::settle::wal::MarkStatement;
use crate::sync::lock;
use crate::topology::{Endpoint, GenerationId, ServerReport};

/// What is known about one session, whichever handle holds it.
pub(super) struct Facts {
    pub(super) generation: GenerationId,
    /// The system identifier of the server, if the server showed it from the start.
    cluster: Option<u64>,
    life: Option<Life>,
    /// What the server reported only after the generation began.
    learned: Arc<OnceLock<ServerReport>>,
    /// How the session marks transactions.
    pub(super) mark_statement: Mutex<MarkStatement>,
    /// How the session enters transactions into a ledger, and into which one ([`Ledger::key`](crate::ledger::Ledger)).
    entry_statement: Mutex<(u64, MarkStatement)>,
    /// The session has prepared the check by which a COMMIT looks for its transaction.
    pub(super) check_prepared: AtomicBool,
    pub(super) notices: Arc<Notices>,
    pub(super) poisoned: AtomicBool,
    /// A COMMIT was sent, and not answered yet.
    pub(super) committing: AtomicBool,
    pub(super) trail: Arc<Trail>,
    /// Where the session was opened.
    pub(super) endpoint: Endpoint,
}

impl Facts {
    pub(super) fn new<C: SessionClient>(generation: &Generation<C>, notices: Arc<Notices>, trail: Arc<Trail>) -> Self {
        Self {
            generation: generation.primary.id,
            cluster: generation.primary.report.system_identifier,
            life: life(&generation.primary.report),
            learned: Arc::clone(&generation.learned),
            mark_statement: Mutex::default(),
            entry_statement: Mutex::default(),
            check_prepared: AtomicBool::new(false),
            notices,
            poisoned: AtomicBool::new(false),
            committing: AtomicBool::new(false),
            trail,
            endpoint: generation.endpoint(),
        }
    }

    pub(super) fn life(&self) -> Option<Life> {
        // What was learned later is more complete.
        self.learned.get().and_then(life).or(self.life)
    }

    /// The system identifier of the server, if the server shows it.
    pub(super) fn cluster(&self) -> Option<u64> {
        self.cluster.or_else(|| self.learned.get().and_then(|report| report.system_identifier))
    }

    pub(super) fn mark_statement(&self) -> MarkStatement {
        *lock(&self.mark_statement)
    }

    /// Returns how the session enters a transaction into this ledger. It prepares the statement of one ledger only.
    pub(super) fn entry_statement(&self, ledger: u64) -> MarkStatement {
        let (prepared, statement) = *lock(&self.entry_statement);
        if prepared == ledger || statement == MarkStatement::New { statement } else { MarkStatement::Plain }
    }

    pub(super) fn set_entry_statement(&self, ledger: u64, statement: MarkStatement) {
        let mut kept = lock(&self.entry_statement);
        if kept.0 == ledger || kept.1 == MarkStatement::New {
            *kept = (ledger, statement);
        }
    }

    /// The session's prepared statements were dropped, so the pool's own ones must be prepared again.
    pub(super) fn forget_prepared(&self) {
        let forget = |statement: &mut MarkStatement| {
            if *statement == MarkStatement::Prepared {
                *statement = MarkStatement::New;
            }
        };
        forget(&mut lock(&self.mark_statement));
        forget(&mut lock(&self.entry_statement).1);
        self.check_prepared.store(false, Ordering::Relaxed);
    }

    pub(super) fn is_committing(&self) -> bool {
        self.committing.load(Ordering::Acquire) || self.notices.activity.is_committing()
    }

    pub(super) fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    /// Returns whether no further caller may use the session.
    pub(super) fn is_unfit(&self) -> bool {
        self.is_poisoned() || self.trail.is_retired()
    }
}

/// The system identifier of the generation's server, if the server shows it.
pub(super) fn cluster_in<C: SessionClient>(generation: &Generation<C>) -> Option<u64> {
    let learned = || generation.learned.get().and_then(|report| report.system_identifier);
    generation.primary.report.system_identifier.or_else(learned)
}

/// The life of the generation's server, if the server has been identified.
pub(super) fn life_in<C: SessionClient>(generation: &Generation<C>) -> Option<Life> {
    generation.learned.get().and_then(life).or_else(|| life(&generation.primary.report))
}

/// The life of the server with this report, if the report identifies it.
fn life(report: &ServerReport) -> Option<Life> {
    if !report.is_identified() {
        return None;
    }
    let server = Server {
        system_identifier: report.system_identifier?,
        timeline: report.timeline?,
        started_at: report.started_at?,
    };
    let ancestor = report.checkpointed.filter(|older| *older < server.timeline);
    Some(Life { server, replayed: report.replayed, stats_reset: report.stats_reset, ancestor })
}
