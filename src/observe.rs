//! Reports what happens. Each observation is one call, which writes the log line, sends the event and updates the
//! metrics.
//!
//! This module decides nothing. The caller decides what is worth a report. Invariants: a reader of events never holds
//! up the pool. The labels of a metric have few values, and none of them is an address or a secret. Without the feature
//! `metrics`, metrics cost nothing. Tests: `tests/it/observe/watch.rs`, `tests/dashboard.rs`.

mod event;
#[cfg(feature = "metrics")]
mod meters;
#[cfg(not(feature = "metrics"))]
#[path = "observe/no_meters.rs"]
mod meters;
mod operation;
mod stopwatch;

pub use event::{Event, Events, SettledOutcome};
pub(crate) use operation::{Operation, Timed};
pub(crate) use stopwatch::Stopwatch;

use std::fmt;
use std::panic::Location;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::broadcast;
use tracing::{Span, field};

use crate::classify::Verdict;
use crate::commit::Unsettled;
use crate::server::SessionEndListener;
use crate::sync::{lock, log_safely};
use crate::topology::{Address, CandidateReport, Endpoint, Eviction, GenerationId, Notice, Part, Primary, Refusal};
use meters::{Meters, StateGauge};

/// How many events a reader may be behind before it misses the oldest. A failover of a large pool makes fewer than
/// this.
const EVENTS: usize = 256;

/// The names of a pool in its reports.
#[derive(Clone, Debug)]
pub(crate) struct PoolNames {
    /// The name of the pool, in its metrics.
    pub(crate) pool: String,
    /// The name of the database, in its spans.
    pub(crate) database: String,
}

/// Reports what happens to one pool.
pub(crate) struct Observer {
    database: String,
    /// `None` after the pool was closed.
    events: Mutex<Option<broadcast::Sender<Event>>>,
    meters: Meters,
}

impl Observer {
    pub(crate) fn new(names: PoolNames) -> Self {
        let events = Mutex::new(Some(broadcast::Sender::new(EVENTS)));
        let meters = Meters::new(&names);
        Self { database: names.database, events, meters }
    }

    pub(crate) fn events(&self) -> Events {
        let sender = lock(&self.events);
        Events::new(sender.as_ref().map_or_else(|| broadcast::channel(1).1, broadcast::Sender::subscribe))
    }

    pub(crate) fn send(&self, event: Event) {
        if let Some(sender) = &*lock(&self.events) {
            // This fails if nobody listens, which does not matter.
            let _ = sender.send(event);
        }
    }

    /// Ends all reports, and takes back what the gauges show of this pool.
    pub(crate) fn closed(&self) {
        *lock(&self.events) = None;
        self.meters.closed();
    }
}

/// What the cluster reports. These calls return their events. The cluster sends them after it has published the state
/// that they are about.
impl Observer {
    /// Reports that a search begins. The span of the search ends with [`Observer::primary_found`].
    pub(crate) fn search(&self) -> Span {
        self.meters.searching();
        tracing::info_span!(
            "search",
            otel.name = "search for the primary",
            otel.kind = "internal",
            db.system.name = "postgresql",
            db.namespace = self.database,
            server.address = field::Empty,
            server.port = field::Empty,
            generation = field::Empty,
        )
    }

    #[must_use]
    pub(crate) fn primary_lost(&self, generation: GenerationId, endpoint: Endpoint, why: String) -> Event {
        tracing::warn!(
            generation = generation.get(),
            server.address = %Host(&endpoint.address),
            server.port = port(&endpoint.address),
            why,
            "primary lost"
        );
        self.meters.lost();
        Event::PrimaryLost { generation, endpoint, why }
    }

    #[must_use]
    pub(crate) fn primary_found(&self, search: Option<&Span>, primary: &Primary, took: Duration, same: bool) -> Event {
        let (generation, endpoint) = (primary.id, primary.endpoint.clone());
        if let Some(search) = search {
            search.record("server.address", field::display(Host(&endpoint.address)));
            search.record("server.port", port(&endpoint.address));
            search.record("generation", generation.get());
        }
        tracing::info!(
            generation = generation.get(),
            server.address = %Host(&endpoint.address),
            server.port = port(&endpoint.address),
            timeline = primary.report.timeline,
            elapsed_ms = milliseconds(took),
            "primary found{}",
            if same { ": the same server answers again" } else { "" }
        );
        self.meters.found(generation, took);
        Event::PrimaryFound { generation, endpoint, took, same_server: same }
    }

    #[must_use]
    pub(crate) fn evicted(&self, generation: GenerationId, cause: Eviction, connections: usize, why: String) -> Event {
        if connections == 0 {
            tracing::debug!(generation = generation.get(), %cause, why, "a generation without connections ended");
        } else {
            tracing::info!(generation = generation.get(), %cause, connections, why, "connections evicted");
        }
        self.meters.evicted(cause, connections);
        // A pool that falls asleep has lost nothing, and has no verified primary.
        if cause == Eviction::Asleep {
            self.meters.lost();
        }
        Event::Evicted { generation, cause, connections, why }
    }

    /// `said` returns what each candidate said last, and the failure of DNS.
    pub(crate) fn noticed(
        &self,
        notice: Notice,
        said: impl FnOnce() -> (Vec<CandidateReport>, Option<String>),
    ) -> Option<Event> {
        match notice {
            Notice::Refused(address, refusal) => self.refused(address, refusal),
            Notice::TwoPrimaries(address) => {
                tracing::warn!(
                    server.address = %Host(&address),
                    server.port = port(&address),
                    "a second server is writable on the timeline of the primary; the one in use is kept"
                );
                Some(Event::SecondPrimary { address })
            }
            Notice::Withheld(address, parts) => {
                let grants: Vec<&str> = parts.iter().map(Part::grant).collect();
                tracing::warn!(
                    server.address = %Host(&address),
                    server.port = port(&address),
                    withheld = %parts,
                    "the server keeps from this role what the pool asks it for, and the pool does without: {}",
                    grants.join("; ")
                );
                None
            }
            Notice::StillSearching(lasted) => {
                let (candidates, dns_failure) = said();
                let answers: Vec<String> = candidates.iter().map(ToString::to_string).collect();
                let dns = dns_failure.as_deref();
                tracing::warn!(elapsed_ms = milliseconds(lasted), dns, "no primary yet: {}", answers.join("; "));
                Some(Event::SearchSlow { lasted, candidates, dns_failure })
            }
            Notice::TooManyCandidates(most) => {
                tracing::warn!(
                    "there are more than {most} addresses; {most} are asked at a time, and the rest in turn"
                );
                None
            }
            Notice::ClusterAccepted { before, accepted } => {
                tracing::warn!(before, accepted, "this pool belongs to another cluster from now on");
                Some(Event::ClusterAccepted { before, accepted })
            }
        }
    }

    fn refused(&self, address: Address, refusal: Refusal) -> Option<Event> {
        tracing::warn!(
            server.address = %Host(&address),
            server.port = port(&address),
            reason = field::display(refusal),
            "server refused"
        );
        self.meters.refused(refusal);
        match refusal {
            Refusal::Fenced => Some(Event::Fenced { address }),
            Refusal::Zombie { timeline, newest } => Some(Event::ZombieRefused { address, timeline, newest }),
            Refusal::OtherCluster { expected, found } => Some(Event::StrangerRefused { address, expected, found }),
            _ => None,
        }
    }
}

/// What the pool reports.
impl Observer {
    pub(crate) fn sized(&self, max: usize, min_idle: usize) {
        self.meters.sized(max, min_idle);
    }

    /// Reports that a caller waits for a connection, until the returned guard is dropped.
    pub(crate) fn waits(&self) -> Waits<'_> {
        self.meters.waits();
        Waits { observer: self, since: Stopwatch::start() }
    }

    /// Reports a caller that waited long for its connection. `untold`: how many such callers were not reported since
    /// the last report.
    pub(crate) fn slow_checkout(&self, waited: Duration, untold: u64, place: &'static Location<'static>) {
        let elapsed_ms = milliseconds(waited);
        log_safely(|| {
            tracing::warn!(elapsed_ms, untold, taken_at = %place, "a caller waited long for a connection");
        });
        self.send(Event::SlowCheckout { waited, place });
    }

    /// Reports a connection that is still checked out.
    pub(crate) fn long_checkout(&self, held: Duration, place: &'static Location<'static>) {
        let elapsed_ms = milliseconds(held);
        log_safely(
            || tracing::warn!(elapsed_ms, taken_at = %place, "a connection is checked out for long; is it leaked?"),
        );
        self.send(Event::LongCheckout { held, place });
    }

    /// Reports that such a connection came back.
    pub(crate) fn long_checkout_ended(held: Duration, place: &'static Location<'static>) {
        tracing::info!(
            elapsed_ms = milliseconds(held),
            taken_at = %place,
            "a connection that was checked out for long came back"
        );
    }

    /// Reports that a session was opened for the pool.
    pub(crate) fn opened(&self, took: Duration) {
        log_safely(|| self.meters.opened(took));
    }

    /// Reports one connection of a generation, for as long as its session lives.
    pub(crate) fn connection(self: &Arc<Self>, open: &Tally, address: Address) -> Arc<Watched> {
        open.0.fetch_add(1, Ordering::Relaxed);
        Arc::new(Watched { observer: Arc::clone(self), open: open.clone(), place: StateGauge::new(), address })
    }
}

/// What transactions report.
impl Observer {
    pub(crate) fn transaction(&self, mode: &dyn fmt::Debug) -> Span {
        tracing::info_span!(
            "transaction",
            otel.kind = "client",
            otel.status_code = field::Empty,
            db.system.name = "postgresql",
            db.namespace = self.database,
            db.response.status_code = field::Empty,
            server.address = field::Empty,
            server.port = field::Empty,
            error.r#type = field::Empty,
            mode = ?mode,
            attempts = field::Empty,
        )
    }

    /// `transaction` is the span of the call, in which the server of its last attempt is recorded.
    pub(crate) fn attempt(transaction: &Span, number: u32, generation: GenerationId, on: &Watched) -> Span {
        let address = &on.address;
        if !transaction.is_disabled() {
            transaction.record("attempts", number);
            transaction.record("server.address", field::display(Host(address)));
            transaction.record("server.port", port(address));
        }
        tracing::debug_span!(
            "attempt",
            number,
            generation = generation.get(),
            server.address = %Host(address),
            server.port = port(address),
        )
    }

    /// `code` is the SQLSTATE, if the database answered with one. `kind` is the name of an error without a code.
    pub(crate) fn transaction_failed(transaction: &Span, code: Option<&str>, kind: &str) {
        if let Some(code) = code {
            transaction.record("db.response.status_code", code);
        }
        transaction.record("error.type", code.unwrap_or(kind));
        transaction.record("otel.status_code", "ERROR");
    }

    pub(crate) fn runs_again(&self, attempt: u32, verdict: Verdict, delay: Duration, error: &dyn fmt::Display) {
        tracing::debug!(attempt, ?verdict, ?delay, "the transaction runs again: {error}");
        self.meters.rerun(verdict);
    }

    /// Reports what became of a COMMIT without an answer, as far as the pool could find out.
    pub(crate) fn settled(&self, generation: GenerationId, outcome: SettledOutcome, took: Duration) {
        let (generation_number, elapsed_ms) = (generation.get(), milliseconds(took));
        if let SettledOutcome::Unknown(why) = outcome {
            tracing::warn!(generation = generation_number, elapsed_ms, %why, "the outcome of a commit is not known");
        } else {
            tracing::info!(
                generation = generation_number,
                elapsed_ms,
                ?outcome,
                "a commit without an answer was settled"
            );
        }
        self.meters.settled(outcome);
        self.send(Event::CommitSettled { generation, outcome, took });
    }

    /// Reports a COMMIT without an answer about which no server was asked.
    pub(crate) fn not_settled(&self, generation: GenerationId) {
        self.settled(generation, SettledOutcome::Unknown(Unsettled::NoMark), Duration::ZERO);
    }
}

/// A caller that waits for a connection. If it is dropped without a call of `ended` or `timed_out`, the caller gave up.
pub(crate) struct Waits<'a> {
    observer: &'a Observer,
    since: Stopwatch,
}

impl Waits<'_> {
    pub(crate) fn ended<T, E>(self, checkout: &Result<T, E>) {
        if checkout.is_ok() {
            self.observer.meters.waited(&self.since);
        }
    }

    pub(crate) fn timed_out(self) {
        self.observer.meters.timed_out();
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.observer.meters.waits_no_more();
    }
}

/// How many connections of one generation are open.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally(Arc<AtomicUsize>);

impl Tally {
    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// One connection that is counted in the gauges of idle and used connections, until its session has ended.
pub(crate) struct Watched {
    observer: Arc<Observer>,
    open: Tally,
    place: StateGauge,
    address: Address,
}

impl Watched {
    /// Counts the open connection as idle. No caller has used it yet.
    pub(crate) fn ready(&self) {
        log_safely(|| self.place.idle(&self.observer.meters));
    }

    pub(crate) fn checked_out(&self) -> Stopwatch {
        self.place.used(&self.observer.meters);
        Stopwatch::start()
    }

    #[cfg_attr(
        not(feature = "metrics"),
        expect(clippy::trivially_copy_pass_by_ref, reason = "with metrics it holds a time")
    )]
    pub(crate) fn given_back(&self, checked_out: &Stopwatch) {
        self.observer.meters.used(checked_out);
        self.place.idle(&self.observer.meters);
    }

    /// Stops counting the connection, although its session goes on.
    #[cfg_attr(
        not(feature = "metrics"),
        expect(clippy::trivially_copy_pass_by_ref, reason = "with metrics it holds a time")
    )]
    pub(crate) fn detached(&self, checked_out: &Stopwatch) {
        self.observer.meters.used(checked_out);
        self.place.left(&self.observer.meters);
    }
}

impl SessionEndListener for Arc<Watched> {
    fn session_ended(&self, lost: bool) {
        self.open.0.fetch_sub(1, Ordering::Relaxed);
        log_safely(|| self.place.left(&self.observer.meters));
        if lost {
            log_safely(|| self.observer.meters.connection_lost());
        }
    }
}

/// The address without its port, because OpenTelemetry has a separate field for the port.
struct Host<'a>(&'a Address);

impl fmt::Display for Host<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Address::Tcp(address) => address.ip().fmt(f),
            #[cfg(unix)]
            Address::Unix(folder, _) => folder.display().fmt(f),
            Address::Wrapped => self.0.fmt(f),
        }
    }
}

/// The port, or `None` for the connection of a wrapped pool, whose manager alone knows where it connects to. The field
/// is left out then.
fn port(address: &Address) -> Option<u16> {
    match address {
        Address::Tcp(address) => Some(address.port()),
        #[cfg(unix)]
        Address::Unix(_, port) => Some(*port),
        Address::Wrapped => None,
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observer() -> Observer {
        Observer::new(PoolNames { pool: "test".to_owned(), database: "app".to_owned() })
    }

    fn settled_in(event: Option<Event>) -> u64 {
        match event {
            Some(Event::CommitSettled { generation, .. }) => generation.get(),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_slow_reader_misses_the_oldest_and_is_told_how_many() {
        let observer = observer();
        let (mut slow, mut quick) = (observer.events(), observer.events());
        let sent = u64::try_from(EVENTS).unwrap() + 44;
        for number in 1..=sent {
            observer.settled(GenerationId(number), SettledOutcome::Committed, Duration::ZERO);
            assert_eq!(settled_in(quick.next().await), number);
        }
        assert!(matches!(slow.next().await, Some(Event::Missed { events: 44 })));
        for number in 45..=sent {
            assert_eq!(settled_in(slow.next().await), number);
        }
        observer.settled(GenerationId(1), SettledOutcome::Committed, Duration::ZERO);
        observer.closed();
        assert_eq!(settled_in(slow.next().await), 1, "what was said before the end is still heard");
        assert!(slow.next().await.is_none());
        assert!(slow.next().await.is_none(), "the end stays the end");
        assert!(observer.events().next().await.is_none());
    }

    /// Dropping the future of `next`, as `select!` does all the time, loses no event.
    #[tokio::test]
    async fn a_dropped_wait_loses_nothing() {
        let observer = observer();
        let mut events = observer.events();
        for number in 1..=3 {
            assert!(futures_util::FutureExt::now_or_never(events.next()).is_none());
            observer.settled(GenerationId(number), SettledOutcome::NotCommitted, Duration::ZERO);
            assert_eq!(settled_in(events.next().await), number);
        }
    }
}
