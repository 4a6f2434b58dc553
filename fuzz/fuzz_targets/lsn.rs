//! A position in the write-ahead log: what PostgreSQL prints is read back, and nothing else is taken for one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tokio_postgres_failover::view::Lsn;

/// The rule of PostgreSQL's `pg_lsn_in`: one to eight hexadecimal digits, a slash, one to eight of them.
fn expected(text: &str) -> Option<u64> {
    let half = |digits: &str| {
        let fits = (1..=8).contains(&digits.len()) && digits.chars().all(|digit| digit.is_ascii_hexdigit());
        fits.then(|| digits.chars().fold(0, |sum, digit| sum << 4 | u64::from(digit.to_digit(16).unwrap())))
    };
    let halves: Vec<&str> = text.split('/').collect();
    match halves[..] {
        [high, low] => Some(half(high)? << 32 | half(low)?),
        _ => None,
    }
}

fuzz_target!(|text: &str| {
    match text.parse::<Lsn>() {
        Ok(lsn) => {
            assert_eq!(expected(text), Some(lsn.get()), "read wrongly: {text:?}");
            let shown = lsn.to_string();
            assert_eq!(shown.parse::<Lsn>().unwrap(), lsn, "shown and read back: {shown}");
        }
        Err(error) => {
            assert_eq!(expected(text), None, "refused: {text:?}");
            tokio_postgres_failover_fuzz::short_and_in_one_line(&error);
        }
    }
});
