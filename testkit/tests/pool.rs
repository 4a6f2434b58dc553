//! A service with the pool, through real failovers. The first test is the one that the README shows.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

// begin
use tokio_postgres_failover::{Error, Pool};
use tokio_postgres_failover_testkit::Cluster;

/// Your service: each order is stored once.
async fn place_order(pool: &Pool, id: i64) -> Result<(), Error> {
    let insert = "INSERT INTO orders VALUES ($1)";
    pool.transaction(async |tx| tx.execute(insert, &[&id]).await.map(drop).map_err(Error::from)).await
}

#[tokio::test]
async fn orders_survive_a_failover() -> Result<(), Box<dyn std::error::Error>> {
    let cluster = Cluster::start().await?;
    let pool = Pool::builder(cluster.url())?.build()?;
    pool.get().await?.batch_execute("CREATE TABLE orders (id bigint)").await?;

    let failover = tokio::spawn(cluster.fail_over());
    let mut placed = 0;
    while !failover.is_finished() {
        place_order(&pool, placed).await?; // waits, and does not fail
        placed += 1;
    }
    failover.await??;
    place_order(&pool, placed).await?;

    let orders: i64 = pool.get().await?.query_one("SELECT count(*) FROM orders", &[]).await?.get(0);
    assert_eq!(orders, placed + 1); // none is lost, and none is there twice
    Ok(())
}
// end

#[test]
fn the_readme_shows_a_test_that_runs() {
    let source = include_str!("pool.rs");
    let shown = source.split("// begin\n").nth(1).unwrap().split("// end\n").next().unwrap();
    let readme = include_str!("../README.md");
    assert!(readme.contains(&format!("```rust\n{shown}```\n")), "README.md differs from tests/pool.rs");
}

#[tokio::test]
async fn a_name_that_moves_is_followed() -> Result<(), Box<dyn std::error::Error>> {
    use tokio_postgres_failover_testkit::DnsFault;

    let cluster = Cluster::start().await?;
    cluster.dns().point_to(&[cluster.primary()])?;
    let pool = Pool::builder(cluster.url_by_name())?.dns_servers([cluster.dns().server()]).build()?;
    pool.get().await?.batch_execute("CREATE TABLE orders (id bigint)").await?;
    assert!(cluster.dns().queries() > 0);

    cluster.dns().fail(DnsFault::Failing);
    place_order(&pool, 1).await?;
    let next = cluster.fail_over().await?;
    cluster.dns().point_to(&[next])?;
    place_order(&pool, 2).await?;
    Ok(())
}

#[tokio::test]
async fn a_lost_answer_to_commit_is_settled() -> Result<(), Box<dyn std::error::Error>> {
    use tokio_postgres_failover_testkit::Cut;

    let cluster = Cluster::builder().standbys(0).start().await?;
    let cutter = cluster.cutter(cluster.primary()).await?;
    let pool = Pool::builder(cutter.url())?.build()?;
    pool.get().await?.batch_execute("CREATE TABLE orders (id bigint)").await?;
    for cut in [Cut::Begin, Cut::Commit, Cut::CommitAnswer] {
        cutter.cut_next(cut);
        place_order(&pool, 1).await?;
    }
    assert_eq!(
        cutter.cuts().iter().map(|made| made.cut).collect::<Vec<_>>(),
        [Cut::Begin, Cut::Commit, Cut::CommitAnswer]
    );
    let orders: i64 = pool.get().await?.query_one("SELECT count(*) FROM orders", &[]).await?.get(0);
    assert_eq!(orders, 3);
    Ok(())
}
