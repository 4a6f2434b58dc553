//! A small model of servers, with all that the outcome of a transaction depends on: WAL that is lost, forks and is
//! replayed; timelines; and transaction ids that are reused. The model knows the truth that the rule has to find.

use std::collections::{BTreeMap, BTreeSet};

use super::node::{Record, Role, Running, Signed, Token, What, at};
use super::*;

mod failures;

/// What has happened in a world since its beginning, or since some moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// How many times a server became a primary, by a promotion or by recovering from a crash. If a crashed server
    /// stays down or comes back as a standby, only the promotion that replaces it counts.
    pub(super) recoveries: u64,
    /// The number of promotions of a standby that had not asked a server for WAL since it was started: it read only an
    /// archive, or was promoted immediately. A primary that was restarted on its own log does not count.
    pub(super) unfed: u64,
    pub(super) clean_starts: u64,
    /// The number of recoveries that nobody saw.
    pub(super) unseen: u64,
    /// The number of new primaries, as a pool that misses none counts them. It compares [`Server`] and the end of
    /// replay.
    pub(super) primaries: u64,
}

/// A client's transaction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Begun {
    pub(super) mark: WalMark,
    pub(super) token: Token,
    pub(super) node: usize,
    term: u64,
    before: Tally,
    /// The transaction began on the primary that a pool would use.
    pub(super) on_newest: bool,
    /// When the transaction began, there were two timelines with the number of its own.
    pub(super) split_brain: bool,
    pub(super) signed: Option<Signed>,
}

#[derive(Clone, Debug)]
pub(super) struct World {
    nodes: Vec<Node>,
    clients: Vec<Begun>,
    /// The timeline of each promotion.
    promotions: Vec<u32>,
    tally: Tally,
    /// The primary that the pool saw last, and where its last replay had ended.
    seen: (Server, Option<Lsn>),
    /// The source of serial numbers, tokens and start times.
    counter: u64,
    /// The timelines whose history files are in the servers' shared archive, if there is one.
    archive: Option<BTreeSet<u32>>,
    /// Pools sign each timeline on which they begin transactions.
    signs: bool,
}

impl World {
    /// Creates a world. Server 0 is the primary, and the others are its standbys.
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

    /// Returns the same world, with pools that sign each timeline on which they begin transactions.
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

    /// The primary that a pool would use. It never uses one on a lower timeline. If two have the same timeline, it
    /// keeps the one that it has.
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

    /// Returns whether two servers were promoted to this timeline number, each from its own history.
    pub(super) fn is_split_brain(&self, timeline: u32) -> bool {
        self.promotions.iter().filter(|promoted| **promoted == timeline).count() > 1
    }

    /// Returns whether `asked` is the primary that the transaction began on, or the standby that replaced it and had
    /// streamed until then.
    pub(super) fn is_plain_failover(&self, begun: &Begun, asked: usize) -> bool {
        let node = &self.nodes[asked];
        let stayed = asked == begun.node && node.term == begun.term;
        let replaced = node.identity.timeline == begun.mark.life.server.timeline + 1 && node.received.is_some();
        begun.on_newest && (stayed || replaced)
    }

    /// From now on, the standby asks this server for WAL.
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

    /// Signs the server's timeline. These commits are not flushed. Timeline 1 is not signed, and each life of a server
    /// signs only once.
    fn sign(&mut self, on: usize) {
        let node = &self.nodes[on];
        if !self.signs || node.identity.timeline == 1 || node.signed.is_some() {
            return;
        }
        let signed = std::array::from_fn(|_| {
            let (xid, token) = (self.next_xid(on), self.count());
            // A pattern that differs from one signature to the next.
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
        let mark = WalMark { life: node.life(), xid, lsn: node.end(), nonce };
        let (term, before, signed) = (node.term, self.tally, node.signed);
        let split_brain = self.is_split_brain(mark.life.server.timeline);
        self.clients.push(Begun { mark, token, node: on, term, before, on_newest, split_brain, signed });
    }

    fn write(&mut self, on: usize, flush: bool) {
        let (xid, token) = (self.next_xid(on), self.count());
        self.append(on, What::Data { xid });
        self.append(on, What::Commit { xid, token });
        if flush {
            self.flush(on);
        }
    }

    /// Returns the client's transaction if it is still running, and whether it is being committed.
    fn running(&self, client: usize) -> Option<(Begun, bool)> {
        let begun = *self.clients.get(client % self.clients.len().max(1))?;
        let running = self.nodes[begun.node].running.get(&begun.mark.xid)?;
        (running.token == begun.token).then_some((begun, running.committing))
    }

    fn commit(&mut self, client: usize, how: Commit) {
        let Some((Begun { node: on, mark: WalMark { xid, .. }, token, .. }, false)) = self.running(client) else {
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
            self.end(begun.node, begun.mark.xid, true);
        }
    }

    fn abort(&mut self, client: usize) {
        if let Some((Begun { node: on, mark: WalMark { xid, .. }, token, .. }, false)) = self.running(client) {
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

    /// Sends a standby what its sender has flushed. The standby follows its sender to a newer timeline. `received`
    /// shows that the standby asked, even if nobody answered.
    fn ship(&mut self, to: usize, records: usize) {
        let Some(from) = self.nodes[to].upstream.map(|upstream| self.nodes[upstream].clone()) else { return };
        let node = &mut self.nodes[to];
        node.received = Some(node.end());
        if from.is_up() {
            // A standby stores the histories of newer timelines before it checks whether it can follow them.
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
        // It writes the first segment of a newer timeline when it has reached the fork.
        let next = from.ancestry.iter().skip(1).map(|(timeline, _)| *timeline).chain([from.identity.timeline]);
        let forks = from.ancestry.iter().map(|(_, end)| *end);
        let end = node.end();
        node.segments.extend(next.zip(forks).filter(|(_, fork)| *fork <= end).map(|(timeline, _)| timeline));
    }
}
