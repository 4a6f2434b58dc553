//! The messages between the topology and the cluster's task: what the task reports, and what it has to do.

use std::time::Duration;

use super::{
    Address, Endpoint, Eviction, GenerationId, Parts, Primary, ProbeFailure, PromotionWait, Refusal, ServerReport,
};

/// Why a caller doubts that the primary is still one.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Suspicion {
    /// A session ended or could not be opened.
    Connection,
    /// A session of this generation turned out to be read-only.
    ReadOnly,
}

/// What the sessions of the pool did since the last sample.
#[derive(Clone, Copy, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(crate) struct TrafficSample {
    /// A connection is checked out, and its user may be waiting for an answer.
    pub(crate) in_use: bool,
    /// Something was sent or received.
    pub(crate) moved: bool,
    /// Something was received that shows that the server lives. Sent messages do not count, because they prove nothing
    /// about the server.
    pub(crate) received: bool,
    /// The number of the pool's sessions to the primary that have not ended.
    pub(crate) open: usize,
    /// The question of [`Action::AskIdle`] is under way on an idle session.
    pub(crate) idle_asked: bool,
}

/// The result of one probe.
#[derive(Debug)]
pub(crate) struct Probed {
    pub(crate) address: Address,
    pub(crate) result: Result<ServerReport, ProbeFailure>,
    /// The probe opened a session of its own.
    pub(crate) fresh: bool,
    /// A session to this server that was open before is still open.
    pub(crate) still_open: bool,
    /// The probe was the question beside the first one.
    pub(crate) beside: bool,
}

/// What the cluster's task has to do.
#[derive(Clone, Debug)]
pub(crate) enum Action {
    /// Ask for the addresses behind this configured name.
    Resolve(usize),
    /// Probe this server. If `fresh`, open a new session for it. On an open session, run the promotion wait first.
    Probe {
        endpoint: Endpoint,
        fresh: bool,
        /// This is the second question to the server: another one may be under way. Unless `fresh`, only a session that
        /// is already open is used.
        beside: bool,
        promotion_wait: Option<PromotionWait>,
        /// Time limit for the answer on an open session, including the promotion wait.
        within: Duration,
        /// Time limit for opening a session and getting the answer.
        opened_within: Duration,
    },
    /// Ask the primary on one of the pool's idle sessions, if there is one: no session to the primary is kept, or the
    /// kept session to a suspended primary may be dead. An answer counts as a sign of life.
    AskIdle,
    /// Checkouts wait, but the generation's connections stay open.
    Suspend { why: String },
    /// The primary of the suspended generation is verified again, perhaps at another address.
    Resume { primary: Primary, lost_for: Duration },
    /// The primary has reported more about itself than when its generation began.
    Learned { report: ServerReport },
    /// From now on, new sessions to the primary connect to this address.
    Move { endpoint: Endpoint },
    /// All connections of this generation end now. `lost`: the generation was in use until now, and was not suspended
    /// before.
    End { id: GenerationId, cause: Eviction, why: String, lost: bool },
    /// A new generation begins.
    Begin { primary: Primary, lost_for: Option<Duration> },
    /// The operator should know this. Each notice is given once.
    Notice(Notice),
}

/// A notice for an operator.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Notice {
    /// A writable server was refused.
    Refused(Address, Refusal),
    /// Two servers are writable, and no timeline shows which is the newer one. The one in use stays.
    TwoPrimaries(Address),
    /// The server withholds these parts from the pool's role.
    Withheld(Address, Parts),
    /// There are more addresses than are probed at the same time.
    TooManyCandidates(usize),
    /// The user has accepted another cluster as the pool's own. `accepted` is `None` if any cluster is accepted.
    ClusterAccepted { before: Option<u64>, accepted: Option<u64> },
    /// There has been no primary for this long.
    StillSearching(Duration),
}
