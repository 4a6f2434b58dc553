//! The service over real HTTP, in front of a real cluster whose primary dies.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

mod browser;
mod client;
mod load;
mod page;
mod patroni;
mod program;
mod viewer;

use std::net::{Ipv4Addr, SocketAddr, TcpListener as Port};
use std::time::Duration;

use failover_web::{Config, Region, Service, recorder};
use hyper::StatusCode;
use testbed::{Cluster, eventually};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use client::{Answer, Client};
use load::Load;
use program::Program;
use viewer::Viewer;

/// For what comes within milliseconds on an idle machine.
const LONG: Duration = Duration::from_secs(30);
const CLIENTS: usize = 16;

/// The service within this process.
struct Running {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    served: JoinHandle<std::io::Result<()>>,
}

impl Running {
    async fn start(config: Config) -> Self {
        Self::start_at(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap(), config)
    }

    fn start_at(listener: TcpListener, config: Config) -> Self {
        let recorder = recorder().unwrap();
        let handle = recorder.handle();
        // Each service of these tests has figures of its own.
        let service = metrics::with_local_recorder(&recorder, || Service::new(config, handle)).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, told) = oneshot::channel();
        let served = tokio::spawn(service.serve(listener, None, async {
            // Dropped by a test that has failed: to stop is right then, too.
            let _ = told.await;
        }));
        Self { address, stop, served }
    }

    async fn client(&self) -> Client {
        Client::connect(self.address).await.unwrap()
    }

    async fn stop(self) {
        self.stop.send(()).unwrap();
        self.served.await.unwrap().unwrap();
    }
}

fn config(cluster: &Cluster) -> Config {
    let mut config = Config::new(cluster.url());
    config.dns_servers = vec![cluster.dns().addr()];
    config
}

/// An address where nothing listens.
fn nowhere() -> SocketAddr {
    Port::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

async fn ready(client: &mut Client) -> Answer {
    client.get("/readyz").await.unwrap()
}

async fn becomes(status: StatusCode, client: &mut Client) -> Answer {
    eventually(&format!("/readyz says {status}"), LONG, async || ready(client).await.status == status).await;
    ready(client).await
}

/// How many requests wait for a connection.
async fn waiting(operator: &mut Client) -> f64 {
    figure(&operator.get("/metrics").await.unwrap().body, "db_client_connection_pending_requests{")
}

/// The value of a figure in what `/metrics` says.
fn figure(text: &str, name: &str) -> f64 {
    let line = text.lines().find(|line| line.starts_with(name) && line.contains("pool_name=\"orders\""));
    let line = line.unwrap_or_else(|| panic!("{name} is missing: {text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_through_a_failover_under_load() {
    let cluster = Cluster::start().await;
    let service = Running::start(config(&cluster)).await;
    let mut operator = service.client().await;
    let found = becomes(StatusCode::OK, &mut operator).await;
    assert!(found.body.contains("generation 1"), "{found:?}");

    let load = Load::start(service.address, CLIENTS).await;
    load.goes_on().await;
    cluster.kill(cluster.primary()).await;
    eventually("/readyz tells of the outage", LONG, async || {
        let answer = ready(&mut operator).await;
        answer.status == StatusCode::SERVICE_UNAVAILABLE && answer.body.starts_with("no primary: ")
    })
    .await;
    assert_eq!(operator.get("/healthz").await.unwrap().status, StatusCode::OK, "alive without a primary");
    // Not all of them: one whose COMMIT got no answer waits to ask for its outcome.
    let half = f64::from(u32::try_from(CLIENTS).unwrap()) / 2.0;
    eventually("requests wait for the primary", LONG, async || waiting(&mut operator).await >= half).await;
    let before = load.answered();
    cluster.promote_timed(cluster.most_advanced_standby().await).await;
    let found = becomes(StatusCode::OK, &mut operator).await;
    assert!(found.body.contains("generation 2"), "{found:?}");
    load.goes_on().await;

    let outcome = load.stop().await;
    println!("{} requests answered, {before} of them before the promotion; {outcome}", outcome.answered);
    assert_eq!(outcome.failed, Vec::<String>::new(), "failed requests");
    assert_eq!(outcome.not_alive, Vec::<String>::new(), "/healthz");
    let client = cluster.direct(cluster.primary()).await;
    let rows = client.query("SELECT sku, id FROM orders ORDER BY sku", &[]).await.unwrap();
    let stored: Vec<(String, i64)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(stored, outcome.acknowledged, "what is stored is what was acknowledged, each order once");

    let metrics = operator.get("/metrics").await.unwrap().body;
    assert!((figure(&metrics, "db_client_failover_generation{") - 2.0).abs() < 0.5, "{metrics}");
    assert!((figure(&metrics, "db_client_failover_primary{") - 1.0).abs() < 0.5, "{metrics}");
    assert!(figure(&metrics, "db_client_failover_searches_total{") > 1.5, "{metrics}");
    assert!(metrics.contains("db_client_failover_search_duration_seconds_bucket{"), "{metrics}");
    service.stop().await;
}

/// A server that has vanished without a word ends no connection: only the heartbeat tells.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_primary_is_not_ready() {
    let cluster = Cluster::builder().nodes(1).asynchronous().start().await;
    let service = Running::start(config(&cluster)).await;
    let mut client = service.client().await;
    becomes(StatusCode::OK, &mut client).await;
    cluster.freeze(cluster.primary());
    becomes(StatusCode::SERVICE_UNAVAILABLE, &mut client).await;
    assert_eq!(client.get("/healthz").await.unwrap().status, StatusCode::OK);
    cluster.thaw(cluster.primary());
    let found = becomes(StatusCode::OK, &mut client).await;
    assert!(found.body.contains("generation 1"), "the same primary, as before: {found:?}");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_without_its_database_starts_and_says_why_it_is_not_ready() {
    let nowhere = nowhere();
    let mut config = Config::new(format!("postgres://app@{nowhere}/app"));
    config.deadline = Duration::from_millis(300);
    let service = Running::start(config).await;
    let mut client = service.client().await;
    eventually("/readyz says what the server said", LONG, async || {
        let answer = ready(&mut client).await;
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
        answer.body.contains(&nowhere.to_string()) && answer.body.contains("refused")
    })
    .await;
    assert_eq!(client.get("/healthz").await.unwrap().status, StatusCode::OK);
    for answer in [client.order("tea", &[]).await.unwrap(), client.get("/orders/1").await.unwrap()] {
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(answer.header("retry-after").unwrap().parse::<u32>().unwrap() > 0);
        assert!(!answer.body.contains(&nowhere.ip().to_string()), "clients are not told of servers: {answer:?}");
        assert!(answer.json()["error"].as_str().unwrap().contains("try again"), "{answer:?}");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_request_is_one_order() {
    let cluster = Cluster::builder().nodes(1).asynchronous().start().await;
    let service = Running::start(config(&cluster)).await;
    let mut client = service.client().await;
    let key = [("idempotency-key", "b1f8")];
    let first = client.order("tea", &key).await.unwrap();
    assert_eq!(first.status, StatusCode::CREATED);
    let again = client.order("tea", &key).await.unwrap();
    assert_eq!((again.status, again.json()), (StatusCode::OK, first.json()));
    assert_eq!(client.order("coffee", &key).await.unwrap().status, StatusCode::UNPROCESSABLE_ENTITY);
    let shown = client.get(&format!("/orders/{}", first.json()["id"])).await.unwrap();
    assert_eq!((shown.status, shown.json()), (StatusCode::OK, first.json()));

    // At the same time, too: each has a connection of its own.
    let mut others = Vec::new();
    for _ in 0..8 {
        let mut client = service.client().await;
        others.push(tokio::spawn(async move { client.order("milk", &[("idempotency-key", "77aa")]).await.unwrap() }));
    }
    let mut ids = Vec::new();
    let mut created = 0;
    for other in others {
        let answer = other.await.unwrap();
        created += usize::from(answer.status == StatusCode::CREATED);
        ids.push(answer.json()["id"].as_i64().unwrap());
    }
    ids.dedup();
    assert_eq!((ids.len(), created), (1, 1), "{ids:?}");

    let with = |key: &'static str| [("idempotency-key", key)];
    assert_eq!(client.order("tea", &with("")).await.unwrap().status, StatusCode::BAD_REQUEST);
    assert_eq!(client.order("", &[]).await.unwrap().status, StatusCode::BAD_REQUEST);
    assert_eq!(client.get("/orders/999").await.unwrap().status, StatusCode::NOT_FOUND);
    let direct = cluster.direct(cluster.primary()).await;
    assert_eq!(direct.query_one("SELECT count(*) FROM orders", &[]).await.unwrap().get::<_, i64>(0), 2);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_outside_the_primarys_region_is_sent_there_once() {
    // No database: whoever asked it would get a 503.
    let database = format!("postgres://app@{}/app", nowhere());
    let service = async |here: &str| {
        let mut config = Config::new(database.clone());
        config.deadline = Duration::from_millis(300);
        config.region = Region::new(here, "ams");
        Running::start(config).await
    };
    let (inside, outside) = (service("ams").await, service("syd").await);

    let mut client = outside.client().await;
    let sent_on = client.order("tea", &[]).await.unwrap();
    assert_eq!((sent_on.status, sent_on.header("fly-replay")), (StatusCode::CONFLICT, Some("region=ams")));
    let replayed = client.order("tea", &[("fly-replay-src", "instance=148e21;region=lax;t=1")]).await.unwrap();
    assert_eq!((replayed.status, replayed.header("fly-replay")), (StatusCode::SERVICE_UNAVAILABLE, None));
    let read = client.get("/orders/1").await.unwrap();
    assert_eq!((read.status, read.header("fly-replay")), (StatusCode::SERVICE_UNAVAILABLE, None));
    assert_eq!(client.get("/healthz").await.unwrap().status, StatusCode::OK);

    let local = inside.client().await.order("tea", &[]).await.unwrap();
    assert_eq!((local.status, local.header("fly-replay")), (StatusCode::SERVICE_UNAVAILABLE, None));
    drop(client);
    inside.stop().await;
    outside.stop().await;
}

/// The program itself, as a platform starts and stops it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_finishes_the_requests_under_way() {
    let cluster = Cluster::builder().nodes(1).asynchronous().start().await;
    let variables = [
        ("DATABASE_URL", cluster.url()),
        ("DNS_SERVERS", cluster.dns().addr().to_string()),
        ("OPERATOR_PORT", "0".to_owned()),
    ];
    let mut program = Program::start(&variables).await;
    let mut operator = Client::connect(program.operators).await.unwrap();
    let mut client = Client::connect(program.address).await.unwrap();
    assert_eq!(client.order("tea", &[]).await.unwrap().status, StatusCode::CREATED);

    for path in ["/", "/readyz", "/metrics"] {
        assert_eq!(client.get(path).await.unwrap().status, StatusCode::NOT_FOUND, "{path} is for operators");
        assert_eq!(operator.get(path).await.unwrap().status, StatusCode::OK);
    }
    assert_eq!(client.get("/events").await.unwrap().status, StatusCode::NOT_FOUND, "events are for operators");
    let mut viewer = Viewer::open(program.operators).await;
    viewer.status("the primary", |status| status["ready"] == true).await;
    assert_eq!(client.get("/healthz").await.unwrap().status, StatusCode::OK);

    let mut direct = cluster.direct(cluster.primary()).await;
    let lock = direct.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE orders IN SHARE MODE").await.unwrap();
    let under_way = tokio::spawn(async move { client.order("coffee", &[]).await });
    let waits =
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'failover-web' AND wait_event_type = 'Lock'";
    eventually("the request waits in the database", LONG, async || {
        lock.query_one(waits, &[]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    program.signal(rustix::process::Signal::TERM);
    eventually("no new connection is accepted", LONG, async || Client::connect(program.address).await.is_err()).await;
    viewer.ends().await;
    assert!(program.is_running(), "it waits for the request");
    assert_eq!(ready(&mut operator).await.status, StatusCode::OK, "operators are answered to the end");
    lock.commit().await.unwrap();
    let answer = under_way.await.unwrap().unwrap();
    assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
    program.ends_well().await;
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'failover-web'";
    eventually("its sessions are gone", LONG, async || {
        direct.query_one(sessions, &[]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
}

/// A request that waits for a primary does not hold the shutdown for ever, and gets an answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_still_waits_when_the_time_is_over_gets_an_answer() {
    let variables = [
        ("DATABASE_URL", format!("postgres://app@{}/app", nowhere())),
        ("OPERATOR_PORT", "0".to_owned()),
        ("DRAIN_SECONDS", "1".to_owned()),
    ];
    let program = Program::start(&variables).await;
    let mut client = Client::connect(program.address).await.unwrap();
    let under_way = tokio::spawn(async move { client.order("tea", &[]).await });
    let mut operator = Client::connect(program.operators).await.unwrap();
    eventually("the request waits for a primary", LONG, async || waiting(&mut operator).await > 0.5).await;
    program.signal(rustix::process::Signal::TERM);
    let answer = under_way.await.unwrap().unwrap();
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE, "{answer:?}");
    program.ends_well().await;
}

#[tokio::test]
async fn the_program_says_what_it_lacks() {
    let said = Program::fails(&[]).await;
    assert!(said.contains("DATABASE_URL is not set"), "{said}");
    let said = Program::fails(&[("DATABASE_URL", "postgres://app:secret@".to_owned())]).await;
    assert!(!said.is_empty() && !said.contains("secret"), "{said}");
}
