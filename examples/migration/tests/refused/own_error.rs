//! An error of the program's own, which this crate's knows nothing of.
use tokio_postgres_failover::{Error, Pool};

pub async fn buy(pool: &Pool, pieces: &str) -> Result<i32, Error> {
    pool.transaction(async |_| Ok(pieces.parse::<i32>()?)).await
}
