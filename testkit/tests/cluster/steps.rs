//! Steps in tests that are not `async`, at the same time, and where there is nothing to do.

use std::net::TcpStream;
use std::thread;
use std::time::Instant;

use tokio_postgres_failover_testkit::{Cluster, Error, Node};

/// Host and port of a connection string.
fn port(url: &str) -> &str {
    url.split_once('@').unwrap().1.split_once('/').unwrap().0
}

#[test]
fn a_test_that_is_not_async_waits() -> Result<(), Error> {
    let cluster = Cluster::builder().standbys(1).start().wait()?;
    TcpStream::connect(port(&cluster.superuser_url(Node(0))?)).unwrap();
    assert_eq!(cluster.fail_over().wait()?, Node(1));
    assert!(TcpStream::connect(port(&cluster.superuser_url(Node(0))?)).is_err());
    assert_eq!(cluster.kill(Node(0)).wait(), Err(Error::NotRunning(Node(0))));
    assert_eq!(cluster.freeze(Node(0)).wait(), Err(Error::NotRunning(Node(0))));
    assert_eq!(cluster.start_node(Node(1)).wait(), Err(Error::Running(Node(1))));
    assert_eq!(cluster.kill(Node(2)).wait(), Err(Error::NoNode(Node(2))));
    assert_eq!(cluster.url_of(Node(2)), Err(Error::NoNode(Node(2))));
    let twice = cluster.promote(Node(1)).wait().unwrap_err();
    assert_eq!(twice.to_string(), "Node(1) is the primary already");
    let alone = cluster.best_standby().wait().unwrap_err();
    assert_eq!(alone.to_string(), "no standby runs; `Cluster::rejoin` makes a node one");
    cluster.start_node(Node(0)).wait()?;
    cluster.freeze(Node(1)).wait()?;
    cluster.stop(Node(1)).wait()
}

/// Nobody can be followed: the node stays as it is, and the test is told at once.
#[test]
fn a_standby_stays_one_while_there_is_no_primary() -> Result<(), Error> {
    let cluster = Cluster::builder().standbys(1).start().wait()?;
    cluster.freeze(Node(0)).wait()?;
    let frozen = cluster.rejoin(Node(1)).wait().unwrap_err();
    assert_eq!(frozen.to_string(), "Node(0) is frozen; thaw it first");
    cluster.kill(Node(0)).wait()?;
    assert_eq!(cluster.rejoin(Node(1)).wait(), Err(Error::NotRunning(Node(0))));
    assert_eq!(cluster.best_standby().wait()?, Node(1), "it runs on");
    assert_eq!(cluster.fail_over().wait()?, Node(1));
    cluster.rejoin(Node(0)).wait()
}

/// A server that exits is not waited for.
#[test]
fn a_node_that_does_not_start_says_why() -> Result<(), Error> {
    let cluster = Cluster::builder().standbys(0).start().wait()?;
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let url = cluster.superuser_url(Node(0)).unwrap();
        let client = crate::connect(&url).await.unwrap();
        // It is for the next start alone, and there is no such library.
        client.batch_execute("ALTER SYSTEM SET shared_preload_libraries = 'missing'").await.unwrap();
    });
    cluster.stop(Node(0)).wait()?;
    let begun = Instant::now();
    let error = cluster.start_node(Node(0)).wait().unwrap_err().to_string();
    assert!(error.starts_with("starting Node(0) failed: Node(0) does not start:\n"), "{error}");
    assert!(error.contains("missing"), "{error}");
    assert!(begun.elapsed() < crate::PATIENCE, "{:?}", begun.elapsed());
    Ok(())
}

#[test]
fn clusters_of_one_process_do_not_meet() {
    let threads = [(); 3].map(|()| thread::spawn(|| Cluster::builder().standbys(0).start().wait().unwrap()));
    let clusters = threads.map(|thread| thread.join().unwrap());
    for (n, cluster) in clusters.iter().enumerate() {
        let others = clusters.iter().skip(n + 1);
        assert!(
            others.clone().all(|other| other.url() != cluster.url() && other.dns().server() != cluster.dns().server())
        );
        TcpStream::connect(port(&cluster.url())).unwrap();
    }
}

#[tokio::test]
async fn a_step_may_outlive_its_cluster() -> Result<(), Error> {
    let cluster = Cluster::builder().standbys(0).start().await?;
    let step = cluster.kill(Node(0));
    drop(cluster);
    assert_eq!(step.await.unwrap_err().to_string(), "killing Node(0) failed: the cluster was dropped");
    Ok(())
}
