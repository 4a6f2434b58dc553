//! bb8-postgres.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bb8_postgres::PostgresConnectionManager;
use bb8_postgres::bb8::Pool;
use tokio_postgres::NoTls;

use super::{Attempt, DRIVER_CONFIG, Opens, driver_config, insert_sql, needs_system_dns, text, work};
use crate::peer::{Load, Peer, Target};
use crate::recorder::Recorder;

/// With its own defaults but for one time-out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bb8;

struct Opened {
    pool: Pool<PostgresConnectionManager<NoTls>>,
    sql: String,
}

#[async_trait]
impl Attempt for Opened {
    async fn insert(&self, _worker: usize, id: &str) -> Result<(), String> {
        let client = self.pool.get().await.map_err(|error| text(&error))?;
        client.execute(&self.sql, &[&id]).await.map_err(|error| text(&error))?;
        Ok(())
    }
}

#[async_trait]
impl Peer for Bb8 {
    fn name(&self) -> String {
        "bb8".to_owned()
    }

    fn version(&self) -> String {
        format!("bb8-postgres {}, bb8 {}", crate::versions::of("bb8-postgres"), crate::versions::of("bb8"))
    }

    fn config(&self) -> String {
        format!(
            "max_size(workers), connection_timeout 5 s, test_on_check_out (default), retry_connection (default); \
             {DRIVER_CONFIG}"
        )
    }

    fn refuses(&self, target: &Target) -> Option<String> {
        needs_system_dns(target)
    }

    async fn start(&self, target: &Target, recorder: Arc<Recorder>) -> Result<Box<dyn Load>, String> {
        Ok(work(&self.open(target)?, target, &recorder))
    }
}

impl Opens for Bb8 {
    fn open(&self, target: &Target) -> Result<Arc<dyn Attempt>, String> {
        let size = u32::try_from(target.workers).map_err(|error| text(&error))?;
        let manager = PostgresConnectionManager::new(driver_config(target)?, NoTls);
        let pool = Pool::builder().max_size(size).connection_timeout(Duration::from_secs(5)).build_unchecked(manager);
        Ok(Arc::new(Opened { pool, sql: insert_sql(target) }))
    }
}
