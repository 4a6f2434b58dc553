//! Programs between the pool and the servers.

mod between;
mod pooler;
