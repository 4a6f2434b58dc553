use super::*;
use crate::log::Row;
use crate::setup::{Dns, Shown};

/// Commits a row on a server, and flushes it if that is wanted.
fn commit(world: &mut World, on: usize, call: i64, flush: bool) -> u64 {
    let xid = world.assign_xid(on, 0);
    world.append(on, What::Insert { xid, row: Row { call, attempt: 1 } });
    let records = world.append(on, What::Commit { xid });
    world.nodes[on].running.remove(&xid);
    if flush {
        world.nodes[on].log.flush(records);
    }
    xid
}

fn world() -> Arc<Sim> {
    let sim = Sim::new(1, false);
    {
        let mut world = sim.lock();
        let setup = Setup::choose(&mut Rng::new(1));
        world.setup =
            Setup { servers: 2, synchronous: true, shown: Shown::Function, dns: Dns::All, archives: false, ..setup };
        world.nodes = (0..2).map(|index| Node::new(index, Arc::new(Net::default()))).collect();
        world.sync_standby = Some(1);
    }
    sim
}

fn calls(world: &World, on: usize) -> Vec<i64> {
    world.nodes[on].log.rows().map(|row| row.call).collect()
}

#[test]
fn a_crash_loses_what_was_not_flushed_and_its_id_is_given_out_again() {
    let sim = world();
    let mut world = sim.lock();
    commit(&mut world, 0, 1, true);
    let lost = commit(&mut world, 0, 2, false);
    world.crash(0, Goodbye::Closed);
    world.start_primary(0, false, true);
    assert_eq!(calls(&world, 0), [1]);
    assert_eq!(commit(&mut world, 0, 3, true), lost);
    assert!(world.nodes[0].replayed.is_some());
}

#[test]
fn a_laggard_loses_what_it_lacks_and_the_old_primary_must_be_rewound() {
    let sim = world();
    let mut world = sim.lock();
    commit(&mut world, 0, 1, true);
    assert!(world.replicate());
    let records = world.nodes[0].log.len();
    assert!(world.is_confirmed(0, records));
    commit(&mut world, 0, 2, true);
    assert!(!world.is_confirmed(0, records + 2), "the standby lacks it");
    world.crash(0, Goodbye::Closed);
    assert!(world.may_be_promoted(1));
    world.promote(1);
    assert_eq!((world.leader, world.nodes[1].timeline, calls(&world, 1)), (1, 2, vec![1]));
    assert!(!world.nodes[0].log.is_prefix_of(&world.nodes[1].log));
    world.rewind(0, 1);
    world.start_standby(0, Some(1), false);
    world.replicate();
    assert_eq!((calls(&world, 0), world.nodes[0].timeline), (vec![1], 2));
    assert!(!world.may_be_promoted(0), "it is not the synchronous standby yet");
}

#[test]
fn what_a_promoted_server_shows_is_what_postgresql_shows() {
    let sim = world();
    let mut world = sim.lock();
    commit(&mut world, 0, 1, true);
    world.replicate();
    let end = world.nodes[1].log.end();
    world.shut_down(0);
    world.promote(1);
    let node = &world.nodes[1];
    assert!(node.replayed > Some(end), "it has the shutdown's checkpoint, too");
    assert_eq!((node.received(), node.checkpoint.timeline), (node.received, 1));
    assert!(node.history().starts_with("1\t0/"), "{}", node.history());
    assert!(node.segments.contains(&1) && node.segments.contains(&2));
    world.checkpoint(1, false);
    assert_eq!((world.nodes[1].checkpoint.timeline, world.nodes[1].stopped()), (2, None));
    assert!(!world.nodes[1].segments.contains(&1));
}
