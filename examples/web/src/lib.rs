//! A small web service that takes orders, as an example of a service over [`tokio_postgres_failover`]: it rides through
//! a failover without a failed request. README.md in this folder says how to run and deploy it.
//!
//! [`Service::new`] makes it, [`Service::serve`] runs it until it is told to stop.

mod config;
mod health;
mod journal;
mod live;
mod orders;
mod region;
mod status;

use std::future::{Future, IntoFuture, pending};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{get, post};
use metrics_exporter_prometheus::{
    BuildError as MetricsError, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::time::{interval, sleep, timeout};
use tokio_postgres_failover::{BuildError, Pool, RetryPolicy};

pub use config::{BadConfig, Config};
pub use region::Region;

/// How long the last answers may take once the pool is closed: nothing waits for a server any more.
const LAST_ANSWERS: Duration = Duration::from_secs(2);
/// How often the samples of the histograms are put into their buckets, whether or not somebody reads them.
const UPKEEP: Duration = Duration::from_secs(5);

/// The service: the pool, and what the handlers need beside it.
pub struct Service {
    pub(crate) pool: Pool,
    pub(crate) metrics: PrometheusHandle,
    pub(crate) region: Option<Region>,
    pub(crate) schema: orders::Schema,
    pub(crate) tally: orders::Tally,
    /// The pool's last events, for the page.
    pub(crate) journal: journal::Journal,
    /// A place for each viewer of the page.
    pub(crate) viewers: Arc<Semaphore>,
    /// Whether the service was told to stop: the viewers' streams end then.
    pub(crate) stopping: watch::Sender<bool>,
    /// Each request under way holds a receiver, but no viewer does.
    under_way: watch::Sender<()>,
    drain: Duration,
}

impl Service {
    /// Makes the pool, which begins to look for the primary; whether there is one is told by `/readyz`, so a service
    /// starts without its database, too. Install the recorder of `metrics` first: the pool looks its figures up here.
    ///
    /// Call it within a Tokio runtime.
    pub fn new(config: Config, metrics: PrometheusHandle) -> Result<Self, BuildError> {
        // Waiting for a connection, all attempts and the pauses between them end at the deadline. A statement that
        // hangs for as long is cut off.
        let policy = RetryPolicy::interactive().deadline(config.deadline).attempt_timeout(config.deadline);
        let mut builder = Pool::builder(config.database_url)?
            .application_name("failover-web")
            .pool_name("orders")
            .checkout_timeout(config.deadline)
            .retry(policy);
        if !config.dns_servers.is_empty() {
            builder = builder.dns_servers(config.dns_servers);
        }
        let pool = builder.build()?;
        Ok(Self {
            journal: journal::Journal::keep(&pool),
            pool,
            metrics,
            region: config.region,
            schema: orders::Schema::default(),
            tally: orders::Tally::default(),
            viewers: Arc::new(Semaphore::new(live::VIEWERS)),
            stopping: watch::Sender::new(false),
            under_way: watch::Sender::new(()),
            drain: config.drain,
        })
    }

    /// Answers requests until `stop` ends. Then no connection is accepted any more, the requests under way are
    /// finished, and the pool is closed. Whatever still waits for a primary when the time for that is over gets its 503
    /// then.
    ///
    /// With `operators` the page, readiness and metrics, which name servers, are told there alone. Readiness and
    /// metrics are told to the end; the viewers' streams end when the service is told to stop.
    pub async fn serve(
        self,
        listener: TcpListener,
        operators: Option<TcpListener>,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<()> {
        let (pool, metrics, drain) = (self.pool.clone(), self.metrics.clone(), self.drain);
        let service = Arc::new(self);
        let (for_users, for_operators) = (users(&service), operators_only(&service));
        let (routes, operators) = match operators {
            Some(listener) => (for_users, Some(axum::serve(listener, for_operators))),
            None => (for_users.merge(for_operators), None),
        };
        let (told, stopping) = (Arc::clone(&service), Arc::clone(&service));
        let server = axum::serve(listener, routes).with_graceful_shutdown(async move {
            stop.await;
            tracing::info!("stopping: requests under way are finished");
            told.stopping.send_replace(true);
        });
        let mut server = pin!(server.into_future());
        let overdue = async {
            stopping.is_told_to_stop().await;
            sleep(drain).await;
        };
        let answered = async {
            stopping.is_told_to_stop().await;
            stopping.all_is_answered().await;
        };
        let upkeep = async {
            let mut ticks = interval(UPKEEP);
            loop {
                ticks.tick().await;
                metrics.run_upkeep();
            }
        };
        let operators = async {
            match operators {
                Some(server) => server.await,
                None => pending().await,
            }
        };
        let ended = tokio::select! {
            ended = &mut server => ended,
            () = overdue => {
                tracing::warn!(after = ?drain, "requests are still under way; the pool is closed");
                pool.close();
                timeout(LAST_ANSWERS, server).await.unwrap_or(Ok(()))
            }
            // The connections that are left are those of viewers who do not read the end of their stream.
            () = answered => Ok(()),
            ended = operators => ended,
            () = upkeep => Ok(()),
        };
        pool.close();
        ended
    }

    async fn is_told_to_stop(&self) {
        // Fails when the sender is dropped, which is a part of this service.
        let _ = self.stopping.subscribe().wait_for(|stopping| *stopping).await;
    }

    /// Waits until no request of a user is under way, and the last answers had time to arrive.
    async fn all_is_answered(&self) {
        loop {
            self.under_way.closed().await;
            sleep(LAST_ANSWERS).await;
            if self.under_way.is_closed() {
                return;
            }
        }
    }
}

/// Around each request of a user.
async fn counted(State(service): State<Arc<Service>>, request: Request, next: Next) -> Response {
    let _under_way = service.under_way.subscribe();
    next.run(request).await
}

fn users(service: &Arc<Service>) -> Router {
    let writes = Router::new()
        .route("/orders", post(orders::create))
        .route_layer(middleware::from_fn_with_state(Arc::clone(service), region::replay));
    Router::new()
        .route("/orders/{id}", get(orders::show))
        .route("/healthz", get(health::alive))
        .merge(writes)
        .layer(middleware::from_fn_with_state(Arc::clone(service), counted))
        .with_state(Arc::clone(service))
}

fn operators_only(service: &Arc<Service>) -> Router {
    Router::new()
        .route("/", get(live::page))
        .route("/events", get(live::events))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(health::metrics))
        .with_state(Arc::clone(service))
}

/// The recorder behind `/metrics`, with the names and buckets that the crate's dashboard expects.
pub fn recorder() -> Result<PrometheusRecorder, MetricsError> {
    let builder = PrometheusBuilder::new()
        .with_recommended_naming(true)
        .set_buckets(&[0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 30.0, 120.0])?;
    Ok(builder.build_recorder())
}
