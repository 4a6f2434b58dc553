//! Opens the connection to the server, and copies bytes.

use std::future::pending;
use std::io;
use std::pin::pin;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, Interest, copy, split};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{sleep, timeout};
use tokio_postgres_failover::view::Address;

use crate::route::Route;

/// How long one connect to the primary may take. If it takes longer, the host or the path to it is gone.
const CONNECT_WITHIN: Duration = Duration::from_secs(3);
/// The pause after a connect that failed.
const PAUSE: Duration = Duration::from_millis(100);
/// How often a client that waits is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// The program's own keep-alives test loopback alone. So the sidecar tests the path to the server: after this silence,
/// and from then on as often.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(5));
/// A connection is lost if the server's host confirms nothing that was sent for so long.
#[cfg(target_os = "linux")]
const UNCONFIRMED: Duration = Duration::from_secs(30);

pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// Connects to the primary. `None`: it took no connection, or it is not the primary any more.
pub(crate) async fn connect(route: &Route) -> Option<Box<dyn Stream>> {
    let connecting = timeout(CONNECT_WITHIN, open(&route.endpoint.address));
    let connected = route.ended.run_until_cancelled(connecting).await?;
    let failure = match connected {
        Ok(Ok(stream)) => return Some(stream),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no connection within {CONNECT_WITHIN:?}"),
    };
    tracing::debug!("{} took no connection: {failure}", route.endpoint);
    sleep(PAUSE).await;
    None
}

async fn open(address: &Address) -> io::Result<Box<dyn Stream>> {
    match address {
        Address::Tcp(address) => {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let socket = SockRef::from(&stream);
            let (after, every) = KEEP_ALIVE;
            socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(after).with_interval(every))?;
            #[cfg(target_os = "linux")]
            socket.set_tcp_user_timeout(Some(UNCONFIRMED))?;
            Ok(Box::new(stream))
        }
        Address::Unix(folder, port) => {
            let stream = UnixStream::connect(folder.join(format!(".s.PGSQL.{port}"))).await?;
            Ok(Box::new(stream))
        }
        other => Err(io::Error::new(io::ErrorKind::Unsupported, format!("{other} has no address of its own"))),
    }
}

/// Waits until the client has hung up. Its first packet lies unread meanwhile, so this looks from time to time.
pub(crate) async fn hung_up(client: &TcpStream) {
    loop {
        sleep(LOOK).await;
        match client.ready(Interest::READABLE).await {
            Ok(ready) if !ready.is_read_closed() => {}
            _ => return,
        }
    }
}

/// Copies until the server has ended the connection, or is not the primary any more.
pub(crate) async fn forward(client: &mut TcpStream, server: Box<dyn Stream>, route: &Route) {
    if let Err(error) = client.set_nodelay(true) {
        tracing::debug!("TCP_NODELAY cannot be set: {error}");
    }
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = split(server);
    let sending = async {
        copy(&mut from_client, &mut to_server).await?;
        // The client sends nothing more. The server answers what it has, and ends the connection.
        to_server.shutdown().await?;
        pending().await
    };
    let both = async {
        let (sending, receiving) = (pin!(sending), pin!(copy(&mut from_server, &mut to_client)));
        tokio::select! {
            received = receiving => received,
            failed = sending => failed,
        }
    };
    if let Some(Err(error)) = route.ended.run_until_cancelled(both).await {
        tracing::debug!("a connection was lost: {error}");
    }
}
