//! The table of `sql/ledger.sql`: each transaction's row, the rows of settlers, and who waits for whose lock.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use crate::done::Done;
use crate::log::What;
use crate::node::{epoch, lsn};
use crate::session::Session;
use crate::sql::SqlError;

/// The pool sets this as its `lock_timeout`.
const LOCK_TIMEOUT: Duration = Duration::from_millis(250);

/// What a row says about a transaction's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    /// Of a transaction that has not ended.
    Locked,
    Committed {
        fence: bool,
    },
}

/// An id as the server prints it.
fn uuid(id: u64) -> String {
    format!("00000000-0000-4000-8000-{id:012x}")
}

/// Reads what [`uuid`] prints.
pub(crate) fn id_of(text: &str) -> Option<u64> {
    u64::from_str_radix(text.rsplit('-').next()?, 16).ok()
}

impl Session {
    /// `INSERT … RETURNING`, by which a transaction begins.
    pub(crate) fn enter(&mut self, direct: bool) -> Result<Done, SqlError> {
        if self.is_read_only() {
            return Err(SqlError::new("25006", "cannot execute INSERT in a read-only transaction"));
        }
        let xid = self.xid()?;
        let id = {
            let mut world = self.sim.lock();
            let id = world.next_entry();
            world.append(self.node, What::Entry { xid, id, fence: false });
            id
        };
        if direct {
            let row = [uuid(id), xid.to_string(), self.micros().to_string()];
            return Ok(Done { tag: "INSERT 0 1", ..Done::row(row.into_iter().map(Some).collect()) });
        }
        let here = if self.begun_here() { "t" } else { "f" };
        let head = [uuid(id), self.pid.to_string(), xid.to_string(), self.micros().to_string(), here.to_owned()];
        Ok(Done { tag: "INSERT 0 1", ..Done::row(head.into_iter().map(Some).chain(self.who()).collect()) })
    }

    /// A settler's row, or the one that is there already.
    pub(crate) async fn fence_entry(&mut self, id: u64) -> Result<Done, SqlError> {
        if self.is_read_only() {
            return Err(SqlError::new("25006", "cannot execute INSERT in a read-only transaction"));
        }
        let xid = self.xid()?;
        let until = Instant::now() + LOCK_TIMEOUT;
        let fence = loop {
            match self.find(id, xid) {
                Found::Committed { fence } => break fence,
                Found::Nothing => {
                    self.sim.lock().append(self.node, What::Entry { xid, id, fence: true });
                    break true;
                }
                Found::Locked => {
                    let ended = self.of_node(|node| std::sync::Arc::clone(&node.ended));
                    let ended = ended.notified();
                    if self.find(id, xid) == Found::Locked && timeout_at(until, ended).await.is_err() {
                        return Err(SqlError::new("55P03", "canceling statement due to lock timeout"));
                    }
                    self.thaw().await;
                }
            }
        };
        // The update that changes nothing writes WAL.
        self.sim.lock().append(self.node, What::Message { xid });
        let head = [if fence { "t" } else { "f" }.to_owned(), self.micros().to_string(), uuid(id), "p".to_owned()];
        Ok(Done { tag: "INSERT 0 1", ..Done::row(head.into_iter().map(Some).chain(self.who()).collect()) })
    }

    /// Whether the transaction's own row is visible.
    pub(crate) fn has_entry(&mut self, id: u64) -> Done {
        let is_there = self.find(id, 0) == Found::Committed { fence: false };
        let shown = if is_there { "t" } else { "f" };
        Done::row(std::iter::once(Some(shown.to_owned())).chain(self.who()).collect())
    }

    fn find(&self, wanted: u64, own: u64) -> Found {
        self.of_node(|node| {
            for (xid, fence) in node.log.entries(wanted) {
                match node.log.outcome(*xid) {
                    _ if node.running.contains(xid) && *xid != own => return Found::Locked,
                    Some(true) => return Found::Committed { fence: *fence },
                    _ => {}
                }
            }
            Found::Nothing
        })
    }

    /// The server's clock, which may be wrong.
    fn micros(&self) -> i64 {
        let world = self.sim.lock();
        world.clock() + world.nodes[self.node].clock_ahead
    }

    /// The start time and the end of the last replay.
    fn who(&self) -> [Option<String>; 2] {
        self.of_node(|node| {
            let replayed = if node.recovery { Some(node.log.end()) } else { node.replayed };
            [Some(epoch(node.started_at)), replayed.map(lsn)]
        })
    }
}
