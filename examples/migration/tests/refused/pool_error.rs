//! An error that this crate does not have.
use tokio_postgres_failover::PoolError;

pub fn say(error: &PoolError) -> String {
    error.to_string()
}
