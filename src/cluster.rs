//! The task that owns a [`Topology`](crate::topology::Topology): it resolves names, probes servers, sends heartbeats
//! and publishes the result. This file has the handle to the task, `task.rs` the task itself, `work.rs` what the task
//! waits for, and `kept.rs` the sessions that it keeps.
//!
//! The task passes each answer to the topology, and carries out each action that the topology returns. It knows nothing
//! of pools and transactions. They read the published [`Snapshot`], and may report a suspicion. Invariants: a snapshot
//! with the newer generation is published before the older generation's scope ends; no lock is held across an await;
//! the task and all that it started end when the last [`Cluster`] is dropped. The tests are in `tests/it/`.

mod kept;
mod scopes;
mod snapshot;
mod task;
mod work;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::observe::{Events, Observer, Tally};
use crate::resolve::{Addresses, Resolve};
use crate::server::{Heard, Notices, Open, Scope, Session, SessionClient};
use crate::sync::lock;
use crate::topology::{
    Accept, Address, Answer, CandidateReport, Endpoint, FailureKind, GenerationId, Primary, ProbeFailure, RefusedLogIn,
    ServerReport, Settings, State, Suspicion, View,
};
pub(crate) use snapshot::Snapshot;
use task::Task;

/// On so many idle sessions the primary is asked at the same time at most.
const MOST_IDLE_QUESTIONS: usize = 8;

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

/// What the task needs to start.
pub(crate) struct Setup<C> {
    pub(crate) settings: Settings,
    pub(crate) names: Vec<Name>,
    pub(crate) configured: Vec<Endpoint>,
    pub(crate) resolver: Arc<dyn Resolve>,
    pub(crate) opener: Arc<dyn Open<C>>,
    /// The most sessions of one generation that may be opened at the same time.
    pub(crate) gate: usize,
    pub(crate) seed: u64,
    pub(crate) observer: Arc<Observer>,
    /// The task falls asleep after this time without a caller: it closes all sessions and asks no server.
    pub(crate) sleep_after: Option<Duration>,
}

/// One generation: its primary, and what the pool needs to use it.
pub(crate) struct Generation<C> {
    pub(crate) primary: Primary,
    /// The server's report, if it could be fully identified only after the generation began.
    pub(crate) learned: Arc<OnceLock<ServerReport>>,
    pub(crate) began: Instant,
    /// The address for new sessions: the primary's first address, or another one at which the same server was found
    /// later.
    endpoint: Mutex<Endpoint>,
    /// Every session of the generation ends with this scope.
    pub(crate) scope: Scope,
    /// Limits how many sessions are opened at the same time, so that a newly promoted server is not flooded.
    pub(crate) gate: Semaphore,
    /// Limits as much how many new connections meet the user's hook at the same time. That may take longer than a
    /// log-in, so it holds up nothing else that goes through `gate`.
    pub(crate) greetings: Semaphore,
    /// The pool's connections of this generation.
    pub(crate) open: Tally,
    /// Whether a session of this generation has received a sign of the server's life.
    heard: Heard,
    /// The session that proved the server to be the primary, until it is taken.
    spare: Mutex<Option<Session<C>>>,
    /// Why the last session could not be opened, and how many failed in a row.
    trouble: Mutex<(Option<ProbeFailure>, u32)>,
}

impl<C: SessionClient> Generation<C> {
    pub(crate) fn endpoint(&self) -> Endpoint {
        lock(&self.endpoint).clone()
    }

    pub(crate) fn take_spare(&self) -> Option<Session<C>> {
        let spare = lock(&self.spare).take().filter(|session| !session.client.is_closed());
        spare.inspect(|session| self.listen_to(&session.notices))
    }

    /// From now on, data that this session receives counts as a sign that the generation's server lives.
    pub(crate) fn listen_to(&self, notices: &Notices) {
        notices.activity.tell(&self.heard);
    }

    /// Notes that a session was opened, so the server has just answered.
    pub(crate) fn opened(&self) {
        *lock(&self.trouble) = (None, 0);
        self.heard.note();
    }

    /// Notes a failure to open a session, and returns how many attempts had failed in a row before this one.
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

/// The candidates' last answers, which explain a failure.
#[derive(Clone, Debug, Default)]
pub(crate) struct Diagnosis {
    pub(crate) candidates: Vec<CandidateReport>,
    pub(crate) dns: Option<String>,
    /// The number of servers that wait for their turn, because only a limited number is asked at the same time.
    pub(crate) waiting: usize,
}

/// Why there is no primary, and why waiting does not help.
#[derive(Debug)]
pub(crate) enum NoPrimary {
    Closed,
    /// The runtime of the cluster's task has ended, and the task with it.
    RuntimeEnded,
    Refused(Option<Endpoint>, ProbeFailure),
    /// No name server knows an address.
    UnknownName(Duration, Diagnosis),
}

/// Signals to the task. Several signals of one kind become one, and the task acknowledges none.
#[derive(Default)]
struct Signals {
    suspicion: Option<(GenerationId, Suspicion)>,
    demand: bool,
    accept: Option<Accept>,
    refused: Vec<RefusedLogIn>,
}

#[derive(Default)]
struct Shared {
    signals: Mutex<Signals>,
    wake: Notify,
    diagnosis: Mutex<Diagnosis>,
    /// The earliest time for the next log-in that will most likely be refused.
    log_in_at: Mutex<Option<Instant>>,
    /// The number of the snapshot's generation, or 0 if there is none. Every checkout reads it. Even a read lock that
    /// many threads share would cost more than the rest of a checkout.
    current: AtomicU64,
    closed: AtomicBool,
    /// The task has ended, but nobody has closed the pool.
    runtime_ended: AtomicBool,
    /// The number of connections checked out.
    in_use: AtomicUsize,
    /// The number of answers from the newest generation's server on sessions that this crate does not drive.
    heard: AtomicU64,
    /// The number of the newest generation.
    newest: AtomicU64,
    /// The number of the newest generation that has ended, or 0 before the first end.
    ended: AtomicU64,
    /// The task samples the traffic so often that it notices when the sessions checked out fall silent.
    listening: AtomicBool,
    /// A connection was lent while the task was not listening.
    checked_out: AtomicBool,
    /// The number of callers and sessions that need a primary. Connections checked out are not counted here.
    wanting: AtomicUsize,
    asleep: AtomicBool,
    /// Asks the pool to ask the primary on an idle session.
    ask_idle: Arc<Notify>,
    /// The number of such questions that are under way.
    idle_asked: AtomicUsize,
    /// How many of them were begun. `idle_answered` is the number of the latest one that was answered.
    idle_begun: AtomicU64,
    idle_answered: AtomicU64,
}

/// While this exists, the primary is being asked on an idle session of the pool.
pub(crate) struct IdleQuestion {
    shared: Arc<Shared>,
    number: u64,
}

impl IdleQuestion {
    /// The primary has answered, which the task is to learn now.
    pub(crate) fn answered(&self) {
        self.shared.idle_answered.fetch_max(self.number, Ordering::AcqRel);
        self.shared.wake.notify_one();
    }

    /// Returns whether a question that was begun later has been answered.
    pub(crate) fn is_outrun(&self) -> bool {
        self.shared.idle_answered.load(Ordering::Acquire) > self.number
    }
}

impl Drop for IdleQuestion {
    fn drop(&mut self) {
        self.shared.idle_asked.fetch_sub(1, Ordering::AcqRel);
    }
}

/// While this exists, something needs a primary, so the task does not fall asleep.
pub(crate) struct PrimaryDemand(Arc<Shared>);

impl Drop for PrimaryDemand {
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
        let root = CancellationToken::new();
        let shared = Arc::new(Shared::default());
        let observer = Arc::clone(&setup.observer);
        let (task, view, snapshot) = Task::new(setup, Arc::clone(&shared), root.clone());
        tokio::spawn(task.run());
        Self { snapshot, view, shared, observer, _end: root.clone().drop_guard(), root }
    }

    /// Registers that a primary is needed. This wakes the task, and keeps it awake.
    pub(crate) fn want(&self) -> PrimaryDemand {
        // Either the task sees this count before it falls asleep, or this call sees that it is asleep.
        self.shared.wanting.fetch_add(1, Ordering::SeqCst);
        if self.shared.asleep.load(Ordering::SeqCst) {
            self.shared.wake.notify_one();
        }
        PrimaryDemand(Arc::clone(&self.shared))
    }

    /// Returns the current generation. If there is none, waits for one. Cancel-safe.
    pub(crate) async fn primary(&self) -> Result<Arc<Generation<C>>, NoPrimary> {
        if let Some(generation) = self.current() {
            return Ok(generation);
        }
        let _wanting = self.want();
        let mut snapshot = self.snapshot.clone();
        let began = Instant::now();
        // An answer from before this call may be outdated. So the candidates are asked again before this call fails
        // because of it.
        let mut old_answer = snapshot.borrow().refused_as_of.is_some();
        loop {
            {
                let now = snapshot.borrow_and_update();
                match (&now.view.state, &now.generation) {
                    (_, Some(generation)) => return Ok(Arc::clone(generation)),
                    (State::Closed, None) => return Err(self.ended()),
                    (State::Searching { refused: Some(failure) }, None) => {
                        if !old_answer || now.refused_as_of >= Some(began) {
                            return Err(self.refused(failure, began));
                        }
                        self.demand();
                    }
                    _ => old_answer = false,
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

    /// The current generation, if there is one.
    pub(crate) fn current(&self) -> Option<Arc<Generation<C>>> {
        self.snapshot.borrow().generation.clone()
    }

    /// Returns since when the current generation has been the current one without a break, if there is one.
    pub(crate) fn primary_since(&self) -> Option<Instant> {
        self.snapshot.borrow().since()
    }

    /// Returns whether the task sleeps or is falling asleep. Call this after [`Self::check_out`].
    pub(crate) fn is_asleep(&self) -> bool {
        self.shared.asleep.load(Ordering::SeqCst)
    }

    /// Returns whether there is a current generation.
    pub(crate) fn has_primary(&self) -> bool {
        self.shared.current.load(Ordering::Acquire) != GenerationId::default().get()
    }

    pub(crate) fn is_current(&self, id: GenerationId) -> bool {
        self.has_primary() && self.shared.current.load(Ordering::Acquire) == id.get()
    }

    /// Returns whether generation `id` has ended for good. Its sessions may still be closing. Once a view shows the
    /// end, this returns `true`.
    pub(crate) fn has_ended(&self, id: GenerationId) -> bool {
        self.shared.ended.load(Ordering::Acquire) >= id.get()
    }

    /// Waits until generation `id` is no longer the current one. Cancel-safe.
    pub(crate) async fn left(&self, id: GenerationId) {
        let current = |snapshot: &Arc<Snapshot<C>>| {
            snapshot.generation.as_ref().is_some_and(|generation| generation.primary.id == id)
        };
        // An error means that the task has ended, so no generation is current any more.
        let _ = self.snapshot.clone().wait_for(|snapshot| !current(snapshot)).await;
    }

    /// Notifies when the pool should ask the primary on an idle session, because no other session is available.
    pub(crate) fn ask_idle(&self) -> Arc<Notify> {
        Arc::clone(&self.shared.ask_idle)
    }

    /// Notes that the primary is being asked on an idle session. `None`: it is being asked on [`MOST_IDLE_QUESTIONS`]
    /// already.
    pub(crate) fn idle_question(&self) -> Option<IdleQuestion> {
        let under_way = self.shared.idle_asked.fetch_add(1, Ordering::AcqRel);
        let number = self.shared.idle_begun.fetch_add(1, Ordering::AcqRel) + 1;
        // If there are too many, dropping it takes it back.
        let question = IdleQuestion { shared: Arc::clone(&self.shared), number };
        (under_way < MOST_IDLE_QUESTIONS).then_some(question)
    }

    /// Reports a doubt about the primary of generation `id`, which the task will check. Never waits.
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

    /// Counts a connection that is lent to a caller. From now on the task notices when the server falls silent.
    pub(crate) fn check_out(&self) {
        // All orderings here and in `Task::sample_traffic` (task.rs) are `SeqCst`. So either the task sees the
        // checkout, or it is woken.
        self.shared.in_use.fetch_add(1, Ordering::SeqCst);
        // Usually the task is listening already. Reading the flag first is cheaper than writing to memory that others
        // read.
        if !self.shared.listening.load(Ordering::SeqCst) && !self.shared.listening.swap(true, Ordering::SeqCst) {
            self.shared.checked_out.store(true, Ordering::SeqCst);
            self.shared.wake.notify_one();
        }
    }

    /// Counts a connection that was given back.
    pub(crate) fn returned(&self) {
        self.shared.in_use.fetch_sub(1, Ordering::SeqCst);
    }

    /// The number of connections checked out.
    pub(crate) fn in_use(&self) -> usize {
        self.shared.in_use.load(Ordering::SeqCst)
    }

    /// The server of generation `id` answered on a session that this crate does not drive, so it lives.
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

    /// Returns a receiver of each snapshot.
    pub(crate) fn snapshots(&self) -> watch::Receiver<Arc<Snapshot<C>>> {
        self.snapshot.clone()
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

    /// Returns the candidate whose last answer is this failure.
    fn endpoint_of(&self, failure: &ProbeFailure) -> Option<Endpoint> {
        let diagnosis = lock(&self.shared.diagnosis);
        let said =
            |candidate: &&CandidateReport| matches!(&candidate.answer, Some(Answer::Failed(it)) if it == failure);
        diagnosis.candidates.iter().find(said).map(|candidate| candidate.endpoint.clone())
    }

    /// Returns why the cluster's task has ended. Call this only after its end.
    pub(crate) fn ended(&self) -> NoPrimary {
        if self.shared.runtime_ended.load(Ordering::Acquire) { NoPrimary::RuntimeEnded } else { NoPrimary::Closed }
    }

    /// Notes that the runtime is dropping the pool's tasks, unless the pool was closed before. The cluster's own task
    /// may be the last of them, so another task may call this first.
    pub(crate) fn runtime_ends(&self) {
        if !self.root.is_cancelled() {
            self.shared.runtime_ended.store(true, Ordering::Release);
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Acquire)
    }

    /// Returns the scope that ends with the cluster, for work that must not outlive it.
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

    /// Passes on the user's choice of the cluster that is the pool's own from now on.
    pub(crate) fn accept(&self, accepted: Accept) {
        lock(&self.shared.signals).accept = Some(accepted);
        self.shared.wake.notify_one();
    }

    /// Reports a refused log-in. All log-ins of the pool count, whichever part of it tried.
    pub(crate) fn log_in_refused(&self, log_in: RefusedLogIn) {
        lock(&self.shared.signals).refused.push(log_in);
        self.shared.wake.notify_one();
    }

    /// The earliest time for the next log-in that will most likely be refused.
    pub(crate) fn log_in_at(&self) -> Option<Instant> {
        *lock(&self.shared.log_in_at)
    }
}
