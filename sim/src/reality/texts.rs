//! The statements that the crate sends, as a few seeds of the simulation have heard them. Their values are replaced by
//! names, so that a script puts its own into them.

use std::cell::RefCell;
use std::collections::BTreeSet;

use crate::run::run;
use crate::script::Script;

/// So many seeds have heard each statement.
const SEEDS: u64 = 30;

/// The load sends these, or they wait for long, or others receive something by them.
const LEFT_OUT: [&str; 8] =
    ["payments", "raise", "pg_notify", "LISTEN", "listening", "idle_session_timeout", "DEALLOCATE", "SELECT pg_sleep("];

/// For so many microseconds at least a transaction has been open whose session is ended. The player waits for longer.
const OPEN_FOR: &str = "100000";

thread_local! {
    static HEARD: RefCell<BTreeSet<String>> = const { RefCell::new(BTreeSet::new()) };
}

/// Notes a message that a simulated server has received.
pub(crate) fn heard(text: &str) {
    if LEFT_OUT.iter().any(|word| text.contains(word)) {
        return;
    }
    let text = template(text);
    HEARD.with_borrow_mut(|heard| heard.insert(text));
}

/// What replaces a name in a text.
#[derive(Clone, Debug)]
pub(super) struct Values {
    pub(super) xid: String,
    pub(super) nonce: String,
    pub(super) lsn: String,
    pub(super) entry: String,
    pub(super) pid: String,
    /// When the process began, as `extract(epoch …)` prints it.
    pub(super) backend_start: String,
    pub(super) timeline: String,
    /// Rows of an id and an outcome.
    pub(super) signed: Vec<String>,
}

/// The texts, without their values.
#[derive(Clone, Debug)]
pub(super) struct Texts(Vec<String>);

impl Texts {
    pub(super) fn from_the_crate() -> Self {
        for seed in 1..=SEEDS {
            run(&Script::whole(seed), false).unwrap();
        }
        Self(HEARD.take().into_iter().collect())
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Those that have all of these words.
    pub(super) fn with(&self, words: &[&str]) -> Vec<&String> {
        self.0.iter().filter(|text| words.iter().all(|word| text.contains(word))).collect()
    }
}

pub(super) fn fill(text: &str, values: &Values) -> String {
    text.replace("{xid}", &values.xid)
        .replace("{nonce}", &values.nonce)
        .replace("{lsn}", &values.lsn)
        .replace("{entry}", &values.entry)
        .replace("{pid}", &values.pid)
        .replace("{backend_start}", &values.backend_start)
        .replace("{open_for}", OPEN_FOR)
        .replace("{timeline}", &values.timeline)
        .replace("{count}", &values.signed.len().to_string())
        .replace("{signed}", &values.signed.join(", "))
}

/// Replaces the values of a text by names.
fn template(text: &str) -> String {
    let text = &without_signature(text);
    let mut found = String::with_capacity(text.len());
    // Every second part is between quotes.
    for (at, part) in text.split('\'').enumerate() {
        if at > 0 {
            found.push('\'');
        }
        found.push_str(&if at % 2 == 1 { quoted(part) } else { unquoted(part) });
    }
    found
}

fn without_signature(text: &str) -> String {
    let parts = text.split_once("(VALUES ").and_then(|(before, rest)| Some((before, rest.split_once(") AS signed")?)));
    let Some((before, (_, after))) = parts else { return text.to_owned() };
    let Some((first, count)) = before.split_once("count(*) = ") else { return text.to_owned() };
    let rest = count.trim_start_matches(|letter: char| letter.is_ascii_digit());
    format!("{first}count(*) = {{count}}{rest}(VALUES {{signed}}) AS signed{after}")
}

fn quoted(text: &str) -> String {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let hex = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if digits(text) && text != "150000" {
        return "{xid}".to_owned();
    }
    if text.len() == 32 && hex(text) {
        return "{nonce}".to_owned();
    }
    if text.len() == 36 && text.split('-').all(hex) {
        return "{entry}".to_owned();
    }
    if text != "0/0" && text.split_once('/').is_some_and(|(high, low)| hex(high) && hex(low)) {
        return "{lsn}".to_owned();
    }
    match text.strip_prefix('^').and_then(|rest| rest.split_at_checked(8)) {
        Some((timeline, rest)) if hex(timeline) && rest.starts_with('[') => format!("^{{timeline}}{rest}"),
        _ => text.to_owned(),
    }
}

/// What is before a number outside of quotes, and the number's name.
const NUMBERS: [(&str, &str); 3] = [
    (" pid = ", "{pid}"),
    ("round(extract(epoch FROM backend_start)::numeric, 6) = ", "{backend_start}"),
    ("xact_start <= clock_timestamp() - make_interval(secs => ", "{open_for}"),
];

fn unquoted(text: &str) -> String {
    NUMBERS.iter().fold(text.to_owned(), |text, (before, name)| {
        let mut parts = text.split(before);
        let mut found = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let rest = part.trim_start_matches(|letter: char| letter.is_ascii_digit() || letter == '.');
            found.extend([*before, *name, rest]);
        }
        found
    })
}

#[test]
fn values_become_names_and_names_values() {
    let text = "SELECT f('1/A0', '0123456789abcdef0123456789abcdef'), '731', '150000' WHERE a = '0/0' AND pid = 12 AND \
                '^00000001[0-9]'";
    let made = template(text);
    assert_eq!(
        made,
        "SELECT f('{lsn}', '{nonce}'), '{xid}', '150000' WHERE a = '0/0' AND pid = {pid} AND \
                '^{timeline}[0-9]'"
    );
    let values = Values {
        xid: "731".into(),
        nonce: "0123456789abcdef0123456789abcdef".into(),
        lsn: "1/A0".into(),
        entry: String::new(),
        pid: "12".into(),
        backend_start: "7.500000".into(),
        timeline: "00000001".into(),
        signed: Vec::new(),
    };
    assert_eq!(fill(&made, &values), text);
    let search = "WHERE pid = 12 AND round(extract(epoch FROM backend_start)::numeric, 6) = 7.500000 \
                  AND xact_start <= clock_timestamp() - make_interval(secs => 100000 / 1000000.0)";
    let made = template(search);
    assert!(made.contains(" = {backend_start} ") && made.contains("{open_for} / 1000000.0"), "{made}");
    assert_eq!(fill(&made, &values), search);
    let signed =
        template("SELECT count(*) = 2 FROM (VALUES ('7'::xid8, 'aborted'), ('8'::xid8, 'committed')) AS signed");
    assert_eq!(signed, "SELECT count(*) = {count} FROM (VALUES {signed}) AS signed");
}
