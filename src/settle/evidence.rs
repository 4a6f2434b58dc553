//! Creates the function that shows the history of a server's WAL.

use tokio_postgres::{Client, Error};

use crate::topology::Evidence;

/// The documented SQL file.
const DDL: &str = include_str!("../../sql/history.sql");

impl Evidence {
    /// Returns the statements that [`Evidence::install`] runs: `sql/history.sql`.
    #[must_use]
    pub fn ddl() -> &'static str {
        DDL
    }

    /// Creates the schema `failover` and the function `failover.wal_history` in it: either both or nothing. Only a
    /// superuser may do so, because the function reads files of the server. Idempotent. Cancel-safe.
    ///
    /// `client` must be connected to the primary, to the database that the pool uses. Afterwards grant the pool's role
    /// what the end of [`Evidence::ddl`] lists. The pool notices the function at its next heartbeat, and
    /// [`Status::evidence`] shows it.
    ///
    /// ```no_run
    /// # async fn example(admin: tokio_postgres::Client) -> Result<(), tokio_postgres::Error> {
    /// use tokio_postgres_failover::view::Evidence;
    ///
    /// Evidence::install(&admin).await?;
    /// admin.batch_execute("GRANT USAGE ON SCHEMA failover TO app").await?;
    /// admin.batch_execute("GRANT EXECUTE ON FUNCTION failover.wal_history TO app").await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// [`Status::evidence`]: crate::view::Status::evidence
    pub async fn install(client: &Client) -> Result<(), Error> {
        client.batch_execute(DDL).await
    }
}
