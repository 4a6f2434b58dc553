//! Real PostgreSQL clusters that fail over, for the tests of your service.
//!
//! A [`Cluster`] is a primary with its hot standbys, streaming, on loopback addresses of its own. The service under
//! test gets a connection string ([`Cluster::url`]), and the test kills, freezes, fences or cuts off servers, promotes
//! standbys, and moves a DNS name. No container and no root are needed, only PostgreSQL's server programs.
//!
//! ```no_run
//! use tokio_postgres_failover_testkit::{Cluster, Error};
//!
//! # mod shop { pub struct Shop; impl Shop { pub async fn new(_: &str) -> Self { Self } pub async fn buy(&self) {} } }
//! # use shop::Shop;
//! # async fn test() -> Result<(), Error> {
//! let cluster = Cluster::start().await?;
//! let shop = Shop::new(&cluster.url()).await; // your service
//! cluster.fail_over().await?; // the primary is killed, and a standby takes over
//! shop.buy().await; // what does your service do now?
//! # Ok(())
//! # }
//! ```
//!
//! Each method that does something returns a [`Step`]: `.await` it, or call [`Step::wait`] in a test that is not
//! `async`. What goes wrong is an [`Error`], and never a panic.
//!
//! # What it needs
//!
//! - **Linux.** A cluster uses many addresses of `127.0.0.0/8` and the process table in `/proc`, which other systems
//!   lack:
//!   there this crate does not compile. Run such tests in a Linux container or in your CI, and write
//!   `[target.'cfg(target_os = "linux")'.dev-dependencies]` in `Cargo.toml`.
//! - **PostgreSQL 13 or newer**: `postgres`, `initdb` and `pg_basebackup`, in the folder `PG_BIN`, in `PATH`, or where
//!   the
//!   packages of Debian, Fedora, openSUSE, Alpine and Homebrew put them. No service needs to run.
//! - **Any user.** PostgreSQL refuses to run as root, so for tests that run as root, as in most containers, the servers
//!   run
//!   as `postgres`, or as `nobody` if there is no such user.
//!
//! # What you can rely on
//!
//! - Tests run at the same time, in threads and in processes (`cargo nextest`): each cluster claims a block of
//!   addresses.
//! - Nothing is left when a test ends, fails, or is killed with SIGKILL: a shell that outlives the test ends the
//!   servers
//!   and removes their files. These are in `/dev/shm` if it has 4 GiB free, else in the folder for temporary files. One
//!   template of about 10 MB for each version of PostgreSQL stays in the latter.
//! - A step waits for the state that it names. It fails when that does not come within two minutes.
//! - The kit makes the test process a subreaper, so that killed servers leave no zombies behind.
//!
//! The servers do not write to disk before they commit (`fsync = off`): they survive their own crash, and not that of
//! the machine.

#[cfg(not(target_os = "linux"))]
compile_error!(
    "the test kit needs Linux; depend on it by [target.'cfg(target_os = \"linux\")'.dev-dependencies], and run these \
     tests in a Linux container or in your CI"
);

#[doc(hidden)]
pub mod bed;

mod builder;
mod cluster;
mod cutter;
mod dns;
mod error;
mod step;

pub use bed::cluster::Node;
pub use builder::ClusterBuilder;
pub use cluster::Cluster;
pub use cutter::{Cut, CutMade, Cutter};
pub use dns::{Dns, DnsFault};
pub use error::Error;
pub use step::Step;
