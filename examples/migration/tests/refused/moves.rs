//! An `async` closure with `move`.
use tokio_postgres_failover::{Error, Pool};

pub async fn buy(pool: &Pool, sku: String) -> Result<(), Error> {
    pool.transaction(async move |tx| {
        tx.execute("INSERT INTO orders (sku) VALUES ($1)", &[&sku]).await?;
        Ok(())
    })
    .await
}
