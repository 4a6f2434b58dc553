//! A small world of servers, as far as the fate of a transaction depends on it: WAL that is lost, forks and is replayed,
//! timelines, and transaction ids that are given out again. It knows the truth, which the rule has to find.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

/// Tells transactions apart that were given the same id.
pub(super) type Token = u64;

/// What the first transaction of each world is given.
pub(super) const FIRST_XID: u64 = 728;

/// A record of WAL. The serial number tells apart what equals by chance on two branches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    serial: u64,
    what: What,
}

impl Record {
    /// Whose end it is.
    fn token(&self) -> Option<Token> {
        match self.what {
            What::Commit { token, .. } | What::Abort { token, .. } => Some(token),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
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
const SIGNED_BY: usize = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Primary,
    Standby,
    StoppedPrimary { clean: bool },
    StoppedStandby,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Running {
    token: Token,
    /// Its commit record is written, and it waits for the flush or for a synchronous standby.
    committing: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Node {
    /// All since the beginning; positions are counted in records. Servers that forked have the first part in common.
    wal: Vec<Record>,
    flushed: usize,
    role: Role,
    upstream: Option<usize>,
    identity: Server,
    replayed: Option<Lsn>,
    received: Option<Lsn>,
    /// When the statistics were reset.
    stats_reset: i64,
    /// Lost in a crash, as is what runs.
    next_xid: u64,
    running: BTreeMap<u64, Running>,
    /// Counts promotions in the whole world: which primary is newer, and whether it was another thing in between.
    term: u64,
    ancestry: Vec<(u32, Lsn)>,
    /// The timeline of the last checkpoint, as the control file has it.
    checkpointed: u32,
    /// Timelines whose history files are in its `pg_wal`: its own, and those that it was sent, although it may not have been
    /// able to follow them.
    histories: BTreeSet<u32>,
    /// Timelines of which there are segments in its `pg_wal`.
    segments: BTreeSet<u32>,
    /// The records before this one are in segments that were recycled.
    recycled: usize,
    /// It was restarted on its own log, as a standby without a sender.
    alone: bool,
    /// See [`What::Checkpoint`]: of the last checkpoint, if the last replay ended behind it.
    stopped: Option<Lsn>,
    /// What a pool has signed its timeline with, in this life.
    signed: Option<Signed>,
}

impl Node {
    /// What a pool tells one primary from the next by.
    fn seen_as(&self) -> (Server, Option<Lsn>) {
        (self.identity, self.replayed)
    }

    fn is_up(&self) -> bool {
        matches!(self.role, Role::Primary | Role::Standby)
    }

    fn end(&self) -> Lsn {
        at(self.wal.len())
    }

    fn common_with(&self, other: &Self) -> usize {
        self.wal.iter().zip(&other.wal).take_while(|(mine, theirs)| mine == theirs).count()
    }

    /// What recovery finds: an id that no record tells of is forgotten, and will be given out again.
    fn next_xid_by_wal(&self) -> u64 {
        let next = self.wal.iter().map(|record| match record.what {
            What::Mark { xid, .. } | What::Data { xid } | What::Commit { xid, .. } | What::Abort { xid, .. } => xid + 1,
            What::EndOfRecovery { next_xid } | What::Checkpoint { next_xid, .. } => next_xid,
        });
        next.max().unwrap_or(FIRST_XID)
    }

    /// What was not flushed is gone, but for `kept` records that happened to be.
    fn lose_memory(&mut self, kept: usize, now: i64) {
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

    fn life(&self) -> Life {
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

    fn sighting(&self, marker: &Marker) -> Sighting {
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
    fn last_checkpoint(&self) -> Option<u32> {
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

/// What happened in a world so far, or since a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// Servers that became primaries by a promotion or by recovering from a crash. A crash of a server that stays away, or
    /// comes back as a standby, does not count apart from the promotion that replaces it.
    pub(super) recoveries: u64,
    /// Promotions of a standby that had not asked anybody for WAL since it was started: fed by an archive alone, or promoted
    /// at once. A primary that was restarted on its own log does not count.
    pub(super) unfed: u64,
    pub(super) clean_starts: u64,
    /// Recoveries that nobody saw.
    pub(super) unseen: u64,
    /// New primaries as a pool counts them that misses none: it goes by [`Server`].
    pub(super) primaries: u64,
}

/// A client's transaction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Begun {
    pub(super) marker: Marker,
    pub(super) token: Token,
    node: usize,
    term: u64,
    before: Tally,
    /// It began on the primary that a pool would use.
    pub(super) on_newest: bool,
    /// When it began, its timeline was one of two with that number.
    pub(super) split_brain: bool,
    pub(super) signed: Option<Signed>,
}

/// Servers are named by their number, modulo those that the operation is possible on; so are transactions.
#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    Begin {
        on: usize,
    },
    /// A whole transaction of somebody else.
    Write {
        on: usize,
        flush: bool,
    },
    Commit {
        client: usize,
        how: Commit,
    },
    /// The synchronous standby confirms, or the wait for it is cancelled.
    Finish {
        client: usize,
    },
    Abort {
        client: usize,
    },
    Ship {
        to: usize,
        records: usize,
    },
    Crash {
        on: usize,
        kept: usize,
    },
    BackendCrash {
        on: usize,
        kept: usize,
    },
    Stop {
        on: usize,
    },
    /// As what it was.
    Start {
        on: usize,
    },
    /// A primary that crashed or was stopped is started as a standby on its own log, as a failover manager does while nobody
    /// else may take the lead.
    Lease {
        on: usize,
    },
    /// A primary that crashed is recovered in single-user mode, which nobody sees, and shut down.
    SingleUser {
        on: usize,
        /// With an archive the shutdown begins a new segment, and its checkpoint is the first record there.
        switch: bool,
    },
    /// A checkpoint, or a standby's restart point.
    Checkpoint {
        on: usize,
    },
    /// Segments that no recovery needs any more are recycled.
    Recycle {
        on: usize,
    },
    /// Restarted as a standby, rewound to the fork.
    Follow {
        on: usize,
        upstream: usize,
    },
    Promote {
        on: usize,
    },
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Commit {
    Flushed,
    /// `synchronous_commit = off`.
    Unflushed,
    /// Its record is written, and it is in progress until it is finished.
    Held,
}

#[derive(Clone, Debug)]
pub(super) struct World {
    nodes: Vec<Node>,
    clients: Vec<Begun>,
    /// The timeline of each promotion.
    promotions: Vec<u32>,
    tally: Tally,
    /// The primary that the pool has seen last, and where its last replay had ended.
    seen: (Server, Option<Lsn>),
    /// For serial numbers, tokens and start times.
    counter: u64,
    /// The histories that are in the servers' shared archive, if they have one.
    archive: Option<BTreeSet<u32>>,
    /// Pools sign the timelines that they begin transactions on.
    signs: bool,
}

impl World {
    /// Server 0 is the primary, the others are its standbys.
    pub(super) fn new(servers: usize, archive: bool) -> Self {
        let node = |index: usize| Node {
            wal: Vec::new(),
            flushed: 0,
            role: if index == 0 { Role::Primary } else { Role::Standby },
            upstream: (index > 0).then_some(0),
            identity: Server { system_identifier: 77, timeline: 1, started_at: -i64::try_from(index).unwrap() },
            replayed: None,
            stats_reset: -i64::try_from(index).unwrap(),
            received: (index > 0).then(|| lsn(0)),
            next_xid: FIRST_XID,
            running: BTreeMap::new(),
            term: 0,
            ancestry: Vec::new(),
            checkpointed: 1,
            histories: BTreeSet::new(),
            segments: BTreeSet::from([1]),
            recycled: 0,
            alone: false,
            stopped: None,
            signed: None,
        };
        let nodes: Vec<_> = (0..servers).map(node).collect();
        let seen = nodes[0].seen_as();
        let archive = archive.then(BTreeSet::new);
        let (clients, promotions, tally) = (Vec::new(), Vec::new(), Tally::default());
        Self { nodes, clients, promotions, tally, seen, counter: 0, archive, signs: false }
    }

    /// The same, where pools sign the timelines that they begin transactions on.
    pub(super) fn signing(self) -> Self {
        Self { signs: true, ..self }
    }

    pub(super) fn node(&self, index: usize) -> &Node {
        &self.nodes[index]
    }

    pub(super) fn clients(&self) -> &[Begun] {
        &self.clients
    }

    pub(super) fn primaries(&self) -> Vec<usize> {
        self.those(|node| node.role == Role::Primary)
    }

    /// The primary that a pool would use: never one of a lower timeline, and of two with one number the one it has.
    pub(super) fn newest(&self) -> Option<usize> {
        let identity = |index: usize| self.nodes[index].identity;
        let is_seen = |index: usize| identity(index) == self.seen.0;
        let age = |index: &usize| (identity(*index).timeline, is_seen(*index), self.nodes[*index].term);
        let newest = self.primaries().into_iter().max_by_key(age)?;
        (identity(newest).timeline >= self.seen.0.timeline).then_some(newest)
    }

    pub(super) fn since(&self, begun: &Begun) -> Tally {
        Tally {
            recoveries: self.tally.recoveries - begun.before.recoveries,
            unfed: self.tally.unfed - begun.before.unfed,
            clean_starts: self.tally.clean_starts - begun.before.clean_starts,
            unseen: self.tally.unseen - begun.before.unseen,
            primaries: self.tally.primaries - begun.before.primaries,
        }
    }

    /// Two servers were promoted to one timeline number, each from a history of its own.
    pub(super) fn is_split_brain(&self, timeline: u32) -> bool {
        self.promotions.iter().filter(|promoted| **promoted == timeline).count() > 1
    }

    /// `asked` is the primary that the transaction began on, or the standby that replaced it, streaming until then.
    pub(super) fn is_plain_failover(&self, begun: &Begun, asked: usize) -> bool {
        let node = &self.nodes[asked];
        let stayed = asked == begun.node && node.term == begun.term;
        let replaced = node.identity.timeline == begun.marker.life.server.timeline + 1 && node.received.is_some();
        begun.on_newest && (stayed || replaced)
    }

    /// A standby asks this server for WAL from now on.
    pub(super) fn point(&mut self, standby: usize, upstream: usize) {
        self.nodes[standby].upstream = Some(upstream);
    }

    pub(super) fn apply(&mut self, op: Op) {
        match op {
            Op::Begin { on } => self.on(&[Role::Primary], on, Self::begin),
            Op::Write { on, flush } => self.on(&[Role::Primary], on, |world, on| world.write(on, flush)),
            Op::Commit { client, how } => self.commit(client, how),
            Op::Finish { client } => self.finish(client),
            Op::Abort { client } => self.abort(client),
            Op::Ship { to, records } => self.on(&[Role::Standby], to, |world, to| world.ship(to, records)),
            Op::Crash { on, kept } => self.on(&[Role::Primary, Role::Standby], on, |world, on| world.crash(on, kept)),
            Op::BackendCrash { on, kept } => {
                self.on(&[Role::Primary, Role::Standby], on, |world, on| world.backend_crash(on, kept));
            }
            Op::Stop { on } => self.on(&[Role::Primary, Role::Standby], on, Self::stop),
            Op::Start { on } => {
                let stopped =
                    [true, false].map(|clean| Role::StoppedPrimary { clean }).into_iter().chain([Role::StoppedStandby]);
                self.on(&stopped.collect::<Vec<_>>(), on, Self::start);
            }
            Op::Lease { on } => {
                let stopped = [true, false].map(|clean| Role::StoppedPrimary { clean });
                self.on(&stopped, on, Self::lease);
            }
            Op::SingleUser { on, switch } => {
                let crashed = [Role::StoppedPrimary { clean: false }];
                self.on(&crashed, on, |world, on| world.recover_unseen(on, switch));
            }
            Op::Checkpoint { on } => self.on(&[Role::Primary, Role::Standby], on, Self::checkpoint),
            Op::Recycle { on } => self.on(&[Role::Primary, Role::Standby], on, Self::recycle),
            Op::Follow { on, upstream } => self.follow(on % self.nodes.len(), upstream % self.nodes.len()),
            Op::Promote { on } => self.on(&[Role::Standby], on, Self::promote),
        }
        if let Some(newest) = self.newest().map(|newest| self.nodes[newest].seen_as()).filter(|new| *new != self.seen) {
            self.tally.primaries += 1;
            self.seen = newest;
        }
    }

    fn those(&self, which: impl Fn(&Node) -> bool) -> Vec<usize> {
        (0..self.nodes.len()).filter(|index| which(&self.nodes[*index])).collect()
    }

    fn on(&mut self, roles: &[Role], number: usize, act: impl FnOnce(&mut Self, usize)) {
        let able = self.those(|node| roles.contains(&node.role));
        if !able.is_empty() {
            act(self, able[number % able.len()]);
        }
    }

    fn count(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    fn append(&mut self, on: usize, what: What) {
        let serial = self.count();
        self.nodes[on].wal.push(Record { serial, what });
    }

    fn append_flushed(&mut self, on: usize, what: What) {
        self.append(on, what);
        self.flush(on);
    }

    fn flush(&mut self, on: usize) {
        let node = &mut self.nodes[on];
        node.flushed = node.wal.len();
    }

    fn next_xid(&mut self, on: usize) -> u64 {
        let node = &mut self.nodes[on];
        node.next_xid += 1;
        node.next_xid - 1
    }

    /// Nobody waits for these to be flushed. The first timeline is not signed, and each life of a server once.
    fn sign(&mut self, on: usize) {
        let node = &self.nodes[on];
        if !self.signs || node.identity.timeline == 1 || node.signed.is_some() {
            return;
        }
        let signed = std::array::from_fn(|_| {
            let (xid, token) = (self.next_xid(on), self.count());
            // A pattern that differs from time to time.
            let committed = token.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 63 == 1;
            self.append(on, if committed { What::Commit { xid, token } } else { What::Abort { xid, token } });
            (xid, committed, token)
        });
        self.nodes[on].signed = Some(signed);
    }

    fn begin(&mut self, on: usize) {
        self.sign(on);
        let (xid, token) = (self.next_xid(on), self.count());
        let nonce = Nonce(u128::from(token));
        self.append(on, What::Mark { xid, nonce });
        let on_newest = self.newest() == Some(on);
        let node = &mut self.nodes[on];
        node.running.insert(xid, Running { token, committing: false });
        let marker = Marker { life: node.life(), xid, lsn: node.end(), nonce };
        let (term, before, signed) = (node.term, self.tally, node.signed);
        let split_brain = self.is_split_brain(marker.life.server.timeline);
        self.clients.push(Begun { marker, token, node: on, term, before, on_newest, split_brain, signed });
    }

    fn write(&mut self, on: usize, flush: bool) {
        let (xid, token) = (self.next_xid(on), self.count());
        self.append(on, What::Data { xid });
        self.append(on, What::Commit { xid, token });
        if flush {
            self.flush(on);
        }
    }

    /// The transaction, if it still runs, and whether it is being committed.
    fn running(&self, client: usize) -> Option<(Begun, bool)> {
        let begun = *self.clients.get(client % self.clients.len().max(1))?;
        let running = self.nodes[begun.node].running.get(&begun.marker.xid)?;
        (running.token == begun.token).then_some((begun, running.committing))
    }

    fn commit(&mut self, client: usize, how: Commit) {
        let Some((Begun { node: on, marker: Marker { xid, .. }, token, .. }, false)) = self.running(client) else {
            return;
        };
        self.append(on, What::Commit { xid, token });
        match how {
            Commit::Held => {
                self.nodes[on].running.insert(xid, Running { token, committing: true });
            }
            Commit::Flushed => self.end(on, xid, true),
            Commit::Unflushed => self.end(on, xid, false),
        }
    }

    fn finish(&mut self, client: usize) {
        if let Some((begun, true)) = self.running(client) {
            self.end(begun.node, begun.marker.xid, true);
        }
    }

    fn abort(&mut self, client: usize) {
        if let Some((Begun { node: on, marker: Marker { xid, .. }, token, .. }, false)) = self.running(client) {
            self.append(on, What::Abort { xid, token });
            self.end(on, xid, false);
        }
    }

    fn end(&mut self, on: usize, xid: u64, flush: bool) {
        self.nodes[on].running.remove(&xid);
        if flush {
            self.flush(on);
        }
    }

    /// A standby is sent what its sender has flushed, and follows it to a newer timeline. That it asked shows, even if
    /// nobody answered.
    fn ship(&mut self, to: usize, records: usize) {
        let Some(from) = self.nodes[to].upstream.map(|upstream| self.nodes[upstream].clone()) else { return };
        let node = &mut self.nodes[to];
        node.received = Some(node.end());
        if from.is_up() {
            // It takes the histories of newer timelines before it looks whether it can follow them.
            let newer = node.identity.timeline + 1..=from.identity.timeline;
            node.histories.extend(newer.filter(|timeline| from.histories.contains(timeline)));
        }
        let has = node.wal.len();
        let continues = node.common_with(&from) == has && from.identity.timeline >= node.identity.timeline;
        if !from.is_up() || !continues || has > from.flushed {
            return;
        }
        node.wal.extend(from.wal[has..from.flushed].iter().take(records));
        node.flushed = node.wal.len();
        node.identity.timeline = from.identity.timeline;
        node.ancestry.clone_from(&from.ancestry);
        node.received = Some(node.end());
        node.alone = false;
        // It writes the first segment of a newer timeline when it has come to the fork.
        let next = from.ancestry.iter().skip(1).map(|(timeline, _)| *timeline).chain([from.identity.timeline]);
        let forks = from.ancestry.iter().map(|(_, end)| *end);
        let end = node.end();
        node.segments.extend(next.zip(forks).filter(|(_, fork)| *fork <= end).map(|(timeline, _)| timeline));
    }

    fn crash(&mut self, on: usize, kept: usize) {
        let now = self.count().cast_signed();
        let node = &mut self.nodes[on];
        node.lose_memory(kept, now);
        node.role = match node.role {
            Role::Primary => Role::StoppedPrimary { clean: false },
            _ => Role::StoppedStandby,
        };
    }

    /// The postmaster goes on, with its memory set up anew.
    fn backend_crash(&mut self, on: usize, kept: usize) {
        let now = self.count().cast_signed();
        self.nodes[on].lose_memory(kept, now);
        if self.nodes[on].role == Role::Primary {
            self.recover(on, false);
        }
    }

    /// The server has become a primary by replay.
    fn recover(&mut self, on: usize, promoted: bool) {
        self.tally.recoveries += 1;
        let node = &mut self.nodes[on];
        node.replayed = Some(node.end());
        node.next_xid = node.next_xid_by_wal();
        let next_xid = node.next_xid;
        if promoted {
            let last = node.wal.last().map(|record| record.what);
            node.stopped = if let Some(What::Checkpoint { stopped, .. }) = last { stopped } else { None };
            self.append_flushed(on, What::EndOfRecovery { next_xid });
        } else {
            let end = node.end();
            self.write_checkpoint(on, Some(end));
        }
    }

    fn write_checkpoint(&mut self, on: usize, stopped: Option<Lsn>) {
        let node = &mut self.nodes[on];
        node.checkpointed = node.identity.timeline;
        node.stopped = None;
        let (next_xid, timeline) = (node.next_xid, node.identity.timeline);
        self.append_flushed(on, What::Checkpoint { next_xid, timeline, stopped });
    }

    fn checkpoint(&mut self, on: usize) {
        let node = &self.nodes[on];
        if node.role == Role::Primary {
            self.write_checkpoint(on, None);
        } else if let Some(timeline) = node.last_checkpoint() {
            self.nodes[on].checkpointed = timeline;
        }
    }

    fn recycle(&mut self, on: usize) {
        let node = &mut self.nodes[on];
        let last = node.wal.iter().rposition(|record| matches!(record.what, What::Checkpoint { .. }));
        node.recycled = last.unwrap_or(0).max(node.recycled);
        node.segments.retain(|timeline| *timeline == node.identity.timeline);
    }

    /// A clean shutdown: what runs is aborted, waits for a standby are cancelled, all is flushed.
    fn stop(&mut self, on: usize) {
        if self.nodes[on].role != Role::Primary {
            self.nodes[on].role = Role::StoppedStandby;
            return;
        }
        for (xid, running) in std::mem::take(&mut self.nodes[on].running) {
            if !running.committing {
                self.append(on, What::Abort { xid, token: running.token });
            }
        }
        self.shut_down(on, false);
    }

    fn shut_down(&mut self, on: usize, switch: bool) {
        let end = self.nodes[on].end();
        self.write_checkpoint(on, Some(if switch { at(0) } else { end }));
        self.nodes[on].role = Role::StoppedPrimary { clean: true };
    }

    fn recover_unseen(&mut self, on: usize, switch: bool) {
        self.tally.unseen += 1;
        let node = &mut self.nodes[on];
        node.next_xid = node.next_xid_by_wal();
        let end = node.end();
        self.write_checkpoint(on, Some(end));
        self.shut_down(on, switch);
    }

    fn start(&mut self, on: usize) {
        let started_at = self.count().cast_signed();
        let node = &mut self.nodes[on];
        node.identity.started_at = started_at;
        (node.stopped, node.signed) = (None, None);
        (node.replayed, node.received) = (None, None);
        match node.role {
            Role::StoppedPrimary { clean } => {
                node.role = Role::Primary;
                if clean {
                    self.tally.clean_starts += 1;
                } else {
                    self.recover(on, false);
                }
            }
            _ => node.role = Role::Standby,
        }
    }

    fn lease(&mut self, on: usize) {
        let started_at = self.count().cast_signed();
        let node = &mut self.nodes[on];
        node.identity.started_at = started_at;
        (node.stopped, node.signed) = (None, None);
        (node.replayed, node.received) = (None, None);
        (node.role, node.upstream, node.alone) = (Role::Standby, None, true);
    }

    fn follow(&mut self, on: usize, upstream: usize) {
        let mut senders = std::iter::successors(Some(upstream), |sender| self.nodes[*sender].upstream);
        if senders.any(|sender| sender == on) || !self.nodes[upstream].is_up() {
            return;
        }
        let started_at = self.count().cast_signed();
        let from = self.nodes[upstream].clone();
        let node = &mut self.nodes[on];
        let common = node.common_with(&from).min(from.flushed);
        if common < node.wal.len() {
            // A rewind removes the file of the statistics, which the other server does not have while it runs.
            node.stats_reset = started_at;
        }
        node.wal.truncate(common);
        node.flushed = node.wal.len();
        node.running.clear();
        node.identity = Server { started_at, timeline: from.identity.timeline, ..node.identity };
        (node.replayed, node.received) = (None, None);
        (node.role, node.upstream, node.alone) = (Role::Standby, Some(upstream), false);
        node.ancestry = from.ancestry;
        node.histories = from.histories;
        node.segments = from.segments;
        node.recycled = from.recycled;
        node.checkpointed = node.last_checkpoint().unwrap_or(1);
        (node.stopped, node.signed) = (None, None);
    }

    /// The new timeline is the next whose history this standby finds neither with itself nor in the archive
    /// (`findNewestTimeLine` in `timeline.c`). Others may be given the same number, where there is no archive.
    fn promote(&mut self, on: usize) {
        let node = &mut self.nodes[on];
        let old = node.identity.timeline;
        let archived = |timeline: &u32| self.archive.as_ref().is_some_and(|archive| archive.contains(timeline));
        let is_taken = |timeline: &u32| node.histories.contains(timeline) || archived(timeline);
        let new = (old + 1..=u32::MAX).find(|timeline| !is_taken(timeline)).unwrap();
        node.identity.timeline = new;
        let end = node.end();
        node.ancestry.push((old, end));
        node.histories.insert(new);
        node.segments.insert(new);
        if let Some(archive) = &mut self.archive {
            archive.insert(new);
        }
        (node.role, node.upstream) = (Role::Primary, None);
        // What it replayed of its own log shows by the time of a transaction's end.
        let ends = |record: &&Record| matches!(record.what, What::Commit { .. } | What::Abort { .. });
        let replayed = node.wal.iter().rev().take_while(|record| !matches!(record.what, What::Checkpoint { .. }));
        if node.alone && replayed.filter(ends).count() > 0 {
            node.received = Some(end);
        }
        self.tally.unfed += u64::from(node.received.is_none() && !node.alone);
        node.alone = false;
        self.promotions.push(new);
        node.term = self.promotions.len() as u64;
        self.recover(on, true);
    }
}

pub(super) fn lsn(position: usize) -> Lsn {
    format!("0/{position:X}").parse().unwrap()
}

/// Where so many records end. Two records have as many bytes as the rule takes two checkpoints for.
fn at(records: usize) -> Lsn {
    lsn(records * usize::try_from(TWO_CHECKPOINTS).unwrap() / 2)
}

pub(super) fn op() -> impl Strategy<Value = Op> {
    let number = 0..12_usize;
    let how = prop_oneof![4 => Just(Commit::Flushed), 2 => Just(Commit::Unflushed), 2 => Just(Commit::Held)];
    prop_oneof![
        5 => number.clone().prop_map(|on| Op::Begin { on }),
        6 => (number.clone(), any::<bool>()).prop_map(|(on, flush)| Op::Write { on, flush }),
        5 => (number.clone(), how).prop_map(|(client, how)| Op::Commit { client, how }),
        1 => number.clone().prop_map(|client| Op::Finish { client }),
        1 => number.clone().prop_map(|client| Op::Abort { client }),
        6 => (number.clone(), 0..8_usize).prop_map(|(to, records)| Op::Ship { to, records }),
        2 => (number.clone(), 0..4_usize).prop_map(|(on, kept)| Op::Crash { on, kept }),
        1 => (number.clone(), 0..4_usize).prop_map(|(on, kept)| Op::BackendCrash { on, kept }),
        1 => number.clone().prop_map(|on| Op::Stop { on }),
        2 => number.clone().prop_map(|on| Op::Start { on }),
        1 => number.clone().prop_map(|on| Op::Lease { on }),
        1 => (number.clone(), any::<bool>()).prop_map(|(on, switch)| Op::SingleUser { on, switch }),
        2 => number.clone().prop_map(|on| Op::Checkpoint { on }),
        1 => number.clone().prop_map(|on| Op::Recycle { on }),
        2 => (number.clone(), number.clone()).prop_map(|(on, upstream)| Op::Follow { on, upstream }),
        3 => number.prop_map(|on| Op::Promote { on }),
    ]
}
