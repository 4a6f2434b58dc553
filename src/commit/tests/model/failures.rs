//! How the model's servers fail, recover, follow another server and are promoted.

use super::*;

impl World {
    pub(super) fn crash(&mut self, on: usize, kept: usize) {
        let now = self.count().cast_signed();
        let node = &mut self.nodes[on];
        node.lose_memory(kept, now);
        node.role = match node.role {
            Role::Primary => Role::StoppedPrimary { clean: false },
            _ => Role::StoppedStandby,
        };
    }

    /// One backend crashes. The postmaster goes on, and sets up its shared memory again.
    pub(super) fn backend_crash(&mut self, on: usize, kept: usize) {
        let now = self.count().cast_signed();
        self.nodes[on].lose_memory(kept, now);
        if self.nodes[on].role == Role::Primary {
            self.recover(on, false);
        }
    }

    /// The server has replayed its log and becomes a primary.
    fn recover(&mut self, on: usize, promoted: bool) {
        self.tally.recoveries += 1;
        let node = &mut self.nodes[on];
        node.replayed = Some(node.end());
        node.next_xid = node.next_xid_by_wal();
        let next_xid = node.next_xid;
        if promoted {
            let last = node.wal.last().map(|record| record.what);
            node.stopped = if let Some(What::Checkpoint { stopped, .. }) = last { stopped } else { None };
            self.append_flushed(on, What::EndOfRecovery { next_xid });
        } else {
            let end = node.end();
            self.write_checkpoint(on, Some(end));
        }
    }

    fn write_checkpoint(&mut self, on: usize, stopped: Option<Lsn>) {
        let node = &mut self.nodes[on];
        node.checkpointed = node.identity.timeline;
        node.stopped = None;
        let (next_xid, timeline) = (node.next_xid, node.identity.timeline);
        self.append_flushed(on, What::Checkpoint { next_xid, timeline, stopped });
    }

    pub(super) fn checkpoint(&mut self, on: usize) {
        let node = &self.nodes[on];
        if node.role == Role::Primary {
            self.write_checkpoint(on, None);
        } else if let Some(timeline) = node.last_checkpoint() {
            self.nodes[on].checkpointed = timeline;
        }
    }

    pub(super) fn recycle(&mut self, on: usize) {
        let node = &mut self.nodes[on];
        let last = node.wal.iter().rposition(|record| matches!(record.what, What::Checkpoint { .. }));
        node.recycled = last.unwrap_or(0).max(node.recycled);
        node.segments.retain(|timeline| *timeline == node.identity.timeline);
    }

    /// A clean shutdown: running transactions are aborted, waits for a standby are cancelled, and everything is
    /// flushed.
    pub(super) fn stop(&mut self, on: usize) {
        if self.nodes[on].role != Role::Primary {
            self.nodes[on].role = Role::StoppedStandby;
            return;
        }
        for (xid, running) in std::mem::take(&mut self.nodes[on].running) {
            if !running.committing {
                self.append(on, What::Abort { xid, token: running.token });
            }
        }
        self.shut_down(on, false);
    }

    fn shut_down(&mut self, on: usize, switch: bool) {
        let end = self.nodes[on].end();
        self.write_checkpoint(on, Some(if switch { at(0) } else { end }));
        self.nodes[on].role = Role::StoppedPrimary { clean: true };
    }

    pub(super) fn recover_unseen(&mut self, on: usize, switch: bool) {
        self.tally.unseen += 1;
        let node = &mut self.nodes[on];
        node.next_xid = node.next_xid_by_wal();
        let end = node.end();
        self.write_checkpoint(on, Some(end));
        self.shut_down(on, switch);
    }

    pub(super) fn start(&mut self, on: usize) {
        let started_at = self.count().cast_signed();
        let node = &mut self.nodes[on];
        node.identity.started_at = started_at;
        (node.stopped, node.signed) = (None, None);
        (node.replayed, node.received) = (None, None);
        match node.role {
            Role::StoppedPrimary { clean } => {
                node.role = Role::Primary;
                if clean {
                    self.tally.clean_starts += 1;
                } else {
                    self.recover(on, false);
                }
            }
            _ => node.role = Role::Standby,
        }
    }

    pub(super) fn lease(&mut self, on: usize) {
        let started_at = self.count().cast_signed();
        let node = &mut self.nodes[on];
        node.identity.started_at = started_at;
        (node.stopped, node.signed) = (None, None);
        (node.replayed, node.received) = (None, None);
        (node.role, node.upstream, node.alone) = (Role::Standby, None, true);
    }

    pub(super) fn follow(&mut self, on: usize, upstream: usize) {
        let mut senders = std::iter::successors(Some(upstream), |sender| self.nodes[*sender].upstream);
        if senders.any(|sender| sender == on) || !self.nodes[upstream].is_up() {
            return;
        }
        let started_at = self.count().cast_signed();
        let from = self.nodes[upstream].clone();
        let node = &mut self.nodes[on];
        let common = node.common_with(&from).min(from.flushed);
        if common < node.wal.len() {
            // A rewind copies the files of the other server, which has no file of its statistics while it runs. So the
            // statistics are gone.
            node.stats_reset = started_at;
        }
        node.wal.truncate(common);
        node.flushed = node.wal.len();
        node.running.clear();
        node.identity = Server { started_at, timeline: from.identity.timeline, ..node.identity };
        (node.replayed, node.received) = (None, None);
        (node.role, node.upstream, node.alone) = (Role::Standby, Some(upstream), false);
        node.ancestry = from.ancestry;
        node.histories = from.histories;
        node.segments = from.segments;
        node.recycled = from.recycled;
        node.checkpointed = node.last_checkpoint().unwrap_or(1);
        (node.stopped, node.signed) = (None, None);
    }

    /// The new timeline gets the next number whose history file is neither in this standby's `pg_wal` nor in the
    /// archive (`findNewestTimeLine` in `timeline.c`). Without an archive, several servers may take the same number.
    pub(super) fn promote(&mut self, on: usize) {
        let node = &mut self.nodes[on];
        let old = node.identity.timeline;
        let archived = |timeline: &u32| self.archive.as_ref().is_some_and(|archive| archive.contains(timeline));
        let is_taken = |timeline: &u32| node.histories.contains(timeline) || archived(timeline);
        let new = (old + 1..=u32::MAX).find(|timeline| !is_taken(timeline)).unwrap();
        node.identity.timeline = new;
        let end = node.end();
        node.ancestry.push((old, end));
        node.histories.insert(new);
        node.segments.insert(new);
        if let Some(archive) = &mut self.archive {
            archive.insert(new);
        }
        (node.role, node.upstream) = (Role::Primary, None);
        // If it has replayed the end of a transaction on its own log, the noted time of that end shows it.
        let ends = |record: &&Record| matches!(record.what, What::Commit { .. } | What::Abort { .. });
        let replayed = node.wal.iter().rev().take_while(|record| !matches!(record.what, What::Checkpoint { .. }));
        if node.alone && replayed.filter(ends).count() > 0 {
            node.received = Some(end);
        }
        // A primary that returns on its own log counts as having streamed, unless another server took the next number
        // meanwhile.
        let taken = self.promotions.contains(&new);
        self.tally.unfed += u64::from(node.received.is_none() && (!node.alone || taken));
        node.alone = false;
        self.promotions.push(new);
        node.term = self.promotions.len() as u64;
        self.recover(on, true);
    }
}
