//! Creates the function by which a server shows the history of its log.

use tokio_postgres::{Client, Error};

use crate::topology::Evidence;

/// The documented file.
const DDL: &str = include_str!("../../sql/history.sql");

impl Evidence {
    /// The statements that [`Evidence::install`] runs: `sql/history.sql`.
    #[must_use]
    pub fn ddl() -> &'static str {
        DDL
    }

    /// Creates the schema `failover` and the function `failover.wal_history` in it, all or nothing. Only a superuser may,
    /// as the function reads files of the server. Idempotent. Cancel-safe.
    ///
    /// `client` is a connection to the primary, to the database that the pool connects to. Afterwards grant the pool's role
    /// what the end of [`Evidence::ddl`] lists; the pool notices it at its next heart-beat, and [`Status::evidence`] shows it.
    ///
    /// ```no_run
    /// # async fn example(admin: tokio_postgres::Client) -> Result<(), tokio_postgres::Error> {
    /// use tokio_postgres_failover::Evidence;
    ///
    /// Evidence::install(&admin).await?;
    /// admin.batch_execute("GRANT USAGE ON SCHEMA failover TO app").await?;
    /// admin.batch_execute("GRANT EXECUTE ON FUNCTION failover.wal_history TO app").await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// [`Status::evidence`]: crate::Status::evidence
    pub async fn install(client: &Client) -> Result<(), Error> {
        client.batch_execute(DDL).await
    }
}
