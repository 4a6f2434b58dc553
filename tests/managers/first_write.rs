//! When a server takes its first write, told by the server and not by the pool.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_postgres::{Client, Config, NoTls};

/// For a manager to make up its mind.
const PATIENCE: Duration = Duration::from_secs(90);
const INTERVAL: Duration = Duration::from_millis(10);

/// Sessions to some servers, each of which writes as soon as it can.
pub(crate) struct FirstWrite(JoinSet<Instant>);

impl FirstWrite {
    /// Of servers that take no writes yet.
    pub(crate) fn watch(servers: impl IntoIterator<Item = SocketAddr>) -> Self {
        let mut tasks = JoinSet::new();
        for server in servers {
            tasks.spawn(async move {
                loop {
                    if write(server).await.is_ok() {
                        return Instant::now();
                    }
                    sleep(INTERVAL).await;
                }
            });
        }
        Self(tasks)
    }

    /// The first one of any of them.
    pub(crate) async fn accepted(mut self) -> Instant {
        let first = timeout(PATIENCE, self.0.join_next()).await.expect("a server takes writes");
        first.expect("there are servers").expect("no panic")
    }
}

/// On one session, which lives through the promotion of its server.
async fn write(server: SocketAddr) -> Result<(), tokio_postgres::Error> {
    let session = connect(server).await?;
    while in_recovery(&session).await? {
        sleep(INTERVAL).await;
    }
    session.batch_execute("UPDATE testbed.probe SET writes = writes + 1").await
}

async fn connect(server: SocketAddr) -> Result<Client, tokio_postgres::Error> {
    let mut config = Config::new();
    config.hostaddr(server.ip()).port(server.port()).user("postgres").dbname("app");
    config.application_name("first-write").connect_timeout(Duration::from_secs(1));
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// Waits until the server takes no new writes: it is gone, or a standby.
pub(crate) async fn ended(server: SocketAddr) -> Instant {
    let ended = async {
        while let Ok(session) = connect(server).await
            && matches!(in_recovery(&session).await, Ok(false))
        {
            sleep(INTERVAL).await;
        }
    };
    timeout(PATIENCE, ended).await.expect("the server takes no writes");
    Instant::now()
}

async fn in_recovery(session: &Client) -> Result<bool, tokio_postgres::Error> {
    Ok(session.query_one("SELECT pg_is_in_recovery()", &[]).await?.get(0))
}
