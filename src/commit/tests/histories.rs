//! Histories that were written by hand. Some deceive a naive rule, and some violate the assumptions of the rule in
//! `commit.rs`.

use super::*;

#[test]
fn an_id_that_was_given_out_again_deceives_the_naive_rule_and_not_this_one() {
    let mut world = world(2, &[Op::Write { on: 0, flush: true }, Op::Ship { to: 0, records: 9 }, Op::Begin { on: 0 }]);
    let begun = world.clients()[0];
    let ask = |world: &World, server: usize| {
        let node = world.node(server);
        (node.truth(begun.token), naive(&begun, node), settled(&begun, node, 1))
    };
    assert_eq!(begun.mark.xid, FIRST_XID + 1);
    assert_eq!(ask(&world, 0), (Truth::Running, SettleVerdict::InProgress, SettleVerdict::InProgress));

    world.apply(Op::Commit { client: 0, how: Commit::Flushed });
    assert_eq!(ask(&world, 0), (Truth::Committed, SettleVerdict::Committed, SettleVerdict::Committed));

    // The standby has not received the transaction, and has not given out its id.
    world.apply(Op::Crash { on: 0, kept: 0 });
    world.apply(Op::Promote { on: 0 });
    assert_eq!(world.node(1).xact_status(begun.mark.xid), None, "in the future");
    assert_eq!(ask(&world, 1), (Truth::NeverHere, SettleVerdict::NotCommitted, SettleVerdict::NotCommitted));

    // The next writer gets the same id.
    world.apply(Op::Write { on: 0, flush: true });
    assert_eq!(ask(&world, 1), (Truth::NeverHere, SettleVerdict::Committed, SettleVerdict::NotCommitted));
}

/// The first limit of the assumption: after a second crash, the server shows nothing of the first one. A pool that saw
/// both crashes counts them.
#[test]
fn two_crashes_of_a_backend_look_like_one() {
    let crash = Op::BackendCrash { on: 0, kept: 0 };
    let world = world(2, &[Op::Begin { on: 0 }, crash, Op::Write { on: 0, flush: true }, crash]);
    let begun = world.clients()[0];
    assert_eq!((world.since(&begun).recoveries, world.since(&begun).primaries), (2, 2));
    assert_eq!(world.node(0).truth(begun.token), Truth::NeverHere);
    assert_eq!(settled(&begun, world.node(0), 1), SettleVerdict::Committed, "somebody else's commit under the same id");
    assert_eq!(settled(&begun, world.node(0), 2), SettleVerdict::Unknown(Unsettled::SeveralFailovers));
    assert_eq!(settled_by(Kind::Of(Evidence::Function), &begun, world.node(0), 0), SettleVerdict::NotCommitted);
}

/// The second limit: there are two timelines with one number, and the newer primary continues the other one.
#[test]
fn a_split_brain_from_before_cannot_be_told_from_the_own_history() {
    let world = world(
        4,
        &[
            // Servers 1 and 2 are both promoted to timeline 2. Server 3 follows server 1, and the transaction runs on
            // server 2.
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
    assert_eq!(settled(&begun, world.node(3), 1), SettleVerdict::Committed, "somebody else's commit under the same id");
    assert_eq!(settled_by(Kind::Of(Evidence::Function), &begun, world.node(3), 0), SettleVerdict::NotCommitted);
}

/// The third limit: as in the second one, but once the newer primary has completed a checkpoint, it does not even show
/// that it was a standby.
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
            // Server 1 does not know timeline 2. It is started again, and promoted before it asks for WAL.
            Op::Stop { on: 1 },
            Op::Start { on: 0 },
            Op::Promote { on: 0 },
        ],
    );
    let begun = world.clients()[0];
    assert_eq!((world.since(&begun).recoveries, world.since(&begun).unfed, begun.split_brain), (1, 1, false));
    assert_eq!(world.node(1).truth(begun.token), Truth::NeverHere);
    assert_eq!(
        settled(&begun, world.node(1), 1),
        SettleVerdict::Unknown(Unsettled::OtherHistory),
        "it was just promoted"
    );
    world.apply(Op::Checkpoint { on: 1 });
    assert_eq!(settled(&begun, world.node(1), 1), SettleVerdict::Committed, "somebody else's commit under the same id");
    assert_eq!(settled_by(Kind::Of(Evidence::Function), &begun, world.node(1), 1), SettleVerdict::NotCommitted);
}

/// The fourth limit: the two checkpoints at its end show a recovery in single-user mode. Once the next primary has
/// completed another checkpoint, nothing shows it.
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
                // The server runs as a standby, and the other server follows it.
                Op::Lease { on: 0 },
                Op::Ship { to: 1, records: 9 },
                Op::Promote { on: 1 },
                Op::Write { on: 0, flush: true },
            ],
        );
        let begun = world.clients()[0];
        assert_eq!((world.since(&begun).recoveries, world.since(&begun).unseen), (1, 1));
        assert_eq!(world.node(1).truth(begun.token), Truth::NeverHere);
        assert_eq!(settled(&begun, world.node(1), 1), SettleVerdict::Unknown(Unsettled::Restarted), "it shows");
        world.apply(Op::Checkpoint { on: 1 });
        assert_eq!(
            settled(&begun, world.node(1), 1),
            SettleVerdict::Committed,
            "somebody else's commit under the same id"
        );
        assert_eq!(settled_by(Kind::Of(Evidence::Function), &begun, world.node(1), 1), SettleVerdict::NotCommitted);
    }
}

/// From PostgreSQL 17 on, `pg_rewind` may keep a segment of the timeline that it leaves. If the server is later
/// promoted to the next number, it has a file of that timeline, but has never continued it. So files count only up to
/// PostgreSQL 16.
#[test]
fn a_file_that_pg_rewind_kept_would_deceive() {
    // As in the history above, but server 3 followed the lost timeline, is rewound, and promoted.
    let said = Now { primaries_since: 1, ..now(NEXT, Some(20), Some(20)) };
    assert_eq!(locate(&mark(None), &said, &Proof::Files { followed: true }), Located::Here, "what a file would say");
    assert_eq!(locate(&mark(None), &said, &Proof::Files { followed: false }), Located::Unclear(Unsettled::Unproven));
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
    let unproven = SettleVerdict::Unknown(Unsettled::Unproven);
    let answers = EACH.map(|kind| settled_by(kind, &begun, node, 1));
    assert_eq!(answers, [unproven, unproven, unproven, SettleVerdict::NotCommitted]);
    assert_eq!(
        by_number(&begun, node, 1),
        SettleVerdict::Committed,
        "what a file would say, of somebody else's commit"
    );
}

/// How a rule of numbers would return a wrong `Ok`. Server 1 lags, and is promoted to timeline 2, where the transaction
/// runs. Server 2 has received more than server 1, so it cannot follow. When server 1 dies, server 2 is promoted to
/// timeline 3, because it finds that number 2 is taken: in the archive, or among the histories that it was sent. On
/// timeline 1, another transaction has the same id.
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
        assert_eq!(by_number(&begun, node, 1), SettleVerdict::Committed, "somebody else's commit, before the fork");
        let unproven = SettleVerdict::Unknown(Unsettled::Unproven);
        let answers = EACH.map(|evidence| settled_by(evidence, &begun, node, 1));
        assert_eq!(answers, [unproven, unproven, unproven, SettleVerdict::NotCommitted]);
    }
}
