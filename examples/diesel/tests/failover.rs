//! diesel-async through a real failover.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use diesel::sql_types::{BigInt, Bool, Text};
use diesel::{QueryableByName, sql_query};
use diesel_async::pooled_connection::deadpool;
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use failover_diesel::pool;
use testbed::{Cluster, Node, eventually};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_postgres_failover::Pool;

/// For what comes within milliseconds on an idle machine.
const LONG: Duration = Duration::from_secs(60);
const CONNECTIONS: usize = 8;
/// One for each connection.
const WRITERS: usize = CONNECTIONS;
/// How many rows each of them stores before the failover, and then after it.
const ROWS: usize = 10;

#[derive(QueryableByName)]
struct Server {
    #[diesel(sql_type = Text)]
    address: String,
    #[diesel(sql_type = Bool)]
    in_recovery: bool,
}

const SERVER: &str = "SELECT host(inet_server_addr()) AS address, pg_is_in_recovery() AS in_recovery";
const INSERT: &str = "INSERT INTO notes VALUES ($1)
    RETURNING host(inet_server_addr()) AS address, pg_is_in_recovery() AS in_recovery";

#[derive(QueryableByName)]
struct Note {
    #[diesel(sql_type = BigInt)]
    id: i64,
}

/// Stores rows until there are enough on the successor. Returns those that the server acknowledged.
///
/// A statement that fails may have stored its row, so no number is used twice.
async fn write(
    pool: deadpool::Pool<AsyncPgConnection>,
    writer: usize,
    first: String,
    written: Arc<AtomicUsize>,
) -> Vec<i64> {
    let (mut acknowledged, mut after) = (Vec::new(), 0);
    for id in (writer..).step_by(WRITERS) {
        let id = i64::try_from(id).unwrap();
        let mut connection = pool.get().await.unwrap();
        let Ok(server) = sql_query(INSERT).bind::<BigInt, _>(id).get_result::<Server>(&mut connection).await else {
            continue;
        };
        acknowledged.push(id);
        written.fetch_add(1, Ordering::Relaxed);
        assert!(after == 0 || server.address != first, "row {id} went to {first} after one to its successor");
        after += usize::from(server.address != first);
        if after == ROWS {
            break;
        }
    }
    acknowledged
}

/// Its pool is full of connections to the primary, and all of them are in use, when that freezes. After the failover
/// each one leads to the successor. What was acknowledged is there, and nothing is there twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_connection_is_stale_after_a_failover() {
    let cluster = Cluster::start().await;
    let failover = Pool::builder(cluster.url_hosts()).unwrap().build().unwrap();
    let pool = pool(&failover, CONNECTIONS).unwrap();
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS {
        held.push(pool.get().await.unwrap());
    }
    sql_query("CREATE TABLE notes (id bigint)").execute(&mut held[0]).await.unwrap();
    drop(held);
    let written = Arc::new(AtomicUsize::new(0));
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        writers.spawn(write(pool.clone(), writer, cluster.addr(Node(0)).to_string(), Arc::clone(&written)));
    }
    // `written.load` would be diesel's own method.
    let enough = || AtomicUsize::load(&written, Ordering::Relaxed) >= WRITERS * ROWS;
    eventually("the writers write", LONG, async || enough()).await;

    cluster.freeze(Node(0));
    let successor = cluster.most_advanced_standby().await;
    cluster.promote_timed(successor).await;
    eventually("the failover is known", LONG, async || failover.status().view.generation.get() == 2).await;
    let acknowledged: Vec<i64> = timeout(LONG, writers.join_all()).await.expect("all write again").concat();
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
    let stored: Vec<Note> = sql_query("SELECT id FROM notes").get_results(&mut held[0]).await.unwrap();
    let different: BTreeSet<i64> = stored.iter().map(|note| note.id).collect();
    assert_eq!(different.len(), stored.len(), "a row is there twice");
    let lost: Vec<_> = acknowledged.iter().filter(|id| !different.contains(id)).collect();
    assert!(lost.is_empty(), "of {} acknowledged rows, these are lost: {lost:?}", acknowledged.len());
}
