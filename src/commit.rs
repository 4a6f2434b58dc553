//! Decides whether a transaction whose COMMIT was not answered has been committed: what the transaction left behind at
//! BEGIN, and what the primary says now → a [`Settled`]. Knows nothing of sessions, pools and time.
//!
//! Invariant: [`Settled::Committed`] and [`Settled::NotCommitted`] are true. With [`Proof::Function`] this needs no
//! assumption about failovers; without it, a crash that loses the mark must be one that the pool saw. What cannot be told is
//! [`Unsettled`]. docs/exactly-once.md has the argument. The I/O is in `settle`. Tests: `commit/tests.rs`, with
//! a model of servers that crash, lose WAL and reuse transaction ids.

mod ancestry;
mod ledger;
#[cfg(test)]
mod tests;

use std::fmt;
use std::time::Duration;

use crate::topology::{Evidence, Lsn};
pub(crate) use ancestry::Ancestry;
pub use ledger::Ledger;

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
    /// How many crashes and failovers between BEGIN and the question it settles depends on what the role may read:
    /// [`Status::evidence`](crate::Status::evidence). With the function of `sql/history.sql` any number; without it one. After
    /// more, the call fails with [`Error::CommitUnknown`](crate::Error::CommitUnknown).
    #[default]
    ExactlyOnce,
    /// As `ExactlyOnce`, settled by a table: exact under any number of failovers, and one row to write for each transaction.
    Ledger(Ledger),
    /// The call fails with [`Error::CommitUnknown`](crate::Error::CommitUnknown): applied once or not at all.
    AtMostOnce,
    /// The work is run again: it may have been applied more than once when the call returns.
    AtLeastOnce,
}

/// In bytes, and generously: a checkpoint's record has some 120.
const TWO_CHECKPOINTS: u64 = 512;

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
    /// An older timeline of which this server's last checkpoint was, as long as it has completed none of its own timeline:
    /// so it followed that one, was promoted, and has not crashed since.
    pub(crate) ancestor: Option<u32>,
}

impl Life {
    /// Statistics can be reset by hand.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.server == other.server && self.replayed == other.replayed
    }
}

/// A word that no other transaction has in its mark. An id and a position are given out again when a crash has lost them;
/// this is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Nonce(pub(crate) u128);

impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Transactions without any effect that a pool makes when it first writes on a primary, committed and rolled back in a random
/// pattern. Their ids, with just these outcomes, are in a history that continues the primary's, and by no chance in another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Signature(pub(crate) Vec<(u64, bool)>);

/// What a transaction left behind when it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Marker {
    /// The server it began on, as it was then.
    pub(crate) life: Life,
    /// The transaction's id, of which there is one at a time in one history.
    pub(crate) xid: u64,
    /// The end of a WAL record that carries the id and the nonce. The commit record, if there is one, lies behind it.
    pub(crate) lsn: Lsn,
    pub(crate) nonce: Nonce,
}

/// What the primary says when it is asked about a marker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Now {
    pub(crate) life: Life,
    /// Up to where it received WAL as a standby, or replayed its own; `None` if it does not show that it was one since its
    /// memory was set up last.
    pub(crate) received: Option<Lsn>,
    /// Its last checkpoint, if that ended a shutdown or a recovery and the last replay ended right behind it.
    pub(crate) stopped: Option<Lsn>,
    /// How many primaries the pool has seen since BEGIN, the same server after a restart included.
    pub(crate) primaries_since: u64,
}

/// What the primary shows of the history of its log beyond [`Now`], by its [`Evidence`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Proof {
    /// No more than every role may read.
    #[default]
    Nothing,
    /// Whether a file in `pg_wal` is of the marker's timeline.
    Files { followed: bool },
    /// Whether the transactions of the [`Signature`] have its outcomes.
    Signature { borne: bool },
    /// The ancestors of the timeline, and the log itself.
    Function { ancestry: Ancestry, sighting: Sighting },
}

/// What is in the log where the marker was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sighting {
    /// The marker.
    Marker,
    /// Something else; or the log does not reach so far.
    Other,
    /// The log reaches so far, but is not on the disk yet.
    NotYet,
    /// The segment has been recycled.
    Recycled,
}

/// What the server's record of transactions has to do with the marker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Located {
    /// The marker is in this server's history, so its id means this transaction: `pg_xact_status` decides.
    Here,
    /// The marker is not in this server's history, and so the commit is not: the id may be somebody else's by now.
    Lost,
    /// It can be told in a moment.
    NotYet,
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
    /// More than one crash or failover since BEGIN, and the server does not show its log: see
    /// [`Status::evidence`](crate::Status::evidence).
    #[error("there was more than one crash or failover since it began: sql/history.sql lets such outcomes be settled")]
    SeveralFailovers,
    /// The primary does not show that its timeline continues the one of the transaction: see
    /// [`Status::evidence`](crate::Status::evidence).
    #[error(
        "the primary does not show that its timeline continues the one that it began on: sql/history.sql or the role \
         pg_monitor lets the pool see it"
    )]
    Unproven,
    /// The server was shut down and started since BEGIN, and does not show whether it had crashed before: PostgreSQL 14 and
    /// older never do. Or it was promoted, and may have crashed or been restarted afterwards. See
    /// [`Status::evidence`](crate::Status::evidence).
    #[error(
        "the server was restarted since it began, and no longer shows whether it had lost anything: sql/history.sql lets \
         such outcomes be settled"
    )]
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

/// Does the answer depend on more than every role may read, and does the server show it?
pub(crate) fn wants_proof(marker: &Marker, now: &Now, evidence: Evidence) -> bool {
    if now.life.is(&marker.life) {
        return false;
    }
    match (evidence, locate(marker, now, &Proof::Nothing)) {
        (_, Located::Lost | Located::Unclear(Unsettled::OtherCluster)) | (Evidence::Checkpoint, _) => false,
        (Evidence::Function, _) => true,
        (Evidence::Files, located) => located == Located::Unclear(Unsettled::Unproven),
    }
}

/// Is the marker in the history of the server that says `now`?
pub(crate) fn locate(marker: &Marker, now: &Now, proof: &Proof) -> Located {
    if now.life.is(&marker.life) {
        return Located::Here;
    }
    let (then, server) = (marker.life.server, now.life.server);
    if then.system_identifier != server.system_identifier {
        return Located::Unclear(Unsettled::OtherCluster);
    }
    if let Proof::Function { sighting, .. } = proof {
        match sighting {
            Sighting::Marker => return Located::Here,
            Sighting::Other => return Located::Lost,
            Sighting::NotYet => return Located::NotYet,
            Sighting::Recycled => {}
        }
    }
    if server.timeline < then.timeline || is_another_of_this_number(marker, now) {
        return Located::Unclear(Unsettled::OtherHistory);
    }
    // What lies behind the end of the last replay was written by the life that answers, and the marker by another one.
    if now.life.replayed.is_some_and(|replayed| replayed < marker.lsn) {
        return Located::Lost;
    }
    match proof {
        _ if server.timeline == then.timeline => restarted(marker, now),
        Proof::Function { ancestry, .. } => descended(marker, now, ancestry),
        Proof::Files { followed: shown } | Proof::Signature { borne: shown } => promoted(marker, now, *shown),
        Proof::Nothing => promoted(marker, now, false),
    }
}

/// Two servers may have been promoted to timelines of one number. A server on the marker's timeline that was promoted in the
/// life that answers is not the server that the marker was written on: that one had been promoted before.
fn is_another_of_this_number(marker: &Marker, now: &Now) -> bool {
    let promoted = now.received.is_some() || now.life.ancestor.is_some();
    now.life.server.timeline == marker.life.server.timeline && promoted
}

/// The marker's timeline goes on, in another life of its server, which has not lost the marker if it crashed once.
fn restarted(marker: &Marker, now: &Now) -> Located {
    let (before, after) = (marker.life.stats_reset, now.life.stats_reset);
    if before.is_some() && before == after {
        // However often it was started, it never crashed, and so has lost nothing.
        return Located::Here;
    }
    match now.life.replayed {
        _ if now.primaries_since > 1 => Located::Unclear(Unsettled::SeveralFailovers),
        Some(_) => Located::Here,
        None => Located::Unclear(Unsettled::Restarted),
    }
}

/// The server is on a newer timeline. Shown without its history: the marker's timeline is the one before it, and replay
/// ended where that one did.
fn promoted(marker: &Marker, now: &Now, followed: bool) -> Located {
    let then = marker.life.server.timeline;
    if now.primaries_since > 1 || now.life.server.timeline - then > 1 {
        return Located::Unclear(Unsettled::SeveralFailovers);
    }
    // Each history begins with timeline 1.
    if then > 1 && now.life.ancestor != Some(then) && !followed {
        return Located::Unclear(Unsettled::Unproven);
    }
    // Otherwise it may have crashed after its promotion: then this is the end of that recovery. Statistics that survived were
    // left by a clean shutdown, and so it was started as a standby: the recovery of a crash would have reset them.
    let stats_survived = now.life.stats_reset.is_some() && now.life.stats_reset == marker.life.stats_reset;
    let not_crashed_since = now.received.is_some() || now.life.ancestor.is_some() || stats_survived;
    match now.life.replayed {
        Some(_) if not_crashed_since && !may_be_lost_unseen(marker, now) => Located::Here,
        _ => Located::Unclear(Unsettled::Restarted),
    }
}

/// A recovery that nobody saw, followed by a shutdown, ends with two checkpoints. What lies before both it has kept.
fn may_be_lost_unseen(marker: &Marker, now: &Now) -> bool {
    let stats_survived = now.life.stats_reset.is_some() && now.life.stats_reset == marker.life.stats_reset;
    !stats_survived && now.stopped.is_some_and(|stopped| marker.lsn.get() + TWO_CHECKPOINTS > stopped.get())
}

/// The server is on a newer timeline, and shows its history, but not the log at the marker. A crash on the marker's timeline
/// may have lost it: the pool has seen none if there was one promotion and it has seen that and nothing else.
fn descended(marker: &Marker, now: &Now, ancestry: &Ancestry) -> Located {
    let then = marker.life.server.timeline;
    match ancestry.end_of(then) {
        None => Located::Lost,
        Some(end) if end < marker.lsn => Located::Lost,
        Some(_) if may_be_lost_unseen(marker, now) => Located::Unclear(Unsettled::Restarted),
        Some(_) if now.primaries_since <= 1 && ancestry.promotions_since(then) == 1 => Located::Here,
        Some(_) => Located::Unclear(Unsettled::SeveralFailovers),
    }
}

/// What became of the transaction. `status`: what the server says of its id; `None`: it has given out no such id yet.
///
/// Where the mark is in the history, the server has moved its next id beyond the mark's. So an id that was not given out
/// proves that the mark is not there, whatever else cannot be shown. If the mark seems to be there all the same, something
/// that the rule assumes does not hold.
pub(crate) fn settle(located: Located, status: Option<XactStatus>) -> Settled {
    use Unsettled::{OtherHistory, Restarted, SeveralFailovers, Unproven};
    match (located, status) {
        (Located::Here, Some(status)) => status.into(),
        (Located::Here, None) => Settled::Unknown(OtherHistory),
        (Located::Lost, _) | (Located::Unclear(Restarted | SeveralFailovers | Unproven), None) => Settled::NotCommitted,
        (Located::NotYet, _) => Settled::InProgress,
        (Located::Unclear(why), _) => Settled::Unknown(why),
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
