//! The types that describe a candidate: where it is, why it is asked, and what it answered.

use std::fmt;
use std::net::SocketAddr;
#[cfg(unix)]
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::{Part, ServerReport};

/// The longest kept message, in characters.
const LONGEST_MESSAGE: usize = 500;

/// The socket address of a server, or the path of its Unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Address {
    /// An IP address and port.
    Tcp(SocketAddr),
    /// The folder of a Unix socket, and the port that its file name carries.
    #[cfg(unix)]
    Unix(PathBuf, u16),
    /// Wherever the manager of a [wrapped](crate::Pool::wrap) pool connects to.
    Wrapped,
}

impl Address {
    /// Returns whether the host name is the address itself, so that the address already shows the name.
    fn is_named(&self, host: &str) -> bool {
        matches!(self, Self::Tcp(address) if host.trim_matches(['[', ']']).parse() == Ok(address.ip()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            #[cfg(unix)]
            Self::Unix(folder, port) => write!(f, "{}/.s.PGSQL.{port}", folder.display()),
            Self::Wrapped => f.write_str("the wrapped pool's server"),
        }
    }
}

/// Where a server can be reached, and the host name that led there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Endpoint {
    /// The host name from the configuration, which TLS certificates are checked against.
    pub host: Option<Arc<str>>,
    /// The address to connect to.
    pub address: Address,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Some(host) if !self.address.is_named(host) => write!(f, "{} ({host})", self.address),
            _ => self.address.fmt(f),
        }
    }
}

/// Why an address is a candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Origin {
    /// The resolver's newest answer contains it.
    Resolved,
    /// The configuration names the address itself.
    Configured,
    /// An earlier answer of the resolver contained it, and the server there proved to be a member of this cluster.
    Remembered,
}

/// The kind of failure of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FailureKind {
    /// The connection was refused, reset or closed before the server answered.
    Unreachable,
    /// No answer came within the probe's time limit.
    TimedOut,
    /// No session is available now, but one may be later. The server is starting up or shutting down, or the [password
    /// provider](crate::PoolBuilder::password_provider) gave no password, or a password that is just being changed.
    NotNow,
    /// The server is up, but all its connection slots are taken.
    Full,
    /// The server refuses these credentials, this database or this kind of TLS. Asking again does not help.
    Refused,
    /// Something that is not PostgreSQL answered, or the answer makes no sense.
    NotPostgres,
    /// Servers of several clusters answer, and it is not known which cluster is meant. Or all servers that answer
    /// belong to another cluster than the [configured one](crate::PoolBuilder::system_identifier).
    SeveralClusters,
    /// No name server knows the name, or it has no address.
    UnknownName,
    /// The server answered the probe with an error: it is up, but does not say what it is.
    Errored,
    /// A session was opened, and a hook of the pool refused it: see
    /// [`after_connect`](crate::PoolBuilder::after_connect). It says nothing about the server.
    Hook,
}

impl FailureKind {
    /// Returns whether the failure is not silence: the server itself answered, or it was not asked because there was no
    /// password.
    pub(super) fn is_an_answer(self) -> bool {
        matches!(self, Self::NotNow | Self::Full | Self::Refused | Self::Errored)
    }
}

/// A probe that brought no report.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
#[non_exhaustive]
pub struct ProbeFailure {
    /// The kind of failure.
    pub kind: FailureKind,
    /// What happened, in one line.
    pub message: String,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
    /// The server refused a log-in, but callers are told that a later one may succeed.
    may_pass: bool,
    /// The server's certificate is not for the host name by which it was reached.
    wrong_name: bool,
}

impl ProbeFailure {
    pub(crate) fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: shortened(message.into()), source: None, may_pass: false, wrong_name: false }
    }

    /// Notes that the certificate is for another name, so another name of the same address may be the right one.
    pub(crate) fn of_a_wrong_name(self) -> Self {
        Self { wrong_name: true, ..self }
    }

    pub(super) fn is_of_a_wrong_name(&self) -> bool {
        self.wrong_name
    }

    /// Marks a refused log-in that may succeed later, because the password is being changed. Callers wait, and the next
    /// log-ins are as rare as after any refusal.
    pub(crate) fn that_may_pass(self) -> Self {
        Self { kind: FailureKind::NotNow, may_pass: true, ..self }
    }

    /// Returns whether the server refused a log-in, so that the next one will most likely be refused, too. What callers
    /// are told does not matter here.
    pub(crate) fn is_refused_log_in(&self) -> bool {
        self.kind == FailureKind::Refused || self.may_pass
    }

    pub(crate) fn caused_by(self, source: Arc<dyn std::error::Error + Send + Sync>) -> Self {
        Self { source: Some(source), ..self }
    }
}

/// Shortens a message of an unknown server, because the message is kept and copied into logs and errors. Takes out
/// control characters, because logs and errors are shown on terminals.
pub(crate) fn shortened(mut message: String) -> String {
    if let Some((end, _)) = message.char_indices().nth(LONGEST_MESSAGE) {
        message.truncate(end);
        message.push('…');
    }
    if message.contains(char::is_control) { message.replace(char::is_control, " ") } else { message }
}

/// Failures are equal if their kind and message are.
impl PartialEq for ProbeFailure {
    fn eq(&self, other: &Self) -> bool {
        self.kind == other.kind && self.message == other.message
    }
}

impl Eq for ProbeFailure {}

/// Why a server that answered is not used as the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Refusal {
    /// It is a standby.
    Standby,
    /// It is not in recovery, but new transactions are read-only. Fly and others fence a primary in this way.
    Fenced,
    /// It was being promoted while it answered.
    Promoting,
    /// It belongs to another cluster: its system identifier differs.
    OtherCluster {
        /// The identifier of the cluster that this pool knows.
        expected: u64,
        /// The identifier that the server gave.
        found: u64,
    },
    /// It is writable, but a newer timeline is known: it is an old primary that came back.
    Zombie {
        /// The server's timeline.
        timeline: u32,
        /// The newest timeline seen.
        newest: u32,
    },
    /// It withholds its system identifier, although this pool knows the identifier of its cluster.
    Unidentified,
    /// It withholds its timeline, although this pool knows a timeline. So it may be an old primary that came back.
    NoTimeline {
        /// The newest timeline seen.
        newest: u32,
    },
    /// It is a primary, but not the primary of this generation.
    AnotherServer,
}

impl Refusal {
    /// Returns whether it is refused because it withholds something.
    pub(super) fn is_untold(self) -> bool {
        matches!(self, Self::Unidentified | Self::NoTimeline { .. })
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Standby => f.write_str("standby"),
            Self::Fenced => f.write_str("fenced: not in recovery, but default_transaction_read_only is on"),
            Self::Promoting => f.write_str("being promoted"),
            Self::OtherCluster { expected, found } => {
                write!(f, "another cluster: system identifier {found}, expected {expected}")
            }
            Self::Zombie { timeline, newest } => {
                write!(f, "an old primary: timeline {timeline}, but timeline {newest} exists")
            }
            Self::Unidentified => write!(
                f,
                "not identified: the role may not read its system identifier, by which the pool tells its cluster ({})",
                Part::Identity.grant()
            ),
            Self::NoTimeline { newest } => write!(
                f,
                "perhaps an old primary: the role may not read its timeline, and timeline {newest} exists ({})",
                Part::Timeline.grant()
            ),
            Self::AnotherServer => f.write_str("another server than the one this generation began with"),
        }
    }
}

/// What a candidate answered when it was last asked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Answer {
    /// It reported, and qualifies as the primary.
    Primary(ServerReport),
    /// It reported, and is not used as the primary.
    Refused(ServerReport, Refusal),
    /// It did not report.
    Failed(ProbeFailure),
}

#[cfg(failover_sim)]
impl Answer {
    /// A short name for the coverage of the simulation in sim/.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Primary(_) => "primary".to_owned(),
            Self::Refused(_, refusal) => format!("{refusal:?}").split([' ', '{']).next().unwrap_or_default().to_owned(),
            Self::Failed(failure) => format!("{:?}", failure.kind),
        }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Primary(_) => f.write_str("primary"),
            Self::Refused(_, refusal) => refusal.fmt(f),
            Self::Failed(failure) => failure.fmt(f),
        }
    }
}

/// One candidate and its last answer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CandidateReport {
    /// The server.
    pub endpoint: Endpoint,
    /// Why it is a candidate.
    pub origin: Origin,
    /// Its last answer; `None` until the first one.
    pub answer: Option<Answer>,
    /// How long the last probe took.
    pub took: Option<Duration>,
}

impl fmt::Display for CandidateReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.endpoint)?;
        match &self.answer {
            Some(answer) => answer.fmt(f),
            None => f.write_str("has not answered yet"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_short_and_steers_no_terminal() {
        let failure = ProbeFailure::new(FailureKind::NotPostgres, "\u{1b}[2J\u{9b}".repeat(200));
        assert!(!failure.message.contains(char::is_control), "{:?}", failure.message);
        assert_eq!(failure.message.chars().count(), LONGEST_MESSAGE + 1);
    }

    #[test]
    fn an_address_is_not_said_twice() {
        for (host, addr, text) in [
            (Some("my-pg.internal"), "127.0.0.1:5432", "127.0.0.1:5432 (my-pg.internal)"),
            (Some("127.0.0.1"), "127.0.0.1:5432", "127.0.0.1:5432"),
            (Some("[::1]"), "[::1]:5432", "[::1]:5432"),
            (Some("127.0.0.2"), "127.0.0.1:5432", "127.0.0.1:5432 (127.0.0.2)"),
            (None, "127.0.0.1:5432", "127.0.0.1:5432"),
        ] {
            let endpoint = Endpoint { host: host.map(Arc::from), address: Address::Tcp(addr.parse().unwrap()) };
            assert_eq!(endpoint.to_string(), text);
        }
    }
}
