//! The rule as a table, and held against a world of servers that crash, lose WAL and give transaction ids out again.

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{RngAlgorithm, TestCaseError, TestCaseResult, TestRng, TestRunner};

use super::*;
use model::{Begun, Commit, FIRST_XID, Node, Op, Truth, World, lsn, op};

mod calls;
mod model;

const OLD: Server = Server { system_identifier: 77, timeline: 3, started_at: 100 };
/// The same server, started again.
const AGAIN: Server = Server { started_at: 200, ..OLD };
/// A standby that was promoted.
const NEXT: Server = Server { timeline: 4, started_at: 50, ..OLD };

fn life(server: Server, replayed: Option<usize>, stats_reset: Option<i64>) -> Life {
    Life { server, replayed: replayed.map(lsn), stats_reset, ancestor: None }
}

/// A marker that ends at 20, on a server whose replay had ended at `replayed`.
fn marker(replayed: Option<usize>) -> Marker {
    Marker { life: life(OLD, replayed, Some(7)), xid: FIRST_XID, lsn: lsn(20), nonce: Nonce(1) }
}

/// What is said where the server shows no more than every role may read.
fn located(marker: &Marker, now: &Now) -> Located {
    locate(marker, now, &Proof::Nothing)
}

/// As a server says it that has completed no checkpoint of its own timeline yet.
fn with_ancestor(now: Now, ancestor: u32) -> Now {
    Now { life: Life { ancestor: Some(ancestor), ..now.life }, ..now }
}

fn now(server: Server, replayed: Option<usize>, received: Option<usize>) -> Now {
    Now { life: life(server, replayed, Some(8)), received: received.map(lsn), stopped: None, primaries_since: 1 }
}

#[test]
fn the_server_in_the_same_life_has_the_marker() {
    assert_eq!(located(&marker(None), &now(OLD, None, None)), Located::Here, "started cleanly");
    assert_eq!(located(&marker(Some(5)), &now(OLD, Some(5), None)), Located::Here, "had recovered before");
    assert_eq!(located(&marker(Some(5)), &now(OLD, Some(5), Some(5))), Located::Here, "had been promoted before");
}

#[test]
fn a_crash_of_a_backend_shows_by_the_end_of_replay_alone() {
    for before in [None, Some(5)] {
        assert_eq!(located(&marker(before), &now(OLD, Some(19), None)), Located::Lost);
        assert_eq!(located(&marker(before), &now(OLD, Some(20), None)), Located::Here);
        assert_eq!(located(&marker(before), &now(OLD, Some(21), None)), Located::Here);
    }
}

#[test]
fn after_crash_recovery_the_end_of_replay_decides() {
    assert_eq!(located(&marker(None), &now(AGAIN, Some(19), None)), Located::Lost);
    assert_eq!(located(&marker(None), &now(AGAIN, Some(20), None)), Located::Here);
    assert_eq!(located(&marker(None), &now(AGAIN, Some(21), None)), Located::Here);
    // Its replay ended where that of its life before had: recovery came to nothing that the old life wrote.
    assert_eq!(located(&marker(Some(5)), &now(AGAIN, Some(5), None)), Located::Lost);
}

#[test]
fn a_clean_start_loses_nothing_if_the_statistics_survived() {
    let kept =
        |server, replayed, received| Now { life: life(server, replayed, Some(7)), ..now(server, replayed, received) };
    assert_eq!(located(&marker(None), &kept(AGAIN, None, None)), Located::Here);
    assert_eq!(located(&marker(Some(5)), &kept(AGAIN, None, None)), Located::Here);
    let untold = Marker { life: life(OLD, None, None), ..marker(None) };
    let unclear = Located::Unclear(Unsettled::Restarted);
    assert_eq!(
        located(&untold, &Now { life: life(AGAIN, None, None), ..now(AGAIN, None, None) }),
        unclear,
        "PostgreSQL 14"
    );
    let unproven = Located::Unclear(Unsettled::Unproven);
    assert_eq!(located(&marker(None), &kept(NEXT, None, None)), unproven, "another server's statistics");
    // However often: it never crashed.
    let often = Now { primaries_since: 9, ..kept(AGAIN, None, None) };
    assert_eq!(located(&marker(None), &often), Located::Here);
    // Somebody reset them by hand: it is still the same life.
    assert_eq!(located(&marker(Some(5)), &now(OLD, Some(5), None)), Located::Here);
}

#[test]
fn a_clean_start_hides_whether_there_was_a_crash_before() {
    let unclear = Located::Unclear(Unsettled::Restarted);
    assert_eq!(located(&marker(None), &now(AGAIN, None, None)), unclear);
    assert_eq!(located(&marker(Some(5)), &now(AGAIN, None, None)), unclear);
    assert_eq!(
        located(&marker(None), &with_ancestor(now(NEXT, None, Some(30)), 3)),
        unclear,
        "no real server says this"
    );
}

#[test]
fn on_the_next_timeline_the_end_of_replay_decides() {
    let next = |replayed, received| with_ancestor(now(NEXT, Some(replayed), Some(received)), 3);
    assert_eq!(located(&marker(None), &next(19, 19)), Located::Lost);
    assert_eq!(located(&marker(None), &next(20, 20)), Located::Here);
    assert_eq!(located(&marker(None), &next(21, 30)), Located::Here);
    assert_eq!(located(&marker(None), &next(19, 30)), Located::Lost, "the last record came in part");
}

/// A server may take the number after the marker's without having followed the marker's timeline, as it finds that number
/// taken: in a shared archive, or among the histories that it was sent.
#[test]
fn a_number_alone_makes_no_parent() {
    let unproven = Located::Unclear(Unsettled::Unproven);
    let next = now(NEXT, Some(20), Some(20));
    assert_eq!(located(&marker(None), &next), unproven);
    for ancestor in [1, 2] {
        assert_eq!(located(&marker(None), &with_ancestor(next, ancestor)), unproven, "it has followed {ancestor}");
    }
    assert_eq!(located(&marker(None), &with_ancestor(next, 3)), Located::Here);
    assert_eq!(locate(&marker(None), &next, &Proof::Files { followed: true }), Located::Here);
    assert_eq!(locate(&marker(None), &next, &Proof::Files { followed: false }), unproven);
}

/// A leader that was demoted and promoted again has streamed from nobody, and has replayed no transaction. Its statistics
/// show that it has not crashed behind its promotion.
#[test]
fn statistics_that_survived_show_that_replay_ended_at_the_promotion() {
    let first = Marker { life: Life { server: Server { timeline: 1, ..OLD }, ..marker(None).life }, ..marker(None) };
    let back = |replayed, stats| {
        let said = now(Server { timeline: 2, ..NEXT }, replayed, None);
        Now { life: Life { stats_reset: stats, ..said.life }, ..said }
    };
    let restarted = Located::Unclear(Unsettled::Restarted);
    assert_eq!(located(&first, &back(Some(20), Some(7))), Located::Here);
    assert_eq!(located(&first, &back(Some(19), Some(7))), Located::Lost);
    assert_eq!(located(&first, &back(Some(20), Some(8))), restarted, "it crashed");
    assert_eq!(located(&first, &back(None, Some(7))), restarted, "it was started again");
    let untold = Marker { life: Life { stats_reset: None, ..first.life }, ..first };
    assert_eq!(located(&untold, &back(Some(20), None)), restarted, "PostgreSQL 14");
}

#[test]
fn each_history_begins_with_the_first_timeline() {
    let first = |server| Server { timeline: 1, ..server };
    let marker = Marker { life: Life { server: first(OLD), ..marker(None).life }, ..marker(None) };
    let second = now(Server { timeline: 2, ..NEXT }, Some(20), Some(20));
    assert_eq!(located(&marker, &second), Located::Here);
    let third = now(Server { timeline: 3, ..NEXT }, Some(20), Some(20));
    assert_eq!(located(&marker, &third), Located::Unclear(Unsettled::SeveralFailovers), "it ended somewhere before");
}

#[test]
fn a_promoted_server_that_recovered_again_shows_the_end_of_a_later_replay() {
    let unclear = Located::Unclear(Unsettled::Restarted);
    let files = |now: &Now| locate(&marker(None), now, &Proof::Files { followed: true });
    assert_eq!(files(&now(NEXT, None, None)), unclear);
    // The replay of its promotion ended there at the latest.
    assert_eq!(files(&now(NEXT, Some(19), None)), Located::Lost);
    assert_eq!(files(&now(NEXT, Some(20), None)), unclear);
    assert_eq!(files(&now(NEXT, Some(30), None)), unclear);
}

/// A leader that crashed, and was started again as a standby on its own log and promoted: it never streamed.
#[test]
fn a_leader_that_is_promoted_on_its_own_log_shows_its_own_timeline() {
    for (replayed, expected) in [(19, Located::Lost), (20, Located::Here), (30, Located::Here)] {
        let said = with_ancestor(now(NEXT, Some(replayed), None), 3);
        assert_eq!(located(&marker(None), &said), expected, "{said:?}");
    }
}

/// Recovered in single-user mode, shut down, started as a standby on its own log and promoted: nobody saw the recovery, which
/// may have lost the marker, and replay ended behind its two checkpoints.
#[test]
fn a_recovery_that_nobody_saw_may_have_lost_the_marker() {
    for (stopped, expected) in [
        (20, Located::Unclear(Unsettled::Restarted)),
        (20 + 511, Located::Unclear(Unsettled::Restarted)),
        (20 + 512, Located::Here),
    ] {
        let said = with_ancestor(now(NEXT, Some(2000), None), 3);
        let said = Now { stopped: Some(lsn(stopped)), ..said };
        assert_eq!(located(&marker(None), &said), expected, "{said:?}");
        let survived = Now { life: Life { stats_reset: Some(7), ..said.life }, ..said };
        assert_eq!(located(&marker(None), &survived), Located::Here, "it was shut down, and not recovered");
    }
}

#[test]
fn what_ended_before_the_marker_is_lost_after_any_number_of_failovers() {
    for timeline in [3, 4, 5, 9] {
        let said = Now { primaries_since: 9, ..now(Server { timeline, ..AGAIN }, Some(19), None) };
        assert_eq!(located(&marker(None), &said), Located::Lost, "{said:?}");
    }
}

#[test]
fn a_timeline_that_does_not_continue_the_markers_tells_nothing() {
    for (timeline, why) in [
        (1, Unsettled::OtherHistory),
        (2, Unsettled::OtherHistory),
        (5, Unsettled::SeveralFailovers),
        (9, Unsettled::SeveralFailovers),
    ] {
        for (replayed, received) in [(None, None), (Some(20), Some(20)), (Some(20), None)] {
            let said = now(Server { timeline, ..NEXT }, replayed, received);
            assert_eq!(located(&marker(None), &said), Located::Unclear(why), "{said:?}");
        }
    }
}

#[test]
fn a_history_shows_each_end() {
    let history = |ancestors: &[(u32, usize)], sighting| Proof::Function {
        ancestry: ancestors.iter().map(|(timeline, end)| (*timeline, lsn(*end))).collect(),
        sighting,
    };
    let late = Now { primaries_since: 2, ..now(Server { timeline: 5, ..NEXT }, Some(30), None) };
    let gone = |ancestors| locate(&marker(None), &late, &history(ancestors, Sighting::Recycled));
    let once = Now { primaries_since: 1, ..now(NEXT, Some(30), None) };
    assert_eq!(locate(&marker(None), &once, &history(&[(3, 20)], Sighting::Recycled)), Located::Here);
    assert_eq!(gone(&[(3, 19), (4, 30)]), Located::Lost);
    assert_eq!(gone(&[(2, 25), (4, 30)]), Located::Lost, "it is no ancestor");
    let several = Located::Unclear(Unsettled::SeveralFailovers);
    assert_eq!(gone(&[(3, 20), (4, 30)]), several, "one of the two that the pool has seen may have been a crash");
    assert_eq!(gone(&[(3, 30)]), several, "the pool has seen one more, and perhaps it was a crash before");
    for (sighting, expected) in
        [(Sighting::Marker, Located::Here), (Sighting::Other, Located::Lost), (Sighting::NotYet, Located::NotYet)]
    {
        for server in [OLD, AGAIN, NEXT, Server { timeline: 9, ..NEXT }] {
            let said = Now { primaries_since: 9, ..now(server, Some(20), None) };
            assert_eq!(locate(&marker(None), &said, &history(&[], sighting)), expected, "{said:?}");
        }
    }
}

#[test]
fn proof_is_asked_for_where_it_tells_more() {
    let next = now(NEXT, Some(20), Some(20));
    let wants = |said: &Now| {
        [Evidence::Checkpoint, Evidence::Files, Evidence::Function]
            .map(|evidence| wants_proof(&marker(None), said, evidence))
    };
    assert_eq!(wants(&next), [false, true, true]);
    assert_eq!(wants(&with_ancestor(next, 3)), [false, false, true], "the function alone knows of crashes");
    assert_eq!(wants(&now(AGAIN, Some(20), None)), [false, false, true]);
    assert_eq!(wants(&now(NEXT, Some(19), Some(19))), [false; 3], "it is lost");
    assert_eq!(wants(&now(OLD, None, None)), [false; 3], "nothing happened");
    assert_eq!(wants(&now(Server { system_identifier: 78, ..NEXT }, Some(20), None)), [false; 3]);
}

#[test]
fn a_standby_that_was_promoted_to_the_markers_number_tells_nothing() {
    for replayed in [None, Some(19), Some(20)] {
        let said = now(Server { timeline: OLD.timeline, ..NEXT }, replayed, None);
        for said in [Now { received: Some(lsn(20)), ..said }, with_ancestor(said, 2)] {
            assert_eq!(located(&marker(None), &said), Located::Unclear(Unsettled::OtherHistory), "{said:?}");
        }
    }
}

#[test]
fn an_equal_start_time_alone_makes_no_same_life() {
    let said = now(Server { started_at: OLD.started_at, ..NEXT }, Some(5), Some(5));
    assert_eq!(located(&marker(Some(5)), &said), Located::Lost);
}

#[test]
fn another_cluster_tells_nothing_whatever_else_is_equal() {
    for server in [OLD, AGAIN, NEXT] {
        for replayed in [None, Some(19), Some(20)] {
            let said = now(Server { system_identifier: 78, ..server }, replayed, replayed);
            assert_eq!(located(&marker(None), &said), Located::Unclear(Unsettled::OtherCluster), "{said:?}");
        }
    }
}

#[test]
fn more_than_one_new_primary_is_one_too_many() {
    for (server, replayed, received) in [(AGAIN, Some(20), None), (NEXT, Some(20), Some(20))] {
        for (primaries_since, is_clear) in [(0, true), (1, true), (2, false), (3, false)] {
            let said = with_ancestor(now(server, replayed, received), if server == NEXT { 3 } else { 9 });
            let said = if server == NEXT { said } else { now(server, replayed, received) };
            let located = located(&marker(None), &Now { primaries_since, ..said });
            let unclear = Located::Unclear(Unsettled::SeveralFailovers);
            assert_eq!(located != unclear, is_clear, "{primaries_since} on {server:?}");
        }
    }
    // But the same life is the same life, whoever was thought to be the primary in between.
    assert_eq!(located(&marker(None), &Now { primaries_since: 3, ..now(OLD, None, None) }), Located::Here);
}

#[test]
fn what_the_server_says_of_an_id_it_knows_is_the_answer() {
    assert_eq!(Settled::from(XactStatus::Committed), Settled::Committed);
    assert_eq!(Settled::from(XactStatus::Aborted), Settled::NotCommitted);
    assert_eq!(Settled::from(XactStatus::InProgress), Settled::InProgress);
    assert_eq!(Settled::from(XactStatus::Forgotten), Settled::Unknown(Unsettled::Forgotten));
}

#[test]
fn an_id_that_was_not_given_out_is_of_no_transaction() {
    use Unsettled::{OtherCluster, OtherHistory, Restarted, SeveralFailovers, Unproven};
    for why in [Restarted, SeveralFailovers, Unproven] {
        assert_eq!(settle(Located::Unclear(why), None), Settled::NotCommitted);
        for status in [XactStatus::Committed, XactStatus::Aborted, XactStatus::InProgress] {
            assert_eq!(settle(Located::Unclear(why), Some(status)), Settled::Unknown(why), "it may be another's");
        }
    }
    for why in [OtherCluster, OtherHistory] {
        assert_eq!(settle(Located::Unclear(why), None), Settled::Unknown(why));
    }
    assert_eq!(settle(Located::Here, None), Settled::Unknown(OtherHistory), "both cannot be");
    assert_eq!(settle(Located::Lost, Some(XactStatus::Committed)), Settled::NotCommitted);
    assert_eq!(settle(Located::NotYet, None), Settled::InProgress);
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

/// What a pool may go by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// What the server shows.
    Of(Evidence),
    /// No more than every role may read, and what the pool has signed timelines with. A real pool has that in any case; here
    /// each kind is alone.
    Signature,
}

const EACH: [Kind; 4] =
    [Kind::Of(Evidence::Checkpoint), Kind::Signature, Kind::Of(Evidence::Files), Kind::Of(Evidence::Function)];

/// What the pool answers by this, when it has seen so many new primaries.
fn settled_by(kind: Kind, begun: &Begun, asked: &Node, primaries_since: u64) -> Settled {
    let now = asked.says(primaries_since);
    let evidence = if let Kind::Of(evidence) = kind { evidence } else { Evidence::Checkpoint };
    let wanted = wants_proof(&begun.marker, &now, evidence);
    let proof = if wanted { asked.shows(&begun.marker, evidence) } else { Proof::Nothing };
    let located = match (locate(&begun.marker, &now, &proof), begun.signed) {
        (Located::Unclear(Unsettled::Unproven), Some(signed)) if kind == Kind::Signature => {
            locate(&begun.marker, &now, &Proof::Signature { borne: asked.bears(&signed) })
        }
        (located, _) => located,
    };
    answered(located, begun, asked)
}

fn answered(located: Located, begun: &Begun, asked: &Node) -> Settled {
    match settle(located, asked.xact_status(begun.marker.xid)) {
        // It asks again, and knows no more yet.
        Settled::InProgress if located == Located::NotYet => Settled::Unknown(Unsettled::InProgress),
        settled => settled,
    }
}

fn settled(begun: &Begun, asked: &Node, primaries_since: u64) -> Settled {
    settled_by(Kind::Of(Evidence::Files), begun, asked, primaries_since)
}

/// What a pool would answer that takes a timeline for the parent of the one with the next number.
fn by_number(begun: &Begun, asked: &Node, primaries_since: u64) -> Settled {
    match locate(&begun.marker, &asked.says(primaries_since), &Proof::Files { followed: true }) {
        Located::Here => naive(begun, asked),
        located => answered(located, begun, asked),
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
    archiving(servers, false, history)
}

fn archiving(servers: usize, archive: bool, history: &[Op]) -> World {
    let mut world = World::new(servers, archive);
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
    assert_eq!(settled_by(Kind::Of(Evidence::Function), &begun, world.node(0), 0), Settled::NotCommitted);
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
    assert_eq!(settled_by(Kind::Of(Evidence::Function), &begun, world.node(3), 0), Settled::NotCommitted);
}

/// The third: as before, and the newer primary does not even show that it was a standby, once it has completed a checkpoint.
#[test]
fn a_second_promotion_to_one_timeline_looks_like_a_crash_if_the_standby_never_streamed() {
    let mut world = world(
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
    assert_eq!(settled(&begun, world.node(1), 1), Settled::Unknown(Unsettled::OtherHistory), "it was just promoted");
    world.apply(Op::Checkpoint { on: 1 });
    assert_eq!(settled(&begun, world.node(1), 1), Settled::Committed, "somebody else's commit under the same id");
    assert_eq!(settled_by(Kind::Of(Evidence::Function), &begun, world.node(1), 1), Settled::NotCommitted);
}

/// The fourth: a recovery in single-user mode shows by its two checkpoints, and to nobody once the primary that took over has
/// completed another.
#[test]
fn a_recovery_in_single_user_mode_cannot_be_told_behind_the_next_checkpoint() {
    for switch in [true, false] {
        let mut world = world(
            2,
            &[
                Op::Write { on: 0, flush: true },
                Op::Ship { to: 0, records: 9 },
                Op::Begin { on: 0 },
                Op::Crash { on: 0, kept: 0 },
                Op::SingleUser { on: 0, switch },
                // It is up as a standby, and the other one follows it.
                Op::Lease { on: 0 },
                Op::Ship { to: 1, records: 9 },
                Op::Promote { on: 1 },
                Op::Write { on: 0, flush: true },
            ],
        );
        let begun = world.clients()[0];
        assert_eq!((world.since(&begun).recoveries, world.since(&begun).unseen), (1, 1));
        assert_eq!(world.node(1).truth(begun.token), Truth::NeverHere);
        assert_eq!(settled(&begun, world.node(1), 1), Settled::Unknown(Unsettled::Restarted), "it shows");
        world.apply(Op::Checkpoint { on: 1 });
        assert_eq!(settled(&begun, world.node(1), 1), Settled::Committed, "somebody else's commit under the same id");
        assert_eq!(settled_by(Kind::Of(Evidence::Function), &begun, world.node(1), 1), Settled::NotCommitted);
    }
}

/// From PostgreSQL 17 on `pg_rewind` may keep a segment of the timeline that it leaves. A server that is promoted later, to the
/// number behind that timeline's, has a file of it and never continued it; so files count up to PostgreSQL 16 alone.
#[test]
fn a_file_that_pg_rewind_kept_would_deceive() {
    // As in the history above, but server 3 followed the lost timeline, is rewound, and promoted.
    let said = Now { primaries_since: 1, ..now(NEXT, Some(20), Some(20)) };
    assert_eq!(locate(&marker(None), &said, &Proof::Files { followed: true }), Located::Here, "what a file would say");
    assert_eq!(locate(&marker(None), &said, &Proof::Files { followed: false }), Located::Unclear(Unsettled::Unproven));
    let mut world = archiving(
        4,
        true,
        &[
            Op::Write { on: 0, flush: true },
            Op::Ship { to: 0, records: 9 },
            Op::Ship { to: 2, records: 9 },
            Op::Write { on: 0, flush: true },
            Op::Write { on: 0, flush: true },
            Op::Ship { to: 1, records: 9 },
            Op::Promote { on: 0 },
        ],
    );
    world.point(3, 1);
    for op in [
        Op::Begin { on: 1 },
        Op::Commit { client: 0, how: Commit::Flushed },
        Op::Ship { to: 1, records: 9 },
        Op::Crash { on: 1, kept: 0 },
        Op::Crash { on: 0, kept: 0 },
        Op::Follow { on: 3, upstream: 2 },
        Op::Ship { to: 1, records: 9 },
        Op::Promote { on: 1 },
    ] {
        world.apply(op);
    }
    let begun = world.clients()[0];
    let node = world.node(3);
    assert_eq!((world.newest(), node.truth(begun.token)), (Some(3), Truth::NeverHere));
    assert!(!node.shows_parent(&begun, Kind::Of(Evidence::Files)), "where the file is removed");
    let unproven = Settled::Unknown(Unsettled::Unproven);
    let answers = EACH.map(|kind| settled_by(kind, &begun, node, 1));
    assert_eq!(answers, [unproven, unproven, unproven, Settled::NotCommitted]);
    assert_eq!(by_number(&begun, node, 1), Settled::Committed, "what a file would say, of somebody else's commit");
}

/// A wrong `Ok`: server 1 lags and is promoted to timeline 2. Server 2 had received more, cannot follow, and is promoted to
/// timeline 3 when server 1 dies, as it finds that 2 is taken: in the archive, or among the histories that it was sent. The
/// transaction's id on timeline 2 was another's on timeline 1.
#[test]
fn a_standby_that_could_not_follow_deceives_the_rule_of_numbers_and_not_this_one() {
    for archive in [true, false] {
        let history = [
            Op::Write { on: 0, flush: true },
            Op::Ship { to: 0, records: 9 },
            Op::Write { on: 0, flush: true },
            Op::Write { on: 0, flush: true },
            Op::Ship { to: 1, records: 9 },
            Op::Crash { on: 0, kept: 0 },
            Op::Promote { on: 0 },
            Op::Begin { on: 0 },
        ];
        let mut world = archiving(3, archive, &history);
        world.point(2, 1);
        for op in [Op::Ship { to: 0, records: 9 }, Op::Crash { on: 0, kept: 0 }, Op::Promote { on: 0 }] {
            world.apply(op);
        }
        let begun = world.clients()[0];
        let node = world.node(2);
        assert_eq!((world.newest(), node.truth(begun.token)), (Some(2), Truth::NeverHere));
        assert_eq!(by_number(&begun, node, 1), Settled::Committed, "somebody else's commit, before the fork");
        let unproven = Settled::Unknown(Unsettled::Unproven);
        let answers = EACH.map(|evidence| settled_by(evidence, &begun, node, 1));
        assert_eq!(answers, [unproven, unproven, unproven, Settled::NotCommitted]);
    }
}

/// Plays a history, and after each step gives every transaction together with every primary that could be asked.
fn ask_always(
    (servers, archive): (usize, bool),
    history: &[Op],
    mut ask: impl FnMut(&World, &Begun, usize) -> TestCaseResult,
) -> TestCaseResult {
    let mut world = World::new(servers, archive).signing();
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

fn histories() -> impl Strategy<Value = ((usize, bool), Vec<Op>)> {
    ((2..=4_usize, any::<bool>()), prop::collection::vec(op(), 0..50))
}

/// What the invariant assumes where the server does not show its log.
fn is_assumed(world: &World, begun: &Begun) -> bool {
    let since = world.since(begun);
    since.recoveries + since.unseen <= 1 && world.since(begun).unfed == 0 && !begun.split_brain
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    /// Even of a pool that has seen nothing of it, and whichever primary it asks, also one that others have left behind.
    #[test]
    fn after_one_crash_or_promotion_every_answer_is_true((servers, history) in histories()) {
        ask_always(servers, &history, |world, begun, asked| {
            if is_assumed(world, begun) {
                for evidence in EACH {
                    is_answered_truly(evidence, world, begun, asked, 0)?;
                }
            }
            Ok(())
        })?;
    }

    /// The pool counts new primaries, each life of a server. One that misses none goes wrong by no number of them.
    #[test]
    fn of_any_number_of_failovers_seen_every_answer_is_true((servers, history) in histories()) {
        ask_always(servers, &history, |world, begun, asked| {
            if misses_nothing(world, begun, asked) {
                for evidence in EACH {
                    is_answered_truly(evidence, world, begun, asked, world.since(begun).primaries)?;
                }
            }
            Ok(())
        })?;
    }

    /// Nothing is assumed: crashes that nobody saw, two servers on timelines of one number, any server that is asked. As long
    /// as the mark's segment is there, nothing is left open either.
    #[test]
    fn a_server_that_shows_its_log_is_answered_truly_whatever_happened((servers, history) in histories()) {
        ask_always(servers, &history, |world, begun, asked| {
            if !world.node(asked).has_recycled(&begun.marker) {
                let answer = is_answered_truly(Kind::Of(Evidence::Function), world, begun, asked, 0)?;
                let open = matches!(answer, Settled::Unknown(why) if why != Unsettled::InProgress);
                prop_assert!(!open, "{answer:?} of {begun:?} on server {asked}, {:?}", world.node(asked));
            }
            Ok(())
        })?;
    }

    #[test]
    fn one_failover_or_clean_restart_leaves_no_answer_open((servers, history) in histories()) {
        ask_always(servers, &history, |world, begun, asked| {
            let since = world.since(begun);
            let restarted = since.clean_starts >= 1 && since.recoveries == 0;
            let seen = since.unseen == 0 && (since.clean_starts == 0 || restarted);
            let plain = seen && world.is_plain_failover(begun, asked);
            if world.newest() == Some(asked) && is_assumed(world, begun) && plain {
                let node = world.node(asked);
                for evidence in EACH {
                    let answer = settled_by(evidence, begun, node, since.primaries);
                    let shown = node.shows_parent(begun, evidence);
                    prop_assert!(
                        !shown || !matches!(answer, Settled::Unknown(_)),
                        "{answer:?} by {evidence:?} of {begun:?} on server {asked}, {node:?}"
                    );
                }
            }
            Ok(())
        })?;
    }

    /// Held by a synchronous standby, or its COMMIT under way: whatever else happened, it is not given up.
    #[test]
    fn a_transaction_that_runs_is_in_progress((servers, history) in histories()) {
        ask_always(servers, &history, |world, begun, asked| {
            if world.node(asked).truth(begun.token) == Truth::Running {
                for evidence in EACH {
                    prop_assert_eq!(settled_by(evidence, begun, world.node(asked), 0), Settled::InProgress);
                }
            }
            Ok(())
        })?;
    }
}

/// The pool asks the newest primary, and has seen each before it. No two servers were promoted to the marker's timeline, and
/// none without having streamed. A recovery in single-user mode shows still.
fn misses_nothing(world: &World, begun: &Begun, asked: usize) -> bool {
    let one_history = world.since(begun).unfed == 0 && !world.is_split_brain(begun.marker.life.server.timeline);
    let unseen = world.since(begun).unseen > 0 && !world.node(asked).shows_stop();
    begun.on_newest && world.newest() == Some(asked) && one_history && !unseen
}

fn is_answered_truly(
    evidence: Kind,
    world: &World,
    begun: &Begun,
    asked: usize,
    primaries_since: u64,
) -> Result<Settled, TestCaseError> {
    let (node, truth) = (world.node(asked), world.node(asked).truth(begun.token));
    let answer = settled_by(evidence, begun, node, primaries_since);
    prop_assert!(
        is_true(answer, truth),
        "{answer:?} by {evidence:?} of {begun:?}, but {truth:?} on server {asked}, {node:?}"
    );
    Ok(answer)
}

/// What a search found for one kind of evidence.
#[derive(Debug, Default)]
struct Found {
    questions: u64,
    wrong: u64,
    committed: u64,
    not_committed: u64,
    in_progress: u64,
    /// The log is not on the disk yet: the pool asks again.
    not_yet: u64,
    unknown: u64,
}

impl Found {
    fn count(&mut self, answer: Settled, truth: Truth) {
        self.questions += 1;
        self.wrong += u64::from(!is_true(answer, truth));
        *match answer {
            Settled::Committed => &mut self.committed,
            Settled::NotCommitted => &mut self.not_committed,
            Settled::InProgress => &mut self.in_progress,
            Settled::Unknown(Unsettled::InProgress) => &mut self.not_yet,
            Settled::Unknown(_) => &mut self.unknown,
        } += 1;
    }

    fn shown(&self, what: &str) -> String {
        #[expect(clippy::cast_precision_loss, reason = "a share, printed with two decimals")]
        let share = 100.0 * self.unknown as f64 / self.questions.max(1) as f64;
        let Self { questions, wrong, committed, not_committed, .. } = self;
        format!(
            "{what}: questions={questions} wrong={wrong} committed={committed} not={not_committed} unknown={share:.2} %"
        )
    }
}

/// `HISTORIES=1000000` plays so many histories, and prints how many answers each kind of evidence leaves open.
///
/// The questions are those of a pool that asks the newest primary, has seen each before it, and asks in another life of the
/// servers than the one that the transaction began in.
#[test]
fn a_search_finds_naive_rules_wrong_and_this_one_never() {
    let seed = *b"one transaction, one outcome ...";
    let histories_wanted = std::env::var("HISTORIES").map_or(2000, |wanted| wanted.parse().expect("a number"));
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let mut runner = TestRunner::new_with_rng(ProptestConfig::default(), rng);
    let (mut by_status, mut numbers, mut once) = (Found::default(), Found::default(), EACH.map(|_| Found::default()));
    let mut often = EACH.map(|_| Found::default());
    for _ in 0..histories_wanted {
        let (servers, history) = histories().new_tree(&mut runner).expect("nothing is filtered").current();
        ask_always(servers, &history, |world, begun, asked| {
            let (node, since) = (world.node(asked), world.since(begun));
            if since.recoveries == 0 || !misses_nothing(world, begun, asked) {
                return Ok(());
            }
            let truth = node.truth(begun.token);
            by_status.count(naive(begun, node), truth);
            numbers.count(by_number(begun, node, since.primaries), truth);
            let found = if since.recoveries == 1 { &mut once } else { &mut often };
            for (evidence, found) in EACH.into_iter().zip(found) {
                found.count(settled_by(evidence, begun, node, since.primaries), truth);
            }
            Ok(())
        })
        .expect("it only counts");
    }
    println!("{histories_wanted} histories, seed {seed:?}");
    println!("{}", by_status.shown("pg_xact_status alone"));
    println!("{}", numbers.shown("the next number is the child"));
    for (times, found) in [("one crash or failover", &once), ("several", &often)] {
        for (evidence, found) in EACH.into_iter().zip(found) {
            println!("{}", found.shown(&format!("{times}, {evidence:?}")));
            assert_eq!(found.wrong, 0, "{evidence:?} {found:?}, seed {seed:?}");
            let each = [found.committed, found.not_committed];
            assert!(each.iter().all(|count| *count > 0), "{evidence:?} {found:?}, seed {seed:?}");
        }
    }
    assert!(by_status.wrong > 0 && numbers.wrong > 0, "{by_status:?} {numbers:?}, seed {seed:?}");
}
