use super::*;

const PRIMARY: [Option<&str>; 12] = [
    Some("f"),
    Some("off"),
    Some("off"),
    None,
    Some("7301827364512345678"),
    Some("1764000000.123456"),
    Some("0000000200000000000000A1"),
    Some("0/A1000060"),
    Some("0/A0000028"),
    Some("1763000000.123456"),
    Some("1"),
    Some("files"),
];

fn with(index: usize, value: Option<&'static str>) -> Result<ServerReport, BadReport> {
    let mut row = PRIMARY;
    row[index] = value;
    ServerReport::parse(&row)
}

#[test]
fn a_primary_is_read_whole() {
    let report = ServerReport::parse(&PRIMARY).unwrap();
    assert_eq!(report.role(), Role::Primary);
    assert_eq!(report.timeline, Some(2));
    assert_eq!(report.system_identifier, Some(7_301_827_364_512_345_678));
    assert_eq!(report.wal.map(|lsn| lsn.to_string()), Some("0/A1000060".to_owned()));
    assert!(!report.fence_pending);
    assert_eq!((report.checkpointed, report.evidence), (Some(1), Some(Evidence::Files)));
}

#[test]
fn times_are_read_to_the_microsecond() {
    for (text, read) in [
        ("1764000000.123456", 1_764_000_000_123_456),
        // The reset of the statistics is not rounded, so trailing zeros may be missing.
        ("1764000000.12", 1_764_000_000_120_000),
        ("1764000000", 1_764_000_000_000_000),
        ("-1.500000", -1_500_000),
    ] {
        assert_eq!(microseconds(text, "a time").unwrap(), read);
    }
    for bad in ["", "-", ".5", "1.", "--1", "+1", "1.1234567", "1e9", "infinity", "9223372036854.775808", "1.-5", "1,5"]
    {
        assert!(microseconds(bad, "a time").is_err(), "{bad}");
    }
}

#[test]
fn the_start_time_is_a_point_in_time() {
    let started_at = |text| with(5, text).unwrap().started_at();
    assert_eq!(
        started_at(Some("1764000000.5")),
        Some(SystemTime::UNIX_EPOCH + Duration::from_millis(1_764_000_000_500))
    );
    assert_eq!(started_at(Some("-1.5")), Some(SystemTime::UNIX_EPOCH - Duration::from_millis(1500)));
    assert_eq!(started_at(None), None);
    // No clock of a server causes a panic.
    for (text, micros) in [("9223372036854.775807", i64::MAX), ("-9223372036854.775807", -i64::MAX)] {
        let report = with(5, Some(text)).unwrap();
        assert_eq!(report.started_at, Some(micros));
        let _ = report.started_at();
    }
}

#[test]
fn a_fence_is_read_however_it_was_written() {
    for on in ["on", "On", "true", "TRUE", "t", "tru", "yes", "y", "1"] {
        assert!(with(3, Some(on)).unwrap().fence_pending, "{on}");
    }
    for off in ["off", "of", "false", "f", "no", "n", "0"] {
        assert!(!with(3, Some(off)).unwrap().fence_pending, "{off}");
    }
    for bad in ["", "o", "2", "10", "trues", "onn", " on"] {
        assert!(with(3, Some(bad)).is_err(), "{bad}");
    }
}

#[test]
fn a_new_session_is_asked_who_it_leads_to_and_no_more() {
    let sql = Question::Identity.sql(Refused::default());
    assert!(sql.contains(STARTED_AT) && sql.contains("pg_last_wal_replay_lsn()"), "{sql}");
    assert!(!sql.contains("walfile") && !sql.contains("bgwriter") && !sql.contains("pg_db_role_setting"), "{sql}");
    let again = Question::Again.sql(Refused::default());
    assert!(again.contains("pg_db_role_setting") && !again.contains(SESSION), "{again}");
}

#[test]
fn a_session_is_told_by_its_process_and_its_start() {
    let row = |told: Option<&str>| {
        let mut row = vec![None; 12];
        row.push(told.map(str::to_owned));
        ServerSession::of(&[vec![Some("off".to_owned())], row])
    };
    for (told, started_at, epoch) in [
        ("4711 1764000000.123456", 1_764_000_000_123_456, "1764000000.123456"),
        ("4711 1764000000.12", 1_764_000_000_120_000, "1764000000.120000"),
        ("4711 -1.500000", -1_500_000, "-1.500000"),
    ] {
        let session = row(Some(told)).unwrap();
        assert_eq!(session, ServerSession { pid: 4711, started_at });
        assert_eq!(session.epoch(), epoch);
    }
    for untold in [None, Some(""), Some("4711"), Some(" 1764000000.1"), Some("4711 yesterday")] {
        assert_eq!(row(untold), None, "{untold:?}");
    }
    assert_eq!(ServerSession::of(&[]), None);
    assert_eq!(ServerSession::of(&[vec![None; 12]]), None);
}

#[test]
fn roles() {
    assert_eq!(with(0, Some("t")).unwrap().role(), Role::Standby);
    assert_eq!(with(2, Some("on")).unwrap().role(), Role::Fenced);
    assert_eq!(with(1, Some("on")).unwrap().role(), Role::Promoting);
    assert!(with(3, Some("t")).unwrap().fence_pending);
}

#[test]
fn three_columns_tell_the_role_alone() {
    let report = ServerReport::parse(&PRIMARY[..3]).unwrap();
    assert_eq!(report.role(), Role::Primary);
    assert_eq!((report.system_identifier, report.timeline, report.wal), (None, None, None));
}

#[test]
fn nonsense_is_refused_not_believed() {
    for (index, value) in [
        (0, None),
        (0, Some("maybe")),
        (1, Some("")),
        (2, None),
        (3, Some("maybe")),
        (4, Some("not a number")),
        (4, Some("99999999999999999999")),
        (5, Some("yesterday")),
        (6, Some("")),
        (6, Some("0000000000000000000000A1")),
        (6, Some("00000002000000000000000A1")),
        (6, Some("zz0000020000000000000000")),
        (7, Some("0")),
        (7, Some("1FFFFFFFF/0")),
        (7, Some("000000001/0")),
        (7, Some("+1/0")),
        (7, Some("/")),
        (8, Some("0")),
        (9, Some("never")),
    ] {
        assert!(with(index, value).is_err(), "column {index}: {value:?}");
    }
    assert!(ServerReport::parse(&[]).is_err());
}

#[test]
fn a_system_identifier_with_the_highest_bit_is_shown_negative() {
    assert_eq!(with(4, Some("-1")).unwrap().system_identifier, Some(u64::MAX));
}

#[test]
fn a_bad_report_does_not_repeat_a_long_answer() {
    let text = "x".repeat(10_000);
    let error = text.parse::<Lsn>().unwrap_err().to_string();
    assert!(error.len() < 200, "{error}");
}

/// The fuzz target `lsn` found this: an answer with a line break could write a line of its own into the log.
#[test]
fn a_bad_report_stays_in_one_line() {
    let error = "0/0\n2026-01-01 INFO primary found\u{1b}[31m".parse::<Lsn>().unwrap_err().to_string();
    assert!(!error.contains(char::is_control), "{error:?}");
    assert!(error.contains(r"0/0\n2026-01-01 INFO primary found\u{1b}[31m"), "{error}");
}
