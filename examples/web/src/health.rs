//! What an operator asks: none of it waits, and none of it asks the database.

use std::sync::Arc;

use axum::extract;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use tokio_postgres_failover::view::State;

use crate::Service;

/// The process runs and answers. It says nothing of the database: to restart a service because its primary is gone
/// makes a short outage a long one.
pub(crate) async fn alive() -> &'static str {
    "alive\n"
}

/// Is there a primary that has proved to be one, and answered the last heartbeat? The pool asks it each second, and
/// takes it out of the view when it refuses, or leaves a question open for two seconds: so the view itself is the
/// answer.
pub(crate) async fn ready(extract::State(service): extract::State<Arc<Service>>) -> (StatusCode, String) {
    let view = service.pool.status().view;
    match view.state {
        State::Primary { endpoint, .. } => {
            (StatusCode::OK, format!("primary {endpoint}, generation {}\n", view.generation))
        }
        State::Searching { .. } => {
            let mut reasons = vec![format!("no primary: {}", view.changed.why)];
            reasons.extend(service.pool.candidates().iter().map(ToString::to_string));
            reasons.extend(service.pool.dns_failure().map(|failure| format!("DNS: {failure}")));
            (StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n")
        }
        _ => (StatusCode::SERVICE_UNAVAILABLE, "stopping\n".to_owned()),
    }
}

/// The figures of the pool, for Prometheus.
pub(crate) async fn metrics(extract::State(service): extract::State<Arc<Service>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], service.metrics.render())
}
