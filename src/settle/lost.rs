//! Ends the session of a transaction whose connection was lost. Such a session is idle in its transaction and holds its
//! locks, and the server may not learn for hours that the client is gone.

use std::time::Duration;

use tokio_postgres::{Client, Error};

use super::wal::Backend;
use crate::topology::{ServerSession, UNDISTURBED};

/// A COMMIT that is under way usually arrives within this time. If its session were ended earlier, the work would often
/// run again needlessly.
pub(crate) const LATE: Duration = Duration::from_millis(250);

/// Ends the session of a transaction for which no COMMIT was sent, so that the next run does not wait for its locks.
pub(crate) async fn end_lost(client: &Client, backend: Backend) -> Result<(), Error> {
    client.batch_execute(&format!("{UNDISTURBED} {}", end(backend, "true"))).await
}

/// As [`end_lost`], for a transaction that has left no mark and began so long ago. If a proxy has given the session to
/// somebody else since, the transaction that is open on it is younger.
pub(crate) async fn end_unmarked(client: &Client, session: ServerSession, began: Duration) -> Result<(), Error> {
    let (pid, started_at, began) = (session.pid, session.epoch(), began.as_micros());
    client
        .batch_execute(&format!(
            "{UNDISTURBED} SET LOCAL ROLE NONE; SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
              WHERE pid = {pid} AND round(extract(epoch FROM backend_start)::numeric, 6) = {started_at} \
                AND xact_start <= clock_timestamp() - interval '{began} microseconds'"
        ))
        .await
}

/// Ends the session of a transaction whose COMMIT has not arrived. A session that is committing is left alone. Also
/// ends a settler's transaction.
///
/// `late`: the connection was lost so long ago that COMMIT would have arrived by now. The session's state shows whether
/// it is idle. If `track_activities` is off, only its wait event is known: an idle session waits for its client. If the
/// server's clock was set back, the time of the session's last change is in the future.
pub(crate) async fn end_abandoned(client: &Client, backend: Backend, late: bool) -> Result<(), Error> {
    let idle = format!(
        "CASE WHEN state = 'disabled' THEN wait_event = 'ClientRead' AND {late} \
              ELSE starts_with(state, 'idle in transaction') \
                   AND (state_change < now() - interval '{LATE} milliseconds' \
                        OR state_change > clock_timestamp() AND {late}) END",
        LATE = LATE.as_millis()
    );
    client.batch_execute(&format!("ROLLBACK; {UNDISTURBED} {}", end(backend, &idle))).await
}

/// The statements that end a transaction's session on this condition. They run as the role that logged in, as the lost
/// session did: `ALTER ROLE … SET role` may have changed this session's role to one that may not see the other session.
fn end(backend: Backend, condition: &str) -> String {
    let (pid, xid) = (backend.pid, backend.short_xid());
    format!(
        "SET LOCAL ROLE NONE; SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
          WHERE pid = {pid} AND backend_xid = '{xid}'::xid AND {condition}"
    )
}
