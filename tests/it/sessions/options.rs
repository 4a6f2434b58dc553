//! Options of the connection string that decide how long opening a session may take.

use std::net::SocketAddr;
use std::time::Duration;

use testbed::{Cluster, Node, Path};
use tokio_postgres_failover::Pool;

use crate::support::PATIENCE;

/// A server whose log-ins take this long.
async fn slow(log_in: Duration) -> (Cluster, Path) {
    let cluster = Cluster::builder().nodes(1).start().await;
    let path = Path::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    path.delay_log_ins(log_in);
    (cluster, path)
}

/// The default of `probe_timeout` would end each log-in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connect_timeout_longer_than_the_default_is_kept() {
    let (_cluster, path) = slow(Duration::from_secs(4)).await;
    let url = format!("postgres://app@{}/app?connect_timeout=30", path.addr());
    let pool = Pool::builder(url).unwrap().build().unwrap();
    pool.get_within(PATIENCE).await.unwrap().batch_execute("SELECT 1").await.unwrap();
}

/// As in libpq, it limits the log-in too, and not only TCP. The error names what decides.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connect_timeout_limits_the_whole_log_in() {
    let (_cluster, path) = slow(PATIENCE).await;
    let url = format!("host={} port={} user=app connect_timeout=1", path.addr().ip(), path.addr().port());
    let pool = Pool::builder(url).unwrap().build().unwrap();
    let error = pool.get_within(Duration::from_secs(2)).await.map(drop).unwrap_err().to_string();
    assert!(error.contains("within 1s") && error.contains("probe_timeout"), "{error}");
}

#[tokio::test]
async fn a_connect_timeout_that_probe_timeout_would_cut_is_refused() {
    let builder = || Pool::builder("host=127.0.0.1 user=app connect_timeout=10").unwrap();
    let error = builder().probe_timeout(Duration::from_secs(2)).build().map(drop).unwrap_err().to_string();
    assert!(error.contains("connect_timeout") && error.contains("probe_timeout"), "{error}");
    builder().probe_timeout(Duration::from_secs(10)).build().unwrap();
}
