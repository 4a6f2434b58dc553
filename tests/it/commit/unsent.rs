//! A connection that is lost before COMMIT has left the client.

use std::net::SocketAddr;
use std::time::Duration;

use testbed::{Node, Tap};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tokio_postgres_failover::Guarantee;

use crate::commit::finish::{Kind, pool_of};
use crate::support::load::LONG;
use crate::support::{Runs, insert, server, stored};

/// More than the network takes while nobody reads.
const BIG: usize = 64 << 20;

/// The network takes nothing more, so COMMIT is still in the client when the connection ends. That leaves no doubt.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_has_not_left_the_client_is_in_no_doubt() {
    for guarantee in [Guarantee::AtMostOnce, Guarantee::ExactlyOnce] {
        let cluster = server().await;
        let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
        let pool = pool_of(Kind::Own, tap.addr(), 2);
        pool.connect().await.unwrap();
        let (runs, is_over) = (Runs::default(), Notify::new());
        let big = format!("SELECT length('{}')", "x".repeat(BIG));
        let work = pool.build_transaction().guarantee(guarantee.clone()).deadline(LONG).run(async |tx| {
            insert(&tx, 1).await?;
            if runs.begin() == 1 {
                tap.stall(true);
                assert!(timeout(Duration::from_millis(100), tx.batch_execute(&big)).await.is_err());
                is_over.notify_one();
            }
            Ok(())
        });
        let fault = async {
            is_over.notified().await;
            // Nothing shows when COMMIT is queued. If it comes later, the pool finds the session closed.
            sleep(Duration::from_millis(300)).await;
            tap.drop_connections();
            tap.stall(false);
        };
        let (result, ()) = timeout(LONG, async { tokio::join!(work, fault) }).await.expect("the call hangs");
        assert!(result.is_ok(), "{guarantee:?}: {result:?}");
        assert_eq!((runs.count(), stored(&cluster).await), (2, vec![1]), "{guarantee:?}");
    }
}
