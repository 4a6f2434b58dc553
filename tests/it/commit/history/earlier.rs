//! A call whose first attempt is lost with a standby that lagged and was promoted, and is found again when the standby
//! that has it is promoted next. No two histories of the servers hold two attempts of one call.

use std::future::pending;
use std::net::SocketAddr;
use std::time::Duration;

use testbed::{Cluster, Cut, Node, eventually};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_postgres::NoTls;
use tokio_postgres_failover::error::Unsettled;
use tokio_postgres_failover::{CommitOutcome, Error, Guarantee, Pool, RetryPolicy, Transaction, deadpool_postgres};

use super::{HISTORY, NOWHERE, Right, grant, hold, write_wal};
use crate::support::bench::{Bench, settlers};
use crate::support::load::{LONG, primary_lost};
use crate::support::{PATIENCE, insert, stored};

/// A connection that stands still: when that has happened, and what ends it.
type Held = (oneshot::Receiver<()>, oneshot::Sender<()>);

/// The primary of the first attempt.
const FIRST: Node = Node(0);
/// Lags behind, and is promoted first.
const LAGGING: Node = Node(1);
/// Has the first attempt, and is promoted when the lagging one has died.
const AHEAD: Node = Node(2);

/// Where the second attempt, on the lagging standby, is when its server dies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Second {
    /// In the closure.
    Closure,
    /// In the closure, behind a savepoint.
    Savepoint,
    /// Its COMMIT is done, and the answer is lost: both attempts are in doubt.
    Committed,
    /// Its COMMIT does not arrive.
    Undelivered,
}

/// The servers, and the one path to them.
struct Scene {
    bench: Bench,
    guarantee: Guarantee,
    /// What holds the second COMMIT.
    held: UnboundedSender<Held>,
}

impl Scene {
    async fn new(guarantee: Guarantee, right: Right) -> (Self, UnboundedReceiver<Held>) {
        println!("{guarantee:?}, {right:?}");
        let cluster = Cluster::builder().nodes(3).asynchronous();
        let bench = Bench::new(cluster, guarantee.clone()).await;
        grant(&bench.cluster, right).await;
        let bench = bench.unaware_of_standbys().await;
        // The lagging standby has the table, and nothing of what comes.
        bench.cluster.stop_following(LAGGING).await;
        write_wal(&bench.cluster, 100).await;
        let (held, is_held) = unbounded_channel();
        (Self { bench, guarantee, held }, is_held)
    }

    fn leads_to(&self, node: Option<Node>) {
        let cluster = &self.bench.cluster;
        let nowhere = SocketAddr::new(cluster.spare_addr(NOWHERE), cluster.port());
        self.bench.cutter.set_upstream(node.map_or(nowhere, |node| cluster.socket_addr(node)));
    }

    /// The first COMMIT is done and has reached one standby; the other one is promoted.
    async fn fail_over(&self) {
        let cluster = &self.bench.cluster;
        self.leads_to(None);
        cluster.wait_replayed(AHEAD).await;
        cluster.kill(FIRST).await;
        cluster.promote(LAGGING).await;
        self.leads_to(Some(LAGGING));
    }

    /// The primary dies, and the standby that had been ahead of it is promoted. It is on a timeline of its own.
    async fn turn(&self) {
        let cluster = &self.bench.cluster;
        self.leads_to(None);
        eventually("the history file is fetched", PATIENCE, async || cluster.history_of(AHEAD, 2).is_some()).await;
        cluster.kill(LAGGING).await;
        cluster.promote(AHEAD).await;
        self.leads_to(Some(AHEAD));
    }

    /// One run of the work. It returns which one it is.
    async fn work(&self, mut tx: Transaction, second: Second) -> Result<u32, Error> {
        let run = self.bench.runs.begin();
        insert(&tx, 1).await?;
        match second {
            _ if run != 2 => {}
            Second::Closure => {
                self.turn().await;
                tx.batch_execute("SELECT 1").await?;
            }
            Second::Savepoint => {
                let savepoint = tx.savepoint().await?;
                self.turn().await;
                savepoint.batch_execute("SELECT 1").await?;
                savepoint.release().await?;
            }
            Second::Committed => self.held.send(hold(&self.bench, Some(Cut::CommitAnswerDropped))).unwrap(),
            Second::Undelivered => {
                let cut = Cut::CommitUndelivered { server_stays: false };
                self.held.send(hold(&self.bench, Some(cut))).unwrap();
            }
        }
        Ok(run)
    }

    /// The call, and beside it what befalls the servers.
    async fn play(&self, mut held: UnboundedReceiver<Held>, pool: &Pool, second: Second) -> Result<u32, Error> {
        println!("{second:?}");
        let history = async {
            let (is_due, over) = hold(&self.bench, Some(Cut::CommitAnswerDropped));
            is_due.await.expect("the first COMMIT is cut");
            self.fail_over().await;
            over.send(()).expect("the cutter waits");
            if matches!(second, Second::Committed | Second::Undelivered) {
                let (is_due, over) = held.recv().await.expect("the second run begins");
                is_due.await.expect("the second COMMIT is cut");
                self.turn().await;
                over.send(()).expect("the cutter waits");
            }
        };
        let call = pool.build_transaction().guarantee(self.guarantee.clone()).deadline(HISTORY);
        let call = call.run(async |tx| self.work(tx, second).await);
        let both = async { tokio::join!(history, call) };
        let ((), result) = timeout(HISTORY + LONG, both).await.expect("the call hangs");
        println!("{result:?}");
        result
    }

    /// The first attempt alone is there, and the work did not run a third time.
    async fn assert_first_alone(&self) {
        assert_eq!((self.bench.runs.count(), stored(&self.bench.cluster).await), (2, vec![1]));
    }
}

/// Whatever became of the second attempt, the first one is found, and its value is returned.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_earlier_attempt_is_found_on_a_primary_that_was_not_asked() {
    for guarantee in settlers() {
        for second in [Second::Closure, Second::Savepoint, Second::Committed, Second::Undelivered] {
            let (scene, held) = Scene::new(guarantee.clone(), Right::Function).await;
            let result = scene.play(held, &scene.bench.pool, second).await;
            assert_eq!(result.unwrap(), 1, "the value of another attempt");
            scene.assert_first_alone().await;
        }
    }
}

/// Without the function, the log does not show what became of it. Then nothing is claimed, and nothing runs again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_earlier_attempt_that_cannot_be_looked_for_is_unknown() {
    for right in [Right::Monitor, Right::Nothing] {
        for second in [Second::Closure, Second::Committed] {
            let (scene, held) = Scene::new(Guarantee::ExactlyOnce, right).await;
            let error = scene.play(held, &scene.bench.pool, second).await.unwrap_err();
            println!("{error}");
            let Error::CommitUnknown(unknown) = &error else { panic!("{error:?}") };
            assert_eq!(unknown.reason(), Unsettled::SeveralFailovers);
            assert!(!error.to_string().contains("synchronous standby was cancelled"), "{error}");
            scene.assert_first_alone().await;
        }
    }
}

/// The server on which the first attempt began has said itself that it is not committed. Nobody can commit it later, so
/// no history needs to be searched for it, and two promotions after that leave nothing open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_its_own_server_has_denied_is_denied_for_good() {
    for server_stays in [false, true] {
        let (scene, _held) = Scene::new(Guarantee::ExactlyOnce, Right::Nothing).await;
        scene.bench.cut(Cut::CommitUndelivered { server_stays });
        let work = scene.bench.call().deadline(HISTORY).run(async |tx| {
            insert(&tx, 1).await?;
            if scene.bench.runs.begin() == 2 {
                scene.fail_over().await;
                scene.turn().await;
                tx.batch_execute("SELECT 1").await?;
            }
            Ok(())
        });
        let result = timeout(HISTORY + LONG, work).await.expect("the call hangs");
        println!("{result:?}");
        result.unwrap();
        assert_eq!((scene.bench.runs.count(), stored(&scene.bench.cluster).await), (3, vec![1]));
    }
}

/// The same through a pool that its owner built.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_earlier_attempt_of_a_wrapped_pool_is_found() {
    for guarantee in settlers() {
        let (scene, held) = Scene::new(guarantee, Right::Function).await;
        let mut config = deadpool_postgres::Config::new();
        config.url = Some(format!("postgres://app@{}/app?connect_timeout=1", scene.bench.cutter.addr()));
        let existing = config.create_pool(Some(deadpool_postgres::Runtime::Tokio1), NoTls).unwrap();
        let pool: Pool = Pool::wrap(existing).build().unwrap();
        pool.connect().await.unwrap();
        let result = scene.play(held, &pool, Second::Closure).await;
        assert_eq!(result.unwrap(), 1, "the value of another attempt");
        scene.assert_first_alone().await;
    }
}

/// How the second run ends, whose primary did not have the first attempt and is gone.
#[derive(Clone, Copy, Debug)]
enum Dies {
    /// A statement fails with the connection.
    Statement,
    /// The closure returns the error of another call, which found no primary.
    OtherCall,
    /// The server is frozen. The closure returns an error of its own, and the ROLLBACK is not answered.
    OwnError,
    /// The server is frozen until the attempt's time is over.
    TimedOut,
}

/// The primary that did not have the first attempt dies, and nobody is promoted before the call's deadline. A standby
/// has it: "not committed" would be untrue a moment later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_earlier_attempt_is_not_denied_by_a_primary_that_has_died() {
    let cases = settlers().map(|guarantee| (guarantee, Dies::Statement));
    let others = [Dies::OtherCall, Dies::OwnError, Dies::TimedOut].map(|dies| (Guarantee::ExactlyOnce, dies));
    for (guarantee, dies) in cases.into_iter().chain(others) {
        // A slow machine may need the shorter time for the first failover alone: then nothing has died at the deadline.
        let has_died = dies_before(guarantee.clone(), dies, Duration::from_secs(8)).await
            || dies_before(guarantee, dies, Duration::from_secs(40)).await;
        assert!(has_died, "{dies:?}: there was no second run");
    }
}

/// Returns whether the second run had begun at the deadline.
async fn dies_before(guarantee: Guarantee, dies: Dies, deadline: Duration) -> bool {
    println!("{dies:?}");
    let (scene, _held) = Scene::new(guarantee.clone(), Right::Function).await;
    let history = async {
        let (is_due, over) = hold(&scene.bench, Some(Cut::CommitAnswerDropped));
        is_due.await.expect("the first COMMIT is cut");
        scene.fail_over().await;
        over.send(()).expect("the cutter waits");
    };
    let retry = RetryPolicy::default().deadline(deadline);
    let retry = if matches!(dies, Dies::TimedOut) { retry.attempt_timeout(deadline / 2) } else { retry };
    let call = scene.bench.pool.build_transaction().guarantee(guarantee).retry(retry);
    let call = call.run(async |tx| {
        insert(&tx, 1).await?;
        if scene.bench.runs.begin() == 2 {
            scene.leads_to(None);
            match dies {
                Dies::Statement | Dies::OtherCall => scene.bench.cluster.kill(LAGGING).await,
                Dies::OwnError | Dies::TimedOut => scene.bench.cluster.freeze(LAGGING),
            }
            match dies {
                Dies::Statement => tx.batch_execute("SELECT 1").await?,
                Dies::OtherCall => {
                    primary_lost(&scene.bench.pool).await;
                    let inner = scene.bench.pool.build_transaction().deadline(Duration::from_millis(100));
                    inner.run(async |tx| insert(&tx, 2).await).await?;
                }
                Dies::OwnError => return Err(Error::abort("own")),
                Dies::TimedOut => pending().await,
            }
        }
        Ok(())
    });
    let both = async { tokio::join!(history, call) };
    let ((), result) = timeout(HISTORY, both).await.expect("the call hangs");
    let error = result.unwrap_err();
    println!("{error}");
    if scene.bench.runs.count() < 2 {
        return false;
    }
    assert_eq!(error.commit_outcome(), CommitOutcome::Unknown, "{dies:?}: {error:?}");
    if matches!(dies, Dies::OwnError | Dies::TimedOut) {
        scene.bench.cluster.thaw(LAGGING);
        scene.bench.cluster.kill(LAGGING).await;
    }
    scene.bench.cluster.promote(AHEAD).await;
    scene.assert_first_alone().await;
    true
}
