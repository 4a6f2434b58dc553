//! A fence that the pool's own `options` lift: the database says that new sessions are read-only, and they are not.
//!
//! The options are the same for each session, so a new session at any server of the cluster shows whether they lift it.

use tokio::time::Instant;

use super::{Answer, Part, Probed, Refusal, ServerReport, Topology};

/// What is known of a fence that the servers report for new sessions.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Fence {
    /// When a report first showed it.
    seen_at: Option<Instant>,
    /// When a new session last turned out to be writable in spite of it.
    lifted_at: Option<Instant>,
}

impl Topology {
    /// Notes what an answer shows about a fence. `asked_at`: when the question began.
    pub(super) fn note_fence(&mut self, now: Instant, probed: &Probed, asked_at: Option<Instant>, answer: &Answer) {
        let report = match answer {
            Answer::Primary(report) => report,
            Answer::Refused(_, Refusal::Fenced) if probed.fresh => {
                self.fence.lifted_at = None;
                return;
            }
            Answer::Refused(..) | Answer::Failed(_) => return,
        };
        if probed.fresh {
            // A new session is not asked for the setting: it has it. One that was opened before the fence was seen may be
            // older than the fence.
            let is_newer = self.fence.seen_at.is_some_and(|seen_at| asked_at.is_some_and(|asked| asked >= seen_at));
            if is_newer {
                self.fence.lifted_at = Some(now);
            }
        } else if report.fence_pending {
            self.fence.seen_at = self.fence.seen_at.or(Some(now));
        } else if !report.withheld.contains(Part::Fence) {
            self.fence = Fence::default();
        }
    }

    /// Returns whether the pool's new sessions will be read-only, as far as a report on an open session shows.
    pub(super) fn is_fenced(&self, report: &ServerReport) -> bool {
        report.fence_pending && self.fence.lifted_at.is_none()
    }

    /// Returns whether to look by a new session whether the fence in this report holds. If new sessions have shown that it
    /// does not, one look in each patrol is enough.
    pub(super) fn must_look_at_fence(&self, now: Instant, report: &ServerReport) -> bool {
        let looked = self.fence.lifted_at.is_some_and(|at| now < at + self.settings.patrol);
        report.fence_pending && !looked
    }
}
