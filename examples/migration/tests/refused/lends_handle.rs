//! A wrapper that lends the handle.
use tokio_postgres_failover::{Error, Pool, Transaction};

async fn in_transaction<T, F, Fut>(pool: &Pool, mut work: F) -> Result<T, Error>
where
    F: FnMut(&Transaction) -> Fut,
    Fut: Future<Output = Result<T, Error>>,
{
    pool.transaction(async |tx| work(&tx).await).await
}

pub async fn store(pool: &Pool) -> Result<(), Error> {
    in_transaction(pool, async |tx: &Transaction| Ok(tx.batch_execute("SELECT 1").await?)).await
}
