//! Servers that others started: Patroni and repmgr. When such a server dies it becomes a child of this process, and
//! stays in the process table until it is reaped. Its manager would take it for one that lives.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::process;
use crate::sync::lock;

const INTERVAL: Duration = Duration::from_millis(50);

/// Reaps the servers of these data folders, and their children.
pub(crate) struct Orphans {
    known: Arc<Mutex<BTreeSet<u32>>>,
    task: JoinHandle<()>,
}

impl Orphans {
    pub(crate) fn watch(folders: Vec<PathBuf>) -> Self {
        let known = Arc::<Mutex<BTreeSet<u32>>>::default();
        let seen = Arc::clone(&known);
        let task = tokio::spawn(async move {
            loop {
                look(&seen, &folders);
                sleep(INTERVAL).await;
            }
        });
        Self { known, task }
    }

    /// These have been killed.
    pub(crate) fn expect(&self, ids: impl IntoIterator<Item = u32>) {
        lock(&self.known).extend(ids);
    }
}

impl Drop for Orphans {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The server of a data folder, if it lives.
pub(crate) fn postmaster(data: &Path) -> Option<u32> {
    let lock = fs::read_to_string(data.join("postmaster.pid")).ok()?;
    let id = lock.lines().next()?.trim().parse().ok()?;
    process::is_postgres(id).then_some(id)
}

fn look(known: &Mutex<BTreeSet<u32>>, folders: &[PathBuf]) {
    for server in folders.iter().filter_map(|folder| postmaster(folder)) {
        let children = process::children(server);
        let mut known = lock(known);
        known.insert(server);
        known.extend(children);
    }
    lock(known).retain(|id| !process::reap(*id));
}
