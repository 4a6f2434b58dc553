//! sqlx. It connects to one host.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;

use super::{Attempt, Opens, insert_sql, needs_system_dns, text, work};
use crate::peer::{Load, Peer, Target};
use crate::recorder::Recorder;

/// What is asked of a connection before it is lent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Variant {
    /// `test_before_acquire`: whether it answers.
    Default,
    /// Also whether it takes writes, as its users add after a failover.
    Hook,
}

impl Variant {
    pub(super) const ALL: [Self; 2] = [Self::Default, Self::Hook];
}

struct Opened {
    pool: PgPool,
    sql: String,
}

#[async_trait]
impl Attempt for Opened {
    async fn insert(&self, _worker: usize, id: &str) -> Result<(), String> {
        let statement = sqlx::query(sqlx::AssertSqlSafe(self.sql.as_str())).bind(id);
        statement.execute(&self.pool).await.map_err(|error| text(&error))?;
        Ok(())
    }
}

#[async_trait]
impl Peer for Variant {
    fn name(&self) -> String {
        match self {
            Self::Default => "sqlx",
            Self::Hook => "sqlx-hook",
        }
        .to_owned()
    }

    fn version(&self) -> String {
        format!("sqlx {}", crate::versions::of("sqlx"))
    }

    fn config(&self) -> String {
        let hook = match self {
            Self::Default => "",
            Self::Hook => "; before_acquire: SHOW transaction_read_only must say off",
        };
        format!("max_connections(workers), acquire_timeout 5 s, test_before_acquire (default){hook}; one host")
    }

    fn needs_name(&self) -> bool {
        true
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
        let size = u32::try_from(target.workers).map_err(|error| text(&error))?;
        let mut options = PgPoolOptions::new().max_connections(size).acquire_timeout(Duration::from_secs(5));
        if *self == Self::Hook {
            options = options.before_acquire(|connection, _| {
                Box::pin(async move {
                    let shown: String = sqlx::query_scalar("SHOW transaction_read_only").fetch_one(connection).await?;
                    Ok(shown == "off")
                })
            });
        }
        let pool = options.connect_lazy(&target.url()).map_err(|error| text(&error))?;
        Ok(Arc::new(Opened { pool, sql: insert_sql(target) }))
    }
}
