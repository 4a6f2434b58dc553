//! A fence that the pool's own `options` override: the database makes new sessions read-only, but the options make them
//! writable.
//!
//! The options are the same for each session. So a new session on any server of the cluster shows whether they override
//! the fence.

use tokio::time::Instant;

use super::{Answer, Part, Probed, Refusal, ServerReport, Topology};

/// What is known about a fence that the servers report for new sessions.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Fence {
    /// When a report first showed it.
    seen_at: Option<Instant>,
    /// When a new session was last writable in spite of the fence.
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
            // A new session has the setting itself, so it is not asked for the fence. A session that was opened before
            // the fence was seen may be older than the fence, so it proves nothing.
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

    /// Returns whether the pool's new sessions will be read-only, according to a report on an open session.
    pub(super) fn is_fenced(&self, report: &ServerReport) -> bool {
        report.fence_pending && self.fence.lifted_at.is_none()
    }

    /// Returns whether a new session must be opened to see whether the fence in this report is effective. If a new
    /// session has shown that it is not, one such session per patrol is enough.
    pub(super) fn must_look_at_fence(&self, now: Instant, report: &ServerReport) -> bool {
        let looked = self.fence.lifted_at.is_some_and(|at| now < at + self.settings.patrol);
        report.fence_pending && !looked
    }
}
