//! Transactions in doubt whose pool is led to another cluster meanwhile, as at a blue/green switch. The other cluster
//! knows nothing of them, so its answer is never asked for, and nothing is written there to find out.

use std::net::SocketAddr;
use std::sync::Arc;

use testbed::{Cluster, Cut, Cutter, Node};
use tokio::time::timeout;
use tokio_postgres_failover::error::{EndedInside, Ending, Unsettled};
use tokio_postgres_failover::{Error, Guarantee, Pool};

use super::finish::{single, with_ledger};
use crate::support::bench::settlers;
use crate::support::load::LONG;
use crate::support::{Runs, insert, stored};

/// The blue cluster behind a cutter, the green one beside it, and a pool that knows both addresses.
struct Scene {
    blue: Arc<Cluster>,
    green: Cluster,
    green_id: u64,
    cutter: Cutter,
    pool: Pool,
}

async fn identifier(cluster: &Cluster) -> u64 {
    let sql = "SELECT system_identifier FROM pg_control_system()";
    let row = cluster.direct(Node(0)).await.query_one(sql, &[]).await.unwrap();
    row.get::<_, i64>(0).cast_unsigned()
}

impl Scene {
    async fn new() -> Self {
        let (blue, green) = (with_ledger(single()).await, with_ledger(single().foreign()).await);
        let (blue_id, green_id) = (identifier(&blue).await, identifier(&green).await);
        let cutter = Cutter::start(SocketAddr::new(blue.spare_addr(0), 0), blue.socket_addr(Node(0))).await;
        let url = format!("postgres://app@{},{}/app", cutter.addr(), green.socket_addr(Node(0)));
        let pool = Pool::builder(url).unwrap().system_identifier(blue_id).build().unwrap();
        pool.connect().await.unwrap();
        Self { blue: Arc::new(blue), green, green_id, cutter, pool }
    }

    async fn turns_green(&self) {
        self.blue.kill(Node(0)).await;
        self.pool.accept_cluster(self.green_id);
    }

    /// How many rows the green cluster's ledger has, fences included.
    async fn entered(&self) -> i64 {
        let sql = "SELECT count(*) FROM failover.ledger";
        self.green.direct(Node(0)).await.query_one(sql, &[]).await.unwrap().get(0)
    }
}

/// COMMIT was carried out on the blue cluster, and its answer is lost with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_is_settled_on_no_other_cluster() {
    for guarantee in settlers() {
        let (scene, runs) = (Scene::new().await, Runs::default());
        let (blue, pool, green_id) = (Arc::clone(&scene.blue), scene.pool.clone(), scene.green_id);
        scene.cutter.arm_with(Cut::CommitAnswerDropped, move || async move {
            blue.kill(Node(0)).await;
            pool.accept_cluster(green_id);
        });
        let work = scene.pool.build_transaction().guarantee(guarantee.clone()).run(async |tx| {
            runs.begin();
            insert(&tx, 1).await
        });
        let result = timeout(LONG, work).await.expect("the call hangs");
        let (rows, entered) = (stored(&scene.green).await, scene.entered().await);
        let Err(Error::CommitUnknown(unknown)) = &result else { panic!("{guarantee:?}: {result:?} {rows:?}") };
        assert_eq!(unknown.reason(), Unsettled::OtherCluster, "{guarantee:?}");
        assert_eq!((runs.count(), rows, entered), (1, vec![], 0), "{guarantee:?}");
    }
}

/// The closure's own COMMIT was carried out on the blue cluster, or nothing was sent that commits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closures_own_commit_is_looked_for_on_no_other_cluster() {
    for guarantee in settlers() {
        for commits in [true, false] {
            let what = format!("{guarantee:?}, commits: {commits}");
            let (scene, runs) = (Scene::new().await, Runs::default());
            let work = scene.pool.build_transaction().guarantee(guarantee.clone()).run(async |tx| {
                insert(&tx, 1).await?;
                if runs.begin() == 1 {
                    if commits {
                        tx.batch_execute("COMMIT").await?;
                    }
                    scene.turns_green().await;
                    tx.batch_execute("SELECT 1").await?;
                }
                Ok(())
            });
            let result = timeout(LONG, work).await.expect("the call hangs");
            let ledger = i64::from(!commits && matches!(guarantee, Guarantee::Ledger(_)));
            let found = (runs.count(), stored(&scene.green).await, scene.entered().await);
            match result {
                Err(Error::EndedInside(inside)) if commits => {
                    assert_eq!(EndedInside::ending(&inside), Ending::Committed, "{what}");
                    assert_eq!(found, (1, vec![], 0), "{what}");
                }
                Ok(()) if !commits => assert_eq!(found, (2, vec![1], ledger), "{what}"),
                result => panic!("{what}: {result:?} {found:?}"),
            }
        }
    }
}
