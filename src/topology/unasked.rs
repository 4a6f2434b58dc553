//! Time during which no server was asked: the pool slept, or the process did not run, because it or its machine was
//! stopped.
//!
//! Such time proves nothing about a server, so it is added to each limit that runs meanwhile. What was known before is
//! outdated: the newest timeline known then may now be an old primary's.
//!
//! There are two signs that the process did not run. Something happens long after it was due. Or the wall clock has
//! advanced further than the monotonic clock, which stands still while a machine is suspended. A wall clock that is set
//! forward looks the same. That does no harm: the servers and the names are asked once more.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::{GRACE, Phase, Topology};

/// If something happens this much later than it was due, or if the clocks differ by this much, the process did not run
/// meanwhile.
const LATE: Duration = Duration::from_secs(1);
/// No question and no look-up takes longer than this, so the next input comes within this time.
const LONGEST_WORK: Duration = Duration::from_secs(10);
/// The most spans of time that are kept apart.
const MOST_SPANS: usize = 16;

/// A span of time, of which `lost` was lost: all of it, or only a part if the span was merged from several pauses.
#[derive(Clone, Copy, Debug)]
struct Span {
    from: Instant,
    until: Instant,
    lost: Duration,
}

impl Span {
    /// How much was lost after `at`.
    fn lost_after(&self, at: Instant) -> Duration {
        let (rest, whole) = (self.until.saturating_duration_since(at), self.until.duration_since(self.from));
        if rest >= whole { self.lost } else { self.lost.mul_f64(rest.as_secs_f64() / whole.as_secs_f64()) }
    }
}

/// The times in which servers were not asked.
#[derive(Debug)]
pub(super) struct Unasked {
    spans: VecDeque<Span>,
    /// When the last pause ended.
    until: Option<Instant>,
    /// No primary has been found since then, so what was known is outdated.
    outdated: bool,
    /// When the process was last seen to run.
    ran_at: Instant,
    /// When the next input or poll is due at the latest.
    due: Instant,
    /// The monotonic and the wall clock when they were last read.
    clocks: Option<(Instant, Duration)>,
}

impl Unasked {
    pub(super) fn new(now: Instant) -> Self {
        Self { spans: VecDeque::new(), until: None, outdated: false, ran_at: now, due: now, clocks: None }
    }

    /// Returns when a time limit starts that began at `at`. This is later than `at` by the time that was lost since,
    /// because the limit runs only while servers are asked.
    pub(super) fn counts_from(&self, at: Instant) -> Instant {
        at + self.spans.iter().map(|span| span.lost_after(at)).sum::<Duration>()
    }

    /// A primary was found, so what is known is up to date again.
    pub(super) fn note_up_to_date(&mut self) {
        self.outdated = false;
    }

    /// From now on no server is asked.
    pub(super) fn begin(&mut self, now: Instant) {
        (self.ran_at, self.due) = (now, now);
    }

    /// From now on they are asked again.
    pub(super) fn end(&mut self, now: Instant) {
        if now > self.ran_at {
            self.spans.push_back(Span { from: self.ran_at, until: now, lost: now.duration_since(self.ran_at) });
        }
        // Merge the two oldest spans into one with the same loss.
        if self.spans.len() > MOST_SPANS
            && let (Some(one), Some(other)) = (self.spans.pop_front(), self.spans.pop_front())
        {
            self.spans.push_front(Span { from: one.from, until: other.until, lost: one.lost + other.lost });
        }
        (self.until, self.outdated) = (Some(now), true);
        self.begin(now);
    }
}

impl Topology {
    /// Notices whether the process did not run just before this moment. Call this before each input.
    pub(super) fn notice_pause(&mut self, now: Instant) {
        if now > self.unasked.due + GRACE.0 {
            self.postpone_pick(now + GRACE.0, now > self.unasked.due + LATE);
        }
        if now <= self.unasked.due + LATE {
            return;
        }
        self.unasked.end(now);
        self.names.iter_mut().for_each(|name| name.doubt(now));
    }

    /// Takes in the wall clock. Call it before all other inputs of this moment.
    ///
    /// While the machine was suspended, the limits stood still like the monotonic clock. But what is known is outdated,
    /// so every server and name is asked again.
    pub(crate) fn wall_clock(&mut self, now: Instant, wall: Duration) {
        let Some((before, then)) = self.unasked.clocks.replace((now, wall)) else {
            return;
        };
        if wall.saturating_sub(then) <= now.duration_since(before) + LATE {
            return;
        }
        if now <= self.unasked.due + LATE {
            self.unasked.begin(now);
        }
        self.unasked.end(now);
        self.postpone_pick(now + GRACE.0, true);
        self.names.iter_mut().for_each(|name| name.doubt(now));
        for member in self.members.values_mut() {
            member.hurry(now, self.settings.poll.0);
        }
    }

    /// Notes when the topology must be polled at the latest.
    pub(super) fn note_due(&mut self, now: Instant) {
        let longest = LONGEST_WORK.max(self.settings.probe_timeout + self.settings.heartbeat_timeout);
        let asking = self.members.values().any(|member| member.asking) || self.beside.asking;
        let wake_at = self.wake_at().filter(|at| !asking || *at < now + longest).unwrap_or(now + longest);
        (self.unasked.ran_at, self.unasked.due) = (now, wake_at.max(now));
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
