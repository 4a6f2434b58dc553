//! A server counts as alive while any of its sessions answers. Soon after none does, it counts as dead.

use proptest::prelude::*;

use super::*;
use crate::topology::lives::{Circumstances, Finding};

mod alone;

fn circumstances(kind: FailureKind, fresh: bool) -> Circumstances {
    Circumstances { kind, fresh, kept_open: false, pooled_open: false, received: false, mute: false }
}

#[test]
fn what_a_question_without_a_report_says() {
    use Finding::{Gone, Lives, NewSessionsFail, SessionEnded};
    for kind in KINDS {
        let new = circumstances(kind, true);
        let full = kind == FailureKind::Full;
        let expected = |finding| if full { Lives } else { finding };
        // While an older session is open, no failure to open a new one counts.
        assert_eq!(Circumstances { kept_open: true, ..new }.finding(), expected(NewSessionsFail), "{kind:?}");
        assert_eq!(Circumstances { pooled_open: true, ..new }.finding(), expected(NewSessionsFail), "{kind:?}");
        assert_eq!(Circumstances { pooled_open: true, mute: true, ..new }.finding(), expected(Gone), "{kind:?}");
        assert_eq!(new.finding(), expected(Gone), "{kind:?}");
    }
    for (kind, finding) in [
        (FailureKind::Unreachable, SessionEnded),
        (FailureKind::NotNow, SessionEnded),
        (FailureKind::Full, Lives),
        (FailureKind::Errored, Lives),
        (FailureKind::TimedOut, Gone),
        (FailureKind::NotPostgres, Gone),
    ] {
        assert_eq!(circumstances(kind, false).finding(), finding, "{kind:?}");
    }
    let held_up = Circumstances { received: true, ..circumstances(FailureKind::TimedOut, false) };
    assert_eq!(held_up.finding(), Lives, "the server answers others");
}

/// Server 1 is the primary. The pool has a session to it for the heartbeat, and one for callers. Server 2 is its
/// standby.
struct Stage {
    bench: Bench,
    /// The heartbeat's session is open.
    kept: bool,
    /// The server answers nothing, and closes nothing.
    silent: bool,
    /// How a new session fails to open. `None`: new sessions succeed.
    new: Option<FailureKind>,
    traffic: TrafficSample,
    /// Server 2 was promoted.
    promoted: bool,
    /// The questions under way: when each ends, its server, whether it is the question beside the first one, and
    /// whether it opens a new session.
    asked: Vec<(Instant, u8, bool, bool)>,
    suspended_at: Option<Instant>,
    ended_at: Option<Instant>,
    /// How often the pool was told to ask on an idle session.
    idle_asked: usize,
}

impl Stage {
    fn new() -> Self {
        let mut bench = Bench::new(2);
        bench.report(2, standby(2));
        bench.report(1, primary(1, 1));
        let traffic = TrafficSample { open: 1, ..TrafficSample::default() };
        Self {
            bench,
            kept: true,
            silent: false,
            new: None,
            traffic,
            promoted: false,
            asked: Vec::new(),
            suspended_at: None,
            ended_at: None,
            idle_asked: 0,
        }
    }

    fn run(&mut self, duration: Duration) {
        let until = self.bench.now + duration;
        while self.bench.now < until {
            self.look();
            let next = self.asked.iter().map(|asked| asked.0).chain(self.bench.topology.wake_at()).min();
            self.bench.now = next.unwrap_or(until).max(self.bench.now + ms(1)).min(until);
            let now = self.bench.now;
            for (_, server, beside, fresh) in self.asked.extract_if(.., |asked| asked.0 <= now).collect::<Vec<_>>() {
                self.answer(server, beside, fresh);
            }
        }
    }

    /// Passes a traffic sample, as the task does before each poll.
    fn look(&mut self) {
        self.bench.topology.traffic(self.bench.now, self.traffic);
        self.bench.poll();
        for action in std::mem::take(&mut self.bench.log) {
            match action {
                Action::AskIdle => self.idle_asked += 1,
                Action::Suspend { .. } => self.suspended_at = self.suspended_at.or(Some(self.bench.now)),
                Action::End { lost, .. } => {
                    self.ended_at = self.ended_at.or(Some(self.bench.now));
                    self.suspended_at = self.suspended_at.or(lost.then_some(self.bench.now));
                }
                Action::Probe { endpoint, fresh, beside, within, opened_within, .. } => {
                    let server = if endpoint.address == address(1) { 1 } else { 2 };
                    let new = fresh || (server == 1 && !self.kept && !beside);
                    let hangs = server == 1 && (self.silent || (new && self.new == Some(FailureKind::TimedOut)));
                    let takes = match (hangs, new) {
                        (true, true) => opened_within,
                        (true, false) if self.kept => within,
                        _ => ms(2),
                    };
                    self.asked.push((self.bench.now + takes, server, beside, new));
                }
                _ => {}
            }
        }
    }

    fn answer(&mut self, server: u8, beside: bool, fresh: bool) {
        let result = match server {
            2 if self.promoted => Ok(primary(2, 2)),
            2 => Ok(standby(2)),
            _ if fresh && self.new.is_some() => Err(failure(self.new.unwrap_or(FailureKind::TimedOut))),
            _ if !fresh && !self.kept => Err(failure(FailureKind::Unreachable)),
            _ if self.silent => Err(failure(FailureKind::TimedOut)),
            _ => Ok(primary(1, 1)),
        };
        let still_open = server == 2 || self.kept;
        let probed = Probed { address: address(server), result, fresh, still_open, beside };
        self.bench.topology.probed(self.bench.now, &probed);
    }
}

/// What can happen around a server that lives.
#[derive(Clone, Debug)]
enum Noise {
    /// From now on, new sessions fail in this way, or succeed.
    New(Option<FailureKind>),
    Suspect,
    /// Whether callers have connections checked out, and whether they receive answers.
    Use {
        in_use: bool,
        received: bool,
    },
    Wait(u64),
}

fn noise() -> impl Strategy<Value = Noise> {
    prop_oneof![
        prop::option::of(prop::sample::select(KINDS.to_vec())).prop_map(Noise::New),
        Just(Noise::Suspect),
        (any::<bool>(), any::<bool>()).prop_map(|(in_use, received)| Noise::Use { in_use, received }),
        (1..6000_u64).prop_map(Noise::Wait),
    ]
}

impl Stage {
    fn hear(&mut self, noise: &Noise) {
        match *noise {
            Noise::New(kind) => self.new = kind,
            Noise::Suspect => self.bench.topology.suspected(self.bench.now, GenerationId(1), Suspicion::Connection),
            Noise::Use { in_use, received } => {
                self.traffic = TrafficSample { in_use, received, moved: received, ..self.traffic }
            }
            Noise::Wait(milliseconds) => self.run(ms(milliseconds)),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// While the heartbeat's session answers, nothing is suspended and nothing ends, whatever happens to new sessions,
    /// and however often callers suspect the server.
    #[test]
    fn a_server_that_answers_on_an_open_session_is_never_left(noises in prop::collection::vec(noise(), 0..30)) {
        let mut stage = Stage::new();
        for noise in &noises {
            stage.hear(noise);
            stage.run(ms(1));
        }
        stage.run(ms(30_000));
        prop_assert_eq!((stage.suspended_at, stage.ended_at), (None, None));
        prop_assert_eq!(stage.bench.primary(), Some(1));
    }

    /// The heartbeat's session has ended or its question is held up, and no new session can be opened. Answers on the
    /// pool's sessions prove that the server lives.
    #[test]
    fn a_server_that_answers_the_pool_is_never_left(
        noises in prop::collection::vec(noise(), 0..30),
        kind in prop::sample::select(KINDS.to_vec()),
        held_up in any::<bool>(),
    ) {
        let mut stage = Stage::new();
        stage.traffic = TrafficSample { in_use: true, received: true, moved: true, open: 1, idle_asked: false };
        stage.new = Some(kind);
        // Either the heartbeat's question is held up, or its session has ended.
        (stage.kept, stage.silent) = (held_up, held_up);
        for noise in &noises {
            if !matches!(noise, Noise::New(_) | Noise::Use { .. }) {
                stage.hear(noise);
            }
            stage.run(ms(1));
        }
        stage.run(ms(30_000));
        prop_assert_eq!((stage.suspended_at, stage.ended_at), (None, None));
    }

    /// The opposite: whatever happened before, a server that dies is suspended within the usual time, its connections
    /// end after `dead_after`, and a successor is used as soon as it answers.
    #[test]
    fn a_server_that_dies_is_found_in_the_midst_of_it(
        noises in prop::collection::vec(noise(), 0..30),
        kind in prop::sample::select(KINDS.to_vec()),
        closes in any::<bool>(),
        in_use in any::<bool>(),
        successor in any::<bool>(),
    ) {
        let mut stage = Stage::new();
        for noise in &noises {
            stage.hear(noise);
            stage.run(ms(1));
        }
        let died = stage.bench.now;
        let open = usize::from(!closes);
        stage.traffic = TrafficSample { in_use, received: false, moved: false, open, idle_asked: false };
        if closes {
            let kind = if kind == FailureKind::Full { FailureKind::Unreachable } else { kind };
            (stage.kept, stage.new) = (false, Some(kind));
        } else {
            (stage.silent, stage.new) = (true, Some(FailureKind::TimedOut));
        }
        stage.bench.topology.suspected(died, GenerationId(1), Suspicion::Connection);
        stage.promoted = successor;
        stage.run(ms(60_000));
        let settings = settings();
        // The time until the next heartbeat, its time limit, and if sessions are closed, the time limit of a new one.
        let usual = settings.heartbeat + settings.heartbeat_timeout * 2 + settings.probe_timeout;
        let after = |at: Option<Instant>| at.map(|at| at.duration_since(died));
        let suspended = after(stage.suspended_at);
        prop_assert!(suspended.is_some_and(|took| took <= usual), "suspended after {suspended:?}");
        let ended = after(stage.ended_at);
        if successor {
            prop_assert!(ended.is_some_and(|took| took <= usual + ms(500)), "left after {ended:?}");
            prop_assert_eq!(stage.bench.primary(), Some(2));
        } else if closes && kind.is_an_answer() && kind != FailureKind::Full {
            // Something at this address answers that it accepts nobody. That is not silence.
        } else {
            let most = settings.dead_after + usual;
            prop_assert!(ended.is_some_and(|took| took <= most), "ended after {ended:?}");
        }
    }
}

#[test]
fn a_primary_that_takes_no_new_session_is_asked_on_the_one_that_is_kept() {
    let mut bench = Bench::settled();
    bench.wait(ms(500));
    bench.suspect(1);
    bench.log.clear();
    bench.answer(1, Err(failure(FailureKind::Unreachable)), true, true);
    assert_eq!((bench.primary(), bench.asked_fresh()), (Some(1), Some(false)), "at once, on the open session");
    // The heartbeat's session ends, and the pool has no other one. Now nothing shows that the server lives.
    bench.answer(1, Err(failure(FailureKind::Unreachable)), false, false);
    assert!(bench.asked_freshly(1));
    bench.answer(1, Err(failure(FailureKind::Unreachable)), true, false);
    assert_eq!(bench.primary(), None);
}

#[test]
fn the_session_of_a_suspended_primary_is_kept_and_asked() {
    let mut bench = Bench::settled();
    bench.wait(ms(1000));
    bench.log.clear();
    bench.answer(1, Err(failure(FailureKind::TimedOut)), false, true);
    assert_eq!(bench.primary(), None);
    assert!(bench.topology.keeps(&address(1)));
    bench.wait(ms(30));
    let asked = |fresh| {
        bench.log.iter().any(|action| match action {
            Action::Probe { endpoint, fresh: it, beside, .. } => {
                endpoint.address == address(1) && *it == fresh && *beside != fresh
            }
            _ => false,
        })
    };
    assert!(asked(true) && asked(false), "on a new session, which may lead to a successor, and on the one it has");
    let beside =
        Probed { address: address(1), result: Ok(primary(1, 1)), fresh: false, still_open: true, beside: true };
    bench.topology.probed(bench.now, &beside);
    bench.poll();
    assert_eq!((bench.primary(), bench.ended()), (Some(1), vec![]));
}

/// Opening a session takes three seconds. That is no reason to doubt a server that answers immediately on an open one.
#[test]
fn time_to_open_a_session_is_not_time_to_answer() {
    let mut bench = Bench::settled();
    bench.wait(ms(1000));
    bench.suspect(1);
    let limits = |bench: &Bench, wanted: bool| {
        bench.log.iter().rev().find_map(|action| match action {
            Action::Probe { endpoint, beside, within, opened_within, .. }
                if endpoint.address == address(1) && *beside == wanted =>
            {
                Some((*within, *opened_within))
            }
            _ => None,
        })
    };
    let settings = settings();
    let expected = Some((settings.heartbeat_timeout, settings.probe_timeout + settings.heartbeat_timeout));
    assert_eq!((limits(&bench, false), limits(&bench, true)), (expected, expected));
}

/// More than eight dead addresses are asked less often, and more than sixteen less often still.
#[test]
fn eight_dead_addresses_are_asked_as_often_as_one() {
    let asked = |dead: u8| {
        let mut bench = Bench::with(Settings { poll: (ms(20), ms(250)), ..settings() }, dead);
        bench.log.clear();
        for _ in 0..2000 {
            for n in 1..=dead {
                if bench.topology.members[&address(n)].asking {
                    bench.fail(n, FailureKind::Unreachable);
                }
            }
            bench.wait(ms(1));
        }
        bench.asked(1)
    };
    let (one, eight, nine, sixteen, seventeen) = (asked(1), asked(8), asked(9), asked(16), asked(17));
    assert!(eight * 10 >= one * 8, "{one} {eight}");
    assert!(nine * 10 <= eight * 7 && sixteen * 10 <= eight * 7, "{eight} {nine} {sixteen}");
    assert!(seventeen < sixteen, "{sixteen} {seventeen}");
}

/// The server got another address. It goes on running, but accepts new sessions only there.
#[test]
fn a_primary_that_takes_sessions_elsewhere_is_reached_there() {
    let mut bench = Bench::settled();
    bench.wait(ms(6000));
    bench.report(2, primary(1, 1));
    assert_eq!(bench.primary(), Some(1), "one server by two addresses");
    bench.suspect(1);
    bench.answer(1, Err(failure(FailureKind::Unreachable)), true, true);
    assert_eq!(bench.primary(), Some(1));
    bench.wait(ms(200));
    bench.report(2, primary(1, 1));
    assert_eq!((bench.primary(), bench.ended(), bench.topology.view().generation.get()), (Some(2), vec![], 1));
}

/// A proxy at the only address may connect new sessions to a successor, while the old session still reaches the old
/// primary.
#[test]
fn a_primary_without_others_in_sight_is_looked_at_by_a_new_session_each_patrol() {
    let fresh = |bench: &Bench| {
        let asks = |action: &&Action| matches!(action, Action::Probe { fresh: true, beside: true, .. });
        bench.log.iter().filter(asks).count()
    };
    let patrols = |bench: &mut Bench, seconds: u32| {
        bench.log.clear();
        for _ in 0..seconds * 10 {
            bench.wait(ms(100));
            if bench.topology.members[&address(1)].asking {
                bench.answer(1, Ok(primary(1, 1)), false, true);
            }
            if bench.topology.beside.asking {
                bench.answer(1, Ok(primary(1, 1)), true, true);
            }
        }
        fresh(bench)
    };
    let mut alone = Bench::new(1);
    alone.report(1, primary(1, 1));
    let seen = patrols(&mut alone, 30);
    assert!((5..=7).contains(&seen), "{seen} in thirty seconds");
    let mut settled = Bench::settled();
    let seen = patrols(&mut settled, 600);
    assert!((9..=11).contains(&seen), "{seen} in ten minutes: the standbys are in sight");
    let mut proxied = Bench::settled_with(Settings { proxied: true, ..settings() });
    let seen = patrols(&mut proxied, 30);
    assert!((5..=7).contains(&seen), "{seen} in thirty seconds behind a proxy");

    // A new session reaches a standby, which changes nothing. The next one reaches the new primary.
    alone.wait(ms(5000));
    alone.answer(1, Ok(standby(9)), true, true);
    assert_eq!((alone.primary(), alone.ended()), (Some(1), vec![]));
    alone.wait(ms(5000));
    alone.answer(1, Ok(primary(2, 2)), true, true);
    assert_eq!((alone.topology.view().generation.get(), alone.ended()), (2, vec![1]));
}

/// The heartbeat's session has died without a sign. But since the heartbeat was sent, the server has answered on
/// another session.
#[test]
fn a_server_that_answered_the_second_question_is_not_silent() {
    for (answer, lives) in [
        (Ok(primary(1, 1)), true),
        // On a new session, these failures need not be answers of the server itself.
        (Err(failure(FailureKind::Full)), false),
        (Err(failure(FailureKind::NotNow)), false),
        (Err(failure(FailureKind::Unreachable)), false),
        // Another server behind the same address answers.
        (Ok(standby(9)), false),
    ] {
        let mut bench = Bench::settled();
        bench.wait(ms(1000));
        bench.suspect(1);
        bench.wait(ms(500));
        bench.answer(1, answer.clone(), true, true);
        bench.wait(ms(1400));
        bench.answer(1, Err(failure(FailureKind::TimedOut)), false, true);
        assert_eq!(bench.primary(), lives.then_some(1), "{answer:?}");
        if lives {
            // If no other session is answered, the next silence counts.
            bench.wait(ms(1000));
            bench.answer(1, Err(failure(FailureKind::TimedOut)), false, true);
            assert_eq!(bench.primary(), None, "{answer:?}");
        }
    }
}

/// An answer that came before the heartbeat was sent does not count.
#[test]
fn an_earlier_answer_to_the_second_question_proves_nothing() {
    let mut bench = Bench::settled();
    bench.suspect(1);
    bench.wait(ms(100));
    bench.answer(1, Ok(primary(1, 1)), true, true);
    bench.wait(ms(1500));
    bench.answer(1, Err(failure(FailureKind::TimedOut)), false, true);
    assert_eq!(bench.primary(), None);
}

/// The heartbeat's question is held up, and callers sent nothing for a moment. Then one of them receives an answer.
#[test]
fn a_primary_that_was_suspended_for_silence_is_resumed_when_it_is_heard() {
    let heard = |bench: &mut Bench| {
        bench.now += ms(25);
        let sample = TrafficSample { in_use: true, moved: true, received: true, open: 1, idle_asked: false };
        bench.topology.traffic(bench.now, sample);
        bench.poll();
    };
    let mut bench = Bench::settled();
    bench.wait(ms(1000));
    bench.answer(1, Err(failure(FailureKind::TimedOut)), false, true);
    assert_eq!(bench.primary(), None);
    heard(&mut bench);
    assert_eq!((bench.primary(), bench.ended()), (Some(1), vec![]));
    // An answer to a caller does not resume a primary that was suspended because of its role.
    bench.topology.suspected(bench.now, GenerationId(1), Suspicion::ReadOnly);
    heard(&mut bench);
    assert_eq!(bench.primary(), None);
    // On a roaming pool, the answer may come from another server, so it proves nothing.
    let mut bench = Bench::roaming();
    bench.wait(ms(1000));
    bench.answer(1, Err(failure(FailureKind::TimedOut)), false, true);
    heard(&mut bench);
    assert_eq!(bench.primary(), None);
}
