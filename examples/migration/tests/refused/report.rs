//! A closure that returns `anyhow`'s error.
use tokio_postgres_failover::{Pool, Transaction};

async fn order(_: &Transaction) -> anyhow::Result<()> {
    Ok(())
}

pub async fn handler(pool: &Pool) -> anyhow::Result<()> {
    pool.transaction(|tx| async move {
        order(&tx).await?;
        Ok(())
    })
    .await?;
    Ok(())
}

pub async fn written(pool: &Pool) -> anyhow::Result<()> {
    Ok(pool.transaction(async |tx| -> anyhow::Result<()> { order(&tx).await }).await?)
}
