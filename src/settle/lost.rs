//! Ends the session of a transaction whose connection was lost. Such a session is idle in its transaction and holds its
//! locks, and the server may not learn for hours that the client is gone.

use std::time::Duration;

use tokio_postgres::{Client, Error};

use super::wal::Backend;
use crate::server::rows;
use crate::topology::{ServerSession, UNDISTURBED};

/// A COMMIT that is under way usually arrives within this time. If its session were ended earlier, the work would often
/// run again needlessly.
pub(crate) const LATE: Duration = Duration::from_millis(250);

/// True if a session is idle in its transaction, as its state shows. If `track_activities` is off, only its wait event
/// is known: an idle session waits for its client.
const IDLE: &str = "CASE WHEN state = 'disabled' THEN wait_event = 'ClientRead' \
                         ELSE starts_with(state, 'idle in transaction') END";

/// True if an idle session has been idle for so long that no COMMIT is under way to it. If the server's clock was set
/// back, the time of the session's last change is in the future.
fn idle_for_long(late: bool) -> String {
    format!(
        "CASE WHEN state = 'disabled' THEN {late} \
              ELSE state_change < now() - interval '{LATE} milliseconds' \
                   OR state_change > clock_timestamp() AND {late} END",
        LATE = LATE.as_millis()
    )
}

/// Whose session is meant.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Whose {
    Marked(Backend),
    /// That of a transaction that has left no mark and began so long ago. If a proxy has given the session to somebody
    /// else since, the transaction that is open on it is younger.
    Unmarked(ServerSession, Duration),
}

impl Whose {
    /// The condition by which `pg_stat_activity` shows the session.
    fn is_it(self) -> String {
        match self {
            Self::Marked(backend) => {
                format!("pid = {} AND backend_xid = '{}'::xid", backend.pid, backend.short_xid())
            }
            Self::Unmarked(session, began) => {
                let (pid, started_at, began) = (session.pid, session.epoch(), began.as_micros());
                // As a text, a number of microseconds could not be larger than 2^31 before PostgreSQL 15.
                format!(
                    "pid = {pid} AND round(extract(epoch FROM backend_start)::numeric, 6) = {started_at} \
                     AND xact_start <= clock_timestamp() - make_interval(secs => {began} / 1000000.0)"
                )
            }
        }
    }
}

/// Ends the session of a transaction for which no COMMIT was sent, so that the next run does not wait for its locks.
pub(crate) async fn end_lost(client: &Client, whose: Whose) -> Result<(), Error> {
    client.batch_execute(&format!("{UNDISTURBED} {}", end("pg_terminate_backend(pid)", &whose.is_it()))).await
}

/// As [`end_abandoned`], outside of a transaction. Returns whether COMMIT may still arrive: the session is idle in its
/// transaction, and has not been for long.
pub(crate) async fn end_in_doubt(client: &Client, whose: Whose, late: bool) -> Result<bool, Error> {
    let answer = format!("CASE WHEN {} THEN pg_terminate_backend(pid) END", idle_for_long(late));
    let sql = format!("{UNDISTURBED} {}", end(&answer, &format!("{} AND {IDLE}", whose.is_it())));
    Ok(rows(client, &sql).await?.iter().any(|row| row.first().is_some_and(Option::is_none)))
}

/// Ends the session of a transaction whose COMMIT has not arrived. A session that is committing is left alone. Also
/// ends a settler's transaction.
///
/// `late`: the connection was lost so long ago that COMMIT would have arrived by now.
pub(crate) async fn end_abandoned(client: &Client, backend: Backend, late: bool) -> Result<(), Error> {
    let idle = format!("{} AND {IDLE} AND {}", Whose::Marked(backend).is_it(), idle_for_long(late));
    client.batch_execute(&format!("ROLLBACK; {UNDISTURBED} {}", end("pg_terminate_backend(pid)", &idle))).await
}

/// The statements that ask this of the sessions that meet the condition. They run as the role that logged in, as the
/// lost session did: `ALTER ROLE … SET role` may have changed this session's role to one that may not see the other
/// session.
fn end(answer: &str, condition: &str) -> String {
    format!("SET LOCAL ROLE NONE; SELECT {answer} FROM pg_stat_activity WHERE {condition}")
}
