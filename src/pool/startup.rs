//! Reads the `options` of a connection string as the server does: as arguments of its command line.

/// Returns whether these options make each transaction of a session read-only.
pub(super) fn read_only(options: &str) -> bool {
    let mut on = false;
    let mut words = words(options).into_iter();
    while let Some(word) = words.next() {
        let setting = match (word.strip_prefix("--"), word.strip_prefix("-c")) {
            (Some(long), _) => Some(long.to_owned()),
            (None, Some("")) => words.next(),
            (None, Some(rest)) => Some(rest.to_owned()),
            (None, None) => None,
        };
        let Some((name, value)) = setting.as_deref().and_then(|setting| setting.split_once('=')) else { continue };
        // The last one counts.
        if name.replace('-', "_").eq_ignore_ascii_case("default_transaction_read_only") {
            on = is_true(value);
        }
    }
    on
}

/// Splits at white space. A character after a backslash is taken literally.
fn words(options: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = options.chars();
    while let Some(c) = chars.next() {
        match c {
            c if c.is_ascii_whitespace() => words.extend(word.take()),
            '\\' => word.get_or_insert_default().extend(chars.next()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// Reads a boolean as PostgreSQL does: words may be shortened as long as they are unambiguous.
fn is_true(value: &str) -> bool {
    let value = value.trim().to_ascii_lowercase();
    let shortened = |word: &str| !value.is_empty() && word.starts_with(&value);
    value == "1" || value == "on" || shortened("true") || shortened("yes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_as_the_server_reads_them() {
        for options in [
            "-c default_transaction_read_only=on",
            "-cdefault_transaction_read_only=on",
            "--default_transaction_read_only=on",
            "--default-transaction-read-only=TRUE",
            "-c work_mem=8MB  -c DEFAULT_TRANSACTION_READ_ONLY=1",
            "-c default_transaction_read_only=off -c default_transaction_read_only=y",
            r"-c\ default_transaction_read_only=on -c search_path=a\ b -c default_transaction_read_only=tr",
        ] {
            assert!(read_only(options), "{options}");
        }
        for options in [
            "",
            "-c default_transaction_read_only=off",
            "-c default_transaction_read_only=o",
            "-c default_transaction_read_only=",
            "-c default_transaction_read_only",
            "-c",
            "default_transaction_read_only=on",
            "-c default_transaction_read_only=on -c default_transaction_read_only=false",
            "-c my.default_transaction_read_only=on",
            r"-c application_name=a\ --default_transaction_read_only=on",
        ] {
            assert!(!read_only(options), "{options}");
        }
    }
}
