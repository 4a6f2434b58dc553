//! Opens the connection to the server, and copies bytes.

use std::future::pending;
use std::io;
use std::pin::pin;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, copy, split};
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

/// How long a server that takes nothing any more has for its last words.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How much is read from a client at once.
const PIECE: usize = 16 * 1024;
/// Where the code of a first packet is, and the code of a cancel request.
const CODE: std::ops::Range<usize> = 4..8;
const CANCEL_REQUEST: [u8; 4] = 80_877_102_u32.to_be_bytes();

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
///
/// A client that wants a statement cancelled may close its direction at once, as nothing else follows. It still waits.
pub(crate) async fn hung_up(client: &TcpStream) {
    loop {
        sleep(LOOK).await;
        match client.ready(Interest::READABLE).await {
            Ok(ready) if !ready.is_read_closed() => {}
            Ok(_) if wants_to_cancel(client).await => {}
            _ => return,
        }
    }
}

/// Returns whether the client, which has closed its direction, has sent a cancel request before.
async fn wants_to_cancel(client: &TcpStream) -> bool {
    let mut start = [0; CODE.end];
    matches!(client.peek(&mut start).await, Ok(read) if read == start.len()) && start[CODE] == CANCEL_REQUEST
}

/// Why nothing more is sent to the server.
enum Unsent {
    /// The client has closed its direction.
    Done,
    /// The client is gone.
    Lost(io::Error),
    /// The server takes nothing any more.
    Refused(io::Error),
}

async fn send(mut client: impl AsyncRead + Unpin, mut server: impl AsyncWrite + Unpin) -> Unsent {
    let mut piece = vec![0; PIECE];
    loop {
        let read = match client.read(&mut piece).await {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) => return Unsent::Lost(error),
        };
        if let Err(error) = server.write_all(&piece[..read]).await {
            return Unsent::Refused(error);
        }
    }
    server.shutdown().await.map_or_else(Unsent::Refused, |()| Unsent::Done)
}

/// Copies until the server has ended the connection, or is not the primary any more.
pub(crate) async fn forward(client: &mut TcpStream, server: Box<dyn Stream>, route: &Route) {
    if let Err(error) = client.set_nodelay(true) {
        tracing::debug!("TCP_NODELAY cannot be set: {error}");
    }
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = split(server);
    let sending = async {
        match send(&mut from_client, &mut to_server).await {
            // The server answers what it has, and ends the connection.
            Unsent::Done => pending().await,
            Unsent::Lost(error) => error,
            // The server may have said why before it closed the connection, and the client is to hear it.
            Unsent::Refused(error) => {
                sleep(LAST_WORDS).await;
                error
            }
        }
    };
    let both = async {
        let (sending, receiving) = (pin!(sending), pin!(copy(&mut from_server, &mut to_client)));
        tokio::select! {
            received = receiving => received,
            failed = sending => Err(failed),
        }
    };
    if let Some(Err(error)) = route.ended.run_until_cancelled(both).await {
        tracing::debug!("a connection was lost: {error}");
    }
}
