//! A cluster behind a [`Cutter`], for commits whose answer is lost.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use testbed::{Armed, Cluster, ClusterBuilder, Cut, Cutter, Node, eventually};
use tokio::time::timeout;
use tokio_postgres_failover::error::Unsettled;
use tokio_postgres_failover::ledger::Ledger;
use tokio_postgres_failover::{CommitOutcome, Error, Guarantee, Pool, TransactionBuilder};

use super::load::{LONG, by_name, create_table};
use super::{PATIENCE, Runs, insert, stored};

/// What the application's role needs, as in sql/ledger.sql.
const GRANTS: &str = "GRANT USAGE ON SCHEMA failover TO app; \
                      GRANT SELECT, INSERT, UPDATE, DELETE ON failover.ledger TO app";

pub(crate) fn settlers() -> [Guarantee; 2] {
    [Guarantee::ExactlyOnce, Guarantee::Ledger(Ledger::default())]
}

/// The ledger of [`Ledger::default`], as the application needs it.
pub(crate) async fn install_ledger(cluster: &Cluster) {
    let admin = cluster.direct(Node(0)).await;
    Ledger::default().install(&admin).await.unwrap();
    admin.batch_execute(GRANTS).await.unwrap();
}

pub(crate) fn single() -> ClusterBuilder {
    Cluster::builder().nodes(1)
}

/// A cluster whose first primary is behind a cutter; the DNS name leads to that and to the standbys.
pub(crate) struct Bench {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) cutter: Cutter,
    pub(crate) pool: Pool,
    pub(crate) guarantee: Guarantee,
    pub(crate) runs: Runs,
    pub(crate) armed: Mutex<Vec<Armed>>,
}

impl Bench {
    pub(crate) async fn new(cluster: ClusterBuilder, guarantee: Guarantee) -> Self {
        let cluster = Arc::new(cluster.start().await);
        create_table(&cluster).await;
        install_ledger(&cluster).await;
        for standby in standbys(&cluster) {
            cluster.wait_replayed(standby).await;
        }
        let listen = SocketAddr::new(cluster.spare_addr(0), cluster.port());
        let cutter = Cutter::start(listen, cluster.socket_addr(Node(0))).await;
        list(&cluster, &cluster.nodes());
        let pool = by_name(&cluster).build().unwrap();
        pool.connect().await.unwrap();
        Self { cluster, cutter, pool, guarantee, runs: Runs::default(), armed: Mutex::default() }
    }

    /// With a pool that has never heard of the standbys: a member is remembered when DNS does not name it any more.
    pub(crate) async fn unaware_of_standbys(self) -> Self {
        list(&self.cluster, &[Node(0)]);
        let pool = by_name(&self.cluster).build().unwrap();
        pool.connect().await.unwrap();
        Self { pool, ..self }
    }

    pub(crate) fn call(&self) -> TransactionBuilder<'_> {
        self.pool.build_transaction().guarantee(self.guarantee.clone())
    }

    pub(crate) async fn run(&self, call: TransactionBuilder<'_>) -> Result<(), Error> {
        let work = call.run(async |tx| {
            self.runs.begin();
            insert(&tx, 1).await
        });
        timeout(LONG, work).await.expect("the call hangs")
    }

    pub(crate) async fn write(&self) -> Result<(), Error> {
        self.run(self.call()).await
    }

    /// A write that succeeds while this happens.
    pub(crate) async fn settles_during(&self, fault: impl Future<Output = ()>) {
        let (result, ()) = tokio::join!(self.write(), fault);
        result.unwrap();
    }

    /// A write whose outcome is unknown for this reason. It ran once, and the text tells what to do.
    pub(crate) async fn assert_unknown(&self, call: TransactionBuilder<'_>, reason: Unsettled) {
        let error = self.run(call).await.unwrap_err();
        println!("{error}");
        self.assert_all_cut().await;
        let Error::CommitUnknown(unknown) = &error else { panic!("{error:?}") };
        assert_eq!(unknown.reason(), reason, "{error}");
        assert_eq!((error.commit_outcome(), self.runs.count()), (CommitOutcome::Unknown, 1));
        let text = error.to_string();
        assert!(text.contains(&reason.to_string()) && text.contains("look for its effect"), "{text}");
    }

    /// The work is stored once, and took so many runs.
    pub(crate) async fn assert_once(&self, runs: u32) {
        self.assert_all_cut().await;
        assert_eq!((self.runs.count(), stored(&self.cluster).await), (runs, vec![1]), "{:?}", self.guarantee);
    }

    /// Waits for the end of the faults: a call may be settled before that.
    pub(crate) async fn assert_all_cut(&self) {
        let armed = self.armed.lock().unwrap().clone();
        for cut in armed {
            timeout(PATIENCE, cut.happened()).await.expect("a cut did not come to pass");
        }
    }

    pub(crate) fn cut(&self, cut: Cut) {
        self.armed.lock().unwrap().push(self.cutter.arm(cut));
    }

    /// The same, and when it is due, a fault before anything is closed.
    pub(crate) fn cut_with<Fut>(&self, cut: Cut, fault: impl FnOnce(Arc<Cluster>) -> Fut + Send + 'static)
    where
        Fut: Future<Output = ()> + Send + 'static,
    {
        let cluster = Arc::clone(&self.cluster);
        self.armed.lock().unwrap().push(self.cutter.arm_with(cut, move || fault(cluster)));
    }
}

pub(crate) fn standbys(cluster: &Cluster) -> Vec<Node> {
    cluster.nodes().into_iter().filter(|node| *node != cluster.primary()).collect()
}

/// The DNS name leads to these nodes from now on, to the first one through the cutter.
pub(crate) fn list(cluster: &Cluster, nodes: &[Node]) {
    let address = |node: &Node| if *node == Node(0) { cluster.spare_addr(0) } else { cluster.addr(*node) };
    cluster.dns().set(&nodes.iter().map(address).collect::<Vec<_>>());
}

/// Nothing that the primary writes gets to these standbys from now on: all that it has.
pub(crate) async fn cut_replication(cluster: &Cluster, standbys: &[Node]) {
    for standby in standbys {
        let session = cluster.direct(*standby).await;
        session.batch_execute("ALTER SYSTEM SET primary_conninfo = ''").await.unwrap();
        session.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        eventually("the standby has turned away", PATIENCE, async || {
            session.query("SELECT FROM pg_stat_wal_receiver", &[]).await.unwrap().is_empty()
        })
        .await;
    }
    let primary = cluster.direct(cluster.primary()).await;
    eventually("the standbys have gone", PATIENCE, async || {
        primary.query("SELECT FROM pg_stat_replication", &[]).await.unwrap().is_empty()
    })
    .await;
}
