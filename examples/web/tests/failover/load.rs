//! Clients that order and look at what they ordered, without a pause, and hold each answer against what they asked.

use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper::StatusCode;
use testbed::eventually;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::LONG;
use crate::client::{Answer, Client};

/// Two processor cores are shared with three servers.
const PACE: Duration = Duration::from_millis(5);
/// How many rounds of every client are enough to say that it goes on.
const ROUNDS: usize = 5;

#[derive(Default)]
struct Record {
    acknowledged: Vec<(String, i64)>,
    failed: Vec<String>,
    not_alive: Vec<String>,
    longest: Duration,
}

struct Shared {
    stop: AtomicBool,
    answered: AtomicUsize,
    rounds: Vec<AtomicUsize>,
    record: Mutex<Record>,
}

pub(crate) struct Load {
    shared: Arc<Shared>,
    clients: JoinSet<()>,
}

/// What a load came to.
pub(crate) struct Outcome {
    pub(crate) answered: usize,
    /// What and which number each acknowledged order has, sorted.
    pub(crate) acknowledged: Vec<(String, i64)>,
    pub(crate) failed: Vec<String>,
    pub(crate) not_alive: Vec<String>,
    longest: Duration,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { acknowledged, failed, longest, .. } = self;
        write!(
            f,
            "{} orders acknowledged, {} requests failed, the longest took {longest:?}",
            acknowledged.len(),
            failed.len()
        )
    }
}

impl Load {
    pub(crate) async fn start(service: SocketAddr, clients: usize) -> Self {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            answered: AtomicUsize::new(0),
            rounds: (0..clients).map(|_| AtomicUsize::new(0)).collect(),
            record: Mutex::default(),
        });
        let mut tasks = JoinSet::new();
        for number in 0..clients {
            let client = Client::connect(service).await.unwrap();
            tasks.spawn(Arc::clone(&shared).orders(client, number));
        }
        tasks.spawn(Arc::clone(&shared).asks_whether_it_lives(Client::connect(service).await.unwrap()));
        Self { shared, clients: tasks }
    }

    pub(crate) fn answered(&self) -> usize {
        self.shared.answered.load(Ordering::SeqCst)
    }

    /// Waits until every client has ordered and looked some times more.
    pub(crate) async fn goes_on(&self) {
        let rounds = || self.shared.rounds.iter().map(|rounds| rounds.load(Ordering::SeqCst)).collect::<Vec<_>>();
        let before = rounds();
        let further = || rounds().iter().zip(&before).all(|(now, before)| *now >= before + ROUNDS);
        eventually("all clients go on", LONG, async || further() || self.has_failed()).await;
    }

    /// A client that failed stops: the test has its answer.
    fn has_failed(&self) -> bool {
        !self.shared.record.lock().unwrap().failed.is_empty()
    }

    pub(crate) async fn stop(self) -> Outcome {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.clients.join_all().await;
        let mut record = std::mem::take(&mut *self.shared.record.lock().unwrap());
        record.acknowledged.sort();
        let Record { acknowledged, failed, not_alive, longest } = record;
        Outcome { answered: self.shared.answered.load(Ordering::SeqCst), acknowledged, failed, not_alive, longest }
    }
}

impl Shared {
    async fn orders(self: Arc<Self>, mut client: Client, number: usize) {
        let mut round = 0;
        while !self.stop.load(Ordering::SeqCst) {
            if let Err(failure) = self.round(&mut client, &format!("{number:02}-{round:06}"), number).await {
                self.record.lock().unwrap().failed.push(format!("client {number}: {failure}"));
                return;
            }
            round += 1;
            self.rounds[number].store(round, Ordering::SeqCst);
            tokio::time::sleep(PACE).await;
        }
    }

    /// Half of the clients name their requests.
    async fn round(&self, client: &mut Client, sku: &str, number: usize) -> Result<(), String> {
        let key = [("idempotency-key", sku)];
        let headers = if number.is_multiple_of(2) { &key[..] } else { &[] };
        let began = Instant::now();
        let stored = client.order(sku, headers).await?;
        self.counts(began);
        // 200 would say that it was there already: that this request was stored twice, but for its key.
        if stored.status != StatusCode::CREATED {
            return Err(format!("{stored:?}"));
        }
        let id = stored.json()["id"].as_i64().ok_or("an order without a number")?;
        self.record.lock().unwrap().acknowledged.push((sku.to_owned(), id));
        let began = Instant::now();
        let shown = client.get(&format!("/orders/{id}")).await?;
        self.counts(began);
        if shown.status == StatusCode::OK && shown.json() == stored.json() { Ok(()) } else { Err(format!("{shown:?}")) }
    }

    fn counts(&self, began: Instant) {
        self.answered.fetch_add(1, Ordering::SeqCst);
        let mut record = self.record.lock().unwrap();
        record.longest = record.longest.max(began.elapsed());
    }

    async fn asks_whether_it_lives(self: Arc<Self>, mut client: Client) {
        while !self.stop.load(Ordering::SeqCst) {
            match client.get("/healthz").await {
                Ok(Answer { status: StatusCode::OK, .. }) => {}
                other => {
                    self.record.lock().unwrap().not_alive.push(format!("{other:?}"));
                    return;
                }
            }
            tokio::time::sleep(PACE).await;
        }
    }
}
