//! A reader of the server-sent events that feed the page.

use std::collections::VecDeque;
use std::net::SocketAddr;

use http_body_util::BodyExt;
use hyper::StatusCode;
use hyper::body::Incoming;
use serde_json::Value;
use tokio::time::timeout;

use crate::LONG;
use crate::client::Client;

pub(crate) struct Viewer {
    body: Incoming,
    unread: Vec<u8>,
    /// What came between two messages that were waited for.
    messages: VecDeque<Message>,
    /// All that was read.
    pub(crate) read: String,
    _client: Client,
}

#[derive(Debug)]
pub(crate) struct Message {
    kind: String,
    data: Value,
}

fn message(text: &str) -> Message {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim_start);
    let data = field("data:").unwrap_or_else(|| panic!("no data: {text}"));
    let data = serde_json::from_str(data).unwrap_or_else(|_| Value::from(data));
    Message { kind: field("event:").unwrap_or_default().to_owned(), data }
}

impl Viewer {
    pub(crate) async fn open(service: SocketAddr) -> Self {
        Self::try_open(service).await.unwrap_or_else(|status| panic!("/events: {status}"))
    }

    pub(crate) async fn try_open(service: SocketAddr) -> Result<Self, StatusCode> {
        let mut client = Client::connect(service).await.unwrap();
        let (status, body) = client.open("/events").await.unwrap();
        let (unread, messages, read) = Default::default();
        let viewer = Self { body, unread, messages, read, _client: client };
        if status == StatusCode::OK { Ok(viewer) } else { Err(status) }
    }

    /// The next message; `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<Message> {
        while self.messages.is_empty() {
            let frame = timeout(LONG, self.body.frame()).await.expect("a message in time")?;
            let bytes = frame.expect("a whole stream").into_data().expect("data");
            self.unread.extend_from_slice(&bytes);
            while let Some(end) = self.unread.windows(2).position(|pair| pair == b"\n\n") {
                let text = String::from_utf8(self.unread.drain(..end + 2).collect()).unwrap();
                self.messages.push_back(message(&text));
                self.read.push_str(&text);
            }
        }
        self.messages.pop_front()
    }

    /// Reads on to a message of this kind that is as wanted.
    async fn until(&mut self, kind: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut last = None;
        let found = async {
            loop {
                let message = self.next().await.unwrap_or_else(|| panic!("the stream ended before {what}"));
                if message.kind == kind && wanted(&message.data) {
                    return message.data;
                }
                last = Some(message);
            }
        };
        let found = timeout(LONG, found).await.ok();
        found.unwrap_or_else(|| panic!("the page does not show {what}: {last:?}"))
    }

    pub(crate) async fn status(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        self.until("status", what, wanted).await
    }

    pub(crate) async fn events(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        self.until("events", what, wanted).await
    }

    /// Reads to the end of the stream, which says that the service stops.
    pub(crate) async fn ends(mut self) {
        let mut last = None;
        while let Some(message) = self.next().await {
            last = Some(message);
        }
        assert_eq!(last.expect("a last message").kind, "stopping");
    }
}

/// What a list of events says of the primary, oldest first.
pub(crate) fn of_the_primary(events: &Value) -> Vec<(&str, &str)> {
    let events = events.as_array().unwrap().iter();
    let events = events.map(|event| (event["kind"].as_str().unwrap(), event["text"].as_str().unwrap()));
    events.filter(|(kind, _)| ["PrimaryFound", "PrimaryLost"].contains(kind)).collect()
}

/// Whether this primary was lost, and that one found afterwards.
pub(crate) fn has_failed_over(events: &Value, from: SocketAddr, to: SocketAddr) -> bool {
    let [from, to] = [from, to].map(|address| format!("{address} "));
    let of_the_primary = of_the_primary(events);
    let lost = of_the_primary.iter().position(|(kind, text)| *kind == "PrimaryLost" && text.starts_with(&from));
    let found = of_the_primary.iter().rposition(|(kind, text)| *kind == "PrimaryFound" && text.starts_with(&to));
    lost.zip(found).is_some_and(|(lost, found)| lost < found)
}
