//! One server with two addresses, and a server that is far away.

use super::*;

/// Server 1 is the primary, and answers at address 2, too. Returns the number of new sessions to each of the addresses
/// 1 to 3 in thirty seconds. `third`: what server 3 reports, if there is one.
fn new_sessions(warm_standbys: bool, third: Option<&ServerReport>) -> [usize; 3] {
    let members = if third.is_some() { 3 } else { 2 };
    let mut bench = Bench::with(Settings { warm_standbys, ..settings() }, members);
    bench.report(1, primary(1, 1));
    bench.report(2, primary(1, 1));
    if let Some(report) = third {
        bench.report(3, report.clone());
    }
    assert_eq!(bench.primary(), Some(1));
    bench.log.clear();
    let mut opened = [0; 3];
    for _ in 0..3000 {
        bench.wait(ms(10));
        for action in std::mem::take(&mut bench.log) {
            let Action::Probe { endpoint, fresh, beside, .. } = action else { continue };
            let n = (1..=3).find(|n| address(*n) == endpoint.address).unwrap();
            let kept = bench.topology.keeps(&endpoint.address);
            let fresh = fresh || !kept;
            opened[usize::from(n) - 1] += usize::from(fresh);
            let report = if n == 3 { third.unwrap().clone() } else { primary(1, 1) };
            let probed =
                Probed { address: endpoint.address, result: Ok(report), fresh, still_open: kept || fresh, beside };
            bench.topology.probed(bench.now, &probed);
        }
    }
    assert_eq!(bench.primary(), Some(1));
    opened
}

#[test]
fn the_session_to_a_second_address_of_the_primary_is_kept() {
    assert_eq!(new_sessions(true, Some(&standby(3))), [0, 0, 0]);
    // No other server is in sight, so there may be a proxy at either address. Each patrol opens a session to one of
    // them.
    let [first, second, _] = new_sessions(true, None);
    assert!((2..=4).contains(&first) && (2..=4).contains(&second), "{first} {second}");
    // Without warm sessions, each patrol opens a session to each address except the primary's own.
    let [_, second, third] = new_sessions(false, Some(&standby(3)));
    assert!((6..=12).contains(&second) && (6..=12).contains(&third), "{second} {third}");
}

/// If a new session shows another server behind the same address, it is not kept.
#[test]
fn another_server_at_the_second_address_is_seen_on_a_new_session() {
    let mut bench = Bench::with(Settings { warm_standbys: true, ..settings() }, 2);
    bench.report(1, primary(1, 1));
    bench.report(2, primary(1, 1));
    assert!(bench.topology.keeps(&address(2)));
    bench.wait(ms(5000));
    bench.fail(2, FailureKind::TimedOut);
    assert!(!bench.topology.keeps(&address(2)));
    bench.wait(ms(5000));
    bench.report(2, primary(9, 1));
    assert!(!bench.topology.keeps(&address(2)), "another server");
    bench.wait(ms(5000));
    bench.report(2, primary(9, 2));
    assert_eq!(bench.primary(), Some(2));
}

/// Returns how many times a standby is asked in half a minute, if each answer takes this long.
fn asked_beside(round_trip: Duration) -> usize {
    let mut bench = Bench::settled();
    for _ in 0..3000 {
        bench.wait(ms(10));
        let due = |bench: &Bench, n| {
            let member = &bench.topology.members[&address(n)];
            member.asking && member.asked_at.is_some_and(|at| bench.now >= at + round_trip)
        };
        for n in [2, 3] {
            if due(&bench, n) {
                bench.report(n, standby(n));
            }
        }
        if due(&bench, 1) {
            bench.answer(1, Ok(primary(1, 1)), false, true);
        }
    }
    assert_eq!(bench.primary(), Some(1));
    bench.asked(2)
}

#[test]
fn a_long_round_trip_is_no_reason_to_be_uneasy() {
    for round_trip in [ms(1), ms(200), ms(300), ms(600)] {
        let asked = asked_beside(round_trip);
        assert!((5..=14).contains(&asked), "{round_trip:?}: {asked}");
    }
}

/// One slow answer does not make the pool wait longer for the next one.
#[test]
fn a_frozen_host_is_noticed_as_soon_as_usual_after_one_slow_answer() {
    let mut bench = Bench::settled();
    for took in [ms(1), ms(1), ms(900)] {
        while !bench.topology.members[&address(1)].asking {
            bench.wait(ms(10));
        }
        bench.now += took;
        bench.answer(1, Ok(primary(1, 1)), false, true);
    }
    while !bench.topology.members[&address(1)].asking {
        bench.wait(ms(10));
    }
    bench.log.clear();
    bench.report(2, standby(2));
    bench.wait(ms(300));
    assert!(bench.asked(2) > 0, "the others are asked for a successor");
}

/// Two servers behind one address are writable on one timeline. A new session reaches the other one. As long as the
/// session to the primary is open, it decides: the primary stays, and the operator is told once that there is a second
/// one.
#[test]
fn a_second_writable_server_behind_the_address_of_the_primary_takes_nobodys_place() {
    let told = |bench: &Bench| {
        let seconds = |action: &&Action| matches!(action, Action::Notice(Notice::TwoPrimaries(_)));
        bench.log.iter().filter(seconds).count()
    };
    let mut bench = Bench::new(1);
    bench.report(1, primary(1, 1));
    for _ in 0..5 {
        bench.wait(ms(5000));
        if bench.topology.members[&address(1)].asking {
            bench.answer(1, Ok(primary(1, 1)), false, true);
        }
        bench.answer(1, Ok(primary(9, 1)), true, true);
        assert!(bench.topology.members[&address(1)].asking, "the session to the primary is asked at once");
        bench.answer(1, Ok(primary(1, 1)), false, true);
        assert_eq!((bench.primary(), bench.ended()), (Some(1), vec![]));
    }
    assert_eq!(told(&bench), 1);
    // The session to the primary ends, because the server has been restarted, or has given way to the other one.
    bench.wait(ms(5000));
    bench.answer(1, Ok(primary(9, 1)), true, true);
    bench.answer(1, Err(failure(FailureKind::Unreachable)), false, false);
    assert!(bench.ended().is_empty());
    bench.answer(1, Ok(primary(9, 1)), true, false);
    assert_eq!((bench.primary(), bench.ended()), (Some(1), vec![1]));
    // A server on a newer timeline takes its place at once.
    bench.wait(ms(5000));
    bench.answer(1, Ok(primary(7, 2)), true, true);
    assert_eq!(bench.ended(), [1, 2]);
}

/// Two names lead to one address, and the server's certificate is for the second one. So the second one is tried at
/// once, before callers are told that the certificate does not fit.
#[test]
fn each_name_of_an_address_is_tried_if_the_certificate_does_not_fit() {
    let by = |host: &str| Endpoint { host: Some(Arc::from(host)), address: address(1) };
    let bench = |names: &[&str]| {
        let (now, endpoints) = (Instant::now(), names.iter().map(|name| by(name)).collect());
        let mut bench = Bench { topology: Topology::new(settings(), endpoints, 0, 1, now), now, log: Vec::new() };
        bench.poll();
        bench
    };
    let asked_by = |bench: &Bench| {
        bench.log.iter().rev().find_map(|action| match action {
            Action::Probe { endpoint, .. } => endpoint.host.as_deref().map(ToOwned::to_owned),
            _ => None,
        })
    };
    let wrong = || Err(failure(FailureKind::Refused).of_a_wrong_name());
    let mut two = bench(&["a.internal", "b.internal", "a.internal"]);
    assert_eq!(asked_by(&two).as_deref(), Some("a.internal"));
    two.answer(1, wrong(), true, false);
    assert!(!two.refused(), "there is another name");
    two.wait(ms(30));
    assert_eq!(asked_by(&two).as_deref(), Some("b.internal"));
    two.report(1, primary(1, 1));
    let State::Primary { endpoint, .. } = two.topology.view().state else { panic!("it is not found") };
    assert_eq!(endpoint.host.as_deref(), Some("b.internal"));
    // None fits.
    let mut two = bench(&["a.internal", "b.internal"]);
    two.answer(1, wrong(), true, false);
    two.wait(ms(30));
    two.answer(1, wrong(), true, false);
    assert!(two.refused());
    two.wait(ms(2000));
    assert_eq!(asked_by(&two).as_deref(), Some("a.internal"), "they take turns");
    // The password is the same by each name.
    let mut two = bench(&["a.internal", "b.internal"]);
    two.fail(1, FailureKind::Refused);
    assert!(two.refused());
    // There is only one name.
    let mut one = bench(&["a.internal"]);
    one.answer(1, wrong(), true, false);
    assert!(one.refused());
}
