//! One server of the model: its log, its timelines and its transaction ids, what it says of them, and what is true.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

/// Tells transactions apart that were given the same id.
pub(super) type Token = u64;

/// What the first transaction of each world is given.
pub(super) const FIRST_XID: u64 = 728;

/// A record of WAL. The serial number tells apart what equals by chance on two branches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) serial: u64,
    pub(super) what: What,
}

impl Record {
    /// Whose end it is.
    pub(super) fn token(&self) -> Option<Token> {
        match self.what {
            What::Commit { token, .. } | What::Abort { token, .. } => Some(token),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// A client's marker.
    Mark {
        xid: u64,
        nonce: Nonce,
    },
    /// Anything else that is written under an id.
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
    /// The end of a recovery by promotion. It is flushed before the server takes work, as is a checkpoint after a crash. So
    /// no two recoveries end at one position: the rule tells a server's lives apart by that.
    EndOfRecovery {
        next_xid: u64,
    },
    Checkpoint {
        next_xid: u64,
        timeline: u32,
        /// What shows of it while it is the last one: up to where it surely continues what was before.
        stopped: Option<Lsn>,
    },
}

/// What of the pool's a timeline is signed with: ids, whether they were committed, and which transactions they were.
pub(super) type Signed = [(u64, bool, Token); SIGNED_BY];

/// Far fewer than a real pool makes. That all of them have the right outcome by chance is left out, see [`Node::bears`].
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
    /// Its commit record is written, and it waits for the flush or for a synchronous standby.
    pub(super) committing: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Node {
    /// All since the beginning; positions are counted in records. Servers that forked have the first part in common.
    pub(super) wal: Vec<Record>,
    pub(super) flushed: usize,
    pub(super) role: Role,
    pub(super) upstream: Option<usize>,
    pub(super) identity: Server,
    pub(super) replayed: Option<Lsn>,
    pub(super) received: Option<Lsn>,
    /// When the statistics were reset.
    pub(super) stats_reset: i64,
    /// Lost in a crash, as is what runs.
    pub(super) next_xid: u64,
    pub(super) running: BTreeMap<u64, Running>,
    /// Counts promotions in the whole world: which primary is newer, and whether it was another thing in between.
    pub(super) term: u64,
    pub(super) ancestry: Vec<(u32, Lsn)>,
    /// The timeline of the last checkpoint, as the control file has it.
    pub(super) checkpointed: u32,
    /// Timelines whose history files are in its `pg_wal`: its own, and those that it was sent, although it may not have been
    /// able to follow them.
    pub(super) histories: BTreeSet<u32>,
    /// Timelines of which there are segments in its `pg_wal`.
    pub(super) segments: BTreeSet<u32>,
    /// The records before this one are in segments that were recycled.
    pub(super) recycled: usize,
    /// It was restarted on its own log, as a standby without a sender.
    pub(super) alone: bool,
    /// See [`What::Checkpoint`]: of the last checkpoint, if the last replay ended behind it.
    pub(super) stopped: Option<Lsn>,
    /// What a pool has signed its timeline with, in this life.
    pub(super) signed: Option<Signed>,
}

impl Node {
    /// What a pool tells one primary from the next by.
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

    /// What recovery finds: an id that no record tells of is forgotten, and will be given out again.
    pub(super) fn next_xid_by_wal(&self) -> u64 {
        let next = self.wal.iter().map(|record| match record.what {
            What::Mark { xid, .. } | What::Data { xid } | What::Commit { xid, .. } | What::Abort { xid, .. } => xid + 1,
            What::EndOfRecovery { next_xid } | What::Checkpoint { next_xid, .. } => next_xid,
        });
        next.max().unwrap_or(FIRST_XID)
    }

    /// What was not flushed is gone, but for `kept` records that happened to be.
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

    /// The checkpoints of its last shutdown or recovery show.
    pub(super) fn shows_stop(&self) -> bool {
        self.stopped.is_some()
    }

    pub(super) fn life(&self) -> Life {
        let ancestor = Some(self.checkpointed).filter(|older| *older < self.identity.timeline);
        Life { server: self.identity, replayed: self.replayed, stats_reset: Some(self.stats_reset), ancestor }
    }

    /// What it shows of its log's history.
    pub(super) fn shows(&self, marker: &Marker, evidence: Evidence) -> Proof {
        match evidence {
            Evidence::Checkpoint => Proof::Nothing,
            Evidence::Files => Proof::Files { followed: self.segments.contains(&marker.life.server.timeline) },
            Evidence::Function => {
                Proof::Function { ancestry: self.ancestry.iter().copied().collect(), sighting: self.sighting(marker) }
            }
        }
    }

    /// Can it be seen, by this evidence, that its timeline continues the marker's?
    pub(super) fn shows_parent(&self, begun: &Begun, kind: Kind) -> bool {
        let then = begun.marker.life.server.timeline;
        let by_kind = match kind {
            Kind::Of(Evidence::Checkpoint) => false,
            Kind::Signature => begun.signed.is_some_and(|signed| self.bears(&signed)),
            Kind::Of(Evidence::Files) => self.segments.contains(&then),
            Kind::Of(Evidence::Function) => true,
        };
        then == 1 || self.identity.timeline == then || self.life().ancestor == Some(then) || by_kind
    }

    /// Have the transactions of a signature their outcomes here? Goes by ids, as the server does, whose transactions they may
    /// be; but if none of them is the pool's, all outcomes are not right by chance.
    pub(super) fn bears(&self, signed: &Signed) -> bool {
        let outcome = |committed| Some(if committed { XactStatus::Committed } else { XactStatus::Aborted });
        let own = |of: Token| self.wal.iter().any(|record| record.token() == Some(of));
        signed.iter().all(|(xid, committed, _)| self.xact_status(*xid) == outcome(*committed))
            && signed.iter().any(|(.., token)| own(*token))
    }

    pub(super) fn has_recycled(&self, marker: &Marker) -> bool {
        self.sighting(marker) == Sighting::Recycled
    }

    pub(super) fn sighting(&self, marker: &Marker) -> Sighting {
        let Some(end) = (0..=self.wal.len()).find(|end| at(*end) == marker.lsn) else { return Sighting::Other };
        if end > self.flushed {
            return Sighting::NotYet;
        }
        match self.wal[end - 1].what {
            _ if end <= self.recycled => Sighting::Recycled,
            What::Mark { nonce, .. } if nonce == marker.nonce => Sighting::Marker,
            _ => Sighting::Other,
        }
    }

    /// The timeline of the last checkpoint in its log, which a standby's next restart point will be of.
    pub(super) fn last_checkpoint(&self) -> Option<u32> {
        self.wal.iter().rev().find_map(|record| match record.what {
            What::Checkpoint { timeline, .. } => Some(timeline),
            _ => None,
        })
    }

    /// `pg_xact_status`. `None`: the error "transaction ID … is in the future".
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

/// Where so many records end. Two records have as many bytes as the rule takes two checkpoints for.
pub(super) fn at(records: usize) -> Lsn {
    lsn(records * usize::try_from(TWO_CHECKPOINTS).unwrap() / 2)
}
