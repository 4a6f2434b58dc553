//! Every test that needs a server, in one binary: linked once.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

mod between;
mod cancel;
mod clusters;
mod deadline;
mod demotion;
mod dns;
mod errors;
mod evidence;
mod failover;
mod get;
mod hostile;
mod hygiene;
mod listen;
mod load;
mod pooler;
mod quiet;
mod resolve;
mod rotation;
mod scenarios;
mod settings;
mod settle;
mod spans;
#[cfg(feature = "rustls")]
mod tls;
mod transaction;
mod tune;
#[cfg(feature = "metrics")]
mod watch;
mod wrap;
