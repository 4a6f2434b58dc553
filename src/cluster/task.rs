//! The task that owns the [`Topology`]: it carries out the topology's actions, and passes the answers to it.
//!
//! The task itself decides only when to sleep, and which sessions to keep. The tests are in `tests/it/`.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};

use super::kept::{Number, SessionCache};
use super::scopes::Scopes;
use super::work::{self, ProbeOptions, WorkResult};
use super::{Diagnosis, Generation, Name, Setup, Shared, Snapshot};
use crate::observe::{self, Observer, Tally};
use crate::resolve::Resolve;
use crate::server::{Heard, Open, Scope, Session, SessionClient, wall_clock};
use crate::sync::lock;
use crate::topology::{
    Action, Address, Change, FailureKind, GenerationId, NameAnswer, Primary, ProbeFailure, Probed, State, Topology,
    TrafficSample, View,
};

/// The pause after a panic: the task goes on, but must not spin if one panic follows another.
const AFTER_A_PANIC: Duration = Duration::from_millis(100);

pub(super) struct Task<C: SessionClient> {
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
    sessions: SessionCache<Session<C>>,
    work: FuturesUnordered<BoxFuture<'static, WorkResult<C>>>,
    /// The newest generation, until it ends. Callers see it only while `live` is true, that is, not during a
    /// suspension.
    generation: Option<Arc<Generation<C>>>,
    live: bool,
    /// The topology's actions that are still to be carried out. If the program's log panics while the task carries out
    /// one of them, the others stay here for the next step. So a panic costs at most one event.
    actions: VecDeque<Action>,
    /// Scopes to end once the newer state is published.
    scopes: Scopes,
    /// Events to send once the state that they report is published.
    news: VecDeque<observe::Event>,
    snapshot: watch::Sender<Arc<Snapshot<C>>>,
    view: watch::Sender<View>,
    observer: Arc<Observer>,
    search: Option<Span>,
    searching_since: Instant,
    /// The opener's traffic count at the last sample.
    traffic: u64,
    /// The number of reported answers at the last sample.
    heard: u64,
    sleep_after: Option<Duration>,
    /// When a primary was last needed.
    used_at: Instant,
}

impl<C: SessionClient> Task<C> {
    /// Creates the task, and the receivers of what it publishes. The task does not run yet.
    pub(super) fn new(
        setup: Setup<C>,
        shared: Arc<Shared>,
        root: CancellationToken,
    ) -> (Self, watch::Receiver<View>, watch::Receiver<Arc<Snapshot<C>>>) {
        let now = Instant::now();
        let dead_after = setup.settings.dead_after;
        let topology = Topology::new(setup.settings, setup.configured, setup.names.len(), setup.seed, now);
        let first = topology.view();
        let (view, views) = watch::channel(first.clone());
        let (snapshot, snapshots) = watch::channel(Arc::new(Snapshot::first(first)));
        let task = Self {
            revision: topology.revision(),
            refused_as_of: None,
            topology,
            names: setup.names,
            resolver: setup.resolver,
            opener: setup.opener,
            gate: setup.gate,
            root,
            shared,
            sessions: SessionCache::new(),
            work: FuturesUnordered::new(),
            generation: None,
            live: false,
            actions: VecDeque::new(),
            scopes: Scopes::new(dead_after),
            news: VecDeque::new(),
            snapshot,
            view,
            search: Some(setup.observer.search()),
            observer: setup.observer,
            searching_since: now,
            traffic: 0,
            heard: 0,
            sleep_after: setup.sleep_after,
            used_at: now,
        };
        (task, views, snapshots)
    }

    pub(super) async fn run(mut self) {
        // User code called here may panic: a `tracing` subscriber or a `metrics` recorder. A panic costs only one step.
        loop {
            match AssertUnwindSafe(self.step()).catch_unwind().await {
                Ok(true) => {}
                Ok(false) => return,
                Err(_) => sleep(AFTER_A_PANIC).await,
            }
        }
    }

    /// Runs one step, and returns whether there is a next one.
    async fn step(&mut self) -> bool {
        {
            let now = self.now();
            let traffic = self.sample_traffic();
            if !self.is_awake(now, traffic) {
                self.publish();
                tokio::select! {
                    biased;
                    () = self.root.cancelled() => return false,
                    () = self.shared.wake.notified() => return true,
                }
            }
            self.topology.traffic(now, traffic);
            let actions = self.topology.poll(now);
            self.actions.extend(actions);
            self.act_all();
            let topology = &self.topology;
            self.sessions.retain(|address| topology.keeps(address));
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

    /// Wakes up if a caller needs a primary, and falls asleep if none has needed one for `sleep_after`. Returns whether
    /// the task is awake.
    fn is_awake(&mut self, now: Instant, traffic: TrafficSample) -> bool {
        let Some(after) = self.sleep_after else { return true };
        let checked_out = self.shared.checked_out.swap(false, Ordering::SeqCst);
        let shared = Arc::clone(&self.shared);
        let wanted = || shared.wanting.load(Ordering::SeqCst) > 0;
        if self.shared.asleep.load(Ordering::SeqCst) {
            // Signals from before the sleep are outdated, except the user's choice of a cluster.
            let signals = std::mem::take(&mut *lock(&self.shared.signals));
            if let Some(accepted) = signals.accept {
                self.topology.accept(now, accepted);
                let actions = self.topology.lie_down();
                self.actions.extend(actions);
            }
            self.act_all();
            if !wanted() || planted!("does not wake") {
                return false;
            }
            self.shared.asleep.store(false, Ordering::SeqCst);
            (self.used_at, self.searching_since) = (now, now);
            self.topology.wake(now);
            self.search = Some(self.observer.search());
            return true;
        }
        if (traffic.in_use || traffic.moved || checked_out || wanted()) && !planted!("falls asleep over its work") {
            self.used_at = now;
            return true;
        }
        if now < self.used_at + after {
            return true;
        }
        self.shared.asleep.store(true, Ordering::SeqCst);
        if wanted() || self.shared.in_use.load(Ordering::SeqCst) > 0 {
            self.shared.asleep.store(false, Ordering::SeqCst);
            return true;
        }
        self.fall_asleep(now, after);
        false
    }

    /// Ends the generation, closes all sessions, and drops the questions that are under way.
    fn fall_asleep(&mut self, now: Instant, after: Duration) {
        self.topology.sleep(now, &format!("asleep: nobody asked for a connection for {after:?}"));
        let actions = self.topology.lie_down();
        // A panic may have left actions. They are carried out now, except for the questions.
        self.actions.retain(|action| !matches!(action, Action::Probe { .. } | Action::Resolve(_)));
        self.actions.extend(actions);
        (self.live, self.search) = (false, None);
        self.sessions.clear();
        self.work.clear();
        self.act_all();
    }

    fn act_all(&mut self) {
        while let Some(action) = self.actions.pop_front() {
            self.act(action);
        }
    }

    /// Samples what the sessions did since the last call.
    fn sample_traffic(&mut self) -> TrafficSample {
        let traffic = self.opener.traffic();
        let moved = std::mem::replace(&mut self.traffic, traffic) != traffic;
        self.shared.listening.store(moved, Ordering::SeqCst);
        let in_use = self.shared.in_use.load(Ordering::SeqCst) > 0;
        if in_use {
            self.shared.listening.store(true, Ordering::SeqCst);
        }
        // If another crate drives the sessions, this task does not notice when they end. So it does not count them.
        let generation = self.generation.as_ref().filter(|_| self.opener.drives());
        let open = generation.map_or(0, |generation| generation.open.count());
        let idle_asked = self.shared.idle_asked.load(Ordering::Relaxed) > 0;
        TrafficSample { in_use, moved, received: self.take_heard(), open, idle_asked }
    }

    /// Returns whether a session of the generation has received a sign of the server's life since the last call.
    fn take_heard(&mut self) -> bool {
        let reported = self.shared.heard.load(Ordering::Relaxed);
        let reported = std::mem::replace(&mut self.heard, reported) != reported;
        self.generation.as_ref().is_some_and(|generation| generation.heard.take()) || reported
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Resolve(index) => {
                if let Some(name) = self.names.get(index).cloned() {
                    let looked_up = work::look_up(index, name, Arc::clone(&self.resolver)).instrument(self.span());
                    let failed = move |failure: ProbeFailure| WorkResult::Resolved {
                        name: index,
                        answer: NameAnswer::Failed(failure.message),
                    };
                    self.work.push(Box::pin(work::contained(looked_up, failed)));
                }
            }
            Action::Probe { endpoint, fresh, beside, promotion_wait, within, opened_within } => {
                let kept = if fresh { None } else { self.kept(&endpoint.address) };
                let within = if kept.is_some() { within } else { opened_within };
                let (opener, scope) = (Arc::clone(&self.opener), Scope::within(&self.root));
                let (number, asked_at) = (kept.as_ref().map(|(number, _)| *number), endpoint.clone());
                let failed = move |failure: ProbeFailure| match number {
                    Some(number) => {
                        WorkResult::Asked { endpoint: asked_at, number, session: None, beside, result: Err(failure) }
                    }
                    None => WorkResult::Opened { endpoint: asked_at, beside, fresh: true, result: Err(failure) },
                };
                let asked =
                    work::ask(opener, endpoint, kept, ProbeOptions { fresh, beside, promotion_wait, within }, scope);
                self.work.push(Box::pin(work::contained(asked.instrument(self.span()), failed)));
            }
            Action::AskIdle => self.shared.ask_idle.notify_one(),
            Action::Suspend { why } => self.lost(self.generation.clone(), why),
            Action::Resume { primary, lost_for } => {
                if let Some(generation) = &self.generation {
                    *lock(&generation.endpoint) = primary.endpoint.clone();
                }
                self.found(&primary, lost_for, true);
            }
            Action::Learned { report } => {
                if let Some(generation) = self.generation.as_ref().filter(|_| report.is_identified()) {
                    // The identity of a server does not change within a generation, so it is set once.
                    let _ = generation.learned.set(report);
                }
            }
            Action::Move { endpoint } => {
                if let Some(generation) = &self.generation {
                    *lock(&generation.endpoint) = endpoint.clone();
                }
                tracing::info!("new sessions to the primary go to {endpoint}");
            }
            Action::End { id, cause, why, lost } => {
                self.shared.ended.fetch_max(id.get(), Ordering::AcqRel);
                let generation = self.generation.take();
                if let Some(generation) = &generation {
                    self.scopes.end(generation.scope.clone(), cause, generation.primary.clone());
                }
                if lost {
                    self.lost(generation.clone(), why.clone());
                }
                if let Some(generation) = generation {
                    self.news.push_back(self.observer.evicted(id, cause, generation.open.count(), why));
                }
            }
            Action::Begin { primary, lost_for } => self.begin(&primary, lost_for),
            Action::Notice(notice) => {
                let topology = &self.topology;
                let said = || (topology.candidates(), topology.dns_failure());
                self.news.extend(self.observer.noticed(notice, said));
            }
        }
    }

    fn lost(&mut self, generation: Option<Arc<Generation<C>>>, why: String) {
        self.live = false;
        self.searching_since = Instant::now();
        self.search = Some(self.observer.search());
        if let Some(generation) = generation {
            self.news.push_back(self.observer.primary_lost(generation.primary.id, generation.endpoint(), why));
        }
    }

    fn found(&mut self, primary: &Primary, took: Duration, same_server: bool) {
        self.live = true;
        let search = self.search.take();
        self.news.push_back(self.observer.primary_found(search.as_ref(), primary, took, same_server));
    }

    fn begin(&mut self, primary: &Primary, lost_for: Option<Duration>) {
        let took = lost_for.unwrap_or_else(|| self.searching_since.elapsed());
        self.shared.newest.store(primary.id.get(), Ordering::Relaxed);
        // Callers may take the spare session, but not behind a proxy: there the next session may reach another server,
        // so the heartbeat keeps the one that is known to reach the primary.
        let spare = if self.topology.roams() { None } else { self.sessions.remove(&primary.endpoint.address) };
        // A pooler may have connected a session of the older generation to the new primary. Do not take that session,
        // because it ends with its own generation.
        let spare = spare.filter(|session| !self.scopes.includes(&session.scope));
        let scope = spare.as_ref().map_or_else(|| Scope::within(&self.root), |session| session.scope.clone());
        self.scopes.begin(primary);
        self.generation = Some(Arc::new(Generation {
            endpoint: Mutex::new(primary.endpoint.clone()),
            primary: primary.clone(),
            learned: Arc::default(),
            began: Instant::now(),
            scope,
            gate: Semaphore::new(self.gate),
            greetings: Semaphore::new(self.gate),
            open: Tally::default(),
            heard: Heard::default(),
            spare: Mutex::new(spare),
            trouble: Mutex::default(),
        }));
        self.found(primary, took, false);
    }

    /// Takes the open session that is kept for questions to this server. If there is none, takes the session that
    /// proved the primary, unless a caller has taken that. So an idle pool needs only one session.
    fn kept(&mut self, address: &Address) -> Option<(Number, Session<C>)> {
        self.sessions.ask(address).or_else(|| {
            let generation =
                self.generation.as_ref().filter(|generation| self.live && generation.endpoint().address == *address);
            let spare = generation.and_then(|generation| generation.take_spare())?;
            Some((self.sessions.ask_other(address), spare))
        })
    }

    /// Returns the time for the next inputs. Also tells the topology what the wall clock says: it compares both clocks,
    /// because they differ after the machine was suspended.
    fn now(&mut self) -> Instant {
        let now = Instant::now();
        self.topology.wall_clock(now, Duration::from_millis(wall_clock()));
        now
    }

    fn happened(&mut self, done: WorkResult<C>) {
        let now = self.now();
        // A caller may have received an answer since the last sample. Such an answer shows that the server is not
        // silent, even if a question has no answer.
        if self.take_heard() {
            self.topology.heard(now);
        }
        match done {
            WorkResult::Resolved { name, answer } => {
                let failure = match &answer {
                    NameAnswer::Unknown(failure) | NameAnswer::Failed(failure) => Some(failure.clone()),
                    NameAnswer::Addresses { .. } => None,
                };
                self.topology.resolved(now, name, answer);
                if let Some(failure) = failure {
                    tracing::debug!("{failure}");
                }
            }
            WorkResult::Opened { endpoint, beside, fresh, result } => {
                let address = endpoint.address;
                let still_open = self.sessions.is_open(&address);
                let result = result.map(|(session, report)| {
                    if !self.topology.strayed(&address, &report, still_open) {
                        self.sessions.opened(&address, session);
                    }
                    report
                });
                self.topology.probed(now, &Probed { address, result, fresh, still_open, beside });
            }
            WorkResult::Asked { endpoint, number, session, beside, result } => {
                let address = endpoint.address;
                // After a time-out, keep the primary's session: a late answer would show that the server lives.
                let session = session.filter(|_| result.is_ok() || self.topology.holds(&address));
                let answered = !result.as_ref().is_err_and(|failure| failure.kind == FailureKind::TimedOut);
                self.sessions.ended(&address, number, session, answered);
                let still_open = self.sessions.is_open(&address);
                self.topology.probed(now, &Probed { address, result, fresh: false, still_open, beside });
            }
        }
        *lock(&self.shared.diagnosis) = Diagnosis {
            candidates: self.topology.candidates(),
            dns: self.topology.dns_failure(),
            waiting: self.topology.waiting(),
        };
    }

    fn signalled(&mut self) {
        let signals = std::mem::take(&mut *lock(&self.shared.signals));
        let now = self.now();
        if let Some((id, suspicion)) = signals.suspicion {
            self.topology.suspected(now, id, suspicion);
        }
        if let Some(accepted) = signals.accept {
            self.topology.accept(now, accepted);
        }
        for log_in in signals.refused {
            self.topology.log_in_refused(log_in);
        }
        if signals.demand {
            self.topology.demanded(now);
        }
        if let Some((id, suspicion)) = signals.suspicion {
            tracing::debug!(generation = id.get(), ?suspicion, "primary suspected");
        }
    }

    /// Publishes the state, and only then ends the older generation and sends events. So a caller that loses a
    /// connection or receives an event finds the newer state.
    fn publish(&mut self) {
        *lock(&self.shared.log_in_at) = Some(self.topology.log_in_at());
        let refused_as_of = std::mem::replace(&mut self.refused_as_of, self.topology.refused_as_of());
        if self.revision != self.topology.revision() {
            self.revision = self.topology.revision();
            self.send(self.topology.view());
        } else if refused_as_of != self.refused_as_of {
            // The view is unchanged, but its refusal answers a newer question. A waiting caller may accept only a
            // refusal whose question was asked after the call began, so it needs the new time.
            self.send_snapshot(self.topology.view());
        }
        // The log and the metrics are user code and may panic. So the scopes are ended first, and each event is removed
        // before it is sent.
        self.scopes.carry_out();
        while let Some(event) = self.news.pop_front() {
            self.observer.send(event);
        }
    }

    fn send(&self, view: View) {
        // Publish the view first, so that a caller with a connection finds its primary in the pool's status.
        self.view.send_replace(view.clone());
        self.send_snapshot(view);
    }

    fn send_snapshot(&self, view: View) {
        let generation = self.generation.clone().filter(|_| self.live);
        let current = generation.as_ref().map_or_else(GenerationId::default, |generation| generation.primary.id);
        // Store this before the snapshot, so that callers woken by the snapshot read the same value here.
        self.shared.current.store(current.get(), Ordering::Release);
        let next = self.snapshot.borrow().next(view, generation, self.refused_as_of);
        self.snapshot.send_replace(Arc::new(next));
    }

    /// Copies the span of the search. Copying calls the program's log. If that panics, the work goes on without a span.
    fn span(&self) -> Span {
        let copied = catch_unwind(AssertUnwindSafe(|| self.search.clone()));
        copied.ok().flatten().unwrap_or_else(Span::none)
    }
}

/// After the task has ended, no connection is handed out, whether the pool was closed or the runtime has ended.
impl<C: SessionClient> Drop for Task<C> {
    fn drop(&mut self) {
        self.live = false;
        let told = self.root.is_cancelled();
        self.shared.runtime_ended.store(!told, Ordering::Release);
        let why = if told { "the pool was closed" } else { "the tokio runtime that the pool was built on has ended" };
        let changed = Change { at: Instant::now(), why: why.to_owned() };
        self.shared.closed.store(true, Ordering::Release);
        self.send(View { state: State::Closed, changed, ..self.topology.view() });
        self.root.cancel();
        // The log and the metrics are user code, and a panic in a `drop` during another panic would end the process.
        let _ = catch_unwind(AssertUnwindSafe(|| self.observer.closed()));
    }
}
