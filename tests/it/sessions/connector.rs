//! A connector of the user's opens every stream: those of sessions, of probes and of cancel requests.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use testbed::{Cluster, Node, eventually};
use tokio::net::TcpStream;
use tokio_postgres_failover::connect::{ByteStream, Connect, Connecting};
use tokio_postgres_failover::view::{Address, Endpoint};
use tokio_postgres_failover::{BuildError, Pool, tokio_postgres};

use crate::support::PATIENCE;

/// The address that the configuration has. No server is there, so whatever does not go through the tunnel fails.
const NOWHERE: &str = "192.0.2.1";

/// Leads each address to the server behind the tunnel.
#[derive(Clone)]
struct Tunnel(Arc<Inner>);

struct Inner {
    to: Mutex<String>,
    opened: AtomicUsize,
    closed: AtomicBool,
    panics: AtomicBool,
}

impl Tunnel {
    fn to(cluster: &Cluster, node: Node) -> Self {
        let to = Mutex::new(cluster.socket_addr(node).to_string());
        let (opened, closed, panics) = (AtomicUsize::new(0), AtomicBool::new(false), AtomicBool::new(false));
        Self(Arc::new(Inner { to, opened, closed, panics }))
    }

    fn opened(&self) -> usize {
        self.0.opened.load(Ordering::SeqCst)
    }
}

impl Connect for Tunnel {
    fn connect<'a>(&'a self, endpoint: &'a Endpoint) -> Connecting<'a> {
        assert!(!self.0.panics.load(Ordering::SeqCst), "planted");
        assert!(matches!(&endpoint.address, Address::Tcp(address) if address.ip().to_string() == NOWHERE));
        Box::pin(async move {
            if self.0.closed.load(Ordering::SeqCst) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the tunnel is closed"));
            }
            self.0.opened.fetch_add(1, Ordering::SeqCst);
            let to = self.0.to.lock().unwrap().clone();
            Ok(Box::new(TcpStream::connect(to).await?) as Box<dyn ByteStream>)
        })
    }
}

fn url(options: &str) -> String {
    format!("host={NOWHERE} user=app dbname=app {options}")
}

#[tokio::test]
async fn everything_goes_through_the_connector() {
    let cluster = Cluster::builder().nodes(2).start().await;
    let tunnel = Tunnel::to(&cluster, Node(0));
    let pool = Pool::builder(url("")).unwrap().connector(tunnel.clone()).max_size(2).build().unwrap();
    let client = pool.get().await.unwrap();
    client.batch_execute("CREATE TABLE t (x int)").await.unwrap();
    let work = pool.transaction(async |transaction| Ok(transaction.execute("INSERT INTO t VALUES (1)", &[]).await?));
    assert_eq!(work.await.unwrap(), 1);

    // A cancel request is a connection of its own.
    let (before, token) = (tunnel.opened(), client.cancel_token());
    let slow = tokio::spawn(async move { client.batch_execute("SELECT pg_sleep(600)").await });
    let observer = pool.get().await.unwrap();
    eventually("the statement runs", PATIENCE, async || {
        let sql = "SELECT 1 FROM pg_stat_activity WHERE query LIKE '%pg_sleep(600)%' AND pid <> pg_backend_pid()";
        !observer.query(sql, &[]).await.unwrap().is_empty()
    })
    .await;
    token.cancel().await.unwrap();
    let ended = slow.await.unwrap().unwrap_err();
    assert_eq!(ended.code(), Some(&tokio_postgres::error::SqlState::QUERY_CANCELED));
    assert!(tunnel.opened() > before, "the cancel request went through the tunnel");
    drop(observer);

    // The tunnel leads to the new primary after a failover.
    cluster.kill(Node(0)).await;
    cluster.promote(Node(1)).await;
    *tunnel.0.to.lock().unwrap() = cluster.socket_addr(Node(1)).to_string();
    let rows = pool.transaction(async |transaction| Ok(transaction.query("SELECT x FROM t", &[]).await?.len()));
    assert_eq!(rows.await.unwrap(), 1);
}

#[tokio::test]
async fn an_error_or_a_panic_of_the_connector_is_told() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let tunnel = Tunnel::to(&cluster, Node(0));
    let builder = Pool::builder(url("")).unwrap().connector(tunnel.clone());
    let pool = builder.checkout_timeout(Duration::from_secs(2)).build().unwrap();
    for (set, words) in
        [(&tunnel.0.closed, "the tunnel is closed"), (&tunnel.0.panics, "the connector panicked: planted")]
    {
        set.store(true, Ordering::SeqCst);
        pool.evict_idle();
        eventually(words, PATIENCE, async || {
            let said = pool.get_within(Duration::from_millis(300)).await.err().map(|error| error.to_string());
            said.is_some_and(|said| said.contains(words))
        })
        .await;
        set.store(false, Ordering::SeqCst);
        eventually("it works again", PATIENCE, async || pool.get().await.is_ok()).await;
    }
}

#[tokio::test]
async fn a_tls_connector_of_the_drivers_sockets_is_refused_beside_it() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let tunnel = Tunnel::to(&cluster, Node(0));
    let builder = Pool::builder(url("")).unwrap().connector(tunnel).tls(tokio_postgres::NoTls);
    let error = builder.build().unwrap_err();
    assert!(matches!(&error, BuildError::Invalid { option, .. } if *option == "tls"), "{error:?}");
}

/// TLS is above the connector's stream, and the certificate is checked against the configured name.
#[cfg(feature = "rustls")]
#[tokio::test]
async fn tls_works_over_the_connectors_stream() {
    use testbed::Authority;
    let authority = Authority::new();
    let cluster = Cluster::builder().nodes(1).tls(&authority.issue(&[NOWHERE])).start().await;
    let root = cluster.folder().join("root.pem");
    std::fs::write(&root, authority.pem()).unwrap();
    let tunnel = Tunnel::to(&cluster, Node(0));
    let options = format!("sslmode=verify-full sslrootcert={}", root.display());
    let pool = Pool::builder(url(&options)).unwrap().connector(tunnel).build().unwrap();
    let client = pool.get().await.unwrap();
    let sql = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    assert!(client.query_one(sql, &[]).await.unwrap().get::<_, bool>(0));
}
