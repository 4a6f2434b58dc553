//! Several clusters behind one name, several names, and refusals: which servers are not the pool's own, and how long
//! callers wait.

use super::*;

fn of(cluster: u64, mut report: ServerReport) -> ServerReport {
    report.system_identifier = Some(cluster);
    report
}

fn anonymous(mut report: ServerReport) -> ServerReport {
    report.system_identifier = None;
    report
}

/// The failure that callers get, if waiting does not help.
fn told(bench: &Bench) -> Option<(FailureKind, String)> {
    match bench.topology.view().state {
        State::Searching { refused: Some(failure) } => Some((failure.kind, failure.message)),
        _ => None,
    }
}

fn several(bench: &Bench) -> Option<String> {
    told(bench).filter(|(kind, _)| *kind == FailureKind::SeveralClusters).map(|(_, message)| message)
}

#[test]
fn of_two_clusters_in_the_first_search_none_is_taken_and_both_are_named() {
    for (first, second) in [
        (of(77, primary(1, 1)), of(78, primary(2, 9))),
        (of(78, primary(1, 9)), of(77, primary(2, 1))),
        (of(77, primary(1, 1)), of(78, primary(2, 1))),
        (of(77, primary(1, 1)), of(78, standby(2))),
        (of(78, standby(1)), of(77, primary(2, 1))),
        (of(78, fenced(1, 3)), of(77, primary(2, 1))),
    ] {
        let mut bench = Bench::new(2);
        bench.report(1, first.clone());
        bench.report(2, second.clone());
        bench.wait(ms(600));
        assert_eq!(bench.primary(), None, "{first:?} and {second:?}");
        let message = several(&bench).unwrap_or_else(|| panic!("{first:?} and {second:?}: not told"));
        for word in ["127.0.0.1:5432", "127.0.0.2:5432", "77", "78"] {
            assert!(message.contains(word), "{message}");
        }
    }
}

#[test]
fn one_that_does_not_tell_its_cluster_beside_one_that_does_is_no_choice_either() {
    for (first, second) in [(anonymous(primary(1, 9)), primary(2, 1)), (primary(1, 1), anonymous(primary(2, 9)))] {
        let mut bench = Bench::new(2);
        bench.report(1, first);
        bench.report(2, second);
        bench.wait(ms(600));
        assert_eq!(bench.primary(), None);
        assert!(several(&bench).is_some_and(|message| message.contains("does not tell")));
    }
    // If no server reports its cluster, only the timeline decides. A standby that withholds its cluster is not in
    // conflict with the primary.
    let mut bench = Bench::new(2);
    bench.report(1, anonymous(primary(1, 1)));
    bench.report(2, anonymous(primary(2, 2)));
    assert_eq!(bench.primary(), Some(2));
    let mut bench = Bench::new(2);
    bench.report(1, anonymous(standby(1)));
    bench.report(2, primary(2, 2));
    assert_eq!(bench.primary(), Some(2));
}

#[test]
fn a_pinned_cluster_is_the_only_one_that_is_taken() {
    let pinned = || Bench::with(Settings { system_identifier: Some(77), ..settings() }, 2);
    let mut bench = pinned();
    bench.report(2, of(78, primary(2, 9)));
    bench.report(1, of(77, primary(1, 1)));
    assert_eq!(bench.primary(), Some(1));
    let mut bench = pinned();
    bench.report(2, anonymous(primary(2, 9)));
    bench.report(1, of(77, primary(1, 1)));
    assert_eq!(bench.primary(), Some(1));
    // Either the identifier or the name is wrong. After a moment, callers are told that waiting does not help.
    let mut bench = pinned();
    bench.report(1, of(78, primary(1, 1)));
    bench.report(2, of(78, standby(2)));
    assert_eq!(several(&bench), None);
    bench.wait(ms(2000));
    assert!(several(&bench).is_some_and(|message| message.contains("78, expected 77")));
}

#[test]
fn a_stranger_that_answers_late_is_refused_and_a_silent_one_is_remembered() {
    let mut bench = Bench::new(2);
    bench.report(1, of(77, primary(1, 1)));
    bench.wait(ms(600));
    assert_eq!(bench.primary(), Some(1));
    bench.report(2, of(78, primary(2, 9)));
    assert_eq!(bench.primary(), Some(1));
    assert!(bench.log.iter().any(|action| matches!(action, Action::Notice(Notice::Refused(..)))));

    let mut bench = Bench::new(2);
    bench.report(1, of(77, primary(1, 1)));
    bench.report(2, of(78, primary(2, 1)));
    for _ in 0..10 {
        bench.wait(ms(1000));
        bench.fail(2, FailureKind::Unreachable);
        bench.report(1, of(77, primary(1, 1)));
        assert_eq!(bench.primary(), None, "a moment's silence is no proof");
    }
    for _ in 0..25 {
        bench.wait(ms(1000));
        bench.fail(2, FailureKind::Unreachable);
        bench.report(1, of(77, primary(1, 1)));
    }
    assert_eq!(bench.primary(), Some(1), "it was switched off");
}

#[test]
fn a_higher_timeline_of_another_cluster_is_nothing_to_one_that_did_not_tell_its_own() {
    let mut bench = Bench::new(2);
    bench.report(1, anonymous(primary(1, 1)));
    bench.report(2, anonymous(standby(2)));
    assert_eq!(bench.primary(), Some(1));
    bench.wait(ms(6000));
    bench.report(2, of(78, primary(2, 9)));
    assert_eq!(bench.primary(), Some(1));
    // Now the role may read the identifier.
    bench.answer(1, Ok(of(77, primary(1, 1))), false, true);
    bench.wait(ms(6000));
    bench.report(2, of(78, primary(2, 9)));
    assert_eq!(bench.primary(), Some(1));
    assert_eq!(bench.topology.system_identifier, Some(77));
}

#[test]
fn an_accepted_cluster_takes_the_place_of_the_one_before() {
    // The cluster is accepted while the old primary is lost.
    let mut bench = Bench::searching();
    bench.wait(ms(500));
    bench.report(2, of(78, primary(2, 1)));
    assert_eq!(bench.primary(), None);
    bench.topology.accept(bench.now, Accept::Cluster(78));
    bench.poll();
    assert_eq!(bench.ended(), [1], "what led to the old one ends at once");
    bench.wait(ms(100));
    bench.report(2, of(78, primary(2, 1)));
    bench.wait(ms(600));
    assert_eq!(bench.primary(), Some(2));
    assert!(bench.topology.view().generation.get() > 2, "nobody settles a commit of the old one by this primary");
    // The cluster is accepted while the old primary is in use.
    let mut bench = Bench::settled();
    bench.wait(ms(500));
    bench.topology.accept(bench.now, Accept::Cluster(78));
    bench.poll();
    assert_eq!((bench.primary(), bench.ended()), (None, vec![1]));
    bench.wait(ms(100));
    bench.report(1, primary(1, 1));
    bench.wait(ms(600));
    assert_eq!(bench.primary(), None, "the old one is the stranger now");
    // If the cluster in use is accepted, nothing happens.
    let mut bench = Bench::settled();
    bench.topology.accept(bench.now, Accept::Cluster(77));
    bench.poll();
    assert_eq!((bench.primary(), bench.ended()), (Some(1), vec![]));
}

#[test]
fn a_restore_of_the_same_cluster_is_accepted_on_its_older_timeline() {
    for accepted in [Accept::Cluster(77), Accept::Any] {
        let mut bench = Bench::settled();
        bench.wait(ms(6000));
        bench.report(2, primary(2, 5));
        bench.suspect(2);
        bench.wait(ms(20));
        bench.fail(2, FailureKind::Unreachable);
        bench.wait(ms(100));
        bench.report(3, primary(33, 2));
        bench.wait(ms(1000));
        assert_eq!(bench.primary(), None, "an old primary");
        bench.topology.accept(bench.now, accepted);
        bench.poll();
        bench.wait(ms(100));
        bench.report(3, primary(33, 2));
        bench.wait(ms(600));
        assert_eq!(bench.primary(), Some(3), "{accepted:?}");
        assert!(bench.ended().contains(&2));
    }
}

#[test]
fn a_forgotten_cluster_is_searched_for_as_at_first() {
    let mut bench = Bench::settled();
    bench.topology.accept(bench.now, Accept::Any);
    bench.poll();
    bench.wait(ms(100));
    bench.report(1, of(77, primary(1, 1)));
    bench.report(2, of(78, primary(2, 1)));
    bench.wait(ms(600));
    assert_eq!(bench.primary(), None);
    assert!(several(&bench).is_some());
}

#[test]
fn a_successor_is_followed_when_the_cluster_has_had_no_primary_for_long_enough() {
    let policy = || Settings { accept_new_cluster_after: Some(ms(30_000)), ..settings() };
    let lost = || {
        let mut bench = Bench::with(policy(), 3);
        bench.report(2, standby(2));
        bench.report(3, standby(3));
        bench.report(1, primary(1, 5));
        bench.wait(ms(1000));
        bench.answer(1, Err(failure(FailureKind::Unreachable)), true, false);
        bench
    };
    let later = |bench: &mut Bench, claims: &dyn Fn(&mut Bench)| {
        for _ in 0..40 {
            bench.wait(ms(1000));
            bench.fail(1, FailureKind::Unreachable);
            claims(bench);
        }
        bench.wait(ms(600));
    };
    // The successor is a server of another cluster, or of the pool's own cluster after a restore.
    for successor in [of(78, primary(2, 1)), primary(22, 2)] {
        let mut bench = lost();
        bench.wait(ms(20_000));
        bench.report(2, successor.clone());
        bench.wait(ms(2000));
        assert_eq!(bench.primary(), None, "it is too early");
        later(&mut bench, &|bench| {
            bench.report(2, successor.clone());
            bench.fail(3, FailureKind::Unreachable);
        });
        assert_eq!(bench.primary(), Some(2), "{successor:?}");
    }
    // Nothing is followed if two other clusters answer, or if the server of another cluster is a standby.
    let mut bench = lost();
    later(&mut bench, &|bench| {
        bench.report(2, of(78, primary(2, 1)));
        bench.report(3, of(79, primary(3, 1)));
    });
    assert_eq!(bench.primary(), None);
    let mut bench = lost();
    later(&mut bench, &|bench| bench.report(2, of(78, standby(2))));
    assert_eq!(bench.primary(), None);
    // Without the policy, another cluster is never followed.
    let mut bench = Bench::searching();
    later(&mut bench, &|bench| bench.report(2, of(78, primary(2, 1))));
    assert_eq!(bench.primary(), None);
}

/// When another cluster is accepted, DNS may no longer name the servers of the one before, while a question beside the
/// first one is still under way to one of them. Its end is noted all the same, so that the next primary is asked
/// beside, too.
#[test]
fn a_question_to_a_server_that_is_forgotten_meanwhile_blocks_no_later_one() {
    let now = Instant::now();
    let mut bench = Bench { topology: Topology::new(settings(), Vec::new(), 1, 1, now), now, log: Vec::new() };
    bench.poll();
    bench.topology.resolved(bench.now, 0, named([endpoint(1)]));
    bench.poll();
    bench.report(1, primary(1, 1));
    bench.wait(ms(600));
    assert_eq!(bench.primary(), Some(1));
    bench.suspect(1);
    bench.wait(ms(30));
    assert!(bench.topology.beside.asking);
    bench.topology.accept(bench.now, Accept::Cluster(78));
    bench.poll();
    bench.topology.resolved(bench.now, 0, named([endpoint(2)]));
    bench.poll();
    assert!(!bench.topology.members.contains_key(&address(1)));
    let result = Err(failure(FailureKind::TimedOut));
    let late = Probed { address: address(1), result, fresh: true, still_open: false, beside: true };
    bench.topology.probed(bench.now, &late);
    bench.report(2, of(78, primary(2, 1)));
    bench.wait(ms(600));
    assert_eq!(bench.primary(), Some(2));
    bench.answer(2, Ok(of(78, primary(2, 1))), false, true);
    bench.log.clear();
    let generation = bench.topology.view().generation.get();
    bench.suspect(generation);
    bench.wait(ms(30));
    assert!(bench.asked_freshly(2), "a suspicion is looked into on a new session");
}

/// One name is never answered, and one always fails. The addresses of the third are forgotten as usual when it no
/// longer leads to them.
#[test]
fn a_name_that_fails_holds_back_nobody() {
    let now = Instant::now();
    let mut topology = Topology::new(settings(), Vec::new(), 3, 1, now);
    let asked =
        |actions: Vec<Action>| actions.into_iter().filter(|action| matches!(action, Action::Resolve(_))).count();
    assert_eq!(asked(topology.poll(now)), 3);
    for n in 1..=40_u8 {
        let later = now + ms(100 * u64::from(n));
        topology.poll(later);
        topology.resolved(later, 1, NameAnswer::Unknown("there is no name b".to_owned()));
        topology.resolved(later, 2, named([endpoint(n)]));
    }
    assert_eq!(topology.candidates().len(), 1);
    assert_eq!(topology.dns_failure().as_deref(), Some("there is no name b"));
    topology.resolved(now + ms(5000), 2, NameAnswer::Failed("SERVFAIL".to_owned()));
    assert_eq!(topology.candidates().len(), 1, "a failed look-up forgets nobody");
    assert_eq!(topology.dns_failure().as_deref(), Some("there is no name b; SERVFAIL"));
}

#[test]
fn a_silent_name_delays_the_first_search_by_the_grace_at_most() {
    let now = Instant::now();
    let mut bench = Bench { topology: Topology::new(settings(), Vec::new(), 2, 1, now), now, log: Vec::new() };
    bench.poll();
    bench.now += ms(5);
    bench.topology.resolved(bench.now, 0, named([endpoint(1)]));
    bench.poll();
    bench.report(1, primary(1, 1));
    assert_eq!(bench.primary(), None, "the other name may lead to a newer one");
    bench.wait(FIRST_GRACE.0);
    assert_eq!(bench.primary(), Some(1));
}

#[test]
fn names_that_nobody_knows_are_told_after_a_moment_at_the_first_start_alone() {
    let now = Instant::now();
    let mut bench = Bench { topology: Topology::new(settings(), Vec::new(), 2, 1, now), now, log: Vec::new() };
    bench.poll();
    let unknown = |name: &str| NameAnswer::Unknown(format!("there is no name {name} (NXDOMAIN)"));
    bench.topology.resolved(bench.now, 0, unknown("a"));
    bench.poll();
    bench.wait(ms(3000));
    assert_eq!(told(&bench), None, "the other name has not been answered");
    bench.topology.resolved(bench.now, 1, unknown("b"));
    bench.poll();
    assert!(told(&bench).is_some_and(|(kind, text)| kind == FailureKind::UnknownName && text.contains("NXDOMAIN")));
    bench.topology.resolved(bench.now, 1, named([endpoint(1)]));
    bench.poll();
    assert_eq!(told(&bench), None, "a moment later there is one");
    bench.report(1, primary(1, 1));
    bench.wait(ms(600));
    assert_eq!(bench.primary(), Some(1));
    // During a failover, names may be unknown for a while.
    bench.suspect(1);
    bench.wait(ms(20));
    bench.fail(1, FailureKind::Unreachable);
    bench.topology.resolved(bench.now, 0, unknown("a"));
    bench.topology.resolved(bench.now, 1, unknown("b"));
    bench.wait(ms(20_000));
    assert_eq!(told(&bench), None);
}

#[test]
fn credentials_that_were_accepted_before_are_waited_for() {
    let mut bench = Bench::searching();
    for second in 0..35 {
        for n in 1..=3 {
            bench.fail(n, FailureKind::Refused);
        }
        assert_eq!(told(&bench).is_some(), second > 29, "after {second} s");
        bench.wait(ms(1000));
    }
    // One of the servers accepts the role again.
    bench.report(2, primary(2, 2));
    assert_eq!(bench.primary(), Some(2));
}

#[test]
fn of_servers_that_refuse_one_is_asked_in_a_second() {
    let mut bench = Bench::new(3);
    for n in 1..=3 {
        bench.fail(n, FailureKind::Refused);
    }
    bench.log.clear();
    for _ in 0..6000 {
        bench.topology.demanded(bench.now);
        bench.wait(ms(10));
        for n in 1..=3 {
            if bench.topology.members[&address(n)].asking {
                bench.fail(n, FailureKind::Refused);
            }
        }
    }
    let asked: Vec<usize> = (1..=3).map(|n| bench.asked(n)).collect();
    assert!(asked.iter().sum::<usize>() <= 62, "{asked:?} in a minute");
    assert!(asked.iter().all(|times| *times >= 19), "each has its turn: {asked:?}");
}

#[test]
fn a_full_server_is_asked_less_and_less_often() {
    let mut bench = Bench::new(1);
    bench.log.clear();
    for _ in 0..6000 {
        bench.wait(ms(10));
        if bench.topology.members[&address(1)].asking {
            bench.fail(1, FailureKind::Full);
        }
    }
    assert!((45..=85).contains(&bench.asked(1)), "asked {} times in a minute", bench.asked(1));
}

/// A name has a hundred addresses. The last one is the primary's.
#[test]
fn more_addresses_than_are_asked_at_once_take_turns() {
    let now = Instant::now();
    let mut bench = Bench { topology: Topology::new(settings(), Vec::new(), 1, 1, now), now, log: Vec::new() };
    bench.poll();
    bench.topology.resolved(bench.now, 0, named((1..=100).map(endpoint)));
    bench.poll();
    assert_eq!((bench.topology.candidates().len(), bench.topology.waiting()), (MAX_MEMBERS, 36));
    for _ in 0..20 {
        for n in 1..=100 {
            if bench.topology.members.get(&address(n)).is_some_and(|member| member.asking) && bench.primary().is_none()
            {
                if n == 100 { bench.report(n, primary(n, 1)) } else { bench.fail(n, FailureKind::TimedOut) }
            }
        }
        // The same answer again does not change the order of turns.
        let before: Vec<_> = bench.topology.members.keys().cloned().collect();
        bench.topology.resolved(bench.now, 0, named((1..=100).map(endpoint)));
        assert!(bench.topology.members.keys().eq(&before));
        assert_eq!(bench.topology.candidates().len() + bench.topology.waiting(), 100);
        bench.wait(ms(300));
    }
    assert_eq!(bench.primary(), Some(100));
    let asked = (1..=100).filter(|n| bench.asked(*n) > 0).count();
    assert_eq!(asked, 100);
}

#[test]
fn a_stranger_that_makes_up_numbers_is_told_of_once() {
    let mut bench = Bench::settled();
    for n in 0..500 {
        bench.wait(ms(6000));
        bench.report(2, of(1000 + n, primary(2, 1)));
        bench.report(1, primary(1, 1));
    }
    let said = bench.log.iter().filter(|action| matches!(action, Action::Notice(_))).count();
    assert_eq!(said, 1);
    assert!(bench.topology.noticed.len() < 8);
}

/// While a server is just starting, callers go on waiting whatever other servers or DNS answer, because the starting
/// server may be the primary a moment later. Only refused credentials end the wait, because they are the same
/// everywhere.
#[test]
fn a_server_that_is_just_starting_is_waited_for_whatever_the_others_say() {
    let unknown_name = || {
        let now = Instant::now();
        let mut bench = Bench { topology: Topology::new(settings(), Vec::new(), 2, 1, now), now, log: Vec::new() };
        bench.poll();
        bench.topology.resolved(bench.now, 0, NameAnswer::Unknown("there is no name a (NXDOMAIN)".to_owned()));
        bench.topology.resolved(bench.now, 1, named([endpoint(1)]));
        bench.poll();
        bench
    };
    let another_cluster = || {
        let mut bench = Bench::with(Settings { system_identifier: Some(77), ..settings() }, 2);
        bench.report(2, of(78, primary(2, 1)));
        bench
    };
    let another_service = || {
        let mut bench = Bench::new(2);
        bench.fail(2, FailureKind::NotPostgres);
        bench
    };
    let starts: [(&str, &dyn Fn() -> Bench); 3] =
        [("name", &unknown_name), ("cluster", &another_cluster), ("service", &another_service)];
    for (case, start) in starts {
        let mut bench = start();
        for _ in 0..40 {
            bench.fail(1, FailureKind::Unreachable);
            bench.wait(ms(100));
            assert_eq!(told(&bench), None, "{case}");
        }
        bench.report(1, primary(1, 1));
        bench.wait(ms(600));
        assert_eq!(bench.primary(), Some(1), "{case}");
    }
    let mut bench = Bench::new(2);
    bench.fail(1, FailureKind::Unreachable);
    bench.fail(2, FailureKind::Refused);
    assert!(bench.refused());
}
