//! The pools that are compared, and what one call does on each.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bb8_postgres::PostgresConnectionManager;
use bb8_postgres::bb8;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions, PgSslMode};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, NoTls};
use tokio_postgres_failover::deadpool_postgres::{Manager, ManagerConfig, Pool as Deadpool, RecyclingMethod};
use tokio_postgres_failover::ledger::Ledger;
use tokio_postgres_failover::{Guarantee, Pool};

use super::{CONNECTIONS, Failure, Work};
use crate::counting::cpu_time;

/// Ratios are relative to this one.
pub(super) const BASE: &str = "deadpool-fast";

const SELECT: &str = "SELECT 1";
const INSERT: &str = "INSERT INTO entries (id) VALUES ($1)";
const ID: i64 = 1;

/// One subject's part of one round.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slice {
    /// Calls per second.
    pub(super) throughput: f64,
    /// Latencies, in microseconds.
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) p999: f64,
    /// Time on the client's processors for each call, in microseconds.
    pub(super) cpu: f64,
}

/// A pool under one kind of call.
#[async_trait]
pub(super) trait Subject: Send + Sync {
    fn name(&self) -> &'static str;

    /// More tasks than that make no sense on it.
    fn most_tasks(&self) -> usize;

    /// Calls, one after the other.
    async fn calls(&self, times: u32) -> Result<(), Failure>;

    /// So many tasks call, one call after the other, for so long.
    async fn slice(&self, tasks: usize, time: Duration) -> Result<Slice, Failure>;
}

/// The server.
#[derive(Clone, Copy, Debug)]
pub(super) struct Where {
    pub(super) address: SocketAddr,
}

/// Creates what the calls write into.
pub(super) async fn prepare(administrator: &Client) -> Result<(), Failure> {
    Ledger::default().install(administrator).await?;
    administrator
        .batch_execute(
            "CREATE TABLE entries (id bigint NOT NULL); GRANT ALL ON entries TO app;
             GRANT USAGE ON SCHEMA failover TO app; GRANT ALL ON failover.ledger TO app",
        )
        .await?;
    Ok(())
}

/// All subjects for this kind of call, with their connections open.
pub(super) async fn open(work: Work, at: Where) -> Result<Vec<Box<dyn Subject>>, Failure> {
    let url = format!("postgres://app@{}/app", at.address);
    let mut subjects: Vec<Box<dyn Subject>> = Vec::new();
    match work {
        Work::Get => {
            subjects.push(named("client", Clients::open(&url, CONNECTIONS).await?));
            subjects.push(named(BASE, Get(deadpool(&url, RecyclingMethod::Fast).await?)));
            subjects.push(named("failover", Get(failover(&url).await?)));
            subjects.push(named("deadpool-verified", Get(deadpool(&url, RecyclingMethod::Verified).await?)));
            subjects.push(named("bb8", Get(bb8(&url, true).await?)));
            subjects.push(named("bb8-untested", Get(bb8(&url, false).await?)));
            subjects.push(named("sqlx", Get(sqlx(at, true).await?)));
            subjects.push(named("sqlx-untested", Get(sqlx(at, false).await?)));
        }
        Work::Transaction => {
            let ours = failover(&url).await?;
            let with = |guarantee| Guaranteed { pool: ours.clone(), guarantee };
            subjects.push(named("client", OwnClient::open(&url).await?));
            subjects.push(named(BASE, Insert(deadpool(&url, RecyclingMethod::Fast).await?)));
            subjects.push(named("exactly-once", with(Guarantee::ExactlyOnce)));
            subjects.push(named("at-most-once", with(Guarantee::AtMostOnce)));
            subjects.push(named("idempotent", with(Guarantee::AtLeastOnce)));
            subjects.push(named("ledger", with(Guarantee::Ledger(Ledger::default()))));
            subjects.push(named("deadpool-verified", Insert(deadpool(&url, RecyclingMethod::Verified).await?)));
            subjects.push(named("bb8", Insert(bb8(&url, true).await?)));
            subjects.push(named("bb8-untested", Insert(bb8(&url, false).await?)));
            subjects.push(named("sqlx", Insert(sqlx(at, true).await?)));
            subjects.push(named("sqlx-untested", Insert(sqlx(at, false).await?)));
        }
    }
    Ok(subjects)
}

async fn failover(url: &str) -> Result<Pool, Failure> {
    let pool = Pool::builder(url)?.max_size(CONNECTIONS).build()?;
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS {
        held.push(pool.get().await?);
    }
    Ok(pool)
}

async fn deadpool(url: &str, recycling_method: RecyclingMethod) -> Result<Deadpool, Failure> {
    let manager = Manager::from_config(url.parse()?, NoTls, ManagerConfig { recycling_method });
    let pool = Deadpool::builder(manager).max_size(CONNECTIONS).build()?;
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS {
        held.push(pool.get().await?);
    }
    Ok(pool)
}

type Bb8 = bb8::Pool<PostgresConnectionManager<NoTls>>;

async fn bb8(url: &str, tested: bool) -> Result<Bb8, Failure> {
    let size = u32::try_from(CONNECTIONS)?;
    let manager = PostgresConnectionManager::new(url.parse()?, NoTls);
    let builder = bb8::Pool::builder().max_size(size).min_idle(size).test_on_check_out(tested);
    Ok(builder.build(manager).await?)
}

async fn sqlx(at: Where, tested: bool) -> Result<PgPool, Failure> {
    let options = PgConnectOptions::new_without_pgpass()
        .host(&at.address.ip().to_string())
        .port(at.address.port())
        .username("app")
        .database("app")
        .ssl_mode(PgSslMode::Disable);
    let size = u32::try_from(CONNECTIONS)?;
    let builder = PgPoolOptions::new().max_connections(size).min_connections(size).test_before_acquire(tested);
    let pool = builder.connect_with(options).await?;
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS {
        held.push(pool.acquire().await?);
    }
    Ok(pool)
}

/// One call.
trait Call: Send + Sync + 'static {
    const MOST_TASKS: usize = usize::MAX;

    fn call(&self) -> impl Future<Output = Result<(), Failure>> + Send;
}

struct Named<C> {
    name: &'static str,
    call: Arc<C>,
}

fn named<C: Call>(name: &'static str, call: C) -> Box<dyn Subject> {
    Box::new(Named { name, call: Arc::new(call) })
}

#[async_trait]
impl<C: Call> Subject for Named<C> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn most_tasks(&self) -> usize {
        C::MOST_TASKS
    }

    async fn calls(&self, times: u32) -> Result<(), Failure> {
        for _ in 0..times {
            self.call.call().await?;
        }
        Ok(())
    }

    async fn slice(&self, tasks: usize, time: Duration) -> Result<Slice, Failure> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut running = JoinSet::new();
        let (began, cpu) = (Instant::now(), cpu_time());
        for _ in 0..tasks {
            running.spawn(repeat(Arc::clone(&self.call), Arc::clone(&stop)));
        }
        tokio::time::sleep(time).await;
        stop.store(true, Ordering::Relaxed);
        let mut latencies = Vec::new();
        while let Some(done) = running.join_next().await {
            latencies.append(&mut done??);
        }
        Slice::of(latencies, began.elapsed(), cpu_time().saturating_sub(cpu))
    }
}

async fn repeat(call: Arc<impl Call>, stop: Arc<AtomicBool>) -> Result<Vec<u32>, Failure> {
    let mut latencies = Vec::with_capacity(1024);
    while !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        call.call().await?;
        latencies.push(u32::try_from(began.elapsed().as_nanos()).unwrap_or(u32::MAX));
    }
    Ok(latencies)
}

impl Slice {
    /// From latencies in nanoseconds.
    fn of(mut latencies: Vec<u32>, elapsed: Duration, cpu: Duration) -> Result<Self, Failure> {
        latencies.sort_unstable();
        let count = f64::from(u32::try_from(latencies.len())?);
        let at = |permille: usize| {
            let index = (latencies.len() * permille / 1000).min(latencies.len().saturating_sub(1));
            latencies.get(index).map(|nanos| f64::from(*nanos) / 1e3).ok_or("no call has ended within the slice")
        };
        let (throughput, cpu) = (count / elapsed.as_secs_f64(), cpu.as_secs_f64() * 1e6 / count);
        Ok(Self { throughput, p50: at(500)?, p99: at(990)?, p999: at(999)?, cpu })
    }
}

/// Clients without a pool, shared in turn: what the driver can do.
struct Clients {
    clients: Vec<Client>,
    next: AtomicUsize,
}

impl Clients {
    async fn open(url: &str, count: usize) -> Result<Self, Failure> {
        let mut clients = Vec::new();
        for _ in 0..count {
            clients.push(connect(url).await?);
        }
        Ok(Self { clients, next: AtomicUsize::new(0) })
    }
}

async fn connect(url: &str) -> Result<Client, Failure> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

impl Call for Clients {
    async fn call(&self) -> Result<(), Failure> {
        let index = self.next.fetch_add(1, Ordering::Relaxed) % self.clients.len();
        Ok(self.clients[index].batch_execute(SELECT).await?)
    }
}

/// A client of one's own, which one task can have.
struct OwnClient {
    client: Mutex<Client>,
    statement: tokio_postgres::Statement,
}

impl OwnClient {
    async fn open(url: &str) -> Result<Self, Failure> {
        let client = connect(url).await?;
        let statement = client.prepare(INSERT).await?;
        Ok(Self { client: Mutex::new(client), statement })
    }
}

impl Call for OwnClient {
    const MOST_TASKS: usize = 1;

    async fn call(&self) -> Result<(), Failure> {
        let mut client = self.client.lock().await;
        let transaction = client.transaction().await?;
        transaction.execute(&self.statement, &[&ID]).await?;
        Ok(transaction.commit().await?)
    }
}

/// `get`, `SELECT 1` as one simple query, and return.
struct Get<P>(P);

impl Call for Get<Pool> {
    async fn call(&self) -> Result<(), Failure> {
        Ok(self.0.get().await?.batch_execute(SELECT).await?)
    }
}

impl Call for Get<Deadpool> {
    async fn call(&self) -> Result<(), Failure> {
        Ok(self.0.get().await?.batch_execute(SELECT).await?)
    }
}

impl Call for Get<Bb8> {
    async fn call(&self) -> Result<(), Failure> {
        Ok(self.0.get().await?.batch_execute(SELECT).await?)
    }
}

impl Call for Get<PgPool> {
    async fn call(&self) -> Result<(), Failure> {
        sqlx::raw_sql(SELECT).execute(&self.0).await?;
        Ok(())
    }
}

/// A transaction with one INSERT, prepared where the pool keeps prepared statements.
struct Insert<P>(P);

impl Call for Insert<Deadpool> {
    async fn call(&self) -> Result<(), Failure> {
        let mut client = self.0.get().await?;
        let statement = client.prepare_cached(INSERT).await?;
        let transaction = client.transaction().await?;
        transaction.execute(&statement, &[&ID]).await?;
        Ok(transaction.commit().await?)
    }
}

impl Call for Insert<Bb8> {
    async fn call(&self) -> Result<(), Failure> {
        let mut client = self.0.get().await?;
        let transaction = client.transaction().await?;
        // Parsed each time: a bb8 connection has no place for statements. It takes no round trip of its own.
        transaction.execute_typed(INSERT, &[(&ID, Type::INT8)]).await?;
        Ok(transaction.commit().await?)
    }
}

impl Call for Insert<PgPool> {
    async fn call(&self) -> Result<(), Failure> {
        let mut transaction = self.0.begin().await?;
        sqlx::query(INSERT).bind(ID).execute(&mut *transaction).await?;
        Ok(transaction.commit().await?)
    }
}

/// This pool's transactions.
struct Guaranteed {
    pool: Pool,
    guarantee: Guarantee,
}

impl Call for Guaranteed {
    async fn call(&self) -> Result<(), Failure> {
        let work = async |tx: tokio_postgres_failover::Transaction| {
            let statement = tx.prepare_cached(INSERT).await?;
            tx.execute(&statement, &[&ID]).await?;
            Ok(())
        };
        Ok(self.pool.build_transaction().guarantee(self.guarantee.clone()).run(work).await?)
    }
}
