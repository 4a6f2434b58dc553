//! bb8 lends the driver's clients, tells none from another, and gives none up. A shell makes up for that.
//!
//! A shell belongs to one connection. While that is checked out, its client is in the shell, with the statements that
//! it has prepared, and a closed client is in its place. So whatever becomes of the shell, bb8 never gets a connection
//! back that may not be used again: it finds a closed one, and frees the slot.

use std::collections::HashMap;
use std::mem::swap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use deadpool_postgres::ClientWrapper;
use tokio::runtime::Handle;
use tokio_postgres::Client;

use super::memory::{BackendKey, closed_client};
use crate::sync::lock;

/// The shells of the connections that are not checked out.
pub(super) struct Shells {
    kept: Mutex<HashMap<BackendKey, Shell>>,
    next_id: AtomicU64,
    /// bb8 does not say which connections it closes. From this number on, all shells are forgotten.
    most: usize,
}

pub(super) struct Shell {
    pub(super) id: u64,
    key: Option<BackendKey>,
    /// Has the connection's client while the connection is checked out, and else the closed one.
    pub(super) wrapper: ClientWrapper,
}

impl Shells {
    pub(super) fn new(max_size: usize) -> Self {
        Self { kept: Mutex::default(), next_id: AtomicU64::new(0), most: max_size.saturating_mul(4).max(64) }
    }

    /// Moves the client of a connection into its shell. Returns the shell, and whether it is a new one. Call this
    /// within a runtime. `None`: the driver makes no closed client.
    pub(super) fn take_out(&self, place: &mut Client) -> Option<(Shell, bool)> {
        let key = BackendKey::of(place);
        let kept = key.and_then(|key| lock(&self.kept).remove(&key));
        let is_new = kept.is_none();
        let mut shell = match kept {
            Some(shell) => shell,
            None => Shell {
                id: self.next_id.fetch_add(1, Ordering::Relaxed),
                key,
                wrapper: around(closed_client()?, &Handle::current()),
            },
        };
        swap(place, &mut *shell.wrapper);
        if is_new {
            // The owner may have changed types since the connection read them.
            shell.wrapper.clear_type_cache();
        }
        Some((shell, is_new))
    }

    /// Moves the client back into its place, and keeps the shell for the next checkout.
    pub(super) fn put_back(&self, mut shell: Shell, place: &mut Client) {
        swap(place, &mut *shell.wrapper);
        let Some(key) = shell.key.filter(|_| !place.is_closed()) else { return };
        let mut kept = lock(&self.kept);
        let forgotten = if kept.len() >= self.most { std::mem::take(&mut *kept) } else { HashMap::new() };
        kept.insert(key, shell);
        drop(kept);
        drop(forgotten);
    }

    /// From now on, all connections are new ones, without prepared statements.
    pub(super) fn forget(&self) {
        let forgotten = std::mem::take(&mut *lock(&self.kept));
        drop(forgotten);
    }
}

/// Wraps a client whose driver is a task of somebody else's.
pub(super) fn around(client: Client, runtime: &Handle) -> ClientWrapper {
    // The wrapper aborts its task at its end, so it gets one that does nothing.
    ClientWrapper::new(client, runtime.spawn(async {}))
}
