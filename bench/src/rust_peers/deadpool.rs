//! deadpool-postgres.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio_postgres::NoTls;
use tokio_postgres_failover::deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};

use super::{Attempt, DRIVER_CONFIG, Opens, driver_config, insert_sql, needs_system_dns, text, work};
use crate::peer::{Load, Peer, Target};
use crate::recorder::Recorder;

/// How a connection is looked at before it is lent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Variant {
    /// `is_closed()` alone.
    Fast,
    /// A query.
    Verified,
}

impl Variant {
    pub(super) const ALL: [Self; 2] = [Self::Fast, Self::Verified];

    fn method(self) -> RecyclingMethod {
        match self {
            Self::Fast => RecyclingMethod::Fast,
            Self::Verified => RecyclingMethod::Verified,
        }
    }
}

struct Deadpool {
    pool: Pool,
    sql: String,
}

#[async_trait]
impl Attempt for Deadpool {
    async fn insert(&self, _worker: usize, id: &str) -> Result<(), String> {
        let client = self.pool.get().await.map_err(|error| text(&error))?;
        let insert = client.prepare_cached(&self.sql).await.map_err(|error| text(&error))?;
        client.execute(&insert, &[&id]).await.map_err(|error| text(&error))?;
        Ok(())
    }
}

#[async_trait]
impl Peer for Variant {
    fn name(&self) -> String {
        match self {
            Self::Fast => "deadpool-fast",
            Self::Verified => "deadpool-verified",
        }
        .to_owned()
    }

    fn version(&self) -> String {
        format!("deadpool-postgres {}", crate::versions::of("deadpool-postgres"))
    }

    fn config(&self) -> String {
        format!(
            "RecyclingMethod::{self:?}, max_size(workers), wait_timeout 30 s, create_timeout 5 s, recycle_timeout 2 s; \
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

impl Opens for Variant {
    fn open(&self, target: &Target) -> Result<Arc<dyn Attempt>, String> {
        let config = ManagerConfig { recycling_method: self.method() };
        let pool = Pool::builder(Manager::from_config(driver_config(target)?, NoTls, config))
            .max_size(target.workers)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(Duration::from_secs(30)))
            .create_timeout(Some(Duration::from_secs(5)))
            .recycle_timeout(Some(Duration::from_secs(2)))
            .build()
            .map_err(|error| text(&error))?;
        Ok(Arc::new(Deadpool { pool, sql: insert_sql(target) }))
    }
}
