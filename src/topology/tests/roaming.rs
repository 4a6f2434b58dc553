//! An address behind which each new session may reach another server.

use super::*;

#[test]
fn a_roaming_address_is_looked_at_by_a_new_session_each_patrol() {
    let mut bench = Bench::roaming();
    let mut fresh = 0;
    for _ in 0..12 {
        bench.wait(ms(1001));
        fresh += usize::from(bench.asked_fresh() == Some(true));
        bench.answer(1, Ok(primary(1, 1)), bench.asked_fresh() == Some(true), true);
    }
    assert_eq!(fresh, 2, "in twelve heart-beats and twelve seconds");
    assert!(bench.ended().is_empty());
}

#[test]
fn a_new_session_that_leads_astray_changes_nothing_while_the_primary_is_held() {
    let mut bench = Bench::roaming();
    for (said, kept_open, strayed) in [
        (standby(2), true, true),
        (standby(2), false, true),
        (fenced(2, 1), true, true),
        (primary(3, 1), true, true),
        (primary(3, 1), false, false),
        (primary(3, 2), true, false),
        (primary(1, 1), true, false),
    ] {
        assert_eq!(bench.topology.strayed(&address(1), &said, kept_open), strayed, "{said:?}");
    }
    for result in [Ok(standby(2)), Ok(fenced(2, 1)), Err(failure(FailureKind::Unreachable))] {
        bench.wait(ms(6000));
        bench.answer(1, result, true, true);
        assert_eq!(bench.primary(), Some(1));
    }
    assert!(bench.log.iter().all(|action| !matches!(action, Action::Suspend { .. } | Action::End { .. })));
    bench.answer(1, Err(failure(FailureKind::Unreachable)), true, false);
    assert_eq!(bench.primary(), None, "nothing is held any more");
}

#[test]
fn a_new_session_to_a_newer_primary_moves_a_roaming_address() {
    let mut bench = Bench::roaming();
    bench.wait(ms(6000));
    bench.answer(1, Ok(primary(2, 2)), true, true);
    assert_eq!((bench.primary(), bench.ended()), (Some(1), vec![1]));
    bench.wait(ms(6000));
    bench.answer(1, Ok(primary(1, 1)), true, true);
    assert_eq!(bench.ended(), [1], "the old one, writable again, is refused");
}

#[test]
fn no_session_is_kept_that_a_roaming_address_would_lead_elsewhere() {
    let mut bench = Bench::roaming();
    bench.answer(1, Err(failure(FailureKind::Unreachable)), true, false);
    bench.answer(1, Ok(standby(2)), true, true);
    assert!(bench.topology.strayed(&address(1), &standby(2), true), "its promotion would not be where others are led");
}

#[test]
fn an_unidentified_server_behind_a_roaming_address_is_not_taken_for_the_one_before() {
    let anonymous = ServerReport { system_identifier: None, started_at: None, timeline: None, ..primary(1, 1) };
    let mut bench = Bench::with(Settings { roaming: true, ..settings() }, 1);
    bench.report(1, anonymous.clone());
    bench.answer(1, Err(failure(FailureKind::Unreachable)), true, false);
    bench.report(1, anonymous);
    assert_eq!((bench.primary(), bench.ended()), (Some(1), vec![1]));
}
