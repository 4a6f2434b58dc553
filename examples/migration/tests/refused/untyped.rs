//! A block within the closure, whose error nothing names.
use tokio_postgres_failover::{Error, Pool};

pub async fn handler(pool: &Pool) -> anyhow::Result<()> {
    pool.transaction(async |tx| {
        let work = async {
            tx.batch_execute("SELECT 1").await?;
            Ok(())
        };
        work.await.map_err(Error::abort_report)
    })
    .await?;
    Ok(())
}
