//! The topology fed by hand, and by a small world of servers under a virtual clock.

mod lives;

use std::net::SocketAddr;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;

mod clusters;
mod untold;

const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

fn settings() -> Settings {
    Settings { poll: (ms(20), ms(250)), warm_standbys: false, ..Settings::default() }
}

fn address(n: u8) -> Address {
    Address::Tcp(SocketAddr::from(([127, 0, 0, n], 5432)))
}

fn endpoint(n: u8) -> Endpoint {
    Endpoint { host: Some(Arc::from("pg.internal")), address: address(n) }
}

/// Server `n` as the primary of `timeline`, started at `n`.
fn primary(n: u8, timeline: u32) -> ServerReport {
    ServerReport {
        in_recovery: false,
        read_only: false,
        default_read_only: false,
        fence_pending: false,
        system_identifier: Some(77),
        started_at: Some(i64::from(n)),
        timeline: Some(timeline),
        wal: None,
        replayed: None,
        stats_reset: None,
        checkpointed: None,
        evidence: None,
        withheld: Parts::default(),
    }
}

fn standby(n: u8) -> ServerReport {
    ServerReport { in_recovery: true, read_only: true, timeline: None, ..primary(n, 1) }
}

fn fenced(n: u8, timeline: u32) -> ServerReport {
    ServerReport { read_only: true, default_read_only: true, ..primary(n, timeline) }
}

fn named(endpoints: impl IntoIterator<Item = Endpoint>) -> NameAnswer {
    NameAnswer::Addresses { endpoints: endpoints.into_iter().collect(), partial: None }
}

fn failure(kind: FailureKind) -> ProbeFailure {
    ProbeFailure::new(kind, format!("{kind:?}"))
}

/// A topology, its clock, and all that it asked for.
struct Bench {
    topology: Topology,
    now: Instant,
    log: Vec<Action>,
}

impl Bench {
    fn new(members: u8) -> Self {
        Self::with(settings(), members)
    }

    fn with(settings: Settings, members: u8) -> Self {
        let now = Instant::now();
        let configured = (1..=members).map(endpoint).collect();
        let mut bench = Self { topology: Topology::new(settings, configured, 0, 1, now), now, log: Vec::new() };
        bench.poll();
        bench
    }

    /// One address that somebody else leads to one server or another: at first to server 1, the primary of timeline 1.
    fn roaming() -> Self {
        let mut bench = Self::with(Settings { roaming: true, ..settings() }, 1);
        bench.report(1, primary(1, 1));
        bench.log.clear();
        bench
    }

    /// The last question was asked on a new session.
    fn asked_fresh(&self) -> Option<bool> {
        self.log.iter().rev().find_map(|action| match action {
            Action::Probe { fresh, .. } => Some(*fresh),
            _ => None,
        })
    }

    /// Three members; the first is the primary of timeline 1, the others are standbys.
    fn settled() -> Self {
        let mut bench = Self::new(3);
        bench.report(2, standby(2));
        bench.report(3, standby(3));
        bench.report(1, primary(1, 1));
        assert_eq!(bench.primary(), Some(1));
        bench.wait(ms(100));
        bench.report(1, primary(1, 1));
        bench.log.clear();
        bench
    }

    /// The primary of [`Self::settled`] cannot be reached any more.
    fn searching() -> Self {
        let mut bench = Self::settled();
        bench.suspect(1);
        bench.wait(ms(20));
        bench.fail(1, FailureKind::Unreachable);
        bench
    }

    fn poll(&mut self) {
        let actions = self.topology.poll(self.now);
        self.log.extend(actions);
    }

    fn wait(&mut self, duration: Duration) {
        let until = self.now + duration;
        while let Some(next) = self.topology.wake_at().filter(|at| *at <= until) {
            self.now = self.now.max(next);
            self.poll();
        }
        self.now = until;
        self.poll();
    }

    /// A connection is in use, and something is heard on it or not.
    fn work(&mut self, duration: Duration, heard: bool) {
        let until = self.now + duration;
        while self.now < until {
            self.now += ms(25);
            self.topology.pulse(self.now, Pulse { in_use: true, moved: heard, received: heard, open: 1 });
            self.poll();
        }
    }

    fn answer(&mut self, n: u8, result: Result<ServerReport, ProbeFailure>, fresh: bool, still_open: bool) {
        let address = address(n);
        let beside = fresh && self.topology.beside.asking && self.topology.primary_address().as_ref() == Some(&address);
        self.topology.probed(self.now, &Probed { address, result, fresh, still_open, beside });
        self.poll();
    }

    fn report(&mut self, n: u8, report: ServerReport) {
        self.answer(n, Ok(report), true, true);
    }

    fn fail(&mut self, n: u8, kind: FailureKind) {
        self.answer(n, Err(failure(kind)), true, false);
    }

    fn suspect(&mut self, generation: u64) {
        self.topology.suspected(self.now, GenerationId(generation), Suspicion::Connection);
        self.poll();
    }

    /// The last number of the current primary's address.
    fn primary(&self) -> Option<u8> {
        match self.topology.view().state {
            State::Primary { endpoint, .. } => match endpoint.address {
                Address::Tcp(SocketAddr::V4(address)) => Some(address.ip().octets()[3]),
                _ => None,
            },
            _ => None,
        }
    }

    fn refused(&self) -> bool {
        matches!(self.topology.view().state, State::Searching { refused: Some(_) })
    }

    fn ended(&self) -> Vec<u64> {
        let end = |action: &Action| match action {
            Action::End { id, .. } => Some(id.get()),
            _ => None,
        };
        self.log.iter().filter_map(end).collect()
    }

    fn asked(&self, n: u8) -> usize {
        let asks =
            |action: &&Action| matches!(action, Action::Probe { endpoint, .. } if endpoint.address == address(n));
        self.log.iter().filter(asks).count()
    }

    /// How long each question to it is answered late on purpose.
    fn vigils(&self, n: u8) -> Vec<Option<Vigil>> {
        let vigil = |action: &Action| match action {
            Action::Probe { endpoint, vigil, .. } if endpoint.address == address(n) => Some(*vigil),
            _ => None,
        };
        self.log.iter().filter_map(vigil).collect()
    }

    fn asked_freshly(&self, n: u8) -> bool {
        self.log.iter().any(
            |action| matches!(action, Action::Probe { endpoint, fresh: true, .. } if endpoint.address == address(n)),
        )
    }
}

#[test]
fn the_first_search_waits_a_moment_for_an_objection() {
    let mut bench = Bench::new(2);
    bench.now += ms(4);
    bench.report(1, primary(1, 1));
    assert_eq!(bench.primary(), None, "the other may be on a newer timeline");
    bench.report(2, primary(2, 2));
    assert_eq!(bench.primary(), Some(2));
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
    // Servers 1 and 3 have not answered since; timeline 2 settles it.
    bench.report(2, primary(2, 2));
    assert_eq!(bench.primary(), Some(2));
    assert_eq!(bench.ended(), [1]);
}

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

/// A promoted server names the timeline that it came from until it has completed a checkpoint; then nothing does.
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
fn a_successor_is_looked_for_before_a_silent_primary_is_given_up() {
    let mut bench = Bench::settled();
    bench.wait(ms(1050));
    bench.log.clear();
    // The heart-beat has then been open for 75 ms; its limit is 2 s.
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
    // Each time after twice as long, and from then on as always.
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
    // What is heard all the time is asked as soon as it falls silent.
    for _ in 0..6 {
        bench.work(ms(1000), true);
        bench.answer(1, Ok(primary(1, 1)), false, true);
    }
    bench.log.clear();
    bench.work(ms(75), false);
    assert_eq!(bench.asked(1), 1);
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
    // It was closed, or an administrator ended it (57P01).
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
        // How things stand, before anything is waited for.
        bench.wait(ms(1));
        assert_eq!(bench.vigils(2), [None]);
        bench.answer(2, Ok(standby(2)), false, true);
        bench.wait(ms(2));
        for _ in 0..4 {
            bench.wait(ms(50));
            bench.answer(2, Ok(standby(2)), false, true);
        }
        let vigil = Some(Vigil { lasts: ms(50), step: ms(2) });
        assert_eq!(bench.vigils(2), [None, vigil, vigil, vigil, vigil, vigil]);
        assert!(bench.asked(1) <= 7, "a new session each, asked {} times", bench.asked(1));
    }
}

#[test]
fn a_long_search_has_a_vigil_that_looks_less_often() {
    let mut bench = Bench::searching();
    bench.answer(2, Ok(standby(2)), false, true);
    for _ in 0..120 {
        bench.wait(ms(250));
        bench.log.clear();
        bench.answer(2, Ok(standby(2)), true, true);
    }
    for _ in 0..20 {
        if bench.vigils(2).is_empty() {
            bench.wait(ms(25));
        }
    }
    assert_eq!(bench.vigils(2), [Some(Vigil { lasts: ms(250), step: ms(25) })]);
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

/// What it takes on purpose says nothing of how soon the server answers.
#[test]
fn a_vigil_is_not_held_against_the_server() {
    let mut bench = Bench::searching();
    bench.wait(ms(1));
    bench.answer(2, Ok(standby(2)), false, true);
    let took = bench.topology.members[&address(2)].took;
    bench.wait(ms(50));
    bench.answer(2, Ok(standby(2)), false, true);
    assert_eq!(bench.topology.members[&address(2)].took, took);
}

/// However old it is: what it was kept for is the moment when its server is promoted.
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

/// A standby that has no slot for another session keeps the one that it has.
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
    // DNS has named another server for longer than anybody is remembered; then one heart-beat is late.
    let later = now + 2 * REMEMBER;
    topology.poll(later);
    topology.probed(later, &probed(Err(failure(FailureKind::TimedOut))));
    topology.resolved(later, 0, named([endpoint(2)]));
    let known: Vec<_> = topology.candidates().into_iter().map(|candidate| candidate.endpoint.address).collect();
    assert_eq!(known, [address(1), address(2)]);
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

/// A world of servers: what each would answer. Commands change it; the topology asks it.
#[derive(Clone, Debug)]
enum Command {
    Kill(usize),
    Restart(usize),
    Promote(usize),
    Fence(usize, bool),
    Freeze(usize, bool),
    Suspect(u64),
    Wait(u64),
}

#[derive(Clone)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch that a command turns")]
struct Server {
    up: bool,
    frozen: bool,
    fenced: bool,
    primary: bool,
    timeline: u32,
    started: i64,
}

struct World {
    servers: Vec<Server>,
    starts: i64,
    newest: u32,
}

impl World {
    fn answer(&self, index: usize) -> Result<ServerReport, ProbeFailure> {
        let server = &self.servers[index];
        if !server.up {
            return Err(failure(FailureKind::Unreachable));
        }
        if server.frozen {
            return Err(failure(FailureKind::TimedOut));
        }
        let report = ServerReport { started_at: Some(server.started), ..primary(1, server.timeline) };
        Ok(match (server.primary, server.fenced) {
            (true, true) => ServerReport { read_only: true, default_read_only: true, ..report },
            (true, false) => report,
            (false, _) => ServerReport { in_recovery: true, read_only: true, timeline: None, ..report },
        })
    }

    fn apply(&mut self, command: &Command) {
        match *command {
            Command::Kill(n) => self.servers[n].up = false,
            Command::Restart(n) if !self.servers[n].up => {
                self.starts += 1;
                self.servers[n].started = self.starts;
                self.servers[n].up = true;
            }
            Command::Promote(n) if self.servers[n].up && !self.servers[n].primary => {
                self.newest += 1;
                self.servers[n].timeline = self.newest;
                self.servers[n].primary = true;
            }
            Command::Fence(n, fenced) => self.servers[n].fenced = fenced,
            Command::Freeze(n, frozen) => self.servers[n].frozen = frozen,
            _ => {}
        }
    }
}

fn command() -> impl Strategy<Value = Command> {
    let server = 0..3_usize;
    prop_oneof![
        server.clone().prop_map(Command::Kill),
        server.clone().prop_map(Command::Restart),
        server.clone().prop_map(Command::Promote),
        (server.clone(), any::<bool>()).prop_map(|(n, on)| Command::Fence(n, on)),
        (server, any::<bool>()).prop_map(|(n, on)| Command::Freeze(n, on)),
        (0..4_u64).prop_map(Command::Suspect),
        (1..8000_u64).prop_map(Command::Wait),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    /// Over any history: the published timeline and the generation never go back, a generation ends at most once and
    /// before a later one begins, nothing is asked twice at a time, and when the dust has settled the newest writable
    /// primary is the one in use, or none is if there is none.
    #[test]
    fn any_history_ends_on_the_newest_primary(commands in prop::collection::vec(command(), 0..40)) {
        let started = |started| Server { up: true, frozen: false, fenced: false, primary: started == 1, timeline: 1, started };
        let mut world = World { servers: (1..=3).map(started).collect(), starts: 10, newest: 1 };
        let mut bench = Bench::new(3);
        let mut watch = Watch::default();
        for command in &commands {
            world.apply(command);
            match *command {
                Command::Suspect(generation) => bench.suspect(generation),
                Command::Wait(milliseconds) => watch.run(&mut bench, &world, ms(milliseconds))?,
                _ => {}
            }
        }
        for server in &mut world.servers {
            server.frozen = false;
        }
        watch.run(&mut bench, &world, ms(60_000))?;
        let writable = |server: &&Server| server.up && server.primary && !server.fenced;
        let best = world.servers.iter().filter(writable).map(|server| server.timeline).max();
        let used = match bench.topology.view().state {
            State::Primary { report, .. } => report.timeline,
            _ => None,
        };
        // A primary of an older timeline than one that was seen and died is rightly refused.
        prop_assert_eq!(used, best.filter(|timeline| Some(*timeline) >= bench.topology.newest_timeline));
    }
}

/// What must hold at every step, and the probes that are under way.
#[derive(Default)]
struct Watch {
    timeline: Option<u32>,
    generation: u64,
    begun: Vec<u64>,
    ended: Vec<u64>,
    answers: Vec<Answered>,
}

struct Answered {
    at: Instant,
    address: Address,
    fresh: bool,
    beside: bool,
    silent: bool,
}

impl Watch {
    fn run(&mut self, bench: &mut Bench, world: &World, duration: Duration) -> Result<(), TestCaseError> {
        let until = bench.now + duration;
        loop {
            for action in std::mem::take(&mut bench.log) {
                self.see(bench, world, action)?;
            }
            let answer = self.answers.iter().map(|answer| answer.at).min();
            let Some(next) = answer.into_iter().chain(bench.topology.wake_at()).min().filter(|at| *at <= until) else {
                break;
            };
            bench.now = bench.now.max(next);
            let due = |answer: &mut Answered| answer.at <= next;
            for answer in self.answers.extract_if(.., due).collect::<Vec<_>>() {
                Self::deliver(bench, world, answer);
            }
            bench.poll();
        }
        bench.now = until;
        Ok(())
    }

    fn deliver(bench: &mut Bench, world: &World, answered: Answered) {
        let index = index_of(&answered.address);
        let result = if answered.silent { Err(failure(FailureKind::TimedOut)) } else { world.answer(index) };
        let Answered { address, fresh, beside, .. } = answered;
        // No session is kept in this world.
        let result = if beside && !fresh { Err(failure(FailureKind::Unreachable)) } else { result };
        let still_open = result.is_ok();
        bench.topology.probed(bench.now, &Probed { address, result, fresh, still_open, beside });
    }

    fn see(&mut self, bench: &Bench, world: &World, action: Action) -> Result<(), TestCaseError> {
        match action {
            Action::Begin { primary, .. } => {
                prop_assert!(primary.id.get() > self.generation, "generation went back");
                prop_assert!(primary.report.timeline >= self.timeline, "timeline went back");
                prop_assert!(self.begun.iter().all(|id| self.ended.contains(id)), "an older generation lives on");
                self.generation = primary.id.get();
                self.timeline = primary.report.timeline;
                self.begun.push(self.generation);
            }
            Action::End { id, .. } => {
                prop_assert!(!self.ended.contains(&id.get()), "ended twice");
                self.ended.push(id.get());
            }
            Action::Probe { endpoint, fresh, beside, within, .. } => {
                let address = endpoint.address;
                prop_assert!(
                    self.answers.iter().all(|it| (&it.address, it.beside) != (&address, beside)),
                    "asked twice at a time"
                );
                let silent = world.servers[index_of(&address)].frozen;
                let at = bench.now + if silent { within } else { ms(1) };
                self.answers.push(Answered { at, address, fresh, beside, silent });
            }
            _ => {}
        }
        Ok(())
    }
}

fn index_of(wanted: &Address) -> usize {
    (1..=3).position(|n| address(n) == *wanted).unwrap_or_default()
}

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
    for (said, strayed) in [(standby(2), true), (primary(3, 1), false), (fenced(2, 1), true), (primary(1, 1), false)] {
        assert_eq!(bench.topology.strayed(&address(1), &said), strayed, "{said:?}");
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
    assert!(bench.topology.strayed(&address(1), &standby(2)), "its promotion would not be where others are led");
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
