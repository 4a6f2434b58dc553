//! Tests what the pool's sessions show if no session to the primary is kept, or if the primary is suspended.

use super::*;

impl Stage {
    /// Runs, and lets an idle session of the pool answer each question on it. Returns the number of questions.
    fn run_with_an_idle_session(&mut self, duration: Duration) -> usize {
        let (until, mut asked) = (self.bench.now + duration, 0);
        while self.bench.now < until {
            self.run(ms(10));
            let wanted = std::mem::take(&mut self.idle_asked);
            self.traffic.received = wanted > 0;
            asked += wanted;
        }
        asked
    }
}

/// The kept session has ended, new ones fail, and the connections checked out receive nothing, because their statements
/// take long. So the pool's idle sessions are asked, and their answers prove that the server lives.
#[test]
fn an_idle_session_speaks_for_a_server_that_takes_no_new_one() {
    for kind in KINDS {
        if kind == FailureKind::Full {
            continue;
        }
        let mut stage = Stage::new();
        stage.traffic = TrafficSample { in_use: true, moved: false, received: false, open: 3, idle_asked: false };
        stage.run(ms(10_000));
        (stage.kept, stage.new) = (false, Some(kind));
        let asked = stage.run_with_an_idle_session(ms(60_000));
        assert_eq!((stage.suspended_at, stage.ended_at), (None, None), "{kind:?}");
        // They are asked about as often as new sessions are tried.
        assert!((30..=600).contains(&asked), "{kind:?}: {asked} times");
        // No idle session answers any more.
        let died = stage.bench.now;
        stage.traffic.received = false;
        stage.run(ms(10_000));
        let after = stage.suspended_at.map(|at| at.duration_since(died));
        let usual = settings().heartbeat_timeout + settings().probe_timeout * 2;
        assert!(after.is_some_and(|after| after <= usual), "{kind:?}: {after:?}");
    }
}

/// As above, but nobody uses the pool. As long as an idle session answers, the primary is kept. Once its host has
/// frozen and new sessions hang, it is suspended.
#[test]
fn an_idle_session_that_does_not_answer_shows_that_the_primary_is_gone() {
    let mut stage = Stage::new();
    stage.traffic = TrafficSample { in_use: false, moved: false, received: false, open: 2, idle_asked: false };
    stage.run(ms(10_000));
    (stage.kept, stage.new) = (false, Some(FailureKind::TimedOut));
    stage.run_with_an_idle_session(ms(60_000));
    assert_eq!(stage.suspended_at, None);
    stage.traffic.received = false;
    let froze = stage.bench.now;
    // The next question is sent. While it has no answer, the pool sends no other one.
    while std::mem::take(&mut stage.idle_asked) == 0 {
        stage.run(ms(10));
    }
    stage.traffic.idle_asked = true;
    stage.run(ms(20_000));
    let settings = settings();
    let after = stage.suspended_at.map(|at| at.duration_since(froze)).expect("it is left");
    assert!(after <= settings.heartbeat_timeout * 2 + settings.heartbeat, "{after:?}");
}

/// The kept session ends just after an answer. A connection checked out was silent before that, but its silence counts
/// only from the answer on.
#[test]
fn a_loan_is_silent_only_since_the_primary_last_reported() {
    let mut stage = Stage::new();
    stage.traffic = TrafficSample { in_use: true, moved: false, received: false, open: 1, idle_asked: false };
    stage.run(ms(10_000));
    let ended = stage.bench.now;
    (stage.kept, stage.new) = (false, Some(FailureKind::Unreachable));
    stage.bench.topology.suspected(ended, GenerationId(1), Suspicion::Connection);
    stage.run(ms(10_000));
    let after = stage.suspended_at.map(|at| at.duration_since(ended)).unwrap();
    let settings = settings();
    assert!(after + settings.heartbeat >= settings.heartbeat_timeout, "{after:?}");
    assert!(after <= settings.heartbeat_timeout + ms(500), "{after:?}");
}

/// While a primary is suspended, the traffic of its connections checked out is sampled as often as before.
#[test]
fn a_suspended_primary_that_answers_is_resumed_at_once() {
    let mut bench = Bench::settled();
    bench.wait(ms(1000));
    let traffic = TrafficSample { in_use: true, open: 1, ..TrafficSample::default() };
    bench.topology.traffic(bench.now, traffic);
    bench.answer(1, Err(failure(FailureKind::TimedOut)), false, true);
    assert_eq!(bench.primary(), None);
    // All questions are under way, and none is answered.
    bench.wait(ms(600));
    for _ in 0..50 {
        let wake_at = bench.topology.wake_at().unwrap();
        assert!(wake_at <= bench.now + ms(25), "{:?}", wake_at.duration_since(bench.now));
        bench.now = bench.now.max(wake_at);
        bench.poll();
    }
    bench.now += ms(25);
    bench.topology.traffic(bench.now, TrafficSample { received: true, ..traffic });
    bench.poll();
    assert_eq!((bench.primary(), bench.ended()), (Some(1), vec![]));
}

/// One idle connection is dead without a sign, and its question is never answered, while others were. When the
/// primary's host freezes afterwards, it is left.
#[test]
fn a_question_that_is_never_answered_hides_no_later_silence() {
    for in_use in [false, true] {
        let mut stage = Stage::new();
        stage.traffic = TrafficSample { in_use, moved: false, received: false, open: 3, idle_asked: false };
        stage.run(ms(10_000));
        (stage.kept, stage.new) = (false, Some(FailureKind::TimedOut));
        stage.traffic.idle_asked = true;
        stage.run_with_an_idle_session(ms(60_000));
        assert_eq!(stage.suspended_at, None, "{in_use}");
        stage.traffic.received = false;
        let froze = stage.bench.now;
        stage.run(ms(20_000));
        let settings = settings();
        let after = stage.suspended_at.map(|at| at.duration_since(froze)).expect("it is left");
        assert!(after <= settings.heartbeat_timeout * 2 + settings.heartbeat, "{in_use}: {after:?}");
    }
}

/// The kept session is silent, new ones fail, and the primary is suspended: idle sessions are asked, and if one
/// answers, the primary is resumed.
#[test]
fn an_idle_session_speaks_for_a_suspended_primary() {
    for kind in KINDS {
        for kept in [true, false] {
            let mut bench = Bench::settled();
            let traffic = TrafficSample { open: 2, ..TrafficSample::default() };
            bench.topology.traffic(bench.now, traffic);
            bench.wait(ms(1000));
            bench.answer(1, Err(failure(FailureKind::TimedOut)), false, kept);
            assert_eq!(bench.primary(), None, "{kind:?}");
            bench.wait(ms(20));
            bench.fail(1, kind);
            bench.wait(settings().heartbeat);
            let asked = bench.log.iter().filter(|action| matches!(action, Action::AskIdle)).count();
            if bench.primary().is_none() {
                assert!((1..=10).contains(&asked), "{kind:?}: {asked} times");
            }
            bench.topology.traffic(bench.now, TrafficSample { received: true, idle_asked: true, ..traffic });
            bench.poll();
            assert_eq!(bench.primary(), Some(1), "{kind:?}");
            assert!(bench.ended().is_empty(), "{kind:?}");
        }
    }
}

/// The kept session is dead without a sign, and a new one resumes the primary. The last question on the dead one, from
/// the time of the suspension, ends after that: it is no new silence.
#[test]
fn a_question_from_before_the_resume_shows_no_silence() {
    let mut bench = Bench::settled();
    bench.wait(ms(1000));
    bench.answer(1, Err(failure(FailureKind::TimedOut)), false, true);
    assert_eq!(bench.primary(), None);
    bench.wait(ms(20));
    bench.report(1, primary(1, 1));
    assert_eq!(bench.primary(), Some(1));
    let result = Err(failure(FailureKind::TimedOut));
    let late = Probed { address: address(1), result, fresh: false, still_open: true, beside: true };
    bench.topology.probed(bench.now, &late);
    bench.poll();
    assert_eq!(bench.primary(), Some(1));
}

/// The primary's answer on its own session makes no sense: what its other sessions receive does not resume it, and they
/// are not asked.
#[test]
fn a_primary_that_makes_no_sense_is_not_resumed_by_traffic() {
    let mut bench = Bench::settled();
    let traffic = TrafficSample { open: 2, ..TrafficSample::default() };
    bench.topology.traffic(bench.now, traffic);
    bench.wait(ms(1000));
    bench.answer(1, Err(failure(FailureKind::NotPostgres)), false, true);
    assert_eq!(bench.primary(), None);
    let asked = bench.log.len();
    bench.wait(settings().heartbeat);
    assert!(!bench.log[asked..].iter().any(|action| matches!(action, Action::AskIdle)));
    bench.topology.traffic(bench.now, TrafficSample { received: true, ..traffic });
    bench.poll();
    assert_eq!(bench.primary(), None);
}

/// The server holds up the heartbeat's question for reasons of its own, such as a lock on a catalog, and nobody uses
/// the pool. Its idle sessions answer, so nothing is suspended, however long that lasts.
#[test]
fn idle_sessions_speak_for_a_server_that_holds_up_the_question() {
    let mut stage = Stage::new();
    stage.traffic = TrafficSample { open: 2, ..TrafficSample::default() };
    stage.run(ms(10_000));
    stage.silent = true;
    let asked = stage.run_with_an_idle_session(ms(60_000));
    assert_eq!((stage.suspended_at, stage.ended_at), (None, None));
    assert!((20..=150).contains(&asked), "{asked} times");
    // They fall silent, too.
    let froze = stage.bench.now;
    stage.traffic.received = false;
    stage.run(ms(10_000));
    let after = stage.suspended_at.map(|at| at.duration_since(froze)).expect("it is left");
    assert!(after <= settings().heartbeat_timeout * 2 + settings().heartbeat, "{after:?}");
}

/// No session is kept, new ones fail, and the server dies. Callers go on sending on one connection after the other,
/// which proves nothing: the idle sessions that were asked have no answer.
#[test]
fn callers_that_go_on_sending_hide_no_silence() {
    let mut stage = Stage::new();
    stage.traffic = TrafficSample { in_use: true, moved: true, received: false, open: 9, idle_asked: false };
    stage.run(ms(10_000));
    (stage.kept, stage.new) = (false, Some(FailureKind::Unreachable));
    stage.run_with_an_idle_session(ms(10_000));
    assert_eq!(stage.suspended_at, None);
    let died = stage.bench.now;
    (stage.traffic.received, stage.traffic.idle_asked) = (false, true);
    stage.run(ms(20_000));
    let after = stage.suspended_at.map(|at| at.duration_since(died)).expect("it is left");
    assert!(after <= settings().heartbeat_timeout * 2 + settings().heartbeat, "{after:?}");
}

/// As above, but the pool has no idle session that it could ask: the only connection is in use, and its caller goes on
/// sending. While answers come now and then, the primary is kept.
#[test]
fn a_caller_that_goes_on_sending_on_the_only_connection_hides_no_silence() {
    for kind in [FailureKind::Unreachable, FailureKind::TimedOut] {
        let mut stage = Stage::new();
        stage.traffic = TrafficSample { in_use: true, moved: true, received: false, open: 1, idle_asked: false };
        stage.run(ms(10_000));
        (stage.kept, stage.new) = (false, Some(kind));
        for _ in 0..20 {
            stage.run(settings().heartbeat_timeout * 9 / 10);
            stage.traffic.received = true;
            stage.look();
            stage.traffic.received = false;
        }
        assert_eq!(stage.suspended_at, None, "{kind:?}");
        let died = stage.bench.now;
        stage.run(ms(60_000));
        let settings = settings();
        let after = stage.suspended_at.map(|at| at.duration_since(died)).expect("it is left");
        assert!(after >= settings.heartbeat_timeout, "{kind:?}: {after:?}");
        assert!(after <= settings.heartbeat_timeout * 2 + settings.probe_timeout, "{kind:?}: {after:?}");
        let ended = stage.ended_at.map(|at| at.duration_since(died)).expect("its connections end");
        assert!(ended <= settings.dead_after + settings.heartbeat_timeout * 2, "{kind:?}: {ended:?}");
    }
}

/// What was sent before the primary last reported does not shorten the time that a later message has for its answer.
#[test]
fn a_message_from_before_the_last_report_does_not_count() {
    let mut stage = Stage::new();
    stage.traffic = TrafficSample { in_use: true, moved: true, received: false, open: 1, idle_asked: false };
    stage.run(ms(25));
    stage.traffic.moved = false;
    stage.run(ms(60_000));
    (stage.kept, stage.new) = (false, Some(FailureKind::Unreachable));
    stage.bench.topology.suspected(stage.bench.now, GenerationId(1), Suspicion::Connection);
    stage.run(settings().heartbeat_timeout / 2);
    stage.traffic.moved = true;
    let sent = stage.bench.now;
    stage.run(ms(10_000));
    let after = stage.suspended_at.map(|at| at.duration_since(sent)).expect("it is left");
    assert!(after >= settings().heartbeat_timeout, "{after:?}");
}

/// The heartbeat's question on the kept session has no answer, while callers are answered. The session may be dead
/// without a sign, and then no later question on it would show a fence. So a new session takes its place.
#[test]
fn a_kept_session_that_is_silent_is_replaced_while_others_are_answered() {
    let mut bench = Bench::settled();
    for _ in 0..3 {
        bench.wait(settings().heartbeat);
        assert!(bench.topology.members[&address(1)].asking, "the heartbeat");
        bench.log.clear();
        bench.work(settings().heartbeat_timeout, true);
        bench.answer(1, Err(failure(FailureKind::TimedOut)), false, true);
        assert_eq!(bench.primary(), Some(1));
        let opens = |action: &Action| matches!(action, Action::Probe { fresh: true, beside: true, .. });
        assert_eq!(bench.log.iter().filter(|action| opens(action)).count(), 1, "{:?}", bench.log);
        bench.answer(1, Ok(primary(1, 1)), true, true);
    }
    // The new session meets the fence that no other open session feels.
    bench.wait(settings().heartbeat);
    bench.work(settings().heartbeat_timeout, true);
    bench.answer(1, Err(failure(FailureKind::TimedOut)), false, true);
    bench.answer(1, Ok(fenced(1, 1)), true, true);
    assert_eq!((bench.primary(), bench.ended()), (None, vec![1]));
}
