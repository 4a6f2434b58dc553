//! The failover manager of the simulated cluster: it promotes, restarts, rewinds and points standbys at their primary.
//! And what servers do by themselves: replication, the WAL writer, checkpoints.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::net::Direction;
use crate::node::{Goodbye, Process, Troubles};
use crate::world::{Sim, World};

/// A random time, both ends included, in milliseconds.
pub(crate) async fn pause(sim: &Sim, least: u64, most: u64) {
    let time = sim.lock().rng.millis(least, most);
    sleep(time).await;
}

pub(crate) fn chance(sim: &Sim, percent: u64) -> bool {
    sim.lock().rng.chance(percent)
}

/// Ships the log as soon as something was flushed.
pub(crate) async fn ship(sim: Arc<Sim>) {
    loop {
        sim.flushed.notified().await;
        sleep(Duration::from_millis(1)).await;
        replicate(&sim);
    }
}

fn replicate(sim: &Sim) {
    let moved = sim.lock().replicate();
    if moved {
        sim.replicated.notify_waiters();
    }
}

/// What servers do from time to time.
pub(crate) async fn keep_house(sim: Arc<Sim>) {
    loop {
        sleep(Duration::from_millis(100)).await;
        let changed = {
            let mut world = sim.lock();
            (0..world.nodes.len()).for_each(|node| tidy(&mut world, node));
            choose_sync_standby(&mut world)
        };
        replicate(&sim);
        if changed {
            sim.replicated.notify_waiters();
        }
    }
}

fn tidy(world: &mut World, on: usize) {
    let node = &mut world.nodes[on];
    if !node.works() {
        return;
    }
    if node.recovery {
        let upstream = node.upstream;
        let point = upstream.map(|upstream| world.nodes[upstream].checkpoint);
        let rarely = world.rng.chance(3);
        let node = &mut world.nodes[on];
        if let Some(point) = point.filter(|point| rarely && point.position < node.log.end()) {
            node.checkpoint = point;
        }
        return;
    }
    if node.troubles.fsync.is_zero() {
        let records = node.log.len();
        node.log.flush(records);
    }
    if node.checkpoint_at.is_some_and(|at| at <= Instant::now()) {
        let wait = world.rng.millis(3000, 30_000);
        world.checkpoint(on, false);
        world.nodes[on].checkpoint_at = Some(Instant::now() + wait);
    }
}

/// While the leader is well, a standby that has all of its log becomes the synchronous one if the present one is away.
fn choose_sync_standby(world: &mut World) -> bool {
    let leader = world.leader;
    if !world.setup.synchronous || !world.nodes[leader].works() || world.nodes[leader].recovery {
        return false;
    }
    let has_all = |on: usize| {
        let (node, leader_node) = (&world.nodes[on], &world.nodes[leader]);
        node.works()
            && node.upstream == Some(leader)
            && node.log.is_prefix_of(&leader_node.log)
            && node.log.len() >= leader_node.log.flushed()
            && node.timeline == leader_node.timeline
    };
    let is_there = |on: usize| world.nodes[on].works() && world.nodes[on].upstream == Some(leader);
    if world.sync_standby.is_some_and(is_there) {
        return false;
    }
    let Some(chosen) = (0..world.nodes.len()).find(|on| *on != leader && has_all(*on)) else { return false };
    world.sync_standby = Some(chosen);
    world.say(|| format!("server {chosen} is the synchronous standby"));
    true
}

/// Makes sure that there is a primary, by promotion or by a restart.
pub(crate) async fn fail_over(sim: &Arc<Sim>) {
    pause(sim, 50, 1500).await;
    loop {
        if is_well(&sim.lock()) {
            return;
        }
        let standby = best_standby(&sim.lock());
        // A manager that finds the old primary's machine well may start its process again.
        let restarts = chance(sim, 25);
        if let Some(standby) = standby.filter(|_| !restarts) {
            promote(sim, standby);
            return;
        }
        let leader = sim.lock().leader;
        revive(sim, leader).await;
        pause(sim, 50, 500).await;
    }
}

fn is_well(world: &World) -> bool {
    let leader = &world.nodes[world.leader];
    leader.works() && !leader.recovery
}

/// The standby with the most WAL of those that may be promoted.
pub(crate) fn best_standby(world: &World) -> Option<usize> {
    let able = (0..world.nodes.len()).filter(|on| *on != world.leader && world.may_be_promoted(*on));
    able.max_by_key(|on| world.nodes[*on].log.len())
}

/// Promotes a standby, and points the others at it.
pub(crate) fn promote(sim: &Arc<Sim>, standby: usize) {
    let mut world = sim.lock();
    world.sync_standby = None;
    world.promote(standby);
    for other in 0..world.nodes.len() {
        if other != standby && world.nodes[other].is_standby() && world.nodes[other].upstream.is_some() {
            world.nodes[other].upstream = Some(standby);
        }
    }
    let late = world.rng.millis(0, 3000);
    drop(world);
    let sim = Arc::clone(sim);
    tokio::spawn(async move {
        sleep(late).await;
        let mut world = sim.lock();
        world.names.primary = world.leader;
    });
}

/// Brings a leader back that is stopped, frozen or crashed: as it is, after a recovery, or within its lease.
async fn revive(sim: &Arc<Sim>, leader: usize) {
    let Some(clean) = power_up(&mut sim.lock(), leader) else { return };
    sim.up.notify_waiters();
    pause(sim, 20, 800).await;
    if !chance(sim, 25) {
        return sim.lock().start_primary(leader, clean, true);
    }
    // Patroni starts a leader whose lease goes on as a standby on its own log, and promotes it to the next timeline.
    sim.lock().start_standby(leader, None, clean);
    sim.lock().counts.note("seen", "restarts within a lease");
    pause(sim, 10, 1500).await;
    let mut world = sim.lock();
    if world.nodes[leader].is_standby() && world.nodes[leader].works() {
        world.sync_standby = None;
        world.promote(leader);
    }
}

/// Lets a process go on that runs. Otherwise it begins to start, and this returns whether it was shut down cleanly.
fn power_up(world: &mut World, leader: usize) -> Option<bool> {
    let node = &mut world.nodes[leader];
    if node.process == Process::Up && node.machine_up {
        node.frozen = false;
        node.thawed.notify_waiters();
        if node.recovery {
            world.sync_standby = None;
            world.promote(leader);
        }
        return None;
    }
    let clean = node.goodbye == Goodbye::Shutdown;
    machine_up(world, leader);
    world.nodes[leader].process = Process::Starting;
    Some(clean)
}

/// A machine has power again. It knows nothing of its old connections.
fn machine_up(world: &mut World, on: usize) {
    if !world.nodes[on].machine_up {
        world.nodes[on].machine_up = true;
        world.nodes[on].net.links().iter().for_each(|link| link.forget());
    }
}

/// Makes each server that is neither the leader nor its standby one of its standbys again.
pub(crate) async fn rejoin(sim: &Arc<Sim>) {
    let servers = sim.lock().nodes.len();
    for on in 0..servers {
        let leader = sim.lock().leader;
        if on == leader || follows(&sim.lock(), on) {
            continue;
        }
        pause(sim, 10, 600).await;
        // It may come back as a primary that nobody wants, until the manager notices.
        let may_be_zombie = may_be_zombie(&sim.lock(), on, leader);
        if may_be_zombie && chance(sim, 30) {
            come_back(&mut sim.lock(), on);
            sim.up.notify_waiters();
            pause(sim, 100, 4000).await;
        }
        thaw(sim, on);
        if !follow(&mut sim.lock(), on, leader) {
            return;
        }
        sim.up.notify_waiters();
    }
}

/// It comes back as a primary that nobody wants.
fn come_back(world: &mut World, on: usize) {
    machine_up(world, on);
    let clean = world.nodes[on].goodbye == Goodbye::Shutdown;
    world.start_primary(on, clean, false);
}

/// Stops a server, rewinds it if need be, and starts it as a standby, unless the leader is another one by now.
pub(crate) fn follow(world: &mut World, on: usize, leader: usize) -> bool {
    if world.leader != leader || !is_well(world) {
        return false;
    }
    if world.nodes[on].process != Process::Down {
        world.crash(on, Goodbye::Shutdown);
    }
    machine_up(world, on);
    if !world.nodes[on].log.is_prefix_of(&world.nodes[leader].log) {
        world.rewind(on, leader);
    }
    world.start_standby(on, Some(leader), false);
    true
}

/// Returns whether this is a stopped primary of an older timeline.
fn may_be_zombie(world: &World, on: usize, leader: usize) -> bool {
    let node = &world.nodes[on];
    node.process == Process::Down && !node.recovery && node.timeline < world.nodes[leader].timeline
}

fn follows(world: &World, on: usize) -> bool {
    let (node, leader) = (&world.nodes[on], &world.nodes[world.leader]);
    node.is_standby() && node.works() && node.upstream == Some(world.leader) && node.log.is_prefix_of(&leader.log)
}

pub(crate) fn thaw(sim: &Sim, on: usize) {
    let mut world = sim.lock();
    if world.nodes[on].frozen {
        world.say(|| format!("server {on} goes on"));
        world.trouble(on);
        world.nodes[on].frozen = false;
        world.nodes[on].thawed.notify_waiters();
    }
}

/// Ends whatever is wrong, and waits until the cluster is whole.
pub(crate) async fn heal(sim: &Arc<Sim>) {
    let servers = sim.lock().nodes.len();
    for on in 0..servers {
        let net = Arc::clone(&sim.lock().nodes[on].net);
        net.block(Direction::ToServer, false);
        net.block(Direction::ToPool, false);
        net.delay(Duration::ZERO);
        net.cut_new(None);
        thaw(sim, on);
        let mut world = sim.lock();
        world.nodes[on].troubles = Troubles::default();
        world.nodes[on].trap = None;
        world.nodes[on].fenced = false;
        world.nodes[on].thawed.notify_waiters();
    }
    sim.lock().names.gone = false;
    fail_over(sim).await;
    rejoin(sim).await;
    let mut world = sim.lock();
    world.names.primary = world.leader;
}
