//! The test bed's own tests: one file per promise.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests are tests")]
#![allow(clippy::doc_markdown, reason = "PostgreSQL is a name")]

mod cutter;
mod failover;
mod faults;
mod leak;
mod start;
mod tap;
mod timelines;
mod trap;

use tokio_postgres::Client;

/// The one value that a query gives.
async fn value<T>(client: &Client, sql: &str) -> T
where
    T: for<'a> tokio_postgres::types::FromSql<'a>,
{
    client.query_one(sql, &[]).await.unwrap().get(0)
}
