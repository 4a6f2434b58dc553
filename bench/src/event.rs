//! What a worker of a peer is told, attempt by attempt.

use std::time::{SystemTime, UNIX_EPOCH};

/// What a worker was told about one attempt to write one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// When the answer came, in microseconds since 1970, by this machine's clock.
    pub micros: u64,
    /// Which worker, counted from 0.
    pub worker: usize,
    /// The row's id.
    pub id: String,
    /// `Err` holds what the caller was told.
    pub outcome: Result<(), String>,
}

impl Event {
    /// An event of this moment.
    pub fn now(worker: usize, id: String, outcome: Result<(), String>) -> Self {
        Self { micros: now_micros(), worker, id, outcome }
    }

    /// A line of an external peer: `ok MICROS WORKER ID` or `err MICROS WORKER ID TEXT`. `None`: any other line.
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.trim_end().splitn(5, ' ');
        let kind = words.next()?;
        let micros = words.next()?.parse().ok()?;
        let worker = words.next()?.parse().ok()?;
        let id = words.next()?.to_owned();
        let outcome = match kind {
            "ok" => Ok(()),
            "err" => Err(words.next().unwrap_or_default().to_owned()),
            _ => return None,
        };
        Some(Self { micros, worker, id, outcome })
    }
}

/// This machine's clock, in microseconds since 1970.
pub fn now_micros() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_external_peers_are_read() {
        let ok = Event { micros: 17, worker: 3, id: "p-3-9".to_owned(), outcome: Ok(()) };
        assert_eq!(Event::parse("ok 17 3 p-3-9\n"), Some(ok.clone()));
        let err = Event { outcome: Err("the server went away".to_owned()), ..ok };
        assert_eq!(Event::parse("err 17 3 p-3-9 the server went away"), Some(err));
        for other in ["ready", "", "ok 17", "ok x 3 p", "warning 17 3 p-3-9"] {
            assert_eq!(Event::parse(other), None, "{other}");
        }
    }
}
