//! The one task that owns a [`Topology`]: it resolves, probes, heart-beats and publishes what came of it.
//!
//! Decides nothing: each answer goes into the topology, each action that comes out is carried out. Knows nothing of
//! pools and transactions; they read the published [`Snapshot`] and may cast suspicion. Invariants: a snapshot with the
//! newer generation is published before the older generation's scope ends; no lock is held across an await; the task
//! and all that it started end when the last [`Cluster`] is dropped. Tests: `tests/it/`.

use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{Instrument, Span};

use crate::observe::{self, Events, Observer, Tally};
use crate::resolve::{Addresses, Resolve, ResolveError};
use crate::server::{Open, Opened, Session, SessionClient};
use crate::sync::lock;
use crate::topology::{
    Accept, Action, Address, Answer, CandidateReport, Change, Endpoint, FailureKind, GenerationId, NameAnswer, Primary,
    ProbeFailure, Probed, Pulse, Question, ServerReport, Settings, State, Suspicion, Topology, View, Vigil,
};

/// A look-up that takes longer is given up; the resolver's own limit is shorter.
const RESOLVE_WITHIN: Duration = Duration::from_secs(10);

/// The task goes on after a panic, and does not spin where one follows on the other.
const AFTER_A_PANIC: Duration = Duration::from_millis(100);

/// A name of the configuration, with its port.
#[derive(Clone, Debug)]
pub(crate) struct Name {
    pub(crate) host: Arc<str>,
    pub(crate) port: u16,
}

impl Name {
    fn endpoints(&self, addresses: &Addresses) -> Vec<Endpoint> {
        let address = |ip| Address::Tcp((ip, self.port).into());
        let endpoint = |ip| Endpoint { host: Some(Arc::clone(&self.host)), address: address(ip) };
        addresses.iter().map(endpoint).collect()
    }
}

/// What the task needs to begin.
pub(crate) struct Setup<C> {
    pub(crate) settings: Settings,
    pub(crate) names: Vec<Name>,
    pub(crate) configured: Vec<Endpoint>,
    pub(crate) resolver: Arc<dyn Resolve>,
    pub(crate) opener: Arc<dyn Open<C>>,
    /// How many sessions of one generation may be opened at the same time.
    pub(crate) gate: usize,
    pub(crate) seed: u64,
    pub(crate) observer: Arc<Observer>,
    /// Without a caller for so long, nothing is open and nothing asked.
    pub(crate) sleep_after: Option<Duration>,
}

/// One primary as the pool uses it: the plain data and what hangs on it.
pub(crate) struct Generation<C> {
    pub(crate) primary: Primary,
    /// What its server tells of itself since it may be known by that: not when the generation began.
    pub(crate) learned: Arc<OnceLock<ServerReport>>,
    pub(crate) began: Instant,
    /// Where new sessions go: the primary's address, until the same server was found again at another one.
    endpoint: Mutex<Endpoint>,
    /// Every session of the generation ends with it.
    pub(crate) scope: CancellationToken,
    /// New sessions pass here, so that a server that was just promoted meets a trickle.
    pub(crate) gate: Semaphore,
    /// The pool's connections of this generation.
    pub(crate) open: Tally,
    /// The session that proved the server to be the primary, until somebody takes it.
    spare: Mutex<Option<Session<C>>>,
    /// Why the last session could not be opened, and how many in a row could not.
    trouble: Mutex<(Option<ProbeFailure>, u32)>,
}

impl<C: SessionClient> Generation<C> {
    pub(crate) fn endpoint(&self) -> Endpoint {
        lock(&self.endpoint).clone()
    }

    pub(crate) fn take_spare(&self) -> Option<Session<C>> {
        lock(&self.spare).take().filter(|session| !session.client.is_closed())
    }

    pub(crate) fn opened(&self) {
        *lock(&self.trouble) = (None, 0);
    }

    /// Returns how many tries had failed in a row before this one.
    pub(crate) fn not_opened(&self, failure: ProbeFailure) -> u32 {
        let mut trouble = lock(&self.trouble);
        let failures = trouble.1;
        *trouble = (Some(failure), failures.saturating_add(1));
        failures
    }

    pub(crate) fn trouble(&self) -> Option<ProbeFailure> {
        lock(&self.trouble).0.clone()
    }
}

/// What the task publishes: the view, and the generation that connections may be handed out of.
pub(crate) struct Snapshot<C> {
    pub(crate) view: View,
    /// Set exactly while the view's state is [`State::Primary`].
    pub(crate) generation: Option<Arc<Generation<C>>>,
    /// When the question was sent whose answer says that waiting is no use, where the view says so.
    refused_as_of: Option<Instant>,
}

/// What the candidates said last, for whoever has to explain a failure.
#[derive(Clone, Debug, Default)]
pub(crate) struct Diagnosis {
    pub(crate) candidates: Vec<CandidateReport>,
    pub(crate) dns: Option<String>,
    /// Servers that are not asked now, as there are more than are asked at the same time.
    pub(crate) waiting: usize,
}

/// Why there is no primary to be had, now or ever.
#[derive(Debug)]
pub(crate) enum NoPrimary {
    Closed,
    /// The runtime of the cluster's task has ended, and the task with it.
    RuntimeEnded,
    Refused(Option<Endpoint>, ProbeFailure),
    /// Nobody knows an address.
    UnknownName(Duration, Diagnosis),
}

/// Signals to the task; they are coalesced and never acknowledged.
#[derive(Default)]
struct Signals {
    suspicion: Option<(GenerationId, Suspicion)>,
    demand: bool,
    accept: Option<Accept>,
    log_in_refused: bool,
}

#[derive(Default)]
struct Shared {
    signals: Mutex<Signals>,
    wake: Notify,
    diagnosis: Mutex<Diagnosis>,
    /// From when on a log-in that will most likely be refused may be tried.
    log_in_at: Mutex<Option<Instant>>,
    /// The number of the snapshot's generation, 0 without one. Every checkout reads it, and a lock that many share, be it
    /// for reading, costs more than the rest of a checkout.
    current: AtomicU64,
    closed: AtomicBool,
    /// The task ended without being told to.
    runtime_ended: AtomicBool,
    /// Connections on loan.
    in_use: AtomicUsize,
    /// Answers of the newest generation's server, as callers told of them.
    heard: AtomicU64,
    /// The number of the newest generation.
    newest: AtomicU64,
    /// The number of the newest generation that has ended, 0 before.
    ended: AtomicU64,
    /// The task looks often enough to notice when they fall silent.
    listening: AtomicBool,
    /// A connection was lent after a silence.
    lent: AtomicBool,
    /// Callers and sessions that need a primary, beside the connections on loan.
    wanting: AtomicUsize,
    asleep: AtomicBool,
}

/// Somebody needs a primary for as long as this lives: the task does not fall asleep.
pub(crate) struct Wanting(Arc<Shared>);

impl Drop for Wanting {
    fn drop(&mut self) {
        self.0.wanting.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A handle to the task. The task ends with its last handle.
pub(crate) struct Cluster<C> {
    snapshot: watch::Receiver<Arc<Snapshot<C>>>,
    view: watch::Receiver<View>,
    shared: Arc<Shared>,
    root: CancellationToken,
    observer: Arc<Observer>,
    _end: DropGuard,
}

impl<C: SessionClient> Cluster<C> {
    /// Starts the task on the runtime of the caller.
    pub(crate) fn start(setup: Setup<C>) -> Self {
        let now = Instant::now();
        let root = CancellationToken::new();
        let shared = Arc::new(Shared::default());
        let topology = Topology::new(setup.settings, setup.configured, setup.names.len(), setup.seed, now);
        let first = topology.view();
        let (view_tx, view) = watch::channel(first.clone());
        let (snapshot_tx, snapshot) =
            watch::channel(Arc::new(Snapshot { view: first, generation: None, refused_as_of: None }));
        let observer = setup.observer;
        let task = Task {
            revision: topology.revision(),
            refused_as_of: None,
            topology,
            names: setup.names,
            resolver: setup.resolver,
            opener: setup.opener,
            gate: setup.gate,
            root: root.clone(),
            shared: Arc::clone(&shared),
            sessions: HashMap::new(),
            under_way: HashSet::new(),
            work: FuturesUnordered::new(),
            generation: None,
            live: false,
            ended: Vec::new(),
            news: Vec::new(),
            snapshot: snapshot_tx,
            view: view_tx,
            search: Some(observer.search()),
            observer: Arc::clone(&observer),
            searching_since: now,
            stirs: 0,
            heard: 0,
            sleep_after: setup.sleep_after,
            used_at: now,
        };
        tokio::spawn(task.run());
        Self { snapshot, view, shared, observer, _end: root.clone().drop_guard(), root }
    }

    /// Somebody needs a primary: wakes the task, and keeps it awake.
    pub(crate) fn want(&self) -> Wanting {
        // Either the task sees this before it falls asleep, or this sees it asleep.
        self.shared.wanting.fetch_add(1, Ordering::SeqCst);
        if self.shared.asleep.load(Ordering::SeqCst) {
            self.shared.wake.notify_one();
        }
        Wanting(Arc::clone(&self.shared))
    }

    /// The current generation, waiting for one. Cancel-safe.
    pub(crate) async fn primary(&self) -> Result<Arc<Generation<C>>, NoPrimary> {
        if let Some(generation) = self.current() {
            return Ok(generation);
        }
        let _wanting = self.want();
        let mut snapshot = self.snapshot.clone();
        let began = Instant::now();
        // What was said before this call may be so no longer: it is asked anew first.
        let mut old_word = snapshot.borrow().refused_as_of.is_some();
        loop {
            {
                let now = snapshot.borrow_and_update();
                match (&now.view.state, &now.generation) {
                    (_, Some(generation)) => return Ok(Arc::clone(generation)),
                    (State::Closed, None) => return Err(self.ended()),
                    (State::Searching { refused: Some(failure) }, None) => {
                        if !old_word || now.refused_as_of >= Some(began) {
                            return Err(self.refused(failure, began));
                        }
                        self.demand();
                    }
                    _ => old_word = false,
                }
            }
            if snapshot.changed().await.is_err() {
                return Err(self.ended());
            }
        }
    }

    fn refused(&self, failure: &ProbeFailure, began: Instant) -> NoPrimary {
        match failure.kind {
            FailureKind::UnknownName => NoPrimary::UnknownName(began.elapsed(), self.diagnosis()),
            _ => NoPrimary::Refused(self.endpoint_of(failure), failure.clone()),
        }
    }

    /// The current generation, if there is one now.
    pub(crate) fn current(&self) -> Option<Arc<Generation<C>>> {
        self.snapshot.borrow().generation.clone()
    }

    /// Is there a current generation now?
    pub(crate) fn has_primary(&self) -> bool {
        self.shared.current.load(Ordering::Acquire) != GenerationId::default().get()
    }

    pub(crate) fn is_current(&self, id: GenerationId) -> bool {
        self.has_primary() && self.shared.current.load(Ordering::Acquire) == id.get()
    }

    /// Has generation `id` ended for good? Its sessions may be closing still. Whoever sees a view sees this as well.
    pub(crate) fn has_ended(&self, id: GenerationId) -> bool {
        self.shared.ended.load(Ordering::Acquire) >= id.get()
    }

    /// Waits until generation `id` is no longer the current one. Cancel-safe.
    pub(crate) async fn left(&self, id: GenerationId) {
        let current = |snapshot: &Arc<Snapshot<C>>| {
            snapshot.generation.as_ref().is_some_and(|generation| generation.primary.id == id)
        };
        // An error means that the task has ended, and no generation is current any more.
        let _ = self.snapshot.clone().wait_for(|snapshot| !current(snapshot)).await;
    }

    /// Casts doubt on the primary of generation `id`; the task looks into it. Never waits.
    pub(crate) fn suspect(&self, id: GenerationId, suspicion: Suspicion) {
        {
            let mut signals = lock(&self.shared.signals);
            let stronger = match &signals.suspicion {
                Some((held, Suspicion::ReadOnly)) => id > *held,
                Some((held, Suspicion::Connection)) => id >= *held,
                None => true,
            };
            if stronger {
                signals.suspicion = Some((id, suspicion));
            }
        }
        self.shared.wake.notify_one();
    }

    /// A connection is given on loan: from now on the task notices when its server falls silent.
    pub(crate) fn lend(&self) {
        // All orderings are the strongest, as they are in `Task::feel`: either the task sees the loan, or it is woken.
        self.shared.in_use.fetch_add(1, Ordering::SeqCst);
        // It listens already, mostly, and to read is cheaper than to write what others read.
        if !self.shared.listening.load(Ordering::SeqCst) && !self.shared.listening.swap(true, Ordering::SeqCst) {
            self.shared.lent.store(true, Ordering::SeqCst);
            self.shared.wake.notify_one();
        }
    }

    /// A connection on loan was given back.
    pub(crate) fn returned(&self) {
        self.shared.in_use.fetch_sub(1, Ordering::Relaxed);
    }

    /// The server of generation `id` has answered on one of its sessions: it lives. The driver does not tell what is received
    /// and what is sent, so those who wait for an answer do.
    pub(crate) fn heard(&self, id: GenerationId) {
        if self.shared.newest.load(Ordering::Relaxed) == id.get() {
            self.shared.heard.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn view(&self) -> View {
        self.view.borrow().clone()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<View> {
        self.view.clone()
    }

    pub(crate) fn subscribe(&self) -> Events {
        self.observer.events()
    }

    pub(crate) fn observer(&self) -> &Arc<Observer> {
        &self.observer
    }

    pub(crate) fn diagnosis(&self) -> Diagnosis {
        lock(&self.shared.diagnosis).clone()
    }

    /// Who failed so.
    fn endpoint_of(&self, failure: &ProbeFailure) -> Option<Endpoint> {
        let diagnosis = lock(&self.shared.diagnosis);
        let said =
            |candidate: &&CandidateReport| matches!(&candidate.answer, Some(Answer::Failed(it)) if it == failure);
        diagnosis.candidates.iter().find(said).map(|candidate| candidate.endpoint.clone())
    }

    /// Why the cluster's task has ended, once it has.
    pub(crate) fn ended(&self) -> NoPrimary {
        if self.shared.runtime_ended.load(Ordering::Acquire) { NoPrimary::RuntimeEnded } else { NoPrimary::Closed }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Acquire)
    }

    /// Ends with the cluster: for work that must not outlive it.
    pub(crate) fn scope(&self) -> &CancellationToken {
        &self.root
    }

    /// Ends the task, every generation and every session.
    pub(crate) fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
        self.root.cancel();
    }

    fn demand(&self) {
        lock(&self.shared.signals).demand = true;
        self.shared.wake.notify_one();
    }

    /// Tells which cluster is the pool's own from now on.
    pub(crate) fn accept(&self, accepted: Accept) {
        lock(&self.shared.signals).accept = Some(accepted);
        self.shared.wake.notify_one();
    }

    /// A log-in was refused: all of this pool count, whoever tried.
    pub(crate) fn log_in_refused(&self) {
        lock(&self.shared.signals).log_in_refused = true;
        self.shared.wake.notify_one();
    }

    /// From when on a log-in that will most likely be refused may be tried.
    pub(crate) fn log_in_at(&self) -> Option<Instant> {
        *lock(&self.shared.log_in_at)
    }
}

enum Event<C> {
    Resolved { name: usize, answer: NameAnswer },
    Opened { endpoint: Endpoint, beside: bool, fresh: bool, result: Opened<C> },
    Asked { endpoint: Endpoint, session: Session<C>, beside: bool, result: Result<ServerReport, ProbeFailure> },
}

/// How one server is asked.
#[derive(Clone, Copy)]
struct Asks {
    fresh: bool,
    beside: bool,
    vigil: Option<Vigil>,
    within: Duration,
}

struct Task<C: SessionClient> {
    topology: Topology,
    revision: u64,
    refused_as_of: Option<Instant>,
    names: Vec<Name>,
    resolver: Arc<dyn Resolve>,
    opener: Arc<dyn Open<C>>,
    gate: usize,
    root: CancellationToken,
    shared: Arc<Shared>,
    /// Sessions kept for the next question to their server.
    sessions: HashMap<Address, Session<C>>,
    /// Servers whose kept session is being asked.
    under_way: HashSet<Address>,
    work: FuturesUnordered<BoxFuture<'static, Event<C>>>,
    /// The newest generation until it ends; published only while `live`.
    generation: Option<Arc<Generation<C>>>,
    live: bool,
    /// Scopes to end once the newer state is published.
    ended: Vec<CancellationToken>,
    /// Events to send once the state that they tell of is published.
    news: Vec<observe::Event>,
    snapshot: watch::Sender<Arc<Snapshot<C>>>,
    view: watch::Sender<View>,
    observer: Arc<Observer>,
    search: Option<Span>,
    searching_since: Instant,
    /// The opener's count of stirs at the last look, and the answers that callers told of.
    stirs: u64,
    heard: u64,
    sleep_after: Option<Duration>,
    /// Somebody needed a primary then.
    used_at: Instant,
}

impl<C: SessionClient> Task<C> {
    async fn run(mut self) {
        // What a program plugs in may panic here: a subscriber of `tracing`, a recorder of `metrics`. That costs one step.
        loop {
            match AssertUnwindSafe(self.step()).catch_unwind().await {
                Ok(true) => {}
                Ok(false) => return,
                Err(_) => sleep(AFTER_A_PANIC).await,
            }
        }
    }

    /// Returns whether there is a next step.
    async fn step(&mut self) -> bool {
        {
            let now = Instant::now();
            let pulse = self.feel();
            if !self.is_awake(now, pulse) {
                self.publish();
                tokio::select! {
                    biased;
                    () = self.root.cancelled() => return false,
                    () = self.shared.wake.notified() => return true,
                }
            }
            self.topology.pulse(now, pulse);
            for action in self.topology.poll(now) {
                self.act(action);
            }
            let topology = &self.topology;
            self.sessions.retain(|address, _| topology.keeps(address));
            self.publish();
            let bedtime = self.sleep_after.map(|after| self.used_at + after);
            let wake_at = self.topology.wake_at().into_iter().chain(bedtime).min();
            tokio::select! {
                biased;
                () = self.root.cancelled() => return false,
                Some(event) = self.work.next() => self.happened(event),
                () = self.shared.wake.notified() => self.signalled(),
                () = sleep_until(wake_at.unwrap_or_else(Instant::now)), if wake_at.is_some() => {}
            }
        }
        true
    }

    /// Does anybody need a primary, or has lately? Falls asleep and wakes up.
    fn is_awake(&mut self, now: Instant, pulse: Pulse) -> bool {
        let Some(after) = self.sleep_after else { return true };
        let lent = self.shared.lent.swap(false, Ordering::SeqCst);
        let wanted = || self.shared.wanting.load(Ordering::SeqCst) > 0;
        if self.shared.asleep.load(Ordering::SeqCst) {
            // What was asked for before the sleep is of no interest any more.
            *lock(&self.shared.signals) = Signals::default();
            if !wanted() {
                return false;
            }
            self.shared.asleep.store(false, Ordering::SeqCst);
            (self.used_at, self.searching_since) = (now, now);
            self.search = Some(self.observer.search());
            self.topology.wake(now);
            return true;
        }
        if pulse.in_use || pulse.moved || lent || wanted() {
            self.used_at = now;
            return true;
        }
        if now < self.used_at + after {
            return true;
        }
        self.shared.asleep.store(true, Ordering::SeqCst);
        if wanted() {
            self.shared.asleep.store(false, Ordering::SeqCst);
            return true;
        }
        self.fall_asleep(now, after);
        false
    }

    /// Closes everything, and forgets what is under way.
    fn fall_asleep(&mut self, now: Instant, after: Duration) {
        self.topology.sleep(now, &format!("asleep: nobody asked for a connection for {after:?}"));
        for action in self.topology.lie_down() {
            self.act(action);
        }
        (self.live, self.search) = (false, None);
        self.sessions.clear();
        self.under_way.clear();
        self.work.clear();
    }

    /// What the sessions did since the last look.
    fn feel(&mut self) -> Pulse {
        let stirs = self.opener.stirs();
        let moved = std::mem::replace(&mut self.stirs, stirs) != stirs;
        self.shared.listening.store(moved, Ordering::SeqCst);
        let in_use = self.shared.in_use.load(Ordering::SeqCst) > 0;
        if in_use {
            self.shared.listening.store(true, Ordering::SeqCst);
        }
        // Where the sessions are driven elsewhere, nobody tells when they end.
        let generation = self.generation.as_ref().filter(|_| self.opener.drives());
        let open = generation.map_or(0, |generation| generation.open.count());
        let heard = self.shared.heard.load(Ordering::Relaxed);
        let received = std::mem::replace(&mut self.heard, heard) != heard;
        Pulse { in_use, moved, received, open }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Resolve(name) => self.resolve(name),
            Action::Probe { endpoint, fresh, beside, vigil, within, opened_within } => {
                let kept = if fresh { None } else { self.kept(&endpoint.address) };
                let within = if kept.is_some() { within } else { opened_within };
                let asked = self.probe(endpoint, kept, Asks { fresh, beside, vigil, within });
                self.work.push(asked);
            }
            Action::Suspend { why } => self.lost(why),
            Action::Resume { primary, lost_for } => {
                if let Some(generation) = &self.generation {
                    *lock(&generation.endpoint) = primary.endpoint.clone();
                }
                self.found(&primary, lost_for, true);
            }
            Action::Learned { report } => {
                if let Some(generation) = self.generation.as_ref().filter(|_| report.is_identified()) {
                    // What is known of one life does not change.
                    let _ = generation.learned.set(report);
                }
            }
            Action::Move { endpoint } => {
                tracing::info!("new sessions to the primary go to {endpoint}");
                if let Some(generation) = &self.generation {
                    *lock(&generation.endpoint) = endpoint;
                }
            }
            Action::End { id, cause, why, lost } => {
                if lost {
                    self.lost(why.clone());
                }
                self.shared.ended.fetch_max(id.get(), Ordering::AcqRel);
                if let Some(generation) = self.generation.take() {
                    self.news.push(self.observer.evicted(id, cause, generation.open.count(), why));
                    self.ended.push(generation.scope.clone());
                }
            }
            Action::Begin { primary, lost_for } => self.begin(primary, lost_for),
            Action::Notice(notice) => {
                let topology = &self.topology;
                let said = || (topology.candidates(), topology.dns_failure());
                self.news.extend(self.observer.noticed(notice, said));
            }
        }
    }

    fn lost(&mut self, why: String) {
        self.live = false;
        self.search = Some(self.observer.search());
        self.searching_since = Instant::now();
        if let Some(generation) = &self.generation {
            self.news.push(self.observer.primary_lost(generation.primary.id, generation.endpoint(), why));
        }
    }

    fn found(&mut self, primary: &Primary, took: Duration, same_server: bool) {
        self.live = true;
        let search = self.search.take();
        self.news.push(self.observer.primary_found(search.as_ref(), primary, took, same_server));
    }

    fn begin(&mut self, primary: Primary, lost_for: Option<Duration>) {
        let took = lost_for.unwrap_or_else(|| self.searching_since.elapsed());
        self.found(&primary, took, false);
        self.shared.newest.store(primary.id.get(), Ordering::Relaxed);
        // Where the next session may lead elsewhere, the heart-beat keeps the one that is known to lead to the primary.
        let spare = if self.topology.roams() { None } else { self.sessions.remove(&primary.endpoint.address) };
        // A pooler may lead the older generation's session to the new primary: that one ends with its generation.
        let ends = |scope: &CancellationToken| scope.is_cancelled() || self.ended.contains(scope);
        let spare = spare.filter(|session| !ends(&session.scope));
        let scope = spare.as_ref().map_or_else(|| self.root.child_token(), |session| session.scope.clone());
        self.generation = Some(Arc::new(Generation {
            endpoint: Mutex::new(primary.endpoint.clone()),
            primary,
            learned: Arc::default(),
            began: Instant::now(),
            scope,
            gate: Semaphore::new(self.gate),
            open: Tally::default(),
            spare: Mutex::new(spare),
            trouble: Mutex::default(),
        }));
    }

    fn resolve(&self, index: usize) {
        let Some(name) = self.names.get(index).cloned() else {
            return;
        };
        let resolver = Arc::clone(&self.resolver);
        let resolve = async move {
            let answer = match look_up(&*resolver, &name.host).await {
                Ok(addresses) if addresses.is_empty() => NameAnswer::Unknown(format!("{} has no address", name.host)),
                Ok(addresses) => NameAnswer::Addresses {
                    partial: addresses.partial().map(ToString::to_string),
                    endpoints: name.endpoints(&addresses),
                },
                Err(error) if error.is_answer() => NameAnswer::Unknown(error.to_string()),
                Err(error) => NameAnswer::Failed(error.to_string()),
            };
            Event::Resolved { name: index, answer }
        };
        self.work.push(Box::pin(resolve.instrument(self.span())));
    }

    /// The session that is kept for questions to this server, if it is open. The one that proved the primary and that nobody
    /// has taken is as good: an idle pool has one session.
    fn kept(&mut self, address: &Address) -> Option<Session<C>> {
        let kept = self.sessions.remove(address).filter(|session| !session.client.is_closed());
        kept.or_else(|| {
            let generation =
                self.generation.as_ref().filter(|generation| self.live && generation.endpoint().address == *address);
            generation.and_then(|generation| generation.take_spare())
        })
    }

    fn probe(&mut self, endpoint: Endpoint, kept: Option<Session<C>>, asks: Asks) -> BoxFuture<'static, Event<C>> {
        let Asks { fresh, beside, vigil, within } = asks;
        let opener = Arc::clone(&self.opener);
        let scope = self.root.child_token();
        let span = self.span();
        if kept.is_some() {
            self.under_way.insert(endpoint.address.clone());
        }
        let ask = async move {
            let silent = || ProbeFailure::new(FailureKind::TimedOut, format!("no answer within {within:?}"));
            match kept {
                Some(session) => {
                    let answer = timeout(within, opener.ask(&endpoint.address, &session.client, vigil)).await;
                    let result = answer.unwrap_or_else(|_| Err(silent()));
                    Event::Asked { endpoint, session, beside, result }
                }
                None if beside && !fresh => {
                    let result = Err(ProbeFailure::new(FailureKind::Unreachable, "no session is open"));
                    Event::Opened { endpoint, beside, fresh, result }
                }
                None => {
                    let answer = timeout(within, opener.open(&endpoint, Question::Candidate, scope)).await;
                    Event::Opened { endpoint, beside, fresh: true, result: answer.unwrap_or_else(|_| Err(silent())) }
                }
            }
        };
        Box::pin(ask.instrument(span))
    }

    fn happened(&mut self, event: Event<C>) {
        let now = Instant::now();
        match event {
            Event::Resolved { name, answer } => {
                if let NameAnswer::Unknown(failure) | NameAnswer::Failed(failure) = &answer {
                    tracing::debug!("{failure}");
                }
                self.topology.resolved(now, name, answer);
            }
            Event::Opened { endpoint, beside, fresh, result } => {
                let address = endpoint.address;
                let still_open = self.is_open(&address);
                let result = result.map(|(session, report)| {
                    if !self.topology.strayed(&address, &report) {
                        self.sessions.insert(address.clone(), session);
                    }
                    report
                });
                self.topology.probed(now, &Probed { address, result, fresh, still_open, beside });
            }
            Event::Asked { endpoint, session, beside, result } => {
                let address = endpoint.address;
                self.under_way.remove(&address);
                // A question that was not answered in time may be answered yet: on the primary's session, that is a sign.
                let good = !session.client.is_closed() && (result.is_ok() || self.topology.holds(&address));
                // One that was opened meanwhile is newer.
                if good && !self.is_open(&address) {
                    self.sessions.insert(address.clone(), session);
                }
                let still_open = self.is_open(&address);
                self.topology.probed(now, &Probed { address, result, fresh: false, still_open, beside });
            }
        }
        *lock(&self.shared.diagnosis) = Diagnosis {
            candidates: self.topology.candidates(),
            dns: self.topology.dns_failure(),
            waiting: self.topology.waiting(),
        };
    }

    /// Is a session to this server open that questions may be asked on, or is one being asked?
    fn is_open(&self, address: &Address) -> bool {
        self.under_way.contains(address)
            || self.sessions.get(address).is_some_and(|session| !session.client.is_closed())
    }

    fn signalled(&mut self) {
        let signals = std::mem::take(&mut *lock(&self.shared.signals));
        let now = Instant::now();
        if let Some((id, suspicion)) = signals.suspicion {
            tracing::debug!(generation = id.get(), ?suspicion, "primary suspected");
            self.topology.suspected(now, id, suspicion);
        }
        if let Some(accepted) = signals.accept {
            self.topology.accept(now, accepted);
        }
        if signals.log_in_refused {
            self.topology.log_in_refused(now);
        }
        if signals.demand {
            self.topology.demanded(now);
        }
    }

    /// Publishes first; tells of it and ends the older generation afterwards: whoever hears of a change or loses a connection
    /// finds the newer state.
    fn publish(&mut self) {
        *lock(&self.shared.log_in_at) = Some(self.topology.log_in_at());
        let refused_as_of = std::mem::replace(&mut self.refused_as_of, self.topology.refused_as_of());
        if self.revision != self.topology.revision() {
            self.revision = self.topology.revision();
            self.send(self.topology.view());
        } else if refused_as_of != self.refused_as_of {
            // The same again, told to a newer question: of interest to those who wait, and to nobody else.
            self.send_snapshot(self.topology.view());
        }
        for event in self.news.drain(..) {
            self.observer.send(event);
        }
        for scope in self.ended.drain(..) {
            scope.cancel();
        }
    }

    fn send(&self, view: View) {
        // The view first: whoever was given a connection finds its primary in the status.
        self.view.send_replace(view.clone());
        self.send_snapshot(view);
    }

    fn send_snapshot(&self, view: View) {
        let generation = self.generation.clone().filter(|_| self.live);
        let current = generation.as_ref().map_or_else(GenerationId::default, |generation| generation.primary.id);
        // Before the snapshot: whoever that wakes finds the same in here.
        self.shared.current.store(current.get(), Ordering::Release);
        self.snapshot.send_replace(Arc::new(Snapshot { view, generation, refused_as_of: self.refused_as_of }));
    }

    fn span(&self) -> Span {
        self.search.clone().unwrap_or_else(Span::none)
    }
}

/// However the task ends (closed, a panic in a user's connector, the end of its runtime), nothing is handed out afterwards.
impl<C: SessionClient> Drop for Task<C> {
    fn drop(&mut self) {
        self.live = false;
        let told = self.root.is_cancelled();
        self.shared.runtime_ended.store(!told, Ordering::Release);
        let why = if told { "the pool was closed" } else { "the tokio runtime that the pool was built on has ended" };
        let changed = Change { at: Instant::now(), why: why.to_owned() };
        self.send(View { state: State::Closed, changed, ..self.topology.view() });
        self.observer.closed();
        self.shared.closed.store(true, Ordering::Release);
        self.root.cancel();
    }
}

/// One look-up by a resolver that may be the user's own: it may take too long, and a panic in it costs this one answer.
async fn look_up(resolver: &dyn Resolve, host: &str) -> Result<Addresses, ResolveError> {
    let answer = AssertUnwindSafe(async { resolver.resolve(host).await }).catch_unwind();
    match timeout(RESOLVE_WITHIN, answer).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) => Err(ResolveError::custom(host, "the resolver panicked")),
        Err(_) => Err(ResolveError::custom(host, format!("the resolver gave no answer within {RESOLVE_WITHIN:?}"))),
    }
}
