//! Random histories of a small world of servers, under a virtual clock.

use proptest::prelude::*;

use super::*;

/// One step of a history. It changes what the servers of the world answer to the topology.
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

    /// In any history, the published timeline and the generation never go back. A generation ends at most once, and
    /// before a later one begins. No server is asked twice at the same time. In the end, the newest writable primary is
    /// in use, or none if there is none.
    #[test]
    fn any_history_ends_on_the_newest_primary(commands in prop::collection::vec(command(), 0..40)) {
        let started = |started| {
            let primary = started == 1;
            Server { up: true, frozen: false, fenced: false, primary, timeline: 1, started }
        };
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
        // The pool is right to use no primary if it has seen a newer timeline whose server has died.
        prop_assert_eq!(used, best.filter(|timeline| Some(*timeline) >= bench.topology.newest_timeline));
    }
}

/// Checks what must be true at every step, and holds the probes that are under way.
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
        // In this world, no session is kept.
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
