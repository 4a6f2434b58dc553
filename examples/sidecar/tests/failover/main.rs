//! Programs that know nothing of this crate, through the sidecar and a real failover.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

mod psycopg;
mod sqlx;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use failover_sidecar::Sidecar;
use testbed::{Cluster, Node, eventually};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres_failover::tokio_postgres::{Client, Config, NoTls};
use tokio_postgres_failover::{Pool, tokio_postgres};

/// For what comes within milliseconds on an idle machine.
const LONG: Duration = Duration::from_secs(60);

/// A sidecar that ends with the test.
struct Running {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn sidecar(cluster: &Cluster, wait: Duration) -> Running {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let pool = Pool::builder(cluster.url_hosts()).unwrap().build().unwrap();
    let task = tokio::spawn(Sidecar::new(pool, wait).serve(listener, std::future::pending()));
    Running { address, task }
}

/// The configuration of a client of the sidecar.
fn through(cluster: &Cluster, sidecar: &Running) -> Config {
    let mut config: Config = cluster.url_hosts().parse().unwrap();
    let user = config.get_user().unwrap().to_owned();
    config = Config::new();
    config.user(user).dbname("app").host(sidecar.address.ip().to_string()).port(sidecar.address.port());
    config
}

async fn connected(config: &Config) -> Result<(Client, JoinHandle<()>), tokio_postgres::Error> {
    let (client, connection) = config.connect(NoTls).await?;
    Ok((client, tokio::spawn(async move { drop(connection.await) })))
}

async fn server_of(client: &Client) -> String {
    client.query_one("SELECT host(inet_server_addr())", &[]).await.unwrap().get(0)
}

/// The driver of any program: its connection to a frozen host is ended, and the next one leads to the successor.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_to_a_frozen_host_is_ended() {
    let cluster = Cluster::start().await;
    let sidecar = sidecar(&cluster, LONG).await;
    let config = through(&cluster, &sidecar);
    let (client, driving) = connected(&config).await.unwrap();
    assert_eq!(server_of(&client).await, cluster.addr(Node(0)).to_string());

    cluster.freeze(Node(0));
    let successor = cluster.most_advanced_standby().await;
    cluster.promote_timed(successor).await;
    timeout(LONG, driving).await.expect("it is ended").unwrap();
    let (client, _driving) = timeout(LONG, connected(&config)).await.expect("a primary").unwrap();
    assert_eq!(server_of(&client).await, cluster.addr(successor).to_string());
}

/// A connection that comes while there is no primary waits, and is turned away in time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_waits_for_a_primary() {
    let cluster = Cluster::start().await;
    let wait = Duration::from_secs(1);
    let (patient, impatient) = (sidecar(&cluster, LONG).await, sidecar(&cluster, wait).await);
    let (client, _driving) = connected(&through(&cluster, &patient)).await.unwrap();
    // The machine may stand still for as long as this one waits.
    let mut other = None;
    eventually("the impatient one has a primary", LONG, async || {
        other = connected(&through(&cluster, &impatient)).await.ok();
        other.is_some()
    })
    .await;
    cluster.kill(Node(0)).await;
    eventually("the old connections are gone", LONG, async || {
        client.is_closed() && other.as_ref().is_some_and(|(client, _)| client.is_closed())
    })
    .await;
    // It may take the dead server for the primary for a moment.
    eventually("it waits, and is turned away", LONG, async || {
        let began = Instant::now();
        let turned_away = timeout(LONG, connected(&through(&cluster, &impatient))).await.expect("in time").is_err();
        turned_away && began.elapsed() >= wait
    })
    .await;

    let config = through(&cluster, &patient);
    let waiting = tokio::spawn(async move { connected(&config).await.unwrap() });
    cluster.promote_timed(cluster.most_advanced_standby().await).await;
    let (client, _driving) = timeout(LONG, waiting).await.expect("a primary").unwrap();
    client.batch_execute("CREATE TABLE notes (text text)").await.unwrap();
}

/// A cancel request is a connection of its own, and finds the statement that it is for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_request_passes() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let sidecar = sidecar(&cluster, LONG).await;
    let (client, _driving) = connected(&through(&cluster, &sidecar)).await.unwrap();
    let token = client.cancel_token();
    let sleeping = tokio::spawn(async move { client.batch_execute("SELECT pg_sleep(3600)").await });
    let other = cluster.direct(Node(0)).await;
    eventually("it sleeps", LONG, async || {
        let sleeps = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
        other.query_one(sleeps, &[]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    token.cancel_query(NoTls).await.unwrap();
    let error = timeout(LONG, sleeping).await.expect("it is cancelled").unwrap().unwrap_err();
    assert_eq!(error.code(), Some(&tokio_postgres::error::SqlState::QUERY_CANCELED));
}
