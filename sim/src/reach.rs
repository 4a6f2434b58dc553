//! How the pool reaches the world: its connector and its resolver.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::Manager;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tokio_postgres::{Client, Config, NoTls};
use tokio_postgres_failover::connect::{ByteStream, Connect, Connecting};
use tokio_postgres_failover::resolve::{Addresses, Resolve, ResolveError};
use tokio_postgres_failover::view::{Address, Endpoint};

use crate::net::connection;
use crate::server::serve;
use crate::setup::Dns;
use crate::world::Sim;

/// The address of a server.
pub(crate) fn address(node: usize) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 0, 0, u8::try_from(node + 1).unwrap_or(0)))
}

/// The server at an address.
pub(crate) fn node_at(address: &Address) -> Option<usize> {
    let Address::Tcp(address) = address else { return None };
    let IpAddr::V4(ip) = address.ip() else { return None };
    usize::from(ip.octets()[3]).checked_sub(1)
}

#[derive(Clone)]
pub(crate) struct Reach(pub(crate) Arc<Sim>);

impl Reach {
    async fn open(&self, node: usize) -> io::Result<Box<dyn ByteStream>> {
        let net = Arc::clone(&self.0.lock().nodes[node].net);
        loop {
            let (opened, up) = (net.opened.notified(), self.0.up.notified());
            let machine_up = self.0.lock().nodes[node].machine_up;
            if !net.is_open() {
                opened.await;
            } else if !machine_up {
                up.await;
            } else {
                break;
            }
        }
        sleep(Duration::from_millis(2) + net.late() * 2).await;
        let (seed, life) = {
            let mut world = self.0.lock();
            let Some(life) = world.nodes[node].accept() else { return Err(io::ErrorKind::ConnectionRefused.into()) };
            (world.rng.next(), life)
        };
        let (ours, theirs) = connection(&net, seed);
        tokio::spawn(serve(Arc::clone(&self.0), node, life, theirs));
        let servers = self.0.lock().nodes.len();
        let open: usize = (0..servers).map(|node| self.open_links(node)).sum();
        self.0.lock().oracle.connected(open);
        Ok(Box::new(ours))
    }

    fn open_links(&self, node: usize) -> usize {
        let net = Arc::clone(&self.0.lock().nodes[node].net);
        net.links().len()
    }
}

impl Connect for Reach {
    fn connect<'a>(&'a self, endpoint: &'a Endpoint) -> Connecting<'a> {
        Box::pin(async move {
            match node_at(&endpoint.address) {
                Some(node) => self.open(node).await,
                None => Err(io::ErrorKind::HostUnreachable.into()),
            }
        })
    }
}

impl Resolve for Reach {
    fn resolve<'a>(
        &'a self,
        host: &'a str,
    ) -> tokio_postgres_failover::resolve::BoxFuture<'a, Result<Addresses, ResolveError>> {
        Box::pin(async move {
            sleep(Duration::from_millis(3)).await;
            let (names, setup) = {
                let world = self.0.lock();
                (world.names, world.setup)
            };
            if names.gone {
                sleep(Duration::from_secs(2)).await;
                return Err(ResolveError::custom(host, "the name servers do not answer"));
            }
            Ok(Addresses::new(match setup.dns {
                Dns::Primary => vec![address(names.primary)],
                Dns::All | Dns::Hosts => (0..setup.servers).map(address).collect(),
            }))
        })
    }
}

/// A pool of deadpool's, as a program has it that does not know this crate.
pub(crate) fn existing(reach: Reach, max_size: usize) -> deadpool_postgres::Pool {
    let mut config = Config::new();
    config.user("app").password("secret").dbname("app").ssl_mode(tokio_postgres::config::SslMode::Disable);
    let manager = Manager::from_connect(config, reach, deadpool_postgres::ManagerConfig::default());
    // Without time limits of its own, building it cannot fail.
    deadpool_postgres::Pool::builder(manager).max_size(max_size).build().unwrap_or_else(|_| unreachable!())
}

type Opening<'a> = Pin<Box<dyn Future<Output = Result<(Client, JoinHandle<()>), tokio_postgres::Error>> + Send + 'a>>;

impl deadpool_postgres::Connect for Reach {
    /// Connects to wherever the cluster's name leads.
    fn connect(&self, config: &Config) -> Opening<'_> {
        let config = config.clone();
        Box::pin(async move {
            let node = self.0.lock().names.primary;
            let stream: Box<dyn ByteStream> = match self.open(node).await {
                Ok(stream) => stream,
                // The driver has no error for it, so the connection ends at once.
                Err(_) => Box::new(tokio::io::duplex(1).0),
            };
            let (client, connection) = config.connect_raw(stream, NoTls).await?;
            let driver = tokio::spawn(async move {
                // The client's calls return the error.
                let _ = connection.await;
            });
            Ok((client, driver))
        })
    }
}
