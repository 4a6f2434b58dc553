//! Sessions that belong to the caller: to the verified primary, and ended with it.

use std::time::Duration;

use testbed::{Cluster, Node, eventually};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres_failover::error::UnavailableReason;
use tokio_postgres_failover::view::State;
use tokio_postgres_failover::{Error, Pool};

use crate::support::PATIENCE;
use crate::support::load::{LONG, by_name, by_url};

type Driving = JoinHandle<Result<(), tokio_postgres::Error>>;

async fn dialled(pool: &Pool) -> (Client, Driving) {
    let (client, driver) = timeout(LONG, pool.dial()).await.expect("a primary").unwrap();
    (client, tokio::spawn(driver))
}

async fn server_of(client: &Client) -> String {
    client.query_one("SELECT inet_server_addr()::text", &[]).await.unwrap().get(0)
}

/// Of three servers it is the writable one, before a failover and after it, and it does not outlive its primary.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dialled_session_is_the_primarys_and_ends_with_it() {
    let cluster = Cluster::start().await;
    let pool = by_name(&cluster).build().unwrap();
    let (client, driving) = dialled(&pool).await;
    client.batch_execute("CREATE TABLE notes (text text)").await.unwrap();
    let first = server_of(&client).await;

    cluster.freeze(Node(0));
    cluster.promote_timed(cluster.most_advanced_standby().await).await;
    timeout(LONG, driving).await.expect("a session to a frozen host ends").unwrap().unwrap();
    assert!(client.is_closed());

    let (client, _driving) = dialled(&pool).await;
    client.batch_execute("INSERT INTO notes VALUES ('after')").await.unwrap();
    assert_ne!(server_of(&client).await, first);
}

/// It counts for no slot, and needs none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dialled_session_takes_no_slot() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let pool = by_url(cluster.url_hosts()).max_size(1).build().unwrap();
    let held = pool.get().await.unwrap();
    let (client, _driving) = dialled(&pool).await;
    client.batch_execute("SELECT 1").await.unwrap();
    drop(held);
    drop(pool.get().await.unwrap());
    assert_eq!(pool.status().size, 1);
}

/// The session lives as long as its driver, whatever becomes of the pool's handles, and ends with `close`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dialled_session_keeps_its_pool_and_is_closed_with_it() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let pool = by_url(cluster.url_hosts()).build().unwrap();
    let (client, driving) = dialled(&pool).await;
    let closer = pool.clone();
    drop(pool);
    client.batch_execute("SELECT 1").await.unwrap();
    closer.close();
    timeout(LONG, driving).await.expect("it ends with the pool").unwrap().unwrap();
    assert!(client.batch_execute("SELECT 1").await.is_err());
    assert!(matches!(closer.dial().await, Err(Error::Closed)));

    let pool = by_url(cluster.url_hosts()).build().unwrap();
    let (client, driving) = dialled(&pool).await;
    drop(pool);
    client.batch_execute("SELECT 1").await.unwrap();
    drop(client);
    timeout(LONG, driving).await.expect("it ends with its client").unwrap().unwrap();
    let other = cluster.direct(Node(0)).await;
    eventually("no session is left", PATIENCE, async || {
        let left =
            "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
        other.query_one(left, &[]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
}

/// The driver's own token does not know the address.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dialled_session_runs_can_be_cancelled() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let pool = by_url(cluster.url_hosts()).build().unwrap();
    let (client, driver) = timeout(LONG, pool.dial()).await.expect("a primary").unwrap();
    let token = driver.cancel_token();
    tokio::spawn(driver);
    let sleeping = tokio::spawn(async move { client.batch_execute("SELECT pg_sleep(3600)").await });
    let other = cluster.direct(Node(0)).await;
    eventually("it sleeps", PATIENCE, async || {
        let sleeps = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
        other.query_one(sleeps, &[]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    token.cancel().await.unwrap();
    let error = timeout(LONG, sleeping).await.expect("it is cancelled").unwrap().unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::QUERY_CANCELED));
}

/// All slots of the server are in use, and one gets free later: that is waited for, as `get` does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dial_waits_for_a_slot_of_the_server() {
    let cluster = Cluster::builder().nodes(1).start().await;
    cluster.direct(Node(0)).await.batch_execute("CREATE ROLE guest LOGIN CONNECTION LIMIT 5").await.unwrap();
    let url = cluster.url_hosts();
    let (_, hosts) = url.split_once('@').unwrap();
    let pool = by_url(format!("postgres://guest@{hosts}")).checkout_timeout(LONG).build().unwrap();
    // The pool's own sessions take some of the slots.
    let mut held = vec![dialled(&pool).await];
    let waiting = loop {
        let mut dialling = Box::pin(pool.dial());
        match timeout(Duration::from_secs(1), dialling.as_mut()).await {
            Ok(dialled) => {
                let (client, driver) = dialled.unwrap();
                held.push((client, tokio::spawn(driver)));
            }
            Err(_) => break dialling,
        }
    };
    held.pop();
    let (client, driver) = timeout(LONG, waiting).await.expect("a slot").unwrap();
    tokio::spawn(driver);
    client.batch_execute("SELECT 1").await.unwrap();
}

/// Without a primary a dial fails in time, with wrong credentials at once, and on a wrapped pool always.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dial_in_vain_is_told_why() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let url = cluster.url_hosts();
    let (_, hosts) = url.split_once('@').unwrap();
    let wrong = Pool::builder(format!("postgres://nobody@{hosts}")).unwrap().build().unwrap();
    assert!(matches!(timeout(LONG, wrong.dial()).await.expect("at once"), Err(Error::Refused(_))));

    let manager = deadpool_postgres::Manager::new(url.parse().unwrap(), tokio_postgres::NoTls);
    let wrapped = Pool::wrap(deadpool_postgres::Pool::builder(manager).build().unwrap()).build().unwrap();
    assert!(matches!(wrapped.dial().await, Err(Error::Wrapped)));

    let pool = by_url(cluster.url_hosts()).checkout_timeout(PATIENCE / 10).build().unwrap();
    eventually("there is a primary", LONG, async || pool.connect().await.is_ok()).await;
    cluster.kill(Node(0)).await;
    eventually("the death is noticed", LONG, async || !matches!(pool.status().view.state, State::Primary { .. })).await;
    let Err(Error::Unavailable(error)) = timeout(LONG, pool.dial()).await.expect("in time") else {
        panic!("there is no primary");
    };
    assert_eq!(error.reason(), UnavailableReason::NoPrimary);
}
