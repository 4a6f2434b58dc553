//! If a server withholds a part, only what that part would show is lost, and no server is accepted that would otherwise
//! be refused.

use super::*;

/// Returns the report without these parts.
fn without(parts: &[Part], mut report: ServerReport) -> ServerReport {
    for part in parts {
        match part {
            Part::Identity => report.system_identifier = None,
            Part::StartTime => report.started_at = None,
            Part::Timeline => report.timeline = None,
            Part::Replay => report.replayed = None,
            Part::Checkpoint => report.checkpointed = None,
            Part::Fence => report.fence_pending = false,
            Part::Position => report.wal = None,
            Part::Statistics => report.stats_reset = None,
            Part::Evidence => report.evidence = None,
        }
    }
    ServerReport { withheld: parts.iter().copied().collect(), ..report }
}

fn started(at: i64, mut report: ServerReport) -> ServerReport {
    report.started_at = Some(at);
    report
}

fn recovered(mut report: ServerReport) -> ServerReport {
    report.replayed = "0/10".parse().ok();
    report
}

const ALL: [Part; 9] = [
    Part::Fence,
    Part::Identity,
    Part::StartTime,
    Part::Timeline,
    Part::Position,
    Part::Replay,
    Part::Statistics,
    Part::Checkpoint,
    Part::Evidence,
];

/// Sets of parts: each part alone, each pair, and all parts.
fn sets() -> impl Iterator<Item = Vec<Part>> {
    let one = ALL.into_iter().map(|part| vec![part]);
    let two = ALL.into_iter().flat_map(|one| ALL.into_iter().map(move |other| vec![one, other]));
    one.chain(two).chain([ALL.to_vec()])
}

/// Server 1 is the primary of timeline 2, and has recovered once. Servers 2 and 3 are standbys. All have reported
/// everything.
fn settled() -> Bench {
    let mut bench = Bench::new(3);
    bench.report(2, standby(2));
    bench.report(3, standby(3));
    bench.report(1, recovered(primary(1, 2)));
    bench.wait(ms(100));
    bench.answer(1, Ok(recovered(primary(1, 2))), false, true);
    bench.log.clear();
    bench
}

/// The primary has withheld these parts on its kept session, and then was lost.
fn lost_without(parts: &[Part]) -> Bench {
    let mut bench = settled();
    bench.wait(ms(6000));
    bench.report(2, standby(2));
    bench.report(3, standby(3));
    bench.answer(1, Ok(without(parts, recovered(primary(1, 2)))), false, true);
    assert_eq!(bench.primary(), Some(1));
    bench.suspect(1);
    bench.wait(ms(20));
    bench.fail(1, FailureKind::Unreachable);
    assert_eq!(bench.primary(), None);
    bench.wait(ms(20));
    bench
}

fn refusal(bench: &Bench, n: u8) -> Option<Refusal> {
    match &bench.topology.members[&address(n)].answer {
        Some(Answer::Refused(_, refusal)) => Some(*refusal),
        _ => None,
    }
}

/// If a part is missing although the server did not refuse it, the answer makes no sense.
#[test]
fn a_part_that_is_missing_for_no_reason_is_not_filled_in() {
    for part in [Part::Identity, Part::Timeline] {
        let mut bench = settled();
        let told = ServerReport { withheld: Parts::default(), ..without(&[part], recovered(primary(1, 2))) };
        bench.answer(1, Ok(told), false, true);
        assert_eq!(bench.primary(), None, "{part}");
        assert!(refusal(&bench, 1).is_some(), "{part}");
    }
}

#[test]
fn a_primary_that_keeps_back_any_part_is_kept() {
    for parts in sets() {
        // The first answer without the parts comes on a kept session or on a new one.
        for first_fresh in [false, true] {
            let mut bench = settled();
            for fresh in [first_fresh, false, true, false, true] {
                bench.wait(ms(1000));
                bench.answer(1, Ok(without(&parts, recovered(primary(1, 2)))), fresh, true);
                assert_eq!(bench.primary(), Some(1), "{parts:?}, fresh: {fresh}");
            }
            assert!(bench.ended().is_empty(), "{parts:?}");
            assert!(
                !bench.log.iter().any(|it| matches!(it, Action::Suspend { .. } | Action::Begin { .. })),
                "{parts:?}"
            );
            assert_eq!(bench.topology.system_identifier, Some(77));
            assert_eq!(bench.topology.newest_timeline, Some(2));
        }
    }
}

#[test]
fn one_that_starts_without_any_part_is_found_and_learned_from_later() {
    for parts in sets() {
        let mut bench = Bench::new(1);
        bench.report(1, without(&parts, recovered(primary(1, 2))));
        assert_eq!(bench.primary(), Some(1), "{parts:?}");
        let told = |bench: &Bench| match bench.topology.view().state {
            State::Primary { report, .. } => report,
            _ => unreachable!(),
        };
        bench.wait(ms(1000));
        bench.answer(1, Ok(without(&parts, recovered(primary(1, 2)))), false, true);
        assert_eq!(told(&bench).withheld, parts.iter().copied().collect(), "{parts:?}");
        // The privileges are granted now.
        let revision = bench.topology.revision();
        bench.wait(ms(1000));
        bench.answer(1, Ok(recovered(primary(1, 2))), false, true);
        assert_eq!(told(&bench), recovered(primary(1, 2)), "{parts:?}");
        assert!(bench.topology.revision() > revision);
        assert_eq!((bench.topology.system_identifier, bench.topology.newest_timeline), (Some(77), Some(2)));
        assert!(bench.ended().is_empty());
        let vital = [Part::Identity, Part::StartTime, Part::Timeline, Part::Replay];
        let learned = bench.log.iter().any(|it| matches!(it, Action::Learned { report } if report.is_identified()));
        assert_eq!(learned, parts.iter().any(|part| vital.contains(part)), "{parts:?}");
        // From now on, another cluster and an old primary are refused.
        bench.report(1, ServerReport { system_identifier: Some(78), ..started(9, primary(1, 2)) });
        assert!(matches!(refusal(&bench, 1), Some(Refusal::OtherCluster { .. })), "{parts:?}");
    }
}

#[test]
fn an_operator_is_told_once_what_is_kept_back_and_again_when_it_is_more() {
    let mut bench = settled();
    let told = |bench: &Bench| {
        let told = bench.log.iter().filter_map(|action| match action {
            Action::Notice(Notice::Withheld(_, parts)) => Some(parts.to_string()),
            _ => None,
        });
        told.collect::<Vec<_>>()
    };
    let mut say = |parts: &[Part], fresh| {
        bench.wait(ms(1000));
        bench.answer(1, Ok(without(parts, recovered(primary(1, 2)))), fresh, true);
        told(&bench)
    };
    assert_eq!(say(&[Part::Fence], false), ["the settings of new sessions"]);
    // A new session is not asked for the fence.
    assert_eq!(say(&[], true).len(), 1);
    assert_eq!(say(&[Part::Fence], false).len(), 1);
    assert_eq!(say(&[Part::Fence, Part::Identity], false)[1..], ["the system identifier"]);
    assert_eq!(say(&[Part::Identity], true).len(), 2);
    assert_eq!(say(&[], false).len(), 2);
    assert_eq!(say(&[Part::Timeline], false)[2..], ["the timeline"]);
}

#[test]
fn a_successor_that_is_known_from_before_needs_to_tell_nothing() {
    for parts in sets() {
        // The successor is in the life in which it is known. The primary has withheld these parts, or nothing.
        for before in [&parts[..], &[]] {
            let mut bench = lost_without(before);
            // Either the server reports its start time, or its session is kept.
            let kept = parts.contains(&Part::StartTime);
            bench.answer(2, Ok(standby(2)), !kept, true);
            bench.wait(ms(50));
            bench.answer(2, Ok(without(&parts, primary(2, 3))), !kept, true);
            bench.wait(ms(500));
            assert_eq!(bench.primary(), Some(2), "{parts:?}, the primary before: {before:?}");
        }
    }
}

#[test]
fn an_unidentified_server_is_let_in_only_where_the_primary_had_stopped_telling() {
    let hidden = [Part::Identity];
    for (before, server, let_in) in [(&hidden[..], 2, true), (&[], 2, false), (&hidden, 4, false), (&[], 4, false)] {
        let mut bench = lost_without(before);
        if server == 4 {
            // The pool has never seen this server.
            bench.topology.add(endpoint(4), Origin::Resolved, bench.now);
            bench.poll();
        }
        // The server is in another life than the known one.
        bench.report(server, started(99, without(&hidden, primary(server, 3))));
        bench.wait(ms(500));
        assert_eq!(bench.primary() == Some(server), let_in, "{before:?} {server}");
        assert_eq!(refusal(&bench, server), (!let_in).then_some(Refusal::Unidentified));
        // The server reports its cluster again, and is accepted.
        bench.report(server, started(99, primary(server, 3)));
        bench.wait(ms(500));
        assert_eq!(bench.primary(), Some(server));
    }
    // If the user has configured the cluster, a server that withholds its cluster is never accepted.
    let mut bench = Bench::with(Settings { system_identifier: Some(77), ..settings() }, 1);
    bench.report(1, without(&hidden, primary(1, 1)));
    bench.wait(ms(1000));
    assert_eq!(bench.primary(), None);
}

/// One server withholds these parts, and another one reports them. The second one is used, whichever answers first.
fn assert_one_that_tells_is_taken(hidden: &[Part]) {
    for first in [2, 3] {
        let mut bench = lost_without(hidden);
        let reports = [started(99, without(hidden, primary(2, 9))), started(98, primary(3, 3))];
        for n in [first, 5 - first] {
            bench.report(n, reports[usize::from(n) - 2].clone());
            bench.now += ms(1);
        }
        bench.wait(ms(500));
        assert_eq!(bench.primary(), Some(3));
    }
}

#[test]
fn one_that_tells_its_cluster_goes_before_one_that_does_not() {
    let hidden = [Part::Identity];
    assert_one_that_tells_is_taken(&hidden);
    // The server that reports its cluster comes late. It is used if its timeline is not older.
    for (timeline, taken) in [(2, 2), (3, 3), (4, 3)] {
        let mut bench = lost_without(&hidden);
        bench.report(2, started(99, without(&hidden, primary(2, 3))));
        bench.wait(ms(500));
        assert_eq!(bench.primary(), Some(2));
        bench.report(3, started(98, primary(3, timeline)));
        assert_eq!(bench.primary(), Some(taken), "{timeline}");
    }
}

#[test]
fn an_old_primary_is_refused_as_far_as_its_timeline_is_known() {
    let hidden = [Part::Timeline];
    let all = [Part::Timeline, Part::Checkpoint];
    let checkpointed = |timeline, report| ServerReport { checkpointed: Some(timeline), ..report };
    let old = Refusal::Zombie { timeline: 1, newest: 2 };
    let unclear = Refusal::NoTimeline { newest: 2 };
    for (before, report, refused) in [
        (&hidden[..], checkpointed(1, without(&hidden, primary(2, 1))), Some(old)),
        (&hidden, checkpointed(2, without(&hidden, primary(2, 3))), None),
        (&[], checkpointed(1, without(&hidden, primary(2, 1))), Some(old)),
        (&[], checkpointed(2, without(&hidden, primary(2, 3))), None),
        (&all, without(&all, primary(2, 3)), None),
        (&[], without(&all, primary(2, 3)), Some(unclear)),
        (&all, primary(2, 1), Some(old)),
    ] {
        // The server was restarted since it was a standby, so its promotion was not seen.
        let mut bench = lost_without(before);
        bench.report(2, started(99, report.clone()));
        bench.wait(ms(500));
        assert_eq!(refusal(&bench, 2), refused, "{before:?} {report:?}");
        assert_eq!(bench.primary(), refused.is_none().then_some(2));
    }
}

#[test]
fn one_without_a_timeline_takes_nobodys_place() {
    let hidden = [Part::Timeline, Part::Checkpoint];
    assert_one_that_tells_is_taken(&hidden);
    let mut bench = settled();
    bench.answer(1, Ok(without(&hidden, recovered(primary(1, 2)))), false, true);
    bench.wait(ms(6000));
    bench.report(2, started(99, without(&hidden, primary(2, 9))));
    assert_eq!(bench.primary(), Some(1));
}

#[test]
fn a_server_that_hides_its_replay_is_in_the_same_life_and_one_that_shows_another_is_not() {
    let known = Primary { id: GenerationId(1), endpoint: endpoint(1), report: recovered(primary(1, 2)) };
    let other = ServerReport { replayed: "0/20".parse().ok(), ..primary(1, 2) };
    for (report, admitted) in [
        (recovered(primary(1, 2)), true),
        (without(&[Part::Replay], primary(1, 2)), true),
        (without(&[Part::StartTime], recovered(primary(1, 2))), true),
        (without(&ALL, primary(1, 2)), true),
        (other.clone(), false),
        (without(&[Part::StartTime], other), false),
        (primary(1, 2), false),
        (without(&[Part::Replay], started(9, primary(1, 2))), false),
    ] {
        assert_eq!(known.admits(&report).is_ok(), admitted, "{report:?}");
    }
}

#[test]
fn where_the_fence_is_hidden_each_patrol_looks_by_a_new_session() {
    for (parts, looks) in [(&[][..], false), (&[Part::Fence], true)] {
        let mut bench = settled();
        bench.answer(1, Ok(without(parts, recovered(primary(1, 2)))), false, true);
        bench.log.clear();
        bench.wait(ms(6000));
        assert_eq!(bench.asked_freshly(1), looks, "{parts:?}");
        if looks {
            bench.report(1, recovered(fenced(1, 2)));
            assert_eq!((bench.primary(), bench.ended()), (None, vec![1]));
        }
    }
}
