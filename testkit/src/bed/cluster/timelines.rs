//! Histories with more than one failover: a WAL archive that all nodes share, leaders that come back before their lease
//! is over, crashes that lose the end of the log, and standbys that lag behind.

use std::fs;
use std::path::PathBuf;

use tokio::task::spawn_blocking;

use super::{Cluster, ClusterBuilder, Node, PATIENCE, Promotion, alter_system, ended, quoted};
use crate::bed::process;
use crate::bed::server;
use crate::bed::wait::until;

/// A process of a server that serves no session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Background {
    /// Writes the log out for transactions that have not committed yet. While it is stopped, a record reaches the disk
    /// only with a commit behind it; without one, a crash loses the record.
    WalWriter,
    /// While it is stopped, the control file keeps the timeline of the last checkpoint: after a promotion, the old one.
    Checkpointer,
    /// Writes a snapshot of the running transactions into the log every 15 seconds.
    BackgroundWriter,
}

impl Background {
    /// As `pg_stat_activity.backend_type` names it.
    fn name(self) -> &'static str {
        match self {
            Self::WalWriter => "walwriter",
            Self::Checkpointer => "checkpointer",
            Self::BackgroundWriter => "background writer",
        }
    }
}

impl ClusterBuilder {
    /// All nodes share one WAL archive, [`Cluster::archive`]: each primary archives what it writes, and each standby
    /// restores from there what it is not sent.
    ///
    /// A server that is promoted then takes the highest timeline whose history file is in the archive, plus one;
    /// without an archive it only knows the history files in its own `pg_wal`.
    pub fn archive(mut self) -> Self {
        self.archive = true;
        self
    }
}

impl Cluster {
    /// The folder of the WAL archive, which is used by clusters that were built with [`ClusterBuilder::archive`].
    pub fn archive(&self) -> PathBuf {
        self.folder.join("archive")
    }

    /// Makes the folder; returns the settings of every node.
    pub(super) fn make_archive(&self) -> String {
        let archive = self.archive();
        server::make_folder(&archive);
        self.server.give(&archive);
        let file = format!("{}/%f", archive.display());
        // A file is in the archive with all that it has or not at all. One that is there is not replaced by another.
        let command =
            format!("if [ -e {file} ]; then cmp -s %p {file}; else cp %p {file}.$$ && mv {file}.$$ {file}; fi");
        let restore = format!("cp {file} %p 2>/dev/null");
        format!("archive_mode = on\narchive_command = {}\nrestore_command = {}\n", quoted(&command), quoted(&restore))
    }

    /// Waits until the history file of this timeline is in the archive: from then on no other node takes the same
    /// number.
    pub async fn wait_archived(&self, timeline: u32) {
        let file = self.archive().join(history_file(timeline));
        until(&format!("{} is archived", file.display()), PATIENCE, || async {
            if file.exists() { Ok(()) } else { Err(String::from("it is not there")) }
        })
        .await;
    }

    /// The timeline that the node writes or, as a standby, has replayed: the last one in its log.
    pub async fn timeline(&self, node: Node) -> u32 {
        let sql = "SELECT CASE WHEN pg_is_in_recovery()
                   THEN coalesce((SELECT received_tli FROM pg_stat_wal_receiver),
                                 (SELECT timeline_id FROM pg_control_checkpoint()))
                   ELSE ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int END";
        let row = self.direct(node).await.query_one(sql, &[]).await;
        row.expect("the timeline").get::<_, i32>(0).unsigned_abs()
    }

    /// The history file of this timeline, if the node has it: a line for each ancestor, with its end.
    pub fn history_of(&self, node: Node, timeline: u32) -> Option<String> {
        fs::read_to_string(self.data(node).join("pg_wal").join(history_file(timeline))).ok()
    }

    /// Stops one process of a server (SIGSTOP). The server's next start has a new one. A clean shutdown waits for it
    /// for ever.
    pub async fn stop_background(&self, node: Node, which: Background) {
        let session = self.direct(node).await;
        // A server that has just started may not have started this one yet.
        let pid: i32 = until(&format!("{node:?} has a {}", which.name()), PATIENCE, || async {
            let sql = "SELECT pid FROM pg_stat_activity WHERE backend_type = $1";
            let row = session.query_opt(sql, &[&which.name()]).await.map_err(|error| format!("{error:?}"))?;
            row.map(|row| row.get(0)).ok_or_else(|| String::from("there is none"))
        })
        .await;
        process::stop(pid.unsigned_abs());
    }

    /// Kills a node and starts it as it was, so that it recovers from its own log: a crash. What was not written is
    /// lost.
    pub async fn crash(&self, node: Node) {
        self.kill(node).await;
        self.start_node(node).await;
    }

    /// Starts a stopped primary as a standby that follows nobody: it replays its own log, answers reads, and waits to
    /// be promoted. Patroni does so with a leader that finds its lease still its own ("starting as readonly because i
    /// had the session lock").
    pub async fn start_read_only(&self, node: Node) {
        self.configure(node, None);
        self.signal_standby(node);
        self.start_node(node).await;
    }

    /// Recovers a killed node in single-user mode, and shuts it down cleanly: nobody sees a server meanwhile. Patroni
    /// does so before `pg_rewind`, with `archive_mode = on` and no archive, whatever is configured.
    pub async fn recover_in_single_user_mode(&self, node: Node, archive_mode: bool) {
        let mut postgres = self.server.command("postgres", &self.folder);
        let archive_mode = if archive_mode { "archive_mode=on" } else { "archive_mode=off" };
        postgres.args(["--single", "-D"]).arg(self.data(node));
        postgres.args(["-c", archive_mode, "-c", "archive_command=false", "template1"]);
        // It reads statements, and its input has ended.
        ended(spawn_blocking(move || server::run(&mut postgres))).await;
    }

    /// Lets the log of a stopped node go on at a file of this name, so far on as that of a server that has worked for
    /// years. No other node can follow it.
    pub async fn continue_log_at(&self, node: Node, file: &str) {
        let mut resetwal = self.server.command("pg_resetwal", &self.folder);
        resetwal.args(["-l", file]).arg(self.data(node));
        ended(spawn_blocking(move || server::run(&mut resetwal))).await;
    }

    /// The primary is killed, comes back read-only before its lease is over, replays its own log, and is promoted. The
    /// end of the log that was not written is lost, and a new timeline begins. The standbys follow the same node as
    /// before.
    pub async fn restart_within_lease(&self) -> Promotion {
        let leader = self.primary();
        self.kill(leader).await;
        self.start_read_only(leader).await;
        self.promote_timed(leader).await
    }

    /// The primary is demoted, as Patroni does when the quorum is lost: a clean shutdown and a start as a standby that
    /// follows nobody. When the quorum is back the same node is promoted. Nothing is lost, and a new timeline begins.
    pub async fn lose_and_regain_quorum(&self) -> Promotion {
        let leader = self.primary();
        self.stop_fast(leader).await;
        self.start_read_only(leader).await;
        self.promote_timed(leader).await
    }

    /// Kills the primary and promotes the standby that received most; returns it when the other standbys have replayed
    /// all of it, so that they know its timeline and can be promoted in turn.
    pub async fn fail_over(&self) -> Node {
        self.kill(self.primary()).await;
        for standby in self.awake_others(self.primary()) {
            self.wait_received_all(standby).await;
        }
        let new = self.most_advanced_standby().await;
        self.promote(new).await;
        for standby in self.awake_others(new) {
            self.wait_replayed(standby).await;
        }
        new
    }

    /// Waits until a standby has read all that its dead primary had sent: one that reads on could get ahead of the new
    /// primary, and could not follow it.
    pub async fn wait_received_all(&self, standby: Node) {
        let session = self.direct(standby).await;
        until(&format!("{standby:?} sees its primary gone"), PATIENCE, || async {
            let sql = "SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming'";
            let row = session.query_one(sql, &[]).await.map_err(|error| format!("{error:?}"))?;
            if row.get::<_, i64>(0) == 0 { Ok(()) } else { Err(String::from("it is streaming")) }
        })
        .await;
    }

    /// A standby stays as it is now: it follows nobody until it is promoted, or another node is.
    pub async fn stop_following(&self, standby: Node) {
        let session = self.direct(standby).await;
        alter_system(&session, "primary_conninfo", "").await;
        until(&format!("{standby:?} follows nobody"), PATIENCE, || async {
            let row = session.query_one("SELECT count(*) FROM pg_stat_wal_receiver", &[]).await;
            let receivers: i64 = row.map_err(|error| format!("{error:?}"))?.get(0);
            if receivers == 0 { Ok(()) } else { Err(String::from("it has a WAL receiver")) }
        })
        .await;
    }
}

fn history_file(timeline: u32) -> String {
    format!("{timeline:08X}.history")
}
