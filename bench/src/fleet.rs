//! What a fleet of pools asks of the servers while nobody asks anything of the pools, and while their log-ins are
//! refused: sessions and statements per second.
//!
//! Each server stands behind a proxy that counts. The figures go to the terminal; docs/costs.md quotes them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use testbed::{Node, Tap};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_postgres_failover::Pool;

use crate::console::say;
use crate::error::Error;
use crate::isolation::Network;
use crate::settings::Settings;
use crate::stage::Stage;

/// Pools in the fleet: one for each instance of a service.
const POOLS: u32 = 100;
/// How long the servers' load is counted, and the same with `QUICK=1`.
const COUNTED: Duration = Duration::from_mins(1);
const COUNTED_QUICK: Duration = Duration::from_secs(15);
/// What happens at the start of a pool is not counted.
const SETTLES: Duration = Duration::from_secs(10);

/// Measures the fleet.
pub async fn run(settings: &Settings, network: &Arc<Network>) -> Result<(), Error> {
    let counted = if settings.quick { COUNTED_QUICK } else { COUNTED };
    let fleet = Fleet::start(network).await?;
    let pools = fleet.pools("app", settings.seed).await?;
    for pool in &pools {
        let client = pool.get().await.map_err(|error| Error::Other(format!("the fleet: {error}")))?;
        client.simple_query("SELECT 1").await?;
    }
    fleet.count("idle", counted).await;
    drop(pools);
    // A role that is not there is refused as a wrong password is. In each instance somebody asks for a connection all
    // the time.
    let mut callers = JoinSet::new();
    for pool in fleet.pools("nobody", settings.seed).await? {
        callers.spawn(async move {
            loop {
                if pool.get().await.is_ok() {
                    return;
                }
            }
        });
    }
    fleet.count("refused", counted).await;
    Ok(())
}

/// A cluster whose servers stand behind proxies.
struct Fleet {
    stage: Stage,
    taps: Vec<(Node, Tap)>,
}

impl Fleet {
    async fn start(network: &Arc<Network>) -> Result<Self, Error> {
        let stage = Stage::start(network).await?;
        let cluster = &stage.cluster;
        let mut taps = Vec::new();
        for (spare, node) in (0..).zip(cluster.nodes()) {
            let listen = SocketAddr::new(cluster.spare_addr(spare), cluster.port());
            taps.push((node, Tap::start(listen, cluster.socket_addr(node)).await));
        }
        Ok(Self { stage, taps })
    }

    fn url(&self, role: &str) -> String {
        let hosts: Vec<String> = self.taps.iter().map(|(_, tap)| tap.addr().to_string()).collect();
        format!("postgres://{role}@{}/app", hosts.join(","))
    }

    async fn pools(&self, role: &str, seed: u64) -> Result<Vec<Pool>, Error> {
        let failed = |error: &dyn std::fmt::Display| Error::Other(format!("the fleet: {error}"));
        let mut pools = Vec::new();
        for number in 0..u64::from(POOLS) {
            let builder = Pool::builder(self.url(role)).map_err(|error| failed(&error))?;
            let pool = builder.max_size(2).seed(seed.wrapping_add(number)).build();
            pools.push(pool.map_err(|error| failed(&error))?);
            // Instances are not started in the same millisecond.
            sleep(Duration::from_millis(10)).await;
        }
        Ok(pools)
    }

    /// Prints what reaches each server, after the pools have settled.
    async fn count(&self, half: &str, counted: Duration) {
        sleep(SETTLES).await;
        self.taps.iter().for_each(|(_, tap)| tap.reset());
        sleep(counted).await;
        for (node, tap) in &self.taps {
            let counts = tap.counts();
            let role = if *node == self.stage.cluster.primary() { "primary" } else { "standby" };
            let seconds = counted.as_secs_f64();
            let number = |count: u64| f64::from(u32::try_from(count).unwrap_or(u32::MAX));
            let (sessions, statements) = (number(counts.startups), number(counts.queries));
            say(&format!(
                "fleet/{half}: {role} {}: {} sessions and {} statements in {seconds} s: {:.1} and {:.1} a second; \
                 {:.2} sessions a minute and {:.2} statements a second for each of {POOLS} pools",
                node.0,
                counts.startups,
                counts.queries,
                sessions / seconds,
                statements / seconds,
                sessions * 60.0 / seconds / f64::from(POOLS),
                statements / seconds / f64::from(POOLS),
            ));
        }
    }
}
