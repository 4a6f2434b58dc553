//! What every cluster stands on: addresses, a folder, a DNS server, and the reaper that clears up behind it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process as this_process;

use tokio::task::spawn_blocking;

use crate::block::Block;
use crate::cluster::ended;
use crate::dns::Dns;
use crate::limit;
use crate::process::{self, Reaper};
use crate::server::{self, Server};

const DNS_PORT: u16 = 15353;

/// A place for one cluster. Dropping it ends the processes that carry its tag, and removes the folder.
pub(crate) struct Site {
    pub(crate) server: &'static Server,
    /// The data folder to copy.
    pub(crate) template: PathBuf,
    /// Unique on the machine: the reaper finds the cluster's processes by it. It fits into `cluster_name` (63 bytes).
    pub(crate) tag: String,
    pub(crate) folder: PathBuf,
    pub(crate) dns: Dns,
    pub(crate) reaper: Reaper,
    pub(crate) block: Block,
}

impl Site {
    /// `foreign`: another system identifier than all other clusters of the test bed have.
    pub(crate) async fn claim(foreign: bool) -> Self {
        limit::begin();
        let (server, template) = ended(spawn_blocking(move || {
            let server = Server::installed();
            (server, server.template(foreign))
        }))
        .await;
        let block = Block::claim();
        let tag = format!("testbed-{}-{}-{}", this_process::id(), block.node(0), unique());
        let folder = server.cluster_folder(&tag);
        process::adopt_orphans();
        let reaper = Reaper::watch(&folder);
        server::make_folder(&folder);
        server.give(&folder);
        let dns = Dns::start(SocketAddr::new(block.dns(), DNS_PORT)).await;
        Self { server, template, tag, folder, dns, reaper, block }
    }
}

fn unique() -> String {
    use std::hash::{BuildHasher as _, RandomState};
    format!("{:08x}", RandomState::new().hash_one(0) & 0xffff_ffff)
}
