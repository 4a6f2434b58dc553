//! How often the pool asks while waiting does not help.

use super::*;

/// Callers wait for the right password. But the wrong one is tried as rarely as any refused password.
#[test]
fn of_servers_that_refuse_a_password_that_may_pass_one_is_asked_in_a_second() {
    let mut bench = Bench::new(3);
    let refuse =
        |bench: &mut Bench, n| bench.answer(n, Err(failure(FailureKind::Refused).that_may_pass()), true, false);
    for n in 1..=3 {
        refuse(&mut bench, n);
    }
    bench.log.clear();
    for _ in 0..6000 {
        bench.wait(ms(10));
        for n in 1..=3 {
            if bench.topology.members[&address(n)].asking {
                refuse(&mut bench, n);
            }
        }
        assert!(!bench.refused(), "callers wait");
    }
    let asked: Vec<usize> = (1..=3).map(|n| bench.asked(n)).collect();
    assert!(asked.iter().sum::<usize>() <= 62, "{asked:?} in a minute");
    assert!(asked.iter().all(|times| *times >= 19), "each has its turn: {asked:?}");
}

/// Callers that ask in a loop do not cause more look-ups, or more questions to something that is not PostgreSQL.
#[test]
fn what_waiting_does_not_help_is_asked_at_a_slow_pace() {
    let now = Instant::now();
    let mut bench = Bench { topology: Topology::new(settings(), vec![endpoint(1)], 2, 1, now), now, log: Vec::new() };
    bench.poll();
    let (mut looked_up, mut asked) = ([0, 0], 0);
    for step in 0..6000 {
        bench.topology.demanded(bench.now);
        bench.wait(ms(10));
        for action in std::mem::take(&mut bench.log) {
            match action {
                Action::Resolve(name) => {
                    looked_up[name] += i32::from(step >= 300);
                    bench.topology.resolved(bench.now, name, NameAnswer::Unknown("NXDOMAIN".to_owned()));
                }
                Action::Probe { .. } => {
                    asked += i32::from(step >= 300);
                    bench.topology.probed(
                        bench.now,
                        &Probed {
                            address: address(1),
                            result: Err(failure(FailureKind::NotPostgres)),
                            fresh: true,
                            still_open: false,
                            beside: false,
                        },
                    );
                }
                _ => {}
            }
        }
        assert!(bench.refused() || step < 210, "after {step} steps");
    }
    assert!(looked_up.iter().all(|times| (50..=58).contains(times)), "{looked_up:?} in 57 s");
    assert!((200..=290).contains(&asked), "{asked} in 57 s");
}
