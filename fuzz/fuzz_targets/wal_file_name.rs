//! The timeline in the name of a WAL file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tokio_postgres_failover::fuzzing::timeline;
use tokio_postgres_failover_fuzz::short_and_in_one_line;

fuzz_target!(|text: &str| {
    let plain = text.len() == 24 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F'));
    match timeline(text) {
        Ok(timeline) => {
            assert!(plain, "taken for the name of a WAL file: {text:?}");
            assert_ne!(timeline, 0, "0 is no timeline: {text:?}");
            assert_eq!(format!("{timeline:08X}"), text[..8].to_ascii_uppercase(), "read wrongly: {text:?}");
        }
        Err(error) => {
            assert!(!plain || text.starts_with("00000000"), "refused: {text:?}");
            short_and_in_one_line(&error);
        }
    }
});
