//! The Rust peers: one attempt of each to write one row, and the loop that their users write around it.

mod bb8;
mod deadpool;
mod failover;
mod plain;
mod sqlx;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_postgres::Config;
use tokio_postgres::config::TargetSessionAttrs;

use crate::event::Event;
use crate::peer::{Load, PAUSE_AFTER_ERROR, Peer, Target};
use crate::recorder::Recorder;

/// How long [`Load::stop`] waits for calls that are under way.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

/// This crate first, then the others.
pub fn peers() -> Vec<Box<dyn Peer>> {
    let mut peers: Vec<Box<dyn Peer>> = Vec::new();
    peers.extend(failover::Variant::ALL.map(|variant| Box::new(variant) as Box<dyn Peer>));
    peers.extend(deadpool::Variant::ALL.map(|variant| Box::new(variant) as Box<dyn Peer>));
    peers.push(Box::new(bb8::Bb8));
    peers.extend(sqlx::Variant::ALL.map(|variant| Box::new(variant) as Box<dyn Peer>));
    peers.push(Box::new(plain::Plain));
    peers
}

/// What a Rust peer can do: one attempt to write one row with its pool. Nothing cuts it off.
#[async_trait]
pub trait Attempt: Send + Sync + 'static {
    /// `Err` is what the caller is told.
    async fn insert(&self, worker: usize, id: &str) -> Result<(), String>;
}

/// Opens a Rust peer's pool for a number of callers that may be larger than the pool: for the growth case.
pub trait Opens: Peer {
    /// A pool of `target.workers` connections.
    fn open(&self, target: &Target) -> Result<Arc<dyn Attempt>, String>;
}

/// The Rust peers whose pools the growth case opens itself.
pub fn openers() -> Vec<Box<dyn Opens>> {
    let mut openers: Vec<Box<dyn Opens>> = Vec::new();
    openers.extend(failover::Variant::ALL.map(|variant| Box::new(variant) as Box<dyn Opens>));
    openers.extend(deadpool::Variant::ALL.map(|variant| Box::new(variant) as Box<dyn Opens>));
    openers.push(Box::new(bb8::Bb8));
    openers.extend(sqlx::Variant::ALL.map(|variant| Box::new(variant) as Box<dyn Opens>));
    openers
}

/// The statement that every Rust peer sends.
fn insert_sql(target: &Target) -> String {
    format!("INSERT INTO {} (id) VALUES ($1)", target.table)
}

/// The configuration of every peer that is built on tokio-postgres. The driver's documentation advises the first; the
/// others are in the peers' favour, and what their users set after their first outage.
fn driver_config(target: &Target) -> Result<Config, String> {
    let mut config: Config = target.url().parse().map_err(|error: tokio_postgres::Error| text(&error))?;
    config
        .target_session_attrs(TargetSessionAttrs::ReadWrite)
        .connect_timeout(Duration::from_secs(2))
        .tcp_user_timeout(Duration::from_secs(5))
        .keepalives_idle(Duration::from_secs(5))
        .keepalives_interval(Duration::from_secs(1))
        .keepalives_retries(3);
    Ok(config)
}

/// [`driver_config`] in the words of a connection string.
const DRIVER_CONFIG: &str = "target_session_attrs=read-write connect_timeout=2 tcp_user_timeout=5000 keepalives_idle=5 \
                             keepalives_interval=1 keepalives_retries=3";

/// A DNS name is of use only to a peer whose resolver knows it.
fn needs_system_dns(target: &Target) -> Option<String> {
    (target.name.is_some() && !target.system_dns)
        .then(|| "it asks the system's resolver, which needs root and unshare(1) here".to_owned())
}

/// An error and its causes: what a log would show.
fn text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text.replace('\n', " ")
}

/// Workers of this process.
struct Workers {
    stop: Arc<AtomicBool>,
    tasks: JoinSet<()>,
}

/// Starts `target.workers` workers around one attempt.
fn work(attempt: &Arc<dyn Attempt>, target: &Target, recorder: &Arc<Recorder>) -> Box<dyn Load> {
    let stop = Arc::new(AtomicBool::new(false));
    let mut tasks = JoinSet::new();
    for worker in 0..target.workers {
        let (attempt, recorder, stop) = (Arc::clone(attempt), Arc::clone(recorder), Arc::clone(&stop));
        let (prefix, pace) = (target.prefix.clone(), target.pace);
        tasks.spawn(async move {
            for counter in 0_u64.. {
                let id = format!("{prefix}-{worker}-{counter}");
                if !write(&*attempt, worker, &id, &recorder, &stop).await {
                    return;
                }
                sleep(pace).await;
            }
        });
    }
    Box::new(Workers { stop, tasks })
}

/// The loop of an application: write, and on an error wait and try the same again. False: told to stop.
async fn write(attempt: &dyn Attempt, worker: usize, id: &str, recorder: &Recorder, stop: &AtomicBool) -> bool {
    loop {
        if stop.load(Ordering::Relaxed) {
            return false;
        }
        let outcome = attempt.insert(worker, id).await;
        let failed = outcome.is_err();
        recorder.record(Event::now(worker, id.to_owned(), outcome));
        if !failed {
            return true;
        }
        sleep(PAUSE_AFTER_ERROR).await;
    }
}

#[async_trait]
impl Load for Workers {
    async fn stop(mut self: Box<Self>) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        // What hangs is ended with the set.
        let _ = timeout(STOP_PATIENCE, ended).await;
    }
}

/// Ends a session's driver with its client.
struct Driver(JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}
