//! sqlx with its own pool, which knows nothing of failovers.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{PgPool, Row};
use testbed::{Cluster, Node, eventually};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{LONG, sidecar, through};

const CONNECTIONS: u32 = 8;
/// One for each connection.
const WRITERS: usize = CONNECTIONS as usize;
/// How many rows each of them stores before the failover, and then after it.
const ROWS: usize = 10;
const SERVER: &str = "SELECT host(inet_server_addr()), pg_is_in_recovery()";
const INSERT: &str = "INSERT INTO notes VALUES ($1) RETURNING host(inet_server_addr())";

/// Stores rows until there are enough on the successor. Returns those that the server acknowledged.
///
/// A statement that fails may have stored its row, so no number is used twice.
async fn write(pool: PgPool, writer: usize, first: String, written: Arc<AtomicUsize>) -> Vec<i64> {
    let (mut acknowledged, mut after) = (Vec::new(), 0);
    for id in (writer..).step_by(WRITERS) {
        let id = i64::try_from(id).unwrap();
        let Ok(server) = sqlx::query_scalar::<_, String>(INSERT).bind(id).fetch_one(&pool).await else { continue };
        acknowledged.push(id);
        written.fetch_add(1, Ordering::Relaxed);
        assert!(after == 0 || server != first, "row {id} went to {first} after one to its successor");
        after += usize::from(server != first);
        if after == ROWS {
            break;
        }
    }
    acknowledged
}

/// All its connections are in use when the primary freezes, which closes none of them. After the failover each one
/// leads to the successor. What was acknowledged is there, and nothing is there twice.
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
    sqlx::query("CREATE TABLE notes (id bigint)").execute(&pool).await.unwrap();
    eventually("its connections are open", LONG, async || pool.size() == CONNECTIONS).await;
    let written = Arc::new(AtomicUsize::new(0));
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        writers.spawn(write(pool.clone(), writer, cluster.addr(Node(0)).to_string(), Arc::clone(&written)));
    }
    let enough = || written.load(Ordering::Relaxed) >= WRITERS * ROWS;
    eventually("the writers write", LONG, async || enough()).await;

    cluster.freeze(Node(0));
    let successor = cluster.most_advanced_standby().await;
    cluster.promote_timed(successor).await;
    let acknowledged: Vec<i64> = timeout(LONG, writers.join_all()).await.expect("all write again").concat();
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut connection = timeout(LONG, pool.acquire()).await.expect("a connection").unwrap();
        let row = sqlx::query(SERVER).fetch_one(&mut *connection).await.expect("none is stale");
        assert_eq!(row.get::<String, _>(0), cluster.addr(successor).to_string());
        assert!(!row.get::<bool, _>(1));
        held.push(connection);
    }
    let stored: Vec<i64> = sqlx::query_scalar("SELECT id FROM notes").fetch_all(&mut *held[0]).await.unwrap();
    let different: BTreeSet<i64> = stored.iter().copied().collect();
    assert_eq!(different.len(), stored.len(), "a row is there twice");
    let lost: Vec<_> = acknowledged.iter().filter(|id| !different.contains(id)).collect();
    assert!(lost.is_empty(), "of {} acknowledged rows, these are lost: {lost:?}", acknowledged.len());
    drop(held);
    let _ = timeout(Duration::from_secs(1), pool.close()).await;
}
