//! Recognises the statements that the pool and the load send. A statement that is not in these tables is an error,
//! which the oracle reports: the model has to learn it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::columns::row_of;
use crate::ledger::id_of;
use crate::work::RAISED;

/// An error that a server reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SqlError {
    pub(crate) code: &'static str,
    pub(crate) message: String,
    /// The function in PostgreSQL's source that reports it. A pooler's errors have none.
    pub(crate) routine: &'static str,
    /// It ends the session.
    pub(crate) fatal: bool,
}

impl SqlError {
    pub(crate) fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), routine: "ProcessQuery", fatal: false }
    }

    pub(crate) fn by(self, routine: &'static str) -> Self {
        Self { routine, ..self }
    }
}

/// An expression, and the row of the table that evaluates it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Column {
    pub(crate) expression: String,
    pub(crate) row: Option<usize>,
    /// What it is on a standby, and on a primary.
    pub(crate) by_recovery: Option<Box<[Column; 2]>>,
}

impl Column {
    fn new(expression: String) -> Self {
        let cases =
            expression.strip_prefix("CASE WHEN pg_is_in_recovery() THEN ").and_then(|it| it.strip_suffix(" END"));
        let cases = cases.and_then(|cases| cases.split_once(" ELSE "));
        let of = |text: &str| Self::new(text.to_owned());
        let by_recovery = cases.map(|(standby, primary)| Box::new([of(standby), of(primary)]));
        Self { row: row_of(&expression), by_recovery, expression }
    }
}

/// By what a session that has lost its client is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    Marked(u64),
    /// When the session began, and how long its transaction has been open at least.
    Unmarked {
        backend_start: String,
        open_for: Duration,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Statement {
    Begin {
        /// The access mode that it names.
        read_only: Option<bool>,
        tag: &'static str,
    },
    Commit,
    Rollback,
    RollbackAndChain,
    Savepoint(String),
    RollbackToSavepoint(String),
    Release,
    Set {
        name: String,
        value: String,
        local: bool,
    },
    Show(String),
    Prepare {
        name: String,
        body: Box<Statement>,
    },
    Execute {
        name: String,
        argument: String,
    },
    Deallocate,
    /// `None`: the values are parameters.
    Insert(Option<[i64; 2]>),
    Sleep(Duration),
    PromotionWait {
        step: Duration,
        steps: u32,
    },
    /// `nonce`: `None` if it is a parameter. `direct`: the answer does not say which server has answered.
    Mark {
        nonce: Option<String>,
        direct: bool,
    },
    /// Fails unless the function returns this value. `None`: it is a parameter.
    Insist {
        function: String,
        expected: Option<String>,
    },
    History {
        position: u64,
        nonce: String,
    },
    Files {
        timeline: u32,
    },
    Signed(Vec<(u64, bool)>),
    Terminate {
        pid: i32,
        xid: u64,
    },
    /// Ends a session that has lost its client, and whose transaction has no mark.
    TerminateUnmarked {
        pid: i32,
        whose: Whose,
    },
    /// Ends a session whose COMMIT is in doubt, if it has not arrived.
    TerminateInDoubt {
        pid: i32,
        whose: Whose,
    },
    Ends {
        pid: i32,
        xid: u64,
    },
    /// Fails with one of `RAISED`, now or at COMMIT.
    Raise {
        which: usize,
        at_commit: bool,
    },
    /// A transaction's row in the ledger.
    /// `direct`: the answer does not say which server has answered.
    Enter {
        direct: bool,
    },
    /// A settler's row in the ledger.
    Fence(u64),
    /// Whether a transaction's own row is in the ledger.
    HasEntry(u64),
    Prune,
    Listen,
    /// Which channels the session listens to.
    Channels,
    /// The listener's session may be idle for ever.
    Stay,
    /// `transaction_timeout` is switched off, which the servers do not have.
    Unlimited,
    Notify(i64),
    Columns(Arc<[Column]>),
    Unknown(String),
}

impl Statement {
    /// A failed transaction takes only these.
    pub(crate) fn ends_a_failure(&self) -> bool {
        matches!(self, Self::Rollback | Self::RollbackAndChain | Self::Commit | Self::RollbackToSavepoint(_))
    }

    /// After such a statement, a transaction's access mode cannot become "read write" any more.
    pub(crate) fn takes_a_snapshot(&self) -> bool {
        let ends = self.ends_a_failure() || matches!(self, Self::Begin { .. } | Self::Savepoint(_) | Self::Release);
        !ends && !matches!(self, Self::Set { .. } | Self::Show(_) | Self::Listen)
    }
}

/// The statements of one message.
fn statements(message: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    let ends = move |letter: char| {
        quoted ^= letter == '\'';
        letter == ';' && !quoted
    };
    message.split(ends).map(str::trim).filter(|statement| !statement.is_empty())
}

type Recognise = fn(&str) -> Option<Statement>;

/// The first one that recognises a statement counts.
const KNOWN: [Recognise; 15] = [
    transactions,
    settings,
    prepared,
    rows,
    waits,
    marks,
    insists,
    histories,
    files,
    signatures,
    sessions,
    raises,
    ledger,
    crate::listen::statement,
    columns,
];

/// Texts longer than this are the pool's questions.
const LONG: usize = 300;
/// So many of them are kept. Only those without values come again, and there are only a few of these.
const KEPT: usize = 256;

/// Reads a message. One without a statement is empty.
pub(crate) fn read(message: &str) -> Arc<[Statement]> {
    let known = if message.len() > LONG { READ.with_borrow(|read| read.get(message).map(Arc::clone)) } else { None };
    known.unwrap_or_else(|| {
        let all: Arc<[Statement]> = statements(message).map(parse).collect();
        READ.with_borrow_mut(|read| {
            if message.len() > LONG && read.len() < KEPT {
                read.insert(message.to_owned(), Arc::clone(&all));
            }
        });
        all
    })
}

pub(crate) fn parse(text: &str) -> Statement {
    KNOWN.iter().find_map(|recognise| recognise(text)).unwrap_or_else(|| Statement::Unknown(text.to_owned()))
}

fn transactions(text: &str) -> Option<Statement> {
    Some(match text {
        "COMMIT" | "END" => Statement::Commit,
        "ROLLBACK" | "ABORT" => Statement::Rollback,
        "ROLLBACK AND CHAIN" => Statement::RollbackAndChain,
        _ if text.starts_with("BEGIN") || text.starts_with("START TRANSACTION") => {
            let read_only = text.contains("READ ONLY").then_some(true);
            let read_only = read_only.or_else(|| text.contains("READ WRITE").then_some(false));
            Statement::Begin { read_only, tag: if text.starts_with("BEGIN") { "BEGIN" } else { "START TRANSACTION" } }
        }
        _ if text.starts_with("RELEASE ") => Statement::Release,
        _ => {
            let savepoint = text.strip_prefix("SAVEPOINT ").map(|name| Statement::Savepoint(name.to_owned()));
            let back = || text.strip_prefix("ROLLBACK TO SAVEPOINT ");
            return savepoint.or_else(|| back().map(|name| Statement::RollbackToSavepoint(name.to_owned())));
        }
    })
}

fn settings(text: &str) -> Option<Statement> {
    if let Some(name) = text.strip_prefix("SHOW ") {
        return Some(Statement::Show(name.to_owned()));
    }
    let rest = text.strip_prefix("SET ")?;
    if rest.starts_with("TRANSACTION ") {
        return Some(Statement::Set { name: "transaction".to_owned(), value: String::new(), local: true });
    }
    let (local, rest) = rest.strip_prefix("LOCAL ").map_or((false, rest), |rest| (true, rest));
    if rest == "ROLE NONE" {
        return Some(Statement::Set { name: "role".to_owned(), value: "none".to_owned(), local });
    }
    let (name, value) = rest.split_once('=')?;
    let value = value.trim().trim_matches('\'').to_owned();
    Some(Statement::Set { name: name.trim().to_owned(), value, local })
}

fn prepared(text: &str) -> Option<Statement> {
    if let Some(rest) = text.strip_prefix("PREPARE ") {
        let (name, rest) = rest.split_once(' ')?;
        let body = rest.strip_prefix("AS ").or_else(|| Some(rest.split_once(" AS ")?.1))?;
        return Some(Statement::Prepare { name: name.to_owned(), body: Box::new(parse(body)) });
    }
    if let Some(rest) = text.strip_prefix("EXECUTE ") {
        let (name, argument) = rest.split_once(' ').unwrap_or((rest, ""));
        let argument = argument.trim_matches(['(', ')']).trim_matches('\'').to_owned();
        return Some(Statement::Execute { name: name.to_owned(), argument });
    }
    text.starts_with("DEALLOCATE").then_some(Statement::Deallocate)
}

fn rows(text: &str) -> Option<Statement> {
    let values = text.strip_prefix("INSERT INTO payments VALUES (")?.strip_suffix(')')?;
    if values == "$1, $2" {
        return Some(Statement::Insert(None));
    }
    let (call, attempt) = values.split_once(", ")?;
    Some(Statement::Insert(Some([call.parse().ok()?, attempt.parse().ok()?])))
}

fn waits(text: &str) -> Option<Statement> {
    if let Some(seconds) = between(text, "SELECT pg_sleep(", ")") {
        return Some(Statement::Sleep(Duration::try_from_secs_f64(seconds.parse().ok()?).ok()?));
    }
    if text.starts_with("SELECT WHERE CASE WHEN pg_catalog.current_setting('transaction_timeout', true)") {
        return Some(Statement::Unlimited);
    }
    let steps = between(text, "SELECT FROM generate_series(1, ", ")")?.parse().ok()?;
    let step = between(text, "pg_sleep(", ")")?.parse().ok()?;
    Some(Statement::PromotionWait { step: Duration::try_from_secs_f64(step).ok()?, steps })
}

fn marks(text: &str) -> Option<Statement> {
    let direct = text.starts_with("SELECT pg_catalog.pg_current_xact_id(), ");
    if !direct && !text.starts_with("SELECT CASE WHEN writes THEN pg_catalog.pg_current_xact_id() END") {
        return None;
    }
    let nonce = between(text, "pg_logical_emit_message(true, 'failover', ", ")")?;
    let nonce = (nonce != "$1").then(|| nonce.trim_matches('\'').to_owned());
    Some(Statement::Mark { nonce, direct })
}

fn insists(text: &str) -> Option<Statement> {
    let asked = between(text, "SELECT WHERE (1 OPERATOR(pg_catalog./) coalesce(", ", false)")?;
    let (function, expected) = asked.split_once(" OPERATOR(pg_catalog.=) ")?;
    let expected = (expected != "$1").then(|| expected.trim_matches('\'').to_owned());
    Some(Statement::Insist { function: function.trim_start_matches("pg_catalog.").to_owned(), expected })
}

fn histories(text: &str) -> Option<Statement> {
    let arguments = between(text, "SELECT seen, history FROM failover.wal_history('", "'::pg_catalog.text)")?;
    let (position, nonce) = arguments.split_once("'::pg_catalog.pg_lsn, '")?;
    let (high, low) = position.split_once('/')?;
    let half = |digits| u64::from_str_radix(digits, 16).ok();
    Some(Statement::History { position: half(high)? << 32 | half(low)?, nonce: nonce.to_owned() })
}

fn files(text: &str) -> Option<Statement> {
    if !text.starts_with("SELECT count(*) > 0 AND") {
        return None;
    }
    let digits = between(text, "name ~ '^", "[")?;
    Some(Statement::Files { timeline: u32::from_str_radix(digits, 16).ok()? })
}

fn signatures(text: &str) -> Option<Statement> {
    let values = between(text, "FROM (VALUES ", ") AS signed")?;
    let entry = |entry: &str| {
        let (id, status) = entry.trim_matches(['(', ')', '\'']).split_once("'::xid8, '")?;
        Some((id.parse().ok()?, status == "committed"))
    };
    values.split("), (").map(entry).collect::<Option<_>>().map(Statement::Signed)
}

fn sessions(text: &str) -> Option<Statement> {
    let pid = || between(text, "pid = ", " ")?.parse().ok();
    if text.starts_with("SELECT CASE WHEN") && text.contains("THEN pg_terminate_backend(pid) END") {
        return Some(Statement::TerminateInDoubt { pid: pid()?, whose: whose(text)? });
    }
    if text.starts_with("SELECT pg_terminate_backend(pid)") && text.contains("xact_start") {
        return Some(Statement::TerminateUnmarked { pid: pid()?, whose: whose(text)? });
    }
    if text.starts_with("SELECT pg_terminate_backend(pid)") {
        return Some(Statement::Terminate { pid: pid()?, xid: between(text, "backend_xid = '", "'")?.parse().ok()? });
    }
    text.starts_with("SELECT CASE WHEN EXISTS (SELECT FROM pg_prepared_xacts").then_some(())?;
    Some(Statement::Ends { pid: pid()?, xid: between(text, "transaction = '", "'")?.parse().ok()? })
}

fn whose(text: &str) -> Option<Whose> {
    if let Some(xid) = between(text, "backend_xid = '", "'") {
        return Some(Whose::Marked(xid.parse().ok()?));
    }
    let backend_start = between(text, "round(extract(epoch FROM backend_start)::numeric, 6) = ", " ")?.to_owned();
    let open_for = between(text, "make_interval(secs => ", " / 1000000.0)")?.parse().ok()?;
    Some(Whose::Unmarked { backend_start, open_for: Duration::from_micros(open_for) })
}

fn raises(text: &str) -> Option<Statement> {
    let (at_commit, code) = match between(text, "SELECT raise('", "')") {
        Some(code) => (false, code),
        None => (true, between(text, "SELECT raise_at_commit('", "')")?),
    };
    Some(Statement::Raise { which: RAISED.iter().position(|raised| raised.code == code)?, at_commit })
}

fn ledger(text: &str) -> Option<Statement> {
    if text.starts_with("INSERT INTO \"failover\".\"ledger\" (until)") {
        return Some(Statement::Enter { direct: text.contains("RETURNING id, pg_catalog.pg_current_xact_id()") });
    }
    if text.starts_with("INSERT INTO \"failover\".\"ledger\" AS entry") {
        return Some(Statement::Fence(id_of(between(text, "VALUES ('", "'")?)?));
    }
    if text.starts_with("SELECT EXISTS (SELECT FROM \"failover\".\"ledger\"") {
        return Some(Statement::HasEntry(id_of(between(text, "OPERATOR(pg_catalog.=) '", "'")?)?));
    }
    text.starts_with("DELETE FROM \"failover\".\"ledger\"").then_some(Statement::Prune)
}

thread_local! {
    /// The long messages that were read before.
    static READ: RefCell<HashMap<String, Arc<[Statement]>>> = RefCell::default();
}

fn columns(text: &str) -> Option<Statement> {
    let list = text.strip_prefix("SELECT ")?;
    let list = list.strip_suffix(" FROM pg_control_system()").unwrap_or(list);
    let column = |expression: &str| Column::new(plain(expression));
    Some(Statement::Columns(split_columns(list).into_iter().map(column).collect()))
}

/// Splits a list at the commas outside of brackets and strings.
pub(crate) fn split_columns(list: &str) -> Vec<&str> {
    let (mut depth, mut quoted, mut from, mut found) = (0_i32, false, 0, Vec::new());
    for (at, letter) in list.char_indices() {
        match letter {
            '\'' => quoted = !quoted,
            '(' if !quoted => depth += 1,
            ')' if !quoted => depth -= 1,
            ',' if !quoted && depth == 0 => {
                found.push(list.get(from..at).unwrap_or_default());
                from = at + 1;
            }
            _ => {}
        }
    }
    found.push(list.get(from..).unwrap_or_default());
    found
}

/// The expression without the schema of its names, and with single spaces.
fn plain(expression: &str) -> String {
    let words: Vec<&str> = expression.split_ascii_whitespace().collect();
    words.join(" ").replace("pg_catalog.", "")
}

/// What is between these two, at their first occurrence.
pub(crate) fn between<'a>(text: &'a str, before: &str, after: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(before)?;
    rest.split_once(after).map(|(found, _)| found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_end_outside_of_strings() {
        let found: Vec<_> = statements("BEGIN; SELECT ';', 1 ;; COMMIT").collect();
        assert_eq!(found, ["BEGIN", "SELECT ';', 1", "COMMIT"]);
    }

    #[test]
    fn columns_end_outside_of_brackets_and_strings() {
        let Statement::Columns(columns) = parse("SELECT a(1, 2),  'x,y', pg_backend_pid()") else { panic!("columns") };
        let found: Vec<_> = columns.iter().map(|column| (&*column.expression, column.row.is_some())).collect();
        assert_eq!(found, [("a(1, 2)", false), ("'x,y'", false), ("pg_backend_pid()", true)]);
    }

    #[test]
    fn what_is_recognised_keeps_its_values() {
        for (text, expected) in [
            (
                "SET LOCAL synchronous_commit = off",
                Statement::Set { name: "synchronous_commit".into(), value: "off".into(), local: true },
            ),
            ("EXECUTE it ('12')", Statement::Execute { name: "it".into(), argument: "12".into() }),
            ("INSERT INTO payments VALUES (7, 1)", Statement::Insert(Some([7, 1]))),
            (
                "SELECT seen, history FROM failover.wal_history('1/A0'::pg_catalog.pg_lsn, 'ab'::pg_catalog.text)",
                Statement::History { position: 0x1_0000_00A0, nonce: "ab".into() },
            ),
            ("VACUUM", Statement::Unknown("VACUUM".into())),
        ] {
            assert_eq!(parse(text), expected, "{text}");
        }
    }
}
