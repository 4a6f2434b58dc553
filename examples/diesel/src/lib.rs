//! diesel-async over sessions that a failover pool has verified.
//!
//! diesel-async has a pool of its own, which opens each connection by a function that the program may replace. Here
//! that function is [`Pool::dial`](tokio_postgres_failover::Pool::dial): so each connection is to the verified primary,
//! and ends when that dies or is replaced. The pool then replaces it at the next checkout. Queries do not run again by
//! themselves: a statement that is under way at that moment fails.

use diesel::{ConnectionError, ConnectionResult};
use diesel_async::AsyncPgConnection;
use diesel_async::pooled_connection::deadpool::{BuildError, Pool};
use diesel_async::pooled_connection::{AsyncDieselConnectionManager, ManagerConfig, RecyclingMethod};
use futures_util::FutureExt;
use tokio_postgres_failover::Pool as Failover;

/// A diesel-async pool of at most `max_size` connections to the verified primary.
///
/// `failover` finds the primary. It may be one pool for the whole program, and opens connections of its own only for
/// callers of its own.
pub fn pool(failover: &Failover, max_size: usize) -> Result<Pool<AsyncPgConnection>, BuildError> {
    let mut config = ManagerConfig::default();
    let failover = failover.clone();
    config.custom_setup = Box::new(move |_| connected(failover.clone()).boxed());
    // A session that was evicted is closed, which is seen without a round trip.
    config.recycling_method = RecyclingMethod::Fast;
    // The manager passes its URL to the function above, which does not need one.
    let manager = AsyncDieselConnectionManager::new_with_config("", config);
    Pool::builder(manager).max_size(max_size).build()
}

async fn connected(failover: Failover) -> ConnectionResult<AsyncPgConnection> {
    let (client, driver) = failover.dial().await.map_err(|error| ConnectionError::BadConnection(error.to_string()))?;
    tokio::spawn(driver);
    AsyncPgConnection::try_from(client).await
}
