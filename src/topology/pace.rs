//! Decides how often each server is asked.
//!
//! The pauses grow with the time without a primary. Because of jitter, many pools do not ask at the same moment.

use std::time::Duration;

use tokio::time::Instant;

use super::{Address, Answer, Member, Phase, ProbeFailure, PromotionWait, Topology};

/// How long a verified member is remembered after the resolver has last named it and it has last answered.
pub(super) const REMEMBER: Duration = Duration::from_secs(600);
/// Shortest and longest time for which a search waits for the answers of other servers before it accepts the first
/// writable one.
pub(super) const GRACE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(100));
/// The same in a search that knows no timeline, and so cannot recognise an old primary.
pub(super) const FIRST_GRACE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(500));
/// Time without an answer after which the pool asks the other servers sooner. It is three times as long as the
/// primary's answers take, but at least the first value. The second value is for a primary that has not answered yet.
const UNEASY: (Duration, Duration) = (Duration::from_millis(75), Duration::from_millis(250));
/// How often the other servers are asked while the primary takes long to answer, so that a successor is seen before the
/// primary is suspended.
pub(super) const UNEASY_PACE: Duration = Duration::from_millis(100);
/// While connections are in use, the primary is asked if it was silent for this fraction of the heartbeat's interval:
/// one twentieth.
pub(super) const QUIET: u32 = 20;
/// Shortest pause between two samples of the sessions' traffic.
const LISTEN_INTERVAL: Duration = Duration::from_millis(5);
/// If a search takes longer than this, it is logged with each candidate's last answer.
pub(super) const LONG_SEARCH: Duration = Duration::from_secs(2);
/// Shortest pause between two DNS queries for a name while searching.
pub(super) const RESOLVE_INTERVAL: Duration = Duration::from_millis(20);
/// Checks per polling pause while a standby waits for its own promotion.
const LOOKS: u32 = 10;
/// Shortest and longest wait of a standby for its own promotion.
const PROMOTION_WAIT: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(250));
/// Up to this number of silent candidates are each asked at the full pace. Up to twice as many are asked half as often,
/// and so on.
const CROWD: usize = 8;
/// Shortest and longest pause before a server that had no free connection slot is asked again.
const FULL_PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// A search asks a standby on its open session for this long. Then it opens a new one.
pub(super) const RENEWED_AFTER: Duration = Duration::from_secs(1);

/// The settings of a topology, mostly times.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Shortest and longest pause between two probes of one server while searching.
    pub(crate) poll: (Duration, Duration),
    /// Pause between two heartbeats, which are questions to the primary.
    pub(crate) heartbeat: Duration,
    /// If a primary does not answer a question for this long, it is suspended, and a search begins.
    pub(crate) heartbeat_timeout: Duration,
    /// Pause between two patrols, which ask the resolver and the other candidates while there is a primary.
    pub(crate) patrol: Duration,
    /// Time limit for one probe while searching.
    pub(crate) probe_timeout: Duration,
    /// The connections of a silent primary are closed after this time, even without a successor.
    pub(crate) dead_after: Duration,
    /// Whether to keep a session to each standby while there is a primary.
    pub(crate) warm_standbys: bool,
    /// Each new session to a candidate may reach another server, because the manager of a wrapped pool chooses the
    /// server.
    pub(crate) roaming: bool,
    /// The user said that each new session to an address may reach another server, because there is a proxy.
    pub(crate) proxied: bool,
    /// The system identifier of the pool's cluster, if the user set it.
    pub(crate) system_identifier: Option<u64>,
    /// If no server of this cluster has answered as its primary for this long, a primary of another cluster is
    /// followed.
    pub(crate) accept_new_cluster_after: Option<Duration>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            poll: (Duration::from_millis(10), Duration::from_millis(250)),
            heartbeat: Duration::from_secs(1),
            heartbeat_timeout: Duration::from_secs(2),
            patrol: Duration::from_secs(5),
            probe_timeout: Duration::from_secs(3),
            dead_after: Duration::from_secs(20),
            warm_standbys: true,
            roaming: false,
            proxied: false,
            system_identifier: None,
            accept_new_cluster_after: None,
        }
    }
}

impl Member {
    /// The pause before this server is asked again, if it had no free connection slot.
    pub(super) fn full_pause(&self) -> Option<Duration> {
        let doublings = self.full.checked_sub(1)?.min(16);
        Some((FULL_PAUSE.0 * 2_u32.pow(doublings)).min(FULL_PAUSE.1))
    }
}

impl Topology {
    /// How to wait for a standby's promotion in this search. `None` if each new session may reach another server.
    pub(super) fn promotion_wait(&self, now: Instant) -> Option<PromotionWait> {
        let search = self.search()?;
        let pause = self.poll_pause(now.duration_since(search.since));
        let step = (pause / LOOKS).max(Duration::from_millis(1));
        (!self.settings.roaming)
            .then_some(PromotionWait { lasts: pause.clamp(PROMOTION_WAIT.0, PROMOTION_WAIT.1), step })
    }

    /// Returns the server on which the next log-in is tried, among those that refused the last one. Only one of them is
    /// tried at a time. The one that was asked longest ago comes first.
    pub(super) fn next_log_in(&self, now: Instant) -> Option<Address> {
        if self.log_in_at() > now {
            return None;
        }
        let current = self.primary_address();
        let due = |member: &&Member| !member.asking && member.due <= now && member.must_log_in(current.as_ref());
        let next = self.members.values().filter(due).min_by_key(|member| member.asked_at)?;
        Some(next.endpoint.address.clone())
    }

    /// When the primary's silence lasts so long that the other servers are asked sooner. `None` if no question to the
    /// primary is under way.
    pub(super) fn uneasy_at(&self) -> Option<Instant> {
        let Phase::Known { primary, .. } = &self.phase else {
            return None;
        };
        let member = self.members.get(&primary.endpoint.address).filter(|member| member.asking)?;
        let patience = member.usually.map_or(UNEASY.1, |usually| (usually * 3).max(UNEASY.0));
        member.asked_at.map(|asked| asked + patience)
    }

    /// Asks a primary that is silent while work is under way. It may be dead, or it runs a long statement. The first
    /// question comes immediately. If the primary answers, such silence is normal for this work, so the next questions
    /// come less and less often.
    pub(super) fn ask_if_quiet(&mut self, now: Instant) {
        let Phase::Known { primary, .. } = &self.phase else {
            return;
        };
        let (least, most) = (self.settings.heartbeat / QUIET, self.settings.heartbeat);
        let Some(member) = self.members.get_mut(&primary.endpoint.address).filter(|_| self.traffic.in_use) else {
            return;
        };
        if member.asking {
            return;
        }
        if member.due <= now {
            // The heartbeat is due anyway, so this question does not come from silence.
            self.quiet_pause = (self.quiet_pause / 2).max(least);
        } else if now >= self.moved_at + least && member.asked_at.is_none_or(|asked| now >= asked + self.quiet_pause) {
            member.due = now;
            self.quiet_pause = (self.quiet_pause * 2).min(most);
        }
    }

    pub(super) fn listen_interval(&self) -> Duration {
        (self.settings.heartbeat / QUIET / 2).max(LISTEN_INTERVAL)
    }

    pub(super) fn hurry_others(&mut self, now: Instant) {
        for member in self.members.values_mut() {
            member.hurry(now, UNEASY_PACE);
        }
        self.hurry_names(now + UNEASY_PACE);
    }

    /// Decides when to ask a server again.
    pub(super) fn schedule(&mut self, now: Instant, address: &Address) {
        let jitter = self.random.near_one();
        let began = self.changed.at == now;
        let pause = match &self.phase {
            Phase::Known { primary, .. } if primary.endpoint.address == *address => match self.members.get(address) {
                Some(member) if member.prompt => return,
                // The session that proved the server was given to the pool, so the heartbeat needs a new one. Open it
                // soon, before the pool's sessions take the server's last free slots.
                _ if began => self.settings.heartbeat / 10,
                _ => self.settings.heartbeat,
            },
            // The jitter only shortens this pause, so that it never exceeds the configured interval.
            Phase::Known { .. } => self.settings.patrol.mul_f64(jitter - 0.25),
            // If the last question waited for the promotion, that wait was the pause. The first wait begins after a
            // short moment, in which the primary may answer.
            Phase::Searching(search) if self.is_standby(address) => {
                let pause = self.poll_pause(now.duration_since(search.since));
                match self.members.get(address) {
                    Some(member) if member.promotion_wait.is_some() => pause.mul_f64(jitter),
                    Some(Member { asked_at: Some(asked_at), .. }) => now.duration_since(*asked_at) + pause / LOOKS,
                    _ => pause,
                }
            }
            Phase::Searching(search) => {
                let refused = self.members.get(address).is_some_and(|member| {
                    let refused = |failure: &ProbeFailure| failure.is_refused_log_in() && !member.has_untried_name();
                    matches!(&member.answer, Some(Answer::Failed(failure)) if refused(failure))
                });
                // Many dead addresses are asked less often, so that the pool does not open a new session to each of
                // them a hundred times a second.
                let crowd = self.members.values().filter(|member| member.is_dead()).count().div_ceil(CROWD).max(1);
                let pause = self.poll_pause(now.duration_since(search.since));
                let pause = (pause * u32::try_from(crowd).unwrap_or(1)).min(self.settings.poll.1);
                // Callers have been told that waiting does not help, so nobody waits for a quick answer.
                let pause = if search.refused_as_of.is_some() { self.settings.poll.1 } else { pause };
                let full = self.members.get(address).and_then(Member::full_pause).unwrap_or_default();
                if refused {
                    self.refused_pause(now.duration_since(search.since))
                } else {
                    pause.max(full).mul_f64(jitter)
                }
            }
        };
        let Some(member) = self.members.get_mut(address) else {
            return;
        };
        member.due = now.max(member.asked_at.unwrap_or(now) + pause);
    }

    /// The pause between two questions in a search: one per cent of the time without a primary. So the end of a short
    /// outage is noticed quickly, and a long outage causes little load.
    pub(super) fn poll_pause(&self, lost_for: Duration) -> Duration {
        (lost_for / 100).clamp(self.settings.poll.0, self.settings.poll.1)
    }
}
