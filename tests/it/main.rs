//! Every test that needs a server, in one binary: linked once.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]
#![allow(clippy::large_futures, reason = "a test is one future, and nobody waits for it but the runtime")]

mod between;
mod busy;
mod calls;
mod cancel;
mod clusters;
mod costs;
mod deadline;
mod demotion;
mod dns;
mod ended;
mod endings;
mod errors;
mod evidence;
mod fetches;
mod finish;
mod get;
mod history;
mod hostile;
mod hygiene;
mod idle;
mod impatient;
mod inside;
mod limits;
mod listen;
mod lives;
mod load;
mod outages;
mod pace;
mod pooler;
mod quiet;
mod resolve;
mod revoked;
mod rotation;
mod scenarios;
mod settings;
mod settle;
mod shapes;
mod stale;
#[cfg(feature = "rustls")]
mod tls;
mod tune;
mod versions;
#[cfg(feature = "metrics")]
mod watch;
mod wrap;
