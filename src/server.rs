//! Opens one session to one server, asks the server what it is, and drives the session until its scope ends.
//!
//! This module decides nothing, and does not know which server the pool is looking for. It turns bytes into a
//! [`ServerReport`] or a [`ProbeFailure`]. A session's driver task ends when the session is dropped, or when its scope
//! or its socket ends. The tests are `tests/it/observe/errors.rs`, and every test that fails over.

mod activity;
mod end;
mod notices;
mod opening;
mod over;
mod owned;
mod password;
mod question;
mod rows;
mod scope;
mod session;
mod socket;
mod stranger;
mod wire;
mod withheld;

pub(crate) use activity::{Activity, Heard, POOLS_COMMIT, TransactionEnd, Unanswered};
pub(crate) use end::End;
pub(crate) use notices::{Notices, NotificationSink, SessionEndListener};
pub(crate) use opening::{MarkText, OpeningState};
pub(crate) use owned::OwnedSession;
pub(crate) use password::{PasswordProvider, Passwords};
pub(crate) use rows::{may_be_cut, rows};
pub(crate) use scope::Scope;
pub use session::SessionClient;
pub(crate) use session::{Guarded, Session};
pub(crate) use wire::wall_clock;

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use deadpool_postgres::ClientWrapper;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio_postgres::config::{SslMode, SslNegotiation};
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{CancelToken, Client, Config, Error, Socket};

use crate::classify::{
    BadCertificate, NO_DIRECT_TLS, NO_TLS, TlsTrouble, Verdict, explain, hung_up, hung_up_in_handshake, links,
    no_such_database, not_let_in, tls_trouble, verdict_of_open,
};
use crate::connect::Connect;
use crate::topology::{Address, Endpoint, FailureKind, ProbeFailure, PromotionWait, Question, ServerReport};
use over::Over;
use question::Questions;
use session::{Driver, drive};
use stranger::{Peer, what_answers};

/// Appended to the failure if a peer hung up, and no session was ever opened.
const HUNG_UP: &str = "; it hung up first: a proxy without a server behind it, or not PostgreSQL";

/// Time limit for a cancel request. It only saves the server work, so a longer wait is not worth it.
const CANCEL_WITHIN: Duration = Duration::from_secs(2);

/// Pauses before the cancel requests for one session. The session's statement reaches the server long before the last
/// request.
const CANCEL_AFTER: [Duration; 3] = [Duration::ZERO, Duration::from_millis(50), Duration::from_millis(500)];

/// If the pool's first session is not open after this time, the pool examines whether the peer is PostgreSQL.
const STRANGER_AFTER: Duration = Duration::from_secs(1);

type Dialing = BoxFuture<'static, Result<(Client, Driver), Error>>;

/// Hides the type of the TLS connector, and what the stream below it is.
trait Dial: Send + Sync {
    fn dial(&self, endpoint: &Endpoint, config: Config, notices: Arc<Notices>) -> Dialing;
    fn cancel(&self, endpoint: &Endpoint, config: Config, token: CancelToken) -> BoxFuture<'static, Result<(), Error>>;
    /// The connector that opens the streams, if it is the user's.
    fn connector(&self) -> Option<&Arc<dyn Connect>>;
}

struct TlsDial<T>(T);

impl<T> Dial for TlsDial<T>
where
    T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
    T::Stream: Send,
    T::TlsConnect: Send,
    <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
    fn dial(&self, _: &Endpoint, config: Config, notices: Arc<Notices>) -> Dialing {
        Box::pin(wire::connect(config, self.0.clone(), notices))
    }

    fn cancel(&self, _: &Endpoint, config: Config, token: CancelToken) -> BoxFuture<'static, Result<(), Error>> {
        Box::pin(wire::cancel(config, self.0.clone(), token))
    }

    fn connector(&self) -> Option<&Arc<dyn Connect>> {
        None
    }
}

/// Dials over the streams of the user's connector.
struct OverDial<T> {
    connector: Arc<dyn Connect>,
    tls: T,
}

impl<T> Dial for OverDial<T>
where
    T: MakeTlsConnect<Over> + Clone + Send + Sync + 'static,
    T::Stream: Send,
    T::TlsConnect: Send,
    <T::TlsConnect as TlsConnect<Over>>::Future: Send,
{
    fn dial(&self, endpoint: &Endpoint, config: Config, notices: Arc<Notices>) -> Dialing {
        let connector = Arc::clone(&self.connector);
        Box::pin(wire::connect_over(connector, endpoint.clone(), config, self.tls.clone(), notices))
    }

    fn cancel(&self, endpoint: &Endpoint, config: Config, token: CancelToken) -> BoxFuture<'static, Result<(), Error>> {
        let connector = Arc::clone(&self.connector);
        Box::pin(wire::cancel_over(connector, endpoint.clone(), config, self.tls.clone(), token))
    }

    fn connector(&self) -> Option<&Arc<dyn Connect>> {
        Some(&self.connector)
    }
}

/// The parts that all openers share: how to ask, and what to count.
#[derive(Default)]
pub(crate) struct OpenerParts {
    pub(crate) questions: Questions,
    /// A counter that grows whenever something is sent or received for a caller on any session of the pool.
    pub(crate) traffic: Arc<AtomicU64>,
}

impl OpenerParts {
    /// Asks the first question on a session that was opened.
    pub(crate) async fn ask_first<C: SessionClient>(
        &self,
        session: Session<C>,
        endpoint: &Endpoint,
        question: Question,
    ) -> Opened<C> {
        let told = &session.notices.session;
        let report = self.questions.ask(&endpoint.address, &session.client, question, told).await?;
        Ok((session, report))
    }
}

/// Opens sessions and asks servers what they are. Cancel-safe: dropping a future closes the session that it opens.
pub(crate) trait Open<C>: Send + Sync {
    fn parts(&self) -> &OpenerParts;

    /// Opens a session and asks the question on it.
    fn open<'a>(&'a self, endpoint: &'a Endpoint, question: Question, scope: Scope) -> BoxFuture<'a, Opened<C>>;

    /// Like [`Self::open`], but the caller drives the session. Fails for a wrapped pool, whose manager drives its
    /// sessions itself.
    fn open_owned<'a>(&'a self, endpoint: &'a Endpoint, question: Question, scope: Scope)
    -> BoxFuture<'a, OpenedOwned>;

    /// Asks on an open session what its server is, after the promotion wait if there is one. Costs one round trip.
    fn ask<'a>(
        &'a self,
        address: &'a Address,
        client: &'a Client,
        promotion_wait: Option<PromotionWait>,
    ) -> BoxFuture<'a, Result<ServerReport, ProbeFailure>> {
        Box::pin(self.parts().questions.ask_after(promotion_wait, address, client))
    }

    /// A number that changes whenever something is sent or received for a caller on any session of the pool.
    fn traffic(&self) -> u64 {
        self.parts().traffic.load(Ordering::Relaxed)
    }

    /// Returns whether this crate drives the pool's sessions. If so, it notices the end of each session immediately.
    fn drives(&self) -> bool;

    /// Sends one cancel request to the server at `endpoint`, for the statement that the session of `token` runs.
    fn cancel(&self, endpoint: &Endpoint, token: CancelToken) -> BoxFuture<'static, Result<(), Error>>;
}

pub(crate) type Opened<C> = Result<(Session<C>, ServerReport), ProbeFailure>;
pub(crate) type OpenedOwned = Result<(OwnedSession, ServerReport), ProbeFailure>;

/// Opens sessions by this crate's own dialing. It holds the configuration except for the address.
pub(crate) struct Opener {
    template: Config,
    dial: Arc<dyn Dial>,
    /// The password provider, if there is one. Then the template holds no password.
    passwords: Option<Passwords>,
    parts: OpenerParts,
    /// A session has been opened before, so the peers of this pool are PostgreSQL.
    worked: AtomicBool,
}

impl Opener {
    /// `template` must not contain a host; each session adds its own.
    pub(crate) fn new<T>(template: Config, tls: T) -> Self
    where
        T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
        T::Stream: Send,
        T::TlsConnect: Send,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        Self::dialling(template, Arc::new(TlsDial(tls)))
    }

    /// Like [`Self::new`], over the streams of the user's connector.
    pub(crate) fn over<T>(template: Config, connector: Arc<dyn Connect>, tls: T) -> Self
    where
        T: MakeTlsConnect<Over> + Clone + Send + Sync + 'static,
        T::Stream: Send,
        T::TlsConnect: Send,
        <T::TlsConnect as TlsConnect<Over>>::Future: Send,
    {
        Self::dialling(template, Arc::new(OverDial { connector, tls }))
    }

    fn dialling(template: Config, dial: Arc<dyn Dial>) -> Self {
        Self { template, dial, passwords: None, parts: OpenerParts::default(), worked: AtomicBool::new(false) }
    }

    /// Sets the provider that is asked for the password of each session.
    pub(crate) fn with_passwords(self, passwords: Option<Passwords>) -> Self {
        Self { passwords, ..self }
    }

    /// Like [`Self::dial`], but while no session was ever opened, it also examines whether the peer is PostgreSQL.
    async fn dial_a_server(
        &self,
        endpoint: &Endpoint,
        notices: Arc<Notices>,
    ) -> Result<(Client, Driver), ProbeFailure> {
        let dialling = self.dial(endpoint, Arc::clone(&notices));
        if self.worked.load(Ordering::Relaxed) {
            return dialling.await;
        }
        let mut dialling = pin!(dialling);
        let dialled = tokio::time::timeout(STRANGER_AFTER, dialling.as_mut()).await.ok();
        let looked_at = what_answers(endpoint, self.dial.connector());
        let (dialled, peer) = match dialled {
            // The peer is slow, or it is not PostgreSQL and waits for the rest of a request that it does not
            // understand.
            None => tokio::select! {
                dialled = dialling.as_mut() => (Some(dialled), None),
                peer = looked_at => (None, peer),
            },
            Some(Err(failure)) if failure.message.ends_with(HUNG_UP) => (Some(Err(failure)), looked_at.await),
            Some(dialled) => (Some(dialled), None),
        };
        match (dialled, peer) {
            (_, Some(Peer::Stranger(name))) => {
                Err(ProbeFailure::new(FailureKind::NotPostgres, format!("what answers there speaks {name}")))
            }
            (Some(Err(_)), Some(Peer::Postgres { offers_tls })) if self.begins_with_tls() => {
                Box::pin(self.dial_again(endpoint, notices, offers_tls)).await
            }
            (Some(dialled), _) => dialled,
            (None, _) => dialling.await,
        }
    }

    /// Returns whether a session begins with TLS immediately, without asking for it first. Servers before PostgreSQL 17
    /// do not support that, so they hang up.
    fn begins_with_tls(&self) -> bool {
        self.template.get_ssl_negotiation() == SslNegotiation::Direct
    }

    /// Tries once more to begin with TLS. The peer has hung up on that once, but has answered a request for TLS. A
    /// server that was just stopped may also hang up, but not twice.
    async fn dial_again(
        &self,
        endpoint: &Endpoint,
        notices: Arc<Notices>,
        offers_tls: bool,
    ) -> Result<(Client, Driver), ProbeFailure> {
        let mut dialled = self.dial(endpoint, notices).await;
        if let Err(failure) = &mut dialled
            && failure.message.ends_with(HUNG_UP)
        {
            failure.kind = FailureKind::Refused;
            failure.message = String::from(if offers_tls { NO_DIRECT_TLS } else { NO_TLS });
        }
        dialled
    }

    /// Dials a server. A connector is user code: its panic costs only this one session.
    async fn dial_guarded(
        &self,
        endpoint: &Endpoint,
        notices: &Arc<Notices>,
    ) -> Result<(Client, Driver), ProbeFailure> {
        let dialling = AssertUnwindSafe(self.dial_a_server(endpoint, Arc::clone(notices))).catch_unwind();
        let dialled = dialling.await.unwrap_or_else(|panic| Err(panicked(self.user_code(), &*panic)))?;
        self.worked.store(true, Ordering::Relaxed);
        Ok(dialled)
    }

    /// How an error names the code that has panicked. Opening a session runs the driver and the connectors, and the
    /// driver does not panic.
    fn user_code(&self) -> &'static str {
        if self.dial.connector().is_some() { "the connector" } else { "the TLS connector" }
    }

    async fn dial(&self, endpoint: &Endpoint, notices: Arc<Notices>) -> Result<(Client, Driver), ProbeFailure> {
        let Some(passwords) = &self.passwords else {
            let dialling = self.dial.dial(endpoint, self.config_for(endpoint), notices);
            return dialling.await.map_err(|error| self.not_opened(error));
        };
        // Boxed, so that a pool without a provider does not carry the size of this future.
        let dialling = async {
            let password = passwords.next().await?;
            let mut config = self.config_for(endpoint);
            config.password(password);
            match self.dial.dial(endpoint, config, notices).await {
                Ok(opened) => {
                    passwords.accepted();
                    Ok(opened)
                }
                Err(error) if not_let_in(&error) => Err(passwords.refused(self.not_opened(error))),
                Err(error) => Err(self.not_opened(error)),
            }
        };
        Box::pin(dialling).await
    }

    fn not_opened(&self, error: Error) -> ProbeFailure {
        // A server that has worked before may also hang up, because it or its machine was killed.
        let hung_up = hung_up(&error) || self.begins_with_tls() && hung_up_in_handshake(&error);
        let hung_up = hung_up && !self.worked.load(Ordering::Relaxed);
        let unnamed = not_named(&self.template, &error);
        let mut failure = failure(verdict_of_open(&error), error);
        if tls_trouble(&failure.message) == Some(TlsTrouble::Certificate(BadCertificate::WrongName)) {
            failure = failure.of_a_wrong_name();
        }
        failure.message.push_str(unnamed);
        if hung_up && failure.kind == FailureKind::Unreachable {
            failure.message.push_str(HUNG_UP);
        }
        failure
    }

    fn config_for(&self, endpoint: &Endpoint) -> Config {
        let mut config = self.template.clone();
        match &endpoint.address {
            Address::Tcp(address) => {
                // A trailing dot makes a DNS name absolute, but certificates are issued without it. Without a name, the
                // certificate must be for the address.
                match &endpoint.host {
                    Some(host) => config.host(host.trim_end_matches('.').trim_matches(['[', ']'])),
                    None => config.host(address.ip().to_string()),
                };
                config.hostaddr(address.ip()).port(address.port());
            }
            #[cfg(unix)]
            Address::Unix(folder, port) => {
                config.host_path(folder).port(*port).ssl_mode(SslMode::Disable);
            }
            // Only a wrapped pool has this candidate, and it does not use this opener.
            Address::Wrapped => {}
        }
        config
    }
}

impl Open<ClientWrapper> for Opener {
    fn parts(&self) -> &OpenerParts {
        &self.parts
    }

    fn open<'a>(
        &'a self,
        endpoint: &'a Endpoint,
        question: Question,
        scope: Scope,
    ) -> BoxFuture<'a, Opened<ClientWrapper>> {
        Box::pin(async move {
            let notices = Arc::new(Notices::default());
            let (client, driver) = self.dial_guarded(endpoint, &notices).await?;
            let (token, dial, config) = (client.cancel_token(), Arc::clone(&self.dial), self.config_for(endpoint));
            let to = endpoint.clone();
            let cancelling = cancel(move || dial.cancel(&to, config.clone(), token.clone()));
            let driving =
                drive(driver, scope.clone(), Arc::clone(&notices), Arc::clone(&self.parts.traffic), cancelling);
            let task = tokio::spawn(driving);
            let abort = Some(task.abort_handle());
            let client = Guarded::new(ClientWrapper::new(client, task));
            self.parts.ask_first(Session { client, abort, scope, notices }, endpoint, question).await
        })
    }

    fn open_owned<'a>(
        &'a self,
        endpoint: &'a Endpoint,
        question: Question,
        scope: Scope,
    ) -> BoxFuture<'a, OpenedOwned> {
        Box::pin(self.open_owned_session(endpoint, question, scope))
    }

    fn drives(&self) -> bool {
        true
    }

    fn cancel(&self, endpoint: &Endpoint, token: CancelToken) -> BoxFuture<'static, Result<(), Error>> {
        self.dial.cancel(endpoint, self.config_for(endpoint), token)
    }
}

/// Sends a cancel request, and repeats it after a moment, because a request that overtakes the statement finds the
/// session idle and has no effect. Stops at the first request that the server does not accept within two seconds.
pub(crate) async fn cancel<Fut>(request: impl Fn() -> Fut)
where
    Fut: Future<Output = Result<(), Error>>,
{
    for pause in CANCEL_AFTER {
        tokio::time::sleep(pause).await;
        match tokio::time::timeout(CANCEL_WITHIN, request()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return tracing::debug!("a cancel request failed: {}", explain(&error)),
            Err(_) => return tracing::debug!("a cancel request was not taken within {CANCEL_WITHIN:?}"),
        }
    }
}

/// Describes the error of a wrapped pool's manager that could not create a session.
pub(crate) fn not_created<E: std::error::Error + Send + Sync + 'static>(error: E) -> ProbeFailure {
    let driver = links(&error).find_map(|link| link.downcast_ref::<Error>());
    let verdict = driver.map_or(Verdict::ConnectionLost, verdict_of_open);
    let message = driver.map_or_else(|| error.to_string(), explain);
    ProbeFailure::new(kind_of(verdict), message).caused_by(Arc::new(error))
}

/// Turns a panic of user code into a failure, so that it ends only this one attempt.
pub(crate) fn panicked(whose: &str, panic: &(dyn Any + Send)) -> ProbeFailure {
    let said = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    let message = said.map_or_else(|| format!("{whose} panicked"), |said| format!("{whose} panicked: {said}"));
    ProbeFailure::new(FailureKind::Unreachable, message)
}

fn failure(verdict: Verdict, error: Error) -> ProbeFailure {
    let message = explain(&error);
    ProbeFailure::new(kind_of(verdict), message).caused_by(Arc::new(error))
}

/// What to add to a refusal of a user or a database that the configuration does not name.
fn not_named(config: &Config, error: &Error) -> &'static str {
    match (config.get_user(), config.get_dbname()) {
        (None, _) if not_let_in(error) => "; the URL names no user, so the one of this process is taken",
        (_, None) if no_such_database(error) => "; the URL names no database, so one of the user's name is taken",
        _ => "",
    }
}

fn kind_of(verdict: Verdict) -> FailureKind {
    match verdict {
        Verdict::Full => FailureKind::Full,
        Verdict::NotNow => FailureKind::NotNow,
        Verdict::Refused => FailureKind::Refused,
        Verdict::NotPostgres => FailureKind::NotPostgres,
        _ => FailureKind::Unreachable,
    }
}
