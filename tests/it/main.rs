//! Every test that needs a server, in one binary: linked once.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]
#![allow(clippy::large_futures, reason = "a test is one future, and nobody waits for it but the runtime")]

mod checkout;
mod commit;
mod failover;
mod observe;
mod proxies;
mod sessions;
mod support;
mod transaction;
