//! Writers of plain rows without any key, so that a doubled write shows; and what they were told.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use testbed::{Cluster, History, lock};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_postgres_failover::ledger::Ledger;
use tokio_postgres_failover::retry::RetryBudget;
use tokio_postgres_failover::{CommitOutcome, Error, Guarantee, Pool, RetryPolicy, Transaction};

use crate::command;
use crate::dice::Dice;
use crate::trace::{Found, Settling, Trace};

/// A call that takes longer than its deadline and the time after which a silent server counts as dead is stuck.
const STUCK_AFTER: Duration = Duration::from_secs(60);
/// Every writer writes again within this time after a fault.
const RECOVERY: Duration = Duration::from_secs(30);

/// The longest pause of a writer between two calls, in milliseconds, unless `PACE` is set. It leaves two processor
/// cores room for three servers.
const PACE: u64 = 5;
/// One writer of so many does not run again: it is told "not committed" where the others have their answer later.
const IMPATIENT: usize = 4;

/// Run by a superuser.
const HISTORY: &str = include_str!("../../sql/history.sql");

/// How a doubt is settled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Settler {
    Wal,
    Ledger,
}

impl Settler {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Wal => "wal",
            Self::Ledger => "ledger",
        }
    }
}

impl fmt::Display for Settler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "settler={}", self.name())
    }
}

/// Writers at work.
pub(crate) struct Writers {
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
}

struct Shared {
    settler: Settler,
    pool: Pool,
    begun: Instant,
    pace: u64,
    stop: AtomicBool,
    next: AtomicI64,
    history: History,
    record: Mutex<Record>,
}

#[derive(Default)]
struct Record {
    /// When each writer's last call was answered with success.
    succeeded: Vec<Option<Instant>>,
    acknowledged: BTreeMap<i64, Acknowledged>,
    /// By reason.
    unknown: BTreeMap<String, usize>,
    refused: usize,
    /// Those of the refused that should have been run again.
    failed: usize,
    stuck: usize,
    settled: Settled,
    not_committed: Vec<u64>,
    /// When a settler found that a call had not committed.
    found_lost: BTreeMap<i64, Vec<Instant>>,
}

#[derive(Clone, Copy)]
struct Acknowledged {
    proven: Instant,
    answered: Instant,
}

/// How often a settler found what.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Settled {
    pub(crate) committed: usize,
    pub(crate) not_committed: usize,
}

/// A span of time in which the server itself allowed a loss: what was committed on the primary before `until`, and was
/// answered after `from`, need not have been on a standby when this was promoted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unreplicated {
    pub(crate) from: Instant,
    pub(crate) until: Instant,
    /// A standby that was behind another was promoted first, and the other one after it. What the first one said was
    /// lost is there again, and all that the first one wrote is gone, a ledger's fences included.
    pub(crate) skipped: bool,
}

impl Unreplicated {
    fn excuses(&self, loss: Acknowledged) -> bool {
        loss.answered > self.from && loss.proven < self.until
    }

    fn excuses_finding(&self, at: Instant) -> bool {
        self.skipped && at > self.from && at < self.until
    }
}

/// What the writers' answers came to.
#[derive(Default, Debug)]
pub(crate) struct Outcome {
    pub(crate) acknowledged: usize,
    pub(crate) lost: Vec<i64>,
    pub(crate) allowed_loss: usize,
    pub(crate) doubled: Vec<i64>,
    pub(crate) untrue: Vec<i64>,
    /// Doubled or untrue, as a server had said "not committed" whose whole history was lost later.
    pub(crate) allowed_untrue: usize,
    pub(crate) unknown: BTreeMap<String, usize>,
    /// Told that nothing was committed.
    pub(crate) refused: usize,
    /// Those of the refused that should have been run again.
    pub(crate) failed: usize,
    pub(crate) stuck: usize,
    pub(crate) settled: Settled,
}

impl Outcome {
    /// Takes in what another part came to.
    pub(crate) fn add(&mut self, other: Self) {
        self.lost.extend(other.lost);
        self.doubled.extend(other.doubled);
        self.untrue.extend(other.untrue);
        for (reason, count) in other.unknown {
            *self.unknown.entry(reason).or_default() += count;
        }
    }

    pub(crate) fn unknowns(&self) -> usize {
        self.unknown.values().sum()
    }
}

/// The tables, for the pool's role; and the function that tells it the history of the server's log.
pub(crate) async fn create_tables(cluster: &Cluster, history: bool) {
    let client = cluster.direct(cluster.primary()).await;
    Ledger::default().install(&client).await.expect("the ledger");
    let sql = "CREATE TABLE entries (id bigint NOT NULL);
               GRANT ALL ON entries TO app;
               GRANT USAGE ON SCHEMA failover TO app;
               GRANT SELECT, INSERT, UPDATE, DELETE ON failover.ledger TO app";
    client.batch_execute(sql).await.expect("CREATE TABLE");
    if history {
        client.batch_execute(HISTORY).await.expect("sql/history.sql");
        let grant = "GRANT EXECUTE ON FUNCTION failover.wal_history TO app";
        client.batch_execute(grant).await.expect("GRANT");
    }
}

impl Writers {
    pub(crate) fn start(url: &str, settler: Settler, writers: usize, seed: u64) -> Self {
        let guarantee = match settler {
            Settler::Wal => Guarantee::ExactlyOnce,
            Settler::Ledger => Guarantee::Ledger(Ledger::default()),
        };
        // Re-runs come at once and as often as they are needed: this is about what is true, not about patience.
        let pool = Pool::builder(url)
            .map(|builder| {
                builder.max_size(writers).seed(seed).guarantee(guarantee).retry_budget(RetryBudget::unlimited())
            })
            .and_then(|builder| builder.retry(RetryPolicy::new().max_delay(Duration::from_millis(100))).build())
            .expect("a pool");
        let shared = Arc::new(Shared {
            settler,
            pool,
            begun: Instant::now(),
            pace: command::variable("PACE").unwrap_or(PACE),
            stop: AtomicBool::new(false),
            next: AtomicI64::new(1),
            history: History::new(),
            record: Mutex::new(Record { succeeded: vec![None; writers], ..Record::default() }),
        });
        let mut tasks = JoinSet::new();
        for (writer, salt) in (0..writers).zip(1..) {
            tasks.spawn(write(Arc::clone(&shared), writer, Dice::new(seed ^ (salt << 32))));
        }
        Self { shared, tasks }
    }

    /// Says what happens, and when.
    pub(crate) fn say(&self, what: &str) {
        self.shared.say(what);
    }

    /// Waits until every writer had success after `since`. Whatever they have under way then began after `since`, too.
    pub(crate) async fn recovered(&self, since: Instant) -> Result<(), String> {
        let all = async {
            while !self.shared.record().succeeded.iter().all(|at| at.is_some_and(|at| at > since)) {
                sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(RECOVERY, all).await.map_err(|_| format!("not all writers wrote within {RECOVERY:?} after a fault"))
    }

    /// The ids of the transactions that a settler has found not to be committed since this was asked last.
    pub(crate) fn take_not_committed(&self) -> Vec<u64> {
        std::mem::take(&mut self.shared.record().not_committed)
    }

    /// Lets the calls under way end, and holds all answers against the table.
    pub(crate) async fn stop(mut self, cluster: &Cluster, unreplicated: &[Unreplicated]) -> Outcome {
        self.shared.stop.store(true, Ordering::Relaxed);
        while let Some(writer) = self.tasks.join_next().await {
            writer.expect("a writer does not panic");
        }
        let client = cluster.direct(cluster.primary()).await;
        let rows = client.query("SELECT id, count(*) FROM entries GROUP BY id", &[]).await.expect("the table");
        let stored: Vec<(i64, i64)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        let verdict = self.shared.history.check(&stored);
        let record = std::mem::take(&mut *self.shared.record());
        let excused = |id: &i64| {
            let known = record.acknowledged.get(id);
            known.is_some_and(|known| unreplicated.iter().any(|span| span.excuses(*known)))
        };
        let excused_finding = |id: &i64| {
            let found = record.found_lost.get(id).into_iter().flatten();
            found.into_iter().any(|at| unreplicated.iter().any(|span| span.excuses_finding(*at)))
        };
        let (allowed, lost): (Vec<i64>, Vec<i64>) = verdict.lost.into_iter().partition(excused);
        let (again, doubled): (Vec<i64>, Vec<i64>) = verdict.doubled.into_iter().partition(excused_finding);
        let (there, untrue): (Vec<i64>, Vec<i64>) = verdict.untrue.into_iter().partition(excused_finding);
        for id in &lost {
            let since_begun = |at: Instant| at.duration_since(self.shared.begun);
            let times =
                record.acknowledged.get(id).map(|known| (since_begun(known.proven), since_begun(known.answered)));
            self.say(&format!("LOST: id {id}, proven and answered at {times:?}"));
        }
        Outcome {
            acknowledged: verdict.acknowledged,
            lost,
            allowed_loss: allowed.len(),
            doubled,
            untrue,
            allowed_untrue: again.len() + there.len(),
            unknown: record.unknown,
            refused: record.refused,
            failed: record.failed,
            stuck: record.stuck,
            settled: record.settled,
        }
    }
}

async fn write(shared: Arc<Shared>, writer: usize, mut dice: Dice) {
    while !shared.stop.load(Ordering::Relaxed) {
        let id = shared.next.fetch_add(1, Ordering::Relaxed);
        // The commit lies a while behind the mark in some, and at once behind it in others.
        let pause = dice.one_in(2).then(|| dice.milliseconds(0, 5));
        let call = one(&shared.pool, id, pause, is_impatient(writer));
        let (answer, trace) = Trace::of(Box::pin(timeout(STUCK_AFTER, call))).await;
        shared.note(writer, id, answer.ok(), &trace);
        sleep(dice.milliseconds(0, shared.pace)).await;
    }
}

fn is_impatient(writer: usize) -> bool {
    writer % IMPATIENT == IMPATIENT - 1
}

async fn one(pool: &Pool, id: i64, pause: Option<Duration>, impatient: bool) -> Result<(), Error> {
    let transaction = pool.build_transaction();
    let transaction = if impatient { transaction.retry(RetryPolicy::none()) } else { transaction };
    let work = async |tx: Transaction| {
        Trace::began();
        let sql = "INSERT INTO entries (id) VALUES ($1) RETURNING pg_current_xact_id()::text::bigint";
        let statement = tx.prepare_cached(sql).await?;
        Trace::xid(tx.query_one(&statement, &[&id]).await?.get::<_, i64>(0).unsigned_abs());
        if let Some(pause) = pause {
            sleep(pause).await;
        }
        Ok(())
    };
    transaction.run(work).await
}

impl Shared {
    fn record(&self) -> MutexGuard<'_, Record> {
        lock(&self.record)
    }

    fn say(&self, what: &str) {
        println!("{} {:7.2} s  {what}", self.settler, self.begun.elapsed().as_secs_f64());
    }

    /// `None`: the call did not end in time, so nobody knows.
    fn note(&self, writer: usize, id: i64, answer: Option<Result<(), Error>>, trace: &Trace) {
        let now = Instant::now();
        let mut record = self.record();
        for Settling { found, xid, at } in &trace.settlings {
            match found {
                Found::Committed => record.settled.committed += 1,
                Found::NotCommitted => {
                    record.settled.not_committed += 1;
                    record.not_committed.extend(xid);
                    record.found_lost.entry(id).or_default().push(*at);
                }
                Found::Unknown => {}
            }
        }
        match answer {
            Some(Ok(())) => {
                record.succeeded[writer] = Some(now);
                let proven = trace.proven().expect("no success without a try");
                record.acknowledged.insert(id, Acknowledged { proven, answered: now });
                self.history.acknowledged(id);
            }
            Some(Err(error)) if error.commit_outcome() == CommitOutcome::NotCommitted => {
                record.refused += 1;
                self.history.refused(id);
                if !is_impatient(writer) {
                    record.failed += 1;
                    self.say(&format!("FAILED: id {id}: {error}; {trace:?}"));
                }
            }
            Some(Err(error)) => {
                let reason = match &error {
                    Error::CommitUnknown(unknown) => format!("{:?}", unknown.reason()),
                    _ => "other".to_owned(),
                };
                *record.unknown.entry(reason).or_default() += 1;
                self.history.unknown(id);
                self.say(&format!("id {id} is unknown: {error}; {trace:?}"));
            }
            None => {
                record.stuck += 1;
                self.say(&format!("STUCK: id {id}; {trace:?}; {:?}", self.pool.status()));
                for candidate in self.pool.candidates() {
                    println!("           {candidate}");
                }
            }
        }
    }
}
