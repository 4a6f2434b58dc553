//! Closures that end their transaction themselves where the session tells nothing any more, or leave it in a COPY; and a COMMIT
//! that is sent by hand.

use std::net::SocketAddr;
use std::time::Duration;

use testbed::{Cluster, ClusterBuilder, Node, Tap, eventually};
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Client;
use tokio_postgres_failover::{CommitOutcome, EndedInside, Ending, Error, Guarantee, Ledger, RetryPolicy, RolledBack};

use crate::finish::{KINDS, Kind, pool_of};
use crate::settle::install_ledger;
use crate::transaction::{PATIENCE, Runs, insert, sql, stored};

const KILL: &str = "SELECT pg_terminate_backend(pg_backend_pid())";

async fn started(builder: ClusterBuilder) -> Cluster {
    let cluster = builder.start().await;
    sql(&cluster, "CREATE TABLE entries (id bigint); GRANT ALL ON entries TO app").await;
    install_ledger(&cluster).await;
    cluster
}

fn single() -> ClusterBuilder {
    Cluster::builder().nodes(1).setting("max_prepared_transactions", "9")
}

fn marked() -> [Guarantee; 2] {
    [Guarantee::ExactlyOnce, Guarantee::Ledger(Ledger::default())]
}

fn told(error: &Error, ending: Ending, what: &str) {
    let Error::EndedInside(inside) = error else { panic!("{what}: {error:?}") };
    assert_eq!(EndedInside::ending(inside), ending, "{what}: {error}");
    assert_eq!(error.commit_outcome(), CommitOutcome::Unknown, "{what}");
}

async fn waits(admin: &Client) {
    let waits = "SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE '%COMMIT'";
    eventually("COMMIT waits for the standby", PATIENCE, async || !admin.query(waits, &[]).await.unwrap().is_empty())
        .await;
}

/// The ledger is asked in the same words under any `search_path`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namesake_of_an_operator_hides_no_row_of_the_ledger() {
    let cluster = started(single()).await;
    sql(
        &cluster,
        "CREATE SCHEMA evil; GRANT USAGE ON SCHEMA evil TO app; \
         CREATE FUNCTION evil.eq(uuid, uuid) RETURNS boolean LANGUAGE sql AS 'SELECT false'; \
         CREATE OPERATOR evil.= (FUNCTION = evil.eq, LEFTARG = uuid, RIGHTARG = uuid); \
         ALTER ROLE app SET search_path = evil, pg_catalog, public",
    )
    .await;
    let pool = pool_of(Kind::Own, cluster.socket_addr(Node(0)), 2);
    let runs = Runs::default();
    let result: Result<(), Error> = pool
        .build_transaction()
        .guarantee(Guarantee::Ledger(Ledger::default()))
        .run(async |tx| {
            // A later run would be committed.
            if runs.begin() == 1 {
                insert(&tx, 1).await?;
                tx.batch_execute("COMMIT").await?;
                tx.batch_execute(KILL).await?;
            }
            Ok(())
        })
        .await;
    told(&result.unwrap_err(), Ending::Committed, "ledger");
    assert_eq!((runs.count(), stored(&cluster).await), (1, vec![1]));
}