//! What the tests share.

pub(crate) mod bench;
pub(crate) mod load;
pub(crate) mod stalls;
pub(crate) mod texts;
pub(crate) mod wrapped;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use testbed::{Answer, Cluster, Node, eventually};
use tokio_postgres_failover::{Error, Transaction};

use load::create_table;

/// For conditions that come at once on an idle machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// Fails like a conflict of serializable transactions, without needing a second one.
pub(crate) const CONFLICT: &str = "DO $$ BEGIN RAISE EXCEPTION 'made up' USING ERRCODE = '40001'; END $$";
/// Key of the advisory lock behind which COMMIT waits, see [`close_gate`].
const GATE: i64 = 4711;

/// A primary and two standbys, and the tables that the writers of [`load`] fill.
pub(crate) async fn started() -> Cluster {
    let cluster = Cluster::start().await;
    create_table(&cluster).await;
    cluster
}

/// [`started`], with one server.
pub(crate) async fn started_single() -> Cluster {
    let cluster = Cluster::builder().nodes(1).start().await;
    create_table(&cluster).await;
    cluster
}

/// One server, and the table that [`insert`] fills.
pub(crate) async fn server() -> Cluster {
    let cluster = Cluster::builder().nodes(1).start().await;
    sql(&cluster, "CREATE TABLE entries (id bigint); GRANT ALL ON entries TO app").await;
    cluster
}

/// As the superuser, on a session of its own on the first server.
pub(crate) async fn sql(cluster: &Cluster, sql: &str) {
    cluster.direct(Node(0)).await.batch_execute(sql).await.unwrap();
}

/// Waits until the heartbeat has a session of its own to the primary, and has asked on it a second time. Only an older
/// session is asked for the settings of new ones.
///
/// A search may have asked this, too, on the session that proved the primary, and a caller may hold that session now.
/// So only a question counts that was asked after this call began.
pub(crate) async fn heart_beats(cluster: &Cluster) {
    let administrator = cluster.direct(cluster.primary()).await;
    let sql = "SELECT FROM pg_stat_activity WHERE usename = 'app' AND query LIKE '%pg_db_role_setting%' \
        AND query_start > (SELECT backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid())";
    eventually("the heart beats on a session of its own", PATIENCE, async || {
        administrator.execute(sql, &[]).await.unwrap() > 0
    })
    .await;
}

/// All that is stored, smallest first.
pub(crate) async fn stored(cluster: &Cluster) -> Vec<i64> {
    let rows = cluster.direct(cluster.primary()).await.query("SELECT id FROM entries ORDER BY id", &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

pub(crate) async fn insert(tx: &Transaction, id: i64) -> Result<(), Error> {
    tx.execute("INSERT INTO entries VALUES ($1)", &[&id]).await?;
    Ok(())
}

/// Counts the runs of a closure.
#[derive(Clone, Default)]
pub(crate) struct Runs(Arc<AtomicU32>);

impl Runs {
    pub(crate) fn begin(&self) -> u32 {
        self.0.fetch_add(1, Ordering::SeqCst) + 1
    }

    pub(crate) fn count(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }
}

/// From now on a COMMIT calls this, inside the first server, in a deferred trigger.
pub(crate) async fn commits_call(cluster: &Cluster, function: &str) {
    sql(
        cluster,
        &format!(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
                 'BEGIN PERFORM {function}; RETURN NULL; END';
             CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON entries DEFERRABLE INITIALLY DEFERRED
                 FOR EACH ROW EXECUTE FUNCTION wait()"
        ),
    )
    .await;
}

/// From now on a COMMIT waits, inside the first server, while the returned session holds the lock.
pub(crate) async fn close_gate(cluster: &Cluster) -> tokio_postgres::Client {
    commits_call(cluster, &format!("pg_advisory_xact_lock_shared({GATE})")).await;
    let gate = cluster.direct(Node(0)).await;
    gate.batch_execute(&format!("SELECT pg_advisory_lock({GATE})")).await.unwrap();
    gate
}

/// The process of the backend that waits at the gate.
pub(crate) async fn committing(gate: &tokio_postgres::Client) -> i32 {
    let mut waits = None;
    eventually("a COMMIT waits in the server", PATIENCE, async || {
        let sql = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
        waits = gate.query_opt(sql, &[]).await.unwrap().map(|row| row.get(0));
        waits.is_some()
    })
    .await;
    waits.unwrap()
}

pub(crate) async fn open_gate(gate: &tokio_postgres::Client) {
    gate.batch_execute(&format!("SELECT pg_advisory_unlock({GATE})")).await.unwrap();
}

pub(crate) async fn wait_gone(gate: &tokio_postgres::Client, pid: i32) {
    eventually("the cut-off backend has ended", PATIENCE, async || {
        gate.query("SELECT FROM pg_stat_activity WHERE pid = $1", &[&pid]).await.unwrap().is_empty()
    })
    .await;
}

/// A name server that answers differently for each family of addresses.
pub(crate) fn split(a: Answer, aaaa: Answer) -> Answer {
    Answer::Split { a: Box::new(a), aaaa: Box::new(aaaa) }
}
