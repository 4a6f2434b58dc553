//! What goes wrong, by weight. A new fault is a row of the table here or in `faults/long.rs`, and its function in the
//! same file. When the function ends, the manager makes sure that there is a primary, and brings back what has left;
//! until then anything may stay broken.

#![allow(clippy::unused_async, reason = "each fault may wait, and some do not")]

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use crate::manager::{chance, fail_over, pause, promote, thaw};
use crate::net::{Direction, Link, Net};
use crate::node::{Backend, Doing, Goodbye, Process, Stage, Trap, Troubles};
use crate::world::{Sim, World};

type Ends<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

pub(crate) struct Fault {
    pub(crate) name: &'static str,
    pub(crate) weight: u64,
    pub(crate) happen: for<'a> fn(&'a Arc<Sim>) -> Ends<'a>,
}

macro_rules! faults {
    ($($weight:literal $name:literal $happen:ident),* $(,)?) => {
        pub(super) const ROWS: &[$crate::faults::Fault] =
            &[$($crate::faults::Fault { name: $name, weight: $weight, happen: |sim| Box::pin($happen(sim)) }),*];
    };
}

mod long;

/// All faults.
pub(crate) fn all() -> impl Iterator<Item = &'static Fault> + Clone {
    ROWS.iter().chain(long::ROWS)
}

faults! {
    12 "the primary's process is killed" kill,
    8 "the primary's machine loses its power" power_off,
    6 "a backend of the primary crashes" backend_crash,
    6 "the primary is shut down cleanly" shut_down,
    8 "switchover" switch_over,
    8 "the primary is frozen for a moment" freeze_briefly,
    8 "the primary is frozen and replaced" freeze_and_replace,
    6 "the pool cannot reach the primary" partition,
    6 "one direction to the primary is lost" one_way,
    6 "the primary is cut off and replaced" cut_off_and_replace,
    10 "connections are cut within messages" cut,
    6 "connections are cut around COMMIT" cut_commits,
    12 "the primary crashes within a COMMIT" crash_in_commit,
    4 "new connections are cut" cut_new,
    3 "statements fail" errors,
    4 "BEGIN fails" begin,
    6 "connections are cut while the standby is away" cut_waits,
    4 "the disk is slow" slow_disk,
    5 "a standby lags and is promoted" promote_laggard,
    5 "the synchronous standby is lost" lose_standby,
    5 "two failovers in a row" two_in_a_row,
    3 "DNS does not answer" no_dns,
    3 "no slot is free" slots_full,
    3 "log-ins hang" log_ins_hang,
    3 "log-ins are refused" log_ins_refused,
    4 "the primary is fenced" fence,
    3 "the primary is fenced, and open sessions are, too" fence_all,
    3 "the network is late" late,
    4 "an administrator ends sessions" terminate,
    2 "an administrator cancels waits for the standby" cancel_waits,
}

/// The leader, and its network.
fn leader(sim: &Sim) -> (usize, Arc<Net>) {
    let mut world = sim.lock();
    let leader = world.leader;
    world.trouble(leader);
    (leader, Arc::clone(&world.nodes[leader].net))
}

/// Any server, perhaps the leader.
fn any(sim: &Sim) -> usize {
    let mut world = sim.lock();
    let servers = world.nodes.len();
    let chosen = world.rng.index(servers);
    world.trouble(chosen);
    chosen
}

async fn kill(sim: &Arc<Sim>) {
    let (on, _) = leader(sim);
    sim.lock().crash(on, Goodbye::Closed);
}

async fn power_off(sim: &Arc<Sim>) {
    let (on, _) = leader(sim);
    sim.lock().crash(on, Goodbye::Silence);
    fail_over(sim).await;
    pause(sim, 0, 6000).await;
}

async fn backend_crash(sim: &Arc<Sim>) {
    let (on, _) = leader(sim);
    sim.lock().backend_crash(on);
}

async fn shut_down(sim: &Arc<Sim>) {
    let (on, _) = leader(sim);
    sim.lock().shut_down(on);
}

/// A standby that has everything becomes the primary, as an operator does it.
async fn switch_over(sim: &Arc<Sim>) {
    let (on, _) = leader(sim);
    sim.lock().shut_down(on);
    pause(sim, 1, 300).await;
    let able = {
        let world = sim.lock();
        (0..world.nodes.len()).find(|standby| *standby != on && world.may_be_promoted(*standby))
    };
    if let Some(standby) = able {
        promote(sim, standby);
    }
}

async fn freeze(sim: &Arc<Sim>, on: usize) {
    let mut world = sim.lock();
    world.say(|| format!("server {on} stands still"));
    world.nodes[on].frozen = true;
}

async fn freeze_briefly(sim: &Arc<Sim>) {
    let on = any(sim);
    freeze(sim, on).await;
    pause(sim, 50, 4000).await;
    thaw(sim, on);
}

async fn freeze_and_replace(sim: &Arc<Sim>) {
    let (on, _) = leader(sim);
    freeze(sim, on).await;
    fail_over(sim).await;
    pause(sim, 0, 5000).await;
    thaw(sim, on);
    pause(sim, 0, 2000).await;
}

async fn partition(sim: &Arc<Sim>) {
    let (on, net) = leader(sim);
    sim.lock().say(|| format!("the pool cannot reach server {on}"));
    net.block(Direction::ToServer, true);
    net.block(Direction::ToPool, true);
    let most = if chance(sim, 30) { 16_000 } else { 4000 };
    pause(sim, 50, most).await;
    open(sim, on, &net);
}

fn open(sim: &Sim, on: usize, net: &Net) {
    let mut world = sim.lock();
    world.say(|| format!("the way to server {on} is open"));
    world.trouble(on);
    drop(world);
    net.block(Direction::ToServer, false);
    net.block(Direction::ToPool, false);
}

async fn one_way(sim: &Arc<Sim>) {
    let (on, net) = leader(sim);
    let direction = if chance(sim, 50) { Direction::ToServer } else { Direction::ToPool };
    sim.lock().say(|| format!("nothing gets through {direction:?} at server {on}"));
    net.block(direction, true);
    pause(sim, 50, 6000).await;
    open(sim, on, &net);
}

/// The primary is alone: neither the pool nor its standbys reach it. It goes on by itself.
async fn cut_off_and_replace(sim: &Arc<Sim>) {
    let (on, net) = leader(sim);
    sim.lock().say(|| format!("server {on} is cut off from everybody"));
    net.block(Direction::ToServer, true);
    net.block(Direction::ToPool, true);
    pause(sim, 10, 1000).await;
    let able = {
        let world = sim.lock();
        (0..world.nodes.len()).find(|standby| *standby != on && world.may_be_promoted(*standby))
    };
    if let Some(standby) = able {
        promote(sim, standby);
    }
    pause(sim, 0, 6000).await;
    open(sim, on, &net);
    pause(sim, 0, 3000).await;
}

/// Cuts some connections after a few more bytes.
async fn cut(sim: &Arc<Sim>) {
    for _ in 0..8 {
        let (on, net) = leader(sim);
        cut_one(&mut sim.lock(), on, &net.links());
        pause(sim, 5, 150).await;
    }
}

fn cut_one(world: &mut World, on: usize, links: &[Arc<Link>]) {
    let Some(link) = links.get(world.rng.index(links.len())) else { return };
    let direction = if world.rng.chance(70) { Direction::ToPool } else { Direction::ToServer };
    let bytes = world.rng.index(300);
    world.say(|| format!("a connection to server {on} is cut {direction:?} after {bytes} bytes"));
    link.cut_after(direction, bytes);
}

/// Cuts every connection, and half of the time the server dies as well.
async fn cut_commits(sim: &Arc<Sim>) {
    cut_all(sim).await;
    if chance(sim, 50) {
        kill(sim).await;
    }
}

/// Cuts every connection within its next answer.
async fn cut_all(sim: &Arc<Sim>) {
    let (on, net) = leader(sim);
    for link in net.links() {
        let bytes = sim.lock().rng.index(120);
        link.cut_after(Direction::ToPool, bytes);
    }
    sim.lock().say(|| format!("each connection to server {on} is cut within the next answers"));
    pause(sim, 5, 500).await;
}

/// The server crashes before a COMMIT is on the disk, before the standby has it, or before the client has the answer.
async fn crash_in_commit(sim: &Arc<Sim>) {
    let (on, _) = leader(sim);
    set_trap(&mut sim.lock(), on);
    for _ in 0..30 {
        pause(sim, 50, 150).await;
        if sim.lock().nodes[on].trap.is_none() {
            return;
        }
    }
    sim.lock().nodes[on].trap = None;
}

fn set_trap(world: &mut World, on: usize) {
    let stage = [Stage::Written, Stage::Flushed, Stage::Confirmed][world.rng.index(3)];
    let goodbye = [Goodbye::Closed, Goodbye::Silence, Goodbye::BackendCrash][world.rng.index(3)];
    let commits = world.rng.below(6);
    world.say(|| format!("server {on} will crash {stage:?}, {goodbye:?}, after {commits} commits"));
    world.nodes[on].trap = Some(Trap { stage, commits, goodbye });
}

/// Each new connection is cut: in its log-in, in the first question, or in a transaction.
async fn cut_new(sim: &Arc<Sim>) {
    let (on, net) = leader(sim);
    let within = sim.lock().rng.between(100, 3000);
    sim.lock().say(|| format!("new connections to server {on} are cut within {within} bytes"));
    net.cut_new(Some(within));
    net.links().iter().filter(|_| chance(sim, 60)).for_each(|link| link.reset());
    pause(sim, 100, 3000).await;
    net.cut_new(None);
    sim.lock().trouble(on);
}

/// Some statements fail, also those that settle the COMMITs whose connections are cut meanwhile.
async fn errors(sim: &Arc<Sim>) {
    let (on, _) = leader(sim);
    sim.lock().say(|| format!("statements fail on server {on}"));
    let percent = if chance(sim, 50) { 40 } else { 100 };
    sim.lock().nodes[on].troubles.errors = percent;
    cut_all(sim).await;
    pause(sim, 500, 9000).await;
    sim.lock().nodes[on].troubles.errors = 0;
    sim.lock().trouble(on);
}

/// Somebody cancels BEGIN, as a cancel request that comes late does.
async fn begin(sim: &Arc<Sim>) {
    let (on, _) = leader(sim);
    sim.lock().say(|| format!("BEGIN is cancelled on server {on}"));
    sim.lock().nodes[on].troubles.begin = if chance(sim, 50) { 30 } else { 100 };
    pause(sim, 200, 5000).await;
    sim.lock().nodes[on].troubles.begin = 0;
    sim.lock().trouble(on);
}

/// COMMITs wait for the standby, and then their connections are cut: the server carries them out later, or never.
async fn cut_waits(sim: &Arc<Sim>) {
    if chance(sim, 50) {
        crash_standby(&mut sim.lock());
    } else {
        crash_standbys(&mut sim.lock());
    }
    pause(sim, 50, 1500).await;
    let (_, net) = leader(sim);
    for link in net.links() {
        link.reset();
    }
    pause(sim, 100, 12_000).await;
}

fn crash_standbys(world: &mut World) {
    let leader = world.leader;
    world.trouble(leader);
    for on in 0..world.nodes.len() {
        if on != leader && world.nodes[on].process == Process::Up {
            world.crash(on, Goodbye::Closed);
        }
    }
}

async fn slow_disk(sim: &Arc<Sim>) {
    let (on, _) = leader(sim);
    let takes = sim.lock().rng.millis(20, 1500);
    sim.lock().say(|| format!("an fsync takes {takes:?} on server {on}"));
    sim.lock().nodes[on].troubles.fsync = takes;
    pause(sim, 200, 4000).await;
    if chance(sim, 50) {
        sim.lock().crash(on, Goodbye::Closed);
    }
    sim.lock().nodes[on].troubles.fsync = Duration::ZERO;
}

async fn promote_laggard(sim: &Arc<Sim>) {
    leader(sim);
    sim.lock().say(|| "the standbys lag".to_owned());
    sim.lock().nodes.iter_mut().for_each(|node| node.troubles.lags = true);
    pause(sim, 100, 1500).await;
    kill(sim).await;
    fail_over(sim).await;
    sim.lock().nodes.iter_mut().for_each(|node| node.troubles.lags = false);
}

async fn lose_standby(sim: &Arc<Sim>) {
    crash_standby(&mut sim.lock());
    pause(sim, 100, 5000).await;
}

fn crash_standby(world: &mut World) {
    let leader = world.leader;
    world.trouble(leader);
    let chosen = world.sync_standby.or_else(|| (0..world.nodes.len()).find(|on| *on != leader));
    if let Some(on) = chosen.filter(|on| world.nodes[*on].process == Process::Up) {
        world.crash(on, Goodbye::Closed);
    }
}

async fn two_in_a_row(sim: &Arc<Sim>) {
    for _ in 0..2 {
        kill(sim).await;
        fail_over(sim).await;
        pause(sim, 0, 400).await;
    }
}

async fn no_dns(sim: &Arc<Sim>) {
    sim.lock().names.gone = true;
    pause(sim, 100, 2000).await;
    kill(sim).await;
    fail_over(sim).await;
    pause(sim, 100, 6000).await;
    sim.lock().names.gone = false;
}

async fn trouble_for(sim: &Arc<Sim>, set: fn(&mut Troubles, bool), replace: bool) {
    let (on, _) = leader(sim);
    if replace {
        sim.lock().nodes.iter_mut().for_each(|node| set(&mut node.troubles, true));
        kill(sim).await;
        fail_over(sim).await;
    } else {
        set(&mut sim.lock().nodes[on].troubles, true);
    }
    pause(sim, 100, 5000).await;
    let mut world = sim.lock();
    for node in &mut world.nodes {
        set(&mut node.troubles, false);
        node.thawed.notify_waiters();
    }
    let servers = world.nodes.len();
    (0..servers).for_each(|on| world.trouble(on));
}

async fn slots_full(sim: &Arc<Sim>) {
    let replace = chance(sim, 50);
    trouble_for(sim, |troubles, on| troubles.slots_full = on, replace).await;
}

async fn log_ins_hang(sim: &Arc<Sim>) {
    let replace = chance(sim, 50);
    trouble_for(sim, |troubles, on| troubles.log_ins_hang = on, replace).await;
}

/// The new primary learns the role's password late.
async fn log_ins_refused(sim: &Arc<Sim>) {
    trouble_for(sim, |troubles, on| troubles.log_ins_refused = on, true).await;
}

async fn fence(sim: &Arc<Sim>) {
    let (on, _) = leader(sim);
    sim.lock().say(|| format!("server {on} is fenced"));
    sim.lock().nodes[on].fenced = true;
    pause(sim, 100, 6000).await;
    let mut world = sim.lock();
    world.say(|| format!("server {on} is fenced no more"));
    world.nodes[on].fenced = false;
    world.trouble(on);
}

/// `ALTER SYSTEM SET default_transaction_read_only`: the next transaction of an open session cannot write.
async fn fence_all(sim: &Arc<Sim>) {
    let (on, _) = leader(sim);
    sim.lock().say(|| format!("server {on} is fenced, and its open sessions, too"));
    sim.lock().nodes[on].troubles.read_only = true;
    pause(sim, 100, 4000).await;
    sim.lock().nodes[on].troubles.read_only = false;
    sim.lock().trouble(on);
}

async fn late(sim: &Arc<Sim>) {
    let on = any(sim);
    let (net, late) = {
        let mut world = sim.lock();
        (Arc::clone(&world.nodes[on].net), world.rng.millis(5, 400))
    };
    sim.lock().say(|| format!("each message to and from server {on} takes {late:?} longer"));
    net.delay(late);
    pause(sim, 200, 4000).await;
    net.delay(Duration::ZERO);
    sim.lock().trouble(on);
}

async fn terminate(sim: &Arc<Sim>) {
    let (on, _) = leader(sim);
    let mut world = sim.lock();
    world.say(|| format!("an administrator ends sessions of server {on}"));
    let all: Vec<_> = world.nodes[on].backends.values().map(|backend| backend.terminate.clone()).collect();
    let chosen: Vec<_> = all.into_iter().filter(|_| world.rng.chance(40)).collect();
    drop(world);
    for session in chosen {
        session.cancel();
    }
}

/// Cancels whatever waits for the synchronous standby, while that is away.
async fn cancel_waits(sim: &Arc<Sim>) {
    lose_standby(sim).await;
    cancel(&sim.lock());
}

fn cancel(world: &World) {
    let waits = |backend: &&Backend| backend.doing == Doing::Committing;
    world.nodes[world.leader].backends.values().filter(waits).for_each(|backend| backend.cancel.notify_waiters());
}
