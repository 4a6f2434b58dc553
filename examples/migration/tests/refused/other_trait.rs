//! A helper that takes deadpool-postgres' trait.
use deadpool_postgres::GenericClient;
use tokio_postgres_failover::{Error, Pool};

async fn left(client: &impl GenericClient) -> Result<i32, tokio_postgres::Error> {
    Ok(client.query_one("SELECT 1", &[]).await?.get(0))
}

pub async fn buy(pool: &Pool) -> Result<i32, Error> {
    pool.transaction(async |tx| Ok(left(&tx).await?)).await
}
