//! What a server reports about itself: old primaries, fences, other clusters, and one server at two addresses.

use super::*;

#[test]
fn a_zombie_is_refused_and_said_once() {
    let mut bench = Bench::settled();
    bench.wait(ms(6000));
    bench.report(2, primary(2, 2));
    assert_eq!(bench.primary(), Some(2), "the patrol saw the promotion");
    assert_eq!(bench.ended(), [1]);
    bench.log.clear();
    for _ in 0..3 {
        bench.wait(ms(7000));
        bench.report(2, primary(2, 2));
        bench.report(1, primary(1, 1));
    }
    assert_eq!(bench.primary(), Some(2));
    let said = bench.log.iter().filter(|action| matches!(action, Action::Notice(_))).count();
    assert_eq!(said, 1);
}

#[test]
fn another_cluster_is_refused() {
    let mut bench = Bench::settled();
    bench.wait(ms(6000));
    bench.report(2, ServerReport { system_identifier: Some(78), ..primary(2, 9) });
    assert_eq!(bench.primary(), Some(1));
}

#[test]
fn the_same_server_at_another_address_keeps_its_connections() {
    let mut bench = Bench::searching();
    bench.wait(ms(50));
    bench.report(3, primary(1, 1));
    assert_eq!(bench.primary(), Some(3));
    assert_eq!(bench.topology.view().generation.get(), 1);
    assert!(bench.ended().is_empty());
}

#[test]
fn without_a_start_time_another_address_is_another_server() {
    let anonymous = ServerReport { system_identifier: None, started_at: None, timeline: None, ..primary(1, 1) };
    let mut bench = Bench::new(2);
    bench.report(2, ServerReport { system_identifier: None, started_at: None, ..standby(2) });
    bench.report(1, anonymous.clone());
    assert_eq!(bench.primary(), Some(1));
    bench.suspect(1);
    bench.wait(ms(20));
    bench.fail(1, FailureKind::Unreachable);
    bench.wait(ms(50));
    bench.report(2, anonymous);
    assert_eq!(bench.primary(), Some(2));
    assert_eq!(bench.ended(), [1]);
}

#[test]
fn a_fence_on_the_primary_ends_its_generation() {
    let mut bench = Bench::settled();
    bench.wait(ms(1000));
    bench.answer(1, Ok(fenced(1, 1)), false, true);
    assert_eq!(bench.primary(), None);
    assert_eq!(bench.ended(), [1]);
    bench.wait(ms(50));
    bench.report(1, fenced(1, 1));
    assert!(!bench.topology.keeps(&address(1)), "a session opened under a fence stays read-only after it");
}

#[test]
fn a_fence_for_new_sessions_is_looked_into_on_a_new_session() {
    let mut bench = Bench::settled();
    bench.wait(ms(1000));
    bench.log.clear();
    bench.answer(1, Ok(ServerReport { fence_pending: true, ..primary(1, 1) }), false, true);
    assert_eq!(bench.primary(), Some(1), "suspicion, not proof");
    bench.wait(ms(20));
    assert!(bench.asked_freshly(1));
    bench.report(1, fenced(1, 1));
    assert_eq!(bench.ended(), [1]);
}

#[test]
fn a_fence_found_after_a_suspicion_ends_the_generation_too() {
    let mut bench = Bench::settled();
    bench.wait(ms(500));
    bench.topology.suspected(bench.now, GenerationId(1), Suspicion::ReadOnly);
    bench.poll();
    bench.report(1, fenced(1, 1));
    assert_eq!(bench.ended(), [1], "sessions from before the fence would go on writing");
}

#[test]
fn one_server_by_two_addresses_is_no_second_primary() {
    let mut bench = Bench::settled();
    let before = ServerReport { replayed: "0/10".parse().ok(), ..primary(1, 1) };
    bench.report(2, before);
    let two = |action: &Action| matches!(action, Action::Notice(Notice::TwoPrimaries(_)));
    assert!(!bench.log.iter().any(two), "what the same postmaster said in another life");
}

#[test]
fn a_server_that_does_not_tell_its_cluster_is_refused_where_another_did() {
    let mut bench = Bench::searching();
    bench.wait(ms(50));
    let anonymous = ServerReport { system_identifier: None, started_at: None, timeline: None, ..primary(3, 1) };
    bench.report(3, anonymous);
    bench.wait(ms(200));
    assert_eq!(bench.primary(), None);
}

#[test]
fn a_session_kept_from_before_a_fence_does_not_vouch_for_new_ones() {
    let mut bench = Bench::searching();
    bench.wait(ms(50));
    bench.answer(2, Ok(ServerReport { fence_pending: true, ..primary(2, 2) }), false, true);
    assert_eq!(bench.primary(), None);
    assert!(!bench.topology.keeps(&address(2)));
}

#[test]
fn a_read_only_session_stops_checkouts_until_the_primary_is_verified() {
    let mut bench = Bench::settled();
    bench.wait(ms(500));
    bench.topology.suspected(bench.now, GenerationId(1), Suspicion::ReadOnly);
    bench.poll();
    assert_eq!(bench.primary(), None);
    assert!(bench.ended().is_empty());
    bench.report(1, primary(1, 1));
    assert_eq!(bench.primary(), Some(1));
}

#[test]
fn a_standby_behind_the_address_proves_nothing_about_the_server_in_use() {
    let mut bench = Bench::settled();
    bench.wait(ms(500));
    bench.suspect(1);
    bench.report(1, standby(9));
    assert_eq!((bench.primary(), bench.asked_fresh()), (Some(1), Some(false)), "the session that is kept will tell");
    bench.answer(1, Err(failure(FailureKind::Unreachable)), false, false);
    bench.answer(1, Ok(standby(9)), true, false);
    assert_eq!(bench.primary(), None);
    assert!(bench.ended().is_empty(), "a proxy may have sent the probe elsewhere");
    bench.wait(ms(50));
    bench.report(1, primary(1, 1));
    assert_eq!(bench.primary(), Some(1));
}
