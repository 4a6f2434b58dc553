//! The SQL that settles commits by the write-ahead log: it writes a transaction's mark, and asks a server about one.
//! `commit` decides what the answers mean. The tests are in `tests/it/commit/settle.rs`.

mod question;
#[cfg(test)]
mod tests;

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Error, SimpleQueryMessage};

use self::question::{LogColumn, followed, question, refused};
use super::columns::{Column, columns, field, has, list, only_value, optional, text, time};
pub(crate) use super::columns::{Row, only_row};
use crate::classify::{explain, not_offered, not_prepared};
use crate::commit::{Ancestry, Life, Nonce, Now, Proof, Server, Sighting, Signature, WalMark, XactStatus};
use crate::server::{may_be_cut, rows};
use crate::sync::log_safely;
use crate::topology::{BadReport, Evidence, STARTED_AT, ServerReport, UNLIMITED, evidence};

columns! {
    /// The answer to [`mark`].
    enum MarkColumn {
        /// `Xid` and `Lsn` are NULL if the transaction cannot write anyway, so that a fenced primary is not made to
        /// write WAL.
        Xid,
        /// Asking for it writes a WAL record that carries the id and the nonce. It is the record's end.
        Lsn,
        /// `Replayed` and `StartedAt` identify the server's life, because a proxy may have connected this transaction
        /// to another server than the one that was verified.
        Replayed,
        Pid,
        StartedAt,
        BegunHere,
    }
}

/// Returns the SELECT that marks a transaction.
///
/// The mark is part of the user's transaction and must not change its settings. So each name is qualified, because
/// otherwise the user's `search_path` could lead to other objects.
fn mark(nonce: &str) -> String {
    let emit = format!("CASE WHEN writes THEN pg_catalog.pg_logical_emit_message(true, 'failover', {nonce}) END");
    let columns = list(|column| match column {
        MarkColumn::Xid => "CASE WHEN writes THEN pg_catalog.pg_current_xact_id() END",
        MarkColumn::Lsn => emit.as_str(),
        MarkColumn::Replayed => LAST_REPLAYED,
        MarkColumn::Pid => "pg_catalog.pg_backend_pid()",
        MarkColumn::StartedAt => STARTED_AT,
        MarkColumn::BegunHere => BEGUN_HERE,
    });
    format!(
        "SELECT {columns} \
           FROM (SELECT pg_catalog.current_setting('transaction_read_only') OPERATOR(pg_catalog.=) 'off' AS writes) s"
    )
}

columns! {
    /// The answer to [`direct_mark`].
    enum DirectColumn { Xid, Lsn }
}

/// As [`mark`], for a session that is one session of the server as long as it lasts. Such a session cannot move to
/// another server, or to another life of its server, so the answer need not say which one it is. If the transaction
/// cannot write, the answer has no row.
fn direct_mark(nonce: &str) -> String {
    let emit = format!("pg_catalog.pg_logical_emit_message(true, 'failover', {nonce})");
    let columns = list(|column| match column {
        DirectColumn::Xid => "pg_catalog.pg_current_xact_id()",
        DirectColumn::Lsn => emit.as_str(),
    });
    format!(
        "SELECT {columns} \
          WHERE pg_catalog.current_setting('transaction_read_only') OPERATOR(pg_catalog.=) 'off'"
    )
}

/// The end of the last replay. NULL if the server has never replayed WAL in this life.
pub(super) const LAST_REPLAYED: &str = "pg_catalog.pg_last_wal_replay_lsn()";

/// True if the message that asks also began the transaction. False if the session was already in a transaction, because
/// it was given back with one open. If it began the transaction, the transaction's start time is the message's time.
pub(super) const BEGUN_HERE: &str = "pg_catalog.now() OPERATOR(pg_catalog.=) pg_catalog.statement_timestamp()";

/// The name of the mark's prepared statement. Executing it costs the server a fraction of what planning [`mark`] costs.
/// Change the number whenever the columns change, because different versions of this crate may share a session behind a
/// proxy.
const PREPARED: &str = "tokio_postgres_failover_mark_5";

/// As [`PREPARED`], for [`direct_mark`].
const DIRECT_PREPARED: &str = "tokio_postgres_failover_direct_mark_1";

/// How a session marks its transactions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum MarkStatement {
    /// The statement is not prepared yet.
    #[default]
    New,
    Prepared,
    /// The session does not prepare the statement: it was missing or already there, because a proxy gives each
    /// transaction another session.
    Plain,
}

/// Which of the two marks a session's transactions have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MarkForm {
    /// [`mark`], whose answer says which server has answered.
    Full,
    /// [`direct_mark`].
    Direct,
}

impl MarkForm {
    fn sql(self, nonce: &str) -> String {
        match self {
            Self::Full => mark(nonce),
            Self::Direct => direct_mark(nonce),
        }
    }

    /// The name of the mark's prepared statement. Its only parameter is the nonce, a text.
    pub(crate) fn prepared(self) -> &'static str {
        match self {
            Self::Full => PREPARED,
            Self::Direct => DIRECT_PREPARED,
        }
    }
}

impl MarkStatement {
    /// Returns BEGIN and the mark in one message.
    pub(crate) fn sql(self, form: MarkForm, begin: &str, nonce: Nonce) -> String {
        let prepared = form.prepared();
        match self {
            Self::New => {
                let mark = form.sql("$1");
                format!("{begin}; PREPARE {prepared} (pg_catalog.text) AS {mark}; EXECUTE {prepared} ('{nonce}')")
            }
            Self::Prepared => format!("{begin}; EXECUTE {prepared} ('{nonce}')"),
            Self::Plain => format!("{begin}; {}", form.sql(&format!("'{nonce}'"))),
        }
    }

    /// Returns whether the error says that the prepared statement is missing, exists already, is stale, or is refused.
    pub(crate) fn failed(self, error: &Error) -> bool {
        self != Self::Plain && (not_prepared(error) || not_offered(error))
    }

    /// What becomes of it on a session where it has failed so. `direct`: no proxy has given the transaction another
    /// session. So somebody has removed the prepared statement from this one, or it is there already.
    pub(crate) fn after(self, error: &Error, direct: bool) -> Self {
        match self {
            Self::Prepared if direct && not_prepared(error) => Self::New,
            Self::New if direct && error.code() == Some(&SqlState::DUPLICATE_PSTATEMENT) => Self::Prepared,
            _ => Self::Plain,
        }
    }
}

/// Begins a settler's transaction. All its questions are in one transaction, which a proxy keeps on one server. It
/// waits for the synchronous standbys, whatever the role's default is, and receives the notice if that wait is
/// cancelled. The call's deadline limits its statements, not `statement_timeout`. If the session is idle in this
/// transaction for two seconds, the server ends it: if this client has vanished, the transaction would otherwise keep a
/// ledger's row locked, and no later settler would get an answer. [`UNLIMITED`] completes it.
const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED, READ WRITE; SET LOCAL synchronous_commit = on; \
     SET LOCAL client_min_messages = warning; SET LOCAL statement_timeout = 0; \
     SET LOCAL idle_in_transaction_session_timeout = '2s'";

/// Begins a settler's transaction with these statements, and returns the only row of the answer. If the role may not
/// switch `transaction_timeout` off, the statements run without that.
pub(super) async fn begin_with(client: &Client, statements: &str) -> Result<Row, Error> {
    match only_row(client, &format!("{BEGIN}; {UNLIMITED} {statements}")).await {
        Err(error) if not_offered(&error) => {
            client.batch_execute("ROLLBACK").await?;
            only_row(client, &format!("{BEGIN}; {statements}")).await
        }
        answer => answer,
    }
}

/// The session that a transaction runs on. The server may keep it long after its client has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Backend {
    pub(crate) pid: i32,
    pub(crate) xid: u64,
}

impl Backend {
    /// The transaction's id without its epoch, as the server's views of sessions and locks show it.
    pub(super) fn short_xid(self) -> u64 {
        self.xid & u64::from(u32::MAX)
    }
}

/// The answer to the mark's statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MarkAnswer {
    By(WalMark, Backend),
    /// The transaction cannot write, so it leaves no mark and needs none.
    ReadOnly,
    /// Another server answered than the verified one, or it has restarted or crashed since.
    Elsewhere,
    /// The transaction was open already, so COMMIT would also commit work that is not this call's.
    Joined,
}

/// Reads the answer to [`direct_mark`]. `pid`: the server process of the session.
pub(crate) fn read_direct_mark(life: &Life, pid: i32, nonce: Nonce, row: &Row) -> Result<MarkAnswer, BadReport> {
    if row.is_empty() {
        return Ok(MarkAnswer::ReadOnly);
    }
    let xid = field(row, DirectColumn::Xid, "a transaction id")?;
    let lsn = field(row, DirectColumn::Lsn, "an LSN")?;
    Ok(MarkAnswer::By(WalMark { life: *life, xid, lsn, nonce }, Backend { pid, xid }))
}

/// Reads the answer to [`mark`].
pub(crate) fn read_mark(life: &Life, nonce: Nonce, row: &Row) -> Result<MarkAnswer, BadReport> {
    if text(row, MarkColumn::BegunHere) == Some("f") {
        return Ok(MarkAnswer::Joined);
    }
    if has(row, MarkColumn::Lsn) && text(row, MarkColumn::Xid).is_none() {
        return Ok(MarkAnswer::ReadOnly);
    }
    let xid = field(row, MarkColumn::Xid, "a transaction id")?;
    let lsn = field(row, MarkColumn::Lsn, "an LSN")?;
    let backend = Backend { pid: field(row, MarkColumn::Pid, "a process id")?, xid };
    if !is_of(life, row, MarkColumn::StartedAt, MarkColumn::Replayed)? {
        return Ok(MarkAnswer::Elsewhere);
    }
    Ok(MarkAnswer::By(WalMark { life: *life, xid, lsn, nonce }, backend))
}

/// Returns whether a server in this life answered.
pub(super) fn is_of<C: Column>(life: &Life, row: &Row, started_at: C, replayed: C) -> Result<bool, BadReport> {
    let (replayed, started_at) = (optional(row, replayed)?, time(row, started_at)?);
    Ok(life.is(&Life { server: Server { started_at, ..life.server }, replayed, ..*life }))
}

/// What a server says about itself, and about a transaction id. After a crash or a promotion, another transaction may
/// have this id.
#[derive(Debug)]
pub(crate) struct LogAnswer {
    pub(crate) now: Now,
    /// `None`: the server has not given out the id yet.
    pub(crate) status: Option<XactStatus>,
    pub(crate) evidence: Evidence,
}

/// Begins a settler's transaction, and asks. `Err(None)`: the answer cannot be read, or it does not identify the
/// server.
///
/// `verified` is the life in which the pool has verified the session's server.
pub(crate) async fn look(
    client: &Client,
    xid: u64,
    primaries_since: u64,
    verified: Option<Life>,
) -> Result<LogAnswer, Option<Error>> {
    let row = match begin_with(client, &question(xid, &[])).await {
        Err(error) if not_offered(&error) => {
            client.batch_execute("ROLLBACK").await?;
            begin_with(client, &question(xid, &refused(client).await)).await?
        }
        answer => answer?,
    };
    said(&row, primaries_since, verified).map_err(|_| None)
}

fn said(row: &Row, primaries_since: u64, verified: Option<Life>) -> Result<LogAnswer, BadReport> {
    let evidence = text(row, LogColumn::Evidence).map_or(Ok(Evidence::Checkpoint), evidence)?;
    Ok(LogAnswer { now: now(row, primaries_since, verified)?, status: status(row)?, evidence })
}

columns! {
    /// What a kind of evidence shows. [`followed`] has the first column alone.
    enum ProofColumn { Seen, History }
}

/// Asks, within a settler's transaction, what the server shows about the history of its WAL. If one kind of evidence
/// fails, for instance because the function's owner may not read the files, the next weaker kind is asked for in the
/// same transaction.
pub(crate) async fn prove(client: &Client, mark: &WalMark, evidence: Evidence) -> Result<Proof, Error> {
    let columns = list(|column| match column {
        ProofColumn::Seen => "seen",
        ProofColumn::History => "history",
    });
    // The casts choose the function that was checked. Without them, another one for two texts would be preferred, which
    // whoever may create objects in the schema could have made.
    let function = format!(
        "SELECT {columns} FROM failover.wal_history('{}'::pg_catalog.pg_lsn, '{}'::pg_catalog.text)",
        mark.lsn, mark.nonce
    );
    let files = followed(mark.life.server.timeline);
    for (kind, sql) in [(Evidence::Function, function), (Evidence::Files, files)] {
        if kind > evidence {
            continue;
        }
        let why = match only_row(client, &format!("SAVEPOINT proof; {sql}")).await {
            Ok(row) => match proof(kind, &row) {
                Ok(proof) => return Ok(proof),
                Err(bad) => bad.to_string(),
            },
            Err(error) if would_fail_again(&error) => {
                client.batch_execute("ROLLBACK TO SAVEPOINT proof").await?;
                explain(&error)
            }
            Err(error) => return Err(error),
        };
        log_safely(|| tracing::warn!(?kind, why, "the server does not show the history of its log"));
    }
    Ok(Proof::Nothing)
}

columns! {
    /// Identifies the life of the server that signed.
    enum SignedColumn { StartedAt, Replayed }
}

/// How many transactions sign a timeline. Each of them commits or aborts at random, so the probability that another
/// history has the same outcomes is 2⁻³².
const SIGNED_BY: u32 = 32;

/// Signs the timeline of a server in this life. Rolls back a transaction that is open on the session. Returns `None` if
/// another server answered, or if its answer cannot be read.
pub(crate) async fn sign(client: &Client, life: &Life, pattern: u64) -> Result<Option<Signature>, Error> {
    let outcomes: Vec<bool> = (0..SIGNED_BY).map(|bit| pattern >> bit & 1 == 1).collect();
    // These commits do not wait for the disk, because a history that contains a later WAL record contains them, too.
    let begin = "START TRANSACTION; SET LOCAL synchronous_commit = off; SELECT pg_catalog.pg_current_xact_id()";
    // A wrapped pool may hand out a connection with somebody's open transaction, which the first END would commit.
    let clean = "BEGIN; ROLLBACK";
    let one = |committed: &bool| format!("{begin}; {}; ", if *committed { "END" } else { "ABORT" });
    let signing: String = outcomes.iter().map(one).collect();
    // A proxy sends each message to one server.
    let who = list(|column| match column {
        SignedColumn::StartedAt => STARTED_AT,
        SignedColumn::Replayed => LAST_REPLAYED,
    });
    let sql = format!("{clean}; {signing}SELECT {who}");
    let mut rows = rows(client, &sql).await?;
    let who = rows.pop().unwrap_or_default();
    let verified = is_of(life, &who, SignedColumn::StartedAt, SignedColumn::Replayed).unwrap_or(false);
    let ids: Option<Vec<u64>> = rows.iter().map(|row| row.first()?.as_deref()?.parse().ok()).collect();
    let ids = ids.filter(|ids| verified && ids.len() == outcomes.len());
    Ok(ids.map(|ids| Signature(ids.into_iter().zip(outcomes).collect())))
}

/// Asks, within a settler's transaction, whether the server's history contains a signature.
pub(crate) async fn has_signature(client: &Client, signature: &Signature) -> Result<bool, Error> {
    let status = |committed| if committed { "committed" } else { "aborted" };
    let signed = signature.0.iter().map(|(id, committed)| format!("('{id}'::xid8, '{}')", status(*committed)));
    let signed: Vec<String> = signed.collect();
    let sql = format!(
        "SELECT count(*) = {} FROM (VALUES {}) AS signed (id, status) \
          WHERE CASE WHEN id < pg_current_xact_id() THEN pg_xact_status(id) = status END",
        signed.len(),
        signed.join(", ")
    );
    Ok(only_value(client, &sql).await?.as_deref() == Some("t"))
}

/// Returns whether the same question would fail again. After a cancelled statement or a lack of memory it may succeed.
fn would_fail_again(error: &Error) -> bool {
    let classes = ["0A", "22", "42", "58", "P0", "XX"];
    error.code().is_some_and(|code| classes.iter().any(|class| code.code().starts_with(class)))
}

fn proof(evidence: Evidence, row: &Row) -> Result<Proof, BadReport> {
    let answer = text(row, ProofColumn::Seen);
    let bad = || BadReport::new("what is in the log", answer.unwrap_or("NULL"));
    if evidence == Evidence::Files {
        return match answer {
            Some("t") => Ok(Proof::Files { followed: true }),
            Some("f") => Ok(Proof::Files { followed: false }),
            _ => Err(bad()),
        };
    }
    let sighting = match answer {
        Some("marker") => Sighting::Mark,
        Some("other") => Sighting::Other,
        Some("not yet") => Sighting::NotYet,
        Some("recycled") => Sighting::Recycled,
        _ => return Err(bad()),
    };
    let history = text(row, ProofColumn::History).ok_or_else(|| BadReport::new("a timeline's history", "NULL"))?;
    // The newest timelines come last. Without them, the history would seem to lack the mark's timeline.
    if may_be_cut(history) {
        if sighting == Sighting::Recycled {
            return Err(BadReport::new("a timeline's whole history", "the beginning of a longer one"));
        }
        // What is in the WAL decides without the history.
        return Ok(Proof::Function { ancestry: Ancestry::default(), sighting });
    }
    Ok(Proof::Function { ancestry: Ancestry::parse(history)?, sighting })
}

fn now(row: &Row, primaries_since: u64, verified: Option<Life>) -> Result<Now, BadReport> {
    let (started_at, replayed) = (time(row, LogColumn::StartedAt)?, optional(row, LogColumn::Replayed)?);
    // A server in its verified life still has the same identity, even if this role may not read it any more.
    let same = verified.filter(|verified| verified.server.started_at == started_at && verified.replayed == replayed);
    let system_identifier = match (text(row, LogColumn::Identifier), same) {
        (None, Some(same)) => same.server.system_identifier,
        _ => field::<i64>(row, LogColumn::Identifier, "a system identifier")?.cast_unsigned(),
    };
    let timeline = match (text(row, LogColumn::Timeline), same) {
        (None, Some(same)) => same.server.timeline,
        (name, _) => ServerReport::timeline_of(name.unwrap_or("NULL"))?,
    };
    let server = Server { system_identifier, timeline, started_at };
    let stats_reset = text(row, LogColumn::StatsReset).map(|_| time(row, LogColumn::StatsReset)).transpose()?;
    let checkpointed = text(row, LogColumn::Checkpointed);
    let checkpointed: Option<u32> =
        checkpointed.map(|_| field(row, LogColumn::Checkpointed, "a timeline")).transpose()?;
    let ancestor = checkpointed.filter(|older| *older < server.timeline);
    let life = Life { server, replayed, stats_reset, ancestor };
    let (received, stopped) = (optional(row, LogColumn::Received)?, optional(row, LogColumn::Stopped)?);
    Ok(Now { life, received, stopped, primaries_since })
}

fn status(row: &Row) -> Result<Option<XactStatus>, BadReport> {
    Ok(Some(match text(row, LogColumn::Status) {
        Some("in progress") => XactStatus::InProgress,
        Some("committed") => XactStatus::Committed,
        Some("aborted") => XactStatus::Aborted,
        Some("forgotten") => XactStatus::Forgotten,
        None if has(row, LogColumn::Status) => return Ok(None),
        other => return Err(BadReport::new("the status of a transaction", other.unwrap_or("nothing"))),
    }))
}

/// Ends a settler's transaction. It writes WAL, so its COMMIT waits for the synchronous standbys. WAL is replicated in
/// order, so once the standbys have this record, they have all that was committed before it. If an administrator
/// cancels the wait, the server sends a notice. `client_min_messages` is set so that the notice is sent, whatever the
/// role's setting is. Returns whether the transaction was committed.
pub(crate) async fn confirm(client: &Client) -> Result<bool, Error> {
    let sql = "SELECT pg_catalog.pg_logical_emit_message(true, 'failover', ''); \
         SET LOCAL client_min_messages = warning; COMMIT";
    completes(client, sql, 3).await
}

/// Returns whether the server has answered so many statements. A proxy may keep some of them back.
pub(super) async fn completes(client: &Client, sql: &str, statements: usize) -> Result<bool, Error> {
    let messages = client.simple_query(sql).await?;
    let completed = messages.iter().filter(|message| matches!(message, SimpleQueryMessage::CommandComplete(_))).count();
    Ok(completed == statements)
}

/// How a transaction that is still in progress is about to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EndUnderWay {
    /// `PREPARE TRANSACTION` has stored it.
    Prepared,
    /// Its COMMIT was carried out and waits for a synchronous standby.
    Committing,
    /// A statement is under way whose text does not end the transaction. If the client has gone, none comes after it.
    Working,
}

/// True if a session carries out a statement that does not end its transaction, as far as the whole text shows. The
/// words that end one count where a statement may begin: first, or behind a semicolon or a comment. A text as long
/// as the server keeps may have been cut, so it counts as an end, too.
const WORKS: &str = "state = 'active' AND query <> '' \
     AND query !~* E'(^|;|\\\\*/|--[^\\\\n\\\\r]*[\\\\n\\\\r])\\\\s*(commit|end|prepare)\\\\M' \
     AND octet_length(query) < (SELECT setting::int - 4 FROM pg_settings WHERE name = 'track_activity_query_size')";

/// Asks whether a transaction in progress was prepared, is being committed, or carries out something else. This runs
/// within a settler's transaction.
pub(crate) async fn ends(client: &Client, backend: Backend) -> Result<Option<EndUnderWay>, Error> {
    ends_after(client, backend, "").await
}

/// As [`ends`], but ends the settler's transaction first, which may have failed.
pub(crate) async fn ends_outside(client: &Client, backend: Backend) -> Result<Option<EndUnderWay>, Error> {
    ends_after(client, backend, "ROLLBACK; ").await
}

async fn ends_after(client: &Client, backend: Backend, first: &str) -> Result<Option<EndUnderWay>, Error> {
    let (pid, xid) = (backend.pid, backend.short_xid());
    let sql = format!(
        "{first}SET LOCAL ROLE NONE; SET LOCAL search_path = pg_catalog, pg_temp; \
         SELECT CASE WHEN EXISTS (SELECT FROM pg_prepared_xacts WHERE transaction = '{xid}'::xid) THEN 'prepared' \
                     WHEN EXISTS (SELECT FROM pg_stat_activity \
                                   WHERE pid = {pid} AND backend_xid = '{xid}'::xid AND wait_event = 'SyncRep') \
                     THEN 'committing' \
                     WHEN EXISTS (SELECT FROM pg_stat_activity \
                                   WHERE pid = {pid} AND backend_xid = '{xid}'::xid AND {WORKS}) \
                     THEN 'working' END"
    );
    Ok(match only_value(client, &sql).await?.as_deref() {
        Some("prepared") => Some(EndUnderWay::Prepared),
        Some("committing") => Some(EndUnderWay::Committing),
        Some("working") => Some(EndUnderWay::Working),
        _ => None,
    })
}
