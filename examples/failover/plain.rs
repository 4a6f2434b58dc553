//! A plain deadpool-postgres pool, configured as usual and in its favour.

use std::error::Error;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;

use tokio::task::JoinHandle;
use tokio_postgres_failover::deadpool_postgres::{Connect, Manager, ManagerConfig, Pool, RecyclingMethod};
use tokio_postgres_failover::resolve::{Addresses, HickoryResolver, Resolve};
use tokio_postgres_failover::tokio_postgres::config::{Host, TargetSessionAttrs};
use tokio_postgres_failover::tokio_postgres::{self, Client, Config, NoTls};

use crate::WRITERS;

/// `dns`: the name server that knows the name in `url`; none where `url` has addresses.
pub(crate) fn pool(url: &str, dns: Option<SocketAddr>) -> Result<Pool, Box<dyn Error>> {
    let mut config: Config = url.parse()?;
    // The driver then passes over standbys and goes on to the next address: the best it can do about a failover.
    config.target_session_attrs(TargetSessionAttrs::ReadWrite).application_name("plain");
    let recycling = ManagerConfig { recycling_method: RecyclingMethod::Fast };
    let manager = match dns {
        Some(server) => {
            let connect = ResolveAndConnect { resolver: HickoryResolver::with_name_servers([server]) };
            Manager::from_connect(config, connect, recycling)
        }
        None => Manager::from_config(config, NoTls, recycling),
    };
    Ok(Pool::builder(manager).max_size(WRITERS).build()?)
}

/// What the driver does by itself, but that it asks the demo's name server, which the system's resolver does not know:
/// resolves the name for each connection, without any cache, and tries all addresses in turn.
struct ResolveAndConnect {
    resolver: HickoryResolver,
}

type Connected = Result<(Client, JoinHandle<()>), tokio_postgres::Error>;

impl Connect for ResolveAndConnect {
    fn connect(&self, config: &Config) -> Pin<Box<dyn Future<Output = Connected> + Send + '_>> {
        let mut config = config.clone();
        Box::pin(async move {
            // A name without an address is left to the driver, which then fails in its own words.
            if let Some(Host::Tcp(name)) = config.get_hosts().first().cloned() {
                let addresses = self.resolver.resolve(&name).await;
                for (nth, address) in addresses.iter().flat_map(Addresses::iter).enumerate() {
                    if nth > 0 {
                        config.host(&name);
                    }
                    config.hostaddr(address);
                }
            }
            let (client, connection) = config.connect(NoTls).await?;
            // How the connection ended is told by the next call that uses it.
            Ok((client, tokio::spawn(async { connection.await.unwrap_or_default() })))
        })
    }
}
