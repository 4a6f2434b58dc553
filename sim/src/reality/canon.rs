//! What of an answer must be the same on both sides. Numbers of the two sides differ, so each is replaced by what it
//! means: which transaction it is older or newer than, whose process it is, when it was seen first.

use super::texts::Values;
use super::wire::Said;
use crate::sql::split_columns;

/// A transaction's mark, or its row in the ledger.
#[derive(Clone, Debug)]
pub(super) struct Mark {
    xid: u64,
    nonce: String,
    lsn: u64,
    entry: String,
    pid: String,
    backend_start: String,
    node: usize,
    timeline: u32,
}

/// What was seen on one side.
#[derive(Debug, Default)]
pub(super) struct Canon {
    pub(super) marks: Vec<Mark>,
    /// Values that are only equal or different, each with the server that showed it.
    seen: Vec<(usize, String)>,
    /// How many marks there were when something last happened to a server.
    before: usize,
    /// Servers that have had a checkpoint. Which files it removes depends on the size of a file.
    checkpointed: Vec<usize>,
}

fn lsn(text: &str) -> Option<u64> {
    let (high, low) = text.split_once('/')?;
    Some(u64::from_str_radix(high, 16).ok()? << 32 | u64::from_str_radix(low, 16).ok()?)
}

/// The number of the column whose expression has this in it.
fn column_of(text: &str, expression: &str) -> Option<usize> {
    let (before, after) = text.split_once(expression)?;
    let list = before.rsplit_once("; SELECT ").map_or(before, |(_, list)| list);
    let end = after.split_once(';').map_or(after, |(rest, _)| rest);
    let columns = format!("{list}{expression}{end}");
    split_columns(&columns).iter().position(|column| column.contains(expression))
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_time(text: &str) -> bool {
    text.split_once('.').is_some_and(|(whole, part)| is_digits(whole) && is_digits(part))
}

impl Canon {
    pub(super) fn happened(&mut self) {
        self.before = self.marks.len();
    }

    pub(super) fn checkpointed(&mut self, on: usize) {
        self.checkpointed.push(on);
    }

    /// The values of a mark, or of none.
    pub(super) fn values(&self, mark: Option<usize>) -> Values {
        let nothing = Mark {
            xid: 700,
            nonce: "0".repeat(32),
            lsn: 0x0100_0000,
            entry: "00000000-0000-4000-8000-000000000000".to_owned(),
            pid: "1".to_owned(),
            backend_start: "1.0".to_owned(),
            node: 0,
            timeline: 1,
        };
        let mark = mark.and_then(|mark| self.marks.get(mark)).cloned().unwrap_or(nothing);
        // The mark's transaction may have been committed or not.
        let outcome = |even| if even { "committed" } else { "aborted" };
        Values {
            signed: vec![format!("('{}'::xid8, '{}')", mark.xid, outcome(self.marks.len().is_multiple_of(2)))],
            xid: mark.xid.to_string(),
            nonce: mark.nonce,
            lsn: format!("{:X}/{:X}", mark.lsn >> 32, mark.lsn & 0xFFFF_FFFF),
            entry: mark.entry,
            pid: mark.pid,
            backend_start: mark.backend_start,
            timeline: format!("{:08X}", mark.timeline),
        }
    }

    /// Takes the mark out of an answer of this session, if there is one. Returns its number.
    pub(super) fn learn(
        &mut self,
        nonce: Option<&str>,
        (node, pid, backend_start): (usize, i32, &str),
        timeline: u32,
        said: &[Said],
    ) -> Option<usize> {
        let row = said.iter().find_map(|said| if let Said::Row(row) = said { Some(row) } else { None })?;
        let text = |at: usize| row.get(at).and_then(Option::as_deref).unwrap_or_default();
        let mark = match (nonce, text(0).len()) {
            (Some(nonce), _) => Mark {
                xid: text(0).parse().ok()?,
                nonce: nonce.to_owned(),
                lsn: lsn(text(1))?,
                entry: self.values(None).entry,
                pid: pid.to_string(),
                backend_start: backend_start.to_owned(),
                node,
                timeline,
            },
            (None, 36) if is_digits(text(2)) => {
                let Values { nonce, lsn: position, .. } = self.values(None);
                // The short answer leaves out the process.
                let xid = text(if row.len() == 3 { 1 } else { 2 }).parse().ok()?;
                Mark {
                    xid,
                    nonce,
                    lsn: lsn(&position)?,
                    entry: text(0).to_owned(),
                    pid: pid.to_string(),
                    backend_start: backend_start.to_owned(),
                    node,
                    timeline,
                }
            }
            _ => return None,
        };
        self.marks.push(mark);
        Some(self.marks.len() - 1)
    }

    /// An answer in words that both sides share.
    pub(super) fn of(&mut self, node: usize, pid: i32, text: &str, said: &[Said]) -> Vec<String> {
        // Which file of an older timeline is left depends on the size of a file.
        let unclear = text.contains("SELECT count(*) > 0") && self.checkpointed.contains(&node);
        let received = column_of(text, "pg_last_wal_receive_lsn()");
        let mut words = Vec::new();
        for (number, now) in said.iter().enumerate() {
            // Whether the columns are described before an error depends on when the server notices it.
            let fails = matches!(said.get(number + 1), Some(Said::Error { .. } | Said::Closed | Said::Silent));
            if fails && matches!(now, Said::Columns(_)) {
                continue;
            }
            words.push(match now {
                Said::Row(_) if unclear => "row".to_owned(),
                Said::Row(row) => {
                    let values = row.iter().map(Option::as_deref).enumerate().map(|(at, value)| match value {
                        // A standby receives whole pages of records that are not complete.
                        Some(_) if Some(at) == received => "received".to_owned(),
                        _ => self.value(node, pid, value),
                    });
                    let values: Vec<String> = values.collect();
                    format!("row ({})", values.join(", "))
                }
                Said::Columns(count) => format!("{count} columns"),
                Said::Done(tag) => tag.clone(),
                Said::Error { severity, code } => format!("{severity} {code}"),
                Said::Notice { severity, code } => format!("notice {severity} {code}"),
                Said::Ready(status) => format!("ready {status}"),
                Said::Closed => "closed".to_owned(),
                Said::Silent => "silence".to_owned(),
                Said::Other(tag) => format!("message {tag}"),
            });
        }
        words
    }

    fn value(&mut self, node: usize, pid: i32, value: Option<&str>) -> String {
        let Some(value) = value else { return "NULL".to_owned() };
        if value == pid.to_string() {
            return "own pid".to_owned();
        }
        if value.split_once(' ').is_some_and(|(process, began)| process == pid.to_string() && is_time(began)) {
            return "own pid and start".to_owned();
        }
        if let Some(position) = lsn(value).filter(|position| *position > 0) {
            return self.position(node, position);
        }
        if value.contains('\t') {
            let timelines = value.lines().map(|line| line.split('\t').next().unwrap_or_default());
            return format!("history {}", timelines.collect::<Vec<_>>().join(" "));
        }
        if is_time(value) {
            return format!("time {}", self.first_seen(node, value));
        }
        if value.len() == 36 && value.matches('-').count() == 4 {
            return format!("uuid {}", self.first_seen(usize::MAX, value));
        }
        if value.len() == 24 && value.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return format!("file of timeline {}", &value[..8]);
        }
        match value.len() {
            _ if !is_digits(value) => value.to_owned(),
            0..3 => value.to_owned(),
            3..13 => self.transaction(value.parse().unwrap_or(0)),
            13..18 => "now".to_owned(),
            _ => format!("cluster {}", self.first_seen(usize::MAX, value)),
        }
    }

    /// Compares a position with those of the server's marks since something last happened. What is lost and written
    /// anew takes other sizes on the two sides.
    fn position(&self, node: usize, position: u64) -> String {
        let marks = self.marks.iter().skip(self.before).filter(|mark| mark.node == node && mark.lsn != 0x0100_0000);
        // PostgreSQL aligns the next record, and writes more than the model does.
        let order = marks.map(|mark| if position < mark.lsn { '<' } else { '≥' });
        format!("position {}", order.collect::<String>())
    }

    fn transaction(&self, xid: u64) -> String {
        let order = self.marks.iter().map(|mark| match xid.cmp(&mark.xid) {
            std::cmp::Ordering::Less => '<',
            std::cmp::Ordering::Equal => '=',
            std::cmp::Ordering::Greater => '>',
        });
        format!("transaction {}", order.collect::<String>())
    }

    fn first_seen(&mut self, node: usize, value: &str) -> usize {
        let key = (node, value.to_owned());
        self.seen.iter().position(|seen| *seen == key).unwrap_or_else(|| {
            self.seen.push(key);
            self.seen.len() - 1
        })
    }
}
