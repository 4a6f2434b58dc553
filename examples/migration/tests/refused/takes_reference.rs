//! A closure that takes a reference.
use tokio_postgres_failover::{Error, Pool, Transaction};

pub async fn store(pool: &Pool) -> Result<(), Error> {
    pool.transaction(|tx: &Transaction| async move { Ok(tx.batch_execute("SELECT 1").await?) }).await
}
