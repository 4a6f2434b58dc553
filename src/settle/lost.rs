//! Ends the session of a transaction that was lost before anybody has sent its COMMIT.

use tokio_postgres::{Client, Error};

use super::wal::Backend;
use crate::topology::UNDISTURBED;

/// Ends the server's session of a transaction for which no COMMIT was sent and whose connection was lost. The server
/// may not learn for hours that the client is gone, and until then the session holds the locks that the next run needs.
///
/// The statement runs as the role that logged in, as the lost session did.
pub(crate) async fn end_lost(client: &Client, backend: Backend) -> Result<(), Error> {
    let Backend { pid, xid } = backend;
    // `pg_stat_activity` shows the id without its epoch.
    let xid = xid & u64::from(u32::MAX);
    let sql = format!(
        "{UNDISTURBED} SET LOCAL ROLE NONE; \
         SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = {pid} AND backend_xid = '{xid}'::xid"
    );
    client.batch_execute(&sql).await
}
