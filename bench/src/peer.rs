//! What is measured: a pool under a load of workers, of whatever language.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::recorder::Recorder;

/// The pause of each worker after an error, before it tries the same row again. Its users' loops do so.
pub const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(100);

/// Where the servers are, and what the workers shall write there.
#[derive(Clone, Debug)]
pub struct Target {
    /// Every member of the cluster.
    pub hosts: Vec<SocketAddr>,
    /// Set where the peer shall use this DNS name instead of the hosts.
    pub name: Option<String>,
    /// The DNS server that knows the name; with [`Target::system_dns`] the system's resolver asks it, too.
    pub dns: SocketAddr,
    /// Whether the system's resolver (`getaddrinfo`, `/etc/resolv.conf`) knows the name.
    pub system_dns: bool,
    /// The port of every member.
    pub port: u16,
    /// The role that writes.
    pub user: String,
    /// Empty where the servers ask for none.
    pub password: String,
    /// The database.
    pub database: String,
    /// The peer's own table: `id text NOT NULL`, without a unique key, so that a doubled row shows.
    pub table: String,
    /// How many workers write, and how many connections the pool has.
    pub workers: usize,
    /// What each worker waits after an acknowledged row, so that the servers have time for something else, too.
    pub pace: Duration,
    /// The rows' ids are `prefix-worker-counter`.
    pub prefix: String,
}

impl Target {
    /// What an external peer finds in its environment.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let hosts: Vec<String> = self.hosts.iter().map(SocketAddr::to_string).collect();
        vec![
            ("BENCH_HOSTS", hosts.join(",")),
            ("BENCH_NAME", self.name.clone().unwrap_or_default()),
            ("BENCH_PORT", self.port.to_string()),
            ("BENCH_USER", self.user.clone()),
            ("BENCH_PASSWORD", self.password.clone()),
            ("BENCH_DATABASE", self.database.clone()),
            ("BENCH_TABLE", self.table.clone()),
            ("BENCH_WORKERS", self.workers.to_string()),
            ("BENCH_PACE_MS", self.pace.as_millis().to_string()),
            ("BENCH_PREFIX", self.prefix.clone()),
        ]
    }

    /// `host:port,host:port`, or the name with its port.
    pub fn authority(&self) -> String {
        match &self.name {
            Some(name) => format!("{name}:{}", self.port),
            None => self.hosts.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(","),
        }
    }

    /// A connection string of the cluster, without parameters.
    pub fn url(&self) -> String {
        let password = if self.password.is_empty() { String::new() } else { format!(":{}", self.password) };
        format!("postgres://{}{password}@{}/{}", self.user, self.authority(), self.database)
    }
}

/// A pool that is measured, configured as its own documentation advises for failover.
#[async_trait]
pub trait Peer: Send + Sync {
    /// As it stands in tables, and as `PEERS=` takes it: no blanks.
    fn name(&self) -> String;

    /// Its library, with the version.
    fn version(&self) -> String;

    /// How it is configured, in the words of its own interface; stands in the report.
    fn config(&self) -> String;

    /// Whether it is a Rust crate: `PEERS=rust`.
    fn is_rust(&self) -> bool {
        true
    }

    /// Whether it knows one host only: then it is given the DNS name, which leads to the
    /// primary and moves with it without any delay.
    fn needs_name(&self) -> bool {
        false
    }

    /// Why it cannot be measured here at all, for instance "node is not installed". Stands in the report.
    async fn missing(&self) -> Option<String> {
        None
    }

    /// Why this target is none for it, for instance a DNS name that the system's resolver does not know.
    fn refuses(&self, target: &Target) -> Option<String> {
        let _ = target;
        None
    }

    /// Opens the pool and starts the workers; returns when the pool has its connections. Each worker writes one row
    /// after the other, [`Target::pace`] apart, and tries the same row again [`PAUSE_AFTER_ERROR`] after an error.
    async fn start(&self, target: &Target, recorder: Arc<Recorder>) -> Result<Box<dyn Load>, String>;
}

/// Workers that write until they are stopped. Dropping it ends them, too, without waiting.
#[async_trait]
pub trait Load: Send + Sync {
    /// No worker begins another row. Returns when all calls have ended, or after two seconds: a call that hangs is cut
    /// off only then.
    async fn stop(self: Box<Self>);

    /// Resident memory of the peer's process, in bytes, where it has one of its own.
    fn memory(&self) -> Option<u64> {
        None
    }
}
