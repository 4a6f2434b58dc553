//! Explains why the driver cannot read a connection string. Repeats nothing of the text, because anything may be a
//! piece of the password.

/// The driver's options. A test compares them with the driver.
const OPTIONS: [&str; 19] = [
    "application_name",
    "channel_binding",
    "connect_timeout",
    "dbname",
    "host",
    "hostaddr",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_retries",
    "load_balance_hosts",
    "options",
    "password",
    "port",
    "sslmode",
    "sslnegotiation",
    "target_session_attrs",
    "tcp_user_timeout",
    "user",
];

/// The options that this crate takes out of the text before the driver reads it.
const OURS: [&str; 3] = ["sslcert", "sslkey", "sslrootcert"];

const SECONDS: &str = "whole seconds, as in 5";

/// What an option may be, where the driver takes not every text. A test compares this with the driver.
const VALUES: [(&str, &str); 13] = [
    ("channel_binding", "disable, prefer or require"),
    ("connect_timeout", SECONDS),
    ("hostaddr", "an IP address, as in 10.0.0.2, or one for each host"),
    ("keepalives", "0 or 1"),
    ("keepalives_idle", SECONDS),
    ("keepalives_interval", SECONDS),
    ("keepalives_retries", "a whole number, as in 3"),
    ("load_balance_hosts", "disable"),
    ("port", "a number up to 65535, as in 5432, or one for each host"),
    ("sslmode", "disable, prefer, require, verify-ca or verify-full"),
    ("sslnegotiation", "postgres or direct"),
    ("target_session_attrs", "read-write, primary or any"),
    // This crate reads it, in libpq's unit.
    ("tcp_user_timeout", "whole milliseconds, as in 15000"),
];

/// The most changes that count as a typing error. Two swapped letters are two changes.
const TYPO: usize = 2;

/// Returns what to change, if it is known. `error` is the driver's, in words.
pub(super) fn hint(text: &str, error: &str) -> Option<String> {
    value(error).or_else(|| form(text))
}

/// The driver names the option whose value it cannot read.
fn value(error: &str) -> Option<String> {
    let (_, named) = error.split_once("invalid value for option `")?;
    let (named, _) = named.split_once('`')?;
    let (option, values) = VALUES.into_iter().find(|(option, _)| *option == named)?;
    Some(format!("`{option}` is {values}"))
}

fn form(text: &str) -> Option<String> {
    let schemes = ["postgres://", "postgresql://"];
    let Some(scheme) = schemes.iter().find(|scheme| text.starts_with(**scheme)) else {
        // In `password=a://b`, the text before `://` is not a scheme.
        let another = text.split_once("://").map_or(!text.contains('='), |(scheme, _)| !scheme.contains('='));
        return if another {
            Some("it must begin with postgres:// or postgresql://".to_owned())
        } else {
            of_pairs(text)
        };
    };
    let (_, parameters) = text[scheme.len()..].split_once('?')?;
    of_options(parameters.split('&'))
}

fn of_pairs(text: &str) -> Option<String> {
    of_options(text.split_whitespace().filter(|word| word.contains('=')))
}

fn of_options<'a>(parameters: impl Iterator<Item = &'a str>) -> Option<String> {
    let keys = parameters.map(|parameter| parameter.split_once('=').map_or(parameter, |(key, _)| key));
    let all = || OPTIONS.into_iter().chain(OURS);
    let unknown: Vec<&str> = keys.filter(|key| all().all(|option| option != *key)).collect();
    if unknown.is_empty() {
        return None;
    }
    let near = |key: &str| all().find(|option| changes(key, option) <= TYPO);
    match unknown.into_iter().find_map(near) {
        Some(option) => Some(format!("an option is not known; perhaps `{option}` was meant")),
        None => Some(format!("an option is not known; there are {}", all().collect::<Vec<_>>().join(", "))),
    }
}

/// The number of letters to insert, remove or replace to turn `b` into `a`.
fn changes(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use tokio_postgres::Config;

    use super::*;
    use crate::classify::explain;

    #[test]
    fn a_typo_is_named_by_what_was_meant() {
        for (text, words) in [
            ("postgre://app@my-pg.internal/app", "must begin with postgres://"),
            ("postgres//app@my-pg.internal/app", "must begin with postgres://"),
            ("jdbc:postgresql://my-pg.internal/app?user=app", "must begin with postgres://"),
            ("my-pg.internal", "must begin with postgres://"),
            ("postgres://app@my-pg.internal/app?sslmod=disable", "perhaps `sslmode` was meant"),
            ("postgres://app@my-pg.internal/app?user=app&conect_timeout=3", "perhaps `connect_timeout` was meant"),
            ("hots=my-pg.internal user=app", "perhaps `host` was meant"),
            ("postgres://app@my-pg.internal/app?sslrootcer=ca.pem", "perhaps `sslrootcert` was meant"),
            ("postgres://app@my-pg.internal/app?schema=public", "there are application_name, "),
            ("postgres://app@my-pg.internal/app?schema=public", ", sslcert, sslkey, sslrootcert"),
            ("postgres://app@my-pg.internal:54x/app", "`port` is a number up to 65535"),
            ("postgres://app@my-pg.internal/app?sslmode=verify", "`sslmode` is disable, prefer, require, verify-ca or"),
            ("host=my-pg.internal connect_timeout=5s", "`connect_timeout` is whole seconds, as in 5"),
        ] {
            let error = explain(&text.parse::<Config>().expect_err(text));
            assert!(hint(text, &error).is_some_and(|hint| hint.contains(words)), "{text}: {:?}", hint(text, &error));
        }
    }

    #[test]
    fn nothing_of_the_text_is_repeated() {
        for text in [
            "s3cr3t://app@my-pg.internal",
            "postgres://my-pg.internal/app?password=p&s3cr3t=x",
            "postgres://my-pg.internal/app?password=p&s3cr3t",
            "host=my-pg.internal password='p s3cr3t=x'",
            "password=://s3cr3t x",
        ] {
            let error = text.parse::<Config>().map_or_else(|error| explain(&error), |_| String::new());
            assert!(!hint(text, &error).is_some_and(|hint| hint.contains("s3cr3t")), "{text}");
        }
    }

    #[test]
    fn the_options_are_the_drivers() {
        for option in OPTIONS {
            let value = match option {
                "sslmode" | "channel_binding" | "load_balance_hosts" => "disable",
                "sslnegotiation" => "postgres",
                "target_session_attrs" => "any",
                "hostaddr" => "127.0.0.1",
                _ => "1",
            };
            assert!(format!("{option}={value}").parse::<Config>().is_ok(), "{option}");
        }
    }

    /// The driver refuses another value of each of them, and of no other option.
    #[test]
    fn the_values_are_the_drivers() {
        for option in OPTIONS {
            let refused = format!("{option}=s3cr3t").parse::<Config>().map_err(|error| explain(&error)).err();
            let named = VALUES.iter().any(|(named, _)| *named == option);
            assert_eq!(refused.as_ref().is_some_and(|error| value(error).is_some()), named, "{option}: {refused:?}");
            assert_eq!(refused.is_some(), named, "{option}: {refused:?}");
        }
    }

    #[test]
    fn any_text_gets_an_answer() {
        for text in ["", "://", "=", "?", "postgres://?", "postgres://?&&=", "ä=ö", "postgres://a?ß"] {
            let _ = hint(text, text);
        }
        assert_eq!((changes("hots", "host"), changes("", "host"), changes("host", "host")), (2, 4, 0));
    }
}
