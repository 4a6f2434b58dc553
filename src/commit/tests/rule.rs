//! Tests the rule with a table. Each row is a mark, an answer of a server, and the decision.

use super::*;

#[test]
fn the_server_in_the_same_life_has_the_mark() {
    assert_eq!(located(&mark(None), &now(OLD, None, None)), Located::Here, "started cleanly");
    assert_eq!(located(&mark(Some(5)), &now(OLD, Some(5), None)), Located::Here, "had recovered before");
    assert_eq!(located(&mark(Some(5)), &now(OLD, Some(5), Some(5))), Located::Here, "had been promoted before");
}

#[test]
fn a_crash_of_a_backend_shows_by_the_end_of_replay_alone() {
    for before in [None, Some(5)] {
        assert_eq!(located(&mark(before), &now(OLD, Some(19), None)), Located::Lost);
        assert_eq!(located(&mark(before), &now(OLD, Some(20), None)), Located::Here);
        assert_eq!(located(&mark(before), &now(OLD, Some(21), None)), Located::Here);
    }
}

#[test]
fn after_crash_recovery_the_end_of_replay_decides() {
    assert_eq!(located(&mark(None), &now(AGAIN, Some(19), None)), Located::Lost);
    assert_eq!(located(&mark(None), &now(AGAIN, Some(20), None)), Located::Here);
    assert_eq!(located(&mark(None), &now(AGAIN, Some(21), None)), Located::Here);
    // The last replay ended at the same position as in the life before. So recovery found nothing that the old life had
    // written.
    assert_eq!(located(&mark(Some(5)), &now(AGAIN, Some(5), None)), Located::Lost);
}

#[test]
fn a_clean_start_loses_nothing_if_the_statistics_survived() {
    let kept =
        |server, replayed, received| Now { life: life(server, replayed, Some(7)), ..now(server, replayed, received) };
    assert_eq!(located(&mark(None), &kept(AGAIN, None, None)), Located::Here);
    assert_eq!(located(&mark(Some(5)), &kept(AGAIN, None, None)), Located::Here);
    let untold = WalMark { life: life(OLD, None, None), ..mark(None) };
    let unclear = Located::Unclear(Unsettled::Restarted);
    assert_eq!(
        located(&untold, &Now { life: life(AGAIN, None, None), ..now(AGAIN, None, None) }),
        unclear,
        "PostgreSQL 14"
    );
    let unproven = Located::Unclear(Unsettled::Unproven);
    assert_eq!(located(&mark(None), &kept(NEXT, None, None)), unproven, "another server's statistics");
    // The number of restarts does not matter, because the server never crashed.
    let often = Now { primaries_since: 9, ..kept(AGAIN, None, None) };
    assert_eq!(located(&mark(None), &often), Located::Here);
    // Somebody has reset the statistics by hand. This is still the same life.
    assert_eq!(located(&mark(Some(5)), &now(OLD, Some(5), None)), Located::Here);
}

#[test]
fn a_clean_start_hides_whether_there_was_a_crash_before() {
    let unclear = Located::Unclear(Unsettled::Restarted);
    assert_eq!(located(&mark(None), &now(AGAIN, None, None)), unclear);
    assert_eq!(located(&mark(Some(5)), &now(AGAIN, None, None)), unclear);
    assert_eq!(located(&mark(None), &with_ancestor(now(NEXT, None, Some(30)), 3)), unclear, "no real server says this");
}

#[test]
fn on_the_next_timeline_the_end_of_replay_decides() {
    let next = |replayed, received| with_ancestor(now(NEXT, Some(replayed), Some(received)), 3);
    assert_eq!(located(&mark(None), &next(19, 19)), Located::Lost);
    assert_eq!(located(&mark(None), &next(20, 20)), Located::Here);
    assert_eq!(located(&mark(None), &next(21, 30)), Located::Here);
    assert_eq!(located(&mark(None), &next(19, 30)), Located::Lost, "the last record came in part");
}

/// A server may take the next number without having followed the mark's timeline, because it finds that the mark's
/// number is taken: in a shared archive, or among the histories that it was sent.
#[test]
fn a_number_alone_makes_no_parent() {
    let unproven = Located::Unclear(Unsettled::Unproven);
    let next = now(NEXT, Some(20), Some(20));
    assert_eq!(located(&mark(None), &next), unproven);
    for ancestor in [1, 2] {
        assert_eq!(located(&mark(None), &with_ancestor(next, ancestor)), unproven, "it has followed {ancestor}");
    }
    assert_eq!(located(&mark(None), &with_ancestor(next, 3)), Located::Here);
    assert_eq!(locate(&mark(None), &next, &Proof::Files { followed: true }), Located::Here);
    assert_eq!(locate(&mark(None), &next, &Proof::Files { followed: false }), unproven);
}

/// A leader that was demoted and promoted again has not streamed from any server, and has replayed no transaction. Its
/// statistics show that it has not crashed since its promotion.
#[test]
fn statistics_that_survived_show_that_replay_ended_at_the_promotion() {
    let first = WalMark { life: Life { server: Server { timeline: 1, ..OLD }, ..mark(None).life }, ..mark(None) };
    let back = |replayed, stats| {
        let said = now(Server { timeline: 2, ..NEXT }, replayed, None);
        Now { life: Life { stats_reset: stats, ..said.life }, ..said }
    };
    let restarted = Located::Unclear(Unsettled::Restarted);
    assert_eq!(located(&first, &back(Some(20), Some(7))), Located::Here);
    assert_eq!(located(&first, &back(Some(19), Some(7))), Located::Lost);
    assert_eq!(located(&first, &back(Some(20), Some(8))), restarted, "it crashed");
    assert_eq!(located(&first, &back(None, Some(7))), restarted, "it was started again");
    let untold = WalMark { life: Life { stats_reset: None, ..first.life }, ..first };
    assert_eq!(located(&untold, &back(Some(20), None)), restarted, "PostgreSQL 14");
}

#[test]
fn each_history_begins_with_the_first_timeline() {
    let first = |server| Server { timeline: 1, ..server };
    let mark = WalMark { life: Life { server: first(OLD), ..mark(None).life }, ..mark(None) };
    let second = now(Server { timeline: 2, ..NEXT }, Some(20), Some(20));
    assert_eq!(located(&mark, &second), Located::Here);
    let third = now(Server { timeline: 3, ..NEXT }, Some(20), Some(20));
    assert_eq!(located(&mark, &third), Located::Unclear(Unsettled::SeveralFailovers), "it ended somewhere before");
}

#[test]
fn a_promoted_server_that_recovered_again_shows_the_end_of_a_later_replay() {
    let unclear = Located::Unclear(Unsettled::Restarted);
    let files = |now: &Now| locate(&mark(None), now, &Proof::Files { followed: true });
    assert_eq!(files(&now(NEXT, None, None)), unclear);
    // The replay before its promotion ended there or earlier.
    assert_eq!(files(&now(NEXT, Some(19), None)), Located::Lost);
    assert_eq!(files(&now(NEXT, Some(20), None)), unclear);
    assert_eq!(files(&now(NEXT, Some(30), None)), unclear);
}

/// This leader crashed, was started again as a standby on its own log, and was promoted. It never streamed.
#[test]
fn a_leader_that_is_promoted_on_its_own_log_shows_its_own_timeline() {
    for (replayed, expected) in [(19, Located::Lost), (20, Located::Here), (30, Located::Here)] {
        let said = with_ancestor(now(NEXT, Some(replayed), None), 3);
        assert_eq!(located(&mark(None), &said), expected, "{said:?}");
    }
}

/// This server was recovered in single-user mode, shut down, started as a standby on its own log and promoted. Nobody
/// saw the recovery, which may have lost the mark. Replay ended behind the two checkpoints of the recovery and the
/// shutdown.
#[test]
fn a_recovery_that_nobody_saw_may_have_lost_the_mark() {
    for (stopped, expected) in [
        (20, Located::Unclear(Unsettled::Restarted)),
        (20 + 511, Located::Unclear(Unsettled::Restarted)),
        (20 + 512, Located::Here),
    ] {
        let said = with_ancestor(now(NEXT, Some(2000), None), 3);
        let said = Now { stopped: Some(lsn(stopped)), ..said };
        assert_eq!(located(&mark(None), &said), expected, "{said:?}");
        let survived = Now { life: Life { stats_reset: Some(7), ..said.life }, ..said };
        assert_eq!(located(&mark(None), &survived), Located::Here, "it was shut down, and not recovered");
    }
}

#[test]
fn what_ended_before_the_mark_is_lost_after_any_number_of_failovers() {
    for timeline in [3, 4, 5, 9] {
        let said = Now { primaries_since: 9, ..now(Server { timeline, ..AGAIN }, Some(19), None) };
        assert_eq!(located(&mark(None), &said), Located::Lost, "{said:?}");
    }
}

#[test]
fn a_timeline_that_does_not_continue_the_marks_tells_nothing() {
    for (timeline, why) in [
        (1, Unsettled::OtherHistory),
        (2, Unsettled::OtherHistory),
        (5, Unsettled::SeveralFailovers),
        (9, Unsettled::SeveralFailovers),
    ] {
        for (replayed, received) in [(None, None), (Some(20), Some(20)), (Some(20), None)] {
            let said = now(Server { timeline, ..NEXT }, replayed, received);
            assert_eq!(located(&mark(None), &said), Located::Unclear(why), "{said:?}");
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
    let gone = |ancestors| locate(&mark(None), &late, &history(ancestors, Sighting::Recycled));
    let once = Now { primaries_since: 1, ..now(NEXT, Some(30), None) };
    assert_eq!(locate(&mark(None), &once, &history(&[(3, 20)], Sighting::Recycled)), Located::Here);
    assert_eq!(gone(&[(3, 19), (4, 30)]), Located::Lost);
    assert_eq!(gone(&[(2, 25), (4, 30)]), Located::Lost, "it is no ancestor");
    let several = Located::Unclear(Unsettled::SeveralFailovers);
    assert_eq!(gone(&[(3, 20), (4, 30)]), several, "one of the two that the pool has seen may have been a crash");
    assert_eq!(gone(&[(3, 30)]), several, "the pool has seen one more, and perhaps it was a crash before");
    for (sighting, expected) in
        [(Sighting::Mark, Located::Here), (Sighting::Other, Located::Lost), (Sighting::NotYet, Located::NotYet)]
    {
        for server in [OLD, AGAIN, NEXT, Server { timeline: 9, ..NEXT }] {
            let said = Now { primaries_since: 9, ..now(server, Some(20), None) };
            assert_eq!(locate(&mark(None), &said, &history(&[], sighting)), expected, "{said:?}");
        }
    }
}

#[test]
fn proof_is_asked_for_where_it_tells_more() {
    let next = now(NEXT, Some(20), Some(20));
    let wants = |said: &Now| {
        [Evidence::Checkpoint, Evidence::Files, Evidence::Function]
            .map(|evidence| wants_proof(&mark(None), said, evidence))
    };
    assert_eq!(wants(&next), [false, true, true]);
    assert_eq!(wants(&with_ancestor(next, 3)), [false, false, true], "the function alone knows of crashes");
    assert_eq!(wants(&now(AGAIN, Some(20), None)), [false, false, true]);
    assert_eq!(wants(&now(NEXT, Some(19), Some(19))), [false; 3], "it is lost");
    assert_eq!(wants(&now(OLD, None, None)), [false; 3], "nothing happened");
    assert_eq!(wants(&now(Server { system_identifier: 78, ..NEXT }, Some(20), None)), [false; 3]);
}

#[test]
fn a_standby_that_was_promoted_to_the_marks_number_tells_nothing() {
    for replayed in [None, Some(19), Some(20)] {
        let said = now(Server { timeline: OLD.timeline, ..NEXT }, replayed, None);
        for said in [Now { received: Some(lsn(20)), ..said }, with_ancestor(said, 2)] {
            assert_eq!(located(&mark(None), &said), Located::Unclear(Unsettled::OtherHistory), "{said:?}");
        }
    }
}

#[test]
fn an_equal_start_time_alone_makes_no_same_life() {
    let said = now(Server { started_at: OLD.started_at, ..NEXT }, Some(5), Some(5));
    assert_eq!(located(&mark(Some(5)), &said), Located::Lost);
}

#[test]
fn another_cluster_tells_nothing_whatever_else_is_equal() {
    for server in [OLD, AGAIN, NEXT] {
        for replayed in [None, Some(19), Some(20)] {
            let said = now(Server { system_identifier: 78, ..server }, replayed, replayed);
            assert_eq!(located(&mark(None), &said), Located::Unclear(Unsettled::OtherCluster), "{said:?}");
        }
    }
}

#[test]
fn more_than_one_new_primary_is_one_too_many() {
    for (server, replayed, received) in [(AGAIN, Some(20), None), (NEXT, Some(20), Some(20))] {
        for (primaries_since, is_clear) in [(0, true), (1, true), (2, false), (3, false)] {
            let said = with_ancestor(now(server, replayed, received), if server == NEXT { 3 } else { 9 });
            let said = if server == NEXT { said } else { now(server, replayed, received) };
            let located = located(&mark(None), &Now { primaries_since, ..said });
            let unclear = Located::Unclear(Unsettled::SeveralFailovers);
            assert_eq!(located != unclear, is_clear, "{primaries_since} on {server:?}");
        }
    }
    // In the same life the mark is there, however many primaries the pool has seen in between.
    assert_eq!(located(&mark(None), &Now { primaries_since: 3, ..now(OLD, None, None) }), Located::Here);
}

#[test]
fn what_the_server_says_of_an_id_it_knows_is_the_answer() {
    assert_eq!(SettleVerdict::from(XactStatus::Committed), SettleVerdict::Committed);
    assert_eq!(SettleVerdict::from(XactStatus::Aborted), SettleVerdict::NotCommitted);
    assert_eq!(SettleVerdict::from(XactStatus::InProgress), SettleVerdict::InProgress);
    assert_eq!(SettleVerdict::from(XactStatus::Forgotten), SettleVerdict::Unknown(Unsettled::Forgotten));
}

#[test]
fn an_id_that_was_not_given_out_is_of_no_transaction() {
    use Unsettled::{OtherCluster, OtherHistory, Restarted, SeveralFailovers, Unproven};
    for why in [Restarted, SeveralFailovers, Unproven] {
        assert_eq!(settle(Located::Unclear(why), None), SettleVerdict::NotCommitted);
        for status in [XactStatus::Committed, XactStatus::Aborted, XactStatus::InProgress] {
            assert_eq!(settle(Located::Unclear(why), Some(status)), SettleVerdict::Unknown(why), "it may be another's");
        }
    }
    for why in [OtherCluster, OtherHistory] {
        assert_eq!(settle(Located::Unclear(why), None), SettleVerdict::Unknown(why));
    }
    assert_eq!(settle(Located::Here, None), SettleVerdict::Unknown(OtherHistory), "both cannot be");
    assert_eq!(settle(Located::Lost, Some(XactStatus::Committed)), SettleVerdict::NotCommitted);
    assert_eq!(settle(Located::NotYet, None), SettleVerdict::InProgress);
}

#[test]
fn a_fence_is_believed_for_half_of_the_time_that_rows_are_kept() {
    let keep = Duration::from_secs(3600);
    let settle = |entry, age| settle_entry(entry, Duration::from_secs(age), keep);
    assert_eq!(settle(LedgerEntry::Fence, 0), SettleVerdict::NotCommitted);
    assert_eq!(settle(LedgerEntry::Fence, 1800), SettleVerdict::NotCommitted);
    assert_eq!(
        settle(LedgerEntry::Fence, 1801),
        SettleVerdict::Unknown(Unsettled::TooOld),
        "its own row may have been pruned"
    );
    for age in [0, 1801, 3600 * 24] {
        assert_eq!(settle(LedgerEntry::Own, age), SettleVerdict::Committed, "a row that is there is true at any age");
    }
}
