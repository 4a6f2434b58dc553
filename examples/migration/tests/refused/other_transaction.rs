//! A helper that takes deadpool-postgres' transaction.
use deadpool_postgres::Transaction;
use tokio_postgres_failover::{Error, Pool};

async fn left(tx: &Transaction<'_>) -> Result<i32, tokio_postgres::Error> {
    Ok(tx.query_one("SELECT 1", &[]).await?.get(0))
}

pub async fn buy(pool: &Pool) -> Result<i32, Error> {
    pool.transaction(async |tx| Ok(left(&tx).await?)).await
}
