//! What the process holds: tasks, sockets, memory.

use std::fmt;
use std::fs;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::sleep;
use tokio_postgres_failover::Pool;

use crate::CONNECTIONS;

/// By how much tasks and sockets may differ between two looks: the pool opens and closes some at any time.
const SLACK: usize = 4;
const MEBIBYTE: u64 = 1 << 20;

/// What the process held when it was at its quietest within a second.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Held {
    tasks: usize,
    sockets: usize,
    memory: u64,
}

impl Held {
    /// Fills the pool first, so that each look finds it with all its connections.
    pub(crate) async fn look(pool: &Pool) -> Self {
        let mut connections = Vec::new();
        for _ in 0..CONNECTIONS {
            connections.push(pool.get().await);
        }
        drop(connections);
        let mut held = Self { tasks: usize::MAX, sockets: usize::MAX, memory: u64::MAX };
        for _ in 0..20 {
            sleep(Duration::from_millis(50)).await;
            held.tasks = held.tasks.min(Handle::current().metrics().num_alive_tasks());
            held.sockets = held.sockets.min(sockets());
            held.memory = held.memory.min(memory());
        }
        held
    }

    /// What has grown since `before` beyond what chance explains.
    pub(crate) fn grown_since(&self, before: &Self) -> Option<String> {
        let mut grown = Vec::new();
        if self.tasks > before.tasks + SLACK {
            grown.push("tasks");
        }
        if self.sockets > before.sockets + SLACK {
            grown.push("sockets");
        }
        // The history of the writes grows by rights.
        if self.memory > before.memory + before.memory * 3 / 10 + 20 * MEBIBYTE {
            grown.push("memory");
        }
        (!grown.is_empty()).then(|| format!("{} grew: {before}, and then {self}", grown.join(" and ")))
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, tenth) = (self.memory / MEBIBYTE, self.memory % MEBIBYTE * 10 / MEBIBYTE);
        write!(f, "tasks={} sockets={} rss={whole}.{tenth}MiB", self.tasks, self.sockets)
    }
}

fn sockets() -> usize {
    let open = fs::read_dir("/proc/self/fd").expect("/proc");
    let is_socket = |path| fs::read_link(path).is_ok_and(|target| target.to_string_lossy().starts_with("socket:"));
    open.filter(|entry| entry.as_ref().is_ok_and(|entry| is_socket(entry.path()))).count()
}

fn memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).expect("kB") * 1024
}
