//! Decides what an error of `tokio_postgres` means: SQLSTATE, severity, io error or closed socket → a [`Verdict`].
//! Knows nothing of pools, transactions, and what is done about a verdict. Nothing else knows SQLSTATEs and io kinds.
//! Invariants: total (any code, any severity has a verdict); [`commit_refused`] is true only for a proof;
//! a code that is not in the table is the application's business unless it came with the end of the session.
//! Tests: at the end of this file; each error there is made by a scripted server over an in-memory stream.

mod encryption;
mod fatal;
mod stale;

pub(crate) use encryption::{BadCertificate, TlsTrouble, tls_trouble};
pub(crate) use fatal::{Recurs, advice, announces_end, ends_session, recurs, verdict_of_end};
pub(crate) use stale::{Cure, may_be_stale, stale, stale_report};

use std::error::Error as StdError;
use std::fmt::Write as _;
use std::io;
use std::sync::Arc;

use tokio_postgres::Error;
use tokio_postgres::error::{DbError, Severity, SqlState};

/// A source chain longer than this is a loop, or nobody's.
const LINKS: usize = 16;

/// What an error means. What to do about it depends on the work as well, and is decided elsewhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    /// The session is gone, or going: nothing more is to be had from it. Says nothing about other sessions.
    ConnectionLost,
    /// The server is there and takes no work at the moment: starting, stopping, recovering.
    NotNow,
    /// The server is well and takes no more sessions: too many clients.
    Full,
    /// The session cannot write: a standby, a fenced primary, or the transaction's own `READ ONLY`.
    ReadOnly,
    /// The server rolled the transaction back in favour of another one: the same work may succeed next time.
    Conflict,
    /// The server, or something before it, says that it does not know how the transaction ended.
    OutcomeUnknown,
    /// An earlier error ended the transaction, and something went on as if it had not.
    Aborted,
    /// A prepared statement is of no use any more, as a table, a type or the session was changed under it.
    Stale,
    /// Configuration: credentials, database name, TLS. Trying again cannot help.
    Refused,
    /// The peer's bytes make no sense in this protocol. On a session that worked before, also a `COPY`
    /// through a method that is not for it; the driver reports both alike.
    NotPostgres,
    /// All else, returned as it is: constraints, syntax, time-outs of statements and transactions, conversions.
    Application,
}

impl Verdict {
    /// Whether the session, or the server behind it, is lost. A proxy may keep the client's session open, and lead it to
    /// another server session.
    pub(crate) fn is_loss(self) -> bool {
        match self {
            Self::ConnectionLost
            | Self::NotNow
            | Self::Full
            | Self::OutcomeUnknown
            | Self::Refused
            | Self::NotPostgres => true,
            Self::ReadOnly | Self::Conflict | Self::Aborted | Self::Stale | Self::Application => false,
        }
    }
}

/// The verdict on an error of a session that was open.
pub(crate) fn classify(error: &Error) -> Verdict {
    match Kind::of(error) {
        Kind::Db(db) => of_report(db, Level::of(db)),
        kind => of_driver(error, kind),
    }
}

/// The verdict on an error of opening a session.
///
/// It differs from [`classify`] where the moment adds meaning. Any report ends the attempt, whatever severity a proxy
/// gave it; what is wrong with the user's settings comes under more codes; and a server that rejects our certificate
/// says so by a TLS alert which, since TLS 1.3, comes when the handshake is over on our side.
pub(crate) fn verdict_of_open(error: &Error) -> Verdict {
    match Kind::of(error) {
        Kind::Db(db) => match *db.code() {
            // Options that the server does not take, a role that may not connect, a database that takes nobody.
            SqlState::INSUFFICIENT_PRIVILEGE
            | SqlState::UNDEFINED_OBJECT
            | SqlState::INVALID_PARAMETER_VALUE
            | SqlState::SYNTAX_ERROR
            | SqlState::CANT_CHANGE_RUNTIME_PARAM
            | SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE => Verdict::Refused,
            SqlState::PROTOCOL_VIOLATION if pooler_refuses(db.message()) => Verdict::Refused,
            _ => of_report(db, Level::Ends),
        },
        Kind::Io if links(error).any(|link| certificate_alert(&link.to_string())) => Verdict::Refused,
        kind => of_driver(error, kind),
    }
}

/// The verdict on the first database error in an error's source chain, if there is one.
///
/// For errors of the caller's own closure, which may hold a database error at any depth.
pub(crate) fn classify_chain(error: &(dyn StdError + 'static)) -> Option<Verdict> {
    links(error).find_map(Found::in_link).map(|found| match found {
        Found::Driver(error) => classify(error),
        Found::Report(report) => classify_report(report),
    })
}

/// What the server reported, by the first database error in an error's source chain.
pub(crate) fn report_in_chain<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a DbError> {
    match links(error).find_map(Found::in_link)? {
        Found::Driver(error) => error.as_db_error(),
        Found::Report(report) => Some(report),
    }
}

/// The verdict on what the server reported in a session that was open.
pub(crate) fn classify_report(report: &DbError) -> Verdict {
    of_report(report, Level::of(report))
}

/// Whether this answer to `COMMIT` proves that the transaction was rolled back. If not, its outcome is in doubt.
///
/// The server can report an `ERROR` only before the commit record is written; from there on any failure is a PANIC.
/// But that holds for its own word, and a proxy uses the same message for "the server behind me is gone".
/// A server names the routine that reports, in each of its errors; proxies do not.
pub(crate) fn commit_refused(error: &Error) -> bool {
    let Kind::Db(db) = Kind::of(error) else {
        return false;
    };
    if Level::of(db) != Level::Error {
        return false;
    }
    match class(db) {
        // "Connection exception", the unknown resolution (08007) among them: of whose connection, nobody can tell.
        "08" => false,
        // Integrity constraints, deferred ones here: a rollback whoever says so.
        "23" => true,
        _ => match *db.code() {
            SqlState::T_R_STATEMENT_COMPLETION_UNKNOWN
            | SqlState::ADMIN_SHUTDOWN
            | SqlState::CRASH_SHUTDOWN
            | SqlState::CANNOT_CONNECT_NOW => false,
            SqlState::T_R_SERIALIZATION_FAILURE
            | SqlState::T_R_DEADLOCK_DETECTED
            | SqlState::IN_FAILED_SQL_TRANSACTION => true,
            _ => db.routine().is_some(),
        },
    }
}

/// Whether the statement that looks for the pool's own transaction, before COMMIT, has found another one, or none: it divides
/// by zero then, or reads a setting that is empty or unknown.
pub(crate) fn not_ours(error: &Error) -> bool {
    let codes = [SqlState::DIVISION_BY_ZERO, SqlState::INVALID_TEXT_REPRESENTATION, SqlState::UNDEFINED_OBJECT];
    reports(error, &codes)
}

/// Whether the server had no transaction to end.
pub(crate) fn no_transaction(error: &Error) -> bool {
    reports(error, &[SqlState::NO_ACTIVE_SQL_TRANSACTION])
}

fn reports(error: &Error, codes: &[SqlState]) -> bool {
    let Kind::Db(db) = Kind::of(error) else {
        return false;
    };
    Level::of(db) == Level::Error && codes.contains(db.code())
}

/// Whether the server does not know, or does not permit, what the statement asked for: managed services take functions
/// away from ordinary roles. Says nothing about its health.
pub(crate) fn not_offered(error: &Error) -> bool {
    let Kind::Db(db) = Kind::of(error) else {
        return false;
    };
    Level::of(db) == Level::Error && matches!(class(db), "42" | "0A")
}

/// Whether the error may be about one part of what a statement asked for, so that the others can be had: it is not offered, or it
/// fails each time (a file that cannot be read, an internal error).
pub(crate) fn about_a_part(error: &Error) -> bool {
    let Kind::Db(db) = Kind::of(error) else {
        return false;
    };
    Level::of(db) == Level::Error && matches!(class(db), "0A" | "22" | "38" | "39" | "42" | "55" | "58" | "P0" | "XX")
}

/// Whether a function was asked that a standby does not answer.
pub(crate) fn for_primaries_only(error: &Error) -> bool {
    reports(error, &[SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE])
}

/// Whether the server refused the role or its password. Not all ways to authenticate have the code of a wrong password:
/// PAM, by which RDS takes its tokens, has the more general one.
pub(crate) fn not_let_in(error: &Error) -> bool {
    let codes = [SqlState::INVALID_PASSWORD, SqlState::INVALID_AUTHORIZATION_SPECIFICATION];
    error.code().is_some_and(|code| codes.contains(code))
}

/// Whether the peer ended an open connection without a word that makes sense.
pub(crate) fn hung_up(error: &Error) -> bool {
    match Kind::of(error) {
        Kind::Closed => true,
        // The second is of the codec: what came before the end was no whole message.
        Kind::Io => io_error(error).is_some_and(|cause| {
            matches!(cause.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset)
                || cause.to_string() == "bytes remaining on stream"
        }),
        _ => false,
    }
}

/// A name for an error without an SQLSTATE, of a handful: for telemetry.
pub(crate) fn without_code(error: &Error) -> &'static str {
    match Kind::of(error) {
        Kind::Closed | Kind::Io => match of_driver(error, Kind::of(error)) {
            Verdict::NotPostgres => "protocol",
            _ => "connection_lost",
        },
        Kind::Connect => "connect",
        Kind::Timeout => "timed_out",
        Kind::Tls => "tls",
        Kind::Authentication => "authentication",
        Kind::Config | Kind::ConnectionString => "configuration",
        Kind::UnexpectedMessage => "protocol",
        Kind::Parse => match of_driver(error, Kind::Parse) {
            Verdict::Application => "usage",
            _ => "protocol",
        },
        Kind::Usage => "usage",
        // It has one.
        Kind::Db(_) => "database",
    }
}

/// The error in one line: what the driver says, the SQLSTATE and message of the server, and the causes.
///
/// `Display` of the driver's error stops at "db error". DETAIL and HINT are left out, as they quote rows, and so is
/// whatever a connection string was misread as, which may be a part of its password.
pub(crate) fn explain(error: &Error) -> String {
    let mut line = match Kind::of(error) {
        Kind::Db(db) => {
            let severity = db.severity();
            format!("{severity} {}: {}", db.code().code(), db.message())
        }
        _ => error.to_string(),
    };
    for cause in links(error).skip(1) {
        let text = cause.to_string();
        let text = encryption::dated(&text).unwrap_or(text);
        let quotes = Kind::of(error) == Kind::ConnectionString && !text.starts_with("invalid value");
        if cause.is::<DbError>() || quotes || line.ends_with(&text) {
            continue;
        }
        // Writing to a String cannot fail.
        let _ = write!(line, ": {text}");
    }
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The driver's kind of error, which is private there: read from the texts of its `Display`, each pinned by a test.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind<'a> {
    Db(&'a DbError),
    Closed,
    Io,
    Connect,
    Tls,
    Authentication,
    Config,
    ConnectionString,
    Timeout,
    UnexpectedMessage,
    Parse,
    /// Conversions, wrong numbers of rows, columns, parameters.
    Usage,
}

impl<'a> Kind<'a> {
    fn of(error: &'a Error) -> Self {
        if let Some(db) = error.as_db_error() {
            return Self::Db(db);
        }
        if error.is_closed() {
            return Self::Closed;
        }
        match error.to_string().as_str() {
            "error communicating with the server" => Self::Io,
            "error connecting to server" => Self::Connect,
            "error performing TLS handshake" => Self::Tls,
            "authentication error" => Self::Authentication,
            "invalid configuration" => Self::Config,
            "invalid connection string" => Self::ConnectionString,
            "timeout waiting for server" => Self::Timeout,
            "unexpected message from server" => Self::UnexpectedMessage,
            "error parsing response from server" => Self::Parse,
            _ => Self::Usage,
        }
    }
}

/// What a report says about its session.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    /// The session goes on.
    Error,
    /// FATAL and PANIC: it ends.
    Ends,
    /// Translated, and without the plain copy that servers send since 9.6.
    Unknown,
}

impl Level {
    fn of(db: &DbError) -> Self {
        match db.parsed_severity() {
            Some(Severity::Fatal | Severity::Panic) => Self::Ends,
            Some(_) => Self::Error,
            // Poolers send the one field only, and never translate it.
            None => match db.severity() {
                "FATAL" | "PANIC" => Self::Ends,
                "ERROR" => Self::Error,
                _ => Self::Unknown,
            },
        }
    }
}

/// The table of SQLSTATEs. Rows hold at any level unless they say otherwise.
#[expect(clippy::match_same_arms, reason = "one row per code, with its own reason")]
fn of_report(db: &DbError, level: Level) -> Verdict {
    let ends = level == Level::Ends;
    match *db.code() {
        // The session goes on, its prepared statements do not.
        _ if !ends && stale_report(db).is_some() => Verdict::Stale,

        // Shutting down, starting up, in recovery, a standby that is not consistent yet.
        SqlState::CANNOT_CONNECT_NOW => Verdict::NotNow,
        // No slot left, for all or for this role or database.
        SqlState::TOO_MANY_CONNECTIONS => Verdict::Full,

        // An INSERT on a standby or under `default_transaction_read_only`, or in the user's own READ ONLY transaction.
        SqlState::READ_ONLY_SQL_TRANSACTION => Verdict::ReadOnly,
        // BEGIN READ WRITE, BEGIN ISOLATION LEVEL SERIALIZABLE on a standby.
        SqlState::FEATURE_NOT_SUPPORTED if hot_standby(db) => Verdict::ReadOnly,
        // Whatever needs a transaction id there and does not ask about recovery first, such as pg_logical_emit_message.
        SqlState::INTERNAL_ERROR if db.routine() == Some("GetNewTransactionId") => Verdict::ReadOnly,
        // Otherwise, while the session ends: start-up parameters or a protocol version the peer does not take.
        SqlState::FEATURE_NOT_SUPPORTED if ends => Verdict::Refused,

        // The connection to a second phase was lost; a middle man's or a foreign server's word.
        SqlState::TRANSACTION_RESOLUTION_UNKNOWN => Verdict::OutcomeUnknown,
        // Named for this by the standard; CockroachDB sends it for an ambiguous commit.
        SqlState::T_R_STATEMENT_COMPLETION_UNKNOWN => Verdict::OutcomeUnknown,

        // pg_terminate_backend, fast shutdown; at ERROR, the same that met a parallel worker of this session.
        SqlState::ADMIN_SHUTDOWN => Verdict::ConnectionLost,
        // Another backend crashed, and the server restarts all.
        SqlState::CRASH_SHUTDOWN => Verdict::ConnectionLost,
        // The session was idle for too long for the server's taste; the next one will do.
        SqlState::IDLE_SESSION_TIMEOUT => Verdict::ConnectionLost,
        // The database was dropped under the session.
        SqlState::DATABASE_DROPPED if ends => Verdict::Refused,

        // A statement that breaks the protocol, such as a wrong number of parameters.
        SqlState::PROTOCOL_VIOLATION if !ends => Verdict::Application,
        // A pooler whose mode knows no transactions: the next one would end the same way.
        SqlState::PROTOCOL_VIOLATION if db.message() == "transaction blocks not allowed in statement pooling mode" => {
            Verdict::Refused
        }
        // Wrong password, no such role, no line in pg_hba.conf.
        SqlState::INVALID_PASSWORD | SqlState::INVALID_AUTHORIZATION_SPECIFICATION if ends => Verdict::Refused,
        // No such database. At ERROR it is a DROP DATABASE's complaint.
        SqlState::INVALID_CATALOG_NAME if ends => Verdict::Refused,

        // Rolled back for another transaction's sake, the session lives. A FATAL one is a standby's recovery conflict.
        SqlState::T_R_SERIALIZATION_FAILURE | SqlState::T_R_DEADLOCK_DETECTED if !ends => Verdict::Conflict,
        SqlState::IN_FAILED_SQL_TRANSACTION => Verdict::Aborted,

        // FATAL, but the closure took too long between two statements, and would again.
        SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT => Verdict::Application,
        _ => match (class(db), level) {
            // `transaction_timeout` (17 and later), of which the driver has no name: as the row above.
            _ if db.code().code() == "25P04" => Verdict::Application,
            // At ERROR with a routine: postgres_fdw or dblink lost *their* server, this session lives. Without one, a
            // proxy lost the server behind it. PgBouncer has FATAL 08P01 for everything that befalls it.
            ("08", Level::Error) if db.routine().is_some() => Verdict::Application,
            ("08", _) => Verdict::ConnectionLost,
            (_, Level::Ends) => Verdict::ConnectionLost,
            (_, Level::Error | Level::Unknown) => Verdict::Application,
        },
    }
}

/// The verdict on what is not a report of the server: found by the driver or the operating system.
fn of_driver(error: &Error, kind: Kind<'_>) -> Verdict {
    match kind {
        Kind::Closed | Kind::Timeout => Verdict::ConnectionLost,
        // The codec's own complaints about malformed bytes are io errors while a session opens; the system's have a
        // number. A message cut short has the same kind as a socket cut short, so it counts as that.
        Kind::Io => match io_error(error) {
            Some(cause) if certificate_alert(&cause.to_string()) => Verdict::ConnectionLost,
            Some(cause)
                if cause.raw_os_error().is_none()
                    && matches!(cause.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData) =>
            {
                Verdict::NotPostgres
            }
            _ => Verdict::ConnectionLost,
        },
        // Refused, unreachable, timed out, no address: a server may be there next time.
        Kind::Connect => match io_error(error).map(ToString::to_string).as_deref() {
            // How the driver says that `target_session_attrs` was not met.
            Some("database does not allow writes") => Verdict::ReadOnly,
            Some("database is not read only") => Verdict::NotNow,
            _ => Verdict::ConnectionLost,
        },
        Kind::Tls if links(error).any(cut_short) => Verdict::ConnectionLost,
        Kind::Tls | Kind::Authentication | Kind::Config | Kind::ConnectionString => Verdict::Refused,
        // The driver files two mistakes of the caller's here.
        Kind::Parse
            if io_error(error).is_some_and(|cause| {
                matches!(cause.to_string().as_str(), "string contains embedded null" | "value too large to transmit")
            }) =>
        {
            Verdict::Application
        }
        Kind::UnexpectedMessage | Kind::Parse => Verdict::NotPostgres,
        Kind::Usage | Kind::Db(_) => Verdict::Application,
    }
}

/// The first two characters of an SQLSTATE.
fn class(db: &DbError) -> &str {
    db.code().code().get(..2).unwrap_or_default()
}

/// Whether a "feature not supported" is a standby's refusal of a transaction mode.
///
/// The message may be translated; then the routine tells. Both are raised by hooks of a parameter
/// (`check_transaction_read_only`, `check_XactIsoLevel` in src/backend/commands/variable.c), on whose behalf guc.c
/// reports (seen on 15), and no other hook of these types has this SQLSTATE. The second also comes from
/// src/backend/storage/lmgr/predicate.c.
fn hot_standby(db: &DbError) -> bool {
    matches!(
        db.message(),
        "cannot set transaction read-write mode during recovery" | "cannot use serializable mode in a hot standby"
    ) || matches!(
        db.routine(),
        Some(
            "call_bool_check_hook"
                | "call_enum_check_hook"
                | "check_transaction_read_only"
                | "check_XactReadOnly"
                | "check_XactIsoLevel"
                | "GetSerializableTransactionSnapshot"
        )
    )
}

/// `PgBouncer`'s refusals of a login for good. They come under 08P01 like its passing troubles: only the text tells.
fn pooler_refuses(message: &str) -> bool {
    const REFUSALS: [&str; 9] = [
        "auth failed",
        "certificate authentication failed",
        "login rejected",
        "no such database",
        "no such user",
        "password authentication failed",
        "SASL authentication failed",
        "SSL required",
        "unsupported startup parameter",
    ];
    REFUSALS.iter().any(|start| message.starts_with(start))
}

/// Whether a handshake failed for want of a peer and not for what the peer said.
fn cut_short(link: &(dyn StdError + 'static)) -> bool {
    let by_kind = link.downcast_ref::<io::Error>().is_some_and(|cause| {
        matches!(
            cause.kind(),
            io::ErrorKind::UnexpectedEof
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::BrokenPipe
                | io::ErrorKind::NotConnected
                | io::ErrorKind::TimedOut
                | io::ErrorKind::HostUnreachable
                | io::ErrorKind::NetworkUnreachable
        )
    });
    // OpenSSL has an end of file without an io error.
    by_kind || link.to_string().to_ascii_lowercase().contains("unexpected eof")
}

/// Whether the text is a TLS alert about our certificate, or the lack of one, in the words of rustls or OpenSSL.
fn certificate_alert(text: &str) -> bool {
    let text = text.to_ascii_lowercase();
    text.contains("alert")
        && ["certificate", "unknownca", "unknown ca", "accessdenied", "access denied"]
            .iter()
            .any(|word| text.contains(word))
}

/// The error and its causes, from the outside in.
pub(crate) fn links<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |link| (*link).source()).take(LINKS)
}

fn io_error(error: &Error) -> Option<&io::Error> {
    links(error).find_map(|link| link.downcast_ref())
}

/// A link of a source chain that is of the database.
enum Found<'a> {
    Driver(&'a Error),
    /// What the server said, alone: whoever wraps the driver's error transparently shows no more of it.
    Report(&'a DbError),
}

impl<'a> Found<'a> {
    fn in_link(link: &'a (dyn StdError + 'static)) -> Option<Self> {
        database_error(link).map(Self::Driver).or_else(|| link.downcast_ref().map(Self::Report))
    }
}

/// A link that is a database error, or a wrapper that hides one: `source` of these three skips what they hold.
fn database_error<'a>(link: &'a (dyn StdError + 'static)) -> Option<&'a Error> {
    if let Some(boxed) = link.downcast_ref::<Box<Error>>() {
        return Some(boxed);
    }
    if let Some(shared) = link.downcast_ref::<Arc<Error>>() {
        return Some(shared);
    }
    if let Some(cause) = link.downcast_ref::<io::Error>() {
        return cause.get_ref()?.downcast_ref();
    }
    link.downcast_ref()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fmt;
    use std::future::{Ready, ready};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
    use tokio_postgres::config::SslMode;
    use tokio_postgres::tls::{NoTlsStream, TlsConnect};
    use tokio_postgres::{Client, Config, NoTls};

    use super::*;

    /// One `ErrorResponse`, as a server would send it.
    #[derive(Clone, Copy, Debug)]
    struct Report<'a> {
        /// The field that may be translated.
        severity: &'a str,
        /// The one that is not, for servers that send it.
        plain: Option<&'a str>,
        code: &'a str,
        message: &'a str,
        routine: Option<&'a str>,
    }

    impl<'a> Report<'a> {
        /// From a server itself.
        fn server(severity: &'a str, code: &'a str, message: &'a str, routine: &'a str) -> Self {
            Self { severity, plain: Some(severity), code, message, routine: Some(routine) }
        }

        /// From a pooler or a proxy: the three fields that `PgBouncer` sends.
        fn proxy(severity: &'a str, code: &'a str, message: &'a str) -> Self {
            Self { severity, plain: None, code, message, routine: None }
        }

        fn bytes(self) -> Vec<u8> {
            let mut fields = vec![(b'S', self.severity), (b'C', self.code), (b'M', self.message)];
            fields.extend(self.plain.map(|plain| (b'V', plain)));
            fields.extend(self.routine.map(|routine| (b'R', routine)));
            let mut body = Vec::new();
            for (tag, value) in fields {
                body.push(tag);
                body.extend_from_slice(value.as_bytes());
                body.push(0);
            }
            body.push(0);
            message(b'E', &body)
        }
    }

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut out = vec![tag];
        out.extend_from_slice(&u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        out.extend_from_slice(body);
        out
    }

    /// `AuthenticationOk`, `ReadyForQuery`.
    fn welcome() -> Vec<u8> {
        [message(b'R', &[0; 4]), message(b'Z', b"I")].concat()
    }

    fn block<F: Future>(future: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    fn config() -> Config {
        let mut config = Config::new();
        config.user("app");
        config
    }

    /// The error of opening a session with a peer that answers the start-up message with `reply` and hangs up.
    fn open_fails_with(config: &Config, reply: &[u8]) -> Error {
        open_fails(config, reply, NoTls)
    }

    fn open_fails<T>(config: &Config, reply: &[u8], tls: T) -> Error
    where
        T: TlsConnect<DuplexStream>,
    {
        block(async {
            let (near, mut far) = tokio::io::duplex(1 << 20);
            let peer = async {
                let _ = far.read(&mut [0; 1024]).await.unwrap();
                far.write_all(reply).await.unwrap();
                drop(far);
            };
            let (opened, ()) = tokio::join!(config.connect_raw(near, tls), peer);
            opened.map(drop).unwrap_err()
        })
    }

    /// The errors of a statement and of its session's driver, when the server answers with `reply` and hangs up.
    fn both_fail(reply: &[u8]) -> (Error, Option<Error>) {
        run(reply, async |client| client.simple_query("SELECT 1").await.map(drop).unwrap_err())
    }

    fn fails(reply: &[u8]) -> Error {
        both_fail(reply).0
    }

    fn run<T>(reply: &[u8], work: impl AsyncFnOnce(Client) -> T) -> (T, Option<Error>) {
        block(async {
            let (near, mut far) = tokio::io::duplex(1 << 20);
            let server = async {
                let _ = far.read(&mut [0; 1024]).await.unwrap();
                far.write_all(&welcome()).await.unwrap();
                // The statement; nothing, if the client finds its mistake by itself.
                let _ = far.read(&mut [0; 1024]).await.unwrap();
                far.write_all(reply).await.unwrap();
                drop(far);
            };
            let session = async {
                let config = config();
                let (client, connection) = config.connect_raw(near, NoTls).await.unwrap();
                tokio::join!(work(client), connection)
            };
            let ((out, driver), ()) = tokio::join!(session, server);
            (out, driver.err())
        })
    }

    fn report(report: Report<'_>) -> Error {
        let error = fails(&[report.bytes(), message(b'Z', b"I")].concat());
        assert!(error.as_db_error().is_some(), "{report:?} gave {error:?}");
        error
    }

    /// What a server reports, or, without a routine, a proxy.
    pub(crate) fn reported(severity: &str, code: &str, message: &str, routine: Option<&str>) -> DbError {
        let row = Report { severity, plain: Some(severity), code, message, routine };
        report(row).as_db_error().unwrap().clone()
    }

    fn refusal(report: Report<'_>) -> Error {
        let error = open_fails_with(&config(), &report.bytes());
        assert!(error.as_db_error().is_some(), "{report:?} gave {error:?}");
        error
    }

    #[test]
    fn each_row_of_the_table() {
        use Verdict::*;
        #[rustfmt::skip]
        let rows = [
            // severity, code, message, routine, verdict, and whether it refuses a COMMIT
            ("FATAL", "57P01", "terminating connection due to administrator command", "ProcessInterrupts", ConnectionLost, false),
            ("FATAL", "57P01", "terminating connection due to unexpected postmaster exit", "secure_read", ConnectionLost, false),
            ("ERROR", "57P01", "terminating connection due to administrator command", "ProcessInterrupts", ConnectionLost, false),
            ("FATAL", "57P02", "terminating connection because of crash of another server process", "quickdie", ConnectionLost, false),
            ("FATAL", "57P05", "terminating connection due to idle-session timeout", "ProcessInterrupts", ConnectionLost, false),
            ("PANIC", "XX000", "could not write to file", "XLogWrite", ConnectionLost, false),
            ("PANIC", "40001", "cannot abort transaction 7, it was already committed", "RecordTransactionAbort", ConnectionLost, false),
            ("FATAL", "08006", "connection to client lost", "ProcessInterrupts", ConnectionLost, false),
            ("FATAL", "08P01", "invalid frontend message type 7", "SocketBackend", ConnectionLost, false),
            ("FATAL", "40001", "terminating connection due to conflict with recovery", "ProcessRecoveryConflictInterrupt", ConnectionLost, false),
            ("FATAL", "57P03", "the database system is starting up", "ProcessStartupPacket", NotNow, false),
            ("ERROR", "57P03", "the database system is shutting down", "connect_pg_server", NotNow, false),
            ("FATAL", "53300", "sorry, too many clients already", "InitProcess", Full, false),
            ("ERROR", "25006", "cannot execute INSERT in a read-only transaction", "PreventCommandIfReadOnly", ReadOnly, true),
            ("ERROR", "0A000", "cannot set transaction read-write mode during recovery", "call_bool_check_hook", ReadOnly, true),
            ("ERROR", "0A000", "cannot use serializable mode in a hot standby", "call_enum_check_hook", ReadOnly, true),
            ("ERROR", "0A000", "cannot use serializable mode in a hot standby", "GetSerializableTransactionSnapshot", ReadOnly, true),
            ("ERROR", "0A000", "kann serialisierbaren Modus nicht in einem Hot Standby verwenden", "call_enum_check_hook", ReadOnly, true),
            ("ERROR", "XX000", "cannot assign TransactionIds during recovery", "GetNewTransactionId", ReadOnly, true),
            ("ERROR", "40001", "could not serialize access due to concurrent update", "ExecUpdate", Conflict, true),
            ("ERROR", "40P01", "deadlock detected", "DeadLockReport", Conflict, true),
            ("ERROR", "40003", "result is ambiguous", "commit", OutcomeUnknown, false),
            ("ERROR", "08007", "transaction resolution unknown", "commit", OutcomeUnknown, false),
            ("FATAL", "08007", "transaction resolution unknown", "commit", OutcomeUnknown, false),
            ("ERROR", "25P02", "current transaction is aborted", "exec_simple_query", Aborted, true),
            ("FATAL", "28P01", "password authentication failed for user \"app\"", "auth_failed", Refused, false),
            ("FATAL", "28000", "no pg_hba.conf entry for host", "ClientAuthentication", Refused, false),
            ("FATAL", "3D000", "database \"app\" does not exist", "InitPostgres", Refused, false),
            ("FATAL", "57P04", "terminating connection due to conflict with recovery", "ProcessInterrupts", Refused, false),
            ("FATAL", "0A000", "unsupported frontend protocol 9.0", "ProcessStartupPacket", Refused, false),
            ("ERROR", "57P04", "database was dropped", "exec_stmt_raise", Application, true),
            ("ERROR", "3D000", "database \"old\" does not exist", "dropdb", Application, true),
            ("ERROR", "28P01", "password is required", "dblink_security_check", Application, true),
            ("ERROR", "0A000", "cached plan must not change result type", "RevalidateCachedQuery", Stale, true),
            ("ERROR", "0A000", "geplante Anfrage ist veraltet", "RevalidateCachedQuery", Stale, true),
            ("ERROR", "26000", "prepared statement \"s3\" does not exist", "FetchPreparedStatement", Stale, true),
            ("ERROR", "42P05", "prepared statement \"s3\" already exists", "StorePreparedStatement", Stale, true),
            ("ERROR", "XX000", "cache lookup failed for type 16411", "getTypeOutputInfo", Stale, true),
            ("ERROR", "XX000", "could not open relation with OID 16411", "relation_open", Stale, true),
            ("ERROR", "42704", "type with OID 16411 does not exist", "lookup_type_cache", Stale, true),
            ("ERROR", "42704", "type \"mood\" does not exist", "typenameType", Application, true),
            ("ERROR", "XX000", "something else", "elsewhere", Application, true),
            ("ERROR", "08001", "could not connect to server \"other\"", "connect_pg_server", Application, false),
            ("ERROR", "08006", "server closed the connection unexpectedly", "pgfdw_report_error", Application, false),
            ("ERROR", "08P01", "bind message supplies 1 parameters, but prepared statement requires 2", "exec_bind_message", Application, false),
            ("ERROR", "23505", "duplicate key value violates unique constraint", "_bt_check_unique", Application, true),
            ("ERROR", "42601", "syntax error at or near \"SELEC\"", "scanner_yyerror", Application, true),
            ("ERROR", "57014", "canceling statement due to statement timeout", "ProcessInterrupts", Application, true),
            ("ERROR", "53100", "could not extend file: No space left on device", "mdextend", Application, true),
            ("FATAL", "25P03", "terminating connection due to idle-in-transaction timeout", "ProcessInterrupts", Application, false),
            ("FATAL", "25P04", "terminating connection due to transaction timeout", "ProcessInterrupts", Application, false),
        ];
        for (severity, code, text, routine, verdict, refused) in rows {
            let row = Report::server(severity, code, text, routine);
            let error = report(row);
            assert_eq!(classify(&error), verdict, "{row:?}");
            assert_eq!(commit_refused(&error), refused, "{row:?}");
        }
    }

    #[test]
    fn a_proxy_is_believed_about_connections_and_not_about_commits() {
        use Verdict::*;
        #[rustfmt::skip]
        let rows = [
            // PgBouncer: everything that befalls it
            ("FATAL", "08P01", "server conn crashed?", ConnectionLost, false),
            ("FATAL", "08P01", "query_wait_timeout", ConnectionLost, false),
            ("FATAL", "08P01", "client_login_timeout (server down)", ConnectionLost, false),
            ("FATAL", "08P01", "transaction blocks not allowed in statement pooling mode", Refused, false),
            ("ERROR", "08P01", "prepared statement did not exist", Stale, false),
            ("ERROR", "0A000", "cached plan must not change result type", Stale, false),
            ("ERROR", "08006", "server connection lost", ConnectionLost, false),
            // pgcat
            ("FATAL", "58000", "could not get connection from the pool", ConnectionLost, false),
            ("ERROR", "58000", "server is down", Application, false),
            // Passed on by whatever is in between: nobody says these of a commit that may have landed.
            ("ERROR", "23503", "violates foreign key constraint", Application, true),
            ("ERROR", "40001", "restart transaction", Conflict, true),
            ("ERROR", "25P02", "current transaction is aborted", Aborted, true),
        ];
        for (severity, code, text, verdict, refused) in rows {
            let row = Report::proxy(severity, code, text);
            let error = report(row);
            assert_eq!(classify(&error), verdict, "{row:?}");
            assert_eq!(commit_refused(&error), refused, "{row:?}");
        }
    }

    #[test]
    fn a_translated_severity_proves_nothing() {
        let translated = Report {
            severity: "FEHLER",
            plain: None,
            ..Report::server("", "23505", "doppelter Schlüsselwert", "_bt_check_unique")
        };
        let error = report(translated);
        assert_eq!(classify(&error), Verdict::Application);
        assert!(!commit_refused(&error));
        // Servers since 9.6 send the plain word as well.
        let error = report(Report { plain: Some("ERROR"), ..translated });
        assert!(commit_refused(&error));
    }

    #[test]
    fn reports_while_a_session_opens() {
        use Verdict::*;
        let server = |code, text| Report::server("FATAL", code, text, "InitPostgres");
        #[rustfmt::skip]
        let rows = [
            (server("28P01", "password authentication failed"), Refused),
            (server("28000", "role \"app\" does not exist"), Refused),
            (server("3D000", "database \"app\" does not exist"), Refused),
            (server("42501", "permission denied for database \"app\""), Refused),
            (server("42704", "unrecognized configuration parameter \"foo\""), Refused),
            (server("22023", "invalid value for parameter \"work_mem\""), Refused),
            (server("55000", "database \"template0\" is not currently accepting connections"), Refused),
            (server("57P03", "the database system is in recovery mode"), NotNow),
            (server("53300", "too many connections for role \"app\""), Full),
            (server("57P01", "terminating connection"), ConnectionLost),
            (server("53200", "out of memory"), ConnectionLost),
            // Neon's proxy reports at ERROR, and hangs up.
            (Report::proxy("ERROR", "28P01", "password authentication failed"), Refused),
            (Report::proxy("ERROR", "XX000", "couldn't connect to compute node"), ConnectionLost),
            // PgBouncer
            (Report::proxy("FATAL", "08P01", "no such user: app"), Refused),
            (Report::proxy("FATAL", "08P01", "no such database: app"), Refused),
            (Report::proxy("FATAL", "08P01", "pgbouncer cannot connect to server"), ConnectionLost),
            (Report::proxy("FATAL", "08P01", "server login failed: no such user"), ConnectionLost),
        ];
        for (row, verdict) in rows {
            assert_eq!(verdict_of_open(&refusal(row)), verdict, "{row:?}");
        }
    }

    /// Prints its seed on failure; SEED in the environment runs that one again.
    #[test]
    fn every_code_has_a_verdict() {
        let named = "08 0A 26000 28 3D 40 42P05 53300 57P01 57P02 57P03 57P04 57P05 25006 25P02 25P03 25P04";
        let seed = std::env::var("SEED").map_or(0x5EED, |text| text.parse().unwrap());
        let mut state: u64 = seed;
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            usize::try_from(state >> 40).unwrap()
        };
        let letters = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ";
        for round in 0..300 {
            let code: String = (0..5).map(|_| char::from(letters[draw() % 36])).collect();
            let severity = ["ERROR", "FATAL", "PANIC"][draw() % 3];
            let row = Report::server(severity, &code, "something", "somewhere");
            let error = report(row);
            let verdict = classify(&error);
            let _ = (verdict_of_open(&error), explain(&error));
            assert!(severity == "ERROR" || !commit_refused(&error), "{row:?}");
            if named.split(' ').any(|known| code.starts_with(known)) {
                continue;
            }
            let expected = match severity {
                "ERROR" => Verdict::Application,
                _ => Verdict::ConnectionLost,
            };
            assert_eq!(verdict, expected, "{row:?}, round {round} of seed {seed}");
        }
        // No code at all, one too short, one that is not ASCII.
        for code in ["", "0", "é0", "日本"] {
            let row = Report::server("ERROR", code, "odd", "somewhere");
            assert_eq!(classify(&report(row)), Verdict::Application, "{row:?}");
        }
    }

    #[test]
    fn a_session_that_ends() {
        // FIN, and a FIN in the middle of a message.
        for reply in [&b""[..], &message(b'D', &[0; 64])[..20]] {
            let (statement, driver) = both_fail(reply);
            assert!(statement.is_closed());
            assert_eq!(classify(&statement), Verdict::ConnectionLost);
            assert_eq!(classify(&driver.unwrap()), Verdict::ConnectionLost);
            assert!(!commit_refused(&statement));
        }
        // While it opens: HAProxy without a server behind.
        for reply in [&b""[..], &welcome()[..6]] {
            let error = open_fails_with(&config(), reply);
            assert_eq!(verdict_of_open(&error), Verdict::ConnectionLost, "{error:?}");
        }
        assert_eq!(classify(&Error::__private_api_timeout()), Verdict::ConnectionLost);
    }

    #[test]
    fn a_peer_of_another_kind() {
        let lengths_lie = [b'R', 0, 0, 0, 1, 0, 0, 0, 0];
        for reply in [&lengths_lie[..], &message(b'!', b"hello"), &message(b'D', &[0; 8])] {
            let error = open_fails_with(&config(), reply);
            assert_eq!(verdict_of_open(&error), Verdict::NotPostgres, "{error:?}");
        }
        let not_a_query_answer = [message(b'R', &[0; 4]), message(b'Z', b"I")].concat();
        for reply in [not_a_query_answer, [message(b'!', b""), message(b'Z', b"I")].concat()] {
            assert_eq!(classify(&fails(&reply)), Verdict::NotPostgres);
        }
    }

    #[test]
    fn mistakes_of_the_caller() {
        let (error, _) = run(b"", async |client| client.simple_query("SELECT '\0'").await.map(drop).unwrap_err());
        assert_eq!(classify(&error), Verdict::Application, "{error:?}");
        let (error, _) = run(b"", async |client| client.query_typed("SELECT '\0'", &[]).await.map(drop).unwrap_err());
        assert_eq!(classify(&error), Verdict::Application, "{error:?}");
    }

    #[test]
    fn errors_without_a_code_have_a_name_for_telemetry() {
        let (closed, _) = both_fail(b"");
        let (usage, _) = run(b"", async |client| client.simple_query("SELECT '\0'").await.map(drop).unwrap_err());
        let nonsense = fails(&[message(b'!', b""), message(b'Z', b"I")].concat());
        let no_password = open_fails_with(&config(), &message(b'R', &[0, 0, 0, 3]));
        let kerberos = open_fails_with(&config(), &message(b'R', &[0, 0, 0, 2]));
        let text = "host=a target_session_attrs=primary".parse::<Config>().unwrap_err();
        for (error, name) in [
            (closed, "connection_lost"),
            (usage, "usage"),
            (nonsense, "protocol"),
            (no_password, "configuration"),
            (kerberos, "authentication"),
            (text, "configuration"),
            (Error::__private_api_timeout(), "timed_out"),
        ] {
            assert_eq!(without_code(&error), name, "{error:?}");
        }
    }

    #[test]
    fn settings_that_cannot_work() {
        let no_password = open_fails_with(&config(), &message(b'R', &[0, 0, 0, 3]));
        assert_eq!(explain(&no_password), "invalid configuration: password missing");
        let kerberos = open_fails_with(&config(), &message(b'R', &[0, 0, 0, 2]));
        assert_eq!(explain(&kerberos), "authentication error: unsupported authentication method");
        let no_host = block(config().connect(NoTls)).map(drop).unwrap_err();
        let text = "host=a target_session_attrs=primary".parse::<Config>().unwrap_err();
        assert_eq!(explain(&text), "invalid connection string: invalid value for option `target_session_attrs`");
        for error in [no_password, kerberos, no_host, text] {
            assert_eq!(verdict_of_open(&error), Verdict::Refused, "{error:?}");
            assert_eq!(classify(&error), Verdict::Refused, "{error:?}");
        }
    }

    #[test]
    fn a_port_where_nobody_listens() {
        let mut config = config();
        config.host("127.0.0.1").port(1);
        let error = block(config.connect(NoTls)).map(drop).unwrap_err();
        assert_eq!(verdict_of_open(&error), Verdict::ConnectionLost, "{error:?}");
        assert!(explain(&error).starts_with("error connecting to server: "));
    }

    #[test]
    fn the_drivers_own_role_check() {
        use tokio_postgres::config::TargetSessionAttrs::{ReadOnly, ReadWrite};
        for (wanted, read_only, verdict) in
            [(ReadWrite, &b"on"[..], Verdict::ReadOnly), (ReadOnly, &b"off"[..], Verdict::NotNow)]
        {
            // The answer to SHOW transaction_read_only.
            let length = u8::try_from(read_only.len()).unwrap();
            let answer = [
                message(b'T', &[&[0, 1, b'x', 0][..], &[0; 18]].concat()),
                message(b'D', &[&[0, 1, 0, 0, 0, length], read_only].concat()),
                message(b'C', b"SHOW\0"),
                message(b'Z', b"I"),
            ]
            .concat();
            let error = block(async {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                let port = listener.local_addr().unwrap().port();
                let mut config = config();
                config.host("127.0.0.1").port(port).target_session_attrs(wanted);
                let server = async {
                    let (mut peer, _) = listener.accept().await.unwrap();
                    let _ = peer.read(&mut [0; 1024]).await.unwrap();
                    peer.write_all(&welcome()).await.unwrap();
                    let _ = peer.read(&mut [0; 1024]).await.unwrap();
                    peer.write_all(&answer).await.unwrap();
                    peer
                };
                let (opened, _peer) = tokio::join!(config.connect(NoTls), server);
                opened.map(drop).unwrap_err()
            });
            assert_eq!(verdict_of_open(&error), verdict, "{error:?}");
        }
    }

    /// A handshake that ends as told.
    struct Handshake<E>(E);

    impl<E> TlsConnect<DuplexStream> for Handshake<E>
    where
        E: Into<Box<dyn StdError + Send + Sync>>,
    {
        type Stream = NoTlsStream;
        type Error = E;
        type Future = Ready<Result<NoTlsStream, E>>;

        fn connect(self, _stream: DuplexStream) -> Self::Future {
            ready(Err(self.0))
        }
    }

    fn handshake<E>(failure: E) -> Error
    where
        E: Into<Box<dyn StdError + Send + Sync>>,
    {
        let mut config = config();
        config.ssl_mode(SslMode::Require).host("pg.internal");
        open_fails(&config, b"S", Handshake(failure))
    }

    #[test]
    fn tls() {
        let mut required = config();
        required.ssl_mode(SslMode::Require).host("pg.internal");
        let none = open_fails(&required, b"N", Handshake("not reached"));
        assert_eq!(explain(&none), "error performing TLS handshake: server does not support TLS");
        assert_eq!(verdict_of_open(&none), Verdict::Refused);
        // EOF instead of the answer: HAProxy again.
        let hung_up = open_fails(&required, b"", Handshake("not reached"));
        assert_eq!(verdict_of_open(&hung_up), Verdict::ConnectionLost);

        let bad = io::Error::new(io::ErrorKind::InvalidData, "invalid peer certificate: Expired");
        assert_eq!(verdict_of_open(&handshake(bad)), Verdict::Refused);
        for kind in [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset] {
            let cut = io::Error::new(kind, "tls handshake eof");
            assert_eq!(verdict_of_open(&handshake(cut)), Verdict::ConnectionLost);
            let deep = Outer(Box::new(io::Error::from(kind)));
            assert_eq!(verdict_of_open(&handshake(deep)), Verdict::ConnectionLost);
        }
        assert_eq!(verdict_of_open(&handshake("unexpected EOF")), Verdict::ConnectionLost);
    }

    #[test]
    fn a_certificate_is_rejected_after_the_handshake() {
        for text in [
            "received fatal alert: CertificateRequired",
            "received fatal alert: UnknownCA",
            "error:0A00045C:SSL routines:ssl3_read_bytes:tlsv13 alert certificate required",
            "error:0A000418:SSL routines:ssl3_read_bytes:tlsv1 alert unknown ca",
        ] {
            assert!(certificate_alert(text), "{text}");
        }
        for text in ["received fatal alert: InternalError", "invalid peer certificate: Expired"] {
            assert!(!certificate_alert(text), "{text}");
        }
        let alert = || io::Error::new(io::ErrorKind::InvalidData, "received fatal alert: UnknownCA");
        let error = block(async {
            let stream = Broken(alert());
            config().connect_raw(stream, NoTls).await.map(drop).unwrap_err()
        });
        assert_eq!(verdict_of_open(&error), Verdict::Refused, "{error:?}");
        assert_eq!(classify(&error), Verdict::ConnectionLost, "{error:?}");
    }

    #[test]
    fn io_errors() {
        for kind in [
            io::ErrorKind::ConnectionReset,
            io::ErrorKind::BrokenPipe,
            io::ErrorKind::TimedOut,
            io::ErrorKind::PermissionDenied,
            io::ErrorKind::Other,
        ] {
            let error = block(async {
                let stream = Broken(io::Error::from(kind));
                config().connect_raw(stream, NoTls).await.map(drop).unwrap_err()
            });
            assert_eq!(Kind::of(&error), Kind::Io, "{error:?}");
            assert_eq!(classify(&error), Verdict::ConnectionLost, "{error:?}");
            assert_eq!(verdict_of_open(&error), Verdict::ConnectionLost, "{error:?}");
            assert!(!commit_refused(&error));
        }
    }

    /// A stream that takes everything and answers with one error.
    struct Broken(io::Error);

    impl tokio::io::AsyncRead for Broken {
        fn poll_read(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
            _: &mut tokio::io::ReadBuf<'_>,
        ) -> std::task::Poll<io::Result<()>> {
            let copy = io::Error::new(self.0.kind(), self.0.to_string());
            std::task::Poll::Ready(Err(copy))
        }
    }

    impl tokio::io::AsyncWrite for Broken {
        fn poll_write(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
            bytes: &[u8],
        ) -> std::task::Poll<io::Result<usize>> {
            std::task::Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<io::Result<()>> {
            std::task::Poll::Ready(Ok(()))
        }

        fn poll_shutdown(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<io::Result<()>> {
            std::task::Poll::Ready(Ok(()))
        }
    }

    #[derive(Debug)]
    struct Outer(Box<dyn StdError + Send + Sync>);

    impl fmt::Display for Outer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("the order could not be stored")
        }
    }

    impl StdError for Outer {
        fn source(&self) -> Option<&(dyn StdError + 'static)> {
            Some(&*self.0)
        }
    }

    /// Its own cause.
    #[derive(Debug)]
    struct Loop;

    impl fmt::Display for Loop {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("again")
        }
    }

    impl StdError for Loop {
        fn source(&self) -> Option<&(dyn StdError + 'static)> {
            Some(self)
        }
    }

    #[test]
    fn a_database_error_at_any_depth() {
        let deadlock = || report(Report::server("ERROR", "40P01", "deadlock", "DeadLockReport"));
        let nested = |depth| {
            let mut error: Box<dyn StdError + Send + Sync> = Box::new(deadlock());
            for _ in 0..depth {
                error = Box::new(Outer(error));
            }
            Outer(error)
        };
        assert_eq!(classify_chain(&deadlock()), Some(Verdict::Conflict));
        assert_eq!(classify_chain(&nested(0)), Some(Verdict::Conflict));
        assert_eq!(classify_chain(&nested(14)), Some(Verdict::Conflict));
        assert_eq!(classify_chain(&nested(15)), None);
        // What the server said, without the driver's error around it.
        let said = deadlock().as_db_error().unwrap().clone();
        assert_eq!(classify_chain(&Outer(Box::new(said.clone()))), Some(Verdict::Conflict));
        assert_eq!(report_in_chain(&Outer(Box::new(said.clone()))), Some(&said));
        // Wrappers whose `source` leaves out what they hold.
        assert_eq!(classify_chain(&io::Error::other(deadlock())), Some(Verdict::Conflict));
        assert_eq!(classify_chain(&Arc::new(deadlock())), Some(Verdict::Conflict));
        assert_eq!(classify_chain(&Box::new(deadlock())), Some(Verdict::Conflict));
        assert_eq!(classify_chain(&Loop), None);
        assert_eq!(classify_chain(&fmt::Error), None);
    }

    #[test]
    fn explained_in_one_line() {
        let error = report(Report::server("FATAL", "57P01", "terminating\nconnection", "x"));
        assert_eq!(explain(&error), "FATAL 57P01: terminating connection");
        // The password's second half, taken for an option.
        let misread = "host=a password=top secret".parse::<Config>().unwrap_err();
        assert!(!explain(&misread).contains("secret"), "{}", explain(&misread));
    }

    #[test]
    fn an_error_may_be_about_one_part_of_a_question_or_about_all_of_it() {
        for (severity, code, part) in [
            ("ERROR", "42501", true),
            ("ERROR", "42883", true),
            ("ERROR", "42704", true),
            ("ERROR", "0A000", true),
            ("ERROR", "55000", true),
            ("ERROR", "58P01", true),
            ("ERROR", "XX000", true),
            ("ERROR", "57014", false),
            ("ERROR", "53200", false),
            ("ERROR", "40001", false),
            ("ERROR", "25006", false),
            ("FATAL", "42501", false),
            ("PANIC", "XX000", false),
        ] {
            let error = report(Report { severity, plain: Some(severity), code, message: "no", routine: Some("f") });
            assert_eq!(about_a_part(&error), part, "{severity} {code}");
            assert_eq!(for_primaries_only(&error), code == "55000", "{severity} {code}");
        }
    }
}
