//! The last events of the pool, and when they were seen, for the page. A task waits for the pool's events and does
//! nothing in between, so that somebody who opens the page after a failover still sees what happened.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use tokio::sync::watch;
use tokio_postgres_failover::view::SettledOutcome;
use tokio_postgres_failover::{Event, Pool};

/// How many entries are kept.
const KEPT: usize = 50;

/// How an entry or a member is coloured. The page has a sign and a word for it as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Tone {
    Good,
    Plain,
    Warning,
    Bad,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Entry {
    /// When it was seen last, in milliseconds since 1970.
    at: u64,
    kind: &'static str,
    tone: Tone,
    text: String,
    /// How often it was seen without another event in between.
    times: u32,
}

/// The entries, oldest first.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(transparent)]
pub(crate) struct Entries(VecDeque<Entry>);

pub(crate) struct Journal(watch::Sender<Entries>);

impl Journal {
    /// Notes down the pool's events from now on, until the pool is closed or dropped.
    pub(crate) fn keep(pool: &Pool) -> Self {
        let (entries, _) = watch::channel(Entries::default());
        let (mut events, writer) = (pool.subscribe(), entries.clone());
        tokio::spawn(async move {
            while let Some(event) = events.next().await {
                writer.send_modify(|entries| entries.note(&event, SystemTime::now()));
            }
        });
        Self(entries)
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Entries> {
        self.0.subscribe()
    }
}

impl Entries {
    fn note(&mut self, event: &Event, at: SystemTime) {
        let (kind, tone, text) = told(event);
        self.add(Entry { at: since_1970(at), kind, tone, text, times: 1 });
    }

    /// A failover settles many commits and delays many callers. Each kind of these takes one entry, so that they do not
    /// push out the loss of the primary.
    fn add(&mut self, mut entry: Entry) {
        let repeats = self.0.back().is_some_and(|last| last.kind == entry.kind && last.tone == entry.tone);
        if repeats && is_frequent(entry.kind) {
            entry.times += self.0.pop_back().map_or(0, |last| last.times);
        }
        if self.0.len() == KEPT {
            self.0.pop_front();
        }
        self.0.push_back(entry);
    }
}

fn is_frequent(kind: &str) -> bool {
    matches!(kind, "CommitSettled" | "SlowCheckout" | "LongCheckout")
}

/// Milliseconds since 1970, as JavaScript counts.
pub(crate) fn since_1970(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn seconds(duration: &Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

/// The event's name, its colour, and what it says.
fn told(event: &Event) -> (&'static str, Tone, String) {
    match event {
        Event::PrimaryLost { generation, endpoint, why, .. } => {
            ("PrimaryLost", Tone::Bad, format!("{endpoint} is lost (generation {generation}): {why}"))
        }
        Event::PrimaryFound { generation, endpoint, took, same_server, .. } => {
            let same = if *same_server { ", the same server as before" } else { "" };
            let text =
                format!("{endpoint} is the primary (generation {generation}), found after {}{same}", seconds(took));
            ("PrimaryFound", Tone::Good, text)
        }
        Event::Evicted { generation, cause, connections, why, .. } => {
            let text = format!("generation {generation} ended, connections closed: {connections} ({cause}: {why})");
            ("Evicted", Tone::Warning, text)
        }
        Event::SearchSlow { lasted, dns_failure, .. } => {
            let dns = dns_failure.as_ref().map(|failure| format!("; DNS: {failure}")).unwrap_or_default();
            ("SearchSlow", Tone::Warning, format!("no primary for {}{dns}", seconds(lasted)))
        }
        Event::Fenced { address, .. } => {
            ("Fenced", Tone::Warning, format!("{address} refuses writes: default_transaction_read_only is on"))
        }
        Event::ZombieRefused { address, timeline, newest, .. } => {
            let text = format!("{address} is an old primary: timeline {timeline}, but timeline {newest} exists");
            ("ZombieRefused", Tone::Warning, text)
        }
        Event::StrangerRefused { address, expected, found, .. } => {
            let text = format!("{address} belongs to another cluster: {found}, expected {expected}");
            ("StrangerRefused", Tone::Warning, text)
        }
        Event::ClusterAccepted { accepted, .. } => {
            let which = accepted.map_or_else(|| "the one found next".to_owned(), |accepted| accepted.to_string());
            ("ClusterAccepted", Tone::Plain, format!("the pool follows another cluster from now on: {which}"))
        }
        Event::SecondPrimary { address, .. } => {
            ("SecondPrimary", Tone::Bad, format!("{address} is writable on the timeline of the primary"))
        }
        Event::CommitSettled { outcome, took, .. } => settled(*outcome, took),
        Event::SlowCheckout { waited, .. } => {
            ("SlowCheckout", Tone::Plain, format!("a request waited {} for a connection", seconds(waited)))
        }
        Event::LongCheckout { held, place, .. } => {
            let text = format!("a connection is checked out for {}, taken at {place}", seconds(held));
            ("LongCheckout", Tone::Warning, text)
        }
        Event::Missed { events, .. } => ("Missed", Tone::Warning, format!("events that are not shown: {events}")),
        _ => ("Other", Tone::Plain, "an event that this page does not know".to_owned()),
    }
}

fn settled(outcome: SettledOutcome, took: &Duration) -> (&'static str, Tone, String) {
    let (tone, what) = match outcome {
        SettledOutcome::Committed => (Tone::Good, "it was committed".to_owned()),
        SettledOutcome::NotCommitted => (Tone::Good, "it was not committed, and runs again".to_owned()),
        SettledOutcome::Unknown(why) => (Tone::Bad, format!("it stays unknown: {why}")),
        _ => (Tone::Plain, "it was settled".to_owned()),
    };
    ("CommitSettled", tone, format!("the answer to a COMMIT was lost: {what} (after {})", seconds(took)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: &'static str, tone: Tone) -> Entry {
        Entry { at: 0, kind, tone, text: String::new(), times: 1 }
    }

    fn kinds(entries: &Entries) -> Vec<(&'static str, u32)> {
        entries.0.iter().map(|entry| (entry.kind, entry.times)).collect()
    }

    #[test]
    fn frequent_events_do_not_push_out_the_loss_of_the_primary() {
        let mut entries = Entries::default();
        entries.add(entry("PrimaryLost", Tone::Bad));
        for _ in 0..1000 {
            entries.add(entry("CommitSettled", Tone::Good));
        }
        entries.add(entry("CommitSettled", Tone::Bad));
        entries.add(entry("PrimaryFound", Tone::Good));
        entries.add(entry("PrimaryFound", Tone::Good));
        assert_eq!(
            kinds(&entries),
            [
                ("PrimaryLost", 1),
                ("CommitSettled", 1000),
                ("CommitSettled", 1),
                ("PrimaryFound", 1),
                ("PrimaryFound", 1)
            ]
        );
    }

    #[test]
    fn the_oldest_entries_go_first() {
        let mut entries = Entries::default();
        for _ in 0..2 * KEPT {
            entries.add(entry("PrimaryLost", Tone::Bad));
            entries.add(entry("PrimaryFound", Tone::Good));
        }
        assert_eq!(entries.0.len(), KEPT);
        assert_eq!(entries.0.back().map(|entry| entry.kind), Some("PrimaryFound"));
    }
}
