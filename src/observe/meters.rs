//! The metrics of a pool, which go through the `metrics` facade. They have OpenTelemetry's names for the pools of
//! database clients, and similar names for the failover. docs/metrics.md explains each one.
//!
//! Each metric is looked up once, when the pool is built. After that, an update costs a few atomic operations.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use metrics::{
    Counter, Gauge, Histogram, Label, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge,
    histogram,
};

use super::operation::{Failure, OPERATIONS, Operation};
use super::{PoolNames, SettledOutcome, Stopwatch};
use crate::classify::Verdict;
use crate::topology::{Eviction, GenerationId, Refusal};

const POOL: &str = "db.client.connection.pool.name";
const STATE: &str = "db.client.connection.state";
const CAUSE: &str = "cause";
const OUTCOME: &str = "outcome";

const OPERATION_DURATION: &str = "db.client.operation.duration";
const SYSTEM: &str = "db.system.name";
const NAMESPACE: &str = "db.namespace";
const OPERATION: &str = "db.operation.name";
const STATUS_CODE: &str = "db.response.status_code";
const ERROR_TYPE: &str = "error.type";
const COUNT: &str = "db.client.connection.count";
const IDLE_MAX: &str = "db.client.connection.idle.max";
const IDLE_MIN: &str = "db.client.connection.idle.min";
const MAX: &str = "db.client.connection.max";
const PENDING: &str = "db.client.connection.pending_requests";
const TIMEOUTS: &str = "db.client.connection.timeouts";
const CREATE_TIME: &str = "db.client.connection.create_time";
const WAIT_TIME: &str = "db.client.connection.wait_time";
const USE_TIME: &str = "db.client.connection.use_time";
const SEARCHES: &str = "db.client.failover.searches";
const SEARCH_DURATION: &str = "db.client.failover.search.duration";
const PRIMARY: &str = "db.client.failover.primary";
const GENERATION: &str = "db.client.failover.generation";
const EVICTIONS: &str = "db.client.failover.evictions";
const LOST: &str = "db.client.failover.connections_lost";
const REFUSED: &str = "db.client.failover.servers_refused";
const RERUNS: &str = "db.client.failover.reruns";
const SETTLED: &str = "db.client.failover.commits_settled";

fn describe() {
    describe_histogram!(OPERATION_DURATION, Unit::Seconds, "Duration of calls and statements, from the caller's side.");
    describe_gauge!(COUNT, Unit::Count, "Connections that are open now, by state: idle or used.");
    describe_gauge!(IDLE_MAX, Unit::Count, "The most connections that may be idle.");
    describe_gauge!(IDLE_MIN, Unit::Count, "Idle connections that are left open however long they have been idle.");
    describe_gauge!(MAX, Unit::Count, "The most connections that are handed out at the same time.");
    describe_gauge!(PENDING, Unit::Count, "Callers that wait for a connection now.");
    describe_counter!(TIMEOUTS, Unit::Count, "Callers that got no connection before their deadline.");
    describe_histogram!(CREATE_TIME, Unit::Seconds, "Time to open and verify a connection.");
    describe_histogram!(WAIT_TIME, Unit::Seconds, "Time from asking for a connection to having it.");
    describe_histogram!(USE_TIME, Unit::Seconds, "Time between getting a connection and giving it back.");
    describe_counter!(SEARCHES, Unit::Count, "Searches for the primary that began, the pool's first included.");
    describe_histogram!(SEARCH_DURATION, Unit::Seconds, "Time from losing the primary to having a verified one.");
    describe_gauge!(PRIMARY, Unit::Count, "1 while there is a verified primary, else 0.");
    describe_gauge!(GENERATION, Unit::Count, "The number of the newest generation: primaries found so far.");
    describe_counter!(EVICTIONS, Unit::Count, "Open connections closed because their generation ended, by cause.");
    describe_counter!(LOST, Unit::Count, "Connections that the server or the network ended.");
    describe_counter!(REFUSED, Unit::Count, "Servers that were refused as the primary, by cause.");
    describe_counter!(RERUNS, Unit::Count, "Transactions that ran again, by cause.");
    describe_counter!(SETTLED, Unit::Count, "COMMITs without an answer, by what became of them.");
}

pub(super) struct Meters {
    operations: Operations,
    idle: Gauge,
    used: Gauge,
    idle_max: Gauge,
    idle_min: Gauge,
    max: Gauge,
    pending: Gauge,
    timeouts: Counter,
    create_time: Histogram,
    wait_time: Histogram,
    use_time: Histogram,
    searches: Counter,
    search_duration: Histogram,
    primary: Gauge,
    generation: Gauge,
    evictions: Evictions,
    connections_lost: Counter,
    refused: RefusedServers,
    reruns: Reruns,
    settled: SettleCounters,
    /// Whether there is a verified primary.
    found: AtomicBool,
    /// What this pool has added to the gauges of its sizes: `max` and `min_idle`.
    sizes: (AtomicUsize, AtomicUsize),
}

/// How long operations take. The conventions want labels for a failed one that others do not have.
struct Operations {
    /// The labels of all of them.
    common: Vec<Label>,
    /// Those that succeeded, in the order of [`OPERATIONS`].
    succeeded: [Histogram; OPERATIONS.len()],
}

impl Operations {
    fn new(names: &PoolNames) -> Self {
        let mut common = vec![Label::new(POOL, names.pool.clone()), Label::from_static_parts(SYSTEM, "postgresql")];
        // Only the manager of a wrapped pool knows its database.
        if !names.database.is_empty() {
            common.push(Label::new(NAMESPACE, names.database.clone()));
        }
        let succeeded = OPERATIONS.map(|(_, name)| Self::timed(&common, name, None));
        Self { common, succeeded }
    }

    fn timed(common: &[Label], operation: &'static str, failure: Option<&Failure<'_>>) -> Histogram {
        let mut labels = common.to_vec();
        labels.push(Label::from_static_parts(OPERATION, operation));
        if let Some(Failure { code, kind }) = failure {
            labels.push(Label::new(ERROR_TYPE, code.unwrap_or(kind).to_owned()));
            labels.extend(code.map(|code| Label::new(STATUS_CODE, code.to_owned())));
        }
        histogram!(OPERATION_DURATION, labels)
    }
}

struct Evictions {
    replaced: Counter,
    demoted: Counter,
    fenced: Counter,
    silent: Counter,
    asleep: Counter,
}

struct RefusedServers {
    zombie: Counter,
    fenced: Counter,
    other_cluster: Counter,
}

struct Reruns {
    connection_lost: Counter,
    not_now: Counter,
    full: Counter,
    read_only: Counter,
    conflict: Counter,
    stale: Counter,
    outcome_unknown: Counter,
}

struct SettleCounters {
    committed: Counter,
    not_committed: Counter,
    unknown: Counter,
}

impl Meters {
    pub(super) fn new(names: &PoolNames) -> Self {
        describe();
        let pool = names.pool.clone();
        let counted = |name: &'static str| counter!(name, POOL => pool.clone());
        let counted_by =
            |name: &'static str, label, value: &'static str| counter!(name, POOL => pool.clone(), label => value);
        let shown = |name: &'static str| gauge!(name, POOL => pool.clone());
        let connections = |state: &'static str| gauge!(COUNT, POOL => pool.clone(), STATE => state);
        let timed = |name: &'static str| histogram!(name, POOL => pool.clone());
        Self {
            operations: Operations::new(names),
            idle: connections("idle"),
            used: connections("used"),
            idle_max: shown(IDLE_MAX),
            idle_min: shown(IDLE_MIN),
            max: shown(MAX),
            pending: shown(PENDING),
            timeouts: counted(TIMEOUTS),
            create_time: timed(CREATE_TIME),
            wait_time: timed(WAIT_TIME),
            use_time: timed(USE_TIME),
            searches: counted(SEARCHES),
            search_duration: timed(SEARCH_DURATION),
            primary: shown(PRIMARY),
            generation: shown(GENERATION),
            evictions: Evictions {
                replaced: counted_by(EVICTIONS, CAUSE, "replaced"),
                demoted: counted_by(EVICTIONS, CAUSE, "demoted"),
                fenced: counted_by(EVICTIONS, CAUSE, "fenced"),
                silent: counted_by(EVICTIONS, CAUSE, "silent"),
                asleep: counted_by(EVICTIONS, CAUSE, "asleep"),
            },
            connections_lost: counted(LOST),
            refused: RefusedServers {
                zombie: counted_by(REFUSED, CAUSE, "zombie"),
                fenced: counted_by(REFUSED, CAUSE, "fenced"),
                other_cluster: counted_by(REFUSED, CAUSE, "other_cluster"),
            },
            reruns: Reruns {
                connection_lost: counted_by(RERUNS, CAUSE, "connection_lost"),
                not_now: counted_by(RERUNS, CAUSE, "not_now"),
                full: counted_by(RERUNS, CAUSE, "full"),
                read_only: counted_by(RERUNS, CAUSE, "read_only"),
                conflict: counted_by(RERUNS, CAUSE, "conflict"),
                stale: counted_by(RERUNS, CAUSE, "stale_statement"),
                outcome_unknown: counted_by(RERUNS, CAUSE, "outcome_unknown"),
            },
            settled: SettleCounters {
                committed: counted_by(SETTLED, OUTCOME, "committed"),
                not_committed: counted_by(SETTLED, OUTCOME, "not_committed"),
                unknown: counted_by(SETTLED, OUTCOME, "unknown"),
            },
            found: AtomicBool::new(false),
            sizes: Default::default(),
        }
    }

    pub(super) fn operation(&self, operation: Operation, took: Duration, failure: Option<&Failure<'_>>) {
        let of = |(_, (known, _)): &(usize, &(Operation, _))| *known == operation;
        let Some((index, (_, name))) = OPERATIONS.iter().enumerate().find(of) else { return };
        match failure {
            None => self.operations.succeeded[index].record(took),
            Some(_) => Operations::timed(&self.operations.common, name, failure).record(took),
        }
    }

    /// Changes the gauges by increments, like all gauges here, so that the metrics of two pools with the same name add
    /// up.
    pub(super) fn sized(&self, max: usize, min_idle: usize) {
        let before = (self.sizes.0.swap(max, Ordering::Relaxed), self.sizes.1.swap(min_idle, Ordering::Relaxed));
        for gauge in [&self.max, &self.idle_max] {
            gauge.increment(number(max) - number(before.0));
        }
        self.idle_min.increment(number(min_idle) - number(before.1));
    }

    /// Subtracts this pool from the gauges. The gauges of connections and callers are not among them, because each
    /// connection and each caller subtracts itself when it ends.
    pub(super) fn closed(&self) {
        self.lost();
        self.sized(0, 0);
        self.generation.set(0.0);
    }

    pub(super) fn searching(&self) {
        self.searches.increment(1);
    }

    pub(super) fn lost(&self) {
        if self.found.swap(false, Ordering::Relaxed) {
            self.primary.decrement(1.0);
        }
    }

    pub(super) fn found(&self, generation: GenerationId, took: Duration) {
        if !self.found.swap(true, Ordering::Relaxed) {
            self.primary.increment(1.0);
        }
        // The number stays exact for more primaries than any cluster will have.
        self.generation.set(f64::from(u32::try_from(generation.get()).unwrap_or(u32::MAX)));
        self.search_duration.record(took);
    }

    pub(super) fn evicted(&self, cause: Eviction, connections: usize) {
        let counter = match cause {
            Eviction::Replaced => &self.evictions.replaced,
            Eviction::Demoted => &self.evictions.demoted,
            Eviction::Fenced => &self.evictions.fenced,
            Eviction::Silent => &self.evictions.silent,
            Eviction::Asleep => &self.evictions.asleep,
        };
        counter.increment(connections.try_into().unwrap_or(u64::MAX));
    }

    pub(super) fn refused(&self, refusal: Refusal) {
        match refusal {
            Refusal::Zombie { .. } => self.refused.zombie.increment(1),
            Refusal::Fenced => self.refused.fenced.increment(1),
            Refusal::OtherCluster { .. } => self.refused.other_cluster.increment(1),
            // These are standbys and others that are not reported.
            _ => {}
        }
    }

    pub(super) fn connection_lost(&self) {
        self.connections_lost.increment(1);
    }

    pub(super) fn waits(&self) {
        self.pending.increment(1.0);
    }

    pub(super) fn waits_no_more(&self) {
        self.pending.decrement(1.0);
    }

    pub(super) fn waited(&self, since: &Stopwatch) {
        self.wait_time.record(since.elapsed());
    }

    pub(super) fn timed_out(&self) {
        self.timeouts.increment(1);
    }

    pub(super) fn opened(&self, took: Duration) {
        self.create_time.record(took);
    }

    pub(super) fn used(&self, checked_out: &Stopwatch) {
        self.use_time.record(checked_out.elapsed());
    }

    pub(super) fn rerun(&self, verdict: Verdict) {
        let counter = match verdict {
            Verdict::ConnectionLost => &self.reruns.connection_lost,
            Verdict::NotNow => &self.reruns.not_now,
            Verdict::Full => &self.reruns.full,
            Verdict::ReadOnly => &self.reruns.read_only,
            Verdict::Conflict => &self.reruns.conflict,
            Verdict::Stale => &self.reruns.stale,
            // The others cause a re-run only if they were the answer to the COMMIT of idempotent work.
            Verdict::OutcomeUnknown
            | Verdict::Aborted
            | Verdict::Refused
            | Verdict::NotPostgres
            | Verdict::Application => &self.reruns.outcome_unknown,
        };
        counter.increment(1);
    }

    pub(super) fn settled(&self, outcome: SettledOutcome) {
        let counter = match outcome {
            SettledOutcome::Committed => &self.settled.committed,
            SettledOutcome::NotCommitted => &self.settled.not_committed,
            SettledOutcome::Unknown(_) => &self.settled.unknown,
        };
        counter.increment(1);
    }
}

fn number(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

const NEW: u8 = 0;
const IDLE: u8 = 1;
const USED: u8 = 2;
const LEFT: u8 = 3;

/// The gauge that counts a connection: idle or used, or none before it is ready and after its end.
pub(super) struct StateGauge(AtomicU8);

impl StateGauge {
    pub(super) fn new() -> Self {
        Self(AtomicU8::new(NEW))
    }

    pub(super) fn used(&self, meters: &Meters) {
        self.moves(USED, meters);
    }

    pub(super) fn idle(&self, meters: &Meters) {
        self.moves(IDLE, meters);
    }

    pub(super) fn left(&self, meters: &Meters) {
        self.moves(LEFT, meters);
    }

    /// Moves the connection from one gauge to the other. Its session may end while it is given back, in either order,
    /// so a connection that has left stays away.
    fn moves(&self, to: u8, meters: &Meters) {
        let stays = |from| (from != LEFT).then_some(to);
        let Ok(from) = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, stays) else {
            return;
        };
        if let Some(gauge) = meters.gauge_of(from) {
            gauge.decrement(1.0);
        }
        if let Some(gauge) = meters.gauge_of(to) {
            gauge.increment(1.0);
        }
    }
}

impl Meters {
    fn gauge_of(&self, place: u8) -> Option<&Gauge> {
        match place {
            IDLE => Some(&self.idle),
            USED => Some(&self.used),
            _ => None,
        }
    }
}
