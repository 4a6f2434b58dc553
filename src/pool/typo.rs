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
/// The most changes that count as a typing error. Two swapped letters are two changes.
const TYPO: usize = 2;

/// Returns what to change, if it is known.
pub(super) fn hint(text: &str) -> Option<String> {
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
    let unknown: Vec<&str> = keys.filter(|key| !OPTIONS.contains(key)).collect();
    if unknown.is_empty() {
        return None;
    }
    let near = |key: &str| OPTIONS.into_iter().find(|option| changes(key, option) <= TYPO);
    match unknown.into_iter().find_map(near) {
        Some(option) => Some(format!("an option is not known; perhaps `{option}` was meant")),
        None => Some(format!("an option is not known; there are {}", OPTIONS.join(", "))),
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
            ("postgres://app@my-pg.internal/app?schema=public", "there are application_name, "),
        ] {
            assert!(text.parse::<Config>().is_err(), "{text}");
            assert!(hint(text).is_some_and(|hint| hint.contains(words)), "{text}: {:?}", hint(text));
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
            assert!(!hint(text).is_some_and(|hint| hint.contains("s3cr3t")), "{text}");
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

    #[test]
    fn any_text_gets_an_answer() {
        for text in ["", "://", "=", "?", "postgres://?", "postgres://?&&=", "ä=ö", "postgres://a?ß"] {
            let _ = hint(text);
        }
        assert_eq!((changes("hots", "host"), changes("", "host"), changes("host", "host")), (2, 4, 0));
    }
}
