//! A sidecar: it listens on loopback, and forwards each connection to the verified primary of a PostgreSQL cluster.
//!
//! Programs in any language follow the primary through it, with whatever driver and pool they have. It forwards bytes
//! and has no protocol of its own: log-ins, TLS, and cancel requests pass as they are. It ends the connections to a
//! server as soon as the pool knows that this server is not the primary any more, so no pool of a program keeps a
//! connection to an old primary. `README.md` says how to run it.

mod forward;
mod route;

use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_postgres_failover::Pool;

use route::Routes;

/// The pause after an `accept` that failed, usually because the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Forwards connections to the primary that a pool has verified.
#[derive(Clone, Debug)]
pub struct Sidecar {
    pool: Pool,
    wait: Duration,
}

impl Sidecar {
    /// Follows the primary of `pool`, which must not have
    /// [`sleep_after`](tokio_postgres_failover::PoolBuilder::sleep_after): forwarded connections do not keep it awake.
    /// A connection that comes while there is no primary waits for `wait` at most.
    #[must_use]
    pub fn new(pool: Pool, wait: Duration) -> Self {
        Self { pool, wait }
    }

    /// Serves until `stop` is ready, and ends all connections then.
    pub async fn serve(self, listener: TcpListener, stop: impl Future<Output = ()> + Send) {
        let routes = Routes::follow(&self.pool);
        let mut connections = JoinSet::new();
        tokio::pin!(stop);
        loop {
            tokio::select! {
                () = &mut stop => return,
                accepted = listener.accept() => match accepted {
                    Ok((client, _)) => {
                        connections.spawn(forwarded(client, routes.clone(), self.wait));
                    }
                    Err(error) => {
                        tracing::warn!("no connection can be accepted: {error}");
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(_) = connections.join_next() => {}
            }
        }
    }
}

/// Forwards one connection until it has ended, or its server is not the primary any more.
async fn forwarded(mut client: TcpStream, mut routes: Routes, wait: Duration) {
    let opening = timeout(wait, async {
        loop {
            let route = routes.current().await?;
            // A route that has ended meanwhile leads nowhere, and the next one is waited for.
            if let Some(server) = forward::connect(&route).await {
                return Some((route, server));
            }
        }
    });
    let opened = tokio::select! {
        opened = opening => opened,
        () = forward::hung_up(&client) => return tracing::debug!("a client has hung up before there was a primary"),
    };
    match opened {
        Ok(Some((route, server))) => {
            tracing::debug!("forwarded to {}", route.endpoint);
            forward::forward(&mut client, server, &route).await;
        }
        Ok(None) => tracing::warn!("a connection was turned away: the pool was closed"),
        Err(_) => tracing::warn!("a connection was turned away: no primary took it within {wait:?} (WAIT_SECONDS)"),
    }
}
