//! Evaluates the expressions that the pool asks for, each by a row of a table.

#![allow(clippy::unnecessary_wraps, reason = "each row of the table has the same type")]

use crate::log::What;
use crate::node::{Node, backend_start, epoch, lsn};
use crate::session::Session;
use crate::setup::Shown;
use crate::sql::{Column, SqlError, between};
use crate::world::SYSTEM_IDENTIFIER;

type Value = Result<Option<String>, SqlError>;
type Is = fn(&str) -> bool;
type Evaluate = fn(&mut Session, &str) -> Value;

/// How to recognise an expression, and its value. The first row that matches counts.
const EXPRESSIONS: [(Is, Evaluate); 22] = [
    (|it| it == "NULL", |_, _| Ok(None)),
    (|it| it == "1", |_, _| found("1")),
    (|it| it.contains("pg_stat_get_activity"), |session, _| process(session)),
    (|it| it.starts_with("'0/0'"), |_, _| found("0/0")),
    (|it| it.contains("redo_lsn = checkpoint_lsn"), |session, _| session.of_node(|node| Ok(node.stopped().map(lsn)))),
    (|it| it.contains("pg_xact_status"), |session, it| status(session, it)),
    (|it| it == "pg_is_in_recovery()", |session, _| session.of_node(|node| yes(node.recovery))),
    (|it| it.contains("pg_stat_bgwriter"), |session, _| session.of_node(|node| found(epoch(node.stats_reset)))),
    (
        |it| it.starts_with("current_setting("),
        |session, it| Ok(session.setting(between(it, "('", "'").unwrap_or_default())),
    ),
    (
        |it| it.contains("pg_db_role_setting"),
        |session, _| session.of_node(|node| Ok(node.fenced.then(|| "on".to_owned()))),
    ),
    (|it| it.contains("system_identifier"), |_, _| found(SYSTEM_IDENTIFIER)),
    (|it| it.contains("pg_postmaster_start_time"), |session, _| session.of_node(|node| found(epoch(node.started_at)))),
    (
        |it| it.contains("timeline_id FROM pg_control_checkpoint()"),
        |session, _| session.of_node(|node| found(node.checkpoint.timeline.to_string())),
    ),
    (|it| it.contains("pg_last_wal_receive_lsn()"), |session, _| session.of_node(|node| Ok(node.received().map(lsn)))),
    (|it| it.contains("pg_ls_waldir()"), |session, _| evidence(session)),
    (|it| it.starts_with("pg_walfile_name("), |session, _| session.of_node(file_name)),
    (|it| it == "pg_current_wal_insert_lsn()", |session, _| session.of_node(written)),
    (|it| it == "pg_last_wal_replay_lsn()", |session, _| session.of_node(replayed)),
    (|it| it == "pg_current_xact_id()", |session, _| session.xid().map(|xid| Some(xid.to_string()))),
    (|it| it.starts_with("pg_logical_emit_message(true"), |session, _| emit(session)),
    (|it| it == "pg_backend_pid()", |session, _| found(session.pid.to_string())),
    (|it| it.contains("statement_timestamp()"), |session, _| yes(session.begun_here())),
];

/// The row of the table that knows an expression.
pub(crate) fn row_of(expression: &str) -> Option<usize> {
    EXPRESSIONS.iter().position(|(is, _)| is(expression))
}

/// The value of a column. The model knows all that the pool sends.
pub(crate) fn value_of(session: &mut Session, column: &Column) -> Value {
    if let Some(cases) = &column.by_recovery {
        let recovery = session.of_node(|node| node.recovery);
        return value_of(session, &cases[usize::from(!recovery)]);
    }
    match column.row.and_then(|row| EXPRESSIONS.get(row)) {
        Some((_, evaluate)) => evaluate(session, &column.expression),
        None => Err(session.unknown(&column.expression)),
    }
}

fn found(value: impl Into<String>) -> Value {
    Ok(Some(value.into()))
}

fn yes(value: bool) -> Value {
    found(if value { "t" } else { "f" })
}

fn process(session: &Session) -> Value {
    found(format!("{} {}", session.pid, backend_start(session.pid)))
}

fn needs_primary(node: &Node) -> Result<(), SqlError> {
    if node.recovery {
        return Err(SqlError::new("55000", "recovery is in progress"));
    }
    Ok(())
}

fn file_name(node: &mut Node) -> Value {
    needs_primary(node)?;
    found(format!("{:08X}00000000{:08X}", node.timeline, node.log.end() >> 24))
}

fn written(node: &mut Node) -> Value {
    needs_primary(node)?;
    found(lsn(node.log.end()))
}

fn replayed(node: &mut Node) -> Value {
    Ok(if node.recovery { Some(lsn(node.log.end())) } else { node.replayed.map(lsn) })
}

fn evidence(session: &mut Session) -> Value {
    found(match session.sim.lock().setup.shown {
        Shown::Function => "function",
        Shown::Files => "files",
        Shown::Nothing => "none",
    })
}

/// `pg_xact_status(…)`, alone or guarded by a comparison with the session's own id.
fn status(session: &mut Session, expression: &str) -> Value {
    let Some(xid) = between(expression, "pg_xact_status('", "'").and_then(|xid| xid.parse::<u64>().ok()) else {
        return Err(session.unknown(expression));
    };
    if expression.contains("pg_current_xact_id()") && xid >= session.xid()? {
        return Ok(None);
    }
    session.of_node(|node| {
        if xid >= node.next_xid {
            return Err(SqlError::new("22023", format!("transaction ID {xid} is in the future")));
        }
        let forgotten = expression.contains("'forgotten'").then_some("forgotten");
        Ok(node.status(xid).or(forgotten).map(str::to_owned))
    })
}

fn emit(session: &mut Session) -> Value {
    if session.of_node(|node| node.recovery) {
        // No check of the function's own comes before the one that assigns the id.
        return Err(SqlError::new("XX000", "cannot assign TransactionIds during recovery").by("AssignTransactionId"));
    }
    let (xid, on) = (session.xid()?, session.node);
    let mut world = session.sim.lock();
    world.append(on, What::Message { xid });
    found(lsn(world.nodes[on].log.end()))
}
