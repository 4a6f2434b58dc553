//! The words between the topology and its shell: what the shell tells, and what it is told to do.

use std::time::Duration;

use super::{Address, Endpoint, Eviction, GenerationId, Notice, Primary, ProbeFailure, ServerReport};

/// Why somebody thinks that the primary is no longer one.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Suspicion {
    /// A session ended or could not be opened.
    Connection,
    /// A session of this generation found itself read-only.
    ReadOnly,
}

/// What the sessions of the pool were doing since the last look.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct TrafficSample {
    /// Somebody has a connection on loan, and perhaps waits for an answer on it.
    pub(crate) in_use: bool,
    /// Something was sent or received.
    pub(crate) moved: bool,
    /// Something was received, for certain. That something was sent shows nothing of the server.
    pub(crate) received: bool,
    /// Sessions of the pool to the primary that have not ended.
    pub(crate) open: usize,
}

/// What came of one probe.
#[derive(Debug)]
pub(crate) struct Probed {
    pub(crate) address: Address,
    pub(crate) result: Result<ServerReport, ProbeFailure>,
    /// Asked on a session made for this probe.
    pub(crate) fresh: bool,
    /// A session to this server that was open before is still open.
    pub(crate) still_open: bool,
    /// Asked beside the first question.
    pub(crate) beside: bool,
}

/// What the shell has to do.
#[derive(Clone, Debug)]
pub(crate) enum Action {
    /// Ask for the addresses behind this configured name.
    Resolve(usize),
    /// Ask this server, on a new session if `fresh`, and by a promotion wait before if there is an open one.
    Probe {
        endpoint: Endpoint,
        fresh: bool,
        /// Beside a question that may be under way to the same server; if not `fresh`, on a session that is open or not at all.
        beside: bool,
        promotion_wait: Option<PromotionWait>,
        /// Time for the answer on a session that is open, the promotion wait included.
        within: Duration,
        /// Time for opening a session and for the answer.
        opened_within: Duration,
    },
    /// Checkouts wait; the generation's connections live on.
    Suspend { why: String },
    /// The suspended generation's server is the verified primary again, perhaps at another address.
    Resume { primary: Primary, lost_for: Duration },
    /// The primary tells more of itself than when its generation began.
    Learned { report: ServerReport },
    /// New sessions to the primary go to this address from now on.
    Move { endpoint: Endpoint },
    /// All connections of this generation end now. `lost`: until now it was in use, and no suspension came before.
    End { id: GenerationId, cause: Eviction, why: String, lost: bool },
    /// A new generation begins.
    Begin { primary: Primary, lost_for: Option<Duration> },
    /// Something that an operator wants to know; each is said once.
    Notice(Notice),
}

/// The server itself waits for the end of its recovery, so that a promotion is told the moment it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PromotionWait {
    /// It ends after this in any case.
    pub(crate) lasts: Duration,
    /// Pause between two looks.
    pub(crate) step: Duration,
}
