//! Writers that call one pool again and again, and remember every answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_postgres_failover::{Pool, deadpool_postgres};

use crate::{PACE, WRITERS};

/// What the catch-and-retry loop of an application waits after an error.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(100);
/// A call that is under way when the writers stop gets this long.
const PATIENCE: Duration = Duration::from_secs(35);

/// The two contestants. Both are driven by the same loop.
#[derive(Clone)]
pub(crate) enum Side {
    /// This crate.
    Failover(Pool),
    /// What an application has today.
    Plain(deadpool_postgres::Pool),
}

impl Side {
    pub(crate) fn table(&self) -> &'static str {
        match self {
            Self::Failover(_) => "demo_failover",
            Self::Plain(_) => "demo_plain",
        }
    }

    async fn write(&self, id: i64) -> Result<(), String> {
        match self {
            Self::Failover(pool) => {
                let sql = "INSERT INTO demo_failover (id) VALUES ($1)";
                let work = async |tx: tokio_postgres_failover::Transaction| {
                    let insert = tx.prepare_cached(sql).await?;
                    tx.execute(&insert, &[&id]).await?;
                    Ok(())
                };
                pool.transaction(work).await.map_err(|error| error.to_string())
            }
            Self::Plain(pool) => {
                let client = pool.get().await.map_err(|error| error.to_string())?;
                let insert = client.prepare_cached("INSERT INTO demo_plain (id) VALUES ($1)").await;
                let insert = insert.map_err(|error| error.to_string())?;
                client.execute(&insert, &[&id]).await.map_err(|error| error.to_string())?;
                Ok(())
            }
        }
    }
}

/// What can be seen from outside while the writers run.
pub(crate) struct Progress {
    start: Instant,
    pub(crate) acknowledged: AtomicU64,
    pub(crate) errors: AtomicU64,
    /// When each writer was acknowledged last, in microseconds since the start.
    last: [AtomicU64; WRITERS],
}

impl Progress {
    pub(crate) fn all_wrote_since(&self, since: Instant) -> bool {
        let since = micros(since - self.start);
        self.last.iter().all(|last| last.load(Ordering::Relaxed) > since)
    }
}

/// What one writer lived through.
#[derive(Default)]
pub(crate) struct Writer {
    /// Each acknowledged write, and when its acknowledgement came.
    pub(crate) acknowledged: Vec<(i64, Instant)>,
    /// Each error that the pool gave to its caller.
    pub(crate) errors: Vec<(Instant, String)>,
}

impl Writer {
    /// What comes when the load has ended is of its end.
    pub(crate) fn errors_until(&self, end: Instant) -> impl Iterator<Item = &(Instant, String)> {
        self.errors.iter().filter(move |(at, _)| *at <= end)
    }
}

/// A running set of writers.
pub(crate) struct Load {
    pub(crate) progress: Arc<Progress>,
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<Writer>>,
}

impl Load {
    pub(crate) fn start(side: &Side, start: Instant) -> Self {
        let progress = Arc::new(Progress {
            start,
            acknowledged: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            last: [const { AtomicU64::new(0) }; WRITERS],
        });
        let stop = Arc::new(AtomicBool::new(false));
        let next_id = Arc::new(AtomicI64::new(1));
        let writers = (0..WRITERS)
            .map(|number| {
                let (side, stop) = (side.clone(), Arc::clone(&stop));
                let (progress, next_id) = (Arc::clone(&progress), Arc::clone(&next_id));
                tokio::spawn(async move { write_until(&side, &stop, &progress, &next_id, number).await })
            })
            .collect();
        Self { progress, stop, writers }
    }

    /// The writers begin no further write.
    pub(crate) fn end(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Waits until the writers have ended their calls, and returns what each of them lived through.
    pub(crate) async fn stop(self) -> Result<Vec<Writer>, Box<dyn std::error::Error>> {
        self.end();
        let mut lived = Vec::new();
        for writer in self.writers {
            lived.push(timeout(PATIENCE, writer).await.map_err(|_| "a write never ended")??);
        }
        Ok(lived)
    }
}

/// The loop of an application: write, and on an error wait and try the same again.
async fn write_until(
    side: &Side,
    stop: &AtomicBool,
    progress: &Progress,
    next_id: &AtomicI64,
    number: usize,
) -> Writer {
    let mut lived = Writer::default();
    'ids: while !stop.load(Ordering::Relaxed) {
        let id = next_id.fetch_add(1, Ordering::Relaxed);
        while let Err(error) = side.write(id).await {
            lived.errors.push((Instant::now(), error));
            progress.errors.fetch_add(1, Ordering::Relaxed);
            sleep(PAUSE_AFTER_ERROR).await;
            if stop.load(Ordering::Relaxed) {
                break 'ids;
            }
        }
        let now = Instant::now();
        lived.acknowledged.push((id, now));
        progress.acknowledged.fetch_add(1, Ordering::Relaxed);
        if let Some(last) = progress.last.get(number) {
            last.store(micros(now - progress.start), Ordering::Relaxed);
        }
        sleep(PACE).await;
    }
    lived
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
