//! The driver's error, where this crate's is returned.
use tokio_postgres_failover::Transaction;

pub async fn tag(tx: &mut Transaction) -> Result<(), tokio_postgres::Error> {
    let nested = tx.savepoint().await?;
    nested.batch_execute("SELECT 1").await?;
    nested.rollback().await?;
    Ok(())
}
