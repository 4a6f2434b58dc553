//! Tests that the ends of a closure's transaction follow from the answers, and from the text of what was not answered.

use super::*;

const COMMITS: Ends = Ends { commits: true, leaves: true, ..STAYS };
const COMMITS_AND_GOES_ON: Ends = Ends { goes_on: true, ..COMMITS };
const LEAVES: Ends = Ends { leaves: true, ..STAYS };
const LEAVES_AND_GOES_ON: Ends = Ends { goes_on: true, ..LEAVES };
const STAYS: Ends = Ends { commits: false, leaves: false, goes_on: false, chains: false, to_savepoints: 0 };
const CHAINS: Ends = Ends { chains: true, ..STAYS };
const TO_SAVEPOINT: Ends = Ends { to_savepoints: 1, ..STAYS };

/// An SQL-standard body, as PostgreSQL 14 and later have it.
const BODY: &str =
    "CREATE OR REPLACE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT CASE WHEN true THEN 2 END; END";

/// Texts, and what they do.
const TEXTS: &[(&str, Ends)] = &[
    ("SELECT 1", STAYS),
    ("", STAYS),
    ("COMMIT", COMMITS),
    ("COMMIT;", COMMITS),
    ("COMMIT; -- that is it", COMMITS),
    ("COMMIT;;", COMMITS),
    ("INSERT INTO entries VALUES (1); COMMIT AND CHAIN", COMMITS),
    ("COMMIT; BEGIN", COMMITS_AND_GOES_ON),
    ("COMMIT; (SELECT 1)", COMMITS_AND_GOES_ON),
    ("PREPARE TRANSACTION 'a'; SELECT 1", COMMITS_AND_GOES_ON),
    ("ROLLBACK", LEAVES),
    ("rollback work;", LEAVES),
    ("ABORT", LEAVES),
    ("/* no */ ABORT TRANSACTION -- more", LEAVES),
    ("ROLLBACK AND NO CHAIN", LEAVES),
    ("ROLLBACK; INSERT INTO entries VALUES (1)", LEAVES_AND_GOES_ON),
    ("SELECT 1; ABORT; /**/ 'x'", LEAVES_AND_GOES_ON),
    ("ROLLBACK; COMMIT", COMMITS_AND_GOES_ON),
    // These leave a transaction open, or fail.
    ("ROLLBACK TO a; INSERT INTO entries VALUES (1)", TO_SAVEPOINT),
    ("ROLLBACK TRANSACTION TO SAVEPOINT a; SELECT 1", TO_SAVEPOINT),
    ("ROLLBACK TO a; ROLLBACK TO b; ABORT WORK AND CHAIN", Ends { chains: true, to_savepoints: 2, ..STAYS }),
    ("ABORT /* it */ TO a; SELECT 1", TO_SAVEPOINT),
    ("ROLLBACK AND CHAIN; INSERT INTO entries VALUES (1)", CHAINS),
    ("ROLLBACK PREPARED 'a'; SELECT 1", STAYS),
    ("SELECT rollback FROM builds; SELECT 1", STAYS),
    ("SELECT 'ROLLBACK; SELECT 1'", STAYS),
    // A tag has no limit.
    ("DO $create_orders_table$ BEGIN END $create_orders_table$; COMMIT", COMMITS),
    ("DO $seventeen_letters$ ; COMMIT; $seventeen_letterz$ $seventeen_letters$", STAYS),
    ("DO $seventeen_letters$ ; END; $seventeen_letters$", STAYS),
    ("SELECT $sixteen_letters_$a$sixteen_letters_$; COMMIT", COMMITS),
    (
        "SELECT $sixty_three_letters_are_the_most_that_a_name_of_postgresql_has_$;$\
         sixty_three_letters_are_the_most_that_a_name_of_postgresql_has_$; COMMIT",
        COMMITS,
    ),
    // The END of a body of statements ends no transaction.
    (BODY, STAYS),
    ("create function f(a int default (1)) returns int begin atomic select 1; end; COMMIT", COMMITS),
    ("CREATE PROCEDURE p() BEGIN ATOMIC INSERT INTO entries VALUES (1); END; SELECT 1", STAYS),
    ("CREATE FUNCTION f() BEGIN /* at */ ATOMIC SELECT CASE a WHEN 1 THEN CASE WHEN b THEN 1 END END; END", STAYS),
    ("CREATE FUNCTION f() RETURNS int RETURN 1; END", COMMITS),
    ("CREATE FUNCTION begin(atomic int) RETURNS int RETURN 1; END", COMMITS),
    ("CREATE FUNCTION begin() RETURNS int RETURN 1; COMMIT", COMMITS),
    ("CREATE FUNCTION f() LANGUAGE sql AS $$ BEGIN ATOMIC $$; COMMIT", COMMITS),
    ("CREATE TABLE begin (atomic int); COMMIT", COMMITS),
    ("BEGIN; END", COMMITS),
    ("CREATE RULE r AS ON INSERT TO entries DO ALSO (NOTIFY a; NOTIFY b); COMMIT", COMMITS),
];

fn text(sql: &str) -> Vec<u8> {
    message(b'Q', format!("{sql}\0").as_bytes())
}

fn done(tag: &str) -> Vec<u8> {
    message(b'C', format!("{tag}\0").as_bytes())
}

fn pools_commit() -> Vec<u8> {
    text(&format!("{POOLS_COMMIT}SELECT 1; COMMIT"))
}

#[test]
fn a_text_tells_how_it_ends_a_transaction() {
    for (sql, expected) in TEXTS {
        for size in [1, 3, 999] {
            let mut statements = Statements::default();
            statements.begin();
            // What follows in `Parse` is no text.
            let bytes = [sql.as_bytes(), b"\0\0COMMIT\0"].concat();
            bytes.chunks(size).for_each(|part| statements.feed(part));
            assert_eq!(statements.ends(), *expected, "{sql:?} in parts of {size}");
        }
    }
}

/// What is sent, what is answered, and what that shows.
struct Case {
    what: &'static str,
    sent: Vec<Vec<u8>>,
    received: Vec<Vec<u8>>,
    end: Option<TransactionEnd>,
    unanswered: Unanswered,
}

fn case(
    what: &'static str,
    sent: &[Vec<u8>],
    received: &[Vec<u8>],
    end: Option<TransactionEnd>,
    unanswered: Unanswered,
) -> Case {
    Case { what, sent: sent.to_vec(), received: received.to_vec(), end, unanswered }
}

#[expect(clippy::too_many_lines, reason = "it is a table")]
fn cases() -> Vec<Case> {
    use TransactionEnd::{Committed, Prepared, RolledBack};
    use Unanswered::{Commits, GoesOn, Nothing};
    let error = || message(b'E', b"SERROR\0C57P01\0\0");
    let (insert, commit, rollback) = (|| text("INSERT"), || text("COMMIT"), || text("ROLLBACK"));
    let inserted = || [done("INSERT 0 1"), ready(b'T')].concat();
    let answered = |tags: &[&str], state| [tags.iter().flat_map(|tag| done(tag)).collect(), ready(state)].concat();
    vec![
        case("nothing ends it", &[insert()], &[inserted()], None, Nothing),
        case("a statement is under way", &[insert()], &[], None, Nothing),
        case("COMMIT", &[commit()], &[answered(&["COMMIT"], b'I')], Some(Committed), Nothing),
        case("AND CHAIN", &[text("COMMIT AND CHAIN")], &[answered(&["COMMIT"], b'T')], Some(Committed), Nothing),
        case(
            "COMMIT; BEGIN",
            &[text("COMMIT; BEGIN")],
            &[answered(&["COMMIT", "BEGIN"], b'T')],
            Some(Committed),
            Nothing,
        ),
        case("a part of the answer", &[text("COMMIT; SELECT 1")], &[done("COMMIT")], Some(Committed), GoesOn),
        case("a part of the tag", &[commit()], &[done("COMMIT")[..8].to_vec()], None, Commits),
        case("another tag", &[text("COMMIT PREPARED 'a'")], &[[error(), ready(b'E')].concat()], None, Nothing),
        case(
            "PREPARE TRANSACTION",
            &[text("PREPARE TRANSACTION 'a'")],
            &[answered(&["PREPARE TRANSACTION"], b'I')],
            Some(Prepared),
            Nothing,
        ),
        case(
            "a PREPARE of a statement",
            &[text("PREPARE a AS SELECT 1")],
            &[answered(&["PREPARE"], b'T')],
            None,
            Nothing,
        ),
        case("ROLLBACK", &[rollback()], &[answered(&["ROLLBACK"], b'I')], Some(RolledBack), Nothing),
        case("a savepoint", &[text("ROLLBACK TO a")], &[answered(&["ROLLBACK"], b'T')], None, Nothing),
        case(
            "savepoints, one after the other",
            &[text("ROLLBACK TO a; ROLLBACK TO a"), text("ROLLBACK TO a")],
            &[answered(&["ROLLBACK", "ROLLBACK"], b'T'), answered(&["ROLLBACK"], b'T')],
            None,
            Nothing,
        ),
        case(
            "ROLLBACK AND CHAIN",
            &[insert(), text("ROLLBACK AND CHAIN")],
            &[inserted(), answered(&["ROLLBACK"], b'T')],
            Some(RolledBack),
            Nothing,
        ),
        case(
            "the same among savepoints",
            &[text("ROLLBACK TO a; ROLLBACK AND CHAIN; SAVEPOINT a")],
            &[answered(&["ROLLBACK", "ROLLBACK", "SAVEPOINT"], b'T')],
            Some(RolledBack),
            Nothing,
        ),
        case(
            "it was not reached among savepoints",
            &[text("ROLLBACK TO a; SELECT 1/0; ROLLBACK AND CHAIN")],
            &[[done("ROLLBACK"), error(), ready(b'E')].concat()],
            None,
            Nothing,
        ),
        case(
            "a failed COMMIT AND CHAIN",
            &[text("COMMIT AND CHAIN")],
            &[answered(&["ROLLBACK"], b'T')],
            Some(RolledBack),
            Nothing,
        ),
        case(
            "a ROLLBACK, and another BEGIN, in one message",
            &[text("ROLLBACK; BEGIN")],
            &[answered(&["ROLLBACK", "BEGIN"], b'T')],
            Some(RolledBack),
            Nothing,
        ),
        case(
            "prepared ones",
            &[parse("s1", "ROLLBACK TO a"), bind("s1"), parse("s2", "ROLLBACK AND CHAIN"), bind("s2")],
            &[ready(b'T'), answered(&["ROLLBACK"], b'T'), ready(b'T'), answered(&["ROLLBACK"], b'T')],
            Some(RolledBack),
            Nothing,
        ),
        case("a failed COMMIT", &[commit()], &[answered(&["ROLLBACK"], b'I')], Some(RolledBack), Nothing),
        case("a refused COMMIT", &[commit()], &[[error(), ready(b'I')].concat()], Some(RolledBack), Nothing),
        case("it was not reached", &[text("SELECT 1/0; COMMIT")], &[[error(), ready(b'E')].concat()], None, Nothing),
        case(
            "a ROLLBACK, and a COMMIT of another one",
            &[rollback(), text("BEGIN"), commit()],
            &[answered(&["ROLLBACK"], b'I'), answered(&["BEGIN"], b'T'), answered(&["COMMIT"], b'I')],
            Some(RolledBack),
            Nothing,
        ),
        case("an unseen statement", &[insert()], &[answered(&["INSERT 0 1"], b'I')], Some(RolledBack), Nothing),
        case("a proxy has lost its server", &[insert()], &[[error(), ready(b'I')].concat()], None, Nothing),
        case("a COMMIT is under way", &[insert(), commit()], &[inserted()], None, Commits),
        case("a COMMIT has only begun", &[commit()[..9].to_vec()], &[], None, Nothing),
        case("a ROLLBACK is under way", &[rollback()], &[], None, Nothing),
        case("the same in other words", &[text("ABORT WORK")], &[], None, Nothing),
        case("a statement behind it in one message", &[text("ROLLBACK; INSERT")], &[], None, GoesOn),
        case("a statement behind it", &[rollback(), insert()], &[], None, GoesOn),
        case("two of them", &[rollback(), rollback()], &[], None, Nothing),
        case("a statement behind a COMMIT", &[commit(), insert()], &[], None, GoesOn),
        case("one that stays behind it", &[text("ROLLBACK TO a"), insert()], &[], None, Nothing),
        case(
            "the first one of several has failed",
            &[text("SELECT 1/0; COMMIT"), text("ABORT"), insert()],
            &[[error(), ready(b'E')].concat()],
            None,
            GoesOn,
        ),
        case("a prepared COMMIT", &[parse("s1", "COMMIT"), bind("s1")], &[ready(b'T')], None, Commits),
        case(
            "a prepared COMMIT whose Sync is not sent",
            &[parse("s1", "COMMIT"), bind("s1")[..25].to_vec()],
            &[ready(b'T')],
            None,
            Commits,
        ),
        case("a prepared ROLLBACK", &[parse("", "ROLLBACK"), bind(""), insert()], &[ready(b'T')], None, GoesOn),
        case("the pool's own COMMIT", &[pools_commit()], &[], None, Nothing),
        case("its answer", &[pools_commit()], &[answered(&["SET", "SELECT 0", "COMMIT"], b'I')], None, Nothing),
        case("its error", &[pools_commit()], &[[done("SET"), error(), ready(b'I')].concat()], None, Nothing),
        case("the pool's behind another one", &[commit(), pools_commit()], &[], None, Commits),
        case(
            "only the other one is answered",
            &[commit(), pools_commit()],
            &[answered(&["COMMIT"], b'I')],
            Some(Committed),
            Nothing,
        ),
    ]
}

/// A session with an open transaction of the pool.
fn within() -> Counter {
    let mut counter = logged_in();
    counter.sent(&text("BEGIN"));
    counter.received(&[done("BEGIN"), ready(b'T')].concat());
    counter.drained();
    counter.counts.end = None;
    counter
}

#[test]
fn the_answers_tell_how_a_transaction_ended_and_else_the_text_does() {
    for Case { what, sent, received, end, unanswered } in cases() {
        let mut counter = within();
        for bytes in &sent {
            counter.sent(bytes);
        }
        for bytes in &received {
            counter.received(bytes);
        }
        assert_eq!((counter.counts.end, counter.counts.unanswered()), (end, unanswered), "{what}");
    }
}

#[test]
fn the_first_end_counts_until_the_next_transaction_is_watched() {
    let activity = Activity::default();
    let mut counter = within();
    for tag in ["PREPARE TRANSACTION", "COMMIT"] {
        counter.sent(&text(tag));
        counter.received(&[done(tag), ready(b'I')].concat());
        activity.publish(&mut counter);
    }
    assert_eq!(activity.transaction_end(), Some(TransactionEnd::Prepared));
    activity.watch();
    assert_eq!((activity.transaction_end(), activity.unanswered()), (None, Unanswered::Nothing));
    counter.sent(&text("COMMIT; SELECT 1"));
    activity.publish(&mut counter);
    assert_eq!((activity.transaction_end(), activity.unanswered()), (None, Unanswered::GoesOn));
}

/// A text that this module cannot read, such as one in which a backslash escapes a quote by a setting, or one that has
/// failed before it came to its savepoint.
#[test]
fn a_rollback_that_no_text_shows_is_noted() {
    let activity = Activity::default();
    let mut counter = within();
    for (sql, noted) in [
        ("ROLLBACK TO a", false),
        (r"SELECT '\''; ROLLBACK AND CHAIN; --'", true),
        ("ROLLBACK TO a; SAVEPOINT a", false),
        ("ROLLBACK; BEGIN; SAVEPOINT a; SELECT 1 / 0; ROLLBACK TO a", true),
        ("ROLLBACK AND CHAIN; SAVEPOINT a; SELECT 1 / 0; ROLLBACK TO a", true),
    ] {
        activity.watch();
        counter.sent(&text(sql));
        counter.received(&[done("ROLLBACK"), ready(b'T')].concat());
        activity.publish(&mut counter);
        assert_eq!((activity.transaction_end(), activity.has_rolled_back_unseen()), (None, noted), "{sql}");
    }
    activity.watch();
    assert!(!activity.has_rolled_back_unseen());
}

/// The driver closes a statement of the transaction before, and the answer comes when the next one is waited for.
#[test]
fn the_answer_to_a_close_is_no_end() {
    let mut counter = logged_in();
    counter.counts.end = None;
    counter.sent(&[message(b'C', b"Ss1\0"), message(b'S', b"")].concat());
    counter.received(&[message(b'3', b""), ready(b'I')].concat());
    assert_eq!(counter.counts.end, None);
}

#[test]
fn all_is_answered_only_if_no_message_is_incomplete() {
    let mut counter = logged_in();
    assert!(counter.is_all_answered());
    let notification = message(b'A', &[0; 20]);
    counter.received(&notification[..9]);
    assert!(!counter.is_all_answered());
    counter.received(&notification[9..]);
    assert!(counter.is_all_answered());
}

/// A fence comes before the end of the first request to which it applies, and may be lifted before anybody looks.
#[test]
fn a_fence_is_remembered_until_the_next_transaction() {
    let (activity, mut counter) = (Activity::default(), logged_in());
    let reported = |value: &str| message(b'S', format!("default_transaction_read_only\0{value}\0").as_bytes());
    let mut receive = |bytes: &[u8]| {
        for part in bytes.chunks(7) {
            counter.received(part);
        }
        activity.publish(&mut counter);
        (activity.tells_read_only(), activity.was_read_only())
    };
    assert_eq!(receive(&message(b'S', b"TimeZone\0UTC\0")), (false, false), "PostgreSQL 13");
    assert_eq!(receive(&reported("off")), (true, false));
    assert_eq!(receive(&[reported("on"), ready(b'T')].concat()), (true, true));
    assert_eq!(receive(&[reported("off"), ready(b'I')].concat()), (true, true), "it was lifted");
    activity.watch();
    assert_eq!(receive(&ready(b'T')), (true, false), "the next transaction");
    assert_eq!(receive(&reported("on")), (true, true));
    activity.watch();
    assert_eq!(receive(&ready(b'T')), (true, true), "the fence goes on");
}

#[test]
fn a_session_is_known_by_its_process() {
    let mut counter = Counter::new(false);
    counter.received(&[message(b'R', &[0; 4]), message(b'K', &[0, 1, 0, 2, 9, 9, 9, 9]), ready(b'I')].concat());
    let activity = Activity::default();
    assert_eq!(activity.pid(), None);
    activity.publish(&mut counter);
    assert_eq!(activity.pid(), Some(0x0001_0002));
}

proptest! {
    /// However the bytes are cut, and whatever is sent before, the same ends are seen.
    #[test]
    fn cuts_hide_no_end(before in 0..4_usize, cut in 1..40_usize) {
        for Case { what, sent, received, end, unanswered } in cases() {
            let mut counter = within();
            for _ in 0..before {
                counter.sent(&text("SELECT 'COMMIT'"));
                counter.received(&[done("SELECT 1"), ready(b'T')].concat());
            }
            sent.concat().chunks(cut).for_each(|part| counter.sent(part));
            received.concat().chunks(cut).for_each(|part| { counter.received(part); });
            prop_assert_eq!((counter.counts.end, counter.counts.unanswered()), (end, unanswered), "{}", what);
        }
    }
}
