//! What a COMMIT waits for: the disk, and the synchronous standby.

use tokio::time::sleep;

use crate::load::CANCELLED_WAITS;
use crate::node::{Doing, Stage};
use crate::proto::Answer;
use crate::session::Session;
use crate::sql::SqlError;

impl Session {
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
