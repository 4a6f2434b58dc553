//! Ten writes to your own database, half a second apart: kill the primary meanwhile.
//!
//! `cargo run --example quickstart -- postgres://user:password@my-pg.internal/db`, or with `DATABASE_URL` set. It makes
//! a table `failover_quickstart`.

use std::error::Error;
use std::time::Duration;

use tokio_postgres_failover::Pool;

async fn write() -> Result<(), Box<dyn Error>> {
    let url = std::env::args().nth(1).or_else(|| std::env::var("DATABASE_URL").ok());
    let url = url.ok_or("name your database: an argument, or DATABASE_URL, as in postgres://user@my-pg.internal/db")?;
    let pool = Pool::builder(url)?.build()?;
    let create =
        "CREATE TABLE IF NOT EXISTS failover_quickstart (id bigserial PRIMARY KEY, at timestamptz DEFAULT now())";
    pool.transaction(async |tx| Ok(tx.batch_execute(create).await?)).await?;
    let insert = "INSERT INTO failover_quickstart DEFAULT VALUES RETURNING id, host(inet_server_addr())";
    for _ in 0..10 {
        let row = pool.transaction(async |tx| Ok(tx.query_one(insert, &[]).await?)).await?;
        let (id, server): (i64, Option<String>) = (row.get(0), row.get(1));
        println!("{} stored row {id}", server.unwrap_or_else(|| "the server".to_owned()));
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    Ok(())
}

#[tokio::main]
async fn main() {
    tracing_subscriber::fmt().init();
    if let Err(error) = write().await {
        eprintln!("{error}");
        std::process::exit(1);
    }
}
