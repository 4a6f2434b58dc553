//! `--watch`: a live table on a terminal, a line for each change elsewhere, or JSON.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;
use tokio::time::timeout;
use tokio_postgres_failover::{Event, Pool};

use crate::look::Look;
use crate::table;

/// The longest time between two looks.
const EVERY: Duration = Duration::from_secs(1);
/// How many events the live table shows.
const EVENTS: usize = 12;

/// Shows the servers until the pool is closed or the output is.
pub(crate) async fn run(pool: &Pool, json: bool) {
    let mut events = pool.subscribe();
    let mut show: Box<dyn Show> = match (json, io::stdout().is_terminal()) {
        (true, _) => Box::new(Json::default()),
        (false, true) => Box::new(Screen::default()),
        (false, false) => Box::new(Lines::default()),
    };
    loop {
        let event = match timeout(EVERY, events.next()).await {
            Ok(Some(event)) => Some(words(&event)),
            Ok(None) => return,
            Err(_) => None,
        };
        let text = show.text(&Look::at(pool, None), event.as_deref(), SystemTime::now());
        let mut out = io::stdout().lock();
        if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
            return;
        }
    }
}

/// One way to show looks and events. Returns what is to be printed.
trait Show {
    fn text(&mut self, look: &Look, event: Option<&str>, at: SystemTime) -> String;
}

/// The live table.
#[derive(Default)]
struct Screen {
    events: VecDeque<String>,
}

impl Show for Screen {
    fn text(&mut self, look: &Look, event: Option<&str>, at: SystemTime) -> String {
        self.events.extend(event.map(|event| format!("{}  {}", clock(at), table::clean(event))));
        while self.events.len() > EVENTS {
            self.events.pop_front();
        }
        let mut lines = vec![format!("{}  (Ctrl-C ends this)", clock(at)), String::new()];
        lines.extend(look.lines());
        lines.push(String::new());
        lines.extend(self.events.iter().cloned());
        // Home; each line clears its rest, so that nothing flickers; then the rest of the screen is cleared.
        let body = lines.join("\x1b[K\r\n");
        format!("\x1b[H{body}\x1b[K\r\n\x1b[J")
    }
}

/// What was shown last.
#[derive(Default, PartialEq)]
struct Shown {
    servers: BTreeMap<String, String>,
    sentence: String,
}

impl Shown {
    fn of(look: &Look) -> Self {
        Self { servers: table::told(&look.candidates), sentence: look.sentence.clone() }
    }
}

/// A line for each event, for each server that has changed, and for a new verdict.
#[derive(Default)]
struct Lines(Shown);

impl Show for Lines {
    fn text(&mut self, look: &Look, event: Option<&str>, at: SystemTime) -> String {
        let old = std::mem::replace(&mut self.0, Shown::of(look));
        let new = &self.0;
        let mut lines: Vec<String> = event.map(str::to_owned).into_iter().collect();
        let changed = new.servers.iter().filter(|(address, told)| old.servers.get(*address) != Some(told));
        lines.extend(changed.map(|(address, told)| format!("{address}: {told}")));
        let gone = old.servers.keys().filter(|address| !new.servers.contains_key(*address));
        lines.extend(gone.map(|address| format!("{address}: no candidate any more")));
        if old.sentence != new.sentence {
            lines.push(new.sentence.clone());
        }
        lines.iter().flat_map(|line| [clock(at), "  ".to_owned(), table::clean(line), "\n".to_owned()]).collect()
    }
}

/// An object for each event and each change.
#[derive(Default)]
struct Json(Shown);

impl Show for Json {
    fn text(&mut self, look: &Look, event: Option<&str>, at: SystemTime) -> String {
        let old = std::mem::replace(&mut self.0, Shown::of(look));
        if event.is_none() && self.0 == old {
            return String::new();
        }
        let mut object = look.json();
        object["at"] = json!(at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
        object["event"] = json!(event);
        format!("{object}\n")
    }
}

/// An event in a few words.
fn words(event: &Event) -> String {
    match event {
        Event::PrimaryFound { endpoint, took, .. } => {
            format!("primary found: {endpoint}, after {:.1} s", took.as_secs_f64())
        }
        Event::PrimaryLost { endpoint, why, .. } => format!("primary lost: {endpoint}: {why}"),
        Event::Evicted { connections, why, .. } => format!("a pool would close its connections ({connections}): {why}"),
        Event::Fenced { address, .. } => format!("fenced: {address}"),
        Event::ZombieRefused { address, timeline, newest, .. } => {
            format!("old primary refused: {address}, timeline {timeline}, but timeline {newest} exists")
        }
        Event::StrangerRefused { address, .. } => format!("refused, as it belongs to another cluster: {address}"),
        Event::SecondPrimary { address, .. } => format!("a second writable primary: {address}"),
        Event::SearchSlow { lasted, .. } => format!("no primary for {:.0} s", lasted.as_secs_f64()),
        other => format!("{other:?}"),
    }
}

/// The time of day in UTC.
fn clock(at: SystemTime) -> String {
    let seconds = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() % 86_400;
    format!("{:02}:{:02}:{:02}Z", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn look(sentence: &str) -> Look {
        Look::without_servers(sentence)
    }

    fn noon() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(86_400 * 20_000 + 12 * 3600 + 61)
    }

    #[test]
    fn lines_tell_changes_alone() {
        let mut lines = Lines::default();
        assert_eq!(lines.text(&look("It waits."), None, noon()), "12:01:01Z  It waits.\n");
        assert_eq!(lines.text(&look("It waits."), None, noon()), "");
        let text = lines.text(&look("It would use a."), Some("primary found: a"), noon());
        assert_eq!(text, "12:01:01Z  primary found: a\n12:01:01Z  It would use a.\n");
    }

    /// Whatever a server says.
    #[test]
    fn nothing_steers_the_terminal() {
        let hostile = "FATAL: \u{1b}]0;title\u{7}\u{9b}2J";
        let text = Lines::default().text(&look(hostile), Some(hostile), noon());
        assert!(!text.replace('\n', "").contains(char::is_control), "{text:?}");
        let text = Screen::default().text(&look(hostile), Some(hostile), noon());
        assert!(!text.contains("\u{1b}]") && !text.contains(['\u{7}', '\u{9b}']), "{text:?}");
        assert!(!look(hostile).lines().concat().contains(char::is_control));
    }

    #[test]
    fn json_tells_changes_alone() {
        let mut json = Json::default();
        let text = json.text(&look("It waits."), None, noon());
        let object: Value = serde_json::from_str(&text).unwrap_or_default();
        assert_eq!((object["verdict"].as_str(), object["event"].as_str()), (Some("It waits."), None), "{text}");
        assert_eq!(json.text(&look("It waits."), None, noon()), "");
        assert!(json.text(&look("It waits."), Some("primary lost: a"), noon()).contains("primary lost: a"));
    }

    #[test]
    fn the_screen_shows_the_last_events() {
        let mut screen = Screen::default();
        let mut text = String::new();
        for number in 0..=EVENTS {
            text = screen.text(&look("It waits."), Some(&format!("event {number}.")), noon());
        }
        assert!(text.starts_with("\x1b[H12:01:01Z") && text.ends_with("\x1b[J"), "{text:?}");
        assert!(text.contains("It waits.") && text.contains(&format!("event {EVENTS}.")), "{text:?}");
        assert!(!text.contains("event 0."), "{text:?}");
    }
}
