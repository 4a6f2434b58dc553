//! One PostgreSQL server: its log, its lives, and what it reports about itself.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::listen::Mail;
use crate::log::Log;
use crate::net::Net;

/// The first transaction id that is given out.
pub(crate) const FIRST_XID: u64 = 731;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Process {
    Down,
    /// It answers that it is starting up.
    Starting,
    Up,
}

/// How the sessions of a life end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goodbye {
    /// The kernel closes the sockets of a process that was killed.
    Closed,
    /// The machine is gone: nobody says anything.
    Silence,
    /// `pg_ctl stop -m fast`: each session gets 57P01.
    Shutdown,
    /// One backend has crashed: each session gets 57P02.
    BackendCrash,
}

/// The last checkpoint in the control file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Checkpoint {
    pub(crate) position: u64,
    pub(crate) timeline: u32,
    /// It ended a shutdown or a recovery.
    pub(crate) ends_something: bool,
}

/// What a session does, as `pg_stat_activity` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doing {
    Idle,
    IdleInTransaction,
    Active,
    /// Its COMMIT waits for the synchronous standby.
    Committing,
}

/// What others see of a session, and how they reach it.
#[derive(Debug)]
pub(crate) struct Backend {
    pub(crate) secret: i32,
    pub(crate) doing: Doing,
    pub(crate) since: Instant,
    pub(crate) xid: Option<u64>,
    /// When its transaction began, if it is in one.
    pub(crate) xact_start: Option<Instant>,
    /// The text of its statement has a word that may end a transaction.
    pub(crate) ends: bool,
    /// `pg_cancel_backend`, or a cancel request.
    pub(crate) cancel: Arc<Notify>,
    /// `pg_terminate_backend`.
    pub(crate) terminate: CancellationToken,
    pub(crate) listens: bool,
    pub(crate) mail: Arc<Mail>,
}

/// A moment within a COMMIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The record is written, and not on the disk.
    Written,
    Flushed,
    /// The standby has it. The client has no answer.
    Confirmed,
}

/// The server crashes at this stage, after so many more COMMITs have passed it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trap {
    pub(crate) stage: Stage,
    pub(crate) commits: u64,
    pub(crate) goodbye: Goodbye,
}

/// Things that are wrong with a server for a while.
#[derive(Clone, Copy, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a trouble of its own")]
pub(crate) struct Troubles {
    pub(crate) slots_full: bool,
    pub(crate) log_ins_hang: bool,
    pub(crate) log_ins_refused: bool,
    /// So many of a hundred statements fail for want of memory.
    pub(crate) errors: u64,
    /// So many of a hundred BEGINs are cancelled.
    pub(crate) begin: u64,
    /// It cannot give out another transaction id.
    pub(crate) full_disk: bool,
    /// `default_transaction_read_only` is on, for open sessions, too.
    pub(crate) read_only: bool,
    /// A standby receives nothing.
    pub(crate) lags: bool,
    /// How long an fsync takes.
    pub(crate) fsync: Duration,
}

#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(crate) struct Node {
    pub(crate) machine_up: bool,
    pub(crate) process: Process,
    pub(crate) frozen: bool,
    pub(crate) recovery: bool,
    pub(crate) upstream: Option<usize>,
    pub(crate) log: Log,
    pub(crate) timeline: u32,
    /// The ancestors of the timeline, and where each ended.
    pub(crate) ancestry: Vec<(u32, u64)>,
    pub(crate) started_at: i64,
    pub(crate) stats_reset: i64,
    pub(crate) replayed: Option<u64>,
    pub(crate) received: Option<u64>,
    /// It has replayed the end of a transaction as a standby, in this life.
    pub(crate) replayed_an_end: bool,
    pub(crate) checkpoint: Checkpoint,
    pub(crate) checkpoint_at: Option<Instant>,
    /// The timelines that have a file in `pg_wal`.
    pub(crate) segments: BTreeSet<u32>,
    pub(crate) running: BTreeSet<u64>,
    pub(crate) next_xid: u64,
    /// `ALTER DATABASE … SET default_transaction_read_only = on`.
    pub(crate) fenced: bool,
    pub(crate) troubles: Troubles,
    pub(crate) trap: Option<Trap>,
    /// Ends with the sessions of this life.
    pub(crate) life: CancellationToken,
    pub(crate) lives: u64,
    pub(crate) goodbye: Goodbye,
    pub(crate) backends: BTreeMap<i32, Backend>,
    pub(crate) net: Arc<Net>,
    /// Woken when the server can go on, or is promoted.
    pub(crate) thawed: Arc<Notify>,
    /// Woken when a transaction ends.
    pub(crate) ended: Arc<Notify>,
    /// By how many microseconds its clock is ahead of the others.
    pub(crate) clock_ahead: i64,
    /// Since when it is no longer the primary that the manager wants.
    pub(crate) superseded_at: Option<Instant>,
}

impl Node {
    pub(crate) fn new(index: usize, net: Arc<Net>) -> Self {
        let log = Log::default();
        let number = i64::try_from(index).unwrap_or(0);
        Self {
            machine_up: true,
            process: Process::Up,
            frozen: false,
            recovery: index > 0,
            upstream: (index > 0).then_some(0),
            checkpoint: Checkpoint { position: log.end(), timeline: 1, ends_something: false },
            log,
            timeline: 1,
            ancestry: Vec::new(),
            started_at: 1_600_000_000_000_000 + number,
            stats_reset: 1_500_000_000_000_000 + number,
            replayed: None,
            received: None,
            replayed_an_end: false,
            checkpoint_at: None,
            segments: BTreeSet::from([1]),
            running: BTreeSet::new(),
            next_xid: FIRST_XID,
            fenced: false,
            troubles: Troubles::default(),
            trap: None,
            life: CancellationToken::new(),
            lives: 1,
            goodbye: Goodbye::Closed,
            backends: BTreeMap::new(),
            net,
            thawed: Arc::default(),
            ended: Arc::default(),
            clock_ahead: 0,
            superseded_at: None,
        }
    }

    /// Accepts a connection, and returns the life of the server that it belongs to. A session ends with that life, even
    /// if the server crashes before the session's task begins. `None`: nobody listens.
    pub(crate) fn accept(&self) -> Option<CancellationToken> {
        let listens = self.machine_up && self.process != Process::Down;
        listens.then(|| self.life.clone())
    }

    /// What `pg_xact_status` says about a transaction. `None`: it is older than what the server remembers.
    pub(crate) fn status(&self, xid: u64) -> Option<&'static str> {
        if xid < FIRST_XID {
            return None;
        }
        Some(match self.log.outcome(xid) {
            _ if self.running.contains(&xid) => "in progress",
            Some(true) => "committed",
            _ => "aborted",
        })
    }

    /// Returns whether its process runs and is not stopped.
    pub(crate) fn works(&self) -> bool {
        self.machine_up && self.process == Process::Up && !self.frozen
    }

    pub(crate) fn is_primary(&self) -> bool {
        self.process == Process::Up && !self.recovery
    }

    pub(crate) fn is_standby(&self) -> bool {
        self.process == Process::Up && self.recovery
    }

    pub(crate) fn next_xid_from_log(&mut self) {
        self.next_xid = self.log.newest_xid().max(FIRST_XID - 1) + 1;
    }

    /// The history file of its timeline. A promotion copies the file of the timeline before, and adds an empty line and
    /// its own one, in case that file does not end with a newline.
    pub(crate) fn history(&self) -> String {
        let line = |(timeline, end): &(u32, u64)| format!("{timeline}\t{}\tno recovery target specified\n", lsn(*end));
        self.ancestry.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    /// `pg_last_wal_receive_lsn()`, or the replay position of a server that replayed its own log as a standby.
    pub(crate) fn received(&self) -> Option<u64> {
        self.received.or_else(|| self.replayed.filter(|_| self.replayed_an_end))
    }

    /// The last checkpoint's position, if it ended a shutdown or a recovery and the last replay ended right behind it.
    pub(crate) fn stopped(&self) -> Option<u64> {
        let replayed = self.replayed?;
        let right_behind = replayed.saturating_sub(self.checkpoint.position) < 512;
        (self.checkpoint.ends_something && right_behind).then_some(self.checkpoint.position)
    }
}

/// As PostgreSQL prints a position.
pub(crate) fn lsn(position: u64) -> String {
    format!("{:X}/{:X}", position >> 32, position & 0xFFFF_FFFF)
}

/// When a session began, as `pg_stat_activity` shows it. In this model it is the number of the session's process.
pub(crate) fn backend_start(pid: i32) -> String {
    format!("{pid}.000000")
}

/// Microseconds since 1970 as `extract(epoch …)` prints them.
pub(crate) fn epoch(micros: i64) -> String {
    format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000)
}
