//! The pool is still made by deadpool-postgres.
use tokio_postgres_failover::Pool;

pub fn start(config: &deadpool_postgres::Config) -> Option<Pool> {
    let pool = config.create_pool(None, tokio_postgres::NoTls).ok()?;
    Some(pool)
}
