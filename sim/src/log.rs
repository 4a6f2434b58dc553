//! A server's write-ahead log: records with their positions, and what they say about transactions.

use std::collections::BTreeMap;

/// Where the first record begins. The log never reaches the next segment.
const BASE: u64 = 0x0300_0028 + 4096;

/// The size of a page.
const PAGE: u64 = 8192;

/// What a record says. Sizes are those of PostgreSQL, roughly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Mark {
        xid: u64,
        nonce: String,
    },
    Message {
        xid: u64,
    },
    Insert {
        xid: u64,
        row: Row,
    },
    /// A row of the ledger.
    Entry {
        xid: u64,
        id: u64,
        fence: bool,
    },
    Commit {
        xid: u64,
    },
    Abort {
        xid: u64,
    },
    Checkpoint {
        /// The newest id that was given out.
        newest_xid: u64,
    },
    EndOfRecovery,
}

/// A row of the load's table: the call that wrote it, and the attempt of that call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Row {
    pub(crate) call: i64,
    pub(crate) attempt: i64,
}

impl What {
    fn size(&self) -> u64 {
        match self {
            Self::Mark { .. } => 104,
            Self::Message { .. } => 64,
            Self::Insert { .. } => 72,
            Self::Entry { .. } => 96,
            Self::Commit { .. } | Self::Abort { .. } => 40,
            Self::Checkpoint { .. } => 120,
            Self::EndOfRecovery => 48,
        }
    }

    /// The transaction whose id this record carries, or the newest one of a checkpoint.
    pub(crate) fn xid(&self) -> Option<u64> {
        match self {
            Self::Mark { xid, .. }
            | Self::Message { xid }
            | Self::Insert { xid, .. }
            | Self::Entry { xid, .. }
            | Self::Commit { xid }
            | Self::Abort { xid } => Some(*xid),
            Self::Checkpoint { newest_xid } => Some(*newest_xid),
            Self::EndOfRecovery => None,
        }
    }
}

/// A record. Two records with the same serial number are the same one, on two servers.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) serial: u64,
    pub(crate) end: u64,
    pub(crate) what: What,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Log {
    records: Vec<Record>,
    /// How many records are on the disk.
    flushed: usize,
    /// The outcome of each transaction whose end is in the log.
    outcomes: BTreeMap<u64, bool>,
    newest_xid: u64,
    /// The ledger's rows by their ids: the transaction that wrote each one, and whether it is a settler's.
    entries: BTreeMap<u64, Vec<(u64, bool)>>,
}

impl Log {
    pub(crate) fn entries(&self, id: u64) -> &[(u64, bool)] {
        self.entries.get(&id).map(Vec::as_slice).unwrap_or_default()
    }

    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }

    pub(crate) fn flushed(&self) -> usize {
        self.flushed
    }

    pub(crate) fn records(&self) -> &[Record] {
        &self.records
    }

    /// The position behind the first `records` records.
    pub(crate) fn position(&self, records: usize) -> u64 {
        records.checked_sub(1).and_then(|last| self.records.get(last)).map_or(BASE, |record| record.end)
    }

    pub(crate) fn end(&self) -> u64 {
        self.position(self.records.len())
    }

    /// The end of the last page that is full. The server writes whole pages, whether or not a record ends with them.
    pub(crate) fn full_pages(&self) -> u64 {
        self.end() / PAGE * PAGE
    }

    pub(crate) fn append(&mut self, serial: u64, what: What) -> usize {
        let end = self.end() + what.size();
        self.note(&what);
        self.records.push(Record { serial, end, what });
        self.records.len()
    }

    fn note(&mut self, what: &What) {
        self.newest_xid = self.newest_xid.max(what.xid().unwrap_or(0));
        match what {
            What::Commit { xid } => drop(self.outcomes.insert(*xid, true)),
            What::Abort { xid } => drop(self.outcomes.insert(*xid, false)),
            What::Entry { xid, id, fence } => self.entries.entry(*id).or_default().push((*xid, *fence)),
            _ => {}
        }
    }

    pub(crate) fn flush(&mut self, records: usize) {
        self.flushed = self.flushed.max(records.min(self.records.len()));
    }

    /// Loses what is behind the first `records` records.
    pub(crate) fn truncate(&mut self, records: usize) {
        if records >= self.records.len() {
            return;
        }
        self.records.truncate(records);
        self.flushed = self.flushed.min(records);
        self.outcomes.clear();
        self.entries.clear();
        self.newest_xid = 0;
        let kept = std::mem::take(&mut self.records);
        for record in &kept {
            self.note(&record.what);
        }
        self.records = kept;
    }

    /// The greatest transaction id in the log, or 0.
    pub(crate) fn newest_xid(&self) -> u64 {
        self.newest_xid
    }

    pub(crate) fn outcome(&self, xid: u64) -> Option<bool> {
        self.outcomes.get(&xid).copied()
    }

    /// Returns whether the whole log is the beginning of the other one.
    pub(crate) fn is_prefix_of(&self, other: &Self) -> bool {
        let serial = |log: &Self, at: usize| log.records.get(at).map(|record| record.serial);
        match self.records.len().checked_sub(1) {
            None => true,
            Some(last) => serial(self, last) == serial(other, last),
        }
    }

    /// How many first records both have in common.
    pub(crate) fn common_with(&self, other: &Self) -> usize {
        self.records.iter().zip(&other.records).take_while(|(own, others)| own.serial == others.serial).count()
    }

    /// Copies what the other log has on its disk and this one lacks.
    pub(crate) fn receive(&mut self, other: &Self) {
        for record in other.records.iter().take(other.flushed).skip(self.records.len()) {
            self.note(&record.what);
            self.records.push(record.clone());
        }
        self.flushed = self.records.len();
    }

    /// The record that ends at this position.
    pub(crate) fn ending_at(&self, position: u64) -> Option<&Record> {
        let at = self.records.binary_search_by_key(&position, |record| record.end).ok()?;
        self.records.get(at)
    }

    /// Returns whether the work of this call is committed here.
    pub(crate) fn has(&self, call: i64) -> bool {
        self.records.iter().rev().any(|record| match &record.what {
            What::Insert { xid, row } => row.call == call && self.outcome(*xid) == Some(true),
            _ => false,
        })
    }

    /// The committed rows, in the order of their commits.
    pub(crate) fn rows(&self) -> impl Iterator<Item = Row> + '_ {
        self.records.iter().filter_map(|record| match &record.what {
            What::Insert { xid, row } if self.outcome(*xid) == Some(true) => Some(*row),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_was_cut_and_written_anew_is_no_prefix() {
        let mut old = Log::default();
        for serial in 1..=4 {
            old.append(serial, What::Commit { xid: serial });
        }
        let mut new = old.clone();
        new.truncate(2);
        assert!(new.is_prefix_of(&old));
        assert_eq!((new.newest_xid(), new.outcome(3)), (2, None));
        new.append(9, What::Abort { xid: 3 });
        assert!(!new.is_prefix_of(&old));
        assert_eq!((new.common_with(&old), new.outcome(3)), (2, Some(false)));
        assert_eq!(new.ending_at(new.end()).map(|record| record.serial), Some(9));
    }
}
