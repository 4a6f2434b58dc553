//! Tests the topology under a virtual clock. This file has the bench that passes answers to it. Each subject has its
//! own file.

use std::net::SocketAddr;
use std::sync::Arc;

use super::*;

mod addresses;
mod clusters;
mod fence;
mod held;
mod lives;
mod paces;
mod partial;
mod pauses;
mod roaming;
mod scenarios;
mod search;
mod told;
mod untold;
mod world;

/// The kinds of failures that a probe may have.
pub(super) const KINDS: [FailureKind; 7] = [
    FailureKind::Unreachable,
    FailureKind::TimedOut,
    FailureKind::NotNow,
    FailureKind::Full,
    FailureKind::Refused,
    FailureKind::NotPostgres,
    FailureKind::Errored,
];

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

/// A topology, its clock, and all actions that it has returned.
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

    /// A pool with one address. Something behind that address chooses the server. At first it is server 1, the primary
    /// of timeline 1.
    fn roaming() -> Self {
        let mut bench = Self::with(Settings { roaming: true, ..settings() }, 1);
        bench.report(1, primary(1, 1));
        bench.log.clear();
        bench
    }

    /// Returns whether the last question was to use a new session.
    fn asked_fresh(&self) -> Option<bool> {
        self.log.iter().rev().find_map(|action| match action {
            Action::Probe { fresh, .. } => Some(*fresh),
            _ => None,
        })
    }

    /// Three members: server 1 is the primary of timeline 1, the others are standbys.
    fn settled() -> Self {
        Self::settled_with(settings())
    }

    fn settled_with(settings: Settings) -> Self {
        let mut bench = Self::with(settings, 3);
        bench.report(2, standby(2));
        bench.report(3, standby(3));
        bench.report(1, primary(1, 1));
        assert_eq!(bench.primary(), Some(1));
        bench.wait(ms(100));
        bench.report(1, primary(1, 1));
        bench.log.clear();
        bench
    }

    /// As [`Self::settled`], but the primary is no longer reachable.
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
        // The task also polls when something under way ends, which takes some seconds at most.
        let next = |bench: &Self| bench.topology.wake_at().unwrap_or(until + ms(1)).min(bench.now + ms(5000));
        while let Some(next) = Some(next(self)).filter(|at| *at <= until) {
            self.now = self.now.max(next);
            self.poll();
        }
        self.now = until;
        self.poll();
    }

    /// A connection is in use for this long. `heard`: data is received on it.
    fn work(&mut self, duration: Duration, heard: bool) {
        let until = self.now + duration;
        while self.now < until {
            self.now += ms(25);
            self.topology.traffic(
                self.now,
                TrafficSample { in_use: true, moved: heard, received: heard, open: 1, idle_asked: false },
            );
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

    /// The promotion wait of each question to server `n`.
    fn promotion_waits(&self, n: u8) -> Vec<Option<PromotionWait>> {
        let promotion_wait = |action: &Action| match action {
            Action::Probe { endpoint, promotion_wait, .. } if endpoint.address == address(n) => Some(*promotion_wait),
            _ => None,
        };
        self.log.iter().filter_map(promotion_wait).collect()
    }

    fn asked_freshly(&self, n: u8) -> bool {
        self.log.iter().any(
            |action| matches!(action, Action::Probe { endpoint, fresh: true, .. } if endpoint.address == address(n)),
        )
    }
}
