//! The rule as a table, and held against a world of servers that crash, lose WAL and give transaction ids out again.

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{RngAlgorithm, TestCaseResult, TestRng, TestRunner};

use super::*;
use model::{Begun, Commit, FIRST_XID, Node, Op, Truth, World, lsn, op};

mod model;

const OLD: Server = Server { system_identifier: 77, timeline: 3, started_at: 100 };
/// The same server, started again.
const AGAIN: Server = Server { started_at: 200, ..OLD };
/// A standby that was promoted.
const NEXT: Server = Server { timeline: 4, started_at: 50, ..OLD };

fn life(server: Server, replayed: Option<usize>, stats_reset: Option<i64>) -> Life {
    Life { server, replayed: replayed.map(lsn), stats_reset }
}

/// A marker that ends at 20, on a server whose replay had ended at `replayed`.
fn marker(replayed: Option<usize>) -> Marker {
    Marker { life: life(OLD, replayed, Some(7)), xid: FIRST_XID, lsn: lsn(20) }
}

fn now(server: Server, replayed: Option<usize>, received: Option<usize>) -> Now {
    Now { life: life(server, replayed, Some(8)), received: received.map(lsn), primaries_since: 1 }
}

#[test]
fn the_server_in_the_same_life_has_the_marker() {
    assert_eq!(locate(&marker(None), &now(OLD, None, None)), Located::Here, "started cleanly");
    assert_eq!(locate(&marker(Some(5)), &now(OLD, Some(5), None)), Located::Here, "had recovered before");
    assert_eq!(locate(&marker(Some(5)), &now(OLD, Some(5), Some(5))), Located::Here, "had been promoted before");
}

#[test]
fn a_crash_of_a_backend_shows_by_the_end_of_replay_alone() {
    for before in [None, Some(5)] {
        assert_eq!(locate(&marker(before), &now(OLD, Some(19), None)), Located::Lost);
        assert_eq!(locate(&marker(before), &now(OLD, Some(20), None)), Located::Here);
        assert_eq!(locate(&marker(before), &now(OLD, Some(21), None)), Located::Here);
    }
}

#[test]
fn after_crash_recovery_the_end_of_replay_decides() {
    assert_eq!(locate(&marker(None), &now(AGAIN, Some(19), None)), Located::Lost);
    assert_eq!(locate(&marker(None), &now(AGAIN, Some(20), None)), Located::Here);
    assert_eq!(locate(&marker(None), &now(AGAIN, Some(21), None)), Located::Here);
    // Its replay ended where that of its life before had: recovery came to nothing that the old life wrote.
    assert_eq!(locate(&marker(Some(5)), &now(AGAIN, Some(5), None)), Located::Lost);
}

#[test]
fn a_clean_start_loses_nothing_if_the_statistics_survived() {
    let kept =
        |server, replayed, received| Now { life: life(server, replayed, Some(7)), ..now(server, replayed, received) };
    assert_eq!(locate(&marker(None), &kept(AGAIN, None, None)), Located::Here);
    assert_eq!(locate(&marker(Some(5)), &kept(AGAIN, None, None)), Located::Here);
    let untold = Marker { life: life(OLD, None, None), ..marker(None) };
    let unclear = Located::Unclear(Unsettled::Restarted);
    assert_eq!(
        locate(&untold, &Now { life: life(AGAIN, None, None), ..now(AGAIN, None, None) }),
        unclear,
        "PostgreSQL 14"
    );
    assert_eq!(locate(&marker(None), &kept(NEXT, None, None)), unclear, "another server's statistics");
    // Somebody reset them by hand: it is still the same life.
    assert_eq!(locate(&marker(Some(5)), &now(OLD, Some(5), None)), Located::Here);
}

#[test]
fn a_clean_start_hides_whether_there_was_a_crash_before() {
    let unclear = Located::Unclear(Unsettled::Restarted);
    assert_eq!(locate(&marker(None), &now(AGAIN, None, None)), unclear);
    assert_eq!(locate(&marker(Some(5)), &now(AGAIN, None, None)), unclear);
    assert_eq!(locate(&marker(None), &now(NEXT, None, Some(30))), unclear, "no real server says this");
}

#[test]
fn on_the_next_timeline_the_end_of_replay_decides() {
    assert_eq!(locate(&marker(None), &now(NEXT, Some(19), Some(19))), Located::Lost);
    assert_eq!(locate(&marker(None), &now(NEXT, Some(20), Some(20))), Located::Here);
    assert_eq!(locate(&marker(None), &now(NEXT, Some(21), Some(30))), Located::Here);
    assert_eq!(locate(&marker(None), &now(NEXT, Some(19), Some(30))), Located::Lost, "the last record came in part");
}

#[test]
fn a_promoted_server_that_recovered_again_shows_the_end_of_a_later_replay() {
    let unclear = Located::Unclear(Unsettled::Restarted);
    assert_eq!(locate(&marker(None), &now(NEXT, None, None)), unclear);
    // The replay of its promotion ended there at the latest.
    assert_eq!(locate(&marker(None), &now(NEXT, Some(19), None)), Located::Lost);
    assert_eq!(locate(&marker(None), &now(NEXT, Some(20), None)), unclear);
    assert_eq!(locate(&marker(None), &now(NEXT, Some(30), None)), unclear);
}

#[test]
fn a_timeline_that_does_not_continue_the_markers_tells_nothing() {
    for (timeline, why) in [
        (1, Unsettled::OtherHistory),
        (2, Unsettled::OtherHistory),
        (5, Unsettled::SeveralFailovers),
        (9, Unsettled::SeveralFailovers),
    ] {
        for (replayed, received) in [(None, None), (Some(19), Some(19)), (Some(20), Some(20)), (Some(20), None)] {
            let said = now(Server { timeline, ..NEXT }, replayed, received);
            assert_eq!(locate(&marker(None), &said), Located::Unclear(why), "{said:?}");
        }
    }
}

#[test]
fn a_standby_that_was_promoted_to_the_markers_number_tells_nothing() {
    for replayed in [None, Some(19), Some(20)] {
        let said = now(Server { timeline: OLD.timeline, ..NEXT }, replayed, Some(20));
        assert_eq!(locate(&marker(None), &said), Located::Unclear(Unsettled::OtherHistory), "{said:?}");
    }
}

#[test]
fn an_equal_start_time_alone_makes_no_same_life() {
    let said = now(Server { started_at: OLD.started_at, ..NEXT }, Some(5), Some(5));
    assert_eq!(locate(&marker(Some(5)), &said), Located::Lost);
}

#[test]
fn another_cluster_tells_nothing_whatever_else_is_equal() {
    for server in [OLD, AGAIN, NEXT] {
        for replayed in [None, Some(19), Some(20)] {
            let said = now(Server { system_identifier: 78, ..server }, replayed, replayed);
            assert_eq!(locate(&marker(None), &said), Located::Unclear(Unsettled::OtherCluster), "{said:?}");
        }
    }
}

#[test]
fn more_than_one_new_primary_is_one_too_many() {
    for (server, replayed, received) in [(AGAIN, Some(19), None), (NEXT, Some(20), Some(20))] {
        for (primaries_since, is_clear) in [(0, true), (1, true), (2, false), (3, false)] {
            let located = locate(&marker(None), &Now { primaries_since, ..now(server, replayed, received) });
            let unclear = Located::Unclear(Unsettled::SeveralFailovers);
            assert_eq!(located != unclear, is_clear, "{primaries_since} on {server:?}");
        }
    }
    // But the same life is the same life, whoever was thought to be the primary in between.
    assert_eq!(locate(&marker(None), &Now { primaries_since: 3, ..now(OLD, None, None) }), Located::Here);
}

#[test]
fn what_the_server_says_of_an_id_it_knows_is_the_answer() {
    assert_eq!(Settled::from(XactStatus::Committed), Settled::Committed);
    assert_eq!(Settled::from(XactStatus::Aborted), Settled::NotCommitted);
    assert_eq!(Settled::from(XactStatus::InProgress), Settled::InProgress);
    assert_eq!(Settled::from(XactStatus::Forgotten), Settled::Unknown(Unsettled::Forgotten));
}

#[test]
fn a_fence_is_believed_for_half_of_the_time_that_rows_are_kept() {
    let keep = Duration::from_secs(3600);
    let settle = |entry, age| settle_entry(entry, Duration::from_secs(age), keep);
    assert_eq!(settle(Entry::Fence, 0), Settled::NotCommitted);
    assert_eq!(settle(Entry::Fence, 1800), Settled::NotCommitted);
    assert_eq!(settle(Entry::Fence, 1801), Settled::Unknown(Unsettled::TooOld), "its own row may have been pruned");
    for age in [0, 1801, 3600 * 24] {
        assert_eq!(settle(Entry::Own, age), Settled::Committed, "a row that is there is true at any age");
    }
}

/// What the pool answers, when it has seen so many new primaries.
fn settled(begun: &Begun, asked: &Node, primaries_since: u64) -> Settled {
    match locate(&begun.marker, &asked.says(primaries_since)) {
        Located::Here => asked.xact_status(begun.marker.xid).expect("an id that is here is not in the future").into(),
        Located::Lost => Settled::NotCommitted,
        Located::Unclear(why) => Settled::Unknown(why),
    }
}

/// What a pool would answer that believes `pg_xact_status`, and takes the error about an id in the future for a loss.
fn naive(begun: &Begun, asked: &Node) -> Settled {
    asked.xact_status(begun.marker.xid).map_or(Settled::NotCommitted, Settled::from)
}

fn is_true(answer: Settled, truth: Truth) -> bool {
    match answer {
        Settled::Committed => truth == Truth::Committed,
        Settled::NotCommitted => truth == Truth::NeverHere,
        Settled::InProgress => truth == Truth::Running,
        Settled::Unknown(_) => true,
    }
}

fn world(servers: usize, history: &[Op]) -> World {
    let mut world = World::new(servers);
    for op in history {
        world.apply(*op);
    }
    world
}

#[test]
fn an_id_that_was_given_out_again_deceives_the_naive_rule_and_not_this_one() {
    let mut world = world(2, &[Op::Write { on: 0, flush: true }, Op::Ship { to: 0, records: 9 }, Op::Begin { on: 0 }]);
    let begun = world.clients()[0];
    let ask = |world: &World, server: usize| {
        let node = world.node(server);
        (node.truth(begun.token), naive(&begun, node), settled(&begun, node, 1))
    };
    assert_eq!(begun.marker.xid, FIRST_XID + 1);
    assert_eq!(ask(&world, 0), (Truth::Running, Settled::InProgress, Settled::InProgress));

    world.apply(Op::Commit { client: 0, how: Commit::Flushed });
    assert_eq!(ask(&world, 0), (Truth::Committed, Settled::Committed, Settled::Committed));

    // The standby has not received it, and knows no such id.
    world.apply(Op::Crash { on: 0, kept: 0 });
    world.apply(Op::Promote { on: 0 });
    assert_eq!(world.node(1).xact_status(begun.marker.xid), None, "in the future");
    assert_eq!(ask(&world, 1), (Truth::NeverHere, Settled::NotCommitted, Settled::NotCommitted));

    // The next writer is given the id.
    world.apply(Op::Write { on: 0, flush: true });
    assert_eq!(ask(&world, 1), (Truth::NeverHere, Settled::Committed, Settled::NotCommitted));
}

/// The first limit of the assumption: the second crash leaves nothing to see of the first. A pool that saw both counts them.
#[test]
fn two_crashes_of_a_backend_look_like_one() {
    let crash = Op::BackendCrash { on: 0, kept: 0 };
    let world = world(2, &[Op::Begin { on: 0 }, crash, Op::Write { on: 0, flush: true }, crash]);
    let begun = world.clients()[0];
    assert_eq!((world.since(&begun).recoveries, world.since(&begun).primaries), (2, 2));
    assert_eq!(world.node(0).truth(begun.token), Truth::NeverHere);
    assert_eq!(settled(&begun, world.node(0), 1), Settled::Committed, "somebody else's commit under the same id");
    assert_eq!(settled(&begun, world.node(0), 2), Settled::Unknown(Unsettled::SeveralFailovers));
}

/// The second: two timelines of one number, of which the newer primary continues the other one.
#[test]
fn a_split_brain_from_before_cannot_be_told_from_the_own_history() {
    let world = world(
        4,
        &[
            // Servers 1 and 2 are promoted to timeline 2 each; 3 follows 1, the transaction runs on 2.
            Op::Promote { on: 0 },
            Op::Follow { on: 3, upstream: 1 },
            Op::Promote { on: 0 },
            Op::Begin { on: 2 },
            Op::Write { on: 1, flush: true },
            Op::Ship { to: 0, records: 9 },
            Op::Promote { on: 0 },
        ],
    );
    let begun = world.clients()[0];
    assert_eq!((world.since(&begun).recoveries, begun.split_brain, world.newest()), (1, true, Some(3)));
    assert_eq!(world.node(3).truth(begun.token), Truth::NeverHere);
    assert_eq!(settled(&begun, world.node(3), 1), Settled::Committed, "somebody else's commit under the same id");
}

/// The third: as before, and the newer primary does not even show that it was a standby.
#[test]
fn a_second_promotion_to_one_timeline_looks_like_a_crash_if_the_standby_never_streamed() {
    let world = world(
        3,
        &[
            Op::Write { on: 0, flush: true },
            Op::Ship { to: 0, records: 9 },
            Op::Promote { on: 1 },
            Op::Begin { on: 1 },
            Op::Crash { on: 2, kept: 0 },
            // Server 1 does not know of timeline 2, is started again, and promoted before it asks for WAL.
            Op::Stop { on: 1 },
            Op::Start { on: 0 },
            Op::Promote { on: 0 },
        ],
    );
    let begun = world.clients()[0];
    assert_eq!((world.since(&begun).recoveries, world.since(&begun).unfed, begun.split_brain), (1, 1, false));
    assert_eq!(world.node(1).truth(begun.token), Truth::NeverHere);
    assert_eq!(settled(&begun, world.node(1), 1), Settled::Committed, "somebody else's commit under the same id");
}

/// Plays a history, and after each step gives every transaction together with every primary that could be asked.
fn ask_always(
    servers: usize,
    history: &[Op],
    mut ask: impl FnMut(&World, &Begun, usize) -> TestCaseResult,
) -> TestCaseResult {
    let mut world = World::new(servers);
    for op in history {
        world.apply(*op);
        for begun in world.clients() {
            for asked in world.primaries() {
                ask(&world, begun, asked)?;
            }
        }
    }
    Ok(())
}

fn histories() -> impl Strategy<Value = (usize, Vec<Op>)> {
    (2..=4_usize, prop::collection::vec(op(), 0..50))
}

/// What the invariant assumes.
fn is_assumed(world: &World, begun: &Begun) -> bool {
    world.since(begun).recoveries <= 1 && world.since(begun).unfed == 0 && !begun.split_brain
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    /// Even of a pool that has seen nothing of it, and whichever primary it asks, also one that others have left behind.
    #[test]
    fn after_one_crash_or_promotion_every_answer_is_true((servers, history) in histories()) {
        ask_always(servers, &history, |world, begun, asked| {
            if is_assumed(world, begun) {
                let (node, truth) = (world.node(asked), world.node(asked).truth(begun.token));
                let answer = settled(begun, node, 0);
                prop_assert!(is_true(answer, truth), "{answer:?} of {begun:?}, but {truth:?} on server {asked}, {node:?}");
            }
            Ok(())
        })?;
    }

    /// The pool counts new primaries, each life of a server. One that misses none goes wrong by no number of them.
    #[test]
    fn of_any_number_of_failovers_seen_every_answer_is_true((servers, history) in histories()) {
        ask_always(servers, &history, |world, begun, asked| {
            let since = world.since(begun);
            let one_history = since.unfed == 0 && !world.is_split_brain(begun.marker.life.server.timeline);
            if begun.on_newest && world.newest() == Some(asked) && one_history {
                let (node, truth) = (world.node(asked), world.node(asked).truth(begun.token));
                let answer = settled(begun, node, since.primaries);
                prop_assert!(is_true(answer, truth), "{answer:?} of {begun:?}, but {truth:?} on server {asked}, {node:?}");
                prop_assert!(since.primaries < 2 || matches!(answer, Settled::Unknown(_)), "{answer:?} after {since:?}");
            }
            Ok(())
        })?;
    }

    #[test]
    fn one_failover_or_clean_restart_leaves_no_answer_open((servers, history) in histories()) {
        ask_always(servers, &history, |world, begun, asked| {
            let since = world.since(begun);
            let restarted = since.clean_starts == 1 && since.recoveries == 0;
            let plain = (since.clean_starts == 0 || restarted) && world.is_plain_failover(begun, asked);
            if world.newest() == Some(asked) && is_assumed(world, begun) && plain {
                let answer = settled(begun, world.node(asked), since.primaries);
                let node = world.node(asked);
                prop_assert!(!matches!(answer, Settled::Unknown(_)), "{answer:?} of {begun:?} on server {asked}, {node:?}");
            }
            Ok(())
        })?;
    }

    /// Held by a synchronous standby, or its COMMIT under way: whatever else happened, it is not given up.
    #[test]
    fn a_transaction_that_runs_is_in_progress((servers, history) in histories()) {
        ask_always(servers, &history, |world, begun, asked| {
            if world.node(asked).truth(begun.token) == Truth::Running {
                prop_assert_eq!(settled(begun, world.node(asked), 0), Settled::InProgress);
            }
            Ok(())
        })?;
    }
}

/// What a search found, to show that the properties above are held against something.
#[derive(Debug, Default)]
struct Found {
    questions: u32,
    naive_wrong: u32,
    wrong: u32,
    committed: u32,
    not_committed: u32,
    in_progress: u32,
    open: u32,
}

#[test]
fn a_search_finds_the_naive_rule_wrong_and_this_one_never() {
    let seed = *b"one transaction, one outcome ...";
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let mut runner = TestRunner::new_with_rng(ProptestConfig::default(), rng);
    let mut found = Found::default();
    for _ in 0..1000 {
        let (servers, history) = histories().new_tree(&mut runner).expect("nothing is filtered").current();
        ask_always(servers, &history, |world, begun, asked| {
            // Where no recovery was since BEGIN, anything answers right.
            let one = is_assumed(world, begun) && world.since(begun).recoveries == 1;
            if world.newest() == Some(asked) && one {
                found.ask(begun, world.node(asked));
            }
            Ok(())
        })
        .expect("it only counts");
    }
    let Found { wrong, naive_wrong, committed, not_committed, in_progress, open, .. } = found;
    let shown = format!("{found:?}, seed {seed:?}");
    assert_eq!(wrong, 0, "{shown}");
    assert!(naive_wrong > 0, "{shown}");
    assert!([committed, not_committed, in_progress, open].iter().all(|count| *count > 0), "{shown}");
}

impl Found {
    fn ask(&mut self, begun: &Begun, asked: &Node) {
        let (answer, truth) = (settled(begun, asked, 1), asked.truth(begun.token));
        self.questions += 1;
        self.wrong += u32::from(!is_true(answer, truth));
        self.naive_wrong += u32::from(!is_true(naive(begun, asked), truth));
        *match answer {
            Settled::Committed => &mut self.committed,
            Settled::NotCommitted => &mut self.not_committed,
            Settled::InProgress => &mut self.in_progress,
            Settled::Unknown(_) => &mut self.open,
        } += 1;
    }
}
