//! The error of a caller that got no connection in time: the reason, and what each candidate said.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use crate::cluster::Diagnosis;
use crate::topology::{Answer, CandidateReport, FailureKind, ProbeFailure, Refusal};

/// The most candidates that the text of an error lists. `candidates()` returns all of them.
const LISTED: usize = 32;

/// The setting that limits the wait unless a call has a limit of its own.
pub(crate) const CHECKOUT_TIMEOUT: &str = "checkout_timeout";

/// Why there was no connection in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum UnavailableReason {
    /// No candidate is a writable primary.
    NoPrimary,
    /// The only primary is fenced. It runs, and it is set to read-only.
    Fenced,
    /// A primary answers, but it belongs to another cluster than the one that this pool was connected to before.
    OtherCluster,
    /// A primary answers, but it is an old one. Its cluster has gone on without it, on a newer timeline.
    OldPrimary,
    /// No address is known, because DNS gave none.
    Dns,
    /// A primary is known, but every attempt to open a session to it failed.
    NoSession,
    /// A primary is known, but every connection of the pool is in use.
    PoolExhausted,
}

/// [`Error::Unavailable`](super::Error::Unavailable): what the pool tried, and what each candidate said.
#[derive(Debug)]
pub struct Unavailable {
    reason: UnavailableReason,
    waited: Duration,
    obstacle: Obstacle,
    diagnosis: Diagnosis,
    /// The setting that has ended the wait.
    limit: &'static str,
}

/// Why a caller got no connection.
#[derive(Debug)]
pub(crate) enum Obstacle {
    NoPrimary,
    /// The primary is known, but no session to it could be opened. Holds the failure of the last attempt, if one has
    /// ended.
    NoSession(Option<ProbeFailure>),
    /// The primary is known, and an idle connection is being tested.
    BeingTested,
    /// The primary is known, but all connections are in use.
    NoneFree {
        max_size: usize,
    },
    /// The transactions that the call runs in hold all connections.
    HeldByCaller {
        max_size: usize,
    },
}

impl Unavailable {
    pub(crate) fn new(waited: Duration, diagnosis: Diagnosis, obstacle: Obstacle, limit: &'static str) -> Self {
        let refused = |expected: fn(&Refusal) -> bool| {
            diagnosis
                .candidates
                .iter()
                .any(|candidate| matches!(&candidate.answer, Some(Answer::Refused(_, refusal)) if expected(refusal)))
        };
        let reason = match &obstacle {
            Obstacle::NoneFree { .. } | Obstacle::HeldByCaller { .. } => UnavailableReason::PoolExhausted,
            Obstacle::NoSession(_) | Obstacle::BeingTested => UnavailableReason::NoSession,
            Obstacle::NoPrimary if diagnosis.candidates.is_empty() => UnavailableReason::Dns,
            Obstacle::NoPrimary if refused(|refusal| *refusal == Refusal::Fenced) => UnavailableReason::Fenced,
            Obstacle::NoPrimary if refused(|refusal| matches!(refusal, Refusal::OtherCluster { .. })) => {
                UnavailableReason::OtherCluster
            }
            Obstacle::NoPrimary if refused(|refusal| matches!(refusal, Refusal::Zombie { .. })) => {
                UnavailableReason::OldPrimary
            }
            Obstacle::NoPrimary => UnavailableReason::NoPrimary,
        };
        Self { reason, waited, obstacle, diagnosis, limit }
    }

    /// Why there was no connection.
    #[must_use]
    pub fn reason(&self) -> UnavailableReason {
        self.reason
    }

    /// How long the caller waited.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Each candidate and its last answer.
    #[must_use]
    pub fn candidates(&self) -> &[CandidateReport] {
        &self.diagnosis.candidates
    }

    /// The failure of DNS, if there was one.
    #[must_use]
    pub fn dns_failure(&self) -> Option<&str> {
        self.diagnosis.dns.as_deref()
    }

    /// The system identifier of the cluster that answers instead of the pool's own, for the advice in the text.
    fn claimed(&self) -> String {
        let claimed = self.candidates().iter().find_map(|candidate| match &candidate.answer {
            Some(Answer::Refused(report, Refusal::OtherCluster { .. } | Refusal::Zombie { .. })) => {
                report.system_identifier
            }
            _ => None,
        });
        claimed.map_or_else(|| "its system identifier".to_owned(), |identifier| identifier.to_string())
    }

    fn trouble(&self) -> Option<&ProbeFailure> {
        match &self.obstacle {
            Obstacle::NoSession(trouble) => trouble.as_ref(),
            _ => None,
        }
    }

    fn max_size(&self) -> usize {
        match self.obstacle {
            Obstacle::NoneFree { max_size } | Obstacle::HeldByCaller { max_size } => max_size,
            _ => 0,
        }
    }
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let waited = self.waited;
        match self.reason {
            UnavailableReason::NoPrimary => {
                let limit = self.limit;
                write!(f, "no writable primary within {waited:.1?}; start or promote one, or wait longer ({limit})")?;
            }
            UnavailableReason::Fenced => write!(
                f,
                "the primary is fenced (default_transaction_read_only is on) and no other came up within {waited:.1?}; \
                 look for a full disk, a lost quorum or a manual setting on the server"
            )?,
            UnavailableReason::OtherCluster => write!(
                f,
                "the server that answers belongs to another cluster, and this pool's own primary did not come back \
                 within {waited:.1?}; check where the name points, or if the pool shall follow it (after an upgrade, a \
                 restore or a switch to a copy), call `Pool::accept_cluster({})` or set \
                 `PoolBuilder::accept_new_cluster_after`",
                self.claimed()
            )?,
            UnavailableReason::OldPrimary => write!(
                f,
                "the server that answers is an old primary, and the newer one did not come back within {waited:.1?}; \
                 start the newer one, or if the database was restored on purpose, call `Pool::accept_cluster({})` or \
                 set `PoolBuilder::accept_new_cluster_after`",
                self.claimed()
            )?,
            UnavailableReason::Dns => {
                write!(f, "no server address within {waited:.1?}; check the host name and the name servers")?;
            }
            UnavailableReason::NoSession if self.trouble().is_some_and(|trouble| trouble.kind == FailureKind::Hook) => {
                write!(f, "the primary is known, but a hook of the pool let no connection pass within {waited:.1?}")?;
            }
            UnavailableReason::NoSession if matches!(self.obstacle, Obstacle::BeingTested) => write!(
                f,
                "the primary is known, but its idle connections were still being tested after {waited:.1?}; wait \
                 longer ({}), or raise test_idle_after if the network is slow",
                self.limit
            )?,
            UnavailableReason::NoSession
                if self.trouble().is_some_and(|trouble| trouble.kind == FailureKind::TimedOut) =>
            {
                write!(
                    f,
                    "the primary is known, but it took no new session within {waited:.1?}; raise probe_timeout if \
                     opening one takes longer"
                )?;
            }
            UnavailableReason::NoSession => write!(
                f,
                "the primary is known, but it took no new session within {waited:.1?}; raise max_connections or lower \
                 max_size if it has too many clients"
            )?,
            UnavailableReason::PoolExhausted if matches!(self.obstacle, Obstacle::HeldByCaller { .. }) => {
                return write!(
                    f,
                    "no connection can be had: max_size is {}, and the transactions that this call is made within hold \
                     all of them; use their handles, make the call after them, or raise max_size",
                    self.max_size()
                );
            }
            UnavailableReason::PoolExhausted => {
                return write!(
                    f,
                    "all {} connections were in use for {waited:.1?}; raise max_size, hold connections for less time, \
                     or wait longer ({})",
                    self.max_size(),
                    self.limit
                );
            }
        }
        if let Some(trouble) = self.trouble() {
            write!(f, "; last attempt: {trouble}")?;
        }
        for candidate in self.candidates().iter().take(LISTED) {
            write!(f, "; {candidate}")?;
        }
        let unlisted = self.candidates().len().saturating_sub(LISTED);
        if unlisted > 0 {
            write!(f, "; and {unlisted} more")?;
        }
        if self.diagnosis.waiting > 0 {
            write!(f, "; {} more addresses take turns with these", self.diagnosis.waiting)?;
        }
        if let Some(dns) = self.dns_failure() {
            write!(f, "; DNS: {dns}")?;
        }
        Ok(())
    }
}

impl StdError for Unavailable {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.trouble().map(|trouble| trouble as &(dyn StdError + 'static))
    }
}
