//! Time during which no server was asked: the pool slept, or the process did not run, because it or its machine was
//! stopped.
//!
//! Such time proves nothing about a server, so no time limit runs meanwhile. What was known before is outdated: the
//! newest timeline of that time may now be that of an old primary.

use std::time::Duration;

use tokio::time::Instant;

use super::{GRACE, Phase, Topology};

/// If an input or a poll comes this much later than it was due, the process did not run meanwhile.
const LATE: Duration = Duration::from_secs(1);
/// No question and no look-up takes longer than this, so the next input comes within this time.
const LONGEST_WORK: Duration = Duration::from_secs(10);

/// The last period in which servers were not asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unasked {
    until: Option<Instant>,
    /// No primary has been found since then, so what was known is outdated.
    outdated: bool,
    /// When the next input or poll is due at the latest.
    due: Instant,
}

impl Unasked {
    pub(super) fn new(now: Instant) -> Self {
        Self { until: None, outdated: false, due: now }
    }

    /// Returns when a time limit starts that would have started at `at`. It runs only while servers are asked.
    pub(super) fn counts_from(&self, at: Instant) -> Instant {
        self.until.map_or(at, |until| until.max(at))
    }

    /// A primary was found, so what is known is up to date again.
    pub(super) fn note_up_to_date(&mut self) {
        self.outdated = false;
    }
}

impl Topology {
    /// Notices if the process did not run before this moment. Call this before each input.
    pub(super) fn notice_pause(&mut self, now: Instant) {
        if now > self.unasked.due + GRACE.0 {
            self.postpone_pick(now + GRACE.0);
        }
        if now <= self.unasked.due + LATE {
            return;
        }
        self.asked_again(now);
        self.names.iter_mut().for_each(|name| name.doubt(now));
    }

    /// Notes that from now on the servers are asked again.
    pub(super) fn asked_again(&mut self, now: Instant) {
        self.unasked = Unasked { until: Some(now), outdated: true, due: now };
    }

    /// Notes when the topology must be polled at the latest.
    pub(super) fn note_due(&mut self, now: Instant) {
        let longest = LONGEST_WORK.max(self.settings.probe_timeout + self.settings.heartbeat_timeout);
        self.unasked.due = self.wake_at().unwrap_or(now + longest).max(now);
    }

    /// Returns the newest timeline, unless it is outdated because a server may have been promoted while nobody was
    /// asked. It is up to date again if this search began at least a patrol later, because each server has been asked
    /// since.
    pub(super) fn newest_if_current(&self) -> Option<u32> {
        let Unasked { until, outdated, .. } = self.unasked;
        let began_since = |until: Instant| match &self.phase {
            Phase::Searching(search) => search.since >= until + self.settings.patrol,
            Phase::Known { .. } => true,
        };
        self.newest_timeline.filter(|_| !outdated || until.is_none_or(began_since))
    }
}
