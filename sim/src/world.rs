//! The whole simulated world, and what can happen to its servers. Nothing here waits: tasks wait, and then change it.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::listen::Told;
use crate::log::What;
use crate::net::{Net, lock};
use crate::node::{Checkpoint, Doing, Goodbye, Node, Process, Stage};
use crate::oracle::Oracle;
use crate::rng::Rng;
use crate::setup::Setup;
use crate::trace::{Counts, Trace};

/// The pool must have left an old primary by then: it looks at the other servers every five seconds.
const SUPERSEDED_FOR: Duration = Duration::from_secs(20);

/// So long after its start, in microseconds, a server that recovers resets its statistics.
const UNTIL_RESET: i64 = 10_000;

pub(crate) const SYSTEM_IDENTIFIER: &str = "7300000000000000001";

/// What DNS answers now.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Names {
    /// The server that [`Dns::Primary`](crate::setup::Dns::Primary) leads to.
    pub(crate) primary: usize,
    pub(crate) gone: bool,
}

pub(crate) struct World {
    pub(crate) setup: Setup,
    pub(crate) rng: Rng,
    pub(crate) nodes: Vec<Node>,
    pub(crate) names: Names,
    /// The server that the manager has made the primary.
    pub(crate) leader: usize,
    /// The standby whose confirmation each COMMIT of the leader waits for.
    pub(crate) sync_standby: Option<usize>,
    pub(crate) oracle: Oracle,
    pub(crate) counts: Counts,
    pub(crate) failovers: u64,
    /// How many closures hold a connection.
    pub(crate) holding: usize,
    /// The server that the pool has published as the primary.
    pub(crate) published: Option<usize>,
    /// The highest timeline of the archive.
    pub(crate) archived: u32,
    entries: u64,
    pub(crate) told: Told,
    /// When something was last done to a server, or to its network.
    pub(crate) troubled_at: Vec<Instant>,
    trace: Trace,
    zero: Instant,
    serials: u64,
    pids: i32,
}

/// The world, and what its tasks wait for.
pub(crate) struct Sim {
    world: Mutex<World>,
    /// Woken when a standby has received something, or the synchronous standby is another one.
    pub(crate) replicated: Notify,
    /// Woken when there is something to replicate.
    pub(crate) flushed: Notify,
    /// Woken when a machine or a process comes up.
    pub(crate) up: Notify,
}

impl Sim {
    pub(crate) fn new(seed: u64, trace: bool) -> Arc<Self> {
        let mut rng = Rng::new(seed);
        let setup = Setup::choose(&mut rng);
        Self::with(rng, setup, trace)
    }

    /// A world with this setup.
    pub(crate) fn with(rng: Rng, setup: Setup, trace: bool) -> Arc<Self> {
        let mut nodes: Vec<_> = (0..setup.servers).map(|index| Node::new(index, Arc::new(Net::default()))).collect();
        nodes[1].clock_ahead = if setup.wrong_clock { 2_000_000_000 } else { 0 };
        let world = World {
            setup,
            rng,
            nodes,
            names: Names::default(),
            leader: 0,
            sync_standby: setup.synchronous.then_some(1),
            oracle: Oracle::default(),
            counts: Counts::default(),
            failovers: 0,
            holding: 0,
            published: None,
            archived: 1,
            entries: 0,
            told: Told::default(),
            troubled_at: vec![Instant::now(); setup.servers],
            trace: Trace::new(trace),
            zero: Instant::now(),
            serials: 0,
            pids: 1000,
        };
        let sim =
            Self { world: Mutex::new(world), replicated: Notify::new(), flushed: Notify::new(), up: Notify::new() };
        Arc::new(sim)
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, World> {
        lock(&self.world)
    }
}

impl World {
    pub(crate) fn now(&self) -> Duration {
        self.zero.elapsed()
    }

    pub(crate) fn say(&mut self, line: impl FnOnce() -> String) {
        self.trace.say(self.zero.elapsed(), line);
    }

    pub(crate) fn take_trace(&mut self) -> Vec<String> {
        self.trace.take()
    }

    /// Notes that something is done to this server, so that the pool may leave it.
    pub(crate) fn trouble(&mut self, on: usize) {
        self.troubled_at[on] = Instant::now();
    }

    /// Returns whether nothing was done to any server for so long.
    pub(crate) fn is_quiet_for(&self, time: Duration) -> bool {
        self.troubled_at.iter().all(|at| at.elapsed() > time)
    }

    /// A transaction that began then writes on this server. The pool must know by then of a primary that came long
    /// before.
    pub(crate) fn work_on(&mut self, on: usize, timeline: u32, begun_at: Instant) {
        self.oracle.work_on(timeline, begun_at);
        let late = |since: Instant| begun_at > since + SUPERSEDED_FOR && self.is_quiet_for(SUPERSEDED_FOR);
        if on != self.leader && self.nodes[on].superseded_at.is_some_and(late) {
            self.oracle.violation(format!("work began on server {on} long after server {} was promoted", self.leader));
        }
    }

    pub(crate) fn next_entry(&mut self) -> u64 {
        self.entries += 1;
        self.entries
    }

    pub(crate) fn next_pid(&mut self) -> i32 {
        self.pids += 1;
        self.pids
    }

    /// The present time as a server's clock shows it, in microseconds since 1970.
    pub(crate) fn clock(&self) -> i64 {
        1_700_000_000_000_000 + i64::try_from(self.zero.elapsed().as_micros()).unwrap_or(0)
    }

    /// Appends a record, and returns how many there are then.
    pub(crate) fn append(&mut self, on: usize, what: What) -> usize {
        self.serials += 1;
        let (serial, keeps) = (self.serials, !self.setup.loses_unflushed());
        let log = &mut self.nodes[on].log;
        let records = log.append(serial, what);
        if keeps {
            log.flush(records);
        }
        records
    }

    pub(crate) fn assign_xid(&mut self, on: usize, pid: i32) -> u64 {
        let node = &mut self.nodes[on];
        let xid = node.next_xid;
        node.next_xid += 1;
        node.running.insert(xid);
        if let Some(backend) = node.backends.get_mut(&pid) {
            backend.xid = Some(xid);
        }
        xid
    }

    pub(crate) fn set_doing(&mut self, on: usize, pid: i32, doing: Doing) {
        if let Some(backend) = self.nodes[on].backends.get_mut(&pid)
            && backend.doing != doing
        {
            (backend.doing, backend.since) = (doing, Instant::now());
        }
    }

    /// Ends the sessions of a server's life, and begins another one.
    fn end_life(&mut self, on: usize, goodbye: Goodbye) {
        let node = &mut self.nodes[on];
        node.goodbye = goodbye;
        node.lives += 1;
        self.troubled_at[on] = Instant::now();
        let node = &mut self.nodes[on];
        node.running.clear();
        node.ended.notify_waiters();
        node.backends.clear();
        std::mem::replace(&mut node.life, CancellationToken::new()).cancel();
    }

    /// The process dies. What is not on the disk is lost.
    pub(crate) fn crash(&mut self, on: usize, goodbye: Goodbye) {
        let flushed = self.nodes[on].log.flushed();
        let lost = self.nodes[on].log.len() - flushed;
        self.say(|| format!("server {on} crashes ({goodbye:?}), and loses {lost} records"));
        self.nodes[on].process = Process::Down;
        self.nodes[on].log.truncate(flushed);
        self.nodes[on].machine_up = goodbye != Goodbye::Silence;
        self.end_life(on, goodbye);
    }

    /// A clean shutdown: a primary writes a last checkpoint, and its standbys that are there receive it.
    pub(crate) fn shut_down(&mut self, on: usize) {
        self.say(|| format!("server {on} is shut down cleanly"));
        if !self.nodes[on].recovery {
            // A session that waits in COMMIT is ended, too. Its commit record is in the log.
            for xid in std::mem::take(&mut self.nodes[on].running) {
                if self.nodes[on].log.outcome(xid).is_none() {
                    self.append(on, What::Abort { xid });
                }
            }
            self.checkpoint(on, true);
            self.replicate();
        }
        self.nodes[on].process = Process::Down;
        self.end_life(on, Goodbye::Shutdown);
    }

    /// Writes a checkpoint. `ends_something`: a shutdown, or a recovery.
    pub(crate) fn checkpoint(&mut self, on: usize, ends_something: bool) {
        let (position, timeline) = (self.nodes[on].log.end(), self.nodes[on].timeline);
        let records = self.append(on, What::Checkpoint { newest_xid: self.nodes[on].next_xid - 1 });
        let node = &mut self.nodes[on];
        node.log.flush(records);
        node.checkpoint = Checkpoint { position, timeline, ends_something };
        if !ends_something {
            node.segments.retain(|segment| *segment == timeline);
        }
    }

    /// Starts a primary on its own log. After a crash it recovers. `leads`: the manager wants it, so it is no zombie.
    pub(crate) fn start_primary(&mut self, on: usize, clean: bool, leads: bool) {
        let clock = self.clock();
        let node = &mut self.nodes[on];
        (node.machine_up, node.process, node.frozen, node.recovery) = (true, Process::Up, false, false);
        (node.upstream, node.received, node.replayed_an_end) = (None, None, false);
        node.started_at = clock;
        node.replayed = (!clean).then(|| node.log.end());
        node.next_xid_from_log();
        if !clean {
            node.stats_reset = clock + UNTIL_RESET;
            self.checkpoint(on, true);
        }
        if leads {
            self.became_primary(on, if clean { "restarted" } else { "recovered" });
        } else {
            self.nodes[on].superseded_at = Some(Instant::now());
            self.counts.note("seen", "zombies");
            self.say(|| format!("server {on} comes back as a primary that nobody wants"));
        }
    }

    /// One backend crashes: all sessions end, and the server recovers without a restart of the postmaster.
    pub(crate) fn backend_crash(&mut self, on: usize) {
        let clock = self.clock();
        let flushed = self.nodes[on].log.flushed();
        self.say(|| format!("a backend of server {on} crashes"));
        self.nodes[on].log.truncate(flushed);
        self.end_life(on, Goodbye::BackendCrash);
        let node = &mut self.nodes[on];
        (node.stats_reset, node.replayed, node.received) = (clock, Some(node.log.end()), None);
        node.replayed_an_end = false;
        node.next_xid_from_log();
        self.checkpoint(on, true);
        self.became_primary(on, "recovered from the crash of a backend");
    }

    /// Starts a server as a standby. `of`: it streams from that server; otherwise it replays its own log.
    pub(crate) fn start_standby(&mut self, on: usize, of: Option<usize>, clean: bool) {
        self.say(|| format!("server {on} starts as a standby of {of:?}"));
        let clock = self.clock();
        let node = &mut self.nodes[on];
        (node.machine_up, node.process, node.frozen, node.recovery) = (true, Process::Up, false, true);
        (node.upstream, node.received, node.replayed) = (of, None, None);
        node.started_at = clock;
        if !clean {
            node.stats_reset = clock + UNTIL_RESET;
        }
        let from = node.checkpoint.position;
        let is_end = |what: &What| matches!(what, What::Commit { .. } | What::Abort { .. });
        node.replayed_an_end =
            node.log.records().iter().rev().take_while(|it| it.end > from).any(|it| is_end(&it.what));
        node.next_xid_from_log();
    }

    /// Lets the server crash at this stage of a COMMIT, if a trap was set for it. Returns whether it did.
    pub(crate) fn spring(&mut self, on: usize, stage: Stage) -> bool {
        let Some(trap) = self.nodes[on].trap.as_mut().filter(|trap| trap.stage == stage) else { return false };
        if trap.commits > 0 {
            trap.commits -= 1;
            return false;
        }
        let goodbye = trap.goodbye;
        self.nodes[on].trap = None;
        self.counts.note("crashes within COMMIT", format!("{stage:?}"));
        if goodbye == Goodbye::BackendCrash && on == self.leader {
            self.backend_crash(on);
        } else {
            self.crash(on, if goodbye == Goodbye::Silence { goodbye } else { Goodbye::Closed });
        }
        true
    }

    /// Rewinds a stopped server to where the leader's log left its own, as `pg_rewind` does.
    pub(crate) fn rewind(&mut self, on: usize, leader: usize) {
        let common = self.nodes[on].log.common_with(&self.nodes[leader].log);
        let lost = self.nodes[on].log.len() - common;
        self.say(|| format!("server {on} is rewound, and loses {lost} records"));
        let checkpoint = self.nodes[leader].checkpoint;
        let timeline = self.nodes[leader].timeline;
        let ancestry = self.nodes[leader].ancestry.clone();
        let node = &mut self.nodes[on];
        node.log.truncate(common);
        (node.timeline, node.ancestry, node.checkpoint) = (timeline, ancestry, checkpoint);
    }

    pub(crate) fn promote(&mut self, on: usize) {
        let node = &mut self.nodes[on];
        let (end, old) = (node.log.end(), node.timeline);
        node.ancestry.push((old, end));
        let newest = if self.setup.archives { self.archived.max(old) } else { old };
        node.timeline = newest + 1;
        let timeline = node.timeline;
        self.archived = self.archived.max(timeline);
        node.segments.insert(timeline);
        (node.recovery, node.replayed, node.upstream) = (false, Some(end), None);
        node.next_xid_from_log();
        node.checkpoint_at = None;
        node.thawed.notify_waiters();
        let records = self.append(on, What::EndOfRecovery);
        self.nodes[on].log.flush(records);
        self.became_primary(on, "promoted");
    }

    fn became_primary(&mut self, on: usize, how: &str) {
        self.leader = on;
        self.failovers += 1;
        let now = Instant::now();
        self.troubled_at.fill(now);
        for (other, node) in self.nodes.iter_mut().enumerate() {
            node.superseded_at = if other == on { None } else { node.superseded_at.or(Some(now)) };
        }
        self.counts.note("failovers", how);
        let timeline = self.nodes[on].timeline;
        self.say(|| format!("server {on} is the primary, {how}, timeline {timeline}"));
        let wait = self.rng.millis(200, 8000);
        self.nodes[on].checkpoint_at = Some(Instant::now() + wait);
    }

    /// Copies what each primary has on its disk to the standbys that can receive it. Returns whether one did.
    pub(crate) fn replicate(&mut self) -> bool {
        let mut moved = false;
        for standby in 0..self.nodes.len() {
            let Some(upstream) = self.nodes[standby].upstream.filter(|upstream| *upstream != standby) else { continue };
            let (low, high) = self.nodes.split_at_mut(standby.max(upstream));
            let (to, from) =
                if standby < upstream { (&mut low[standby], &mut high[0]) } else { (&mut high[0], &mut low[upstream]) };
            if !to.works() || !to.recovery || to.troubles.lags || !from.works() {
                continue;
            }
            if !to.log.is_prefix_of(&from.log) || to.log.len() > from.log.flushed() || from.timeline < to.timeline {
                continue;
            }
            let before = to.log.len();
            if to.received.is_none() || before < from.log.flushed() {
                moved = true;
                to.log.receive(&from.log);
                // The last page may end with the beginning of a record, which is received and cannot be replayed.
                to.received = Some(to.log.end().max(from.log.full_pages()));
                to.replayed_an_end |= to.log.len() > before;
                to.next_xid_from_log();
            }
            if to.timeline != from.timeline {
                to.timeline = from.timeline;
                to.ancestry.clone_from(&from.ancestry);
                to.segments.insert(to.timeline);
            }
        }
        moved
    }

    /// Returns whether the synchronous standby has the first `records` records of this primary.
    pub(crate) fn is_confirmed(&self, on: usize, records: usize) -> bool {
        let Some(standby) = self.sync_standby else { return !self.setup.synchronous };
        let standby = &self.nodes[standby];
        on == self.leader
            && standby.upstream == Some(on)
            && standby.log.len() >= records
            && standby.log.is_prefix_of(&self.nodes[on].log)
    }

    /// Returns whether this standby has followed the newest primary's timeline, so that it may be promoted.
    pub(crate) fn may_be_promoted(&self, on: usize) -> bool {
        let (node, leader) = (&self.nodes[on], &self.nodes[self.leader]);
        let follows = node.timeline == leader.timeline;
        let confirmed = !self.setup.synchronous || self.sync_standby == Some(on);
        node.is_standby() && node.works() && follows && confirmed && node.upstream.is_some()
    }
}

#[cfg(test)]
mod tests;
