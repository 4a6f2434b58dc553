//! What servers and proxies report. Each error is made by the driver from what a scripted server sent.

mod chain;
mod driver;
mod script;

use super::*;
use script::{Report, refusal, report};

pub(crate) use script::{refused_statement, reported};

#[test]
fn each_row_of_the_table() {
    use Verdict::*;
    #[rustfmt::skip]
    let rows = [
        // severity, code, message, routine, verdict, and whether it refuses a COMMIT
        ("FATAL", "57P01", "terminating connection due to administrator command",
         "ProcessInterrupts", ConnectionLost, false),
        ("FATAL", "57P01", "terminating connection due to unexpected postmaster exit",
         "secure_read", ConnectionLost, false),
        ("ERROR", "57P01", "terminating connection due to administrator command",
         "ProcessInterrupts", ConnectionLost, true),
        ("FATAL", "57P02", "terminating connection because of crash of another server process",
         "quickdie", ConnectionLost, false),
        ("FATAL", "57P05", "terminating connection due to idle-session timeout",
         "ProcessInterrupts", ConnectionLost, false),
        ("PANIC", "XX000", "could not write to file", "XLogWrite", ConnectionLost, false),
        ("PANIC", "40001", "cannot abort transaction 7, it was already committed",
         "RecordTransactionAbort", ConnectionLost, false),
        ("FATAL", "08006", "connection to client lost", "ProcessInterrupts", ConnectionLost, false),
        ("FATAL", "08P01", "invalid frontend message type 7", "SocketBackend", ConnectionLost, false),
        ("FATAL", "40001", "terminating connection due to conflict with recovery",
         "ProcessRecoveryConflictInterrupt", ConnectionLost, false),
        ("FATAL", "57P03", "the database system is starting up", "ProcessStartupPacket", NotNow, false),
        ("ERROR", "57P01", "terminating connection due to administrator command",
         "pgfdw_report_error", Application, true),
        ("ERROR", "57P03", "the database system is shutting down", "connect_pg_server", Application, true),
        ("ERROR", "57P01", "try again", "exec_stmt_raise", Application, true),
        ("ERROR", "57P02", "try again", "exec_stmt_raise", Application, true),
        ("ERROR", "57P03", "try again", "exec_stmt_raise", Application, true),
        ("ERROR", "57P05", "try again", "exec_stmt_raise", Application, true),
        ("ERROR", "53300", "try again", "exec_stmt_raise", Application, true),
        ("ERROR", "08007", "try again", "exec_stmt_raise", Application, true),
        ("ERROR", "40003", "try again", "exec_stmt_raise", Application, true),
        // The documented ways to ask for another run.
        ("ERROR", "40001", "try again", "exec_stmt_raise", Conflict, true),
        ("ERROR", "40P01", "try again", "exec_stmt_raise", Conflict, true),
        ("ERROR", "08007", "the outcome of the remote transaction is unknown",
         "pgfdw_report_error", OutcomeUnknown, false),
        ("FATAL", "53300", "sorry, too many clients already", "InitProcess", Full, false),
        ("ERROR", "25006", "cannot execute INSERT in a read-only transaction",
         "PreventCommandIfReadOnly", ReadOnly, true),
        ("ERROR", "0A000", "cannot set transaction read-write mode during recovery",
         "call_bool_check_hook", ReadOnly, true),
        ("ERROR", "0A000", "cannot use serializable mode in a hot standby", "call_enum_check_hook", ReadOnly, true),
        ("ERROR", "0A000", "cannot use serializable mode in a hot standby",
         "GetSerializableTransactionSnapshot", ReadOnly, true),
        ("ERROR", "0A000", "kann serialisierbaren Modus nicht in einem Hot Standby verwenden",
         "call_enum_check_hook", ReadOnly, true),
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
        ("ERROR", "08001", "could not connect to server \"other\"", "connect_pg_server", Application, true),
        ("ERROR", "08006", "server closed the connection unexpectedly", "pgfdw_report_error", Application, true),
        ("ERROR", "08P01", "bind message supplies 1 parameters, but prepared statement requires 2",
         "exec_bind_message", Application, true),
        ("ERROR", "23505", "duplicate key value violates unique constraint", "_bt_check_unique", Application, true),
        ("ERROR", "42601", "syntax error at or near \"SELEC\"", "scanner_yyerror", Application, true),
        ("ERROR", "57014", "canceling statement due to statement timeout", "ProcessInterrupts", Application, true),
        ("ERROR", "53100", "could not extend file: No space left on device", "mdextend", Application, true),
        ("FATAL", "25P03", "terminating connection due to idle-in-transaction timeout",
         "ProcessInterrupts", Application, false),
        ("FATAL", "25P04", "terminating connection due to transaction timeout",
         "ProcessInterrupts", Application, false),
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
        // PgBouncer's reports about troubles of its own
        ("FATAL", "08P01", "server conn crashed?", ConnectionLost, false),
        ("ERROR", "57P01", "terminating connection due to administrator command", ConnectionLost, false),
        ("ERROR", "57P03", "the database system is starting up", NotNow, false),
        ("ERROR", "53300", "sorry, too many clients already", Full, false),
        ("ERROR", "08007", "transaction resolution unknown", OutcomeUnknown, false),
        ("FATAL", "08P01", "query_wait_timeout", ConnectionLost, false),
        ("FATAL", "08P01", "client_login_timeout (server down)", ConnectionLost, false),
        ("FATAL", "08P01", "transaction blocks not allowed in statement pooling mode", Refused, false),
        ("ERROR", "08P01", "prepared statement did not exist", Stale, false),
        ("ERROR", "0A000", "cached plan must not change result type", Stale, false),
        ("ERROR", "08006", "server connection lost", ConnectionLost, false),
        // pgcat
        ("FATAL", "58000", "could not get connection from the pool", ConnectionLost, false),
        ("ERROR", "58000", "server is down", Application, false),
        // A proxy passes these on from the server. They never come after a commit that may have been carried out.
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

/// Prints its seed on failure. Set SEED in the environment to repeat a run.
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
    // No code at all, a code that is too short, and two that are not ASCII.
    for code in ["", "0", "é0", "日本"] {
        let row = Report::server("ERROR", code, "odd", "somewhere");
        assert_eq!(classify(&report(row)), Verdict::Application, "{row:?}");
    }
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
        assert_eq!((cut_off(&error), lacks_function(&error)), (code == "57014", code == "42883"), "{severity} {code}");
    }
    let ended =
        report(Report { severity: "FATAL", plain: Some("FATAL"), code: "25P04", message: "no", routine: Some("f") });
    assert!(cut_off(&ended), "the whole session, by transaction_timeout");
}
