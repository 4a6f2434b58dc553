//! The same without `move`.
use tokio_postgres_failover::{Error, Pool};

pub async fn store(pool: &Pool, name: String) -> Result<(), Error> {
    pool.transaction(|tx| async {
        tx.execute("INSERT INTO users (name) VALUES ($1)", &[&name]).await?;
        Ok(())
    })
    .await
}
