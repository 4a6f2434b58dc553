//! diesel-async through a real failover.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

use std::time::Duration;

use diesel::sql_types::{BigInt, Bool, Text};
use diesel::{QueryableByName, sql_query};
use diesel_async::RunQueryDsl;
use failover_diesel::pool;
use testbed::{Cluster, Node, eventually};
use tokio::time::timeout;
use tokio_postgres_failover::Pool;

/// For what comes within milliseconds on an idle machine.
const LONG: Duration = Duration::from_secs(60);
const CONNECTIONS: usize = 4;

#[derive(QueryableByName)]
struct Server {
    #[diesel(sql_type = Text)]
    address: String,
    #[diesel(sql_type = Bool)]
    in_recovery: bool,
}

const SERVER: &str = "SELECT host(inet_server_addr()) AS address, pg_is_in_recovery() AS in_recovery";

#[derive(QueryableByName)]
struct Count {
    #[diesel(sql_type = BigInt)]
    count: i64,
}

/// Its pool is full of connections to the primary when that freezes. After the failover each one leads to the
/// successor.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_connection_is_stale_after_a_failover() {
    let cluster = Cluster::start().await;
    let failover = Pool::builder(cluster.url_hosts()).unwrap().build().unwrap();
    let pool = pool(&failover, CONNECTIONS).unwrap();
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS {
        held.push(pool.get().await.unwrap());
    }
    sql_query("CREATE TABLE notes (id bigserial)").execute(&mut held[0]).await.unwrap();
    drop(held);

    cluster.freeze(Node(0));
    let successor = cluster.most_advanced_standby().await;
    cluster.promote_timed(successor).await;
    eventually("the failover is known", LONG, async || failover.status().view.generation.get() == 2).await;
    let mut held = Vec::new();
    while held.len() < CONNECTIONS {
        let mut connection = timeout(LONG, pool.get()).await.expect("a connection").unwrap();
        // The drivers end the old sessions a moment after the failover is known.
        let Ok(server) =
            timeout(LONG, sql_query(SERVER).get_result::<Server>(&mut connection)).await.expect("an answer")
        else {
            continue;
        };
        assert_eq!((server.address, server.in_recovery), (cluster.addr(successor).to_string(), false));
        held.push(connection);
    }
    sql_query("INSERT INTO notes DEFAULT VALUES").execute(&mut held[0]).await.unwrap();
    let count: Count = sql_query("SELECT count(*) FROM notes").get_result(&mut held[1]).await.unwrap();
    assert_eq!(count.count, 1);
}
