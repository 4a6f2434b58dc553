//! What the service is for: orders are stored, each once, and shown.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use tokio::sync::OnceCell;
use tokio::time::Instant;
use tokio_postgres_failover::{CommitOutcome, Error, Pool};

use crate::Service;

/// The client's own name for its request: however often it is repeated, there is one order.
const KEY: &str = "idempotency-key";
const LONGEST_KEY: usize = 200;
/// When a client should try again, in seconds: the failover was longer than the deadline, and may end at any moment.
const RETRY_AFTER: &str = "2";

/// Of several that begin at the same time one makes the table, and the others find it.
const TABLE: &str = "
    SELECT pg_advisory_xact_lock(hashtext('failover-web orders'));
    CREATE TABLE IF NOT EXISTS orders (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        key text UNIQUE,
        sku text NOT NULL,
        at timestamptz NOT NULL DEFAULT now()
    )";

/// The table, made by the first request that needs it. A service with migrations has them run before it is deployed.
#[derive(Default)]
pub(crate) struct Schema(OnceCell<()>);

impl Schema {
    async fn there(&self, pool: &Pool) -> Result<(), Error> {
        let make = || pool.idempotent(async |tx| Ok(tx.batch_execute(TABLE).await?));
        self.0.get_or_try_init(make).await.copied()
    }
}

/// How many orders were stored since the start, and how many requests for one failed on the side of the service.
#[derive(Default)]
pub(crate) struct Tally {
    stored: AtomicU64,
    failed: AtomicU64,
}

impl Tally {
    fn count(&self, answer: Result<StatusCode, &Failure>) {
        match answer {
            Ok(StatusCode::CREATED) => self.stored.fetch_add(1, Ordering::Relaxed),
            Err(failure) if failure.status().is_server_error() => self.failed.fetch_add(1, Ordering::Relaxed),
            _ => return,
        };
    }
}

/// A tally with its pace, for the page.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct Measured {
    stored: u64,
    failed: u64,
    /// `None` in the first second of a viewer.
    per_second: Option<f64>,
}

/// Measures the pace of a tally over a second or more.
pub(crate) struct Pace {
    since: Instant,
    stored: u64,
    per_second: Option<f64>,
}

impl Pace {
    /// The shortest time to measure over. Two ticks may be a little less than a second apart.
    const SHORTEST: Duration = Duration::from_millis(900);

    pub(crate) fn new(tally: &Tally) -> Self {
        Self { since: Instant::now(), stored: tally.stored.load(Ordering::Relaxed), per_second: None }
    }

    pub(crate) fn measured(&mut self, tally: &Tally) -> Measured {
        let stored = tally.stored.load(Ordering::Relaxed);
        let over = self.since.elapsed();
        if over >= Self::SHORTEST {
            let new = u32::try_from(stored.saturating_sub(self.stored)).unwrap_or(u32::MAX);
            self.per_second = Some(f64::from(new) / over.as_secs_f64());
            (self.since, self.stored) = (Instant::now(), stored);
        }
        Measured { stored, failed: tally.failed.load(Ordering::Relaxed), per_second: self.per_second }
    }
}

#[derive(Deserialize)]
pub(crate) struct NewOrder {
    sku: String,
}

#[derive(Serialize)]
pub(crate) struct Order {
    id: i64,
    sku: String,
}

/// What a client is told when there is no order to show.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("there is no such order")]
    NotFound,
    #[error("{0}")]
    BadRequest(&'static str),
    #[error("this Idempotency-Key belongs to another order")]
    OtherOrder,
    #[error("the database is not available; try again")]
    Unavailable(#[source] Error),
    #[error("it is not known whether the order was stored; repeat the request with the same Idempotency-Key")]
    RepeatWithKey(#[source] Error),
    #[error("it is not known whether the order was stored; look at your orders before you repeat the request")]
    Unknown(#[source] Error),
    #[error("sorry, that did not work")]
    Internal(#[source] Error),
}

impl Failure {
    fn of(error: Error, key: Option<&str>) -> Self {
        match error {
            error if error.commit_outcome() == CommitOutcome::Unknown => match key {
                Some(_) => Self::RepeatWithKey(error),
                None => Self::Unknown(error),
            },
            Error::Unavailable(_)
            | Error::Refused(_)
            | Error::Exhausted(_)
            | Error::TimedOut { .. }
            | Error::Closed => Self::Unavailable(error),
            error => Self::Internal(error),
        }
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::OtherOrder => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Unavailable(_) | Self::RepeatWithKey(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Unknown(_) | Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

#[derive(Serialize)]
struct Told {
    error: String,
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        // The texts of the pool's errors name servers: they are for the log.
        if let Some(cause) = std::error::Error::source(&self) {
            tracing::error!(%cause, "{self}");
        }
        let status = self.status();
        let mut response = (status, Json(Told { error: self.to_string() })).into_response();
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER));
        }
        response
    }
}

/// Stores an order, once: across a failover by the pool's `transaction`, across repetitions by its key. 201 where it is
/// new, 200 where a request with this key has stored it before.
pub(crate) async fn create(
    State(service): State<Arc<Service>>,
    headers: HeaderMap,
    Json(order): Json<NewOrder>,
) -> Result<(StatusCode, Json<Order>), Failure> {
    let key = key_of(&headers)?;
    let sku = order.sku;
    if sku.is_empty() {
        return Err(Failure::BadRequest("sku is empty; name what is ordered"));
    }
    let answer = store(&service, key, &sku).await.map_err(|error| Failure::of(error, key));
    service.tally.count(answer.as_ref().map(|(status, ..)| *status));
    let (status, id, stored) = answer?;
    if stored != sku {
        return Err(Failure::OtherOrder);
    }
    Ok((status, Json(Order { id, sku })))
}

fn key_of(headers: &HeaderMap) -> Result<Option<&str>, Failure> {
    const BAD: Failure = Failure::BadRequest("Idempotency-Key is 1 to 200 visible ASCII characters, such as a UUID");
    let Some(value) = headers.get(KEY) else {
        return Ok(None);
    };
    let key = value.to_str().map_err(|_| BAD)?;
    if (1..=LONGEST_KEY).contains(&key.len()) { Ok(Some(key)) } else { Err(BAD) }
}

async fn store(service: &Service, key: Option<&str>, sku: &str) -> Result<(StatusCode, i64, String), Error> {
    service.schema.there(&service.pool).await?;
    service
        .pool
        .transaction(async |tx| {
            // Waits for a transaction that stores the same key just now.
            let insert = "INSERT INTO orders (key, sku) VALUES ($1, $2) ON CONFLICT (key) DO NOTHING RETURNING id";
            if let Some(row) = tx.query_opt(insert, &[&key, &sku]).await? {
                return Ok((StatusCode::CREATED, row.get(0), sku.to_owned()));
            }
            let row = tx.query_one("SELECT id, sku FROM orders WHERE key = $1", &[&key]).await?;
            Ok((StatusCode::OK, row.get(0), row.get(1)))
        })
        .await
}

/// Shows an order.
pub(crate) async fn show(State(service): State<Arc<Service>>, Path(id): Path<i64>) -> Result<Json<Order>, Failure> {
    let sku: Option<String> = find(&service, id).await.map_err(|error| Failure::of(error, None))?;
    sku.map(|sku| Json(Order { id, sku })).ok_or(Failure::NotFound)
}

async fn find(service: &Service, id: i64) -> Result<Option<String>, Error> {
    service.schema.there(&service.pool).await?;
    let select = "SELECT sku FROM orders WHERE id = $1";
    service.pool.read(async |tx| Ok(tx.query_opt(select, &[&id]).await?.map(|row| row.get(0)))).await
}
