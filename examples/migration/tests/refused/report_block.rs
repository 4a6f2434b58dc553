//! A block that returns `anyhow`'s error.
use tokio_postgres_failover::{Pool, Transaction};

async fn order(_: &Transaction) -> anyhow::Result<()> {
    Ok(())
}

pub async fn handler(pool: &Pool) -> anyhow::Result<()> {
    Ok(pool.transaction(|tx| async move { order(&tx).await }).await?)
}
