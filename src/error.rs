//! The public errors, composed of what the layers below say.
//!
//! Invariants: an error that says "not committed" is true; every error says what happened and what to do; a time-out
//! never hides its cause. Tests: `tests/it/errors.rs`.

mod ended;

pub use ended::SessionEnded;

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use crate::classify::{BadCertificate, TlsTrouble, explain, links, tls_trouble, without_code};
use crate::cluster::Diagnosis;
use crate::commit::Unsettled;
use crate::topology::{Answer, CandidateReport, Endpoint, FailureKind, ProbeFailure, Refusal};

/// So many candidates are listed in an error's text; `candidates()` has all.
const LISTED: usize = 32;

type Source = Box<dyn StdError + Send + Sync + 'static>;

/// What a pool or a transaction can fail with.
///
/// Ask [`Error::commit_outcome`] for the one thing that matters after a write: whether it may have landed.
///
/// ```
/// use tokio_postgres_failover::{CommitOutcome, Error};
///
/// fn advice(error: &Error) -> &'static str {
///     match error {
///         Error::Unavailable(_) => "no primary in time: answer 503 and try later",
///         Error::Refused(_) | Error::Closed => "nothing that waiting would mend",
///         _ if error.commit_outcome() == CommitOutcome::Unknown => "look whether the work is there before repeating it",
///         _ => "the transaction was rolled back",
///     }
/// }
/// # assert_eq!(advice(&Error::Closed), "nothing that waiting would mend");
/// ```
///
/// Its `Debug` is its text, as that is what `unwrap` and a `main` that returns it show.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No connection to a verified primary was to be had before the deadline. Each candidate and what it said is listed.
    #[error(transparent)]
    Unavailable(Box<Unavailable>),
    /// The servers refuse the credentials, the database or the kind of TLS, are no PostgreSQL, or belong to several clusters;
    /// waiting would not help.
    #[error(transparent)]
    Refused(Box<Refused>),
    /// The pool was closed.
    #[error("the pool is closed; make a new one, or close it after the last user is done")]
    Closed,
    /// The tokio runtime that the pool was built on has ended, and with it the task that follows the primary and every
    /// session. Typical of a pool in a `static` that several `#[tokio::test]`s share: each of them has a runtime of its own.
    #[error(
        "the tokio runtime that the pool was built on has ended, and the pool with it; build the pool on a runtime that \
         outlives its users: one pool for each #[tokio::test], or one runtime for all"
    )]
    RuntimeEnded,
    /// The connections of a [wrapped](crate::Pool::wrap) pool have drivers of their own, which tell this crate of no
    /// notification.
    #[error("a wrapped pool cannot listen; use one made by `Pool::builder` for that")]
    Wrapped,
    /// The database answered with an error, or the connection was lost on the way.
    #[error("{}", explain(.0))]
    Database(#[from] tokio_postgres::Error),
    /// The connection was lost between COMMIT and its answer, and the outcome could not be settled: the transaction may or
    /// may not have been committed.
    #[error(transparent)]
    CommitUnknown(Box<CommitUnknown>),
    /// The transaction did not begin, as the ledger of [`Guarantee::Ledger`](crate::Guarantee::Ledger) cannot be written.
    #[error(
        "the ledger cannot be written: {}; create it with `Ledger::install` or sql/ledger.sql, and grant SELECT, INSERT, \
         UPDATE and DELETE on it",
        explain(.0)
    )]
    Ledger(#[source] tokio_postgres::Error),
    /// The closure returned `Ok`, but the transaction was rolled back.
    #[error(transparent)]
    RolledBack(RolledBack),
    /// The closure ended its transaction itself, with `COMMIT`, `ROLLBACK` or the like: the pool cannot tell what of its work
    /// is stored. It was not run again.
    #[error(transparent)]
    EndedInside(Box<EndedInside>),
    /// The work was run again until the retry policy said stop. Nothing was committed, unless the source says otherwise.
    #[error(transparent)]
    Exhausted(Box<Exhausted>),
    /// The attempt took longer than [`RetryPolicy::attempt_timeout`](crate::RetryPolicy::attempt_timeout) allows. The server
    /// was told to stop, and the transaction is rolled back.
    #[error(
        "the transaction took longer than {after:?} and was rolled back; make its statements faster, split it, or raise \
         the policy's attempt_timeout"
    )]
    TimedOut {
        /// The limit.
        after: Duration,
    },
    /// The server ended the session within the transaction, which was rolled back. Its reason would come again (a time limit
    /// for idle transactions, say), so the work was run once. In [`Exhausted::last_error`] and [`Retry::cause`](crate::Retry::cause)
    /// it is also the reason of an attempt that was run again.
    #[error(transparent)]
    SessionEnded(Box<SessionEnded>),
    /// The closure gave up with an error of its own (see [`Error::abort`]); the transaction was rolled back.
    #[error(transparent)]
    Aborted(Source),
}

/// Whether the work of a failed call may have been committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CommitOutcome {
    /// It was not, and never will be.
    NotCommitted,
    /// It may or may not have been.
    Unknown,
}

impl Error {
    /// Ends a transaction's closure with an error of the application's own: the transaction is rolled back, and the error
    /// comes back as [`Error::Aborted`]. Takes any error, a `String`, an `anyhow::Error` or a `Box<dyn Error>`.
    ///
    /// The work is not run again, unless something befell its transaction that running again mends, whatever the error says
    /// of it: its session has ended, its server has aborted it with a conflict, or the error's source chain holds a database
    /// error that a failover causes.
    ///
    /// ```
    /// use tokio_postgres_failover::Error;
    ///
    /// #[derive(Debug, PartialEq, thiserror::Error)]
    /// #[error("sold out")]
    /// struct SoldOut;
    ///
    /// let error = Error::abort(SoldOut);
    /// assert_eq!(error.downcast_ref::<SoldOut>(), Some(&SoldOut));
    /// assert_eq!(error.downcast::<SoldOut>().unwrap(), SoldOut);
    /// ```
    ///
    /// An `anyhow::Error` or an `eyre::Report` hides the type of what it was made of when it becomes a boxed error, as it does
    /// here, unless a context was added: hand it to [`Error::abort_report`], and [`Error::downcast_ref`] finds it.
    pub fn abort(error: impl Into<Source>) -> Self {
        Self::Aborted(error.into())
    }

    /// As [`Error::abort`], for an `anyhow::Error`, an `eyre::Report` or whatever else shows the error within by `AsRef`:
    /// keeps its type, so that [`Error::downcast_ref`] finds it.
    ///
    /// ```
    /// use tokio_postgres_failover::Error;
    ///
    /// #[derive(Debug, PartialEq, thiserror::Error)]
    /// #[error("sold out")]
    /// struct SoldOut;
    ///
    /// fn buy() -> anyhow::Result<()> {
    ///     Err(SoldOut.into())
    /// }
    ///
    /// let error = buy().map_err(Error::abort_report).unwrap_err();
    /// assert_eq!(error.downcast_ref::<SoldOut>(), Some(&SoldOut));
    /// ```
    pub fn abort_report<R>(report: R) -> Self
    where
        R: AsRef<dyn StdError + Send + Sync> + fmt::Debug + fmt::Display + Send + Sync + 'static,
    {
        Self::Aborted(Box::new(ended::Report(report)))
    }

    /// The closure's own error, or a link of its source chain, if that is an `E`.
    #[must_use]
    pub fn downcast_ref<E: StdError + 'static>(&self) -> Option<&E> {
        match self {
            Self::Aborted(source) => links(source.as_ref()).find_map(|link| link.downcast_ref()),
            Self::Exhausted(exhausted) => exhausted.source.downcast_ref(),
            Self::EndedInside(ended) => ended.source.as_ref().and_then(Self::downcast_ref),
            Self::SessionEnded(ended) => ended.last_error().downcast_ref(),
            _ => None,
        }
    }

    /// The closure's own error, if it is an `E`; else the error itself. What only a link of the source chain holds cannot be
    /// taken out of it: see [`Error::downcast_ref`].
    pub fn downcast<E: StdError + 'static>(self) -> Result<E, Self> {
        match self {
            Self::Aborted(source) => source.downcast().map(|own| *own).map_err(Self::Aborted),
            Self::Exhausted(exhausted) if exhausted.source.downcast_ref::<E>().is_some() => exhausted.source.downcast(),
            Self::EndedInside(ended) => match *ended {
                EndedInside { source: Some(source), .. } if source.downcast_ref::<E>().is_some() => source.downcast(),
                ended => Err(Self::EndedInside(Box::new(ended))),
            },
            Self::Exhausted(exhausted) if exhausted.source.is_own::<E>() => exhausted.source.downcast(),
            Self::SessionEnded(ended) if ended.last_error().is_own::<E>() => ended.into_last_error().downcast(),
            other => Err(other),
        }
    }

    /// Can an `E` be taken out of it?
    fn is_own<E: StdError + 'static>(&self) -> bool {
        match self {
            Self::Aborted(source) => source.is::<E>(),
            Self::Exhausted(exhausted) => exhausted.source.is_own::<E>(),
            Self::SessionEnded(ended) => ended.last_error().is_own::<E>(),
            _ => false,
        }
    }

    /// May the work have been committed? Meant for the errors of `transaction`, `idempotent` and `read`.
    #[must_use]
    pub fn commit_outcome(&self) -> CommitOutcome {
        match self {
            Self::CommitUnknown(_) | Self::EndedInside(_) => CommitOutcome::Unknown,
            Self::Exhausted(exhausted) => exhausted.outcome,
            _ => CommitOutcome::NotCommitted,
        }
    }

    /// The SQLSTATE of the database error in it, if there is one.
    ///
    /// ```
    /// # use tokio_postgres_failover::Error;
    /// assert!(Error::Closed.code().is_none());
    /// ```
    #[must_use]
    pub fn code(&self) -> Option<&tokio_postgres::error::SqlState> {
        match self {
            Self::Database(error) | Self::Ledger(error) => error.code(),
            Self::CommitUnknown(unknown) => match &unknown.doubt {
                Doubt::Lost(source) => source.0.code(),
                Doubt::Evicted | Doubt::NotReplicated | Doubt::Earlier => None,
            },
            Self::Exhausted(exhausted) => exhausted.source.code(),
            Self::EndedInside(ended) => ended.source.as_ref().and_then(Self::code),
            Self::SessionEnded(ended) => Some(ended.report().code()),
            _ => None,
        }
    }
}

impl Error {
    /// A name for what failed, of a handful: for telemetry.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Unavailable(_) => "unavailable",
            Self::Refused(_) => "refused",
            Self::Closed => "closed",
            Self::RuntimeEnded => "runtime_ended",
            Self::Database(error) => without_code(error),
            Self::CommitUnknown(_) => "commit_unknown",
            Self::Ledger(_) => "ledger",
            Self::RolledBack(_) => "rolled_back",
            Self::EndedInside(_) => "ended_inside",
            Self::Exhausted(_) => "exhausted",
            Self::TimedOut { .. } => "timed_out",
            Self::SessionEnded(_) => "session_ended",
            Self::Aborted(_) => "aborted",
            Self::Wrapped => "wrapped",
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unavailable(_) => write!(f, "Unavailable: {self}"),
            Self::Refused(_) => write!(f, "Refused: {self}"),
            Self::Closed => write!(f, "Closed: {self}"),
            Self::RuntimeEnded => write!(f, "RuntimeEnded: {self}"),
            Self::Database(_) => write!(f, "Database: {self}"),
            Self::CommitUnknown(_) => write!(f, "CommitUnknown: {self}"),
            Self::Ledger(_) => write!(f, "Ledger: {self}"),
            Self::RolledBack(_) => write!(f, "RolledBack: {self}"),
            Self::EndedInside(_) => write!(f, "EndedInside: {self}"),
            Self::Exhausted(_) => write!(f, "Exhausted: {self}"),
            Self::TimedOut { .. } => write!(f, "TimedOut: {self}"),
            Self::SessionEnded(_) => write!(f, "SessionEnded: {self}"),
            Self::Wrapped => write!(f, "Wrapped: {self}"),
            // The caller's own may say more so than as text.
            Self::Aborted(source) => write!(f, "Aborted: {source:?}"),
        }
    }
}

/// Why there was no connection in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum UnavailableReason {
    /// No candidate is a writable primary.
    NoPrimary,
    /// The only primary is fenced: it is up, and set read-only.
    Fenced,
    /// A primary answers, and it belongs to another cluster than the one that this pool was connected to before.
    OtherCluster,
    /// A primary answers, and it is an old one: the timeline of its cluster has gone on without it.
    OldPrimary,
    /// No address is known: DNS gave none.
    Dns,
    /// A primary is known, and opening a session to it failed each time.
    NoSession,
    /// A primary is known, and every connection of the pool is in use.
    PoolExhausted,
}

/// [`Error::Unavailable`]: what was tried, and what each candidate said.
#[derive(Debug)]
pub struct Unavailable {
    reason: UnavailableReason,
    waited: Duration,
    obstacle: Obstacle,
    diagnosis: Diagnosis,
}

/// What stood between a caller and a connection.
#[derive(Debug)]
pub(crate) enum Obstacle {
    NoPrimary,
    /// The primary is known; how the last try to open a session failed, if one has ended.
    NoSession(Option<ProbeFailure>),
    /// The primary is known, and all connections are in use.
    NoneFree {
        max_size: usize,
    },
    /// All connections are held by the transactions that the call is made within.
    HeldByCaller {
        max_size: usize,
    },
}

impl Unavailable {
    pub(crate) fn new(waited: Duration, diagnosis: Diagnosis, obstacle: Obstacle) -> Self {
        let refused = |expected: fn(&Refusal) -> bool| {
            diagnosis
                .candidates
                .iter()
                .any(|candidate| matches!(&candidate.answer, Some(Answer::Refused(_, refusal)) if expected(refusal)))
        };
        let reason = match &obstacle {
            Obstacle::NoneFree { .. } | Obstacle::HeldByCaller { .. } => UnavailableReason::PoolExhausted,
            Obstacle::NoSession(_) => UnavailableReason::NoSession,
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
        Self { reason, waited, obstacle, diagnosis }
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

    /// What DNS failed with, if it did.
    #[must_use]
    pub fn dns_failure(&self) -> Option<&str> {
        self.diagnosis.dns.as_deref()
    }

    /// The cluster that answers in the place of the pool's own.
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
                write!(f, "no writable primary within {waited:.1?}; start or promote one, or raise the deadline")?;
            }
            UnavailableReason::Fenced => write!(
                f,
                "the primary is fenced (default_transaction_read_only is on) and no other came up within {waited:.1?}; \
                 look for a full disk, a lost quorum or a manual setting on the server"
            )?,
            UnavailableReason::OtherCluster => write!(
                f,
                "what answers belongs to another cluster, and this pool's own primary did not come back within \
                 {waited:.1?}; check where the name points, or if it is to be followed (an upgrade, a restore, a switch to a \
                 copy), call `Pool::accept_cluster({})`, or set `PoolBuilder::accept_new_cluster_after`",
                self.claimed()
            )?,
            UnavailableReason::OldPrimary => write!(
                f,
                "what answers is an old primary, and the newer one did not come back within {waited:.1?}; start that one, or \
                 if the database was restored on purpose, call `Pool::accept_cluster({})`, or set \
                 `PoolBuilder::accept_new_cluster_after`",
                self.claimed()
            )?,
            UnavailableReason::Dns => {
                write!(f, "no server address within {waited:.1?}; check the host name and the name servers")?;
            }
            UnavailableReason::NoSession => write!(
                f,
                "the primary is known, but it took no new session within {waited:.1?}; raise max_connections or lower \
                 max_size if it has too many clients"
            )?,
            UnavailableReason::PoolExhausted if matches!(self.obstacle, Obstacle::HeldByCaller { .. }) => {
                return write!(
                    f,
                    "no connection can be had: max_size is {}, and the transactions that this call is made within hold all \
                     of them; use their handles, make the call after them, or raise max_size",
                    self.max_size()
                );
            }
            UnavailableReason::PoolExhausted => {
                return write!(
                    f,
                    "all {} connections were in use for {waited:.1?}; raise max_size, hold connections for less time, or \
                     wait longer (checkout_timeout)",
                    self.max_size()
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

/// [`Error::Refused`]: a server that answered and will go on refusing.
#[derive(Debug)]
pub struct Refused {
    endpoint: Option<Endpoint>,
    failure: ProbeFailure,
}

impl Refused {
    pub(crate) fn new(endpoint: Option<Endpoint>, failure: ProbeFailure) -> Self {
        Self { endpoint, failure }
    }

    /// What the server said.
    #[must_use]
    pub fn failure(&self) -> &ProbeFailure {
        &self.failure
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let trouble = tls_trouble(&self.failure.message);
        if self.failure.kind == FailureKind::SeveralClusters {
            return write!(
                f,
                "{}; say which one is meant by `PoolBuilder::system_identifier` or `Pool::accept_cluster`, or have the name \
                 lead to that one alone",
                self.failure
            );
        }
        let advice = match (self.failure.kind, trouble) {
            (FailureKind::NotPostgres, _) => "what answers there is not PostgreSQL; check host and port",
            (_, Some(trouble)) => advice_on_tls(trouble),
            _ => "check user, password, database, pg_hba.conf and sslmode",
        };
        let failure = &self.failure;
        match (&self.endpoint, trouble) {
            (Some(endpoint), Some(TlsTrouble::Certificate(_))) => {
                write!(f, "the certificate of {endpoint} is not accepted: {failure}; {advice}")
            }
            (Some(endpoint), _) => write!(f, "{endpoint} refuses this pool: {failure}; {advice}"),
            (None, _) => write!(f, "the server refuses this pool: {failure}; {advice}"),
        }
    }
}

fn advice_on_tls(trouble: TlsTrouble) -> &'static str {
    match trouble {
        TlsTrouble::Certificate(BadCertificate::Expired) => "renew it on the server, or set this machine's clock",
        TlsTrouble::Certificate(BadCertificate::NotYetValid) => "set the clocks of both machines, or wait until it is",
        TlsTrouble::Certificate(BadCertificate::WrongName) => {
            "connect by a name that it holds as a subjectAltName, have it issued for this one too, or check no name with \
             sslmode=verify-ca"
        }
        TlsTrouble::Certificate(BadCertificate::UnknownAuthority) => {
            "if it is the right server, trust the authority that signed it: sslrootcert=<file with its certificate>"
        }
        TlsTrouble::Certificate(BadCertificate::Unusable) => {
            "have one issued for servers: X.509 version 3, with the server's name, not an authority's own"
        }
        TlsTrouble::NotOffered => {
            "set `ssl = on` on the server, or a weaker sslmode than `require` in the connection string"
        }
        TlsTrouble::Wanted => {
            "nobody may log in so without TLS: set sslmode=verify-full, or `require`, if the server offers TLS, or allow it in \
             pg_hba.conf"
        }
    }
}

impl StdError for Refused {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&self.failure)
    }
}

/// [`Error::CommitUnknown`]: COMMIT was sent, and whether it will last is not known.
#[derive(Debug)]
pub struct CommitUnknown {
    doubt: Doubt,
    reason: Unsettled,
}

/// What came instead of an answer to COMMIT.
#[derive(Debug)]
enum Doubt {
    /// The end of the connection.
    Lost(InDoubt),
    /// The server was left before it answered.
    Evicted,
    /// The warning that the wait for a standby was cancelled.
    NotReplicated,
    /// An earlier run of the work was not answered, and who said that it was not committed is no primary any more.
    Earlier,
}

impl CommitUnknown {
    /// `lost`: what came instead of an answer; `None` where the server gave up waiting for a standby.
    pub(crate) fn new(lost: Option<tokio_postgres::Error>, reason: Unsettled) -> Self {
        let doubt = lost.map_or(Doubt::NotReplicated, |lost| Doubt::Lost(InDoubt(lost)));
        Self { doubt, reason }
    }

    /// The primary was left before it answered, and the connection did not end with it.
    pub(crate) fn evicted(reason: Unsettled) -> Self {
        Self { doubt: Doubt::Evicted, reason }
    }

    /// An earlier run of the work was not in the history of the primary that was asked then, and no later one says so.
    pub(crate) fn earlier(reason: Unsettled) -> Self {
        Self { doubt: Doubt::Earlier, reason }
    }

    pub(crate) fn because(self, reason: Unsettled) -> Self {
        Self { reason, ..self }
    }

    /// Why the outcome could not be settled.
    #[must_use]
    pub fn reason(&self) -> Unsettled {
        self.reason
    }
}

impl fmt::Display for CommitUnknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.doubt {
            Doubt::Lost(source) => write!(
                f,
                "the connection was lost after COMMIT was sent ({}): the transaction may or may not have been committed",
                explain(&source.0)
            )?,
            Doubt::Evicted => f.write_str(
                "the primary was left before it answered to COMMIT: the transaction may or may not have been committed",
            )?,
            Doubt::NotReplicated => f.write_str(
                "the wait for a synchronous standby was cancelled: the transaction is committed on the primary, and a \
                 failover may still lose it",
            )?,
            Doubt::Earlier => f.write_str(
                "an earlier run's COMMIT was not answered, and the primary that did not have it was lost, too: the \
                 transaction may or may not have been committed",
            )?,
        }
        write!(f, "; {}; look for its effect before repeating it", self.reason)?;
        match self.reason {
            Unsettled::NoMarker => {
                f.write_str(", or use `idempotent` for work that may be applied twice, or a guarantee that settles")
            }
            Unsettled::SeveralFailovers | Unsettled::Restarted | Unsettled::OtherHistory | Unsettled::Forgotten => {
                f.write_str("; `Guarantee::Ledger` would have known")
            }
            _ => Ok(()),
        }
    }
}

impl StdError for CommitUnknown {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match &self.doubt {
            Doubt::Lost(source) => Some(source),
            Doubt::Evicted | Doubt::NotReplicated | Doubt::Earlier => None,
        }
    }
}

/// A link of the source chain that no wrapper skips: whoever walks the chain of an application's error has to meet the
/// doubt before the lost connection, which taken alone would be a reason to run again.
#[derive(Debug, thiserror::Error)]
#[error("the outcome of a commit is not known")]
pub(crate) struct InDoubt(#[source] tokio_postgres::Error);

/// [`Error::RolledBack`]: why a closure's `Ok` was not committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RolledBack {
    /// A statement had failed and the closure went on: PostgreSQL turns such a COMMIT into a ROLLBACK.
    #[error(
        "the transaction was rolled back: a statement in it failed and the closure returned Ok; pass the statement's \
         error on with `?`, or put the statement into a savepoint"
    )]
    FailedInside,
    /// The primary on which it was committed was lost before a standby had it, and its successor does not know it.
    #[error(
        "the transaction was lost with the primary that it was committed on, before a standby had it; run it again"
    )]
    LostWithPrimary,
    /// BEGIN reached another server than the one that the connection was verified with: a proxy in between has moved on.
    #[error(
        "nothing was done: the connection leads to another server than the one that was verified, as a proxy moved on"
    )]
    OtherServer,
    /// The pooled connection had a transaction open already: whoever had it before began one by hand and left it.
    #[error(
        "nothing was done: the connection came with a transaction that someone had left open; end what you begin by hand \
         before giving a connection back"
    )]
    StrangeSession,
    /// A [`Transaction`](crate::Transaction) handle was still alive after its closure had returned.
    #[error(
        "the transaction was rolled back: its handle was kept beyond the closure; end every task \
         that uses it before the closure returns"
    )]
    HandleKept,
    /// A stream of rows or a COPY that the closure had begun was still open after it had returned, and the session with it.
    ///
    /// Seen of the streams that the methods of [`Transaction`](crate::Transaction) and [`Savepoint`](crate::Savepoint) return.
    /// One that a helper began on the driver's own `&tokio_postgres::Client` is not seen: COMMIT waits for as long as it is kept.
    #[error(
        "the transaction was rolled back: a stream of rows or a COPY that its closure had begun was kept beyond it; read \
         streams to their end or drop them, and finish a CopyInSink, before the closure returns"
    )]
    StreamKept,
}

/// [`Error::EndedInside`]: the closure ended its transaction itself.
///
/// Statements that it ran afterwards, outside of the transaction, were committed one by one.
#[derive(Debug)]
pub struct EndedInside {
    ending: Ending,
    source: Option<Error>,
}

/// How a closure ended its transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ending {
    /// It committed: `COMMIT`, `END`, or either of them `AND CHAIN`.
    Committed,
    /// It rolled back: `ROLLBACK`, `ABORT`, or either of them `AND CHAIN`.
    RolledBack,
    /// `PREPARE TRANSACTION`: it is stored, holds its locks, and waits for `COMMIT PREPARED` or `ROLLBACK PREPARED`.
    Prepared,
    /// The transaction has left no mark by which the server could tell: see [`Guarantee`](crate::Guarantee).
    Unknown,
}

impl EndedInside {
    /// `source`: what the closure failed with afterwards, if it failed.
    pub(crate) fn error(ending: Ending, source: Option<Error>) -> Error {
        Error::EndedInside(Box::new(Self { ending, source }))
    }

    /// How the transaction was ended.
    #[must_use]
    pub fn ending(&self) -> Ending {
        self.ending
    }

    /// What the closure failed with afterwards, if it failed.
    #[must_use]
    pub fn failure(&self) -> Option<&Error> {
        self.source.as_ref()
    }
}

impl fmt::Display for EndedInside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.ending {
            Ending::Committed => {
                "the closure committed its transaction itself: what it did before that is stored, and what it did \
                 afterwards may be in part"
            }
            Ending::RolledBack => {
                "the closure rolled its transaction back itself: what it did before that is undone, and what it did \
                 afterwards may be stored in part"
            }
            Ending::Prepared => {
                "the closure ended its transaction itself, with PREPARE TRANSACTION: it holds its locks until someone \
                 runs COMMIT PREPARED or ROLLBACK PREPARED"
            }
            Ending::Unknown => {
                "the closure ended its transaction itself (or took its mark away with RESET ALL): what it did may be \
                 stored in part"
            }
        })?;
        f.write_str("; look for its effect before repeating it, and leave BEGIN, COMMIT and ROLLBACK to the pool")?;
        match &self.source {
            Some(source) => write!(f, "; it then failed with: {source}"),
            None => Ok(()),
        }
    }
}

impl StdError for EndedInside {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_ref().map(|source| source as &(dyn StdError + 'static))
    }
}

/// [`Error::Exhausted`]: the retry policy ended a call.
#[derive(Debug)]
pub struct Exhausted {
    attempts: u32,
    why: String,
    outcome: CommitOutcome,
    source: Error,
}

impl Exhausted {
    pub(crate) fn new(attempts: u32, why: String, outcome: CommitOutcome, source: Error) -> Self {
        Self { attempts, why, outcome, source }
    }

    /// How often the work was run.
    #[must_use]
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// The last attempt's error.
    #[must_use]
    pub fn last_error(&self) -> &Error {
        &self.source
    }
}

impl fmt::Display for Exhausted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let times = if self.attempts == 1 { "attempt" } else { "attempts" };
        write!(f, "gave up after {} {times}, {}; the last one failed with: {}", self.attempts, self.why, self.source)?;
        if self.outcome == CommitOutcome::Unknown {
            f.write_str("; an earlier attempt may have been committed")?;
        }
        Ok(())
    }
}

impl StdError for Exhausted {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&self.source)
    }
}

/// A configuration that no pool can be built from.
///
/// Its `Debug` is its text, as for [`Error`].
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The connection string does not parse. Holds the driver's words, without anything that may be a piece of a password.
    #[error(
        "{}; expected postgres://user:password@host:port/database?option=value or `host=… user=…`, with tokio-postgres' \
         options, and with `?`, `@`, `/`, `#` and `%` in a password written as %3F, %40, %2F, %23 and %25",
        .0
    )]
    Url(String),
    /// Nothing to connect to.
    #[error("no host: name at least one server or DNS name, as in postgres://app@my-pg.internal/app")]
    NoHost,
    /// A value that cannot be used.
    #[error("{option}: {problem}")]
    Invalid {
        /// The option of the connection string or the builder's method.
        option: &'static str,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// The system's resolver configuration cannot be read.
    #[error("the resolver cannot be set up: {0}; give the name servers with `PoolBuilder::dns_servers`")]
    Resolver(#[source] crate::resolve::ResolveError),
    /// `build` was called outside a tokio runtime.
    #[error("no tokio runtime: call `build` from within one, as in #[tokio::main]")]
    NoRuntime,
}

impl fmt::Debug for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(_) => write!(f, "Url: {self}"),
            Self::NoHost => write!(f, "NoHost: {self}"),
            Self::Invalid { .. } => write!(f, "Invalid: {self}"),
            Self::Resolver(_) => write!(f, "Resolver: {self}"),
            Self::NoRuntime => write!(f, "NoRuntime: {self}"),
        }
    }
}

impl BuildError {
    /// `hint`: what to change.
    pub(crate) fn url(error: &tokio_postgres::Error, hint: Option<String>) -> Self {
        let what = explain(error);
        Self::Url(hint.map_or(what.clone(), |hint| format!("{what}: {hint}")))
    }

    pub(crate) fn invalid(option: &'static str, problem: impl Into<String>) -> Self {
        Self::Invalid { option, problem: problem.into() }
    }
}
