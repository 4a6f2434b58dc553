//! The search for a primary: which servers it asks, how often, and when it accepts an answer.

use super::*;

#[test]
fn the_first_search_waits_a_moment_for_an_objection() {
    let mut bench = Bench::new(2);
    bench.now += ms(4);
    bench.report(1, primary(1, 1));
    assert_eq!(bench.primary(), None, "the other may be on a newer timeline");
    bench.report(2, primary(2, 2));
    assert_eq!(bench.primary(), Some(2));
}

/// The answers that came while the process stood still are read before a server is accepted.
#[test]
fn a_stall_takes_nothing_from_the_time_to_object() {
    for stall in [ms(120), ms(700), ms(5000)] {
        for objects in [true, false] {
            let mut bench = Bench::new(2);
            bench.report(1, primary(1, 1));
            bench.now += stall;
            bench.poll();
            assert_eq!(bench.primary(), None, "{stall:?}: the other answer may be there");
            if objects {
                bench.report(2, primary(2, 2));
                assert_eq!(bench.primary(), Some(2), "{stall:?}");
            } else {
                bench.wait(GRACE.0);
                assert_eq!(bench.primary(), Some(1), "{stall:?}: a silent one is waited for no longer");
            }
        }
    }
}

/// On a machine that is late each time, a silent candidate delays the decision by no more than usual.
#[test]
fn a_machine_that_is_always_late_decides_all_the_same() {
    let mut bench = Bench::new(2);
    bench.report(1, primary(1, 1));
    let began = bench.now;
    while bench.primary().is_none() && bench.now < began + ms(2000) {
        bench.now = bench.topology.wake_at().map_or(bench.now, |at| at.max(bench.now)) + ms(15);
        bench.poll();
    }
    let took = bench.now.duration_since(began);
    assert!(took <= FIRST_GRACE.1 + ms(60), "{took:?}");
}

#[test]
fn a_silent_candidate_delays_the_first_search_by_the_grace_at_most() {
    let mut bench = Bench::new(2);
    bench.now += ms(4);
    bench.report(1, primary(1, 1));
    bench.wait(FIRST_GRACE.0);
    assert_eq!(bench.primary(), Some(1));
}

#[test]
fn a_promotion_is_believed_at_once() {
    let mut bench = Bench::searching();
    assert_eq!(bench.primary(), None);
    assert!(bench.ended().is_empty(), "a dead primary is no proof of a new one");
    bench.wait(ms(30));
    // Servers 1 and 3 have not answered since. But timeline 2 proves a promotion.
    bench.report(2, primary(2, 2));
    assert_eq!(bench.primary(), Some(2));
    assert_eq!(bench.ended(), [1]);
}

#[test]
fn refused_credentials_are_told_at_once() {
    let mut bench = Bench::new(3);
    bench.fail(1, FailureKind::Unreachable);
    bench.fail(2, FailureKind::Refused);
    assert!(!bench.refused(), "the third may take them");
    bench.fail(3, FailureKind::Refused);
    assert!(bench.refused());
}

#[test]
fn one_server_that_refuses_does_not_speak_for_a_dead_primary() {
    let mut bench = Bench::searching();
    bench.wait(ms(50));
    bench.fail(2, FailureKind::Refused);
    bench.fail(3, FailureKind::Refused);
    assert!(!bench.refused(), "the credentials were good a moment ago, and the primary may come back");
    bench.wait(ms(50));
    bench.fail(1, FailureKind::Refused);
    assert!(!bench.refused(), "a promoted server's role or pg_hba.conf may come later");
}

#[test]
fn a_refusal_is_taken_back() {
    let mut bench = Bench::new(1);
    bench.fail(1, FailureKind::Refused);
    assert!(bench.refused());
    bench.log.clear();
    bench.wait(ms(900));
    assert_eq!(bench.asked(1), 0, "not hammered");
    bench.topology.demanded(bench.now);
    bench.poll();
    assert_eq!(bench.asked(1), 1);
    bench.report(1, primary(1, 1));
    assert_eq!(bench.primary(), Some(1));
}

#[test]
fn a_search_asks_each_server_once_per_interval() {
    let mut bench = Bench::searching();
    bench.log.clear();
    let steps = 500;
    for _ in 0..steps {
        bench.wait(ms(2));
        for n in 1..=3 {
            if bench.topology.members[&address(n)].asking {
                bench.fail(n, FailureKind::Unreachable);
            }
        }
    }
    for n in 1..=3 {
        // 1000 ms at 20 ms ± 25 %
        assert!((30..=67).contains(&bench.asked(n)), "server {n} was asked {} times", bench.asked(n));
    }
}

#[test]
fn a_search_slows_down_with_the_outage() {
    let bench = Bench::settled();
    assert_eq!(bench.topology.poll_pause(ms(500)), ms(20));
    assert_eq!(bench.topology.poll_pause(ms(10_000)), ms(100));
    assert_eq!(bench.topology.poll_pause(Duration::from_secs(3600)), ms(250));
}

#[test]
fn a_member_that_dns_forgot_is_still_asked() {
    let now = Instant::now();
    let mut topology = Topology::new(settings(), Vec::new(), 1, 1, now);
    topology.resolved(now, 0, named((1..=4).map(endpoint)));
    topology.poll(now);
    let probed = |n: u8, result| Probed { address: address(n), result, fresh: true, still_open: true, beside: false };
    topology.probed(now, &probed(2, Ok(standby(2))));
    topology.probed(now, &probed(1, Ok(primary(1, 1))));
    topology.poll(now + ms(200));
    topology.poll(now + ms(200) + GRACE.0);
    topology.probed(now, &probed(2, Ok(standby(2))));
    topology.resolved(now + ms(5000), 0, named([endpoint(1)]));
    let known: Vec<_> = topology.candidates().into_iter().map(|candidate| candidate.endpoint.address).collect();
    assert_eq!(known, [address(1), address(2)], "3 and 4 never proved to be members");
    topology.resolved(now + ms(10_000), 0, NameAnswer::Failed("SERVFAIL".to_owned()));
    assert_eq!(topology.candidates().len(), 2, "a failed look-up forgets nobody");
}

#[test]
fn the_server_of_an_open_session_waits_for_its_promotion() {
    for warm in [false, true] {
        let mut bench = Bench::settled();
        assert!(!bench.topology.keeps(&address(2)), "without warm sessions a patrol opens one, and closes it");
        bench.topology.settings.warm_standbys = warm;
        assert_eq!(bench.topology.keeps(&address(2)), warm);
        bench.suspect(1);
        bench.wait(ms(20));
        bench.fail(1, FailureKind::Unreachable);
        assert!(bench.topology.keeps(&address(2)), "it survives the promotion");
        // The first question of a search asks for a report, without a promotion wait.
        bench.wait(ms(1));
        assert_eq!(bench.promotion_waits(2), [None]);
        bench.answer(2, Ok(standby(2)), false, true);
        bench.wait(ms(2));
        for _ in 0..4 {
            bench.wait(ms(50));
            bench.answer(2, Ok(standby(2)), false, true);
        }
        let promotion_wait = Some(PromotionWait { lasts: ms(50), step: ms(2) });
        assert_eq!(
            bench.promotion_waits(2),
            [None, promotion_wait, promotion_wait, promotion_wait, promotion_wait, promotion_wait]
        );
        assert!(bench.asked(1) <= 7, "a new session each, asked {} times", bench.asked(1));
    }
}

#[test]
fn a_long_search_has_a_promotion_wait_that_looks_less_often() {
    let mut bench = Bench::searching();
    bench.answer(2, Ok(standby(2)), false, true);
    for _ in 0..120 {
        bench.wait(ms(250));
        bench.log.clear();
        bench.answer(2, Ok(standby(2)), true, true);
    }
    for _ in 0..20 {
        if bench.promotion_waits(2).is_empty() {
            bench.wait(ms(25));
        }
    }
    assert_eq!(bench.promotion_waits(2), [Some(PromotionWait { lasts: ms(250), step: ms(25) })]);
}

#[test]
fn many_dead_addresses_are_each_asked_less_often() {
    let asked_in_a_second = |members: u8| {
        let mut bench = Bench::new(members);
        bench.log.clear();
        for _ in 0..100 {
            for member in 1..=members {
                if bench.topology.members[&address(member)].asking {
                    bench.fail(member, FailureKind::Unreachable);
                }
            }
            bench.wait(ms(10));
        }
        (1..=members).map(|member| bench.asked(member)).sum::<usize>()
    };
    let (few, many) = (asked_in_a_second(3), asked_in_a_second(60));
    assert!(many < few * 6, "{few} questions a second to three, {many} to sixty");
}

#[test]
fn a_standby_that_refuses_to_wait_is_asked_with_a_pause() {
    let mut bench = Bench::searching();
    bench.log.clear();
    for _ in 0..600 {
        bench.wait(ms(1));
        if bench.topology.members[&address(2)].asking {
            bench.answer(2, Ok(standby(2)), false, true);
        }
    }
    assert!((10..=40).contains(&bench.asked(2)), "asked {} times in 600 ms", bench.asked(2));
}

/// The duration of a promotion wait says nothing about how fast the server answers.
#[test]
fn a_promotion_wait_is_not_held_against_the_server() {
    let mut bench = Bench::searching();
    bench.wait(ms(1));
    bench.answer(2, Ok(standby(2)), false, true);
    let took = bench.topology.members[&address(2)].took;
    bench.wait(ms(50));
    bench.answer(2, Ok(standby(2)), false, true);
    assert_eq!(bench.topology.members[&address(2)].took, took);
}

/// The session is asked first even if it is old, because it was kept to see its server's promotion.
#[test]
fn a_warm_session_is_asked_first_and_renewed_a_second_later() {
    let mut bench = Bench::settled();
    bench.topology.settings.warm_standbys = true;
    bench.wait(10 * RENEWED_AFTER);
    bench.fail(1, FailureKind::Unreachable);
    let mut fresh = Vec::new();
    while fresh.last() != Some(&true) {
        bench.log.clear();
        bench.answer(2, Ok(standby(2)), false, true);
        bench.wait(ms(250));
        fresh.extend(bench.log.iter().filter_map(|action| match action {
            Action::Probe { endpoint, fresh, .. } if endpoint.address == address(2) => Some(*fresh),
            _ => None,
        }));
        assert!(fresh.len() < 100, "the address may be a proxy's, which leads a new session elsewhere");
    }
    assert!(fresh.len() > 1, "the first question of the search came on a new session");
}

/// If a standby has no slot for another session, the pool keeps the open one.
#[test]
fn a_session_to_a_standby_is_not_given_up_for_one_that_cannot_be_had() {
    for (kind, kept) in [(FailureKind::Full, true), (FailureKind::TimedOut, true), (FailureKind::Unreachable, false)] {
        let mut bench = Bench::settled();
        bench.wait(ms(100));
        bench.fail(1, FailureKind::Unreachable);
        bench.answer(2, Ok(standby(2)), true, true);
        bench.wait(2 * RENEWED_AFTER);
        bench.log.clear();
        bench.answer(2, Ok(standby(2)), false, true);
        bench.wait(ms(250));
        let asked_fresh = |bench: &Bench| {
            bench.log.iter().rev().find_map(|action| match action {
                Action::Probe { endpoint, fresh, .. } if endpoint.address == address(2) => Some(*fresh),
                _ => None,
            })
        };
        assert_eq!(asked_fresh(&bench), Some(true), "the test needs a renewal");
        bench.log.clear();
        bench.answer(2, Err(failure(kind)), true, true);
        assert_eq!(bench.topology.keeps(&address(2)), kept, "{kind:?}");
        bench.wait(ms(250));
        if kept {
            assert_eq!(asked_fresh(&bench), Some(false), "{kind:?}");
            bench.answer(2, Ok(primary(2, 2)), false, true);
            assert_eq!(bench.primary(), Some(2), "{kind:?}");
        }
    }
}

#[test]
fn the_primary_that_is_searched_for_is_not_forgotten() {
    let now = Instant::now();
    let mut topology = Topology::new(settings(), Vec::new(), 1, 1, now);
    topology.resolved(now, 0, named([endpoint(1)]));
    topology.poll(now);
    let probed = |result| Probed { address: address(1), result, fresh: false, still_open: true, beside: false };
    topology.probed(now, &probed(Ok(primary(1, 1))));
    // DNS has named only another server for longer than members are remembered. Then one heartbeat is late.
    let later = now + 2 * REMEMBER;
    topology.poll(later);
    topology.probed(later, &probed(Err(failure(FailureKind::TimedOut))));
    topology.resolved(later, 0, named([endpoint(2)]));
    let known: Vec<_> = topology.candidates().into_iter().map(|candidate| candidate.endpoint.address).collect();
    assert_eq!(known, [address(1), address(2)]);
}

#[test]
fn a_long_search_is_said_once() {
    let mut bench = Bench::new(1);
    bench.fail(1, FailureKind::Unreachable);
    bench.log.clear();
    for _ in 0..100 {
        bench.wait(ms(100));
        bench.fail(1, FailureKind::Unreachable);
    }
    let said = |action: &&Action| matches!(action, Action::Notice(Notice::StillSearching(_)));
    assert_eq!(bench.log.iter().filter(said).count(), 1);
}

#[test]
fn a_thousand_addresses_are_not_all_probed() {
    let now = Instant::now();
    let mut topology = Topology::new(settings(), Vec::new(), 1, 1, now);
    let many = (0..1000_u16).map(|n| {
        let [high, low] = n.to_be_bytes();
        let address = Address::Tcp(SocketAddr::from(([127, 1, high, low], 5432)));
        Endpoint { host: None, address }
    });
    topology.resolved(now, 0, named(many));
    let probes = topology.poll(now).iter().filter(|action| matches!(action, Action::Probe { .. })).count();
    assert_eq!(probes, MAX_MEMBERS);
}
