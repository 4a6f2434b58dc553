//! tokio-postgres without a pool: a session per worker, opened anew when it has failed.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::Mutex;
use tokio_postgres::{Client, Config, NoTls, Statement};

use super::{Attempt, DRIVER_CONFIG, Driver, driver_config, insert_sql, needs_system_dns, text, work};
use crate::peer::{Load, Peer, Target};
use crate::recorder::Recorder;

/// The driver alone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plain;

struct Session {
    client: Client,
    insert: Statement,
    _driver: Driver,
}

struct Sessions {
    config: Config,
    sql: String,
    of_workers: Vec<Mutex<Option<Session>>>,
}

impl Sessions {
    async fn open(&self) -> Result<Session, tokio_postgres::Error> {
        let (client, connection) = self.config.connect(NoTls).await?;
        // How the connection ended is told by the next call that uses it.
        let driver = Driver(tokio::spawn(async { connection.await.unwrap_or_default() }));
        let insert = client.prepare(&self.sql).await?;
        Ok(Session { client, insert, _driver: driver })
    }

    async fn write(&self, slot: &mut Option<Session>, id: &str) -> Result<(), tokio_postgres::Error> {
        let session = match slot {
            Some(session) => session,
            None => slot.insert(self.open().await?),
        };
        session.client.execute(&session.insert, &[&id]).await.map(drop)
    }
}

#[async_trait]
impl Attempt for Sessions {
    async fn insert(&self, worker: usize, id: &str) -> Result<(), String> {
        let slot = self.of_workers.get(worker).ok_or("there is no such worker")?;
        let mut slot = slot.lock().await;
        let written = self.write(&mut slot, id).await;
        if written.is_err() {
            *slot = None;
        }
        written.map_err(|error| text(&error))
    }
}

#[async_trait]
impl Peer for Plain {
    fn name(&self) -> String {
        "tokio-postgres".to_owned()
    }

    fn version(&self) -> String {
        format!("tokio-postgres {}", crate::versions::of("tokio-postgres"))
    }

    fn config(&self) -> String {
        format!("a session per worker, opened anew after any error; {DRIVER_CONFIG}")
    }

    fn refuses(&self, target: &Target) -> Option<String> {
        needs_system_dns(target)
    }

    async fn start(&self, target: &Target, recorder: Arc<Recorder>) -> Result<Box<dyn Load>, String> {
        let of_workers = (0..target.workers).map(|_| Mutex::default()).collect();
        let attempt: Arc<dyn Attempt> =
            Arc::new(Sessions { config: driver_config(target)?, sql: insert_sql(target), of_workers });
        Ok(work(&attempt, target, &recorder))
    }
}
