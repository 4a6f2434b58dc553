//! The kit on its own, without any pool.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

mod environment;
mod faults;
mod leftovers;
mod steps;

use std::time::Duration;

use tokio_postgres::{Client, NoTls};

/// What the slowest machine needs for a thing that takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(60);

async fn connect(url: &str) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// This program once more, with a test that is ignored otherwise.
fn again(test: &str) -> std::process::Command {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture"]);
    command
}
