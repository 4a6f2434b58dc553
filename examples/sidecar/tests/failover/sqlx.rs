//! sqlx with its own pool, which knows nothing of failovers.

use std::time::Duration;

use sqlx::Row;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use testbed::{Cluster, Node, eventually};

use super::{LONG, sidecar, through};

const CONNECTIONS: u32 = 8;
const SERVER: &str = "SELECT host(inet_server_addr()), pg_is_in_recovery()";

/// After a failover none of its connections is to the old server, although that is frozen and closes none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_connection_is_stale_after_a_failover() {
    let cluster = Cluster::start().await;
    let sidecar = sidecar(&cluster, LONG).await;
    let config = through(&cluster, &sidecar);
    let options = PgConnectOptions::new_without_pgpass()
        .host(&sidecar.address.ip().to_string())
        .port(sidecar.address.port())
        .username(config.get_user().unwrap())
        .database("app");
    // sqlx tests a connection at checkout. On a frozen host that test would hang.
    let pool = PgPoolOptions::new()
        .min_connections(CONNECTIONS)
        .max_connections(CONNECTIONS)
        .acquire_timeout(LONG)
        .connect_with(options)
        .await
        .unwrap();
    sqlx::query("CREATE TABLE notes (id bigserial)").execute(&pool).await.unwrap();
    eventually("its connections are open", LONG, async || pool.size() == CONNECTIONS).await;

    cluster.freeze(Node(0));
    let successor = cluster.most_advanced_standby().await;
    cluster.promote_timed(successor).await;
    let row = sqlx::query(SERVER).fetch_one(&pool).await.unwrap();
    assert_eq!(row.get::<String, _>(0), cluster.addr(successor).to_string());
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut connection = tokio::time::timeout(LONG, pool.acquire()).await.expect("a connection").unwrap();
        let row = sqlx::query(SERVER).fetch_one(&mut *connection).await.expect("none is stale");
        assert_eq!(row.get::<String, _>(0), cluster.addr(successor).to_string());
        assert!(!row.get::<bool, _>(1));
        held.push(connection);
    }
    sqlx::query("INSERT INTO notes DEFAULT VALUES").execute(&mut *held[0]).await.unwrap();
    drop(held);
    let _ = tokio::time::timeout(Duration::from_secs(1), pool.close()).await;
}
