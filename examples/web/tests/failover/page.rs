//! The page's stream through a real failover, and what its viewers must not do to the service.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use failover_web::Config;
use hyper::StatusCode;
use serde_json::Value;
use testbed::{Cluster, eventually};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};

use crate::viewer::{Viewer, has_failed_over, of_the_primary};
use crate::{LONG, Running, config, nowhere};

/// Longer than any test: what waits for it hangs.
const NEVER: Duration = Duration::from_secs(3600);
/// As many as the service has places for.
const VIEWERS: usize = 64;

/// The members' roles, in the order of their addresses.
pub(crate) fn roles(status: &Value) -> Vec<&str> {
    status["members"].as_array().unwrap().iter().map(|member| member["role"].as_str().unwrap()).collect()
}

/// The lists of events that a viewer has read.
fn lists(viewer: &Viewer) -> Vec<Value> {
    let lines = viewer.read.lines().filter_map(|line| line.strip_prefix("data: "));
    lines.filter(|line| line.starts_with('[')).map(|list| serde_json::from_str(list).unwrap()).collect()
}

/// Reads on until the newest list of events is as wanted, unless it is already.
async fn reads(viewer: &mut Viewer, wanted: impl Fn(&Value) -> bool) {
    while !lists(viewer).last().is_some_and(&wanted) {
        viewer.next().await.expect("the stream goes on");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_shows_the_loss_and_then_the_new_primary() {
    let cluster = Cluster::start().await;
    let mut config = config(&cluster);
    config.database_url = cluster.url_hosts();
    let service = Running::start(config).await;
    let mut viewer = Viewer::open(service.address).await;

    let (first, sql) = (cluster.primary(), "SELECT system_identifier::text FROM pg_control_system()");
    let identifier: String = cluster.direct(first).await.query_one(sql, &[]).await.unwrap().get(0);
    let status = viewer.status("the first primary", |status| status["ready"] == true).await;
    assert_eq!(status["primary"]["endpoint"], cluster.socket_addr(first).to_string());
    assert_eq!(status["primary"]["system_identifier"], identifier);
    assert_eq!((&status["primary"]["timeline"], &status["generation"]), (&Value::from(1), &Value::from(1)));
    let all = |status: &Value| roles(status) == ["primary", "standby", "standby"];
    let status = viewer.status("all members", all).await;
    assert_eq!(status["members"][0]["verified"], true, "{status}");
    let mut client = service.client().await;
    for _ in 0..3 {
        assert_eq!(client.order("tea", &[]).await.unwrap().status, StatusCode::CREATED);
    }
    viewer.status("the orders", |status| status["orders"]["stored"] == 3).await;

    cluster.kill(first).await;
    let status = viewer.status("the loss", |status| status["state"] == "searching").await;
    assert_eq!((&status["ready"], &status["primary"]), (&Value::from(false), &Value::Null));
    assert!(status["members"].as_array().unwrap().iter().all(|member| member["verified"] == false), "{status}");
    assert_ne!(status["why"], "");
    reads(&mut viewer, |events| of_the_primary(events).last().is_some_and(|(kind, _)| *kind == "PrimaryLost")).await;
    let next = cluster.most_advanced_standby().await;
    cluster.promote_timed(next).await;
    let status = viewer.status("the new primary", |status| status["state"] == "primary").await;
    assert_eq!(status["primary"]["endpoint"], cluster.socket_addr(next).to_string());
    assert_eq!((&status["primary"]["timeline"], &status["generation"]), (&Value::from(2), &Value::from(2)));
    assert_eq!(status["primary"]["system_identifier"], identifier);
    viewer.status("the old primary's silence", |status| roles(status)[0] == "no answer").await;

    // Whoever comes later is told of all of it.
    let mut late = Viewer::open(service.address).await;
    let [from, to] = [first, next].map(|node| cluster.socket_addr(node));
    let events = late.events("all of it", |events| has_failed_over(events, from, to)).await;
    let times: Vec<_> = events.as_array().unwrap().iter().map(|event| event["at"].as_u64().unwrap()).collect();
    assert!(times.is_sorted() && times[0] > 0, "{events}");
    // This one saw one after the other, and nothing was taken back.
    reads(&mut viewer, |events| has_failed_over(events, from, to)).await;
    let lists = lists(&viewer);
    let grows = |pair: &[Value]| of_the_primary(&pair[1]).starts_with(&of_the_primary(&pair[0]));
    assert!(lists.windows(2).all(grows), "{lists:?}");
    drop((viewer, late, client));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_is_one_file_and_holds_no_secret() {
    const SECRET: &str = "hunter2";
    let cluster = Cluster::builder().nodes(1).asynchronous().start().await;
    let hosts = format!("{},{}", nowhere(), cluster.socket_addr(cluster.primary()));
    let service = Running::start(Config::new(format!("postgres://app:{SECRET}@{hosts}/app"))).await;
    let mut client = service.client().await;
    let page = client.get("/").await.unwrap();
    assert_eq!(page.status, StatusCode::OK);
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    assert!(page.header("content-security-policy").unwrap().starts_with("default-src 'none'"), "{page:?}");
    let elsewhere = page.body.replace("http://www.w3.org/2000/svg", "");
    assert!(!elsewhere.contains("://") && !elsewhere.contains("src="), "it works without the internet");
    // A script that sets markup would run what a server says.
    assert!(
        !["innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("]
            .iter()
            .any(|risk| page.body.contains(risk))
    );

    assert_eq!(client.order("tea", &[]).await.unwrap().status, StatusCode::CREATED);
    let mut viewer = Viewer::open(service.address).await;
    let both = |status: &Value| roles(status).contains(&"primary") && roles(status).contains(&"no answer");
    viewer.status("both members", both).await;
    viewer.status("another status", |_| true).await;
    assert!(!page.body.contains(SECRET) && !viewer.read.contains(SECRET), "{}", viewer.read);
    drop((viewer, client));
    service.stop().await;
}

/// A service without a database, with so many members that a few messages fill the buffers of a connection.
fn talkative() -> Running {
    let members: Vec<_> = (1..=60).map(|port| format!("127.0.0.1:{port}")).collect();
    let mut config = Config::new(format!("postgres://app@{}/app", members.join(",")));
    config.drain = NEVER;
    let socket = TcpSocket::new_v4().unwrap();
    // Connections have it from the socket that accepts them.
    socket.set_send_buffer_size(4096).unwrap();
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    Running::start_at(socket.listen(64).unwrap(), config)
}

async fn does_not_read(service: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(2048).unwrap();
    let mut stream = socket.connect(service).await.unwrap();
    stream.write_all(b"GET /events HTTP/1.1\r\nHost: orders\r\n\r\n").await.unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_viewer_who_does_not_read_holds_nothing() {
    let service = talkative();
    let stuck = does_not_read(service.address).await;
    // Far more than the buffers of the other connection hold.
    let mut viewer = Viewer::open(service.address).await;
    while viewer.read.len() < 60_000 {
        viewer.status("many members", |status| status["members"].as_array().unwrap().len() == 60).await;
    }
    let mut client = service.client().await;
    assert_eq!(client.get("/healthz").await.unwrap().status, StatusCode::OK);
    drop(client);
    // The time to drain would never be over.
    tokio::time::timeout(LONG, service.stop()).await.expect("it stops although a viewer does not read");
    viewer.ends().await;
    drop(stuck);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_ends_the_streams() {
    let mut config = Config::new(format!("postgres://app@{}/app", nowhere()));
    config.drain = NEVER;
    let service = Running::start(config).await;
    let mut viewers = Vec::new();
    for _ in 0..3 {
        let mut viewer = Viewer::open(service.address).await;
        viewer.status("the search", |status| status["state"] == "searching").await;
        viewers.push(viewer);
    }
    tokio::time::timeout(LONG, service.stop()).await.expect("viewers hold no shutdown");
    for viewer in viewers {
        viewer.ends().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_is_a_place_for_so_many_viewers_and_each_is_given_back() {
    let service = Running::start(Config::new(format!("postgres://app@{}/app", nowhere()))).await;
    let mut viewers = Vec::new();
    for _ in 0..VIEWERS {
        viewers.push(Viewer::open(service.address).await);
    }
    assert_eq!(Viewer::try_open(service.address).await.err(), Some(StatusCode::SERVICE_UNAVAILABLE));
    assert_eq!(service.client().await.get("/healthz").await.unwrap().status, StatusCode::OK);
    viewers.pop();
    eventually("a place is free", LONG, async || Viewer::try_open(service.address).await.is_ok()).await;
    drop(viewers);
    service.stop().await;
}
