//! Writes that arrive outside the primary's region are sent there, by Fly's proxy.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::Service;

/// Told to the proxy: where the request is to be sent again.
const REPLAY: HeaderName = HeaderName::from_static("fly-replay");
/// Told by the proxy: who sent the request on.
const REPLAYED: HeaderName = HeaderName::from_static("fly-replay-src");

/// Where this machine is, and where the primary is meant to be.
pub struct Region {
    outside: bool,
    replay: HeaderValue,
}

impl Region {
    /// `None` if the primary's region is no region's code.
    #[must_use]
    pub fn new(here: &str, primary: &str) -> Option<Self> {
        let a_code = !primary.is_empty() && primary.bytes().all(|byte| byte.is_ascii_lowercase());
        let replay = HeaderValue::try_from(format!("region={primary}")).ok().filter(|_| a_code)?;
        Some(Self { outside: here != primary, replay })
    }

    /// What to tell the proxy. A request that was sent on already is not sent on again: after a promotion in another
    /// region it would go round in circles. It is done here, over the longer way to the primary.
    fn elsewhere(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        (self.outside && !headers.contains_key(REPLAYED)).then(|| self.replay.clone())
    }
}

/// Before a write: its body is not read yet, and the database has not been asked.
pub(crate) async fn replay(State(service): State<Arc<Service>>, request: Request, next: Next) -> Response {
    match service.region.as_ref().and_then(|region| region.elsewhere(request.headers())) {
        // The status is for clients that come past the proxy: nothing was done.
        Some(region) => (StatusCode::CONFLICT, [(REPLAY, region)]).into_response(),
        None => next.run(request).await,
    }
}
