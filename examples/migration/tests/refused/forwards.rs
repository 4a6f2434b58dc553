//! A wrapper with a bound that cannot be forwarded.
use tokio_postgres_failover::{Error, Pool, Transaction};

pub async fn in_transaction<T, F>(pool: &Pool, work: F) -> Result<T, Error>
where
    F: AsyncFnMut(Transaction) -> Result<T, Error>,
{
    pool.transaction(work).await
}
