//! This crate.

use std::sync::Arc;

use async_trait::async_trait;
use tokio_postgres_failover::{Pool, Transaction};

use super::{Attempt, Opens, insert_sql, text, work};
use crate::peer::{Load, Peer, Target};
use crate::recorder::Recorder;

/// The ways to write with this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Variant {
    /// `Pool::transaction`: exactly once.
    Transaction,
    /// `Pool::idempotent`: once or more.
    Idempotent,
    /// `Pool::transaction`, with a session to each standby.
    Warm,
}

impl Variant {
    pub(super) const ALL: [Self; 3] = [Self::Transaction, Self::Idempotent, Self::Warm];
}

struct Failover {
    pool: Pool,
    sql: String,
    idempotent: bool,
}

#[async_trait]
impl Attempt for Failover {
    async fn insert(&self, _worker: usize, id: &str) -> Result<(), String> {
        let work = async |tx: Transaction| {
            let insert = tx.prepare_cached(&self.sql).await?;
            tx.execute(&insert, &[&id]).await?;
            Ok(())
        };
        let done = if self.idempotent { self.pool.idempotent(work).await } else { self.pool.transaction(work).await };
        done.map_err(|error| text(&error))
    }
}

#[async_trait]
impl Peer for Variant {
    fn name(&self) -> String {
        match self {
            Self::Transaction => "failover",
            Self::Idempotent => "failover-idempotent",
            Self::Warm => "failover-warm",
        }
        .to_owned()
    }

    fn version(&self) -> String {
        "tokio-postgres-failover (this checkout)".to_owned()
    }

    fn config(&self) -> String {
        match self {
            Self::Transaction => "max_size(workers), all else by default; pool.transaction(..)",
            Self::Idempotent => {
                "max_size(workers), all else by default; pool.idempotent(..), INSERT .. WHERE NOT EXISTS"
            }
            Self::Warm => "max_size(workers), warm_standbys(true), all else by default; pool.transaction(..)",
        }
        .to_owned()
    }

    async fn start(&self, target: &Target, recorder: Arc<Recorder>) -> Result<Box<dyn Load>, String> {
        Ok(work(&self.open(target)?, target, &recorder))
    }
}

impl Opens for Variant {
    fn open(&self, target: &Target) -> Result<Arc<dyn Attempt>, String> {
        let mut builder = Pool::builder(target.url()).map_err(|error| text(&error))?.max_size(target.workers);
        // Where the system's resolver knows the name, this crate asks the same server as everyone, by resolv.conf.
        if target.name.is_some() && !target.system_dns {
            builder = builder.dns_servers([target.dns]);
        }
        let builder = if *self == Self::Warm { builder.warm_standbys(true) } else { builder };
        let pool = builder.build().map_err(|error| text(&error))?;
        let idempotent = *self == Self::Idempotent;
        // What is run again whatever happens has to be such that it may be.
        let sql = if idempotent {
            let table = &target.table;
            format!("INSERT INTO {table} (id) SELECT $1 WHERE NOT EXISTS (SELECT FROM {table} WHERE id = $1)")
        } else {
            insert_sql(target)
        };
        Ok(Arc::new(Failover { pool, sql, idempotent }))
    }
}
