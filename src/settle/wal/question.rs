//! What a settler asks a server about itself and about a transaction id.

use futures_util::future::join_all;
use tokio_postgres::Client;

use super::LAST_REPLAYED;
use crate::classify::not_offered;
use crate::server::rows;
use crate::settle::columns::{Column, columns, list};
use crate::topology::{CHECKPOINTED, EVIDENCE, STARTED_AT, STATS_RESET, TIMELINE, UNDISTURBED};

columns! {
    /// The answer to [`question`].
    pub(super) enum LogColumn {
        Identifier,
        StartedAt,
        Timeline,
        Replayed,
        Received,
        StatsReset,
        Status,
        Checkpointed,
        Evidence,
        Stopped,
    }
}

impl LogColumn {
    /// Returns what replaces this column if the role may not ask for it, or `None` if the rule cannot do without it.
    /// The identifier and the timeline of a verified server are known already. Without one of the others, the rule
    /// settles less.
    fn withheld(self) -> Option<&'static str> {
        match self {
            Self::Identifier
            | Self::Timeline
            | Self::Received
            | Self::StatsReset
            | Self::Checkpointed
            | Self::Evidence => Some("NULL"),
            // NULL would mean that there was no such checkpoint. This value means that nothing is proved.
            Self::Stopped => Some("'0/0'::pg_lsn"),
            Self::StartedAt | Self::Replayed | Self::Status => None,
        }
    }

    /// Returns the column's expression. `status` is the one for the status of the transaction.
    fn sql(self, status: &str) -> &str {
        match self {
            Self::Identifier => "(SELECT system_identifier FROM pg_control_system())",
            Self::StartedAt => STARTED_AT,
            Self::Timeline => TIMELINE,
            Self::Replayed => LAST_REPLAYED,
            Self::Received => RECEIVED,
            Self::StatsReset => STATS_RESET,
            Self::Status => status,
            Self::Checkpointed => CHECKPOINTED,
            Self::Evidence => EVIDENCE,
            Self::Stopped => STOPPED,
        }
    }
}

/// Returns the columns that this role may not ask for. Each one is tried alone.
pub(super) async fn refused(client: &Client) -> Vec<LogColumn> {
    let optional = LogColumn::ALL.iter().copied().filter(|column| column.withheld().is_some());
    let asked = optional.map(|column| async move {
        let answer = rows(client, &format!("{UNDISTURBED} SELECT {}", column.sql("NULL"))).await;
        answer.is_err_and(|error| not_offered(&error)).then_some(column)
    });
    join_all(asked).await.into_iter().flatten().collect()
}

/// If this is not NULL, the server has been a standby since its shared memory was last set up. It is the position that
/// a standby has received. A Patroni leader that comes back before its lease has expired receives nothing: it replays
/// its own WAL as a standby does. Such a server is recognised by the time of the last replayed commit, which archive
/// recovery notes and crash recovery does not (`recoveryStopsAfter` in `xlogrecovery.c`).
const RECEIVED: &str = "coalesce(pg_last_wal_receive_lsn(), \
                        CASE WHEN pg_last_xact_replay_timestamp() IS NOT NULL THEN pg_last_wal_replay_lsn() \
                        END)";

/// The position of the last checkpoint, if it ended a shutdown or a recovery and the last replay ended right behind it.
/// This server continues the WAL that it had before that position. A failover manager may run crash recovery in
/// single-user mode, which no client sees, before it starts the server as a standby on its own WAL; then this position
/// shows it. If WAL is archived, as under Patroni, a shutdown begins a new segment first. Then the checkpoint is the
/// first record of that segment, however far the recovery had come in the segment before. Such a checkpoint proves
/// nothing, so this is `0/0`.
const STOPPED: &str = "(SELECT CASE WHEN checkpoint_lsn - '0/0' - bytes_per_wal_segment * \
                                        div(checkpoint_lsn - '0/0', bytes_per_wal_segment) < 512 \
                                    THEN '0/0' ELSE checkpoint_lsn END \
                          FROM pg_control_checkpoint(), pg_control_init() \
                         WHERE redo_lsn = checkpoint_lsn AND pg_last_wal_replay_lsn() - checkpoint_lsn < 512)";

/// Returns the question, which a settler's transaction begins with.
pub(super) fn question(xid: u64, refused: &[LogColumn]) -> String {
    // Asking for the status of an id that was not given out yet is an error. So the id is compared with the settler's
    // own id first, which is the newest one.
    let status = format!(
        "CASE WHEN '{xid}'::xid8 < pg_current_xact_id() THEN coalesce(pg_xact_status('{xid}'), 'forgotten') END"
    );
    let columns = list(|column: LogColumn| {
        let withheld = column.withheld().filter(|_| refused.contains(&column));
        withheld.unwrap_or_else(|| column.sql(&status))
    });
    format!("SET LOCAL search_path = pg_catalog, pg_temp; SELECT {columns}")
}

/// Returns SQL that asks whether `pg_wal` has a file of this timeline. From PostgreSQL 17 on the answer is always
/// false, because such a file proves nothing there: `pg_rewind` may keep the segment in which it found the fork, under
/// the name of the abandoned timeline (`keepwal_add_entry` in `filemap.c`).
pub(super) fn followed(timeline: u32) -> String {
    format!(
        "SELECT count(*) > 0 AND current_setting('server_version_num')::int < 170000 \
           FROM pg_ls_waldir() WHERE name ~ '^{timeline:08X}[0-9A-F]{{16}}$'"
    )
}
