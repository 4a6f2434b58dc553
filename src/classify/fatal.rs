//! Judges the report with which a server ends a session: whether the same work would end another session, too, which
//! setting is the reason, and what the user can do.

use tokio_postgres::error::{DbError, SqlState};

use super::{Level, Verdict, class, of_report};

/// Whether running the work again on a new session would end in the same way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Recurs {
    /// The session would end again: the work itself, or a setting that limits it, is the reason.
    Always,
    /// Unknown. If the same report ends the next run on the same server as well, the work counts as the reason
    /// (`Bounds` in `transaction/verdict.rs`).
    Perhaps,
    /// It would not: a failover, a restart or an administrator ended the session.
    No,
}

/// Returns whether the report ends its session.
pub(crate) fn ends_session(db: &DbError) -> bool {
    Level::of(db) == Level::Ends
}

/// Returns whether the notice is a warning after which the session ends without another report. Servers send it when
/// another backend has crashed, before an immediate shutdown (`quickdie`), and if they end a session that waits for a
/// synchronous standby. A function of the user's may raise a warning with the same code, but not with this routine.
pub(crate) fn announces_end(notice: &DbError) -> bool {
    matches!(*notice.code(), SqlState::ADMIN_SHUTDOWN | SqlState::CRASH_SHUTDOWN)
        && matches!(notice.routine(), Some("quickdie" | "SyncRepWaitForLSN"))
}

/// The verdict on a transaction whose session ended with this report. The report may have come while the session was
/// idle, or as the answer to a statement.
pub(crate) fn verdict_of_end(db: &DbError) -> Verdict {
    match (recurs(db), of_report(db, Level::Ends)) {
        (_, refused @ Verdict::Refused) => refused,
        (Recurs::Always, _) => Verdict::Application,
        // These verdicts are about a statement. Here the whole session is gone, for instance by a conflict with the
        // recovery of a standby, so the work needs another session.
        (_, Verdict::Application | Verdict::Aborted | Verdict::Conflict) => Verdict::ConnectionLost,
        (_, verdict) => verdict,
    }
}

/// Returns whether the same work would be ended again.
pub(crate) fn recurs(db: &DbError) -> Recurs {
    if pooler_limit(db).is_some() {
        return Recurs::Always;
    }
    match db.code().code() {
        "25P03" | "25P04" | "57P05" | "57P04" => Recurs::Always,
        "57P01" | "57P02" | "57P03" | "53300" => Recurs::No,
        // Only PostgreSQL names a routine, and no pooler does. So the server itself could not read what this session
        // sent, and the work may be the reason.
        "08P01" if db.routine().is_some() => Recurs::Perhaps,
        _ => match class(db) {
            "08" | "40" => Recurs::No,
            // The work asked for something that is wrong or not allowed.
            "0A" | "22" | "25" | "26" | "28" | "34" | "3D" | "3F" | "42" | "44" | "54" | "55" | "F0" | "P0" => {
                Recurs::Always
            }
            _ => Recurs::Perhaps,
        },
    }
}

/// Returns the setting that ended the session, if it was a setting, and what to do about it.
pub(crate) fn advice(db: &DbError) -> (Option<&'static str>, &'static str) {
    if let Some(limit) = pooler_limit(db) {
        return limit;
    }
    match db.code().code() {
        "25P03" => (
            Some("idle_in_transaction_session_timeout"),
            "the transaction was idle between two statements for longer than it allows: do what takes long before or \
             after the transaction, or raise it (SET LOCAL, ALTER ROLE … SET)",
        ),
        "25P04" => (
            Some("transaction_timeout"),
            "the transaction took longer than it allows: make it shorter, split it, or raise the setting (SET LOCAL, \
             ALTER ROLE … SET)",
        ),
        "57P05" => (
            Some("idle_session_timeout"),
            "the session was idle outside of a transaction for longer than it allows: use the session sooner, raise \
             the setting, or set the pool's idle_timeout below it",
        ),
        "57P04" => (None, "the database was dropped: check where the connection string leads"),
        "57P01" => {
            (None, "an administrator or a shutdown ended the session: pg_terminate_backend, a restart, a failover")
        }
        "57P02" => (None, "another backend crashed, and the server restarts all: look into the server's log"),
        "57P03" => (None, "the server takes no work at the moment"),
        "53300" => (Some("max_connections"), "use fewer connections, or raise it"),
        "53200" => (None, "the server is out of memory: lower work_mem or the number of sessions"),
        _ => match class(db) {
            "28" | "42" => (None, "check the role, its rights and pg_hba.conf"),
            "3D" => (None, "check that the database exists"),
            "08" => (None, "the server, or a proxy, lost the connection: look into its log"),
            "40" => (None, "a standby cancelled it in favour of its recovery"),
            _ => (None, "look for it in the server's log"),
        },
    }
}

/// Returns the limit of `PgBouncer` that ended a session, and what to do about it. `PgBouncer` reports one SQLSTATE for
/// everything that ends a session, so the limit is known only by its name in the message. Some limits are written with
/// spaces there. A report that names a routine is PostgreSQL's own.
fn pooler_limit(db: &DbError) -> Option<(Option<&'static str>, &'static str)> {
    if db.routine().is_some() {
        return None;
    }
    let named = |name, advice| Some((Some(name), advice));
    let text = db.message().replace(' ', "_");
    match text.as_str() {
        "query_timeout" => {
            named("query_timeout", "the pooler's limit for one statement: make it faster, or raise the limit")
        }
        "idle_transaction_timeout" => named(
            "idle_transaction_timeout",
            "the pooler's limit for pauses between two statements of a transaction: do what takes long before or after \
             the transaction, or raise the limit",
        ),
        "transaction_timeout" => {
            named("transaction_timeout", "the pooler's limit for one transaction: make it shorter, or raise the limit")
        }
        "client_idle_timeout" => {
            named("client_idle_timeout", "the pooler's limit for idle clients: set the pool's idle_timeout below it")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::reported;
    use super::*;

    #[test]
    fn what_would_come_again() {
        #[rustfmt::skip]
        let rows = [
            // code, message, routine, would it come again, the verdict, what the advice names
            ("25P03", "terminating connection due to idle-in-transaction timeout",
             Some("ProcessInterrupts"), Recurs::Always, Verdict::Application, "idle_in_transaction_session_timeout"),
            ("25P04", "terminating connection due to transaction timeout",
             Some("ProcessInterrupts"), Recurs::Always, Verdict::Application, "transaction_timeout"),
            ("57P05", "terminating connection due to idle-session timeout",
             Some("ProcessInterrupts"), Recurs::Always, Verdict::Application, "idle_session_timeout"),
            ("57P04", "terminating connection due to conflict with recovery",
             Some("ProcessInterrupts"), Recurs::Always, Verdict::Refused, "database"),
            ("28000", "role does not exist", Some("InitializeSessionUserId"), Recurs::Always, Verdict::Refused, "role"),
            ("28P01", "password authentication failed", Some("auth_failed"), Recurs::Always, Verdict::Refused, "role"),
            ("3D000", "database \"app\" has disappeared",
             Some("InitPostgres"), Recurs::Always, Verdict::Refused, "database"),
            ("42501", "permission denied",
             Some("InitializeSessionUserId"), Recurs::Always, Verdict::Application, "rights"),
            ("54000", "too much of it", Some("somewhere"), Recurs::Always, Verdict::Application, "log"),
            ("57P01", "terminating connection due to administrator command",
             Some("ProcessInterrupts"), Recurs::No, Verdict::ConnectionLost, "administrator"),
            ("57P02", "terminating connection because of crash of another server process",
             Some("quickdie"), Recurs::No, Verdict::ConnectionLost, "crashed"),
            ("57P03", "the database system is shutting down",
             Some("ProcessStartupPacket"), Recurs::No, Verdict::NotNow, "server"),
            ("53300", "too many connections", Some("InitProcess"), Recurs::No, Verdict::Full, "max_connections"),
            ("08006", "connection to client lost",
             Some("ProcessInterrupts"), Recurs::No, Verdict::ConnectionLost, "proxy"),
            ("40001", "terminating connection due to conflict with recovery",
             Some("ProcessInterrupts"), Recurs::No, Verdict::ConnectionLost, "standby"),
            ("40P01", "terminating connection due to conflict with recovery",
             Some("ProcessInterrupts"), Recurs::No, Verdict::ConnectionLost, "standby"),
            ("53200", "out of memory", Some("AllocSetAlloc"), Recurs::Perhaps, Verdict::ConnectionLost, "memory"),
            ("XX000", "something", Some("somewhere"), Recurs::Perhaps, Verdict::ConnectionLost, "log"),
            ("08P01", "terminating connection because protocol synchronization was lost",
             Some("ProcessInterrupts"), Recurs::Perhaps, Verdict::ConnectionLost, "log"),
            // PgBouncer
            ("08P01", "query_timeout", None, Recurs::Always, Verdict::Application, "query_timeout"),
            ("08P01", "query timeout", None, Recurs::Always, Verdict::Application, "query_timeout"),
            ("08P01", "idle transaction timeout",
             None, Recurs::Always, Verdict::Application, "idle_transaction_timeout"),
            ("08P01", "transaction timeout", None, Recurs::Always, Verdict::Application, "transaction_timeout"),
            ("08P01", "client_idle_timeout", None, Recurs::Always, Verdict::Application, "client_idle_timeout"),
            ("08P01", "server conn crashed?", None, Recurs::No, Verdict::ConnectionLost, "proxy"),
        ];
        for (code, message, routine, again, verdict, word) in rows {
            let report = reported("FATAL", code, message, routine);
            assert!(ends_session(&report), "{report:?}");
            assert_eq!(recurs(&report), again, "{report:?}");
            assert_eq!(verdict_of_end(&report), verdict, "{report:?}");
            let (setting, what_to_do) = advice(&report);
            let text = format!("{} {what_to_do}", setting.unwrap_or_default());
            assert!(text.contains(word), "{report:?}: {text}");
        }
    }

    #[test]
    fn a_crash_is_announced_by_a_warning() {
        let warning = reported("WARNING", "57P02", "terminating connection because of crash", Some("quickdie"));
        assert!(announces_end(&warning) && !ends_session(&warning));
        assert_eq!(verdict_of_end(&warning), Verdict::ConnectionLost);
        for (code, routine) in [("57P01", "quickdie"), ("57P01", "SyncRepWaitForLSN")] {
            assert!(announces_end(&reported("WARNING", code, "terminating connection", Some(routine))), "{routine}");
        }
        let (raised, other) = (Some("exec_stmt_raise"), Some("SomeRoutine"));
        for (severity, code, routine) in [
            ("NOTICE", "57P01", raised),
            ("WARNING", "57P01", raised),
            ("WARNING", "57P02", raised),
            ("WARNING", "57P01", None),
            ("WARNING", "25P01", other),
            ("WARNING", "01000", Some("SyncRepWaitForLSN")),
        ] {
            assert!(!announces_end(&reported(severity, code, "no end", routine)), "{severity} {code} {routine:?}");
        }
    }
}
