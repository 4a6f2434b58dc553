//! An `async` closure that changes what it captures.
use tokio_postgres_failover::{Error, Pool};

pub async fn runs(pool: &Pool) -> Result<i32, Error> {
    let mut runs = 0;
    pool.transaction(async |tx| {
        runs += 1;
        Ok(tx.batch_execute("SELECT 1").await?)
    })
    .await?;
    Ok(runs)
}
