//! What the pool asks by whole statements: its marks, its checks, and the questions of its settlers.

use crate::done::Done;
use crate::log::What;
use crate::node::{Backend, Doing, backend_start, epoch, lsn};
use crate::session::Session;
use crate::sql::{SqlError, Whose};

impl Session {
    pub(crate) fn mark(&mut self, nonce: &str, direct: bool) -> Result<Done, SqlError> {
        let (mut xid, mut position) = (None, None);
        if !self.is_read_only() {
            let own = self.xid()?;
            let mut world = self.sim.lock();
            world.append(self.node, What::Mark { xid: own, nonce: nonce.to_owned() });
            (xid, position) = (Some(own.to_string()), Some(lsn(world.nodes[self.node].log.end())));
        }
        if direct {
            let row = [xid, position];
            return Ok(if row[0].is_some() { Done::row(row.to_vec()) } else { Done::nothing(row.len()) });
        }
        let here = if self.begun_here() { "t" } else { "f" };
        let pid = self.pid.to_string();
        Ok(self.of_node(|node| {
            let replayed = if node.recovery { Some(node.log.end()) } else { node.replayed };
            let started = epoch(node.started_at);
            let end = [replayed.map(lsn), Some(pid), Some(started), Some(here.to_owned())];
            Done::row([xid, position].into_iter().chain(end).collect())
        }))
    }

    /// Fails with a division by zero unless the function returns this value.
    pub(crate) fn insist(&mut self, function: &str, expected: &str) -> Result<Done, SqlError> {
        let value = match function {
            "pg_current_xact_id_if_assigned()" => self.assigned_xid().map(|xid| xid.to_string()),
            "current_setting('tokio_postgres_failover.transaction', true)" => {
                self.setting("tokio_postgres_failover.transaction")
            }
            _ => return Err(self.unknown(function)),
        };
        if value.as_deref() == Some(expected) {
            return Ok(Done::nothing(0));
        }
        Err(SqlError::new("22012", "division by zero"))
    }

    /// `failover.wal_history` of sql/history.sql.
    pub(crate) fn history(&mut self, position: u64, nonce: &str) -> Result<Done, SqlError> {
        self.of_node(|node| {
            if node.recovery {
                return Err(SqlError::new("55000", "recovery is in progress"));
            }
            let seen = if node.log.end() < position {
                "other"
            } else if node.log.position(node.log.flushed()) < position {
                "not yet"
            } else {
                let is_it = |what: &What| matches!(what, What::Mark { nonce: its, .. } if its == nonce);
                if node.log.ending_at(position).is_some_and(|record| is_it(&record.what)) { "marker" } else { "other" }
            };
            Ok(Done::row(vec![Some(seen.to_owned()), Some(node.history())]))
        })
    }

    pub(crate) fn end_abandoned(&self, pid: i32, xid: u64) -> Done {
        let found = self.of_node(|node| {
            let backend = node.backends.get(&pid)?;
            let idle = backend.doing == Doing::IdleInTransaction && backend.since.elapsed().as_millis() > 250;
            (backend.xid == Some(xid) && idle).then(|| backend.terminate.clone())
        });
        let Some(terminate) = found else { return Done::nothing(1) };
        terminate.cancel();
        Done::row(vec![Some("t".to_owned())])
    }

    /// As [`Self::end_abandoned`]. NULL: a COMMIT may still arrive.
    pub(crate) fn end_in_doubt(&self, pid: i32, whose: &Whose) -> Done {
        let found = self.of_node(|node| {
            let backend = node.backends.get(&pid)?;
            let is_it = backend.doing == Doing::IdleInTransaction && backend.is_of(pid, whose);
            is_it.then(|| (backend.since.elapsed().as_millis() > 250).then(|| backend.terminate.clone()))
        });
        let Some(late) = found else { return Done::nothing(1) };
        let Some(terminate) = late else { return Done::row(vec![None]) };
        terminate.cancel();
        Done::row(vec![Some("t".to_owned())])
    }

    /// Ends a session in a transaction whose client has gone. No COMMIT was sent on it.
    pub(crate) fn end_unmarked(&self, pid: i32, whose: &Whose) -> Done {
        let mut world = self.sim.lock();
        let found = world.nodes[self.node].backends.get(&pid).filter(|backend| backend.is_of(pid, whose));
        let Some((terminate, doing, ends)) = found.map(|found| (found.terminate.clone(), found.doing, found.ends))
        else {
            return Done::nothing(1);
        };
        if doing == Doing::Committing && ends {
            world.oracle.violation("a session was ended in the midst of a COMMIT");
        }
        drop(world);
        terminate.cancel();
        Done::row(vec![Some("t".to_owned())])
    }

    pub(crate) fn ends(&self, pid: i32, xid: u64) -> Option<String> {
        self.of_node(|node| {
            let backend = node.backends.get(&pid).filter(|backend| backend.xid == Some(xid))?;
            match backend.doing {
                Doing::Committing => Some("committing".to_owned()),
                Doing::Active if !backend.ends => Some("working".to_owned()),
                _ => None,
            }
        })
    }
}

impl Backend {
    /// Returns whether the conditions of a search in `pg_stat_activity` are true of this process.
    fn is_of(&self, pid: i32, whose: &Whose) -> bool {
        match whose {
            Whose::Marked(xid) => self.xid == Some(*xid),
            Whose::Unmarked { backend_start: began, open_for } => {
                *began == backend_start(pid) && self.xact_start.is_some_and(|at| at.elapsed() >= *open_for)
            }
        }
    }
}
