//! The whole answer to the probe, as a server or something that pretends to be one sends it.
#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use tokio_postgres_failover::fuzzing::{hidden, report};
use tokio_postgres_failover::view::{Lsn, Role, ServerReport};
use tokio_postgres_failover_fuzz::short_and_in_one_line;

/// One value of a row: mostly something that a server sends in some column, so that whole rows are met.
#[derive(Debug)]
struct Value(Option<String>);

impl<'a> Arbitrary<'a> for Value {
    fn arbitrary(bytes: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let text = match bytes.int_in_range(0..=9)? {
            0 => return Ok(Self(None)),
            1 => (*bytes.choose(&["t", "f", "on", "off"])?).to_owned(),
            2 => i64::arbitrary(bytes)?.to_string(),
            3 => u64::arbitrary(bytes)?.to_string(),
            4 => format!("{:08X}{:08X}{:08X}", u32::arbitrary(bytes)?, u32::arbitrary(bytes)?, u32::arbitrary(bytes)?),
            5 => format!("{:X}/{:X}", u32::arbitrary(bytes)?, u32::arbitrary(bytes)?),
            _ => String::arbitrary(bytes)?,
        };
        Ok(Self(Some(text)))
    }
}

/// One column each that a good answer may hold, or anything.
#[derive(Arbitrary, Debug)]
enum Row {
    Any(Vec<Value>),
    Plausible {
        flags: [bool; 3],
        fence: Option<bool>,
        numbers: [Option<i64>; 2],
        wal: Option<[u32; 4]>,
        planted: Option<(u8, Value)>,
    },
}

impl Row {
    fn values(self) -> Vec<Option<String>> {
        let (flags, fence, numbers, wal, planted) = match self {
            Self::Any(values) => return values.into_iter().map(|value| value.0).collect(),
            Self::Plausible { flags, fence, numbers, wal, planted } => (flags, fence, numbers, wal, planted),
        };
        let mut row = vec![Some(if flags[0] { "t" } else { "f" }.to_owned())];
        row.extend(flags[1..].iter().map(|flag| Some(if *flag { "on" } else { "off" }.to_owned())));
        row.push(fence.map(|fence| if fence { "t" } else { "f" }.to_owned()));
        row.push(numbers[0].map(|number| number.to_string()));
        row.push(numbers[1].map(seconds));
        row.push(wal.map(|wal| format!("{:08X}{:08X}{:08X}", wal[0], wal[1], wal[2])));
        row.push(wal.map(|wal| format!("{:X}/{:X}", wal[1], wal[3])));
        row.push(wal.map(|wal| format!("{:X}/{:X}", wal[1], wal[2])));
        row.push(numbers[1].map(seconds));
        row.push(wal.map(|wal| wal[0].to_string()));
        row.push(fence.map(|fence| if fence { "function" } else { "none" }.to_owned()));
        if let Some((column, Value(value))) = planted {
            row[usize::from(column % 12)] = value;
        }
        row
    }
}

/// Microseconds as PostgreSQL prints seconds.
fn seconds(micros: i64) -> String {
    let (sign, magnitude) = if micros < 0 { ("-", micros.unsigned_abs()) } else { ("", micros.unsigned_abs()) };
    format!("{sign}{}.{:06}", magnitude / 1_000_000, magnitude % 1_000_000)
}

/// The same number, whatever the spelling: without a point, and with all six decimals.
fn micros(text: &str) -> i128 {
    let decimals = text.split_once('.').map_or(0, |(_, decimals)| decimals.len());
    let digits: i128 = text.replace('.', "").parse().unwrap();
    digits * 10_i128.pow(u32::try_from(6 - decimals).unwrap())
}

fn flag(text: Option<&str>) -> Option<bool> {
    match text? {
        "t" | "on" => Some(true),
        "f" | "off" => Some(false),
        _ => None,
    }
}

/// A boolean setting as an administrator may write it: all forms that PostgreSQL takes.
fn setting(text: Option<&str>) -> Option<bool> {
    match text?.to_ascii_lowercase().as_str() {
        "t" | "tr" | "tru" | "true" | "y" | "ye" | "yes" | "on" | "1" => Some(true),
        "f" | "fa" | "fal" | "fals" | "false" | "n" | "no" | "of" | "off" | "0" => Some(false),
        _ => None,
    }
}

/// What the row says of the role, read apart from the crate.
fn role(row: &[Option<&str>]) -> Option<Role> {
    let column = |index: usize| flag(row.get(index).copied().flatten());
    Some(match (column(0)?, column(1)?, column(2)?) {
        (true, _, _) => Role::Standby,
        (false, _, true) => Role::Fenced,
        (false, true, false) => Role::Promoting,
        (false, false, false) => Role::Primary,
    })
}

/// Each value that was believed is the one that the row holds.
fn says_what_the_row_says(report: &ServerReport, row: &[Option<&str>]) {
    let column = |index: usize| row.get(index).copied().flatten();
    assert_eq!(role(row), Some(report.role()), "{row:?}");
    assert_eq!(Some(report.in_recovery), flag(column(0)), "{row:?}");
    assert_eq!(Some(report.read_only), flag(column(1)), "{row:?}");
    assert_eq!(Some(report.default_read_only), flag(column(2)), "{row:?}");
    let (fence_pending, started_at, stats_reset) = hidden(report);
    match column(3) {
        None => assert!(!fence_pending, "{row:?}"),
        fence => assert_eq!(setting(fence), Some(fence_pending), "{row:?}"),
    }
    let identifier = column(4).map(|text| text.parse::<i64>().unwrap().cast_unsigned());
    assert_eq!(report.system_identifier, identifier, "{row:?}");
    assert_eq!(started_at.map(i128::from), column(5).map(micros), "{row:?}");
    // No clock of a server causes a panic.
    let _ = report.started_at();
    assert_eq!(stats_reset.map(i128::from), column(9).map(micros), "{row:?}");
    assert_eq!(report.checkpointed, column(10).and_then(|text| text.parse().ok()), "{row:?}");
    assert_ne!(report.timeline, Some(0), "{row:?}");
    assert_eq!(report.timeline, column(6).map(|name| u32::from_str_radix(&name[..8], 16).unwrap()), "{row:?}");
    assert_eq!(report.wal, column(7).map(|text| text.parse::<Lsn>().unwrap()), "{row:?}");
}

fuzz_target!(|row: Row| {
    let row = row.values();
    let row: Vec<Option<&str>> = row.iter().map(Option::as_deref).collect();
    let answer = report(&row);
    assert_eq!(answer, report(&row), "the same row, read twice");
    match answer {
        Ok(report) => says_what_the_row_says(&report, &row),
        Err(error) => short_and_in_one_line(&error),
    }
});
