//! The texts of all errors are those on the page of errors. `tests/it/observe/texts.rs` holds real ones against the
//! same table.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::classify::tests::{refused_statement, reported};
use crate::cluster::{Diagnosis, NoPrimary};
use crate::resolve::ResolveError;
use crate::topology::{Address, Answer, CandidateReport, Endpoint, Origin, Parts, Refusal, ServerReport};

const PAGE: &str = include_str!("../../docs/errors.md");
const WAITED: Duration = Duration::from_secs(30);

/// Name and text of each row in the table of texts.
fn rows() -> Vec<(&'static str, &'static str)> {
    let (_, section) = PAGE.split_once("\n## What they say\n").expect("the section is there");
    let section = section.split("\n## ").next().unwrap();
    let cells = |line: &'static str| {
        let (name, text) = line.strip_prefix("| `")?.split_once("` | ")?;
        Some((name, text.strip_suffix(" |")?.trim_matches('`').trim()))
    };
    section.lines().filter_map(cells).collect()
}

/// Whether the text is the pattern, in which `…` stands for anything.
fn is(text: &str, pattern: &str) -> bool {
    let mut pieces = pattern.split('…');
    let first = pieces.next().unwrap();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let mut last = first;
    for piece in pieces {
        let Some(at) = rest.find(piece) else { return false };
        rest = &rest[at + piece.len()..];
        last = piece;
    }
    rest.is_empty() || last.is_empty() && pattern.contains('…')
}

fn endpoint() -> Endpoint {
    Endpoint { host: Some(Arc::from("pg.internal")), address: Address::Tcp(([10, 0, 0, 1], 5432).into()) }
}

fn unavailable(obstacle: Obstacle, answer: Option<Answer>) -> Error {
    let candidate = CandidateReport { endpoint: endpoint(), origin: Origin::Resolved, answer, took: None };
    let diagnosis = Diagnosis { candidates: vec![candidate], dns: None, waiting: 0 };
    Error::Unavailable(Box::new(Unavailable::new(WAITED, diagnosis, obstacle, CHECKOUT_TIMEOUT)))
}

fn no_primary(refusal: Refusal) -> Error {
    let report = ServerReport {
        in_recovery: false,
        read_only: false,
        default_read_only: false,
        fence_pending: false,
        system_identifier: Some(77),
        started_at: None,
        timeline: Some(1),
        wal: None,
        replayed: None,
        stats_reset: None,
        checkpointed: None,
        evidence: None,
        withheld: Parts::default(),
    };
    unavailable(Obstacle::NoPrimary, Some(Answer::Refused(report, refusal)))
}

fn without_an_address() -> Error {
    let diagnosis = Diagnosis { candidates: Vec::new(), dns: Some("pg.internal: no such name".to_owned()), waiting: 0 };
    Error::without_primary(NoPrimary::UnknownName(Duration::from_secs(2), diagnosis))
}

fn no_session(kind: FailureKind, message: &str) -> Error {
    unavailable(Obstacle::NoSession(Some(ProbeFailure::new(kind, message))), None)
}

fn refused() -> Error {
    let said = "FATAL 28P01: password authentication failed for user \"app\"";
    let failure = ProbeFailure::new(FailureKind::Refused, said);
    Error::without_primary(NoPrimary::Refused(Some(endpoint()), failure))
}

fn missing_table() -> tokio_postgres::Error {
    refused_statement("42P01", "relation \"orders\" does not exist")
}

fn in_doubt(reason: Unsettled) -> Error {
    Error::CommitUnknown(Box::new(CommitUnknown::evicted(reason)))
}

fn exhausted() -> Error {
    let why = crate::retry::GiveUp::Deadline.explain(WAITED);
    let last = Error::Database(refused_statement("40001", "could not serialize access"));
    Error::Exhausted(Box::new(Exhausted::new(7, why, CommitOutcome::NotCommitted, last)))
}

fn session_ended() -> Error {
    let report = reported(
        "FATAL",
        "25P03",
        "terminating connection due to idle-in-transaction timeout",
        Some("ProcessInterrupts"),
    );
    Error::SessionEnded(Box::new(SessionEnded::new(report, Error::Database(missing_table()))))
}

/// Each variant that a caller can meet, by the name of its row.
fn all() -> Vec<(&'static str, String)> {
    let errors = [
        ("Error::Refused", refused()),
        ("Error::Closed", Error::Closed),
        ("Error::RuntimeEnded", Error::RuntimeEnded),
        ("Error::Wrapped", Error::Wrapped),
        ("Error::Database", Error::Database(missing_table())),
        ("Error::Ledger", Error::Ledger(missing_table())),
        ("Error::EndedInside", EndedInside::error(Ending::Committed, None)),
        ("Error::Exhausted", exhausted()),
        ("Error::TimedOut", Error::TimedOut { after: WAITED }),
        ("Error::SessionEnded", session_ended()),
        ("Error::Aborted", Error::abort("sold out")),
        ("UnavailableReason::NoPrimary", no_primary(Refusal::Standby)),
        ("UnavailableReason::Fenced", no_primary(Refusal::Fenced)),
        ("UnavailableReason::OtherCluster", no_primary(Refusal::OtherCluster { expected: 7, found: 77 })),
        ("UnavailableReason::OldPrimary", no_primary(Refusal::Zombie { timeline: 1, newest: 2 })),
        ("UnavailableReason::Dns", without_an_address()),
        ("UnavailableReason::NoSession", no_session(FailureKind::Full, "FATAL 53300: sorry, too many clients already")),
        ("UnavailableReason::PoolExhausted", unavailable(Obstacle::NoneFree { max_size: 16 }, None)),
        ("RolledBack::FailedInside", Error::RolledBack(RolledBack::FailedInside)),
        ("RolledBack::LostWithPrimary", Error::RolledBack(RolledBack::LostWithPrimary)),
        ("RolledBack::OtherServer", Error::RolledBack(RolledBack::OtherServer)),
        ("RolledBack::StrangeSession", Error::RolledBack(RolledBack::StrangeSession)),
        ("RolledBack::HandleKept", Error::RolledBack(RolledBack::HandleKept)),
        ("RolledBack::StreamKept", Error::RolledBack(RolledBack::StreamKept)),
        ("Unsettled::NoMark", in_doubt(Unsettled::NoMark)),
        ("Unsettled::SeveralFailovers", in_doubt(Unsettled::SeveralFailovers)),
        ("Unsettled::Unproven", in_doubt(Unsettled::Unproven)),
        ("Unsettled::Restarted", in_doubt(Unsettled::Restarted)),
        ("Unsettled::OtherHistory", in_doubt(Unsettled::OtherHistory)),
        ("Unsettled::OtherCluster", in_doubt(Unsettled::OtherCluster)),
        ("Unsettled::Forgotten", in_doubt(Unsettled::Forgotten)),
        ("Unsettled::InProgress", in_doubt(Unsettled::InProgress)),
        ("Unsettled::NotReplicated", in_doubt(Unsettled::NotReplicated)),
        ("Unsettled::NoPrimary", in_doubt(Unsettled::NoPrimary)),
        ("Unsettled::Closed", in_doubt(Unsettled::Closed)),
        ("Unsettled::Failed", in_doubt(Unsettled::Failed)),
        ("Unsettled::NotOffered", in_doubt(Unsettled::NotOffered)),
        ("Unsettled::TooOld", in_doubt(Unsettled::TooOld)),
    ];
    let no_url = "nonsense".parse::<tokio_postgres::Config>().unwrap_err();
    let source = Arc::new(std::io::Error::other("permission denied"));
    let unreadable = ResolveError::NoConfiguration { file: "/etc/resolv.conf".to_owned(), source };
    let build = [
        ("BuildError::Url", BuildError::url(&no_url, |_| None)),
        ("BuildError::NoHost", BuildError::NoHost),
        (
            "BuildError::Invalid",
            BuildError::invalid("max_size", "must be at least 1: a pool of none hands out nothing"),
        ),
        ("BuildError::NoTls", BuildError::NoTls { option: "sslmode" }),
        ("BuildError::Resolver", BuildError::Resolver(unreadable)),
        ("BuildError::NoRuntime", BuildError::NoRuntime),
        ("BuildError::Runtime", BuildError::Runtime { lacks: "enable_time" }),
    ];
    let texts = errors.iter().map(|(name, error)| (*name, error.to_string()));
    texts.chain(build.iter().map(|(name, error)| (*name, error.to_string()))).collect()
}

#[test]
fn the_page_has_the_text_of_each_error() {
    let rows = rows();
    for (name, text) in all() {
        let Some((_, pattern)) = rows.iter().find(|(row, _)| *row == name) else { panic!("no row for {name}: {text}") };
        assert!(is(&text, pattern), "{name} says\n{text}\nand docs/errors.md has\n{pattern}");
    }
}

/// `tests/documents.rs` compares the other tables of the page with the enums.
#[test]
fn each_variant_has_a_text() {
    let told: BTreeSet<String> = all().iter().map(|(name, _)| (*name).to_owned()).collect();
    let in_table: BTreeSet<String> = rows().iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(told, in_table);
    let mut variants = BTreeSet::new();
    for of in ["Error", "UnavailableReason", "RolledBack", "Unsettled", "BuildError"] {
        let (_, section) = PAGE.split_once(&format!("\n## `{of}`\n")).unwrap();
        let names = section
            .split("\n## ")
            .next()
            .unwrap()
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split('`').next());
        variants.extend(names.map(|name| format!("{of}::{name}")));
    }
    // These three say what their reasons say.
    for by_reason in ["Error::Unavailable", "Error::CommitUnknown", "Error::RolledBack"] {
        assert!(variants.remove(by_reason));
    }
    assert_eq!(told, variants);
}

#[test]
fn nothing_is_said_twice() {
    let nested = Error::Exhausted(Box::new(Exhausted::new(2, "it is".to_owned(), CommitOutcome::Unknown, exhausted())));
    for text in all().into_iter().map(|(_, text)| text).chain([nested.to_string(), format!("{:?}", refused())]) {
        let clauses: Vec<&str> = text.split("; ").filter(|clause| clause.len() > 12).collect();
        let different: BTreeSet<&str> = clauses.iter().copied().collect();
        assert_eq!(different.len(), clauses.len(), "{text}");
        assert!(!text.contains("  ") && !text.contains('\n') && !text.ends_with(['.', ' ', ';']), "{text:?}");
    }
}

#[test]
fn what_was_behind_an_error_is_its_source() {
    use std::error::Error as _;

    let server = |error: &Error| {
        let mut link = error.source();
        let mut found = false;
        while let Some(error) = link {
            found |= error.is::<tokio_postgres::error::DbError>();
            link = error.source();
        }
        found
    };
    for error in [Error::Database(missing_table()), Error::Ledger(missing_table()), exhausted(), session_ended()] {
        assert!(server(&error), "{error}");
    }
    let lost = CommitUnknown::new(Some(missing_table()), Unsettled::NoMark);
    assert!(server(&Error::CommitUnknown(Box::new(lost))));
    assert!(server(&EndedInside::error(Ending::Unknown, Some(Error::Database(missing_table())))));
    for error in [refused(), no_session(FailureKind::Full, "full")] {
        assert!(error.source().and_then(|source| source.downcast_ref::<ProbeFailure>()).is_some(), "{error}");
    }
    assert!(Error::abort(std::io::Error::other("of the closure")).to_string() == "of the closure");
}

#[test]
fn a_doubt_says_what_came_in_place_of_an_answer() {
    let text = |error| CommitUnknown::new(Some(error), Unsettled::NoMark).to_string();
    let answered = text(refused_statement("40003", "result is ambiguous"));
    assert!(answered.starts_with("COMMIT was answered with an error") && !answered.contains("lost"), "{answered}");
    let lost = text("host=h port=x".parse::<tokio_postgres::Config>().unwrap_err());
    assert!(lost.starts_with("the connection was lost after COMMIT was sent ("), "{lost}");
}

#[test]
fn an_earlier_attempt_in_doubt_says_whether_a_primary_was_looked_for() {
    let (told, asked) =
        (CommitUnknown::earlier(Unsettled::NoPrimary), CommitUnknown::asked_for_earlier(Unsettled::NoPrimary));
    assert!(told.to_string().contains("the call ended before another primary was asked"), "{told}");
    assert!(asked.to_string().contains(&Unsettled::NoPrimary.to_string()), "{asked}");
}

#[test]
fn patterns_are_compared() {
    assert!(is("a 1 b 2", "a … b …") && is("abc", "abc") && is("a, b", "…, b"));
    assert!(!is("a 1 c", "a … b") && !is("abcd", "abc") && !is("xabc", "abc") && !is("a b c", "a … b"));
}
