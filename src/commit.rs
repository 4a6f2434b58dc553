//! Decides whether a transaction whose COMMIT was not answered has been committed: what the transaction left behind at
//! BEGIN, and what the primary says now → a [`Settled`]. Knows nothing of sessions, pools and time.
//!
//! Invariant: [`Settled::Committed`] and [`Settled::NotCommitted`] are true, as long as there was at most one crash or
//! promotion since BEGIN; what may be more is [`Unsettled`]. docs/exactly-once.md has the argument. The I/O is in
//! [`wal`] and [`ledger`]. Tests: `commit/tests.rs`, with a model of servers that crash, lose WAL and reuse transaction ids.

pub(crate) mod ledger;
#[cfg(test)]
mod tests;
pub(crate) mod wal;

use std::time::Duration;

use crate::topology::Lsn;
use ledger::Ledger;

/// What holds for the work of a transaction when the connection is lost between COMMIT and its answer.
///
/// What happens before COMMIT is sent, or is refused, is not in doubt: it was not committed, and runs again under each of
/// these.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Guarantee {
    /// The new primary is asked whether the transaction is in its history, by a mark in the write-ahead log that the
    /// transaction left there with BEGIN. It runs again if it is not. Needs no schema, and stock PostgreSQL 13 or newer; where
    /// a server does not offer what is needed, this is [`AtMostOnce`](Self::AtMostOnce), and
    /// [`Status::fallback`](crate::Status::fallback) says why.
    ///
    /// Assumes at most one crash or failover between BEGIN and the question; after more, the call fails with
    /// [`Error::CommitUnknown`](crate::Error::CommitUnknown).
    #[default]
    ExactlyOnce,
    /// As `ExactlyOnce`, settled by a table: exact under any number of failovers, and one row to write for each transaction.
    Ledger(Ledger),
    /// The call fails with [`Error::CommitUnknown`](crate::Error::CommitUnknown): applied once or not at all.
    AtMostOnce,
    /// The work is run again: it may have been applied more than once when the call returns.
    AtLeastOnce,
}

/// A server since it was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Server {
    pub(crate) system_identifier: u64,
    pub(crate) timeline: u32,
    /// When its postmaster was started, in microseconds since 1970.
    pub(crate) started_at: i64,
}

/// A server as the pool has verified it: which one, and in which of its lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Life {
    pub(crate) server: Server,
    /// Where replay ended, when it was promoted or recovered from a crash; `None` after a clean start. A crash of one backend
    /// moves it, and nothing else that can be seen.
    pub(crate) replayed: Option<Lsn>,
    /// When its statistics were reset, where that tells of crashes: from PostgreSQL 15 on they survive a clean restart and no
    /// crash (`pgstat_discard_stats` in `xlog.c`).
    pub(crate) stats_reset: Option<i64>,
}

impl Life {
    /// Statistics can be reset by hand.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.server == other.server && self.replayed == other.replayed
    }
}

/// What a transaction left behind when it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Marker {
    /// The server it began on, as it was then.
    pub(crate) life: Life,
    /// The transaction's id, of which there is one at a time in one history.
    pub(crate) xid: u64,
    /// The end of a WAL record that carries the id. The commit record, if there is one, lies behind it.
    pub(crate) lsn: Lsn,
}

/// What the primary says when it is asked about a marker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Now {
    pub(crate) life: Life,
    /// Up to where it received WAL as a standby; `None` if it was not one since its memory was set up last.
    pub(crate) received: Option<Lsn>,
    /// How many primaries the pool has seen since BEGIN, the same server after a restart included.
    pub(crate) primaries_since: u64,
}

/// What the server's record of transactions has to do with the marker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Located {
    /// The marker is in this server's history, so its id means this transaction: `pg_xact_status` decides.
    Here,
    /// The marker is not in this server's history, and so the commit is not: the id may be somebody else's by now.
    Lost,
    /// Neither can be shown.
    Unclear(Unsettled),
}

/// What `pg_xact_status` says of an id that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum XactStatus {
    InProgress,
    Committed,
    Aborted,
    /// So old that the server has forgotten it.
    Forgotten,
}

/// What became of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    Committed,
    /// It is not, and never will be.
    NotCommitted,
    /// Ask again.
    InProgress,
    Unknown(Unsettled),
}

/// Why the outcome of a COMMIT cannot be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Unsettled {
    /// The call does not settle: its guarantee is [`Guarantee::AtMostOnce`](crate::Guarantee::AtMostOnce), or the server
    /// lacks what settling needs, see [`Status::fallback`](crate::Status::fallback).
    #[error("the transaction left no mark to ask the server by")]
    NoMarker,
    /// More than one crash or failover since BEGIN.
    #[error("there was more than one crash or failover since it began")]
    SeveralFailovers,
    /// The server was shut down and started since BEGIN, and does not show whether it had crashed before: PostgreSQL 14 and
    /// older never do. Or it was promoted and crashed or was restarted afterwards.
    #[error("the server was restarted since it began, and no longer shows whether it had lost anything")]
    Restarted,
    /// The primary's timeline has the number of the transaction's, or a lower one, and is another.
    #[error("the primary's timeline is not a continuation of the one that it began on")]
    OtherHistory,
    /// The primary belongs to another cluster.
    #[error("the primary belongs to another cluster than the one that it began on")]
    OtherCluster,
    /// The server has forgotten so old a transaction.
    #[error("the server has forgotten so old a transaction")]
    Forgotten,
    /// Until the deadline the server was still committing it, perhaps waiting for a synchronous standby.
    #[error("it was still in progress at the deadline: look whether COMMIT waits for a synchronous standby")]
    InProgress,
    /// What the primary says of it was not confirmed by a synchronous standby until the deadline, and may not outlast the
    /// primary.
    #[error("what the primary says of it had not been confirmed by a synchronous standby at the deadline")]
    NotReplicated,
    /// Until the deadline there was no primary that answered.
    #[error("there was no primary that answered before the deadline")]
    NoPrimary,
    /// The primary does not answer the question: a missing function, right or table.
    #[error("the primary refuses to tell: it lacks a function, a right or the ledger's table")]
    NotOffered,
    /// The ledger may have been pruned of it.
    #[error("it began too long ago for the ledger to tell")]
    TooOld,
}

/// Is the marker in the history of the server that says `now`?
pub(crate) fn locate(marker: &Marker, now: &Now) -> Located {
    if now.life.is(&marker.life) {
        return Located::Here;
    }
    let (then, server) = (marker.life.server, now.life.server);
    if then.system_identifier != server.system_identifier {
        return Located::Unclear(Unsettled::OtherCluster);
    }
    if now.primaries_since > 1 {
        return Located::Unclear(Unsettled::SeveralFailovers);
    }
    let promoted = match server.timeline.checked_sub(then.timeline) {
        Some(0) => false,
        Some(1) => true,
        Some(_) => return Located::Unclear(Unsettled::SeveralFailovers),
        None => return Located::Unclear(Unsettled::OtherHistory),
    };
    // A standby that did not know of the marker's timeline was promoted to one with the same number.
    if !promoted && now.received.is_some() {
        return Located::Unclear(Unsettled::OtherHistory);
    }
    let (stats_then, stats_now) = (marker.life.stats_reset, now.life.stats_reset);
    match now.life.replayed {
        // It was shut down and started, and lost nothing: in between it has not crashed.
        None if !promoted && stats_now.is_some() && stats_now == stats_then => Located::Here,
        None => Located::Unclear(Unsettled::Restarted),
        Some(replayed) if replayed < marker.lsn => Located::Lost,
        // It may have crashed after its promotion: then this is the end of that recovery, and behind what it took over.
        Some(_) if promoted && now.received.is_none() => Located::Unclear(Unsettled::Restarted),
        Some(_) => Located::Here,
    }
}

impl From<XactStatus> for Settled {
    /// For an id that was located [`Here`](Located::Here).
    fn from(status: XactStatus) -> Self {
        match status {
            XactStatus::InProgress => Self::InProgress,
            XactStatus::Committed => Self::Committed,
            XactStatus::Aborted => Self::NotCommitted,
            XactStatus::Forgotten => Self::Unknown(Unsettled::Forgotten),
        }
    }
}

/// What the row with the transaction's id in the ledger is, once the settler has tried to insert it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// The transaction's own: it was committed with it.
    Own,
    /// A settler's. The transaction cannot commit any more, as its own row would be the second of this id.
    Fence,
}

/// What the entry says of a transaction that began `age` ago, by the server's clock. Its own row is pruned when it is older
/// than `keep`, and a fence goes in where there is none; the other half is for the clocks of two servers that differ.
pub(crate) fn settle_entry(entry: Entry, age: Duration, keep: Duration) -> Settled {
    match entry {
        Entry::Own => Settled::Committed,
        Entry::Fence if age > keep / 2 => Settled::Unknown(Unsettled::TooOld),
        Entry::Fence => Settled::NotCommitted,
    }
}
