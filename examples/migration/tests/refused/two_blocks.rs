//! A closure that returns one of two blocks.
use tokio_postgres_failover::{Error, Pool};

pub async fn store(pool: &Pool, pieces: i32) -> Result<(), Error> {
    pool.transaction(|tx| {
        if pieces == 0 {
            return async move { Err(Error::abort("sold out")) };
        }
        async move { Ok(tx.batch_execute("SELECT 1").await?) }
    })
    .await
}
