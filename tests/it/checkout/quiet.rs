//! What a call costs while nothing happens: no message more than plain deadpool-postgres and tokio-postgres send.

use std::net::SocketAddr;
use std::time::Duration;

use testbed::{Cluster, Counts, Node, Tap};
use tokio_postgres::NoTls;
use tokio_postgres_failover::ledger::Ledger;
use tokio_postgres_failover::{Guarantee, Pool, PoolBuilder, deadpool_postgres};

const TIMES: u64 = 25;
/// Longer than the test.
const NEVER: Duration = Duration::from_secs(3600);

struct Bench {
    cluster: Cluster,
    tap: Tap,
}

impl Bench {
    async fn new() -> Self {
        let cluster = Cluster::builder().nodes(1).start().await;
        let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
        Self { cluster, tap }
    }

    fn url(&self) -> String {
        format!("postgres://app@{}/app", self.tap.addr())
    }

    fn ours(&self) -> PoolBuilder {
        let builder = Pool::builder(self.url()).unwrap().max_size(2);
        // A machine that stands still makes a connection look idle for long, which is then tested.
        builder.heartbeat_interval(NEVER).patrol_interval(NEVER).test_idle_after(NEVER)
    }

    fn plain(&self) -> deadpool_postgres::Pool {
        let recycling_method = deadpool_postgres::RecyclingMethod::Fast;
        let config = deadpool_postgres::ManagerConfig { recycling_method };
        let manager = deadpool_postgres::Manager::from_config(self.url().parse().unwrap(), NoTls, config);
        deadpool_postgres::Pool::builder(manager).max_size(2).build().unwrap()
    }

    /// What was sent while `work` ran `TIMES` times. The driver closes a statement without waiting for that, so each
    /// run ends in a round trip of its own, by which all before it has passed. If the machine stood still and that cost
    /// a connection, it is counted anew.
    async fn count(&self, mut work: impl AsyncFnMut()) -> Counts {
        let mut counts = Counts::default();
        for _ in 0..3 {
            work().await;
            self.tap.reset();
            for _ in 0..TIMES {
                work().await;
            }
            counts = self.tap.counts();
            assert!(counts.round_trips >= TIMES, "the tap saw nothing: {counts:?}");
            if counts.connections == 0 {
                break;
            }
        }
        counts
    }
}

/// Acceptance 10: checkout, query and return send exactly what deadpool-postgres sends with its cheapest recycling.
#[tokio::test]
async fn a_checkout_sends_nothing_of_its_own() {
    let bench = Bench::new().await;
    let (ours, plain) = (bench.ours().build().unwrap(), bench.plain());
    ours.get().await.unwrap().query_one("SELECT 1", &[]).await.unwrap();
    plain.get().await.unwrap().query_one("SELECT 1", &[]).await.unwrap();

    let with_ours = bench
        .count(async || {
            ours.get().await.unwrap().query_one("SELECT 1", &[]).await.unwrap();
            ours.get().await.unwrap().batch_execute("").await.unwrap();
        })
        .await;
    let with_plain = bench
        .count(async || {
            plain.get().await.unwrap().query_one("SELECT 1", &[]).await.unwrap();
            plain.get().await.unwrap().batch_execute("").await.unwrap();
        })
        .await;
    assert_eq!(with_ours, with_plain);

    let with_ours = bench
        .count(async || {
            let client = ours.get().await.unwrap();
            let statement = client.prepare_cached("SELECT 2").await.unwrap();
            client.query_one(&statement, &[]).await.unwrap();
        })
        .await;
    let with_plain = bench
        .count(async || {
            let client = plain.get().await.unwrap();
            let statement = client.prepare_cached("SELECT 2").await.unwrap();
            client.query_one(&statement, &[]).await.unwrap();
        })
        .await;
    assert_eq!(with_ours, with_plain);

    let with_ours = bench.count(async || ours.get().await.unwrap().batch_execute("SELECT 3").await.unwrap()).await;
    assert_eq!((with_ours.round_trips, with_ours.queries), (TIMES, TIMES));
}

/// Acceptance 10: a transaction takes no more round trips than the driver's own, whichever way it is run, and one less
/// if BEGIN travels with the first statement.
#[tokio::test]
async fn a_transaction_takes_no_round_trip_more() {
    let bench = Bench::new().await;
    let plain = bench.plain();
    let mut client = plain.get().await.unwrap();
    let drivers = bench
        .count(async || {
            let transaction = client.transaction().await.unwrap();
            transaction.batch_execute("SELECT 1").await.unwrap();
            transaction.commit().await.unwrap();
        })
        .await;
    let asks_for_fence = bench.cluster.version().await < 14;
    let ledger = Ledger::default();
    // The application's role owns the database.
    ledger.install(&client).await.unwrap();
    for (together, saved) in [(false, 0), (true, TIMES)] {
        let ours = bench.ours().begin_with_first_statement(together).build().unwrap();
        ours.get().await.unwrap();
        let guarantees = [Guarantee::ExactlyOnce, Guarantee::Ledger(ledger.clone()), Guarantee::AtLeastOnce];
        for (guarantee, reads) in guarantees.into_iter().zip([false; 3]).chain([(Guarantee::ExactlyOnce, true)]) {
            let counts = bench
                .count(async || {
                    let call = ours.build_transaction().guarantee(guarantee.clone()).read_only(reads);
                    call.run(async |tx| Ok(tx.batch_execute("SELECT 1").await?)).await.unwrap();
                })
                .await;
            // Without a mark, a server that does not report a fence is asked for it after BEGIN.
            let saved = if asks_for_fence && guarantee == Guarantee::AtLeastOnce && !reads { 0 } else { saved };
            assert_eq!(counts.round_trips + saved, drivers.round_trips, "{guarantee:?}: {counts:?} {drivers:?}");
            assert_eq!((counts.connections, counts.cancels), (0, 0));
        }
    }
}

/// While nothing is asked of it, a pool sends its heartbeat and nothing else: one round trip an interval.
#[tokio::test]
async fn an_idle_pool_sends_its_heart_beat_alone() {
    let bench = Bench::new().await;
    let interval = Duration::from_millis(100);
    let pool = bench.ours().heartbeat_interval(interval).heartbeat_timeout(NEVER).build().unwrap();
    pool.connect().await.unwrap();
    bench.tap.reset();
    let began = tokio::time::Instant::now();
    testbed::eventually("ten heart-beats", Duration::from_secs(20), async || bench.tap.counts().round_trips >= 10)
        .await;
    let (counts, elapsed) = (bench.tap.counts(), began.elapsed());
    // After a time in which the machine stood still, one is answered and the next one sent at once.
    assert!(elapsed >= interval * 7, "ten heart-beats within {elapsed:?}");
    // The connection that found the primary became the first pooled one, so the heartbeat opens one of its own.
    assert!(counts.connections <= 1, "{counts:?}");
    assert_eq!(pool.status().view.generation.get(), 1);
}
