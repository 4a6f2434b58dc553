//! Servers for one measurement: a fresh cluster, its name in DNS, and a table.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use testbed::{Cluster, Dns};
use tokio::task::JoinHandle;
use tokio::time::interval;

use crate::error::Error;
use crate::isolation::Network;
use crate::peer::Target;
use crate::random::Random;

/// The name that the test bed's DNS server knows.
pub const NAME: &str = "pg.internal";
/// The table that is written to.
pub const TABLE: &str = "bench_rows";
/// A name server answers in another order each time; here it is shuffled so often.
const SHUFFLE: Duration = Duration::from_millis(5);

/// A cluster with everything that a peer needs to know of it.
pub struct Stage {
    /// The servers.
    pub cluster: Cluster,
    network: Arc<Network>,
}

impl Stage {
    /// A primary and two standbys, of which one has to confirm each commit.
    pub async fn start(network: &Arc<Network>) -> Result<Self, Error> {
        let cluster = Cluster::builder().setting("max_connections", "300").start().await;
        let stage = Self { cluster, network: Arc::clone(network) };
        // Without a unique key, so that a doubled row shows.
        let sql = format!(
            "CREATE TABLE {TABLE} (id text NOT NULL); CREATE INDEX ON {TABLE} (id); GRANT ALL ON {TABLE} TO app"
        );
        stage.cluster.direct(stage.cluster.primary()).await.batch_execute(&sql).await?;
        stage.name(&stage.members());
        Ok(stage)
    }

    /// Every node's address.
    pub fn members(&self) -> Vec<IpAddr> {
        self.cluster.nodes().into_iter().map(|node| self.cluster.addr(node)).collect()
    }

    /// The name server: the one that the system's resolver asks, where there is one.
    pub fn dns(&self) -> &Dns {
        self.network.dns.as_ref().unwrap_or_else(|| self.cluster.dns())
    }

    /// From now on the name leads to these addresses, in this order.
    pub fn name(&self, addresses: &[IpAddr]) {
        self.dns().set(addresses);
    }

    /// From now on no packet from or to this address arrives.
    pub fn vanish(&self, address: IpAddr) -> Result<(), Error> {
        self.network.vanish(address)
    }

    /// What a peer is told. The name stands beside the hosts only for those who shall use it.
    pub fn target(&self, by_name: bool, workers: usize, pace: Duration, prefix: &str) -> Target {
        let cluster = &self.cluster;
        Target {
            hosts: cluster.nodes().into_iter().map(|node| cluster.socket_addr(node)).collect(),
            name: by_name.then(|| NAME.to_owned()),
            dns: self.dns().addr(),
            system_dns: self.network.dns.is_some(),
            port: cluster.port(),
            user: "app".to_owned(),
            password: String::new(),
            database: "app".to_owned(),
            table: TABLE.to_owned(),
            workers,
            pace,
            prefix: prefix.to_owned(),
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // A node that vanished must be reachable for those who clean up; a failure shows in the next case.
        let _ = self.network.restore();
    }
}

/// Answers for `addresses` in an order that changes all the time, until the stage is gone.
pub fn rotate(stage: Arc<Stage>, addresses: Vec<IpAddr>, seed: u64) -> Rotation {
    Rotation(tokio::spawn(async move {
        let (mut random, mut addresses) = (Random::new(seed, 53), addresses);
        let mut tick = interval(SHUFFLE);
        loop {
            tick.tick().await;
            random.shuffle(&mut addresses);
            stage.name(&addresses);
        }
    }))
}

/// Ends with its drop.
pub struct Rotation(JoinHandle<()>);

impl Drop for Rotation {
    fn drop(&mut self) {
        self.0.abort();
    }
}
