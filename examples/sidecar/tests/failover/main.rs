//! Programs that know nothing of this crate, through the sidecar and a real failover.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

mod psycopg;
mod sqlx;

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};
use std::{fs, thread};

use failover_sidecar::Sidecar;
use testbed::{Cluster, Node, Path, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres_failover::tokio_postgres::{Client, Config, NoTls};
use tokio_postgres_failover::view::State;
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
    sidecar_of(Pool::builder(cluster.url_hosts()).unwrap().build().unwrap(), wait).await
}

async fn sidecar_of(pool: Pool, wait: Duration) -> Running {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
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

/// A client that cancels closes its direction behind the request: it waits nevertheless while there is no primary.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_request_waits_for_a_primary() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let path = Path::start(SocketAddr::new(cluster.spare_addr(0), 0), cluster.socket_addr(Node(0))).await;
    let builder = Pool::builder(format!("postgres://app@{}/app", path.addr())).unwrap().dead_after(LONG * 2);
    let quick = Duration::from_millis(200);
    let pool = builder.heartbeat_interval(quick).heartbeat_timeout(quick).build().unwrap();
    let sidecar = sidecar_of(pool.clone(), LONG).await;
    let (client, _driving) = connected(&through(&cluster, &sidecar)).await.unwrap();
    let token = client.cancel_token();
    let mut sleeping = tokio::spawn(async move { client.batch_execute("SELECT pg_sleep(3600)").await });
    let other = cluster.direct(Node(0)).await;
    eventually("it sleeps", LONG, async || {
        let sleeps = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
        other.query_one(sleeps, &[]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    path.hold(true);
    eventually("the primary is silent", LONG, async || matches!(pool.status().view.state, State::Searching { .. }))
        .await;
    // The driver waits for no answer, and closes its direction.
    token.cancel_query(NoTls).await.unwrap();
    assert!(timeout(Duration::from_secs(1), &mut sleeping).await.is_err(), "there is no primary that could cancel it");
    path.hold(false);
    let error = timeout(LONG, sleeping).await.expect("it is cancelled").unwrap().unwrap_err();
    assert_eq!(error.code(), Some(&tokio_postgres::error::SqlState::QUERY_CANCELED));
}

/// A program that streams to a server that ends the session is told why, although the sidecar meets a closed socket
/// first, when it passes on what was streamed. Everything is on one thread, so the sidecar meets both at once.
#[tokio::test]
async fn the_last_words_of_a_server_arrive() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let sidecar = sidecar(&cluster, LONG).await;
    let owner = cluster.direct(Node(0)).await;
    owner.batch_execute("CREATE TABLE lines (line text); GRANT ALL ON lines TO app").await.unwrap();
    // Which of the two it meets first is a matter of chance.
    for _ in 0..12 {
        let (mut stream, pid) = copying(sidecar.address).await;
        // The test's thread is the sidecar's: it stands still until the server has gone and more has been streamed.
        Command::new("sh").args(["-c", &format!("kill -TERM {pid}")]).status().unwrap();
        let began = Instant::now();
        while fs::exists(format!("/proc/{pid}")).unwrap() {
            assert!(began.elapsed() < LONG, "the session goes on");
            thread::sleep(Duration::from_millis(1));
        }
        let lines = message(b'd', &[b'x'; 8191]);
        for _ in 0..16 {
            stream.try_write(&lines).unwrap();
        }
        let mut said = Vec::new();
        // How the connection ends does not matter here.
        let _ = timeout(LONG, stream.read_to_end(&mut said)).await.expect("an end");
        assert!(String::from_utf8_lossy(&said).contains("57P01"), "{:?}", String::from_utf8_lossy(&said));
    }
}

/// A message of the protocol.
fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
    [&[kind][..], &length, body].concat()
}

/// A session that streams into a table, and the id of the server's process.
async fn copying(sidecar: SocketAddr) -> (TcpStream, u32) {
    let mut stream = TcpStream::connect(sidecar).await.unwrap();
    let options = b"\0\x03\0\0user\0app\0database\0app\0\0";
    let length = u32::try_from(options.len() + 4).unwrap().to_be_bytes();
    stream.write_all(&[&length[..], options].concat()).await.unwrap();
    let started = until(&mut stream, b'Z').await;
    let key = started.into_iter().find(|(kind, _)| *kind == b'K').expect("the key").1;
    stream.write_all(&message(b'Q', b"COPY lines FROM STDIN\0")).await.unwrap();
    until(&mut stream, b'G').await;
    (stream, u32::from_be_bytes(key[..4].try_into().unwrap()))
}

/// The messages up to the first one of this kind.
async fn until(stream: &mut TcpStream, last: u8) -> Vec<(u8, Vec<u8>)> {
    let mut seen = Vec::new();
    while seen.last().is_none_or(|(kind, _)| *kind != last) {
        let kind = timeout(LONG, stream.read_u8()).await.expect("a message").unwrap();
        let mut body = vec![0; stream.read_u32().await.unwrap() as usize - 4];
        stream.read_exact(&mut body).await.unwrap();
        seen.push((kind, body));
    }
    seen
}

/// The library's advice is for programmers.
#[cfg(not(feature = "rustls"))]
#[test]
fn the_program_says_how_to_get_tls() {
    let url = "postgres://app@127.0.0.1:1/app?sslmode=require";
    let output = Command::new(env!("CARGO_BIN_EXE_failover-sidecar")).env("DATABASE_URL", url).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("build it with `--features rustls`"), "{said}");
}

/// TLS passes between the program and the server: the sidecar itself has no certificate.
#[cfg(feature = "rustls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_passes_from_end_to_end() {
    const NAME: &str = "pg.internal";
    let authority = testbed::Authority::new();
    let cluster = Cluster::builder().nodes(1).tls(&authority.issue(&[NAME])).start().await;
    let trusted = cluster.folder().join("trusted.pem");
    fs::write(&trusted, authority.pem()).unwrap();
    let sidecar = sidecar(&cluster, LONG).await;
    let (ip, port) = (sidecar.address.ip(), sidecar.address.port());
    // As README.md says: the name is that of the certificate, and the address is the sidecar's.
    let servers = format!("host={NAME} hostaddr={ip} port={port} user=app dbname=app");
    let program = format!("{servers} sslmode=verify-full sslrootcert={}", trusted.display());
    let client = Pool::builder(program).unwrap().build().unwrap().get().await.unwrap();
    let encrypted = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    assert!(client.query_one(encrypted, &[]).await.unwrap().get::<_, bool>(0));
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
