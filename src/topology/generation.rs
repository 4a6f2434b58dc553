//! The primary of one generation, and how its server is recognised.

use super::{Address, Endpoint, GenerationId, Part, Refusal, Role, ServerReport};

/// The primary of one generation.
#[derive(Clone, Debug)]
pub(crate) struct Primary {
    pub(crate) id: GenerationId,
    pub(crate) endpoint: Endpoint,
    pub(crate) report: ServerReport,
}

impl Primary {
    /// Checks whether a session that answers with `report` may serve in this generation.
    pub(crate) fn admits(&self, report: &ServerReport) -> Result<(), Refusal> {
        if let (Some(expected), Some(found)) = (self.report.system_identifier, report.system_identifier)
            && expected != found
        {
            return Err(Refusal::OtherCluster { expected, found });
        }
        writable(report)?;
        if self.is(&self.endpoint.address, report) { Ok(()) } else { Err(Refusal::AnotherServer) }
    }

    /// Returns whether the server that answers with `report` at `address` is this primary in the same life: it has
    /// neither been restarted nor recovered from a crash since. If the start time cannot be read, the address decides.
    pub(crate) fn is(&self, address: &Address, report: &ServerReport) -> bool {
        let mine = &self.report;
        if mine.timeline.is_some() && report.timeline.is_some() && mine.timeline != report.timeline {
            return false;
        }
        let same_replay = same_replay(mine, report);
        match (mine.started_at, report.started_at) {
            (Some(started), Some(theirs)) => started == theirs && same_replay,
            _ => self.endpoint.address == *address && same_replay,
        }
    }

    /// Returns whether the report is of another server that is writable on this primary's timeline. No report proves
    /// which of the two is the right one.
    pub(super) fn has_rival(&self, report: &ServerReport) -> bool {
        let mine = &self.report;
        let started = |report: &ServerReport| report.started_at.is_some();
        started(mine) && started(report) && !same_start(mine, report) && mine.timeline == report.timeline
    }
}

/// Checks by the server's role whether it accepts writes.
pub(super) fn writable(report: &ServerReport) -> Result<(), Refusal> {
    match report.role() {
        Role::Fenced if planted!("takes fenced servers") => Ok(()),
        Role::Primary => Ok(()),
        Role::Standby => Err(Refusal::Standby),
        Role::Fenced => Err(Refusal::Fenced),
        Role::Promoting => Err(Refusal::Promoting),
    }
}

/// Returns whether both reports show the same start time, so that they are from one server.
pub(super) fn same_start(one: &ServerReport, other: &ServerReport) -> bool {
    one.started_at.is_some() && one.started_at == other.started_at
}

/// Returns `false` if both reports show where the primary's replay ended, and the positions differ.
pub(super) fn same_replay(before: &ServerReport, report: &ServerReport) -> bool {
    let told = |report: &ServerReport| !report.in_recovery && !report.withheld.contains(Part::Replay);
    !told(before) || !told(report) || before.replayed == report.replayed
}
