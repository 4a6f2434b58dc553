//! Tests that the count of requests follows from the messages that are sent and received.

mod ends;

use proptest::prelude::*;
use proptest::sample::select;

use super::commits::{Ends, Statements};
use super::messages::ROLLBACK;
use super::*;

fn message(letter: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
    [&[letter][..], &length, body].concat()
}

fn ready(state: u8) -> Vec<u8> {
    message(b'Z', &[state])
}

fn logged_in() -> Counter {
    let mut counter = Counter::new(false);
    counter.sent(&[0, 0, 0, 8, 0, 3, 0, 0]);
    assert_eq!(counter.flags(), REQUEST);
    counter.received(&message(b'R', &[0, 0, 0, 3]));
    counter.sent(&message(b'p', b"secret\0"));
    counter.received(&[message(b'R', &[0; 4]), ready(b'I')].concat());
    counter.drained();
    assert_eq!(counter.flags(), 0);
    counter
}

fn extended() -> Vec<u8> {
    [message(b'B', b"b"), message(b'E', b"e"), message(b'S', b"")].concat()
}

#[test]
fn a_request_is_under_way_until_its_end() {
    let mut counter = logged_in();
    counter.sent(&extended());
    assert_eq!(counter.flags(), REQUEST);
    assert!(!counter.received(&message(b'D', &[0; 100])));
    counter.drained();
    assert_eq!(counter.flags(), REQUEST);
    assert!(counter.received(&ready(b'I')));
    assert_eq!(counter.flags(), STALLED, "the answer is not taken yet");
    counter.drained();
    assert_eq!(counter.flags(), 0);
}

#[test]
fn two_requests_need_two_answers() {
    let mut counter = logged_in();
    counter.sent(&[message(b'Q', b"SELECT 1\0"), extended()].concat());
    counter.received(&ready(b'I'));
    counter.drained();
    assert_eq!(counter.flags(), REQUEST);
    counter.received(&ready(b'I'));
    counter.drained();
    assert_eq!(counter.flags(), 0);
}

#[test]
fn what_the_driver_sends_by_itself_makes_nobody_busy() {
    let mut counter = logged_in();
    counter.sent(&[message(b'C', b"Ss1\0"), message(b'S', b"")].concat());
    assert_eq!(counter.flags(), 0, "a statement is closed");
    counter.sent(&message(b'Q', b"BEGIN\0"));
    counter.received(&[ready(b'I'), ready(b'T')].concat());
    counter.drained();
    assert_eq!(counter.flags(), TRANSACTION);
    counter.sent(&message(b'Q', ROLLBACK));
    assert_eq!(counter.flags(), 0, "a dropped transaction is rolled back");
    counter.received(&ready(b'I'));
    counter.drained();
    assert_eq!(counter.flags(), 0);
    counter.sent(&message(b'Q', b"ROLLBACK TO a\0"));
    assert_eq!(counter.flags(), REQUEST);
}

#[test]
fn an_open_or_failed_transaction_is_seen() {
    for state in *b"TE" {
        let mut counter = logged_in();
        counter.sent(&message(b'Q', b"BEGIN; SELECT 1\0"));
        counter.received(&ready(state));
        counter.drained();
        assert_eq!(counter.flags(), TRANSACTION);
    }
}

#[test]
fn a_failed_request_before_a_rollback_ends_by_itself() {
    let mut counter = logged_in();
    counter.sent(&message(b'Q', b"BEGIN\0"));
    counter.received(&ready(b'T'));
    counter.sent(&message(b'Q', b"SELECT 1/0\0"));
    counter.received(&message(b'E', b"\0"));
    counter.drained();
    assert_eq!(counter.flags(), FAILED | TRANSACTION);
    counter.sent(&message(b'Q', ROLLBACK));
    assert_eq!(counter.flags(), 0);
    counter.received(&[ready(b'E'), ready(b'I')].concat());
    counter.drained();
    assert_eq!(counter.flags(), 0);
    // Another request behind the failed one is still under way.
    counter.sent(&[extended(), extended(), message(b'Q', ROLLBACK)].concat());
    counter.received(&message(b'E', b"\0"));
    counter.drained();
    assert_eq!(counter.flags(), REQUEST);
}

/// `BEGIN; SELECT 1/0`: only the end of the request shows that a transaction is open.
#[test]
fn a_failed_request_has_failed_until_its_end() {
    let mut counter = logged_in();
    counter.sent(&message(b'Q', b"BEGIN; SELECT 1/0\0"));
    counter.received(&message(b'E', b"\0"));
    counter.drained();
    assert_eq!(counter.flags(), FAILED);
    counter.received(&ready(b'E'));
    counter.drained();
    assert_eq!(counter.flags(), TRANSACTION);
}

#[test]
fn a_copy_ends_with_its_data() {
    let mut counter = logged_in();
    counter.sent(&extended());
    counter.received(&message(b'G', &[0, 0, 0]));
    counter.drained();
    assert_eq!(counter.flags(), COPYING);
    counter.sent(&message(b'd', b"1\n"));
    assert_eq!(counter.flags(), REQUEST | COPYING);
    counter.sent(&[message(b'c', b""), message(b'S', b"")].concat());
    counter.received(&[message(b'C', b"COPY 1\0"), ready(b'I')].concat());
    counter.drained();
    assert_eq!(counter.flags(), 0);
    // A COPY that fails immediately: both Syncs are answered.
    counter.sent(&extended());
    counter.received(&[message(b'E', b"\0"), ready(b'I')].concat());
    counter.sent(&[message(b'f', b"\0"), message(b'S', b"")].concat());
    counter.received(&ready(b'I'));
    counter.drained();
    assert_eq!(counter.flags(), 0);
}

#[test]
fn what_the_network_does_not_take_is_under_way() {
    let mut counter = logged_in();
    counter.blocked();
    assert_eq!(counter.flags(), BLOCKED);
    counter.sent(b"Q\0");
    assert_eq!(counter.flags(), REQUEST, "in the midst of a message");
}

#[test]
fn the_answer_to_the_question_for_tls_has_no_header() {
    let mut counter = Counter::new(true);
    counter.sent(&[0, 0, 0, 8, 4, 210, 22, 47]);
    counter.received(b"N");
    counter.sent(&[0, 0, 0, 8, 0, 3, 0, 0]);
    counter.received(&[message(b'R', &[0; 4]), ready(b'I')].concat());
    counter.drained();
    assert_eq!(counter.flags(), 0);
}

proptest! {
    /// The result does not depend on how the bytes are cut, and no bytes cause a panic.
    #[test]
    fn cuts_change_nothing(bytes in proptest::collection::vec(any::<u8>(), 0..400), cut in 1..50_usize) {
        let (mut whole, mut pieces) = (Counter::new(false), Counter::new(false));
        whole.sent(&bytes);
        whole.received(&bytes);
        bytes.chunks(cut).for_each(|piece| pieces.sent(piece));
        bytes.chunks(cut).for_each(|piece| { pieces.received(piece); });
        if !bytes.is_empty() {
            prop_assert_eq!(whole.flags(), pieces.flags());
            prop_assert_eq!(whole.counts.unanswered(), pieces.counts.unanswered());
            prop_assert_eq!(whole.counts.end, pieces.counts.end);
        }
    }

    /// The same for whole messages of every kind, most of which are skipped in one step if they come whole.
    #[test]
    fn cuts_of_messages_change_nothing(
        messages in proptest::collection::vec((select(LETTERS), select(BODIES)), 0..30),
        cut in 1..40_usize,
    ) {
        let bytes: Vec<u8> = messages.iter().flat_map(|(letter, body)| message(*letter, body)).collect();
        let (mut whole, mut pieces) = (Counter::new(false), Counter::new(false));
        for (counter, cut) in [(&mut whole, bytes.len().max(1)), (&mut pieces, cut)] {
            counter.sent(&message(b'p', b"start"));
            bytes.chunks(cut).for_each(|piece| counter.sent(piece));
            bytes.chunks(cut).for_each(|piece| { counter.received(piece); });
            counter.drained();
        }
        let seen = |counter: &Counter| {
            let counts = &counter.counts;
            (counter.flags(), counter.is_all_answered(), counts.unanswered(), counts.end, counts.read_only)
        };
        prop_assert_eq!(seen(&whole), seen(&pieces));
        let seen = |counter: &Counter| {
            let counts = &counter.counts;
            (counts.pools_commit, counts.last_commit, counts.pid, counts.rolled_back_unseen, counts.deallocated)
        };
        prop_assert_eq!(seen(&whole), seen(&pieces));
    }
}

/// The letters of messages in both directions, and one that no message has.
const LETTERS: &[u8] = b"BCDEFGHIKNPQRSTXZcdnpst123~";

const BODIES: &[&[u8]] = &[
    b"",
    b"I",
    b"T",
    b"E",
    b"S1\0",
    b"\0S1\0",
    b"\0\0",
    b"S1\0COMMIT\0\0\0",
    b"COMMIT\0",
    b"ROLLBACK\0",
    b"PREPARE TRANSACTION\0",
    b"DEALLOCATE ALL\0",
    b"default_transaction_read_only\0on\0",
    b"SET LOCAL client_min_messages = warning; COMMIT\0",
    &[0, 0, 1, 2, 3, 4, 5, 6],
];

/// Texts, and whether they commit.
const TEXTS: &[(&str, bool)] = &[
    ("COMMIT", true),
    ("commit ; ", true),
    ("COMMIT AND CHAIN", true),
    ("COMMIT PREPARED 'a'", true),
    ("End", true),
    ("END WORK;", true),
    ("PREPARE TRANSACTION 'a'", true),
    ("prepare /* it */ transaction 'a'", true),
    ("PREPARE transactions AS SELECT 1", false),
    ("PREPARE a AS SELECT 1; TRANSACTION", false),
    ("SELECT TRANSACTION", false),
    ("PREPARE; TRANSACTION", false),
    ("INSERT INTO entries VALUES (1); COMMIT;", true),
    ("COMMIT; SELECT 1", true),
    ("/* trace * id=1 **/ -- why\n COMMIT", true),
    ("SELECT 1; /**/COMMIT--", true),
    ("-- why\rCOMMIT", true),
    ("SELECT 1 -- why\r\n; \x0B\x0C\tCOMMIT", true),
    ("SELECT a$b$ FROM \u{e4}$1$; COMMIT", true),
    ("SELECT e$e$; COMMIT", true),
    ("TABLE a$$; COMMIT", true),
    ("SELECT a, $b$; COMMIT", false),
    ("/* one /* two /*/ three */ / * */ */ COMMIT", true),
    ("/*/* COMMIT */ ; COMMIT; /**/ COMMIT */ SELECT 1", false),
    ("SELECT '$$'; COMMIT -- $$", true),
    ("SELECT $1; COMMIT", true),
    ("SELECT $a$ ; END $b$ $; COMMIT $a$ ; COMMIT", true),
    ("SELECT $a$ ; END $b$ $; COMMIT $aa$", false),
    ("DO $$ BEGIN PERFORM 1; COMMIT; END $$", false),
    ("SELECT E'it\\'s'; COMMIT", true),
    ("SELECT e'\\\\', '\\'; COMMIT", true),
    ("SELECT E'a''\\'; COMMIT'", false),
    ("SELECT E'a'\n'b\\''; COMMIT", true),
    ("SELECT E'a' -- and\r\n\t -- so on\n'b\\'; COMMIT'", false),
    ("SELECT E'a'\n'b'\n'\\''; COMMIT", true),
    ("SELECT E'a' - '\\'; COMMIT", true),
    ("SELECT E'a'\n, '\\'; COMMIT", true),
    ("SELECT 'a'\n'b\\'; COMMIT", true),
    ("SELECT name'\\'; COMMIT", true),
    ("SELECT E '\\'; COMMIT", true),
    ("SELECT '; COMMIT', \"; END\"", false),
    ("SELECT 1", false),
    ("SELECT commit FROM builds", false),
    ("SELECT 1 -- COMMIT", false),
    ("/* COMMIT; END */ SELECT 1 / 2 * 3 - 4", false),
    ("-- COMMIT", false),
    ("- COMMIT", false),
    ("COMMITTED", false),
    ("ENDING", false),
    ("END_", false),
    ("MIT", false),
    ("", false),
];

#[test]
fn a_commit_is_known_by_the_first_word_of_a_statement() {
    for (sql, commits) in TEXTS {
        let bytes =
            [message(b'Q', b"SELECT pg_sleep(1); COM\0"), message(b'Q', format!("{sql}\0").as_bytes())].concat();
        for size in [1, 3, bytes.len()] {
            let mut counter = logged_in();
            bytes.chunks(size).for_each(|part| counter.sent(part));
            assert_eq!(counter.flags() & COMMIT != 0, *commits, "{sql:?} in parts of {size}");
            counter.received(&[ready(b'I'), ready(b'I')].concat());
            counter.drained();
            assert_eq!(counter.flags(), 0, "{sql:?}");
        }
    }
}

fn parse(name: &str, sql: &str) -> Vec<u8> {
    [message(b'P', format!("{name}\0{sql}\0\0\0").as_bytes()), message(b'S', b"")].concat()
}

fn bind(name: &str) -> Vec<u8> {
    let body = format!("end\0{name}\0\0\0\0\0\0\0");
    [message(b'B', body.as_bytes()), message(b'E', b"end\0\0\0\0\0"), message(b'S', b"")].concat()
}

/// If a statement is parsed first and carried out later, it commits each time that it is carried out.
#[test]
fn a_prepared_commit_is_known_whenever_it_is_carried_out() {
    for (sql, commits) in TEXTS {
        for (name, other) in [("s7", "s"), ("", "s7"), (&*"s".repeat(99), "")] {
            for size in [1, 3, 999] {
                let mut counter = logged_in();
                let mut send = |bytes: Vec<u8>| {
                    bytes.chunks(size).for_each(|part| counter.sent(part));
                    let (flags, last) = (counter.flags(), counter.counts.last_commit);
                    counter.received(&ready(b'I'));
                    counter.drained();
                    assert_eq!(counter.flags(), 0, "{sql:?}");
                    (flags & COMMIT != 0, last)
                };
                assert!(!send(parse(name, "COMMIT")).0, "nothing is carried out yet");
                assert!(!send(parse(name, sql)).0, "{sql:?}");
                let mut before = send(parse(other, "SELECT 1")).1;
                for _ in 0..4 {
                    let (is_commit, last) = send(bind(name));
                    assert_eq!(
                        (is_commit, last != before),
                        (*commits, *commits),
                        "{sql:?} {name:?} in parts of {size}"
                    );
                    before = last;
                    assert!(!send(bind(other)).0, "{sql:?} {name:?}");
                }
                send([message(b'C', format!("S{name}\0").as_bytes()), message(b'S', b"")].concat());
                assert!(!send(bind(name)).0, "it is closed");
            }
        }
    }
}

/// A session that prepares many statements that commit keeps the newest names.
#[test]
fn the_names_of_prepared_commits_are_limited() {
    let mut counter = logged_in();
    for number in 0..1000 {
        counter.sent(&parse(&format!("s{number}"), "COMMIT"));
        counter.received(&ready(b'I'));
    }
    counter.drained();
    counter.sent(&bind("s999"));
    assert_eq!(counter.flags() & COMMIT, COMMIT);
}

#[test]
fn what_the_driver_waited_for_and_each_end_of_a_request_show_life() {
    let mut counter = logged_in();
    counter.sent(&message(b'Q', b"SELECT 1\0"));
    counter.received(&message(b'D', &[0; 10]));
    assert!(counter.shows_life(), "a row that the driver waited for");
    counter.received(&message(b'D', &[0; 10]));
    assert!(!counter.shows_life(), "it may have been in a buffer for long");
    counter.received(&ready(b'I'));
    assert!(counter.shows_life(), "the end of a request");
    counter.drained();
    counter.received(&[]);
    assert!(!counter.shows_life(), "the end of the stream");
    counter.drained();
    counter.received(&message(b'E', b"SFATAL\0\0"));
    assert!(!counter.shows_life(), "the last words");
    counter.received(&ready(b'I'));
    assert!(counter.shows_life(), "an error is an answer");
}

/// After an immediate shutdown or the crash of another backend, a server sends a notice on each session before it ends.
/// Only what comes after an error or a notice shows that the server lives.
#[test]
fn a_notice_may_be_the_last_word() {
    let row = || message(b'D', &[0; 10]);
    let notice = || message(b'N', b"SWARNING\0C57P02\0\0");
    let error = || message(b'E', b"SFATAL\0C57P01\0\0");
    let cut = |message: Vec<u8>, at: usize| message[..at].to_vec();
    let cases: [(&str, Vec<u8>, bool); 14] = [
        ("a notice alone", notice(), false),
        ("the first byte of one", cut(notice(), 1), false),
        ("a part of one", cut(notice(), 9), false),
        ("an answer, and a notice", [row(), notice()].concat(), false),
        ("the end of a request, and a notice", [ready(b'I'), notice()].concat(), false),
        ("two notices", [notice(), notice()].concat(), false),
        ("an error", error(), false),
        ("a part of one", cut(error(), 9), false),
        ("a notice, and an error", [notice(), error()].concat(), false),
        ("a notice, and an answer", [notice(), row()].concat(), true),
        ("a notice, and a part of an answer", [notice(), cut(row(), 3)].concat(), true),
        ("a notice, and the end of the request", [notice(), ready(b'I')].concat(), true),
        ("a parameter that was changed", message(b'S', b"TimeZone\0UTC\0"), true),
        ("a notification", message(b'A', &[0; 10]), true),
    ];
    for (case, bytes, expected) in cases {
        let mut counter = logged_in();
        counter.sent(&message(b'Q', b"SELECT 1\0"));
        counter.received(&bytes);
        assert_eq!(counter.shows_life(), expected, "{case}");
        counter.drained();
    }
    let mut counter = logged_in();
    counter.received(&cut(notice(), 9));
    counter.drained();
    counter.received(&notice()[9..]);
    assert!(!counter.shows_life(), "the rest of a notice");
}

#[test]
fn a_sign_of_life_is_noted_once() {
    let (heard, activity) = (Heard::default(), Activity::default());
    activity.note_life();
    assert!(!heard.take());
    activity.tell(&heard);
    activity.note_life();
    activity.note_life();
    assert_eq!((heard.take(), heard.take()), (true, false));
}

#[test]
fn what_drops_all_prepared_statements_is_noted_once() {
    for (text, drops) in [
        ("DEALLOCATE ALL", true),
        ("SELECT 1; deallocate prepare all", true),
        ("/* all */ DISCARD ALL;", true),
        ("DEALLOCATE every", false),
        ("DEALLOCATE \"ALL\"", false),
        ("DISCARD PLANS", false),
        ("SELECT 'DEALLOCATE ALL'", false),
    ] {
        for letter in *b"QP" {
            let (activity, mut counter) = (Activity::default(), logged_in());
            let name: &[u8] = if letter == b'P' { b"s1\0" } else { b"" };
            counter.sent(&message(letter, &[name, text.as_bytes(), b"\0\0\0"].concat()));
            activity.publish(&mut counter);
            activity.publish(&mut counter);
            assert_eq!((activity.take_deallocated(), activity.take_deallocated()), (drops, false), "{text}");
        }
    }
}

#[test]
fn a_session_is_silent_when_everything_is_answered() {
    let (activity, mut counter) = (Activity::default(), logged_in());
    let is_silent = |counter: &mut Counter| {
        activity.publish(counter);
        activity.is_silent()
    };
    assert!(is_silent(&mut counter));
    let closes = [message(b'C', b"Ss1\0"), message(b'S', b"")].concat();
    counter.sent(&closes[..3]);
    assert!(!is_silent(&mut counter));
    counter.sent(&closes[3..]);
    assert_eq!(activity.is_idle(), Some(false));
    activity.publish(&mut counter);
    assert_eq!((activity.is_idle(), activity.is_silent()), (Some(true), false), "nobody waits for this answer");
    counter.received(&[message(b'3', b""), ready(b'I')].concat());
    counter.drained();
    assert!(is_silent(&mut counter));
}
