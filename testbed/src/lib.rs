//! Real PostgreSQL clusters on loopback, with faults as methods. For tests, examples and benchmarks; Linux.
//!
//! ```no_run
//! # async fn example() {
//! use testbed::{Cluster, Node};
//!
//! let cluster = Cluster::start().await; // a primary and two hot standbys, streaming
//! cluster.kill(Node(0)).await;
//! let promotion = cluster.promote_timed(cluster.most_advanced_standby().await).await;
//! cluster.start_node(Node(0)).await; // a zombie: writable, on its old timeline
//! # }
//! ```
//!
//! Every cluster has a block of loopback addresses to itself, so tests run in parallel, in threads and in processes.
//! Nothing survives a test, not even one that is killed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::missing_panics_doc,
    reason = "a test bed that cannot do what it was told ends the test, and says why"
)]
#![allow(clippy::must_use_candidate, reason = "getters of a test bed")]
#![allow(clippy::doc_markdown, reason = "PostgreSQL is a name")]

mod certificate;
mod etcd;
mod haproxy;
mod history;
mod impostor;
mod orphans;
mod patroni;
mod pgbouncer;
mod pooler;
mod program;
mod raw_dns;
mod repmgr;
mod script;
mod spread;
mod tap;
mod trap;
pub mod versions;

use tokio_postgres_failover_testkit::bed;
// The modules of this crate find what the kit has of them where they would lie.
use bed::{cluster, cutter, dns, frames, limit, path, port, process, server, site, sync, wait};

pub use certificate::{Authority, Certificate};
pub use cluster::{Background, Cluster, ClusterBuilder, Node, Promotion};
pub use cutter::{Armed, Cut, Cutter, Done};
pub use dns::{Answer, Dns};
pub use haproxy::{FlyChecks, HaProxy};
pub use history::{History, Verdict};
pub use impostor::Impostor;
pub use path::Path;
pub use patroni::{Checks, Front, Part, Patroni, PatroniBuilder};
pub use pgbouncer::{PgBouncer, PgBouncerBuilder};
pub use pooler::Pooler;
pub use raw_dns::{Question, RawDns, record};
pub use repmgr::Repmgr;
pub use script::{Change, Reply, Script, Tamper};
pub use spread::{Spread, longest_gap};
pub use sync::lock;
pub use tap::{Counts, Tap, TurnAway};
pub use trap::{Blackhole, Eof, Garbage, Silent};
pub use wait::eventually;
