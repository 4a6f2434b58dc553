//! Opens the connection to the server, and copies bytes.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{sleep, timeout};
use tokio_postgres_failover::view::Address;

use crate::route::Route;

/// How long one connect to the primary may take. If it takes longer, the host or the path to it is gone.
const CONNECT_WITHIN: Duration = Duration::from_secs(3);
/// The pause after a connect that failed.
const PAUSE: Duration = Duration::from_millis(100);

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
            Ok(Box::new(stream))
        }
        Address::Unix(folder, port) => {
            let stream = UnixStream::connect(folder.join(format!(".s.PGSQL.{port}"))).await?;
            Ok(Box::new(stream))
        }
        other => Err(io::Error::new(io::ErrorKind::Unsupported, format!("{other} has no address of its own"))),
    }
}

/// Copies until either side has ended the connection, or its server is not the primary any more.
pub(crate) async fn copy(client: &mut TcpStream, mut server: Box<dyn Stream>, route: &Route) {
    if let Err(error) = client.set_nodelay(true) {
        tracing::debug!("TCP_NODELAY cannot be set: {error}");
    }
    let copying = copy_bidirectional(client, &mut server);
    if let Some(Err(error)) = route.ended.run_until_cancelled(copying).await {
        tracing::debug!("a connection was lost: {error}");
    }
}
