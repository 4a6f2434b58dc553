//! The proxy counts, and breaks when told to.

use std::net::SocketAddr;
use std::time::Duration;

use testbed::{Cluster, Node, Tap, eventually};
use tokio::time::timeout;
use tokio_postgres::{Client, Config, NoTls};

use crate::value;

const SOON: Duration = Duration::from_millis(200);
const LONG: Duration = Duration::from_secs(30);

async fn connect(addr: SocketAddr) -> Client {
    let mut config = Config::new();
    config.hostaddr(addr.ip()).port(addr.port()).user("app").dbname("app");
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

async fn tap(cluster: &Cluster) -> Tap {
    Tap::start(SocketAddr::new(cluster.spare_addr(0), cluster.port()), cluster.socket_addr(Node(0))).await
}

#[tokio::test]
async fn statements_are_counted() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let tap = tap(&cluster).await;
    let client = connect(tap.addr()).await;
    let counts = tap.counts();
    assert_eq!((counts.connections, counts.startups, counts.round_trips), (1, 1, 0));

    tap.reset();
    client.batch_execute("SELECT 1").await.unwrap();
    let counts = tap.counts();
    assert_eq!((counts.round_trips, counts.queries, counts.by_type.get(&'Q')), (1, 1, Some(&1)));

    tap.reset();
    client.query_one("SELECT 1", &[]).await.unwrap();
    let counts = tap.counts();
    // Parse and Describe, then Bind and Execute.
    assert_eq!((counts.round_trips, counts.queries, counts.by_type.get(&'S')), (2, 1, Some(&2)));

    client.cancel_token().cancel_query(NoTls).await.unwrap();
    eventually("the cancel request", LONG, async || tap.counts().cancels == 1).await;
}

#[tokio::test]
async fn connections_stall_break_and_move() {
    let cluster = Cluster::builder().nodes(2).start().await;
    let tap = tap(&cluster).await;
    let client = connect(tap.addr()).await;

    tap.stall(true);
    let query = value::<i32>(&client, "SELECT 1");
    tokio::pin!(query);
    assert!(timeout(SOON, &mut query).await.is_err());
    assert!(timeout(SOON, connect(tap.addr())).await.is_err());
    tap.stall(false);
    assert_eq!(timeout(LONG, query).await, Ok(1));

    for end in [Tap::drop_connections, Tap::close_connections] {
        let client = connect(tap.addr()).await;
        end(&tap);
        eventually("the connection ends", LONG, async || client.is_closed()).await;
    }

    tap.set_upstream(cluster.socket_addr(Node(1)));
    assert!(value::<bool>(&connect(tap.addr()).await, "SELECT pg_is_in_recovery()").await);
}
