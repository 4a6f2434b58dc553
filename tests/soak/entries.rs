//! The rows that workers write, each known by its id: without a key, so that a doubled write shows, or keyed by the id.

use tokio_postgres::Client;
use tokio_postgres_failover::{Error, Transaction};

/// By the superuser, for the pool's role.
pub(crate) async fn create_tables(client: &Client) {
    let sql = "CREATE TABLE entries (id bigint NOT NULL);
               CREATE TABLE keyed (id bigint PRIMARY KEY, at timestamptz NOT NULL DEFAULT now());
               GRANT ALL ON entries, keyed TO app";
    client.batch_execute(sql).await.expect("CREATE TABLE");
}

pub(crate) async fn plain(tx: &Transaction, id: i64) -> Result<(), Error> {
    let statement = tx.prepare_cached("INSERT INTO entries (id) VALUES ($1)").await?;
    tx.execute(&statement, &[&id]).await?;
    Ok(())
}

pub(crate) async fn keyed(tx: &Transaction, id: i64) -> Result<(), Error> {
    let sql = "INSERT INTO keyed (id) VALUES ($1) ON CONFLICT (id) DO NOTHING";
    let statement = tx.prepare_cached(sql).await?;
    tx.execute(&statement, &[&id]).await?;
    Ok(())
}

/// Each id with how often it is there, for [`History::check`](testbed::History::check).
pub(crate) async fn stored(client: &Client) -> Vec<(i64, i64)> {
    let sql = "SELECT id, count(*) FROM (SELECT id FROM entries UNION ALL SELECT id FROM keyed) e GROUP BY id";
    let rows = client.query(sql, &[]).await.expect("the tables");
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}
