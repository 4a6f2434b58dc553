//! libpq's options about certificates and hosts that the driver's parser does not know or reads differently.
//!
//! Takes those options out of the text, and leaves everything else for the driver to read, including mistakes. It also
//! notes which options about TCP and connecting the text contains, because the driver does not show that: it treats 0
//! as if the option were missing. And it reads `tcp_user_timeout` itself, which is in milliseconds in libpq, but in
//! seconds in the driver.

use std::ops::Range;
use std::time::Duration;

use super::hosts::Hosts;

/// The value of `sslrootcert` that means the platform's authorities.
#[cfg(feature = "rustls")]
pub(super) const SYSTEM: &str = "system";

/// `sslmode`, in libpq's order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Mode {
    Disable,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

impl Mode {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "disable" => Self::Disable,
            "prefer" => Self::Prefer,
            "require" => Self::Require,
            "verify-ca" => Self::VerifyCa,
            "verify-full" => Self::VerifyFull,
            _ => return None,
        })
    }
}

/// What the user should do about most of [`NOT_HONOURED`].
const REMOVE: &str = "is not honoured here; remove it";
/// libpq's other options, which neither this crate nor the driver honours, and what to do instead. They are refused
/// here by name, because the driver does not name an unknown option, which may be a piece of a password.
const NOT_HONOURED: [(&str, &str); 31] = [
    ("client_encoding", "is always UTF8 here; remove it"),
    ("fallback_application_name", "is not honoured here; use `application_name`"),
    ("gssdelegation", REMOVE),
    ("gssencmode", REMOVE),
    ("gsslib", REMOVE),
    ("keepalives_count", "is called `keepalives_retries` here"),
    ("krbsrvname", REMOVE),
    ("max_protocol_version", REMOVE),
    ("min_protocol_version", REMOVE),
    ("oauth_client_id", REMOVE),
    ("oauth_client_secret", REMOVE),
    ("oauth_issuer", REMOVE),
    ("oauth_scope", REMOVE),
    (
        "passfile",
        "is not honoured here; use `Pool::from_env`, `PoolBuilder::password_provider`, or put the password here",
    ),
    ("replication", REMOVE),
    ("require_auth", "is not honoured here; `channel_binding=require` over TLS asks for SCRAM"),
    ("requirepeer", REMOVE),
    ("requiressl", "is not honoured here; use `sslmode=require`"),
    ("scram_client_key", REMOVE),
    ("scram_server_key", REMOVE),
    ("service", "is not honoured here; remove it, or use `Pool::from_env` with PGSERVICE"),
    ("servicefile", "is not honoured here; remove it, or use `Pool::from_env` with PGSERVICEFILE"),
    ("ssl_max_protocol_version", REMOVE),
    ("ssl_min_protocol_version", REMOVE),
    ("sslcertmode", REMOVE),
    ("sslcompression", REMOVE),
    ("sslcrl", REMOVE),
    ("sslcrldir", REMOVE),
    ("sslkeylogfile", REMOVE),
    ("sslpassword", REMOVE),
    ("sslsni", REMOVE),
];

/// The options whose default or meaning differs from the driver's.
const NOTED: [&str; 4] = ["connect_timeout", "keepalives_idle", "keepalives_interval", "tcp_user_timeout"];

/// The options that were taken out. As in libpq, an empty value counts as none.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Ssl {
    /// The value as written; `None` if it is missing.
    pub(super) mode: Option<Mode>,
    /// `sslrootcert`: a file, or `system`.
    pub(super) root: Option<String>,
    /// `sslcert`
    pub(super) certificate: Option<String>,
    /// `sslkey`
    pub(super) key: Option<String>,
    /// The options about hosts.
    pub(super) hosts: Hosts,
    /// Which of [`NOTED`] are written.
    pub(super) written: Vec<&'static str>,
    /// `tcp_user_timeout`. As in libpq, 0 and less stand for the system's default.
    pub(super) user_timeout: Duration,
    /// An option that cannot be honoured, and what to do instead.
    pub(super) refused: Option<(&'static str, &'static str)>,
}

impl Ssl {
    /// Each option that names a file, with its value.
    pub(super) fn files(&self) -> impl Iterator<Item = (&'static str, &str)> {
        [("sslrootcert", &self.root), ("sslcert", &self.certificate), ("sslkey", &self.key)]
            .into_iter()
            .filter_map(|(option, value)| Some((option, value.as_deref()?)))
    }

    /// Takes out one option. Returns the text that the driver must read in its place; `None` leaves the option to the
    /// driver.
    fn take(&mut self, key: &str, value: String) -> Option<&'static str> {
        if self.hosts.take(key, &value) {
            return Some("");
        }
        self.written.extend(NOTED.into_iter().filter(|option| *option == key));
        if key == "tcp_user_timeout" {
            self.read_user_timeout(&value);
            return Some("");
        }
        let file = match key {
            "sslmode" => {
                self.mode = Mode::named(&value);
                if value == "allow" {
                    self.refused = Some(("sslmode", "`allow` is not offered; use `prefer`, or better `verify-full`"));
                    return Some("");
                }
                // The driver only needs to know that it must encrypt. The connector decides what is checked.
                return (self.mode >= Some(Mode::VerifyCa)).then_some("sslmode=require");
            }
            "sslrootcert" => &mut self.root,
            "sslcert" => &mut self.certificate,
            "sslkey" => &mut self.key,
            _ => {
                let (option, problem) = NOT_HONOURED.iter().find(|(option, _)| *option == key)?;
                // The driver supports no other encoding.
                let is_utf8 = matches!(&*value.to_ascii_lowercase(), "utf8" | "utf-8");
                if !(*option == "client_encoding" && is_utf8) {
                    self.refused = Some((option, problem));
                }
                return Some("");
            }
        };
        *file = Some(value).filter(|value| !value.is_empty());
        Some("")
    }
}

impl Ssl {
    fn read_user_timeout(&mut self, value: &str) {
        match value.trim().parse::<i32>() {
            Ok(milliseconds) => {
                self.user_timeout = Duration::from_millis(u64::try_from(milliseconds).unwrap_or_default());
            }
            Err(_) => self.refused = Some(("tcp_user_timeout", "must be a number of milliseconds of at most 31 bits")),
        }
    }
}

/// Returns the text for the driver, and the options that were taken out.
pub(super) fn split(text: &str) -> (String, Ssl) {
    let mut ssl = Ssl::default();
    let url = ["postgres://", "postgresql://"].iter().any(|scheme| text.starts_with(scheme));
    let driver = if url { split_url(text, &mut ssl) } else { split_pairs(text, &mut ssl) };
    (driver, ssl)
}

fn split_url(text: &str, ssl: &mut Ssl) -> String {
    // The driver ends the credentials at the first `@`, and begins the parameters at the next `?`. So does this.
    let host = text.find('@').map_or(0, |at| at + 1);
    let Some(begin) = text[host..].find('?').map(|at| host + at) else {
        return text.to_owned();
    };
    let (head, parameters) = (&text[..begin], &text[begin + 1..]);
    let mut kept = Vec::new();
    for parameter in parameters.split('&') {
        let pair = parameter.split_once('=').and_then(|(key, value)| Some((decoded(key)?, decoded(value)?)));
        match pair.and_then(|(key, value)| ssl.take(&key, value)) {
            Some("") => {}
            Some(instead) => kept.push(instead),
            None => kept.push(parameter),
        }
    }
    if kept.is_empty() { head.to_owned() } else { format!("{head}?{}", kept.join("&")) }
}

/// Undoes percent-encoding; `None` if the result is not text.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let hex = after.get(..2).filter(|_| *first == b'%');
        let byte = hex.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        bytes.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &after[2..] } else { after };
    }
    String::from_utf8(bytes).ok()
}

fn split_pairs(text: &str, ssl: &mut Ssl) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut from = 0;
    let mut pairs = Pairs { text, at: 0 };
    while let Some((span, key, value)) = pairs.next() {
        if let Some(instead) = ssl.take(key, value) {
            kept.push_str(&text[from..span.start]);
            kept.push_str(instead);
            from = span.end;
        }
    }
    kept.push_str(&text[from..]);
    kept
}

/// Reads pairs of `key = value` as the driver does, with quotes, and with a backslash before a literal character.
struct Pairs<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Pairs<'a> {
    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let rest = &self.text[self.at..];
        let taken = &rest[..rest.find(|c| !wanted(c)).unwrap_or(rest.len())];
        self.at += taken.len();
        taken
    }

    fn eat(&mut self, expected: char) -> Option<()> {
        self.text[self.at..].starts_with(expected).then(|| self.at += expected.len_utf8())
    }

    /// Returns the next pair's position, key and value. `None` at the end, and at text that cannot be read.
    fn next(&mut self) -> Option<(Range<usize>, &'a str, String)> {
        self.take_while(char::is_whitespace);
        let begin = self.at;
        let key = self.take_while(|c| c != '=' && !c.is_whitespace());
        self.take_while(char::is_whitespace);
        self.eat('=')?;
        self.take_while(char::is_whitespace);
        let quoted = self.eat('\'').is_some();
        let mut value = String::new();
        let mut escaped = false;
        for c in self.text[self.at..].chars() {
            match c {
                _ if escaped => {}
                '\'' if quoted => break,
                _ if !quoted && c.is_whitespace() => break,
                _ => {}
            }
            self.at += c.len_utf8();
            escaped = !escaped && c == '\\';
            if !escaped {
                value.push(c);
            }
        }
        if quoted {
            self.eat('\'')?;
        }
        (!key.is_empty()).then_some((begin..self.at, key, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ssl(mode: Mode, root: Option<&str>) -> Ssl {
        Ssl { mode: Some(mode), root: root.map(str::to_owned), ..Ssl::default() }
    }

    #[test]
    fn of_a_url() {
        for (text, driver, expected) in [
            ("postgres://a@b/c?sslmode=verify-full", "postgres://a@b/c?sslmode=require", ssl(Mode::VerifyFull, None)),
            (
                "postgresql://a@b/c?x=1&sslrootcert=%2Fca%20x.pem&sslmode=verify%2Dca&y=2",
                "postgresql://a@b/c?x=1&sslmode=require&y=2",
                ssl(Mode::VerifyCa, Some("/ca x.pem")),
            ),
            ("postgres://a@b/c?sslmode=prefer", "postgres://a@b/c?sslmode=prefer", ssl(Mode::Prefer, None)),
            ("postgres://a@b?sslrootcert=", "postgres://a@b", Ssl::default()),
            // The question mark belongs to the password.
            ("postgres://a:p?sslcert=x@b/c", "postgres://a:p?sslcert=x@b/c", Ssl::default()),
            (
                "postgres://a@b/c?sslcert=c&sslkey=k",
                "postgres://a@b/c",
                Ssl { certificate: Some("c".into()), key: Some("k".into()), ..Ssl::default() },
            ),
            // The driver will report these.
            ("postgres://a@b/c?sslmode=%FF", "postgres://a@b/c?sslmode=%FF", Ssl::default()),
            ("postgres://a@b/c?sslnonsense=x", "postgres://a@b/c?sslnonsense=x", Ssl::default()),
            ("postgres://a@b/c?x=1&nothing&y=", "postgres://a@b/c?x=1&nothing&y=", Ssl::default()),
            (
                "postgres://a@b/c?sslcrl=x",
                "postgres://a@b/c",
                Ssl { refused: Some(("sslcrl", "is not honoured here; remove it")), ..Ssl::default() },
            ),
        ] {
            assert_eq!(split(text), (driver.to_owned(), expected), "{text}");
        }
    }

    #[test]
    fn of_pairs() {
        for (text, driver, expected) in [
            ("dbname=a sslmode=verify-full user=b", "dbname=a sslmode=require user=b", ssl(Mode::VerifyFull, None)),
            (
                "dbname=a sslrootcert = '/it\\'s a.pem' sslmode='require'",
                "dbname=a  sslmode='require'",
                ssl(Mode::Require, Some("/it's a.pem")),
            ),
            ("password='a sslmode=verify-ca' dbname=b", "password='a sslmode=verify-ca' dbname=b", Ssl::default()),
            ("password=a\\ sslkey=x dbname=b", "password=a\\ sslkey=x dbname=b", Ssl::default()),
            ("sslrootcert=a\\ b", "", Ssl { root: Some("a b".into()), ..Ssl::default() }),
            // The driver will report these.
            ("dbname=a sslmode 'verify-full'", "dbname=a sslmode 'verify-full'", Ssl::default()),
            ("sslrootcert='a", "sslrootcert='a", Ssl::default()),
        ] {
            assert_eq!(split(text), (driver.to_owned(), expected), "{text}");
        }
    }
}
