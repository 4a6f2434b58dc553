//! How a transaction commits, and what that waits for: the disk, and the synchronous standby.

use tokio::time::sleep;

use crate::load::CANCELLED_WAITS;
use crate::log::What;
use crate::node::{Doing, Stage};
use crate::proto::Answer;
use crate::session::Session;
use crate::sql::SqlError;
use crate::work::RAISED;

impl Session {
    /// Commits: the record, the disk, the synchronous standby. Others see the transaction only afterwards.
    pub(crate) async fn commit(&mut self, answer: &mut Answer) -> Result<(), SqlError> {
        if let Some(which) = self.transaction.as_ref().and_then(|it| it.raises) {
            self.abort();
            return Err(raised(which));
        }
        let Some(transaction) = &self.transaction else { return Ok(()) };
        if let Some(xid) = transaction.xid {
            let waits = self.settings.get("synchronous_commit").is_none_or(|value| value != "off");
            let records = {
                let mut world = self.sim.lock();
                world.oracle.committed(&transaction.rows);
                let (node, pid) = (self.node, self.pid);
                let row = transaction.rows.first().copied();
                world.say(|| format!("session {pid} of server {node} commits transaction {xid}: {row:?}"));
                world.append(self.node, What::Commit { xid })
            };
            if waits {
                self.spring(Stage::Written).await;
                self.to_disk(records).await;
                self.spring(Stage::Flushed).await;
                self.to_standby(records, answer).await;
                self.spring(Stage::Confirmed).await;
            }
            let mut world = self.sim.lock();
            world.nodes[self.node].running.remove(&xid);
            if let Some(backend) = world.nodes[self.node].backends.get_mut(&self.pid) {
                backend.xid = None;
            }
            world.nodes[self.node].ended.notify_waiters();
        }
        if let Some(transaction) = self.transaction.take() {
            self.tell(&transaction.tells);
            self.show_start(None);
            self.undo_settings(transaction.before, true);
        }
        Ok(())
    }

    /// Lets the server crash now, if that was planned. Then this session never goes on.
    pub(crate) async fn spring(&self, stage: Stage) {
        let crashed = self.sim.lock().spring(self.node, stage);
        if crashed {
            std::future::pending::<()>().await;
        }
    }

    pub(crate) async fn to_disk(&self, records: usize) {
        let takes = self.of_node(|node| node.troubles.fsync);
        if !takes.is_zero() {
            sleep(takes).await;
            self.thaw().await;
        }
        self.of_node(|node| node.log.flush(records));
        self.sim.flushed.notify_one();
    }

    /// Returns whether the synchronous standby has so many records. If not, the session is shown as waiting for it.
    fn is_confirmed(&self, records: usize) -> bool {
        let mut world = self.sim.lock();
        let confirmed = world.is_confirmed(self.node, records);
        if !confirmed {
            world.set_doing(self.node, self.pid, Doing::Committing);
        }
        confirmed
    }

    pub(crate) async fn to_standby(&self, records: usize, answer: &mut Answer) {
        loop {
            answer.waits = false;
            let (replicated, cancelled) = (self.sim.replicated.notified(), self.cancel.notified());
            if self.is_confirmed(records) {
                return;
            }
            answer.waits = true;
            tokio::select! {
                biased;
                () = cancelled => {
                    answer.waits = false;
                    let message = "canceling wait for synchronous replication due to user request";
                    self.sim.lock().counts.note("seen", CANCELLED_WAITS);
                    return answer.notice(&SqlError::new("01000", message).by("SyncRepWaitForLSN"));
                }
                () = replicated => self.thaw().await,
            }
        }
    }
}

/// The error that the server raises on demand.
pub(crate) fn raised(which: usize) -> SqlError {
    let raised = RAISED[which];
    SqlError { fatal: raised.fatal, ..SqlError::new(raised.code, raised.message).by(raised.routine) }
}
