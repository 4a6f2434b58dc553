//! Clients that store orders, and note down what they were told.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::StatusCode;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::client::Client;

/// Between two orders of a client: three servers and a browser share the machine.
const PAUSE: Duration = Duration::from_millis(30);
/// After a failure.
const REST: Duration = Duration::from_millis(500);
/// How many orders are remembered from before a command: the newest may be lost with an asynchronous primary.
const BEFORE: usize = 500;
/// For each client to get an answer after a failover.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the clients were told since [`Load::watch`].
#[derive(Default)]
pub(crate) struct Window {
    pub(crate) acknowledged: Vec<String>,
    pub(crate) failed: Vec<String>,
    pub(crate) longest: Duration,
}

#[derive(Default)]
struct Record {
    watched: bool,
    acknowledged: VecDeque<String>,
    failed: Vec<String>,
    longest: Duration,
}

struct Shared {
    record: Mutex<Record>,
    answered: Vec<AtomicU64>,
}

pub(crate) struct Load {
    shared: Arc<Shared>,
    clients: Mutex<JoinSet<()>>,
}

impl Load {
    pub(crate) fn start(service: SocketAddr, clients: usize) -> Self {
        let answered = (0..clients).map(|_| AtomicU64::new(0)).collect();
        let shared = Arc::new(Shared { record: Mutex::default(), answered });
        let mut tasks = JoinSet::new();
        for number in 0..clients {
            tasks.spawn(Arc::clone(&shared).client(service, number));
        }
        Self { shared, clients: Mutex::new(tasks) }
    }

    /// Notes down all that is answered from now on.
    pub(crate) fn watch(&self) {
        let mut record = self.shared.record();
        (record.watched, record.longest) = (true, Duration::ZERO);
        record.failed.clear();
    }

    /// What was noted down, as soon as each client has two answers more.
    pub(crate) async fn watched(&self) -> Window {
        let counts = || self.shared.answered.iter().map(|answered| answered.load(Ordering::SeqCst)).collect::<Vec<_>>();
        let before = counts();
        let go_on = async {
            while !counts().iter().zip(&before).all(|(now, before)| *now >= before + 2) {
                sleep(PAUSE).await;
            }
        };
        if timeout(PATIENCE, go_on).await.is_err() {
            println!("After {PATIENCE:?} some clients still have no answer.");
        }
        let mut record = self.shared.record();
        record.watched = false;
        Window {
            acknowledged: record.acknowledged.drain(..).collect(),
            failed: record.failed.drain(..).collect(),
            longest: record.longest,
        }
    }

    pub(crate) async fn stop(&self) {
        let mut clients = std::mem::take(&mut *self.clients.lock().unwrap_or_else(PoisonError::into_inner));
        clients.shutdown().await;
    }
}

impl Shared {
    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn client(self: Arc<Self>, service: SocketAddr, number: usize) {
        let mut connection = None;
        for round in 0_u64.. {
            let sku = format!("{number}-{round}");
            let began = Instant::now();
            let answer = order(&mut connection, service, &sku, number).await;
            let took = began.elapsed();
            let failed = answer.is_err();
            self.note(sku, answer, took);
            self.answered[number].fetch_add(1, Ordering::SeqCst);
            sleep(if failed { REST } else { PAUSE }).await;
        }
    }

    fn note(&self, sku: String, answer: Result<(), String>, took: Duration) {
        let mut record = self.record();
        record.longest = record.longest.max(took);
        match answer {
            Ok(()) => record.acknowledged.push_back(sku),
            Err(failure) if record.watched => record.failed.push(failure),
            Err(_) => {}
        }
        if !record.watched && record.acknowledged.len() > BEFORE {
            record.acknowledged.pop_front();
        }
    }
}

/// Half of the clients name their requests. None is repeated: each has to succeed.
async fn order(connection: &mut Option<Client>, service: SocketAddr, sku: &str, number: usize) -> Result<(), String> {
    let mut client = match connection.take() {
        Some(client) => client,
        None => Client::connect(service).await?,
    };
    let key = [("idempotency-key", sku)];
    let answer = client.order(sku, if number.is_multiple_of(2) { &key[..] } else { &[] }).await?;
    let told = if answer.status == StatusCode::CREATED { Ok(()) } else { Err(format!("{answer:?}")) };
    *connection = Some(client);
    told
}
