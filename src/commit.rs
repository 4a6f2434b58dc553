//! Decides whether a transaction whose COMMIT was not answered has been committed. The input is what the transaction
//! left behind at BEGIN and what the primary says now. The result is a [`SettleVerdict`]. This module knows nothing of
//! sessions, pools and time.
//!
//! Invariant: if the result is [`SettleVerdict::Committed`] or [`SettleVerdict::NotCommitted`], it is true. With
//! [`Proof::Function`] this needs no assumption about failovers. Without it, the pool must have seen each crash that
//! loses the mark. If the outcome cannot be proved, the result is [`Unsettled`]. docs/exactly-once.md has the argument.
//! The I/O is in `settle`. The tests are `commit/tests.rs`, with a model of servers that crash, lose WAL and reuse
//! transaction ids.

mod ancestry;
mod ledger;
#[cfg(test)]
mod tests;

use std::fmt;
use std::time::Duration;

use crate::topology::{Evidence, Lsn};
pub(crate) use ancestry::Ancestry;
pub use ledger::Ledger;

/// What a call promises if the connection is lost between COMMIT and its answer.
///
/// If a failure comes before COMMIT is sent, or the server refuses COMMIT, the work was not committed, and it runs
/// again under each of these guarantees.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Guarantee {
    /// The pool asks the new primary whether the transaction is in its history, and runs the work again if it is not.
    /// The pool asks by a mark that the transaction wrote to the write-ahead log at BEGIN. This needs no schema, and
    /// works with unmodified PostgreSQL 13 and newer. If a server does not offer what is needed, the guarantee is
    /// [`AtMostOnce`](Self::AtMostOnce), and [`Status::fallback`](crate::view::Status::fallback) says why.
    ///
    /// How many crashes and failovers may come between BEGIN and the question depends on what the role may read: see
    /// [`Status::evidence`](crate::view::Status::evidence). With the function of `sql/history.sql` it may be any
    /// number, and without it only one. After more, the call fails with
    /// [`Error::CommitUnknown`](crate::Error::CommitUnknown).
    #[default]
    ExactlyOnce,
    /// Like `ExactlyOnce`, but the pool settles commits by a table. This works after any number of failovers, and costs
    /// one row per transaction.
    Ledger(Ledger),
    /// The call fails with [`Error::CommitUnknown`](crate::Error::CommitUnknown): the work was applied once or not at
    /// all.
    AtMostOnce,
    /// The work is run again, so it may have been applied more than once when the call returns.
    AtLeastOnce,
}

/// More bytes than two checkpoint records have. One has about 120.
const TWO_CHECKPOINTS: u64 = 512;

/// A server since its postmaster was started. A [`Life`] is shorter: the recovery from a crash begins a new one, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Server {
    pub(crate) system_identifier: u64,
    pub(crate) timeline: u32,
    /// When its postmaster was started, in microseconds since 1970.
    pub(crate) started_at: i64,
}

/// A server as the pool has verified it, in one of its lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Life {
    pub(crate) server: Server,
    /// Where replay ended when it was promoted or recovered from a crash; `None` after a clean start. The crash of one
    /// backend changes this, and nothing else that can be seen.
    pub(crate) replayed: Option<Lsn>,
    /// When its statistics were reset, if that shows crashes: from PostgreSQL 15 on, statistics survive a clean restart
    /// but no crash (`pgstat_discard_stats` in `xlog.c`).
    pub(crate) stats_reset: Option<i64>,
    /// The timeline of this server's last checkpoint, if that is older than the server's own timeline. It shows that
    /// the server followed that timeline, was promoted, and has not crashed since. `None` once a checkpoint on its own
    /// timeline is complete.
    pub(crate) ancestor: Option<u32>,
}

impl Life {
    /// Compares lives without the statistics, which can be reset by hand.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.server == other.server && self.replayed == other.replayed
    }
}

/// A random number in the mark of one transaction. If a crash loses transaction ids and WAL positions, the server uses
/// them again, but no other mark has the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Nonce(pub(crate) u128);

impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// The ids and outcomes of transactions that a pool runs when it first writes on a primary. They have no effect, and
/// are committed and rolled back in a random pattern. A history that continues the primary's contains the same ids with
/// the same outcomes. It is practically impossible that another history does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Signature(pub(crate) Vec<(u64, bool)>);

/// What a transaction leaves behind when it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WalMark {
    /// The server on which it began, in its life at that time.
    pub(crate) life: Life,
    /// The transaction's id, which is unique within one history.
    pub(crate) xid: u64,
    /// The end of a WAL record that carries the id and the nonce. The commit record, if there is one, comes after it.
    pub(crate) lsn: Lsn,
    pub(crate) nonce: Nonce,
}

/// What the primary says when it is asked about a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Now {
    pub(crate) life: Life,
    /// The position up to which it received WAL as a standby, or replayed its own WAL. `None` if nothing shows that it
    /// has been a standby since its shared memory was last set up.
    pub(crate) received: Option<Lsn>,
    /// The position of its last checkpoint, if a shutdown or a recovery wrote that checkpoint, and the last replay
    /// ended right behind it.
    pub(crate) stopped: Option<Lsn>,
    /// How many primaries the pool has seen since BEGIN. The same server after a restart counts again.
    pub(crate) primaries_since: u64,
}

/// What the primary shows about the history of its WAL besides [`Now`], depending on its [`Evidence`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Proof {
    /// Only what every role may read.
    #[default]
    Nothing,
    /// Whether a file in `pg_wal` belongs to the mark's timeline.
    Files { followed: bool },
    /// Whether the transactions of the [`Signature`] have its outcomes here.
    Signature { found: bool },
    /// The ancestors of the timeline, and what is in the WAL itself.
    Function { ancestry: Ancestry, sighting: Sighting },
}

/// What is in the WAL where the mark was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sighting {
    /// The mark.
    Mark,
    /// Something else, or the WAL ends before that position.
    Other,
    /// The WAL reaches that position, but it is not on the disk yet.
    NotYet,
    /// The segment has been recycled.
    Recycled,
}

/// Whether the server can be asked about the mark's transaction by its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Located {
    /// The mark is in this server's history, so its id means this transaction: `pg_xact_status` decides.
    Here,
    /// The mark is not in this server's history, and so neither is the commit. The id may belong to another
    /// transaction now.
    Lost,
    /// The server cannot say yet. Ask again in a moment.
    NotYet,
    /// It cannot be proved whether the mark is in this server's history.
    Unclear(Unsettled),
}

/// What `pg_xact_status` says about an id that has been given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum XactStatus {
    InProgress,
    Committed,
    Aborted,
    /// The transaction is so old that the server has forgotten it.
    Forgotten,
}

/// The outcome of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SettleVerdict {
    Committed,
    /// It is not committed, and never will be.
    NotCommitted,
    /// Ask again.
    InProgress,
    Unknown(Unsettled),
}

/// Why the outcome of a COMMIT is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Unsettled {
    /// The call does not settle commits: its guarantee is [`Guarantee::AtMostOnce`](crate::Guarantee::AtMostOnce), or
    /// the server lacks what settling needs, see [`Status::fallback`](crate::view::Status::fallback).
    #[error("the transaction left no mark to ask the server by")]
    NoMark,
    /// There was more than one crash or failover since BEGIN, and the server does not show its WAL: see
    /// [`Status::evidence`](crate::view::Status::evidence).
    #[error("there was more than one crash or failover since it began: sql/history.sql lets such outcomes be settled")]
    SeveralFailovers,
    /// The primary does not show that its timeline continues the transaction's: see
    /// [`Status::evidence`](crate::view::Status::evidence).
    #[error(
        "the primary does not show that its timeline continues the one that it began on: sql/history.sql lets the \
         pool see it, and up to PostgreSQL 16 so does the role pg_monitor"
    )]
    Unproven,
    /// The server was shut down and started since BEGIN, and does not show whether it had crashed before, which
    /// PostgreSQL 14 and older never show. Or it was promoted, and may have crashed or been restarted afterwards. See
    /// [`Status::evidence`](crate::view::Status::evidence).
    #[error(
        "the server was restarted since it began, and no longer shows whether it had lost anything: sql/history.sql \
         lets such outcomes be settled"
    )]
    Restarted,
    /// The primary's timeline has the same number as the transaction's, or a lower one, but is a different timeline.
    #[error("the primary's timeline is not a continuation of the one that it began on")]
    OtherHistory,
    /// The primary belongs to another cluster.
    #[error("the primary belongs to another cluster than the one that it began on")]
    OtherCluster,
    /// The transaction is so old that the server has forgotten it.
    #[error("the transaction is so old that the server has forgotten it: make transactions shorter")]
    Forgotten,
    /// The server was still committing it at the deadline, perhaps because it waited for a synchronous standby.
    #[error("it was still in progress at the deadline: look whether COMMIT waits for a synchronous standby")]
    InProgress,
    /// By the deadline, no synchronous standby had confirmed what the primary says about the transaction. If the
    /// primary fails, its successor may say something else.
    #[error("what the primary says of it had not been confirmed by a synchronous standby at the deadline")]
    NotReplicated,
    /// No primary answered before the deadline.
    #[error(
        "there was no primary that answered before the deadline: raise `RetryPolicy::deadline` above the length of \
         your failover"
    )]
    NoPrimary,
    /// The pool was closed, or its runtime ended, before a primary had told.
    #[error("the pool was closed, or its runtime ended, before a primary had told")]
    Closed,
    /// The primary answered the question with an error each time, such as that its disk is full. The log has the error,
    /// at level `debug`.
    #[error("the primary answered the question with an error until the deadline: the log has it, at level `debug`")]
    Failed,
    /// The primary does not answer the question, because a function, a privilege or the table is missing.
    #[error(
        "the primary refuses to tell: it lacks a function, a right or the ledger's table, or the ledger proves nothing \
         because it is UNLOGGED or a trigger changes its rows"
    )]
    NotOffered,
    /// The transaction's row may already have been pruned from the ledger.
    #[error("it began too long ago for the ledger to tell: make transactions shorter, or `Ledger::keep` longer")]
    TooOld,
}

/// Returns whether the decision needs more than what every role may read, and the server shows more.
pub(crate) fn wants_proof(mark: &WalMark, now: &Now, evidence: Evidence) -> bool {
    if now.life.is(&mark.life) {
        return false;
    }
    match (evidence, locate(mark, now, &Proof::Nothing)) {
        (_, Located::Lost | Located::Unclear(Unsettled::OtherCluster)) | (Evidence::Checkpoint, _) => false,
        (Evidence::Function, _) => true,
        (Evidence::Files, located) => located == Located::Unclear(Unsettled::Unproven),
    }
}

/// Finds out whether the mark is in the history of the server that says `now`.
pub(crate) fn locate(mark: &WalMark, now: &Now, proof: &Proof) -> Located {
    if now.life.is(&mark.life) {
        return Located::Here;
    }
    let (then, server) = (mark.life.server, now.life.server);
    if then.system_identifier != server.system_identifier {
        return Located::Unclear(Unsettled::OtherCluster);
    }
    if let Proof::Function { sighting, .. } = proof {
        match sighting {
            Sighting::Mark => return Located::Here,
            Sighting::Other if planted!("ignores what is in the log") => return Located::Here,
            Sighting::Other => return Located::Lost,
            Sighting::NotYet => return Located::NotYet,
            Sighting::Recycled => {}
        }
    }
    if server.timeline < then.timeline || is_another_of_this_number(mark, now) {
        return Located::Unclear(Unsettled::OtherHistory);
    }
    // The mark comes after the end of the last replay. This life of the server wrote everything from there on, but an
    // earlier life wrote the mark. So the mark is not there any more.
    if now.life.replayed.is_some_and(|replayed| replayed < mark.lsn) {
        return Located::Lost;
    }
    match proof {
        _ if server.timeline == then.timeline => restarted(mark, now),
        Proof::Function { ancestry, .. } => descended(mark, now, ancestry),
        Proof::Files { followed: shown } | Proof::Signature { found: shown } => promoted(mark, now, *shown),
        Proof::Nothing => promoted(mark, now, false),
    }
}

/// Two servers may be promoted to timelines with the same number. If a server on the mark's timeline was promoted in
/// its present life, it is not the server on which the mark was written, because that one had been promoted before.
fn is_another_of_this_number(mark: &WalMark, now: &Now) -> bool {
    let promoted = now.received.is_some() || now.life.ancestor.is_some();
    now.life.server.timeline == mark.life.server.timeline && promoted
}

/// Decides for a later life of the server on the mark's timeline. If the server has crashed only once, it has not
/// lost the mark.
fn restarted(mark: &WalMark, now: &Now) -> Located {
    let (before, after) = (mark.life.stats_reset, now.life.stats_reset);
    if before.is_some() && before == after {
        // The statistics survived, so the server has never crashed since, and has lost nothing.
        return Located::Here;
    }
    match now.life.replayed {
        _ if now.primaries_since > 1 => Located::Unclear(Unsettled::SeveralFailovers),
        Some(_) => Located::Here,
        None => Located::Unclear(Unsettled::Restarted),
    }
}

/// Decides for a server on a newer timeline that does not show its history. The mark is here if the server's timeline
/// follows directly on the mark's, and if replay ended where the mark's timeline ended.
fn promoted(mark: &WalMark, now: &Now, followed: bool) -> Located {
    let then = mark.life.server.timeline;
    if now.primaries_since > 1 || now.life.server.timeline - then > 1 {
        return Located::Unclear(Unsettled::SeveralFailovers);
    }
    // Each history begins with timeline 1, so only the other timelines need a proof.
    if then > 1 && now.life.ancestor != Some(then) && !followed {
        return Located::Unclear(Unsettled::Unproven);
    }
    // If the server has crashed after its promotion, `replayed` is the end of the crash recovery. One of three facts
    // rules that out. If the statistics survived, the server was shut down cleanly and then started as a standby,
    // because crash recovery would have reset them.
    let stats_survived = now.life.stats_reset.is_some() && now.life.stats_reset == mark.life.stats_reset;
    let not_crashed_since = now.received.is_some() || now.life.ancestor.is_some() || stats_survived;
    match now.life.replayed {
        Some(_) if not_crashed_since && !may_be_lost_unseen(mark, now) => Located::Here,
        _ => Located::Unclear(Unsettled::Restarted),
    }
}

/// Returns whether a crash recovery that no client saw may have lost the mark. Such a recovery and the shutdown after
/// it write one checkpoint each, and the server has kept all WAL before these two. So a mark well before them cannot
/// be lost.
fn may_be_lost_unseen(mark: &WalMark, now: &Now) -> bool {
    let stats_survived = now.life.stats_reset.is_some() && now.life.stats_reset == mark.life.stats_reset;
    !stats_survived && now.stopped.is_some_and(|stopped| mark.lsn.get() + TWO_CHECKPOINTS > stopped.get())
}

/// Decides for a server on a newer timeline that shows its history, but not the WAL at the mark. A crash on the
/// mark's timeline may have lost the mark. If there was one promotion, and the pool has seen one new primary, there
/// was no such crash.
fn descended(mark: &WalMark, now: &Now, ancestry: &Ancestry) -> Located {
    let then = mark.life.server.timeline;
    match ancestry.end_of(then) {
        None => Located::Lost,
        Some(end) if end < mark.lsn => Located::Lost,
        Some(_) if may_be_lost_unseen(mark, now) => Located::Unclear(Unsettled::Restarted),
        Some(_) if now.primaries_since <= 1 && ancestry.promotions_since(then) == 1 => Located::Here,
        Some(_) => Located::Unclear(Unsettled::SeveralFailovers),
    }
}

/// Decides what became of the transaction. `status` is what the server says about its id; `None` means that the server
/// has not given out the id yet.
///
/// If the mark is in the history, the server's next id is greater than the mark's. So if the id was not given out yet,
/// the mark is missing, whatever else is unknown. If `located` nevertheless says that the mark is here, an assumption
/// of the rule does not hold, and the outcome is unknown.
pub(crate) fn settle(located: Located, status: Option<XactStatus>) -> SettleVerdict {
    use Unsettled::{OtherHistory, Restarted, SeveralFailovers, Unproven};
    seen!("settle", "{located:?} {status:?}");
    match (located, status) {
        (Located::Here, Some(status)) => status.into(),
        (Located::Here, None) => SettleVerdict::Unknown(OtherHistory),
        (Located::Lost, _) | (Located::Unclear(Restarted | SeveralFailovers | Unproven), None) => {
            SettleVerdict::NotCommitted
        }
        (Located::NotYet, _) => SettleVerdict::InProgress,
        (Located::Unclear(_), _) if planted!("guesses that it was not committed") => SettleVerdict::NotCommitted,
        (Located::Unclear(why), _) => SettleVerdict::Unknown(why),
    }
}

impl From<XactStatus> for SettleVerdict {
    /// Valid only for an id that was located [`Here`](Located::Here).
    fn from(status: XactStatus) -> Self {
        match status {
            XactStatus::InProgress => Self::InProgress,
            XactStatus::Committed => Self::Committed,
            XactStatus::Aborted => Self::NotCommitted,
            XactStatus::Forgotten => Self::Unknown(Unsettled::Forgotten),
        }
    }
}

/// Whose row the ledger contains under the transaction's id, after a settler has tried to insert its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LedgerEntry {
    /// The transaction's own row, which was committed with it.
    Own,
    /// A settler's row. The transaction can no longer commit, because its own row would be a duplicate.
    Fence,
}

/// Decides by the entry what became of a transaction that began `age` ago, by the server's clock. The transaction's own
/// row may be pruned once it is older than `keep`, and then a settler would insert a fence. So a fence is trusted only
/// for half of that time. The other half allows for differences between the clocks of two servers.
pub(crate) fn settle_entry(entry: LedgerEntry, age: Duration, keep: Duration) -> SettleVerdict {
    seen!("ledger", "{entry:?}, old: {}", age > keep / 2);
    match entry {
        LedgerEntry::Fence if planted!("takes a fence for the work's own row") => SettleVerdict::Committed,
        LedgerEntry::Own if planted!("takes the work's own row for a fence") => SettleVerdict::NotCommitted,
        LedgerEntry::Own => SettleVerdict::Committed,
        LedgerEntry::Fence if age > keep / 2 => SettleVerdict::Unknown(Unsettled::TooOld),
        LedgerEntry::Fence => SettleVerdict::NotCommitted,
    }
}
