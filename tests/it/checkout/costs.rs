//! What a pool that nobody uses costs its servers in sessions.

use std::net::SocketAddr;
use std::time::Duration;

use testbed::{Cluster, Node, Tap, eventually};
use tokio::time::sleep;
use tokio_postgres_failover::Pool;

use crate::support::PATIENCE;

/// Longer than the test.
const NEVER: Duration = Duration::from_secs(3600);
/// Longer than a machine stands still: a question that was given up would be asked on another session.
const UNHURRIED: Duration = Duration::from_secs(10);

/// The database says that new sessions are read-only, and the connection string says that the pool's are not.
#[tokio::test]
async fn a_fence_that_the_options_lift_costs_no_log_in_with_each_heartbeat() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let fence = "ALTER DATABASE app SET default_transaction_read_only = on";
    cluster.direct(Node(0)).await.batch_execute(fence).await.unwrap();
    let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let url = format!("postgres://app@{}/app?options=-c%20default_transaction_read_only%3Doff", tap.addr());
    let builder = Pool::builder(url).unwrap().heartbeat_interval(Duration::from_millis(100)).patrol_interval(NEVER);
    let pool = builder.heartbeat_timeout(UNHURRIED).build().unwrap();
    pool.get().await.unwrap().batch_execute("CREATE TABLE written (n int)").await.unwrap();
    eventually("heartbeats", PATIENCE, async || tap.counts().round_trips > 30).await;
    assert!(tap.counts().connections <= 8, "{:?}", tap.counts());
    assert_eq!(pool.status().view.generation.get(), 1);
}

/// A name leads to two addresses of the primary. The session to the second one is kept, as one to a standby is.
#[tokio::test]
async fn a_second_address_of_the_primary_costs_no_log_in_with_each_patrol() {
    let cluster = Cluster::builder().nodes(2).start().await;
    let primary = cluster.socket_addr(cluster.primary());
    let addresses = [cluster.spare_addr(0), cluster.spare_addr(1)];
    let mut taps = Vec::new();
    for address in addresses {
        taps.push(Tap::start(SocketAddr::new(address, cluster.port()), primary).await);
    }
    cluster.dns().set(&addresses);
    let url = format!("postgres://app@pg.internal:{},{}/app", cluster.port(), cluster.socket_addr(Node(1)));
    let builder = Pool::builder(url).unwrap().dns_servers([cluster.dns().addr()]);
    let builder = builder.heartbeat_timeout(UNHURRIED).probe_timeout(UNHURRIED);
    let pool = builder.patrol_interval(Duration::from_millis(100)).build().unwrap();
    drop(pool.get().await.unwrap());
    let counted = || taps.iter().map(|tap| tap.counts().connections).sum::<u64>();
    eventually("each is asked", PATIENCE, async || taps.iter().all(|tap| tap.counts().connections > 0)).await;
    sleep(Duration::from_secs(1)).await;
    taps.iter().for_each(Tap::reset);
    sleep(Duration::from_secs(3)).await;
    assert!(counted() <= 5, "{} sessions in thirty patrols", counted());
}
