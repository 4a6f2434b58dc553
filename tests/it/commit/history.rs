//! Commits whose answer is lost, settled after more than one crash or promotion, against real servers.
//!
//! Each case is a history that the pool does not see: it happens between COMMIT and the end of the connection, and
//! meanwhile the one path to the servers, a proxy, leads nowhere. Wherever a commit is lost, its transaction id is
//! given to others, who commit: a pool that asked for the id alone would be told "committed". What the pool may find
//! out depends on what its role may see, a [`Right`].

mod crashes;
mod earlier;
mod leases;
mod promotions;
mod recycled;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use testbed::{Background, Cluster, ClusterBuilder, Cut, Node};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_postgres_failover::error::Unsettled;
use tokio_postgres_failover::view::Evidence;
use tokio_postgres_failover::{Error, Guarantee};

use crate::support::bench::{Bench, standbys};
use crate::support::load::{LONG, by_name};
use crate::support::{PATIENCE, insert, sql};

fn asynchronous(nodes: usize) -> ClusterBuilder {
    Cluster::builder().nodes(nodes).asynchronous()
}

/// What the role of the pool may use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Right {
    /// `failover.wal_history` of sql/history.sql.
    Function,
    /// It is a member of `pg_monitor`.
    Monitor,
    /// What every role may.
    Nothing,
}

/// How long a call may wait for the end of a history, in which servers start, crash and are promoted one after the
/// other.
const HISTORY: Duration = Duration::from_secs(120);

/// The number of an address where nobody listens, for [`Cluster::spare_addr`].
const NOWHERE: u8 = 9;

const RIGHTS: [Right; 3] = [Right::Function, Right::Monitor, Right::Nothing];

impl Right {
    /// What the pool tells of it with servers of this version. From 17 on, the names of files prove nothing.
    fn evidence(self, version: u32) -> Evidence {
        match self {
            Self::Function => Evidence::Function,
            Self::Monitor if version < 17 => Evidence::Files,
            Self::Monitor | Self::Nothing => Evidence::Checkpoint,
        }
    }
}

/// What the pool has to answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Answer {
    /// `Ok`, after one run.
    Committed,
    /// `Ok`, as the work ran again.
    Lost,
    /// `CommitUnknown`, for one of these reasons.
    Unknown(&'static [Unsettled]),
}

/// More than one promotion or crash, as far as the pool can see.
const SEVERAL: Answer = Answer::Unknown(&[Unsettled::SeveralFailovers]);

/// The transaction in doubt: its id, and the end of its mark.
#[derive(Clone, Debug, Default)]
struct Doubt {
    xid: i64,
    mark: String,
}

/// What a history needs: the servers, and the transaction that it is about.
struct Scene {
    cluster: Arc<Cluster>,
    doubt: Arc<Mutex<Doubt>>,
}

impl Scene {
    fn doubt(&self) -> Doubt {
        self.doubt.lock().unwrap().clone()
    }

    /// The id of the transaction belongs to somebody else from now on, who has committed.
    async fn give_id_away(&self) {
        let xid = self.doubt().xid;
        let writer = self.cluster.direct(self.cluster.primary()).await;
        // In one call: a round trip for each id takes longer on a busy machine than the caller's deadline.
        let sql = format!(
            "DO $$ DECLARE used bigint := 0; BEGIN
                 WHILE used < {xid} LOOP
                     INSERT INTO keyed (id) SELECT coalesce(max(id), 0) + 1 FROM keyed
                         RETURNING pg_current_xact_id()::text::bigint INTO used;
                     COMMIT;
                 END LOOP;
                 PERFORM set_config('testbed.used', used::text, false);
             END $$"
        );
        writer.batch_execute(&sql).await.unwrap();
        let row = writer.query_one("SELECT current_setting('testbed.used')::bigint", &[]).await.unwrap();
        let used: i64 = row.get(0);
        assert_eq!(used, xid, "the id was not free any more");
        self.assert_trap().await;
    }

    /// Who asks for the id alone is told that it is committed.
    async fn assert_trap(&self) {
        let server = self.cluster.direct(self.cluster.primary()).await;
        let sql = "SELECT pg_xact_status($1::bigint::text::xid8)";
        let says: Option<String> = server.query_one(sql, &[&self.doubt().xid]).await.unwrap().get(0);
        assert_eq!(says.as_deref(), Some("committed"), "the trap is not set");
    }

    /// The end of the server's last replay lies behind the mark, or before it.
    async fn assert_replayed(&self, beyond: bool) {
        let server = self.cluster.direct(self.cluster.primary()).await;
        let sql = "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn";
        let is_beyond: bool = server.query_one(sql, &[&self.doubt().mark]).await.unwrap().get(0);
        assert_eq!(is_beyond, beyond, "the end of the last replay");
    }

    /// The log of the primary goes on beyond the mark: whatever is replayed next ends behind it.
    async fn pass_mark(&self) {
        let server = self.cluster.direct(self.cluster.primary()).await;
        write_wal(&self.cluster, 1000).await;
        let sql = "SELECT pg_current_wal_flush_lsn() >= $1::text::pg_lsn";
        let passed: bool = server.query_one(sql, &[&self.doubt().mark]).await.unwrap().get(0);
        assert!(passed, "the mark lies further on");
    }
}

/// So many kilobytes of WAL on the primary, which are flushed.
async fn write_wal(cluster: &Cluster, kilobytes: usize) {
    let server = cluster.direct(cluster.primary()).await;
    let sql = format!(
        "SET synchronous_commit = local;
         SELECT pg_logical_emit_message(true, 'testbed', repeat('x', 1000)) FROM generate_series(1, {kilobytes})"
    );
    server.batch_execute(&sql).await.unwrap();
}

/// Uses up ids: a promotion takes some, too, and what is lost must still be free then.
async fn burn_ids(cluster: &Cluster) {
    let server = cluster.direct(cluster.primary()).await;
    server.batch_execute("SET synchronous_commit = local").await.unwrap();
    // On its own: a block commits in no other transaction.
    let sql = "DO $$ BEGIN FOR n IN 1..200 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$";
    server.batch_execute(sql).await.unwrap();
}

/// From now on the log is written with commits alone, and not before: the end of it is lost in a crash. So are some ids
/// that are used up now.
async fn write_no_more(cluster: &Cluster) {
    cluster.stop_background(cluster.primary(), Background::WalWriter).await;
    let server = cluster.direct(cluster.primary()).await;
    server.batch_execute("SET synchronous_commit = off").await.unwrap();
    for _ in 0..20 {
        server.batch_execute("SELECT pg_current_xact_id()").await.unwrap();
    }
}

/// The segments of older timelines are recycled: their files are renamed, for what is written next.
async fn recycle(cluster: &Cluster, timeline: u32) {
    let server = cluster.direct(cluster.primary()).await;
    for sql in ["ALTER SYSTEM SET wal_keep_size = 0", "SELECT pg_reload_conf()"] {
        server.batch_execute(sql).await.unwrap();
    }
    let files = format!("SELECT count(*) FROM pg_ls_waldir() WHERE name ~ '^{timeline:08X}[0-9A-F]{{16}}$'");
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        write_wal(cluster, 1000).await;
        server.batch_execute("SELECT pg_switch_wal()").await.unwrap();
        server.batch_execute("CHECKPOINT").await.unwrap();
        let left: i64 = server.query_one(&files, &[]).await.unwrap().get(0);
        if left == 0 {
            return;
        }
    }
    panic!("files of timeline {timeline} are still there");
}

/// As Patroni asks for one after a promotion: from then on the control file names the new timeline.
async fn checkpoint(cluster: &Cluster, node: Node) {
    cluster.direct(node).await.batch_execute("CHECKPOINT").await.unwrap();
}

async fn grant(cluster: &Cluster, right: Right) {
    match right {
        Right::Function => {
            sql(cluster, include_str!("../../../sql/history.sql")).await;
            sql(cluster, "GRANT EXECUTE ON FUNCTION failover.wal_history TO app").await;
            // A namesake that lies, of somebody who may create objects in this schema.
            sql(
                cluster,
                "CREATE FUNCTION failover.wal_history(text, text, OUT seen text, OUT history text) LANGUAGE sql
                     AS $$ SELECT 'other'::text, ''::text $$;
                 GRANT EXECUTE ON FUNCTION failover.wal_history(text, text) TO app",
            )
            .await;
        }
        Right::Monitor => sql(cluster, "GRANT pg_monitor TO app").await,
        Right::Nothing => {}
    }
    for standby in standbys(cluster) {
        cluster.wait_replayed(standby).await;
    }
}

/// A transaction whose COMMIT is cut, and what happens to the servers before its client knows.
struct Case {
    right: Right,
    bench: Bench,
}

impl Case {
    /// With a pool that knows of the first primary alone.
    async fn new(cluster: ClusterBuilder, right: Right) -> Self {
        println!("{right:?}");
        let bench = Bench::new(cluster, Guarantee::ExactlyOnce).await;
        grant(&bench.cluster, right).await;
        let bench = bench.unaware_of_standbys().await;
        Self { right, bench }
    }

    /// The transaction runs on this node, which was promoted, with a pool that knows of no earlier primary.
    async fn turn_to(mut self, node: Node) -> Self {
        self.bench.cutter.set_upstream(self.bench.cluster.socket_addr(node));
        let pool = by_name(&self.bench.cluster).build().unwrap();
        pool.connect().await.unwrap();
        self.bench.pool = pool;
        self
    }

    /// Runs the work, and looks what became of it. The history takes place between COMMIT and the end of the
    /// connection, and the pool gets to no server meanwhile.
    async fn assert(self, cut: Cut, history: impl AsyncFn(&Scene), answer: Answer) {
        self.assert_in_steps(cut, 1, async |scene, _| history(scene).await, answer).await;
    }

    /// The same with several steps, counted from 0. The pool sees the primary behind each of them: every step but the
    /// first takes place while the pool asks what became of the commit, and so it gets no answer before the last.
    async fn assert_in_steps(self, cut: Cut, steps: usize, step: impl AsyncFn(&Scene, usize), answer: Answer) {
        let Self { right, bench } = self;
        let doubt = Arc::<Mutex<Doubt>>::default();
        let scene = Scene { cluster: Arc::clone(&bench.cluster), doubt: Arc::clone(&doubt) };
        let nowhere = SocketAddr::new(scene.cluster.spare_addr(NOWHERE), scene.cluster.port());
        let history = async {
            let mut held = hold(&bench, Some(cut));
            for number in 0..steps {
                let (is_due, over) = held;
                is_due.await.expect("the cutter holds on to it");
                bench.cutter.set_upstream(nowhere);
                step(&scene, number).await;
                held = hold(&bench, (number + 1 < steps).then_some(Cut::BeforeBeginAnswer));
                bench.cutter.set_upstream(scene.cluster.socket_addr(scene.cluster.primary()));
                over.send(()).expect("the cutter waits");
            }
        };
        let work = bench.call().deadline(HISTORY).run(async |tx| {
            let sql = "SELECT pg_current_xact_id()::text::bigint, pg_current_wal_insert_lsn()::text";
            let row = tx.query_one(sql, &[]).await?;
            if bench.runs.begin() == 1 {
                *doubt.lock().unwrap() = Doubt { xid: row.get(0), mark: row.get(1) };
            }
            insert(&tx, 1).await
        });
        let both = async { tokio::join!(work, history) };
        let (result, ()) = timeout(HISTORY + LONG, both).await.expect("the call hangs");
        println!("{right:?}: {result:?}, {:?}", doubt.lock().unwrap());
        match (answer, result) {
            (Answer::Committed, Ok(())) => bench.assert_once(1).await,
            (Answer::Lost, Ok(())) => bench.assert_once(2).await,
            (Answer::Unknown(reasons), Err(Error::CommitUnknown(unknown))) => {
                assert!(reasons.contains(&unknown.reason()), "{right:?}: {unknown:?}");
                assert_eq!(bench.runs.count(), 1);
            }
            (answer, result) => panic!("{right:?}: {answer:?} was due, and it was {result:?}"),
        }
    }
}

/// A connection stands still at the point of the cut, from the first signal until the second one.
fn hold(bench: &Bench, cut: Option<Cut>) -> (oneshot::Receiver<()>, oneshot::Sender<()>) {
    let ((due, is_due), (over, is_over)) = (oneshot::channel(), oneshot::channel());
    if let Some(cut) = cut {
        bench.cut_with(cut, async move |_| {
            due.send(()).expect("the test waits");
            // An error is the end of the test.
            let _ = is_over.await;
        });
    }
    (is_due, over)
}
