//! Opens one session to one server, asks it what it is, and drives it until its scope ends.
//!
//! Decides nothing, and knows nothing of which server is wanted: it turns bytes into a [`ServerReport`] or a
//! [`ProbeFailure`]. A session's driver task ends with the session, with its scope or with the socket, whichever is first.
//! Tests: `tests/it/errors.rs`, and every test that fails over.

mod password;

pub(crate) use password::{Ask, Passwords};

use std::collections::HashMap;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use deadpool_postgres::ClientWrapper;
use futures_util::future::BoxFuture;
use futures_util::task::AtomicWaker;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_postgres::config::SslMode;
use tokio_postgres::error::{DbError, SqlState};
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{AsyncMessage, CancelToken, Client, Config, Error, SimpleQueryMessage, Socket};
use tokio_util::sync::CancellationToken;

use crate::classify::{Verdict, classify, explain, hung_up, not_let_in, not_offered, verdict_of_open};
use crate::topology::{Address, BadReport, Endpoint, FailureKind, ProbeFailure, ROLE_PROBE, ServerReport, probe};

/// A cancel request is a courtesy to the server; nobody waits for it longer than this.
const CANCEL_WITHIN: Duration = Duration::from_secs(2);

/// Pauses before the cancel requests for one session. Its statement is on the server long before the last of them.
const CANCEL_AFTER: [Duration; 3] = [Duration::ZERO, Duration::from_millis(50), Duration::from_millis(500)];

/// In characters. What a stranger says is kept, and copied into logs and errors, for no longer than this.
const LONGEST_MESSAGE: usize = 500;

/// A server that did not let itself be identified is tried again after this: the right may have been granted since.
const ROLE_ONLY_FOR: Duration = Duration::from_secs(60);

type Driver = BoxFuture<'static, Result<(), Error>>;

/// What the server said beside its answers in one session. A notice comes before the answer that it belongs to, and the
/// driver task notes it before it hands that answer on.
#[derive(Debug, Default)]
pub(crate) struct Notices {
    already_in_transaction: AtomicBool,
    not_replicated: AtomicBool,
    /// The session is one of the pool's, whose traffic shows that the server is there.
    pooled: AtomicBool,
}

impl Notices {
    fn note(&self, notice: &DbError) {
        tracing::debug!(code = notice.code().code(), "{}", notice.message());
        if *notice.code() == SqlState::ACTIVE_SQL_TRANSACTION {
            self.already_in_transaction.store(true, Ordering::Release);
        }
        // Its message is translated and its code is that of all warnings; the routine (`syncrep.c`) is neither.
        if notice.routine() == Some("SyncRepWaitForLSN") {
            self.not_replicated.store(true, Ordering::Release);
        }
    }

    /// From now on the session's traffic counts.
    pub(crate) fn pool(&self) {
        self.pooled.store(true, Ordering::Relaxed);
    }

    /// What was said before is of no interest to what comes now.
    pub(crate) fn forget(&self) {
        self.already_in_transaction.store(false, Ordering::Release);
        self.not_replicated.store(false, Ordering::Release);
    }

    /// A BEGIN met a transaction that was open already.
    pub(crate) fn already_in_transaction(&self) -> bool {
        self.already_in_transaction.load(Ordering::Acquire)
    }

    /// A COMMIT gave up waiting for a synchronous standby.
    pub(crate) fn not_replicated(&self) -> bool {
        self.not_replicated.load(Ordering::Acquire)
    }
}

/// Hides the type of the TLS connector.
trait Dial: Send + Sync {
    fn dial(&self, config: Config, notices: Arc<Notices>) -> BoxFuture<'_, Result<(Client, Driver), Error>>;
    fn cancel(&self, token: CancelToken) -> BoxFuture<'_, Result<(), Error>>;
}

struct Tls<T>(T);

impl<T> Dial for Tls<T>
where
    T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
    T::Stream: Send,
    T::TlsConnect: Send,
    <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
    fn dial(&self, config: Config, notices: Arc<Notices>) -> BoxFuture<'_, Result<(Client, Driver), Error>> {
        let tls = self.0.clone();
        Box::pin(async move {
            let (client, mut connection) = config.connect(tls).await?;
            let driver: Driver = Box::pin(async move {
                while let Some(message) = poll_fn(|cx| connection.poll_message(cx)).await {
                    if let AsyncMessage::Notice(notice) = message? {
                        notices.note(&notice);
                    }
                }
                Ok(())
            });
            Ok((client, driver))
        })
    }

    fn cancel(&self, token: CancelToken) -> BoxFuture<'_, Result<(), Error>> {
        let tls = self.0.clone();
        Box::pin(async move { token.cancel_query(tls).await })
    }
}

/// How sessions are opened: everything of the configuration but the address.
pub(crate) struct Opener {
    template: Config,
    dial: Box<dyn Dial>,
    /// Where the template holds no password because each session has its own.
    passwords: Option<Passwords>,
    /// Grows whenever something is sent or received on any session of the pool.
    stirs: Arc<AtomicU64>,
    /// Servers that did not let this role read more than their role, and when that was.
    role_only: Mutex<HashMap<Address, Instant>>,
}

impl Opener {
    /// `template` carries no host; each session adds its own.
    pub(crate) fn new<T>(template: Config, tls: T) -> Self
    where
        T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
        T::Stream: Send,
        T::TlsConnect: Send,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        Self { template, dial: Box::new(Tls(tls)), passwords: None, stirs: Arc::default(), role_only: Mutex::default() }
    }

    /// Asks for the password of each session.
    pub(crate) fn with_passwords(self, passwords: Option<Passwords>) -> Self {
        Self { passwords, ..self }
    }

    /// Opens a session and asks it. Cancel-safe: dropping the future closes the socket.
    pub(crate) async fn open(
        &self,
        endpoint: &Endpoint,
        scope: CancellationToken,
    ) -> Result<(Session, ServerReport), ProbeFailure> {
        let notices = Arc::new(Notices::default());
        let (client, driver) = self.dial(endpoint, Arc::clone(&notices)).await?;
        let task = tokio::spawn(drive(driver, scope.clone(), Arc::clone(&notices), Arc::clone(&self.stirs)));
        let session = Session { abort: task.abort_handle(), client: ClientWrapper::new(client, task), scope, notices };
        let report = self.question(&endpoint.address, &session, true).await?;
        Ok((session, report))
    }

    async fn dial(&self, endpoint: &Endpoint, notices: Arc<Notices>) -> Result<(Client, Driver), ProbeFailure> {
        let Some(passwords) = &self.passwords else {
            return self.dial.dial(self.config_for(endpoint), notices).await.map_err(not_opened);
        };
        // Boxed: those who have no provider are spared the size of its future.
        let dialling = async {
            let password = passwords.next().await?;
            let mut config = self.config_for(endpoint);
            config.password(password);
            match self.dial.dial(config, notices).await {
                Ok(opened) => {
                    passwords.accepted();
                    Ok(opened)
                }
                Err(error) if not_let_in(&error) => Err(passwords.refused(not_opened(error)).await),
                Err(error) => Err(not_opened(error)),
            }
        };
        Box::pin(dialling).await
    }

    /// Another number than before, if something was sent or received meanwhile on any session of the pool.
    pub(crate) fn stirs(&self) -> u64 {
        self.stirs.load(Ordering::Relaxed)
    }

    /// Asks a session that was opened earlier what its server is: one round trip.
    pub(crate) async fn ask(&self, address: &Address, session: &Session) -> Result<ServerReport, ProbeFailure> {
        self.question(address, session, false).await
    }

    async fn question(&self, address: &Address, session: &Session, fresh: bool) -> Result<ServerReport, ProbeFailure> {
        if self.role_only().get(address).is_none_or(|since| since.elapsed() > ROLE_ONLY_FOR) {
            match rows(&session.client, &probe(fresh)).await {
                Err(error) if not_offered(&error) => {
                    tracing::debug!("the identity probe was refused: {}", explain(&error));
                }
                answer => return read(answer),
            }
        }
        let report = read(rows(&session.client, ROLE_PROBE).await)?;
        self.role_only().insert(address.clone(), Instant::now());
        Ok(report)
    }

    fn role_only(&self) -> MutexGuard<'_, HashMap<Address, Instant>> {
        self.role_only.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the server to stop what the session of `token` runs: again after a moment, as a request that overtakes the
    /// statement finds the session idle and is lost. Ends with the first that is not taken within two seconds.
    pub(crate) async fn cancel(&self, token: CancelToken) {
        for pause in CANCEL_AFTER {
            tokio::time::sleep(pause).await;
            match tokio::time::timeout(CANCEL_WITHIN, self.dial.cancel(token.clone())).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return tracing::debug!("a cancel request failed: {}", explain(&error)),
                Err(_) => return tracing::debug!("a cancel request was not taken within {CANCEL_WITHIN:?}"),
            }
        }
    }

    fn config_for(&self, endpoint: &Endpoint) -> Config {
        let mut config = self.template.clone();
        match &endpoint.address {
            Address::Tcp(address) => {
                if let Some(host) = &endpoint.host {
                    // A trailing dot makes a DNS name absolute; certificates are issued without it.
                    config.host(host.trim_end_matches('.'));
                }
                config.hostaddr(address.ip()).port(address.port());
            }
            #[cfg(unix)]
            Address::Unix(folder, port) => {
                config.host_path(folder).port(*port).ssl_mode(SslMode::Disable);
            }
        }
        config
    }
}

/// One open session and its driver. Dropping it ends the driver and closes the socket.
pub(crate) struct Session {
    pub(crate) client: ClientWrapper,
    /// Ends the driver from outside, although somebody still holds the client.
    pub(crate) abort: AbortHandle,
    /// All sessions of this scope end with it.
    pub(crate) scope: CancellationToken,
    pub(crate) notices: Arc<Notices>,
}

async fn drive(mut driver: Driver, scope: CancellationToken, notices: Arc<Notices>, stirs: Arc<AtomicU64>) {
    let bell = Arc::new(Bell { rung: AtomicBool::new(true), driver: AtomicWaker::new() });
    let waker = Waker::from(Arc::clone(&bell));
    let mut left = pin!(scope.cancelled());
    // But for the bell, the driver is woken by what is to be sent and by what was received, and by nothing else.
    let ended = poll_fn(|context| {
        bell.driver.register(context.waker());
        if bell.rung.swap(false, Ordering::AcqRel) && left.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
            return Poll::Ready(Ok(()));
        }
        if notices.pooled.load(Ordering::Relaxed) {
            stirs.fetch_add(1, Ordering::Relaxed);
        }
        driver.as_mut().poll(context)
    });
    if let Err(error) = ended.await {
        tracing::debug!("a session ended: {}", explain(&error));
    }
}

/// Rings when the scope of a session ends. All sessions of a generation share the scope and its locks, so a driver looks
/// there when the bell has rung, and not whenever something is sent or received.
struct Bell {
    rung: AtomicBool,
    driver: AtomicWaker,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.rung.store(true, Ordering::Release);
        self.driver.wake();
    }
}

/// The rows of the answer. A value that is no text is not the same as NULL, which says that something is not told.
pub(crate) async fn rows(client: &Client, sql: &str) -> Result<Vec<Vec<Option<String>>>, Error> {
    let text = |value: Option<&str>| value.map(str::to_owned);
    let rows = client.simple_query(sql).await?.into_iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => {
            let value = |index| row.try_get(index).map_or_else(|_| Some('\u{FFFD}'.to_string()), text);
            Some((0..row.len()).map(value).collect())
        }
        _ => None,
    });
    Ok(rows.collect())
}

fn read(answer: Result<Vec<Vec<Option<String>>>, Error>) -> Result<ServerReport, ProbeFailure> {
    let nonsense =
        |bad: BadReport| ProbeFailure::new(FailureKind::NotPostgres, bad.to_string()).caused_by(Arc::new(bad));
    let rows = answer.map_err(|error| failure(classify(&error), error))?;
    let [row] = &rows[..] else {
        return Err(nonsense(BadReport::new("one row", &format!("{} rows", rows.len()))));
    };
    let row: Vec<Option<&str>> = row.iter().map(Option::as_deref).collect();
    ServerReport::parse(&row).map_err(nonsense)
}

fn not_opened(error: Error) -> ProbeFailure {
    // What speaks in lines of text looks like this to the driver, which takes the first letters for a long message.
    let hung_up = hung_up(&error);
    let mut failure = failure(verdict_of_open(&error), error);
    if hung_up && failure.kind == FailureKind::Unreachable {
        failure.message.push_str("; it hung up first: a proxy without a server behind it, or not PostgreSQL");
    }
    failure
}

fn failure(verdict: Verdict, error: Error) -> ProbeFailure {
    let kind = match verdict {
        Verdict::Full => FailureKind::Full,
        Verdict::NotNow => FailureKind::NotNow,
        Verdict::Refused => FailureKind::Refused,
        Verdict::NotPostgres => FailureKind::NotPostgres,
        _ => FailureKind::Unreachable,
    };
    let message: String = explain(&error).chars().take(LONGEST_MESSAGE).collect();
    ProbeFailure::new(kind, message).caused_by(Arc::new(error))
}
