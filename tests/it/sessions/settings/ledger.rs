//! A ledger that somebody has changed: what it cannot prove, it does not say.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use testbed::{Cluster, Cut, Cutter, Node, eventually};
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres_failover::error::Unsettled;
use tokio_postgres_failover::ledger::Ledger;
use tokio_postgres_failover::{Error, Guarantee, Pool};

use crate::support::load::{LONG, create_table};
use crate::support::{Runs, insert, sql, stored};

const GRANTS: &str = "GRANT USAGE ON SCHEMA failover TO app; \
                      GRANT SELECT, INSERT, UPDATE, DELETE ON failover.ledger TO app";
const OTHER_IDS: &str = "
    CREATE FUNCTION failover.other_id() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN NEW.id := gen_random_uuid(); RETURN NEW; END';
    CREATE TRIGGER other_id BEFORE INSERT ON failover.ledger FOR EACH ROW EXECUTE FUNCTION failover.other_id()";
const NO_ROWS: &str = "
    CREATE FUNCTION failover.no_row() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
    CREATE TRIGGER no_row BEFORE INSERT ON failover.ledger FOR EACH ROW EXECUTE FUNCTION failover.no_row()";
const NO_UPDATES: &str = "
    ALTER TABLE failover.ledger ENABLE ROW LEVEL SECURITY;
    CREATE POLICY read ON failover.ledger FOR SELECT USING (true);
    CREATE POLICY write ON failover.ledger FOR INSERT WITH CHECK (true)";

async fn with_changed_ledger(change: &str) -> (Arc<Cluster>, Cutter, Pool) {
    let cluster = Arc::new(Cluster::builder().nodes(1).start().await);
    create_table(&cluster).await;
    Ledger::default().install(&cluster.direct(Node(0)).await).await.unwrap();
    sql(&cluster, &format!("{GRANTS}; {change}")).await;
    let cutter = Cutter::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let url = format!("postgres://app@{}/app", cutter.addr());
    let pool = Pool::builder(url).unwrap().guarantee(Guarantee::Ledger(Ledger::default())).build().unwrap();
    pool.connect().await.unwrap();
    (cluster, cutter, pool)
}

/// A COMMIT that went through, and whose answer is lost, at the latest with the server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_that_proves_nothing_settles_nothing() {
    for (name, change, crash, reason) in [
        ("a trigger gives rows other ids", OTHER_IDS, false, Unsettled::NotOffered),
        ("a crash empties the table", "ALTER TABLE failover.ledger SET UNLOGGED", true, Unsettled::NotOffered),
        ("rows cannot be updated", NO_UPDATES, false, Unsettled::NotOffered),
        ("a trigger lets no row in", NO_ROWS, false, Unsettled::NoMark),
    ] {
        println!("{name}");
        let (cluster, cutter, pool) = with_changed_ledger(change).await;
        let armed = cutter.arm_with(Cut::CommitAnswerDropped, {
            let cluster = Arc::clone(&cluster);
            async move || {
                if crash {
                    cluster.kill(Node(0)).await;
                    cluster.start_node(Node(0)).await;
                }
            }
        });
        let runs = Runs::default();
        let work = pool.transaction(async |tx| {
            runs.begin();
            insert(&tx, 1).await
        });
        let result = timeout(LONG, work).await.expect("the call hangs");
        armed.happened().await;
        assert_eq!((runs.count(), stored(&cluster).await), (1, vec![1]), "{name}: {result:?}");
        let Err(Error::CommitUnknown(unknown)) = &result else { panic!("{name}: {result:?}") };
        assert_eq!(unknown.reason(), reason, "{name}");
    }
}

/// The pool's own pruning is not cut off by the role's `statement_timeout`, or the ledger would grow for ever.
#[tokio::test]
async fn pruning_takes_its_time() {
    const SLOW: &str = "
        INSERT INTO failover.ledger (until) SELECT now() - interval '1 s' FROM generate_series(1, 20);
        CREATE FUNCTION failover.slow() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN PERFORM pg_sleep(0.05); RETURN OLD; END';
        CREATE TRIGGER slow BEFORE DELETE ON failover.ledger FOR EACH ROW EXECUTE FUNCTION failover.slow();
        ALTER ROLE app SET statement_timeout = '500ms'";
    let (cluster, _cutter, pool) = with_changed_ledger(SLOW).await;
    let admin = cluster.direct(Node(0)).await;
    // A stall of the machine may be longer than the role's limit, which is the closure's, too.
    let write = async || {
        let mut written = pool.transaction(async |tx| insert(&tx, 1).await).await;
        while written.as_ref().is_err_and(|error| error.code() == Some(&SqlState::QUERY_CANCELED)) {
            written = pool.transaction(async |tx| insert(&tx, 1).await).await;
        }
        written.unwrap();
    };
    write().await;
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(3600 / 8)).await;
    tokio::time::resume();
    write().await;
    eventually("the rows that are due are gone", LONG, async || {
        admin.query("SELECT FROM failover.ledger WHERE until < now()", &[]).await.unwrap().is_empty()
    })
    .await;
}
