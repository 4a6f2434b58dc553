//! The page in the browser, and the server-sent events that feed it.
//!
//! A viewer is a stream that hyper polls while the connection has room. Of a viewer who does not read hyper keeps a few
//! messages, and then polls it no more. Nothing else is kept for it: when it reads again it gets the newest state.
//! Without viewers nothing here runs.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use axum::extract;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_postgres_failover::view::View;

use crate::Service;
use crate::journal::Entries;
use crate::orders::Pace;
use crate::status;

/// The whole page: it loads nothing from elsewhere.
const PAGE: &str = include_str!("page.html");
/// The page's own script and style, a stream from here, and nothing else.
const ALLOWED: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; \
     connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
/// Tells nginx to pass each message on at once.
const UNBUFFERED: HeaderName = HeaderName::from_static("x-accel-buffering");
/// How often the status is sent. The page takes a longer silence for a lost connection.
const TICK: Duration = Duration::from_secs(1);
/// How many viewers there may be at once. Each costs a connection, and some kilobytes per second.
pub(crate) const VIEWERS: usize = 64;

pub(crate) async fn page() -> impl IntoResponse {
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8")),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(ALLOWED)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    (headers, PAGE)
}

/// Sends the `status` each second and whenever it changes, and the list of the last `events` whenever there is a new
/// one. Ends with `stopping` when the service stops.
pub(crate) async fn events(extract::State(service): extract::State<Arc<Service>>) -> Response {
    let Ok(place) = Arc::clone(&service.viewers).try_acquire_owned() else {
        return (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "5")], "too many viewers\n").into_response();
    };
    let messages = stream::unfold(Viewer::new(service, place), Viewer::next);
    ([(UNBUFFERED, "no")], Sse::new(messages)).into_response()
}

/// What ends a viewer's waiting.
enum Change {
    Stopping,
    Events,
    Status,
}

struct Viewer {
    service: Arc<Service>,
    view: watch::Receiver<View>,
    entries: watch::Receiver<Entries>,
    stopping: watch::Receiver<bool>,
    ticks: Interval,
    pace: Pace,
    unsent: VecDeque<Change>,
    ended: bool,
    _place: OwnedSemaphorePermit,
}

impl Viewer {
    fn new(service: Arc<Service>, place: OwnedSemaphorePermit) -> Self {
        let mut ticks = interval(TICK);
        // After a pause of the viewer one status is enough.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // A page that connects again while the service stops is told so at once.
        let unsent =
            if *service.stopping.borrow() { vec![Change::Stopping] } else { vec![Change::Events, Change::Status] };
        Self {
            view: service.pool.watch(),
            entries: service.journal.watch(),
            stopping: service.stopping.subscribe(),
            ticks,
            pace: Pace::new(&service.tally),
            unsent: unsent.into(),
            ended: false,
            _place: place,
            service,
        }
    }

    /// The next message. What it says is read when the connection has room for it, and not before.
    async fn next(mut self) -> Option<(Result<Event, axum::Error>, Self)> {
        if self.ended {
            return None;
        }
        let change = match self.unsent.pop_front() {
            Some(change) => change,
            None => self.change().await,
        };
        let message = match change {
            Change::Stopping => {
                self.ended = true;
                Ok(Event::default().event("stopping").data("the service stops"))
            }
            Change::Events => Event::default().event("events").json_data(&*self.entries.borrow_and_update()),
            Change::Status => {
                let orders = self.pace.measured(&self.service.tally);
                Event::default().event("status").json_data(status::of(&self.service.pool, orders))
            }
        };
        Some((message, self))
    }

    async fn change(&mut self) -> Change {
        tokio::select! {
            biased;
            _ = self.stopping.wait_for(|stopping| *stopping) => Change::Stopping,
            Ok(()) = self.entries.changed() => Change::Events,
            Ok(()) = self.view.changed() => Change::Status,
            _ = self.ticks.tick() => Change::Status,
        }
    }
}
