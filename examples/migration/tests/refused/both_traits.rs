//! Both traits are imported.
use deadpool_postgres::GenericClient as _;
use tokio_postgres_failover::GenericClient;

pub async fn left<C: GenericClient + deadpool_postgres::GenericClient>(client: &C) -> Option<i32> {
    Some(client.query_one("SELECT 1", &[]).await.ok()?.get(0))
}
