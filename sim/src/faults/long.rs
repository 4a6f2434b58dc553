//! What lasts, or what comes often: outages, splits, storms, and what must not make the pool leave its primary.

#![allow(clippy::unused_async, reason = "each fault may wait, and some do not")]

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{cancel, crash_standbys, cut_all, kill, leader};
use crate::manager::{best_standby, chance, fail_over, pause, promote};
use crate::net::Direction;
use crate::node::{Goodbye, Stage, Trap, Troubles};
use crate::world::Sim;

faults! {
    16 "a storm of failovers" storm,
    3 "there is no primary for long" long_outage,
    2 "statements fail for long" long_errors,
    2 "the old primary goes on beside the new one" split,
    1 "only new sessions fail" new_sessions_fail,
    5 "a connection dies without a sign" die_without_a_sign,
    2 "a promotion is given up for another one" vain_promotion,
    1 "the primary is fenced for long" long_fence,
    2 "the disk is full" full_disk,
    2 "waits for the standby are cancelled, and those who ask about them wait" cancel_twice,
    3 "a new primary crashes within its first COMMITs" short_reign,
}

async fn storm(sim: &Arc<Sim>) {
    let times = sim.lock().rng.between(3, 6);
    for _ in 0..times {
        let way = sim.lock().rng.index(3);
        match way {
            0 => kill(sim).await,
            1 => {
                let (on, _) = leader(sim);
                sim.lock().backend_crash(on);
            }
            _ => {
                let (on, _) = leader(sim);
                sim.lock().shut_down(on);
            }
        }
        fail_over(sim).await;
        pause(sim, 50, 900).await;
    }
}

/// Commits are in doubt, and nobody can tell of them in time.
async fn long_outage(sim: &Arc<Sim>) {
    cut_all(sim).await;
    kill(sim).await;
    pause(sim, 8000, 22_000).await;
}

/// Commits are in doubt, and the primary cannot give out an id to those who ask about them. Everything else works.
async fn full_disk(sim: &Arc<Sim>) {
    let (on, net) = leader(sim);
    sim.lock().say(|| format!("the disk of server {on} is full"));
    sim.lock().nodes[on].troubles.fsync = Duration::from_millis(300);
    pause(sim, 300, 600).await;
    net.links().iter().for_each(|link| link.reset());
    sim.lock().nodes[on].troubles.fsync = Duration::ZERO;
    sim.lock().nodes[on].troubles.full_disk = true;
    pause(sim, 9000, 16_000).await;
    sim.lock().nodes[on].troubles.full_disk = false;
    sim.lock().trouble(on);
}

/// COMMITs wait, lose their connections and are cancelled. Who asks about them finds them committed, waits for the
/// standby in turn, and is cancelled, too.
async fn cancel_twice(sim: &Arc<Sim>) {
    crash_standbys(&mut sim.lock());
    pause(sim, 300, 1500).await;
    let (_, net) = leader(sim);
    net.links().iter().for_each(|link| link.reset());
    for _ in 0..3 {
        pause(sim, 200, 1200).await;
        cancel(&sim.lock());
    }
    pause(sim, 100, 2000).await;
}

/// The pool knows little about it yet. Its successor completes a checkpoint before the pool sees it.
async fn short_reign(sim: &Arc<Sim>) {
    kill(sim).await;
    fail_over(sim).await;
    let (on, _) = leader(sim);
    let commits = sim.lock().rng.below(2);
    sim.lock().nodes[on].trap = Some(Trap { stage: Stage::Confirmed, commits, goodbye: Goodbye::Closed });
    for _ in 0..400 {
        pause(sim, 5, 15).await;
        if sim.lock().nodes[on].trap.is_none() {
            break;
        }
    }
    sim.lock().nodes[on].trap = None;
    let standby = best_standby(&sim.lock());
    if let Some(standby) = standby.filter(|_| !sim.lock().nodes[on].works()) {
        promote(sim, standby);
        sim.lock().checkpoint(standby, false);
    }
}

async fn long_errors(sim: &Arc<Sim>) {
    let (on, net) = leader(sim);
    sim.lock().say(|| format!("statements fail on server {on} for long, also those that settle COMMITs"));
    sim.lock().nodes[on].troubles.fsync = Duration::from_millis(300);
    pause(sim, 300, 600).await;
    net.links().iter().for_each(|link| link.reset());
    sim.lock().nodes[on].troubles.fsync = Duration::ZERO;
    sim.lock().nodes[on].troubles.errors = 100;
    pause(sim, 9000, 16_000).await;
    sim.lock().nodes[on].troubles.errors = 0;
    sim.lock().trouble(on);
}

/// The pool reaches both. It must find the new one by itself.
async fn split(sim: &Arc<Sim>) {
    let (on, _) = leader(sim);
    let able = {
        let world = sim.lock();
        (0..world.nodes.len()).find(|standby| *standby != on && world.may_be_promoted(*standby))
    };
    let Some(standby) = able else { return };
    sim.lock().say(|| format!("server {on} does not notice that it is replaced"));
    promote(sim, standby);
    pause(sim, 22_000, 30_000).await;
}

/// Open sessions are served. So the pool has no reason to leave its primary, and `run.rs` checks that it does not.
async fn new_sessions_fail(sim: &Arc<Sim>) {
    pause(sim, 21_000, 23_000).await;
    let on = sim.lock().leader;
    let slots = chance(sim, 50);
    sim.lock().say(|| format!("only new sessions fail on server {on}"));
    let set = |troubles: &mut Troubles, on| if slots { troubles.slots_full = on } else { troubles.log_ins_hang = on };
    set(&mut sim.lock().nodes[on].troubles, true);
    pause(sim, 4000, 15_000).await;
    let mut world = sim.lock();
    set(&mut world.nodes[on].troubles, false);
    world.nodes[on].thawed.notify_waiters();
}

/// A router has forgotten it. TCP gives up after a while.
async fn die_without_a_sign(sim: &Arc<Sim>) {
    for _ in 0..2 {
        let (on, net) = leader(sim);
        let links = net.links();
        let chosen = {
            let mut world = sim.lock();
            let chosen = world.rng.index(links.len());
            world.say(|| format!("a connection to server {on} dies without a sign"));
            chosen
        };
        if let Some(link) = links.into_iter().nth(chosen) {
            link.die_without_a_sign();
            tokio::spawn(async move {
                sleep(Duration::from_secs(12)).await;
                link.reset();
            });
        }
        pause(sim, 5, 2000).await;
    }
}

/// A standby is promoted, which the pool never sees, and dies. Another one takes its place, and the next number of the
/// archive.
async fn vain_promotion(sim: &Arc<Sim>) {
    let (on, _) = leader(sim);
    let standbys: Vec<usize> = {
        let world = sim.lock();
        (0..world.nodes.len()).filter(|standby| *standby != on && world.may_be_promoted(*standby)).collect()
    };
    let [first, second] = standbys[..] else { return };
    if !sim.lock().setup.archives || sim.lock().setup.synchronous {
        return;
    }
    let net = Arc::clone(&sim.lock().nodes[first].net);
    net.block(Direction::ToServer, true);
    net.block(Direction::ToPool, true);
    kill(sim).await;
    {
        let mut world = sim.lock();
        world.nodes[second].upstream = Some(first);
        world.promote(first);
        world.crash(first, Goodbye::Closed);
        world.counts.note("seen", "vain promotions");
    }
    pause(sim, 10, 500).await;
    promote(sim, second);
    pause(sim, 10, 500).await;
    net.block(Direction::ToServer, false);
    net.block(Direction::ToPool, false);
}

/// The pool must not take it for the primary any more.
async fn long_fence(sim: &Arc<Sim>) {
    let (on, _) = leader(sim);
    sim.lock().say(|| format!("server {on} is fenced for long"));
    sim.lock().nodes[on].fenced = true;
    let since = Instant::now();
    pause(sim, 6000, 9000).await;
    let mut world = sim.lock();
    if world.published == Some(on) && !world.setup.wrapped {
        let violation = format!("the pool takes server {on} for the primary, fenced for {:?}", since.elapsed());
        world.oracle.violation(violation);
    }
    world.nodes[on].fenced = false;
    world.trouble(on);
}
