//! This pool beside others: the same servers, the same failover, the same run. `make bench` runs it.

#![allow(clippy::must_use_candidate, reason = "getters of a benchmark")]
#![allow(clippy::doc_markdown, reason = "PostgreSQL and its pools are names")]

pub mod console;
pub mod counting;
pub mod error;
pub mod event;
pub mod external;
pub mod fault;
pub mod figures;
pub mod fleet;
pub mod floor;
pub mod growth;
pub mod isolation;
pub mod measurement;
pub mod peer;
pub mod plot;
pub mod quiet;
pub mod random;
pub mod recorder;
pub mod recovery;
pub mod report;
pub mod results;
pub mod rust_peers;
pub mod settings;
pub mod stage;
pub mod targets;
pub mod versions;

use std::sync::Arc;

use error::Error;
use isolation::Network;
use peer::Peer;
use stage::Stage;

/// Everyone who can be measured, this crate first.
pub fn peers() -> Vec<Box<dyn Peer>> {
    let mut peers = rust_peers::peers();
    peers.extend(external::peers());
    peers
}

/// What the servers say they are.
pub async fn postgres_version(network: &Arc<Network>) -> Result<String, Error> {
    let stage = Stage::start(network).await?;
    let client = stage.cluster.direct(stage.cluster.primary()).await;
    Ok(client.query_one("SHOW server_version", &[]).await?.get(0))
}
