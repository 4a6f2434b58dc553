//! Each trap fails a client in its own way.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use testbed::{Blackhole, Eof, Garbage, Silent, eventually};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_postgres::{Config, NoTls};

const SOON: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(30);

/// Any port of an address that no cluster has.
fn anywhere() -> SocketAddr {
    (Ipv4Addr::new(127, 9, 9, 9), 0).into()
}

/// Whether an attempt to log in ended, within a short time.
async fn log_in(addr: SocketAddr, patience: Duration) -> Option<String> {
    let mut config = Config::new();
    config.hostaddr(addr.ip()).port(addr.port()).user("app").dbname("app");
    let attempt = timeout(patience, config.connect(NoTls)).await.ok()?;
    Some(attempt.err().expect("no server is there").to_string())
}

#[tokio::test]
async fn connects_to_a_blackhole_hang() {
    let trap = Blackhole::start(anywhere()).await;
    for _ in 0..2 {
        assert!(timeout(SOON, TcpStream::connect(trap.addr())).await.is_err());
    }
}

#[tokio::test]
async fn the_silent_accept_and_say_nothing() {
    let trap = Silent::start(anywhere()).await;
    assert_eq!(log_in(trap.addr(), SOON).await, None);
    // The kernel has accepted it; the trap may come to it later.
    eventually("it is accepted", LONG, async || trap.accepted() == 1).await;
}

#[tokio::test]
async fn garbage_arrives_whole() {
    let answer = "HTTP/1.1 400 Bad Request\r\n\r\n";
    let trap = Garbage::start(anywhere(), answer).await;
    assert!(log_in(trap.addr(), LONG).await.is_some());

    let mut stream = TcpStream::connect(trap.addr()).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stream, b"hello").await.unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).await.unwrap();
    assert_eq!(said, answer);
}

#[tokio::test]
async fn an_empty_balancer_closes_at_once() {
    let trap = Eof::start(anywhere()).await;
    assert!(log_in(trap.addr(), LONG).await.is_some());
    assert_eq!(trap.accepted(), 1);
}
