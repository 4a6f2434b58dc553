//! What every cluster stands on: addresses, a folder, a DNS server, and the reaper that clears up behind it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process as this_process;

use tokio::task::spawn_blocking;

use crate::Error;
use crate::bed::block::Block;
use crate::bed::cluster::ended;
use crate::bed::dns::Dns;
use crate::bed::limit;
use crate::bed::process::{self, Reaper};
use crate::bed::server::{self, Server};

const DNS_PORT: u16 = 15353;

/// A place for one cluster. Dropping it ends the processes that carry its tag, and removes the folder.
pub struct Site {
    pub server: &'static Server,
    /// The data folder to copy.
    pub template: PathBuf,
    /// Unique on the machine: the reaper finds the cluster's processes by it. It fits into `cluster_name` (63 bytes).
    pub tag: String,
    pub folder: PathBuf,
    pub dns: Dns,
    pub reaper: Reaper,
    pub block: Block,
}

impl Site {
    /// `foreign`: another system identifier than all other clusters of the test bed have.
    pub async fn claim(foreign: bool) -> Self {
        Self::try_claim(foreign).await.unwrap_or_else(|error| panic!("testbed: {error}"))
    }

    /// [`Site::claim`], with an error where this machine has no PostgreSQL, or no addresses.
    pub async fn try_claim(foreign: bool) -> Result<Self, Error> {
        limit::begin();
        let (server, template) = ended(spawn_blocking(move || {
            let server = Server::find()?;
            Ok::<_, Error>((server, server.template(foreign)))
        }))
        .await?;
        let block = Block::claim()?;
        let tag = format!("testbed-{}-{}-{}", this_process::id(), block.node(0), unique());
        let folder = server.cluster_folder(&tag);
        process::adopt_orphans();
        let reaper = Reaper::watch(&folder);
        server::make_folder(&folder);
        server.give(&folder);
        let dns = Dns::start(SocketAddr::new(block.dns(), DNS_PORT)).await;
        Ok(Self { server, template, tag, folder, dns, reaper, block })
    }
}

fn unique() -> String {
    use std::hash::{BuildHasher as _, RandomState};
    format!("{:08x}", RandomState::new().hash_one(0) & 0xffff_ffff)
}
