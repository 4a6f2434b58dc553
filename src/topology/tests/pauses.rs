//! Time during which no server was asked proves nothing, for instance while the pool slept or the process was frozen.

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

fn policy() -> Settings {
    Settings { accept_new_cluster_after: Some(ms(30_000)), ..settings() }
}

/// A primary of another cluster, and an old primary of the pool's own.
fn claimants() -> [ServerReport; 2] {
    [ServerReport { system_identifier: Some(78), ..primary(2, 1) }, primary(22, 2)]
}

/// Server 1 is the primary of timeline 5, server 2 is its standby.
fn pair(settings: Settings) -> Bench {
    let mut bench = Bench::with(settings, 2);
    bench.report(2, standby(2));
    bench.report(1, primary(1, 5));
    assert_eq!(bench.primary(), Some(1));
    bench
}

/// A pool with one name, which leads to the primary of timeline 1.
fn by_name() -> Bench {
    let now = Instant::now();
    let mut bench = Bench { topology: Topology::new(settings(), Vec::new(), 1, 1, now), now, log: Vec::new() };
    bench.poll();
    bench.topology.resolved(bench.now, 0, named([endpoint(1)]));
    bench.poll();
    bench.report(1, primary(1, 1));
    assert_eq!(bench.primary(), Some(1));
    bench
}

impl Bench {
    /// Nobody needs a primary for this long. Then a caller wakes the pool.
    fn sleep(&mut self, duration: Duration) {
        self.topology.sleep(self.now, "asleep");
        let actions = self.topology.lie_down();
        self.log.extend(actions);
        self.now += duration;
        self.topology.wake(self.now);
        self.poll();
    }

    /// The process does not run for this long.
    fn freeze(&mut self, duration: Duration) {
        self.now += duration;
        self.poll();
    }

    /// The machine is suspended for this long: only the wall clock goes on.
    fn suspend_machine(&mut self, duration: Duration) {
        self.topology.wall_clock(self.now, HOUR);
        self.topology.wall_clock(self.now + ms(1), HOUR + ms(1) + duration);
        self.now += ms(1);
        self.poll();
    }

    /// The heartbeat's question times out. Its session stays open.
    fn times_out(&mut self) {
        self.answer(1, Err(failure(FailureKind::TimedOut)), false, true);
    }

    /// For this many seconds, the standby answers once a second, and the primary does not answer.
    fn search_on(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.report(2, standby(2));
            self.wait(ms(1000));
        }
    }

    /// For this long, server 2 reports that it is the primary, and server 1 gives no answer.
    fn claim(&mut self, claimant: &ServerReport, seconds: u64) {
        for _ in 0..seconds {
            self.report(2, claimant.clone());
            self.wait(ms(1000));
        }
    }
}

#[test]
fn another_cluster_is_followed_only_after_the_servers_were_asked_for_long_enough() {
    let frozen_beside_its_primary = || {
        let mut bench = pair(policy());
        bench.wait(ms(1000));
        bench.freeze(HOUR);
        bench.times_out();
        bench
    };
    let frozen_in_a_search = |claimant: &ServerReport| {
        let mut bench = pair(policy());
        bench.wait(ms(1000));
        bench.times_out();
        bench.claim(claimant, 5);
        bench.freeze(HOUR);
        bench
    };
    let asleep = || {
        let mut bench = pair(policy());
        bench.sleep(HOUR);
        bench
    };
    // This pool asks its primary once an hour.
    let rarely_asked = || {
        let mut bench = pair(Settings { heartbeat: HOUR, ..policy() });
        bench.wait(ms(1000));
        bench.report(1, primary(1, 5));
        bench.wait(HOUR);
        bench.times_out();
        bench
    };
    for claimant in claimants() {
        for (case, mut bench) in [
            ("asleep", asleep()),
            ("frozen beside its primary", frozen_beside_its_primary()),
            ("frozen in a search", frozen_in_a_search(&claimant)),
            ("rarely asked", rarely_asked()),
        ] {
            bench.claim(&claimant, 20);
            assert_eq!(bench.primary(), None, "{case}: {claimant:?}");
            bench.report(1, primary(11, 5));
            bench.wait(ms(600));
            assert_eq!(bench.primary(), Some(1), "{case}: the own cluster's primary comes back");
        }
        let mut bench = asleep();
        bench.claim(&claimant, 32);
        assert_eq!(bench.primary(), Some(2), "the time is over: {claimant:?}");
    }
}

/// On a busy machine, polls come late. That does not count as a frozen process.
#[test]
fn a_late_poll_does_not_put_off_the_policy() {
    let [stranger, _] = claimants();
    let mut bench = pair(policy());
    bench.wait(ms(1000));
    bench.times_out();
    for _ in 0..70 {
        bench.report(2, stranger.clone());
        bench.now += ms(500);
        bench.poll();
    }
    assert_eq!(bench.primary(), Some(2));
}

#[test]
fn connections_do_not_end_because_the_process_was_frozen() {
    for frozen in [ms(60_000), HOUR] {
        let mut bench = Bench::settled();
        bench.wait(ms(1000));
        bench.freeze(frozen);
        bench.times_out();
        assert_eq!((bench.primary(), bench.ended()), (None, vec![]));
        bench.wait(ms(10_000));
        assert!(bench.ended().is_empty(), "it has had ten seconds to answer");
        bench.wait(ms(10_000));
        assert_eq!(bench.ended(), [1]);
        // The process freezes while the primary is suspended.
        let mut bench = Bench::settled();
        bench.wait(ms(1000));
        bench.times_out();
        bench.wait(ms(1000));
        bench.freeze(frozen);
        assert!(bench.ended().is_empty());
        bench.report(1, primary(1, 1));
        assert_eq!((bench.primary(), bench.ended()), (Some(1), vec![]));
    }
}

/// If a primary is asked once an hour and a question has no answer, it was silent for as long as the question took, not
/// for an hour.
#[test]
fn a_primary_that_is_rarely_asked_is_not_silent_meanwhile() {
    let mut bench = pair(Settings { heartbeat: HOUR, ..settings() });
    bench.wait(ms(1000));
    bench.answer(1, Ok(primary(1, 5)), false, true);
    bench.wait(HOUR);
    bench.times_out();
    bench.wait(ms(10_000));
    assert!(bench.ended().is_empty());
    bench.wait(ms(10_000));
    assert_eq!(bench.ended(), [1]);
}

#[test]
fn a_rival_cluster_is_remembered_while_the_process_is_frozen() {
    let mut bench = Bench::new(2);
    bench.report(1, primary(1, 1));
    bench.report(2, ServerReport { system_identifier: Some(78), ..primary(2, 1) });
    bench.wait(ms(5000));
    bench.freeze(ms(60_000));
    for _ in 0..10 {
        bench.report(1, primary(1, 1));
        bench.wait(ms(1000));
        assert_eq!(bench.primary(), None, "the other one has had no time to answer");
    }
}

#[test]
fn credentials_are_not_refused_for_long_because_the_process_was_frozen() {
    let mut bench = Bench::searching();
    let refuse = |bench: &mut Bench| (1..=3).for_each(|n| bench.fail(n, FailureKind::Refused));
    refuse(&mut bench);
    bench.freeze(HOUR);
    assert!(!bench.refused());
    refuse(&mut bench);
    assert!(!bench.refused());
}

/// The primary's name may lead to another address by now. So, as in the first search, an old primary at the old address
/// is not accepted before DNS has answered.
#[test]
fn a_search_that_knows_no_timeline_waits_for_its_names() {
    let woken = || {
        let mut bench = by_name();
        bench.sleep(HOUR);
        bench
    };
    let forgotten = |accepted| {
        move || {
            let mut bench = by_name();
            bench.topology.accept(bench.now, Accept::Cluster(78));
            bench.topology.accept(bench.now, accepted);
            bench.poll();
            bench
        }
    };
    // A look-up of a patrol is under way.
    let in_a_look_up = || {
        let mut bench = by_name();
        bench.wait(ms(5000));
        bench.topology.accept(bench.now, Accept::Any);
        bench.poll();
        bench
    };
    let frozen = || {
        let mut bench = by_name();
        bench.wait(ms(1000));
        bench.freeze(HOUR);
        bench.answer(1, Err(failure(FailureKind::Unreachable)), false, false);
        bench.answer(1, Err(failure(FailureKind::Unreachable)), true, false);
        assert_eq!(bench.primary(), None);
        bench
    };
    let suspended = || {
        let mut bench = by_name();
        bench.wait(ms(1000));
        bench.suspend_machine(HOUR);
        bench.answer(1, Err(failure(FailureKind::Unreachable)), false, false);
        bench.answer(1, Err(failure(FailureKind::Unreachable)), true, false);
        assert_eq!(bench.primary(), None);
        bench
    };
    let cases: [(&str, &dyn Fn() -> Bench); 6] = [
        ("woken", &woken),
        ("its cluster was forgotten", &forgotten(Accept::Any)),
        ("another state of its cluster was accepted", &forgotten(Accept::Cluster(77))),
        ("forgotten during a look-up", &in_a_look_up),
        ("frozen", &frozen),
        ("the machine was suspended", &suspended),
    ];
    for (case, start) in cases {
        // The server was restarted meanwhile, so it is not in the life in which the generation began.
        let old = primary(11, 1);
        let mut bench = start();
        bench.now += ms(5);
        bench.report(1, old.clone());
        assert_eq!(bench.primary(), None, "{case}: DNS may lead to another primary");
        bench.topology.resolved(bench.now, 0, named([endpoint(2)]));
        bench.poll();
        assert_eq!(bench.primary(), None, "{case}: and does");
        bench.report(2, primary(2, 2));
        assert_eq!(bench.primary(), Some(2), "{case}");

        let mut bench = start();
        bench.now += ms(5);
        bench.report(1, old.clone());
        bench.topology.resolved(bench.now, 0, named([endpoint(1)]));
        bench.poll();
        assert_eq!(bench.primary(), Some(1), "{case}: DNS leads to it");

        let mut bench = start();
        bench.now += ms(5);
        bench.report(1, old);
        bench.wait(FIRST_GRACE.1);
        assert_eq!(bench.primary(), Some(1), "{case}: a silent name delays it by the grace at most");
    }
}

/// What the pool knows is outdated only until the servers have been asked again.
#[test]
fn some_time_after_a_freeze_a_promotion_is_believed_at_once() {
    let mut bench = Bench::settled();
    bench.freeze(HOUR);
    bench.report(1, primary(1, 1));
    bench.wait(ms(6000));
    bench.report(1, primary(1, 1));
    bench.wait(ms(1000));
    bench.answer(1, Err(failure(FailureKind::Unreachable)), true, false);
    bench.wait(ms(30));
    bench.report(2, primary(2, 2));
    assert_eq!(bench.primary(), Some(2));
}

/// DNS is often late after a failover. So a member that it does not name is still asked, even after a long sleep.
#[test]
fn a_member_that_dns_does_not_name_is_remembered_through_a_sleep() {
    let asleep = |bench: &mut Bench| bench.sleep(HOUR);
    let frozen = |bench: &mut Bench| bench.freeze(HOUR);
    let pauses: [&dyn Fn(&mut Bench); 2] = [&asleep, &frozen];
    for pause in pauses {
        let mut bench = by_name();
        bench.topology.resolved(bench.now, 0, named([endpoint(1), endpoint(2)]));
        bench.poll();
        bench.report(2, standby(2));
        pause(&mut bench);
        bench.topology.resolved(bench.now, 0, named([endpoint(1)]));
        bench.poll();
        assert_eq!(bench.topology.candidates().len(), 2);
    }
}

/// A process that stands still again and again still finds out that its primary is dead: the lost time is added to the
/// limit, but the limit does not start anew.
#[test]
fn stalls_put_off_a_limit_by_what_they_take() {
    let mut bench = Bench::settled();
    bench.wait(ms(1000));
    bench.times_out();
    for stall in 0..4 {
        assert!(bench.ended().is_empty(), "stall {stall}");
        bench.search_on(4);
        bench.report(2, standby(2));
        bench.freeze(ms(15_000));
    }
    bench.search_on(1);
    assert!(bench.ended().is_empty(), "it has been asked for less than twenty seconds");
    bench.search_on(4);
    assert_eq!(bench.ended(), [1]);
}

/// The other limits do the same: the policy, and the patience with credentials.
#[test]
fn stalls_put_off_no_limit_for_ever() {
    let [stranger, _] = claimants();
    let mut bench = pair(policy());
    bench.wait(ms(1000));
    bench.times_out();
    for _ in 0..20 {
        bench.claim(&stranger, 3);
        bench.report(2, stranger.clone());
        bench.freeze(ms(15_000));
    }
    assert_eq!(bench.primary(), Some(2), "the other cluster is followed");

    let mut bench = Bench::searching();
    for _ in 0..20 {
        for _ in 0..4 {
            (1..=3).for_each(|n| bench.fail(n, FailureKind::Refused));
            bench.wait(ms(900));
        }
        bench.freeze(ms(15_000));
    }
    (1..=3).for_each(|n| bench.fail(n, FailureKind::Refused));
    assert!(bench.refused());
}

/// An application is used for a minute at a time, and its servers get new addresses with each deployment. Each address
/// that DNS no longer names is remembered for ten minutes of use, however often the pool sleeps in between.
#[test]
fn what_dns_dropped_is_forgotten_by_a_pool_that_sleeps_often() {
    for (used, phases) in [(60_000, 10), (10_000, 60)] {
        let mut bench = by_name();
        bench.topology.resolved(bench.now, 0, named([endpoint(1), endpoint(2)]));
        bench.poll();
        bench.report(2, standby(2));
        let mut gone_after = None;
        for phase in 1..=phases * 2 {
            bench.sleep(HOUR);
            bench.topology.resolved(bench.now, 0, named([endpoint(1)]));
            bench.poll();
            if bench.topology.candidates().len() == 1 {
                gone_after = gone_after.or(Some(phase));
            }
            for _ in 0..used / 5000 {
                bench.report(1, primary(1, 1));
                bench.fail(2, FailureKind::Unreachable);
                bench.wait(ms(5000));
            }
        }
        let gone_after = gone_after.expect("it is remembered for ever");
        assert!((phases..=phases * 5 / 4 + 1).contains(&gone_after), "{gone_after} of {phases}");
    }
}

/// For the last pauses, the lost time is counted exactly, and for earlier ones on average.
#[test]
fn lost_time_is_added_to_what_began_before_it() {
    let start = Instant::now();
    let at = |seconds: u64| start + ms(seconds * 1000);
    let mut unasked = unasked::Unasked::new(start);
    for pause in 0..100 {
        // Ten seconds awake, ninety lost.
        unasked.begin(at(pause * 100 + 10));
        unasked.end(at(pause * 100 + 100));
    }
    let lost = |seconds: u64| unasked.counts_from(at(seconds)).duration_since(at(seconds)).as_secs();
    assert_eq!(lost(0), 9000);
    assert_eq!((lost(9900), lost(9909), lost(9955), lost(10_000)), (90, 90, 45, 0));
    assert_eq!(lost(9899), 91, "a moment before the end of the last pause but one");
    for seconds in (0..8500).step_by(50) {
        let exact = 9000 - seconds * 9 / 10;
        assert!(lost(seconds).abs_diff(exact) <= 90, "{seconds}: {} and not {exact}", lost(seconds));
    }
}

/// If somebody sets the wall clock, that only costs some questions.
#[test]
fn a_clock_that_is_set_does_no_harm() {
    let mut bench = by_name();
    bench.wait(ms(100));
    bench.report(1, primary(1, 1));
    let (id, mut wall) = (bench.topology.view().generation, HOUR * 1000);
    bench.topology.wall_clock(bench.now, wall);
    for step in [HOUR, ms(2000), ms(500)] {
        for forward in [true, false, true] {
            wall = if forward { wall + step } else { wall.checked_sub(step).unwrap() };
            bench.log.clear();
            bench.topology.wall_clock(bench.now, wall);
            bench.poll();
            bench.wait(ms(100));
            let asked = bench.log.iter().filter(|action| matches!(action, Action::Resolve(_))).count();
            assert_eq!(asked, usize::from(forward && step > ms(1000)), "{step:?} {forward}: DNS is asked once");
            assert!(bench.asked(1) <= 2, "{step:?} {forward}");
            wall += ms(100);
            bench.topology.wall_clock(bench.now, wall);
            bench.report(1, primary(1, 1));
            bench.topology.resolved(bench.now, 0, named([endpoint(1)]));
            bench.poll();
            assert_eq!((bench.primary(), bench.ended()), (Some(1), vec![]));
        }
    }
    assert_eq!(bench.topology.view().generation, id);
}
