//! Tests how the answers to the mark, to the settler's question and to the question for a proof are read.

use super::*;
use crate::topology::Lsn;

fn life() -> Life {
    let server = Server { system_identifier: 1, timeline: 1, started_at: 5_000_000 };
    Life { server, replayed: None, stats_reset: Some(9), ancestor: None }
}

const NONCE: Nonce = Nonce(0xBEE);

fn row(columns: &[Option<&str>]) -> Row {
    columns.iter().map(|column| column.map(str::to_owned)).collect()
}

const MARKED: [Option<&str>; 6] = [Some("728"), Some("0/30162E0"), None, Some("42"), Some("5"), Some("t")];

#[test]
fn a_mark_is_read() {
    let MarkAnswer::By(mark, backend) = read_mark(&life(), NONCE, &row(&MARKED)).unwrap() else {
        panic!("it is a mark")
    };
    assert_eq!((mark.xid, mark.lsn.to_string(), mark.life), (728, "0/30162E0".to_owned(), life()));
    assert_eq!(backend, Backend { pid: 42, xid: 728 });
}

#[test]
fn a_mark_of_another_life_is_none() {
    for (index, other) in [(2, Some("0/1")), (4, Some("6"))] {
        let mut columns = MARKED;
        columns[index] = other;
        assert_eq!(read_mark(&life(), NONCE, &row(&columns)).unwrap(), MarkAnswer::Elsewhere, "column {index}");
    }
}

#[test]
fn a_transaction_that_cannot_write_has_none() {
    let mut columns = MARKED;
    (columns[0], columns[1]) = (None, None);
    assert_eq!(read_mark(&life(), NONCE, &row(&columns)).unwrap(), MarkAnswer::ReadOnly);
}

#[test]
fn a_transaction_that_was_open_before_has_none_of_its_own() {
    for written in [MARKED[0], None] {
        let mut columns = MARKED;
        (columns[0], columns[5]) = (written, Some("f"));
        assert_eq!(read_mark(&life(), NONCE, &row(&columns)).unwrap(), MarkAnswer::Joined);
    }
}

#[test]
fn nonsense_is_no_mark() {
    for (index, bad) in
        [(0, Some("x")), (0, Some("-1")), (1, None), (1, Some("0")), (2, Some("x")), (3, None), (4, None)]
    {
        let mut columns = MARKED;
        columns[index] = bad;
        assert!(read_mark(&life(), NONCE, &row(&columns)).is_err(), "column {index}: {bad:?}");
    }
    assert!(read_mark(&life(), NONCE, &row(&[])).is_err());
}

#[test]
fn what_a_server_says_of_an_id_is_read() {
    let said = |said: Option<&str>| status(&row(&[None, None, None, None, None, None, said]));
    assert_eq!(said(Some("committed")).unwrap(), Some(XactStatus::Committed));
    assert_eq!(said(Some("aborted")).unwrap(), Some(XactStatus::Aborted));
    assert_eq!(said(Some("in progress")).unwrap(), Some(XactStatus::InProgress));
    assert_eq!(said(Some("forgotten")).unwrap(), Some(XactStatus::Forgotten));
    assert_eq!(said(None).unwrap(), None, "it was not given out yet");
    assert!(said(Some("frozen")).is_err());
    assert!(status(&row(&[None])).is_err(), "a column is missing");
}

#[test]
fn a_nonce_is_what_the_function_takes() {
    assert_eq!(NONCE.to_string(), "00000000000000000000000000000bee");
    assert!(
        MarkStatement::Prepared.sql(MarkForm::Full, "BEGIN", NONCE).ends_with("('00000000000000000000000000000bee')")
    );
}

#[test]
fn files_prove_nothing_where_pg_rewind_keeps_some() {
    let sql = followed(26);
    assert!(sql.contains("server_version_num')::int < 170000") && sql.contains("'^0000001A["), "{sql}");
}

#[test]
fn what_a_server_shows_of_its_log_is_read() {
    let of = |evidence, columns: &[Option<&str>]| proof(evidence, &row(columns));
    assert_eq!(of(Evidence::Files, &[Some("t")]).unwrap(), Proof::Files { followed: true });
    assert_eq!(of(Evidence::Files, &[Some("f")]).unwrap(), Proof::Files { followed: false });
    for (text, sighting) in [
        ("marker", Sighting::Mark),
        ("other", Sighting::Other),
        ("not yet", Sighting::NotYet),
        ("recycled", Sighting::Recycled),
    ] {
        let ancestry: Ancestry = [(1, "0/5".parse().unwrap())].into_iter().collect();
        let said = of(Evidence::Function, &[Some(text), Some("1\t0/5\tno reason\n")]).unwrap();
        assert_eq!(said, Proof::Function { ancestry, sighting });
    }
    for bad in
        [&[None, Some("")][..], &[Some("marker"), None], &[Some("t"), Some("")], &[Some("other"), Some("1")], &[]]
    {
        assert!(of(Evidence::Function, bad).is_err(), "{bad:?}");
    }
    assert!(of(Evidence::Files, &[None]).is_err());
}

/// After more than a thousand promotions the answer is too long to be kept whole, and its newest lines are missing.
#[test]
fn a_history_that_was_cut_is_not_read() {
    let line = "1\t0/5000158\tno recovery target specified\n";
    let whole = line.repeat(1_400);
    assert!(proof(Evidence::Function, &row(&[Some("recycled"), Some(whole.as_str())])).is_ok());
    let long = line.repeat(10_000);
    for kept in 64 * 1024 - 3..=64 * 1024 {
        let cut = [Some("recycled"), Some(&long[..kept])];
        assert!(proof(Evidence::Function, &row(&cut)).is_err(), "{kept}");
        // Where the WAL is still there, nobody needs the history.
        let seen = proof(Evidence::Function, &row(&[Some("marker"), Some(&long[..kept])]));
        assert_eq!(seen.unwrap(), Proof::Function { ancestry: Ancestry::default(), sighting: Sighting::Mark });
    }
}

#[test]
fn what_a_server_says_of_itself_is_read() {
    let good = [
        Some("-1"),
        Some("1764000000.123456"),
        Some("0000000200000000000000A1"),
        Some("0/5"),
        None,
        Some("0.000007"),
        None,
        Some("1"),
    ];
    let read = now(&row(&good), 1, None).unwrap();
    assert_eq!(
        read.life.server,
        Server { system_identifier: u64::MAX, timeline: 2, started_at: 1_764_000_000_123_456 }
    );
    assert_eq!((read.life.replayed.map(Lsn::get), read.received, read.primaries_since), (Some(5), None, 1));
    assert_eq!((read.life.stats_reset, read.life.ancestor), (Some(7), Some(1)));
    let mut checkpointed = good;
    checkpointed[7] = Some("2");
    assert_eq!(now(&row(&checkpointed), 1, None).unwrap().life.ancestor, None, "it is its own timeline");
    for index in 0..3 {
        let mut columns = good;
        columns[index] = None;
        assert!(now(&row(&columns), 1, None).is_err(), "column {index}");
    }
}

/// In its verified life, a server need not show its identity again. In another life it must.
#[test]
fn what_is_kept_back_is_known_of_the_life_that_was_verified() {
    let told = [
        Some("7301827364512345678"),
        Some("1764000000.123456"),
        Some("0000000200000000000000A1"),
        Some("0/A0000028"),
        None,
        None,
        None,
        None,
        None,
        None,
    ];
    let verified = now(&row(&told), 0, None).unwrap().life;
    for hidden in [&[0][..], &[2], &[0, 2]] {
        let mut columns = told;
        for index in hidden {
            columns[*index] = None;
        }
        assert_eq!(now(&row(&columns), 0, Some(verified)).unwrap().life, verified, "{hidden:?}");
        assert!(now(&row(&columns), 0, None).is_err(), "{hidden:?}");
        for (index, other) in [(1, "1764000001.0"), (3, "0/B0000028")] {
            let mut columns = columns;
            columns[index] = Some(other);
            assert!(now(&row(&columns), 0, Some(verified)).is_err(), "{hidden:?} {other}");
        }
    }
}
