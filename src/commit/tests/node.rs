//! One server of the model: its log, its timelines and its transaction ids, what it says about them, and what is true.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

/// Distinguishes transactions that got the same id.
pub(super) type Token = u64;

/// The id of the first transaction of each world.
pub(super) const FIRST_XID: u64 = 728;

/// A WAL record. The serial number distinguishes records of two branches that are otherwise equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) serial: u64,
    pub(super) what: What,
}

impl Record {
    /// The transaction that ends with this record.
    pub(super) fn token(&self) -> Option<Token> {
        match self.what {
            What::Commit { token, .. } | What::Abort { token, .. } => Some(token),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// A client's mark.
    Mark {
        xid: u64,
        nonce: Nonce,
    },
    /// Any other record of a transaction with this id.
    Data {
        xid: u64,
    },
    Commit {
        xid: u64,
        token: Token,
    },
    Abort {
        xid: u64,
        token: Token,
    },
    /// The end of recovery at a promotion. Like the checkpoint after a crash, it is flushed before the server accepts
    /// work. So no two recoveries end at the same position, and the rule distinguishes a server's lives by that
    /// position.
    EndOfRecovery {
        next_xid: u64,
    },
    Checkpoint {
        next_xid: u64,
        timeline: u32,
        /// The position up to which the server continues what it had before. The server shows this while the checkpoint
        /// is the last one.
        stopped: Option<Lsn>,
    },
}

/// The signature of a timeline: the ids of the pool's transactions, whether they were committed, and their tokens.
pub(super) type Signed = [(u64, bool, Token); SIGNED_BY];

/// A real pool signs with far more transactions. [`Node::bears`] excludes the case that all of these have the right
/// outcome by chance.
pub(super) const SIGNED_BY: usize = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Primary,
    Standby,
    StoppedPrimary { clean: bool },
    StoppedStandby,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Running {
    pub(super) token: Token,
    /// Its commit record is written. It waits for the flush, or for a synchronous standby.
    pub(super) committing: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Node {
    /// All records since the beginning. Positions are counted in records. After a fork, two servers have the first part
    /// in common.
    pub(super) wal: Vec<Record>,
    pub(super) flushed: usize,
    pub(super) role: Role,
    pub(super) upstream: Option<usize>,
    pub(super) identity: Server,
    pub(super) replayed: Option<Lsn>,
    pub(super) received: Option<Lsn>,
    /// When the statistics were reset.
    pub(super) stats_reset: i64,
    /// The next transaction id. A crash loses it, and the running transactions.
    pub(super) next_xid: u64,
    pub(super) running: BTreeMap<u64, Running>,
    /// The number of this server's last promotion, counted in the whole world. It shows which primary is newer, and
    /// whether a server was something else in between.
    pub(super) term: u64,
    pub(super) ancestry: Vec<(u32, Lsn)>,
    /// The timeline of the last checkpoint, as the control file has it.
    pub(super) checkpointed: u32,
    /// The timelines whose history files are in its `pg_wal`: its own, and those that it was sent, even if it could not
    /// follow them.
    pub(super) histories: BTreeSet<u32>,
    /// The timelines that have segments in its `pg_wal`.
    pub(super) segments: BTreeSet<u32>,
    /// The records before this position are in segments that were recycled.
    pub(super) recycled: usize,
    /// The server was restarted on its own log, as a standby without a sender.
    pub(super) alone: bool,
    /// The `stopped` position of the last checkpoint, if the last replay ended right behind it. See
    /// [`What::Checkpoint`].
    pub(super) stopped: Option<Lsn>,
    /// The pool's signature of its timeline in this life.
    pub(super) signed: Option<Signed>,
}

impl Node {
    /// The values by which a pool distinguishes one primary from the next.
    pub(super) fn seen_as(&self) -> (Server, Option<Lsn>) {
        (self.identity, self.replayed)
    }

    pub(super) fn is_up(&self) -> bool {
        matches!(self.role, Role::Primary | Role::Standby)
    }

    pub(super) fn end(&self) -> Lsn {
        at(self.wal.len())
    }

    pub(super) fn common_with(&self, other: &Self) -> usize {
        self.wal.iter().zip(&other.wal).take_while(|(mine, theirs)| mine == theirs).count()
    }

    /// Returns the next id after recovery. An id without a record is forgotten, and will be reused.
    pub(super) fn next_xid_by_wal(&self) -> u64 {
        let next = self.wal.iter().map(|record| match record.what {
            What::Mark { xid, .. } | What::Data { xid } | What::Commit { xid, .. } | What::Abort { xid, .. } => xid + 1,
            What::EndOfRecovery { next_xid } | What::Checkpoint { next_xid, .. } => next_xid,
        });
        next.max().unwrap_or(FIRST_XID)
    }

    /// Loses all records that were not flushed, except `kept` of them that reached the disk by chance.
    pub(super) fn lose_memory(&mut self, kept: usize, now: i64) {
        self.wal.truncate(self.flushed + kept);
        self.flushed = self.wal.len();
        self.running.clear();
        self.received = None;
        self.stats_reset = now;
        (self.stopped, self.signed) = (None, None);
    }

    pub(super) fn says(&self, primaries_since: u64) -> Now {
        Now { life: self.life(), received: self.received, stopped: self.stopped, primaries_since }
    }

    /// Returns whether the server shows the checkpoint of its last shutdown or recovery.
    pub(super) fn shows_stop(&self) -> bool {
        self.stopped.is_some()
    }

    pub(super) fn life(&self) -> Life {
        let ancestor = Some(self.checkpointed).filter(|older| *older < self.identity.timeline);
        Life { server: self.identity, replayed: self.replayed, stats_reset: Some(self.stats_reset), ancestor }
    }

    /// What the server shows of the history of its log.
    pub(super) fn shows(&self, mark: &WalMark, evidence: Evidence) -> Proof {
        match evidence {
            Evidence::Checkpoint => Proof::Nothing,
            Evidence::Files => Proof::Files { followed: self.segments.contains(&mark.life.server.timeline) },
            Evidence::Function => {
                Proof::Function { ancestry: self.ancestry.iter().copied().collect(), sighting: self.sighting(mark) }
            }
        }
    }

    /// Returns whether this kind of evidence shows that the server's timeline continues the mark's.
    pub(super) fn shows_parent(&self, begun: &Begun, kind: Kind) -> bool {
        let then = begun.mark.life.server.timeline;
        let by_kind = match kind {
            Kind::Of(Evidence::Checkpoint) => false,
            Kind::Signature => begun.signed.is_some_and(|signed| self.bears(&signed)),
            Kind::Of(Evidence::Files) => self.segments.contains(&then),
            Kind::Of(Evidence::Function) => true,
        };
        then == 1 || self.identity.timeline == then || self.life().ancestor == Some(then) || by_kind
    }

    /// Returns whether the transactions of a signature have its outcomes here. Like the server, this compares ids,
    /// which may belong to other transactions. But if none of the transactions is the pool's, this returns `false`,
    /// because in reality so many outcomes are never right by chance.
    pub(super) fn bears(&self, signed: &Signed) -> bool {
        let outcome = |committed| Some(if committed { XactStatus::Committed } else { XactStatus::Aborted });
        let own = |of: Token| self.wal.iter().any(|record| record.token() == Some(of));
        signed.iter().all(|(xid, committed, _)| self.xact_status(*xid) == outcome(*committed))
            && signed.iter().any(|(.., token)| own(*token))
    }

    pub(super) fn has_recycled(&self, mark: &WalMark) -> bool {
        self.sighting(mark) == Sighting::Recycled
    }

    pub(super) fn sighting(&self, mark: &WalMark) -> Sighting {
        let Some(end) = (0..=self.wal.len()).find(|end| at(*end) == mark.lsn) else { return Sighting::Other };
        if end > self.flushed {
            return Sighting::NotYet;
        }
        match self.wal[end - 1].what {
            _ if end <= self.recycled => Sighting::Recycled,
            What::Mark { nonce, .. } if nonce == mark.nonce => Sighting::Mark,
            _ => Sighting::Other,
        }
    }

    /// The timeline of the last checkpoint in its log. A standby's next restart point gets this timeline.
    pub(super) fn last_checkpoint(&self) -> Option<u32> {
        self.wal.iter().rev().find_map(|record| match record.what {
            What::Checkpoint { timeline, .. } => Some(timeline),
            _ => None,
        })
    }

    /// What `pg_xact_status` returns. `None`: the error "transaction ID … is in the future".
    pub(super) fn xact_status(&self, xid: u64) -> Option<XactStatus> {
        if xid >= self.next_xid {
            return None;
        }
        let is_commit = |record: &Record| matches!(record.what, What::Commit { xid: of, .. } if of == xid);
        Some(match () {
            () if self.running.contains_key(&xid) => XactStatus::InProgress,
            () if self.wal.iter().any(is_commit) => XactStatus::Committed,
            () => XactStatus::Aborted,
        })
    }

    pub(super) fn truth(&self, token: Token) -> Truth {
        let is_commit = |record: &Record| matches!(record.what, What::Commit { token: of, .. } if of == token);
        match () {
            () if self.running.values().any(|running| running.token == token) => Truth::Running,
            () if self.wal.iter().any(is_commit) => Truth::Committed,
            () => Truth::NeverHere,
        }
    }
}

/// What became of a transaction on one server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Truth {
    Committed,
    Running,
    /// It is not in the server's history and will not be.
    NeverHere,
}

pub(super) fn lsn(position: usize) -> Lsn {
    format!("0/{position:X}").parse().unwrap()
}

/// The position at which so many records end. Two records have as many bytes as the rule assumes for two checkpoints.
pub(super) fn at(records: usize) -> Lsn {
    lsn(records * usize::try_from(TWO_CHECKPOINTS).unwrap() / 2)
}
