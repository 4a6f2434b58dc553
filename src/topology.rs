//! Decides which server is the primary, when a generation begins and ends, and which server to ask next.
//!
//! This module knows nothing of sockets, tasks, DNS or clocks. Answers and the time come in as values, and [`Action`]s
//! go out. Invariants: the published timeline never goes back; generation numbers only grow; a signal from an older
//! generation changes nothing; a generation ends only on proof (a newer primary, the same server refusing writes,
//! `dead_after`). The tests are in `topology/tests/`.

mod action;
mod candidate;
mod deadlines;
mod fence;
mod generation;
mod identity;
mod lives;
mod member;
mod names;
mod notice;
mod pace;
mod primary;
mod refusals;
mod report;
mod search;
mod sleep;
#[cfg(test)]
mod tests;
mod unasked;
mod untold;
mod view;

pub(crate) use action::{Action, Notice, Probed, Suspicion, TrafficSample};
pub(crate) use candidate::shortened;
pub use candidate::{Address, Answer, CandidateReport, Endpoint, FailureKind, Origin, ProbeFailure, Refusal};
pub(crate) use generation::Primary;
pub(crate) use identity::Accept;
pub(crate) use names::NameAnswer;
pub(crate) use pace::Settings;
pub(crate) use refusals::RefusedLogIn;
pub use report::{BadReport, Evidence, Lsn, Part, Parts, Role, ServerReport};
pub(crate) use report::{
    CHECKPOINTED, EVIDENCE, PromotionWait, Question, Refused, STARTED_AT, STATS_RESET, ServerSession, TIMELINE,
    UNDISTURBED, UNLIMITED, evidence, microseconds, wait_for_promotion,
};
pub use view::{Change, Eviction, GenerationId, State, View};

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use crate::random::SplitMix64;

use lives::Beside;
use member::{MAX_MEMBERS, Member};
use notice::Topic;
use pace::{FIRST_GRACE, GRACE, QUIET, REMEMBER, RENEWED_AFTER, RESOLVE_INTERVAL, UNEASY_PACE};
use search::{Search, SuspendCause, Suspended};

#[expect(clippy::large_enum_variant, reason = "there is one")]
enum Phase {
    Searching(Search),
    Known { primary: Primary, answered_at: Instant },
}

pub(crate) struct Topology {
    settings: Settings,
    members: BTreeMap<Address, Member>,
    phase: Phase,
    generation: GenerationId,
    /// How many times the user has accepted another cluster since the last generation began.
    crossings: u64,
    system_identifier: Option<u64>,
    newest_timeline: Option<u32>,
    /// When the newest timeline was found.
    newest_at: Instant,
    /// The parts that the primary withholds, or while there is none, that the last primary withheld.
    untold: Parts,
    /// When a server of this cluster last answered as its primary.
    own_primary_at: Instant,
    /// Whether a server of this cluster has ever accepted this role's credentials.
    let_in: bool,
    /// Limits how often log-ins are tried that will most likely be refused.
    log_ins: refusals::Pace,
    names: Vec<names::TrackedName>,
    /// Candidates beyond the limit of concurrent probes. They wait for their turn.
    spare: VecDeque<(Endpoint, Origin)>,
    asleep: bool,
    changed: Change,
    polled_at: Instant,
    unasked: unasked::Unasked,
    traffic: TrafficSample,
    moved_at: Instant,
    /// Since when callers have sent something and nothing came back. Later messages do not move this time. `None`: the
    /// last thing that moved was an answer.
    unanswered_since: Option<Instant>,
    /// When the primary last answered on another session than the heartbeat's. Answers on a wrapped pool's sessions are
    /// not seen, unless a caller reports them.
    received_at: Option<Instant>,
    /// When the first connection was lent after none had been checked out.
    lent_at: Instant,
    /// The second question to the primary, which runs beside the first one.
    beside: Beside,
    fence: fence::Fence,
    /// The pause between two questions to a primary that is silent while connections are in use.
    quiet_pause: Duration,
    /// When a patrol last opened a new session to see which server it reaches.
    patrolled_at: Instant,
    /// The address of the primary to which that session was opened.
    patrolled: Option<Address>,
    /// Grows whenever the result of [`Self::view`] changes.
    revision: u64,
    noticed: HashSet<Topic>,
    actions: Vec<Action>,
    /// Spreads the questions of many pools, so that they do not all ask at the same moment.
    random: SplitMix64,
}

impl Topology {
    /// Creates a topology that searches. `names` is the number of names to resolve.
    pub(crate) fn new(settings: Settings, configured: Vec<Endpoint>, names: usize, seed: u64, now: Instant) -> Self {
        let mut topology = Self {
            quiet_pause: settings.heartbeat / QUIET,
            members: BTreeMap::new(),
            phase: Phase::Searching(Search::new(now)),
            generation: GenerationId::default(),
            crossings: 0,
            system_identifier: settings.system_identifier,
            newest_timeline: None,
            newest_at: now,
            untold: Parts::default(),
            own_primary_at: now,
            let_in: false,
            log_ins: refusals::Pace::new(now),
            names: (0..names).map(|_| names::TrackedName::new(now)).collect(),
            spare: VecDeque::new(),
            asleep: false,
            changed: Change { at: now, why: "started".to_owned() },
            polled_at: now,
            unasked: unasked::Unasked::new(now),
            traffic: TrafficSample::default(),
            moved_at: now,
            unanswered_since: None,
            received_at: None,
            lent_at: now,
            beside: Beside::default(),
            fence: fence::Fence::default(),
            patrolled_at: now,
            patrolled: None,
            revision: 0,
            noticed: HashSet::new(),
            actions: Vec::new(),
            random: SplitMix64::new(seed),
            settings,
        };
        for endpoint in configured {
            topology.add(endpoint, Origin::Configured, now);
        }
        topology
    }

    /// Asks the members that are due.
    fn ask_due_members(&mut self, now: Instant) {
        let (current, suspended) = (self.primary_address(), self.suspended_address());
        let promotion_wait = self.promotion_wait(now);
        // This is what the method `search` returns, but the members stay free to be borrowed.
        let search = match &self.phase {
            Phase::Searching(search) => Some(search),
            Phase::Known { .. } => None,
        };
        let log_in = self.next_log_in(now);
        for (address, member) in &mut self.members {
            if member.asking || member.due > now {
                continue;
            }
            let is_primary = current.as_ref() == Some(address);
            let is_left_out = if is_primary {
                planted!("does not ask the primary")
            } else {
                search.is_none() && planted!("does not ask the others")
            };
            if is_left_out {
                member.due = now + self.settings.patrol;
                continue;
            }
            if member.must_log_in(current.as_ref()) {
                if log_in.as_ref() != Some(address) {
                    continue;
                }
                self.log_ins.spend(now);
            }
            if self.settings.roaming && now >= self.patrolled_at + self.settings.patrol {
                self.patrolled_at = now;
                member.fresh = true;
            }
            // Opening a session and answering a question have separate time limits.
            let (within, opened_within) = if current.as_ref() == Some(address) {
                let within = self.settings.heartbeat_timeout;
                (within, self.settings.probe_timeout + within)
            } else {
                (self.settings.probe_timeout, self.settings.probe_timeout)
            };
            member.turn_to_next_name();
            member.asking = true;
            member.prompt = false;
            member.asked_at = Some(now);
            // The question beside uses the kept session to the suspended primary, so this question opens a new session.
            let fresh = std::mem::take(&mut member.fresh)
                || suspended.as_ref() == Some(address)
                || search.is_some_and(|search| member.outlived(search, now));
            // In a new search, ask for a report first. Only the next questions wait for the promotion.
            let waits = !fresh && member.is_standby() && search.is_some_and(|search| member.answered(search));
            member.promotion_wait =
                promotion_wait.filter(|_| waits).map(|promotion_wait| member.spares(promotion_wait));
            let (endpoint, promotion_wait) = (member.endpoint.clone(), member.promotion_wait);
            let within = within + promotion_wait.map_or(Duration::ZERO, |promotion_wait| promotion_wait.lasts);
            self.actions.push(Action::Probe { endpoint, fresh, beside: false, promotion_wait, within, opened_within });
        }
    }

    /// Handles the result of a probe.
    pub(crate) fn probed(&mut self, now: Instant, probed: &Probed) {
        self.notice_pause(now);
        // This comes first, because the server may be no candidate any more. Otherwise no question would ever be asked
        // beside the first one again.
        let took_beside = if probed.beside { self.beside.answered(now) } else { None };
        let Some(member) = self.members.get(&probed.address) else {
            return;
        };
        let (took, asked_at) = match probed.beside {
            true => (took_beside, self.beside.asked_at),
            false if member.promotion_wait.is_some() => (member.took, member.asked_at),
            false => (member.asked_at.map(|at| now.duration_since(at)), member.asked_at),
        };
        let current = self.primary_address().as_ref() == Some(&probed.address);
        let result = probed.result.as_ref().map(|report| self.completed(probed, report));
        let answer = match &result {
            // An open session stays writable although new ones are fenced, so the next probe opens a new session.
            Ok(report) if self.is_fenced(report) && !probed.fresh && !current && !report.in_recovery => {
                Answer::Refused(report.clone(), Refusal::Fenced)
            }
            Ok(report) => match self.admissible(&probed.address, report, !probed.fresh) {
                Ok(()) => Answer::Primary(report.clone()),
                Err(refusal) => Answer::Refused(report.clone(), refusal),
            },
            Err(failure) => Answer::Failed(ProbeFailure::clone(failure)),
        };
        seen!("answers", "{}", answer.name());
        self.note_fence(now, probed, asked_at, &answer);
        if probed.beside && !probed.fresh {
            return self.kept_answered(now, probed, &answer);
        }
        if self.is_vain_renewal(probed) {
            if let Some(member) = self.members.get_mut(&probed.address) {
                member.asking = false;
                member.answered_at = Some(now);
                member.opened_at = Some(now);
            }
            self.schedule(now, &probed.address);
            return;
        }
        self.notice(probed, &answer);
        self.let_in |= match &answer {
            Answer::Primary(_) => true,
            Answer::Refused(_, refusal) => !matches!(refusal, Refusal::OtherCluster { .. }),
            Answer::Failed(_) => false,
        };
        let ours = match &answer {
            Answer::Primary(_) => true,
            Answer::Refused(report, refusal) => {
                !matches!(refusal, Refusal::OtherCluster { .. })
                    && report.system_identifier.is_some()
                    && report.system_identifier == self.system_identifier
            }
            Answer::Failed(_) => false,
        };
        if let Some(member) = self.members.get_mut(&probed.address) {
            member.asking &= probed.beside;
            member.took = took;
            if result.is_ok() {
                member.note_pace(took);
            }
            member.answered_at = Some(now);
            member.note_name(result.as_ref().err().copied());
            member.told_at = member.asked_at;
            let full = matches!(&probed.result, Err(failure) if failure.kind == FailureKind::Full);
            member.full = if full { member.full.saturating_add(1) } else { 0 };
            if probed.fresh {
                member.opened_at = Some(now);
            }
            if let Ok(report) = &result {
                member.heard_at = Some(now);
                member.report = Some(report.clone());
            }
            // If the question beside could not open a new session to the primary, keep the answer of the kept session.
            if !(current && probed.beside && probed.result.is_err()) {
                member.answer = Some(answer.clone());
            }
            member.verified |= ours;
        }
        if current && probed.fresh && probed.result.is_ok() {
            self.new_sessions_succeed();
        }
        if current {
            self.primary_answered(now, probed, &answer);
        } else {
            self.member_answered(now, &probed.address, &answer, took.unwrap_or_default());
        }
        if !probed.beside {
            self.schedule(now, &probed.address);
        }
    }

    /// Handles the result of the question beside on a kept session.
    fn kept_answered(&mut self, now: Instant, probed: &Probed, answer: &Answer) {
        match (&self.phase, answer) {
            (Phase::Searching(_), _) => self.suspended_answered(now, probed, answer),
            // The question was asked in a search that is over.
            (Phase::Known { .. }, _) => {}
        }
    }

    /// Returns whether a new session to a standby could not be opened, because the server has no free slot or does not
    /// answer in time, while an older session is open. The result is then ignored, because the older session will see
    /// the promotion, and no other session may be possible.
    fn is_vain_renewal(&self, probed: &Probed) -> bool {
        let busy = |failure: &ProbeFailure| matches!(failure.kind, FailureKind::Full | FailureKind::TimedOut);
        matches!(self.phase, Phase::Searching(_))
            && probed.fresh
            && probed.still_open
            && probed.result.as_ref().is_err_and(busy)
            && self.is_standby(&probed.address)
    }

    /// Notes what the pool's sessions did since the last call. Call this before each [`Self::poll`].
    pub(crate) fn traffic(&mut self, now: Instant, traffic: TrafficSample) {
        if traffic.in_use && !self.traffic.in_use {
            self.lent_at = now;
        }
        if !traffic.idle_asked {
            self.beside.idle_waits_since = None;
        } else if self.beside.idle_waits_since.is_none() {
            self.beside.idle_waits_since = Some(now);
        }
        self.traffic = traffic;
        if traffic.moved || traffic.received {
            self.moved_at = now;
        }
        self.note_unanswered(now, traffic);
        if traffic.received {
            self.heard(now);
        }
    }

    /// Notes that the primary answered on one of its sessions, so it lives.
    pub(crate) fn heard(&mut self, now: Instant) {
        self.received_at = Some(now);
    }

    /// Returns whether each new session may reach another server.
    pub(crate) fn roams(&self) -> bool {
        self.settings.roaming
    }

    pub(crate) fn view(&self) -> View {
        let state = match &self.phase {
            Phase::Searching(_) if self.is_asleep() => State::Asleep,
            Phase::Searching(search) => State::Searching { refused: search.refused.clone() },
            Phase::Known { primary, .. } => {
                State::Primary { endpoint: primary.endpoint.clone(), report: primary.report.clone() }
            }
        };
        View { state, generation: self.generation, changed: self.changed.clone() }
    }

    pub(crate) fn revision(&self) -> u64 {
        self.revision
    }

    fn search(&self) -> Option<&Search> {
        match &self.phase {
            Phase::Searching(search) => Some(search),
            Phase::Known { .. } => None,
        }
    }

    fn primary_address(&self) -> Option<Address> {
        match &self.phase {
            Phase::Known { primary, .. } => Some(primary.endpoint.address.clone()),
            Phase::Searching(_) => None,
        }
    }

    fn suspended_address(&self) -> Option<Address> {
        match &self.phase {
            Phase::Known { .. } => None,
            Phase::Searching(search) => {
                search.suspended.as_ref().map(|suspended| suspended.primary.endpoint.address.clone())
            }
        }
    }
}
