//! Tests what suspends a primary in use, what resumes it, what ends its generation, and what does none of these.

use super::*;

#[test]
fn a_late_signal_of_an_older_generation_changes_nothing() {
    let mut bench = Bench::settled();
    bench.wait(ms(6000));
    bench.report(2, primary(2, 2));
    bench.log.clear();
    bench.suspect(1);
    bench.wait(ms(100));
    assert_eq!(bench.primary(), Some(2));
    assert!(!bench.asked_freshly(2));
}

#[test]
fn a_suspicion_is_looked_into_on_a_new_session_and_evicts_nobody_by_itself() {
    let mut bench = Bench::settled();
    bench.wait(ms(500));
    bench.log.clear();
    bench.suspect(1);
    assert!(bench.asked_freshly(1));
    assert_eq!(bench.primary(), Some(1));
    bench.report(1, primary(1, 1));
    assert_eq!(bench.primary(), Some(1));
    assert!(bench.ended().is_empty());
}

#[test]
fn many_suspicions_are_one_probe_per_interval() {
    let mut bench = Bench::settled();
    bench.wait(ms(500));
    bench.log.clear();
    for _ in 0..50 {
        bench.suspect(1);
        bench.now += ms(2);
        if bench.topology.members[&address(1)].asking {
            bench.report(1, primary(1, 1));
        }
    }
    assert!(bench.asked(1) <= 6, "asked {} times in 100 ms", bench.asked(1));
}

#[test]
fn a_slow_server_is_resumed_and_loses_no_connection() {
    let mut bench = Bench::settled();
    bench.wait(ms(1000));
    bench.answer(1, Err(failure(FailureKind::TimedOut)), false, false);
    assert_eq!(bench.primary(), None, "nobody is sent to a silent server");
    bench.wait(ms(500));
    bench.report(1, primary(1, 1));
    assert_eq!(bench.primary(), Some(1));
    assert!(bench.ended().is_empty());
    assert_eq!(bench.topology.view().generation.get(), 1);
}

/// A promoted server shows the timeline that it came from until it has completed a checkpoint. Afterwards the pool must
/// remember it.
#[test]
fn a_resumed_server_is_remembered_by_the_timeline_that_it_came_from() {
    for first in [Some(1), None] {
        let mut bench = Bench::new(1);
        let said = |checkpointed| ServerReport { checkpointed, ..primary(1, 2) };
        bench.report(1, said(first));
        bench.wait(ms(1000));
        bench.report(1, said(Some(2)));
        bench.wait(ms(1000));
        bench.answer(1, Err(failure(FailureKind::TimedOut)), false, false);
        bench.report(1, said(Some(2)));
        let State::Primary { report, .. } = bench.topology.view().state else { panic!("it is not resumed") };
        assert_eq!(report.checkpointed, first.or(Some(2)));
    }
}

#[test]
fn a_silent_server_is_given_up_after_dead_after() {
    let mut bench = Bench::settled();
    bench.wait(ms(1000));
    bench.answer(1, Err(failure(FailureKind::TimedOut)), false, false);
    bench.wait(ms(18_000));
    assert!(bench.ended().is_empty());
    bench.wait(ms(2000));
    assert_eq!(bench.ended(), [1]);
}

#[test]
fn each_end_says_its_cause_and_whether_the_primary_was_in_use_until_then() {
    let ends = |happens: fn(&mut Bench)| {
        let mut bench = Bench::settled();
        bench.wait(ms(6000));
        happens(&mut bench);
        let mut suspensions = 0;
        let said = bench.log.iter().filter_map(|action| {
            suspensions += usize::from(matches!(action, Action::Suspend { .. }));
            match action {
                Action::End { cause, lost, .. } => Some((*cause, *lost, suspensions)),
                _ => None,
            }
        });
        said.collect::<Vec<_>>()
    };
    assert_eq!(ends(|bench| bench.report(2, primary(2, 2))), [(Eviction::Replaced, true, 0)]);
    assert_eq!(ends(|bench| bench.answer(1, Ok(fenced(1, 1)), false, true)), [(Eviction::Fenced, false, 1)]);
    assert_eq!(ends(|bench| bench.answer(1, Ok(standby(1)), false, true)), [(Eviction::Demoted, false, 1)]);
    let silent = |bench: &mut Bench| bench.answer(1, Err(failure(FailureKind::TimedOut)), false, false);
    assert!(ends(silent).is_empty());
    let given_up = ends(|bench| {
        bench.answer(1, Err(failure(FailureKind::TimedOut)), false, false);
        bench.wait(ms(20_000));
    });
    assert_eq!(given_up, [(Eviction::Silent, false, 1)]);
    let replaced = ends(|bench| {
        bench.answer(1, Err(failure(FailureKind::TimedOut)), false, false);
        bench.report(2, primary(2, 2));
    });
    assert_eq!(replaced, [(Eviction::Replaced, false, 1)]);
}

#[test]
fn a_restart_is_a_new_generation() {
    let mut bench = Bench::searching();
    bench.wait(ms(100));
    bench.report(2, standby(2));
    bench.report(3, standby(3));
    bench.report(1, ServerReport { started_at: Some(999), ..primary(1, 1) });
    assert_eq!(bench.primary(), Some(1));
    assert_eq!(bench.topology.view().generation.get(), 2);
    assert_eq!(bench.ended(), [1]);
}

#[test]
fn a_successor_is_looked_for_before_a_silent_primary_is_given_up() {
    let mut bench = Bench::settled();
    bench.wait(ms(1050));
    bench.log.clear();
    // Then the heartbeat has had no answer for 75 ms. Its limit is 2 s.
    bench.wait(ms(75));
    assert!(bench.asked(2) > 0 && bench.asked(3) > 0, "the patrol would come seconds later");
    bench.report(2, standby(2));
    bench.wait(ms(150));
    assert_eq!(bench.primary(), Some(1), "it is only slow, so far");
    bench.report(2, primary(2, 2));
    assert_eq!(bench.primary(), Some(2));
    assert_eq!(bench.ended(), [1]);
}

#[test]
fn a_primary_that_falls_silent_under_load_is_asked_at_once() {
    let mut bench = Bench::settled();
    bench.work(ms(500), true);
    assert_eq!(bench.asked(1), 0, "what is heard from it is sign enough");
    bench.work(ms(75), false);
    assert_eq!(bench.asked(1), 1);
    bench.work(ms(100), false);
    assert!(bench.asked(2) > 0 && bench.asked(3) > 0, "nor does it answer");
}

#[test]
fn a_long_statement_is_no_reason_to_go_on_asking() {
    let mut bench = Bench::settled();
    for _ in 0..40 {
        let before = bench.asked(1);
        bench.work(ms(50), false);
        if bench.asked(1) > before {
            bench.answer(1, Ok(primary(1, 1)), false, true);
        }
    }
    // Each pause is twice as long as the one before, up to the pause between two heartbeats.
    assert!((3..=7).contains(&bench.asked(1)), "asked {} times in two seconds", bench.asked(1));
    assert_eq!(bench.asked(2), 0, "it answers");
}

#[test]
fn slow_statements_are_no_reason_either() {
    let mut bench = Bench::settled();
    for _ in 0..100 {
        bench.work(ms(75), false);
        bench.work(ms(25), true);
        bench.answer(1, Ok(primary(1, 1)), false, true);
    }
    assert!(bench.asked(1) <= 25, "asked {} times in ten seconds", bench.asked(1));
    // A server that has answered all the time is asked as soon as it falls silent.
    for _ in 0..6 {
        bench.work(ms(1000), true);
        bench.answer(1, Ok(primary(1, 1)), false, true);
    }
    bench.log.clear();
    bench.work(ms(75), false);
    assert_eq!(bench.asked(1), 1);
}

#[test]
fn an_idle_pool_asks_no_more_than_the_heart_beat() {
    let mut bench = Bench::settled();
    bench.wait(ms(800));
    assert_eq!(bench.asked(1), 0);
}

#[test]
fn a_server_that_was_silent_and_is_full_serves_again() {
    let mut bench = Bench::settled();
    bench.wait(ms(1000));
    bench.answer(1, Err(failure(FailureKind::TimedOut)), false, false);
    assert_eq!(bench.primary(), None);
    bench.wait(ms(20));
    bench.fail(1, FailureKind::Full);
    assert_eq!(bench.primary(), Some(1), "the slots may be this pool's own");

    let mut bench = Bench::settled();
    bench.wait(ms(500));
    bench.topology.suspected(bench.now, GenerationId(1), Suspicion::ReadOnly);
    bench.poll();
    bench.fail(1, FailureKind::Full);
    assert_eq!(bench.primary(), None, "it may be fenced");
}

/// The address may be a proxy's, which leads to a full successor while the primary's host is frozen. Then the server
/// that says that it is full is not the silent one. The silent one can be asked on its open sessions.
#[test]
fn a_full_server_at_the_address_of_a_silent_one_may_be_another() {
    for kept_open in [true, false] {
        let mut bench = Bench::settled();
        let traffic = TrafficSample { in_use: false, moved: false, received: false, open: 1, idle_asked: false };
        bench.topology.traffic(bench.now, traffic);
        bench.wait(ms(1000));
        bench.answer(1, Err(failure(FailureKind::TimedOut)), false, kept_open);
        assert_eq!(bench.primary(), None);
        for _ in 0..40 {
            bench.wait(ms(1000));
            bench.fail(1, FailureKind::Full);
            assert_eq!(bench.primary(), None, "{kept_open}");
        }
        assert_eq!(bench.ended(), [1], "{kept_open}: it was silent for longer than dead_after");
        assert!(bench.log.iter().any(|action| matches!(action, Action::AskIdle)), "an idle session is asked");
    }
}

/// If a patrol meets such a server, its answer does not hide the silence of the primary.
#[test]
fn a_full_server_is_no_answer_for_one_that_is_silent() {
    let mut bench = Bench::settled();
    bench.wait(ms(1000));
    bench.wait(ms(50));
    bench.answer(1, Err(failure(FailureKind::Full)), true, true);
    bench.answer(1, Err(failure(FailureKind::TimedOut)), false, true);
    assert_eq!(bench.primary(), None);
}

#[test]
fn a_server_that_answers_is_not_silent() {
    let mut bench = Bench::settled();
    bench.wait(ms(1000));
    bench.answer(1, Err(failure(FailureKind::NotNow)), true, false);
    for _ in 0..30 {
        bench.wait(ms(1000));
        bench.fail(1, FailureKind::NotNow);
    }
    assert!(bench.ended().is_empty(), "it is starting up, or full: its sessions may live");
}

#[test]
fn a_server_that_takes_no_new_session_keeps_the_old_ones() {
    let mut bench = Bench::settled();
    bench.wait(ms(1500));
    bench.suspect(1);
    bench.answer(1, Err(failure(FailureKind::NotNow)), true, true);
    assert_eq!(bench.primary(), Some(1), "a smart shutdown: what is open works");
    bench.wait(ms(1000));
    bench.answer(1, Ok(primary(1, 1)), false, true);
    assert_eq!(bench.primary(), Some(1));
}

#[test]
fn a_full_server_without_a_slot_for_the_heart_beat_is_no_loss() {
    let mut bench = Bench::settled();
    bench.wait(ms(1000));
    bench.answer(1, Err(failure(FailureKind::Full)), true, false);
    assert_eq!(bench.primary(), Some(1), "53300 on a session of its own: all slots may be the pool's");
}

#[test]
fn the_end_of_the_heartbeat_session_alone_is_no_loss() {
    // The session was closed, or an administrator ended it (57P01).
    for kind in [FailureKind::Unreachable, FailureKind::NotNow] {
        let mut bench = Bench::settled();
        bench.wait(ms(1000));
        bench.log.clear();
        bench.answer(1, Err(failure(kind)), false, false);
        assert_eq!(bench.primary(), Some(1), "{kind:?}");
        bench.wait(ms(20));
        assert!(bench.asked_freshly(1), "{kind:?}");
        bench.report(1, primary(1, 1));
        assert!(bench.ended().is_empty(), "{kind:?}");
    }
}

#[test]
fn time_in_which_a_full_server_answered_is_not_silence() {
    let mut bench = Bench::settled();
    for _ in 0..30 {
        bench.wait(ms(1000));
        bench.answer(1, Err(failure(FailureKind::Full)), true, false);
    }
    bench.wait(ms(1000));
    bench.answer(1, Err(failure(FailureKind::TimedOut)), true, false);
    bench.wait(ms(5000));
    assert!(bench.ended().is_empty(), "it was silent for six seconds");
}

#[test]
fn a_right_that_was_taken_away_is_no_proof_against_a_server() {
    let mut bench = Bench::settled();
    bench.wait(ms(1000));
    let anonymous = ServerReport { system_identifier: None, started_at: None, timeline: None, ..primary(1, 1) };
    bench.answer(1, Ok(anonymous), false, true);
    assert!(bench.ended().is_empty(), "its connections are good");
}
