//! A closure whose block changes what the closure captures.
use tokio_postgres_failover::{Error, Pool};

pub async fn runs(pool: &Pool) -> Result<i32, Error> {
    let mut runs = 0;
    pool.transaction(|tx| {
        let runs = &mut runs;
        async move {
            *runs += 1;
            Ok(tx.batch_execute("SELECT 1").await?)
        }
    })
    .await?;
    Ok(runs)
}
