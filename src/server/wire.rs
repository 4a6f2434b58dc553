//! Opens the driver's connections over streams that count messages.
//!
//! The driver's own `connect` does not accept a stream of another type. So the socket is opened first (`socket.rs`),
//! and `connect_raw` begins the session over a counting stream on it.

use std::any::TypeId;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
#[cfg(not(failover_sim))]
use std::time::{SystemTime, UNIX_EPOCH};

use futures_util::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::config::{Host, SslMode, SslNegotiation};
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect, TlsStream};
use tokio_postgres::{AsyncMessage, CancelToken, Client, Config, Connection, Error, NoTls, Socket};

use crate::connect::Connect;
use crate::topology::Endpoint;

use super::activity::{Activity, Counter};
use super::opening::Passage;
use super::over::Over;
use super::socket::{Plain, open};
use super::{Driver, Notices};

/// Opens a session to the one address of `config`, and counts its traffic in `notices`.
pub(super) async fn connect<T>(mut config: Config, tls: T, notices: Arc<Notices>) -> Result<(Client, Driver), Error>
where
    T: MakeTlsConnect<Socket> + Send + 'static,
    T::Stream: Send,
    T::TlsConnect: Send,
    <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
    without_tls::<T::TlsConnect>(&mut config);
    let plain = open(&config).await?;
    let secure = Secure::new(tls, &mut config, Arc::clone(&notices.activity));
    start(config, plain, secure, notices).await
}

/// Like [`connect`], over a stream of the user's connector.
pub(super) async fn connect_over<T>(
    connector: Arc<dyn Connect>,
    endpoint: Endpoint,
    mut config: Config,
    tls: T,
    notices: Arc<Notices>,
) -> Result<(Client, Driver), Error>
where
    T: MakeTlsConnect<Over> + Send + 'static,
    T::Stream: Send,
    T::TlsConnect: Send,
    <T::TlsConnect as TlsConnect<Over>>::Future: Send,
{
    without_tls::<T::TlsConnect>(&mut config);
    let over = Over::open(&*connector, &endpoint).await;
    let secure = Secure::new(tls, &mut config, Arc::clone(&notices.activity));
    start(config, over, secure, notices).await
}

/// The driver recognises its own `NoTls`, which cannot encrypt. It does not recognise a connector around `NoTls`.
fn without_tls<K: 'static>(config: &mut Config) {
    if TypeId::of::<K>() == TypeId::of::<NoTls>() && config.get_ssl_mode() == SslMode::Prefer {
        config.ssl_mode(SslMode::Disable);
    }
}

/// Begins a session on an open stream.
async fn start<P, K>(
    config: Config,
    stream: P,
    secure: Secure<K>,
    notices: Arc<Notices>,
) -> Result<(Client, Driver), Error>
where
    P: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    Secure<K>: TlsConnect<Wire<P>>,
    <Secure<K> as TlsConnect<Wire<P>>>::Stream: Send + 'static,
{
    let activity = Arc::clone(&notices.activity);
    let asks = config.get_ssl_mode() != SslMode::Disable && config.get_ssl_negotiation() == SslNegotiation::Postgres;
    let begins = Some(Begins { asks_for_tls: asks });
    let wire = Wire { stream, counter: Counter::new(asks), passage: Passage::default(), activity, begins };
    let (client, connection) = config.connect_raw(wire, secure).await?;
    Ok((client, drive(connection, notices)))
}

/// Asks the server to cancel what the session of `token` runs.
pub(super) async fn cancel<T>(mut config: Config, tls: T, token: CancelToken) -> Result<(), Error>
where
    T: MakeTlsConnect<Socket> + Send + 'static,
    T::Stream: Send,
    T::TlsConnect: Send,
    <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
    let plain = open(&config).await?;
    let secure = Secure::new(tls, &mut config, Arc::default());
    token.cancel_query_raw(Wire::uncounted(plain), secure).await
}

/// Like [`cancel`], over a stream of the user's connector.
pub(super) async fn cancel_over<T>(
    connector: Arc<dyn Connect>,
    endpoint: Endpoint,
    mut config: Config,
    tls: T,
    token: CancelToken,
) -> Result<(), Error>
where
    T: MakeTlsConnect<Over> + Send + 'static,
    T::Stream: Send,
    T::TlsConnect: Send,
    <T::TlsConnect as TlsConnect<Over>>::Future: Send,
{
    let over = Over::open(&*connector, &endpoint).await;
    let secure = Secure::new(tls, &mut config, Arc::default());
    token.cancel_query_raw(Wire::uncounted(over), secure).await
}

fn drive<S, T>(mut connection: Connection<S, T>, notices: Arc<Notices>) -> Driver
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    Box::pin(async move {
        while let Some(message) = poll_fn(|cx| connection.poll_message(cx)).await {
            match message? {
                AsyncMessage::Notice(notice) => notices.note(&notice),
                AsyncMessage::Notification(notification) => notices.notified(notification),
                _ => {}
            }
        }
        Ok(())
    })
}

fn host_of(config: &Config) -> Option<String> {
    config.get_hosts().iter().find_map(|host| match host {
        Host::Tcp(name) => Some(name.clone()),
        #[cfg(unix)]
        Host::Unix(_) => None,
    })
}

/// A stream that carries the protocol messages unencrypted: it is above TLS, or there is no TLS. It counts them,
/// without those of a transaction's opening, of which the driver knows nothing.
struct Wire<S> {
    stream: S,
    counter: Counter,
    passage: Passage,
    activity: Arc<Activity>,
    /// Nothing was received yet.
    begins: Option<Begins>,
}

impl<S> Wire<S> {
    /// A stream for a message that belongs to no session.
    fn uncounted(stream: S) -> Self {
        Self::of(stream, Arc::default())
    }

    fn of(stream: S, activity: Arc<Activity>) -> Self {
        Self { stream, counter: Counter::new(false), passage: Passage::default(), activity, begins: None }
    }
}

/// The start of a session.
#[derive(Clone, Copy)]
struct Begins {
    asks_for_tls: bool,
}

impl Begins {
    /// Recognises the error of a server that cannot start a process for a session, because its machine has run out of
    /// processes or memory. It sends the error at once, in the old form `E`, text, NUL
    /// (`report_fork_failure_to_client`). The driver would take the `E` for "no TLS", or the text for the length of a
    /// message.
    fn error(self, received: &[u8]) -> Option<io::Error> {
        let text = match received {
            [b'E', rest @ ..] if self.asks_for_tls || rest.first().is_some_and(u8::is_ascii_graphic) => rest,
            _ => return None,
        };
        let text: String = String::from_utf8_lossy(text).chars().filter(|char| !char.is_control()).collect();
        let said = if text.is_empty() { String::new() } else { format!(": {text}") };
        let message = format!(
            "the server sent an error before the session began{said}; its log tells more, and its machine may lack \
             processes or memory"
        );
        Some(io::Error::new(io::ErrorKind::ConnectionRefused, message))
    }
}

#[cfg(failover_sim)]
pub(crate) use crate::simulation::wall_clock;

/// The clock for a connection's idle time. Unlike a monotonic clock, it goes on while the machine sleeps.
#[cfg(not(failover_sim))]
pub(crate) fn wall_clock() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let this = &mut *self;
        let polled = this.passage.poll_read(this.activity.opening(), &mut this.stream, cx, buf);
        if polled.is_ready()
            && let Some(error) = this.begins.take().and_then(|begins| begins.error(buf.filled().get(before..)?))
        {
            buf.set_filled(before);
            return Poll::Ready(Err(error));
        }
        match &polled {
            Poll::Ready(_) => {
                if this.counter.received(buf.filled().get(before..).unwrap_or_default()) {
                    this.activity.heard(wall_clock());
                }
                if this.counter.shows_life() {
                    this.activity.note_life();
                }
            }
            // Nothing has changed since this was last published.
            Poll::Pending if !this.counter.drained() => return polled,
            Poll::Pending => {}
        }
        this.activity.publish(&mut this.counter);
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let (opening, silent) = (this.activity.opening(), this.counter.is_all_answered());
        let polled = this.passage.poll_write(opening, silent, &mut this.stream, cx, buf);
        match &polled {
            Poll::Ready(Ok(taken)) => this.counter.sent(buf.get(..*taken).unwrap_or_default()),
            _ => this.counter.blocked(),
        }
        if this.passage.has_unsent() {
            this.counter.blocked();
        }
        this.activity.publish(&mut this.counter);
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let had_unsent = this.passage.has_unsent();
        let polled = this.passage.poll_flush(&mut this.stream, cx);
        if had_unsent && !this.passage.has_unsent() {
            this.counter.sent(&[]);
            this.activity.publish(&mut this.counter);
        }
        polled
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl<S: TlsStream + Unpin> TlsStream for Wire<S> {
    fn channel_binding(&self) -> ChannelBinding {
        self.stream.channel_binding()
    }
}

type Unusable = Box<dyn std::error::Error + Send + Sync>;

/// The user's TLS connector. It encrypts the plain socket, and messages are counted above TLS.
struct Secure<K> {
    connector: Result<K, Unusable>,
    activity: Arc<Activity>,
}

impl<K> Secure<K> {
    /// Creates the user's connector for one session. Like the driver, this creates it even if the server then does not
    /// encrypt.
    fn new<P, T>(mut tls: T, config: &mut Config, activity: Arc<Activity>) -> Self
    where
        T: MakeTlsConnect<P, TlsConnect = K>,
        K: TlsConnect<P>,
    {
        let connector = tls.make_tls_connect(host_of(config).as_deref().unwrap_or_default()).map_err(Into::into);
        if connector.is_err() {
            // With these settings the driver reports the error at once.
            config.ssl_mode(SslMode::Require).ssl_negotiation(SslNegotiation::Direct);
        }
        Self { connector, activity }
    }
}

impl<K> TlsConnect<Wire<Plain>> for Secure<K>
where
    K: TlsConnect<Socket>,
    K::Stream: Send + 'static,
    K::Future: Send + 'static,
{
    type Stream = Wire<K::Stream>;
    type Error = Unusable;
    type Future = BoxFuture<'static, Result<Wire<K::Stream>, Unusable>>;

    fn connect(self, wire: Wire<Plain>) -> Self::Future {
        let connecting = self.connector.and_then(|connector| match wire.stream {
            Plain::Tcp(socket) => Ok(connector.connect(socket)),
            // The driver does not use TLS on a Unix socket.
            #[cfg(unix)]
            Plain::Unix(_) => Err("a Unix socket has no TLS".into()),
        });
        encrypted(connecting, self.activity)
    }
}

impl<K> TlsConnect<Wire<Over>> for Secure<K>
where
    K: TlsConnect<Over>,
    K::Stream: Send + 'static,
    K::Future: Send + 'static,
{
    type Stream = Wire<K::Stream>;
    type Error = Unusable;
    type Future = BoxFuture<'static, Result<Wire<K::Stream>, Unusable>>;

    fn connect(self, wire: Wire<Over>) -> Self::Future {
        encrypted(self.connector.map(|connector| connector.connect(wire.stream)), self.activity)
    }
}

/// Waits for the TLS handshake, if it could be begun. Messages are counted above TLS.
fn encrypted<S, E>(
    connecting: Result<impl Future<Output = Result<S, E>> + Send + 'static, Unusable>,
    activity: Arc<Activity>,
) -> BoxFuture<'static, Result<Wire<S>, Unusable>>
where
    S: Send + 'static,
    E: Into<Unusable>,
{
    Box::pin(async move {
        let stream = connecting?.await.map_err(Into::into)?;
        Ok(Wire::of(stream, activity))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_before_the_session_is_told_from_one_of_the_session() {
        let of_a_session = b"E\0\0\0\x24SERROR\0CZZ999\0Mno words for it\0\0";
        let without_a_process = b"Ecould not fork new process for connection: Cannot allocate memory\n\0";
        for (asks_for_tls, received, words) in [
            (false, &of_a_session[..], None),
            (
                false,
                without_a_process,
                Some("began: could not fork new process for connection: Cannot allocate memory; "),
            ),
            (true, b"E", Some("began; ")),
            (true, without_a_process, Some("could not fork")),
            (true, b"S", None),
            (true, b"N", None),
            (false, b"E", None),
            (false, b"R\0\0\0\x08\0\0\0\0", None),
            (false, b"", None),
        ] {
            let error = Begins { asks_for_tls }.error(received).map(|error| error.to_string());
            assert_eq!(error.is_some(), words.is_some(), "{received:?}: {error:?}");
            assert!(words.is_none_or(|words| error.is_some_and(|error| error.contains(words))), "{received:?}");
        }
    }

    /// A server whose Unix socket comes and goes while sessions are opened: each session that is opened is counted.
    #[cfg(unix)]
    #[tokio::test]
    async fn each_session_on_a_unix_socket_is_counted() {
        use std::io::{Read, Write};
        use std::os::unix::net::UnixListener;
        use std::sync::atomic::{AtomicBool, Ordering};

        // What ends a log-in: AuthenticationOk and ReadyForQuery.
        const LET_IN: &[u8] = b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I";
        let folder = std::env::temp_dir().join(format!("failover-wire-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (path, end) = (folder.join(".s.PGSQL.5432"), Arc::new(AtomicBool::new(false)));
        let ends = Arc::clone(&end);
        let server = std::thread::spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                let Ok(listener) = UnixListener::bind(&path) else { continue };
                listener.set_nonblocking(true).unwrap();
                for _ in 0..200 {
                    let Ok((mut client, _)) = listener.accept() else { continue };
                    client.set_nonblocking(false).unwrap();
                    if client.read(&mut [0; 512]).is_ok_and(|read| read > 0) {
                        let _ = client.write_all(LET_IN);
                    }
                }
                drop(listener);
                std::fs::remove_file(&path).unwrap();
                std::thread::sleep(std::time::Duration::from_micros(20));
            }
        });
        let mut config = Config::new();
        config.host_path(&folder).user("app").dbname("app");
        let mut opened = 0;
        for _ in 0..20_000 {
            let notices = Arc::<Notices>::default();
            let Ok((_client, _driver)) = connect(config.clone(), NoTls, Arc::clone(&notices)).await else { continue };
            opened += 1;
            assert!(notices.activity.heard_at() > 0, "session {opened} is not counted");
        }
        end.store(true, Ordering::Relaxed);
        server.join().unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(opened > 0);
    }
}
