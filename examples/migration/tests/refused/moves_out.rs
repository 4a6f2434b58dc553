//! A block that takes what each run needs.
use tokio_postgres_failover::{Error, Pool};

pub async fn store(pool: &Pool, name: String) -> Result<(), Error> {
    pool.transaction(|tx| async move {
        tx.execute("INSERT INTO users (name) VALUES ($1)", &[&name]).await?;
        Ok(())
    })
    .await
}
