//! Opens one session to one server, asks it what it is, and drives it until its scope ends.
//!
//! Decides nothing, and knows nothing of which server is wanted: it turns bytes into a [`ServerReport`] or a
//! [`ProbeFailure`]. A session's driver task ends with the session, with its scope or with the socket, whichever is first.
//! Tests: `tests/it/errors.rs`, and every test that fails over.

mod activity;
mod end;
mod password;
mod stranger;
mod wire;
mod withheld;

pub(crate) use activity::Activity;
pub(crate) use end::End;
pub(crate) use password::{Ask, Passwords};
pub(crate) use wire::wall_clock;

use std::any::Any;
use std::fmt;
use std::future::poll_fn;
use std::ops::{Deref, DerefMut};
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use deadpool_postgres::ClientWrapper;
use futures_util::future::BoxFuture;
use futures_util::task::AtomicWaker;
use futures_util::{FutureExt, TryStreamExt};
use tokio::task::AbortHandle;
use tokio_postgres::config::SslMode;
use tokio_postgres::error::{DbError, SqlState};
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{CancelToken, Client, Config, Error, Notification, SimpleQueryMessage, Socket};
use tokio_util::sync::CancellationToken;

use withheld::Withheld;

use crate::classify::{
    Verdict, about_a_part, classify, explain, hung_up, links, not_let_in, not_offered, verdict_of_open,
};
use crate::sync::lock;
use crate::topology::{
    Address, BadReport, Endpoint, FailureKind, ProbeFailure, Question, Refused, ServerReport, Vigil, shortened,
    wait_for_promotion,
};

/// Said of what hung up before any session was ever opened.
const HUNG_UP: &str = "; it hung up first: a proxy without a server behind it, or not PostgreSQL";

/// A cancel request is a courtesy to the server; nobody waits for it longer than this.
const CANCEL_WITHIN: Duration = Duration::from_secs(2);

/// Pauses before the cancel requests for one session. Its statement is on the server long before the last of them.
const CANCEL_AFTER: [Duration; 3] = [Duration::ZERO, Duration::from_millis(50), Duration::from_millis(500)];

/// A server that has not let a first session in after so long is looked at: it may be none.
const STRANGER_AFTER: Duration = Duration::from_secs(1);

/// Of one answer so many rows are read, and so many bytes of each value: no question of this crate has a longer answer.
const MOST_ROWS: usize = 64;
const MOST_COUNTED: usize = 10_000;
const LONGEST_VALUE: usize = 64 * 1024;

/// Whose code has panicked: what opens a session is the driver and the connector, and the driver knows no panic.
const CONNECTOR: &str = "the TLS connector";

type Driver = BoxFuture<'static, Result<(), Error>>;

/// Told how a session of the pool ended, by the task that drove it: at once, whoever still holds the connection.
pub(crate) trait Seat: Send {
    /// `lost`: the server or the network ended it, and not this side.
    fn left(&self, lost: bool);
}

/// Who is told of the end of a session.
#[derive(Default)]
enum Seated {
    #[default]
    Nobody,
    Somebody(Box<dyn Seat>),
    /// It has ended.
    Left,
}

impl fmt::Debug for Seated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seated")
    }
}

/// What the server said beside its answers in one session. A notice comes before the answer that it belongs to, and the
/// driver task notes it before it hands that answer on.
#[derive(Debug, Default)]
pub(crate) struct Notices {
    already_in_transaction: AtomicBool,
    not_replicated: AtomicBool,
    /// The session is one of the pool's, whose traffic shows that the server is there.
    pooled: AtomicBool,
    /// Grows whenever something is sent or received on the session, where its driver is this crate's; 0 where it is not.
    stirs: AtomicU64,
    seated: Mutex<Seated>,
    /// Who hears the session's notifications, if anybody does.
    ear: OnceLock<Arc<dyn Ear>>,
    end: End,
    /// What is under way on the session, where its driver is this crate's.
    pub(crate) activity: Arc<Activity>,
}

/// Hears what one session is notified of. Called by its driver task: must not wait.
pub(crate) trait Ear: fmt::Debug + Send + Sync {
    /// A NOTIFY on one of the session's channels.
    fn notified(&self, notification: Notification);
    /// The session has ended: nothing will come any more.
    fn ended(&self);
}

impl Notices {
    fn note(&self, notice: &DbError) {
        tracing::debug!(code = notice.code().code(), "{}", shortened(notice.message().to_owned()));
        self.end.noticed(notice);
        if *notice.code() == SqlState::ACTIVE_SQL_TRANSACTION {
            self.already_in_transaction.store(true, Ordering::Release);
        }
        // Its message is translated and its code is that of all warnings; the routine (`syncrep.c`) is neither.
        if notice.routine() == Some("SyncRepWaitForLSN") {
            self.not_replicated.store(true, Ordering::Release);
        }
    }

    /// From now on the session's traffic counts, and `seat` is told of its end.
    pub(crate) fn pool(&self, seat: Box<dyn Seat>) {
        self.pooled.store(true, Ordering::Relaxed);
        let mut seated = lock(&self.seated);
        match *seated {
            Seated::Left => seat.left(false),
            _ => *seated = Seated::Somebody(seat),
        }
    }

    /// The session has ended; whoever says so first is right about the reason.
    fn left(&self, lost: bool) {
        let seated = std::mem::replace(&mut *lock(&self.seated), Seated::Left);
        if let Seated::Somebody(seat) = seated {
            seat.left(lost);
        }
    }

    /// `ear` hears from now on. The first stays: a session has one.
    pub(crate) fn hear(&self, ear: Arc<dyn Ear>) {
        let _ = self.ear.set(ear);
    }

    /// What was said before is of no interest to what comes now.
    pub(crate) fn forget(&self) {
        self.already_in_transaction.store(false, Ordering::Release);
        self.not_replicated.store(false, Ordering::Release);
    }

    /// Another number than before, if something was sent or received meanwhile on this session.
    pub(crate) fn stirs(&self) -> u64 {
        self.stirs.load(Ordering::Relaxed)
    }

    /// Is it seen what the session sends and receives?
    pub(crate) fn are_driven(&self) -> bool {
        self.stirs() > 0
    }

    /// What the server said when it ended the session.
    pub(crate) fn end(&self) -> &End {
        &self.end
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
    fn dial(&self, config: Config, notices: Arc<Notices>) -> BoxFuture<'static, Result<(Client, Driver), Error>>;
    fn cancel(&self, config: Config, token: CancelToken) -> BoxFuture<'static, Result<(), Error>>;
}

struct Tls<T>(T);

impl<T> Dial for Tls<T>
where
    T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
    T::Stream: Send,
    T::TlsConnect: Send,
    <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
    fn dial(&self, config: Config, notices: Arc<Notices>) -> BoxFuture<'static, Result<(Client, Driver), Error>> {
        Box::pin(wire::connect(config, self.0.clone(), notices))
    }

    fn cancel(&self, config: Config, token: CancelToken) -> BoxFuture<'static, Result<(), Error>> {
        Box::pin(wire::cancel(config, self.0.clone(), token))
    }
}

/// A session's client, whoever opened it: deadpool-postgres' `ClientWrapper`, or what the manager of another deadpool pool
/// makes. Implemented for everything that derefs to a [`tokio_postgres::Client`].
pub trait SessionClient: DerefMut<Target = Client> + Send + Sync + 'static {}

impl<C: DerefMut<Target = Client> + Send + Sync + 'static> SessionClient for C {}

/// Opens sessions, and asks what is at the other end. Cancel-safe: dropping a future closes the session that it opens.
pub(crate) trait Open<C>: Send + Sync {
    /// Opens a session, and asks this on it.
    fn open<'a>(
        &'a self,
        endpoint: &'a Endpoint,
        question: Question,
        scope: CancellationToken,
    ) -> BoxFuture<'a, Opened<C>>;

    /// Asks a session that was opened earlier what its server is, at the end of the vigil if there is one: one round trip.
    fn ask<'a>(
        &'a self,
        address: &'a Address,
        client: &'a Client,
        vigil: Option<Vigil>,
    ) -> BoxFuture<'a, Result<ServerReport, ProbeFailure>>;

    /// Another number than before, if something was sent or received meanwhile on any session of the pool.
    fn stirs(&self) -> u64;

    /// Are the pool's sessions driven here, so that the end of each is noticed at once?
    fn drives(&self) -> bool;

    /// Asks the server at `endpoint`, once, to stop what the session of `token` runs.
    fn cancel(&self, endpoint: &Endpoint, token: CancelToken) -> BoxFuture<'static, Result<(), Error>>;
}

pub(crate) type Opened<C> = Result<(Session<C>, ServerReport), ProbeFailure>;

/// How this crate opens sessions: everything of the configuration but the address.
pub(crate) struct Opener {
    template: Config,
    dial: Arc<dyn Dial>,
    /// Where the template holds no password because each session has its own.
    passwords: Option<Passwords>,
    /// Grows whenever something is sent or received on any session of the pool.
    stirs: Arc<AtomicU64>,
    questions: Questions,
    /// A session was opened once: what answers here is PostgreSQL.
    worked: AtomicBool,
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
        Self {
            template,
            dial: Arc::new(Tls(tls)),
            passwords: None,
            stirs: Arc::default(),
            questions: Questions::default(),
            worked: AtomicBool::new(false),
        }
    }

    /// Asks for the password of each session.
    pub(crate) fn with_passwords(self, passwords: Option<Passwords>) -> Self {
        Self { passwords, ..self }
    }

    /// As [`Self::dial`]; and where no session was ever opened, looks whether it is a server at all.
    async fn dial_a_server(
        &self,
        endpoint: &Endpoint,
        notices: Arc<Notices>,
    ) -> Result<(Client, Driver), ProbeFailure> {
        let dialling = self.dial(endpoint, notices);
        if self.worked.load(Ordering::Relaxed) {
            return dialling.await;
        }
        let mut dialling = pin!(dialling);
        let dialled = tokio::time::timeout(STRANGER_AFTER, dialling.as_mut()).await.ok();
        let looked_at = stranger::what_answers(&endpoint.address);
        let (dialled, name) = match dialled {
            // It answers slowly, or waits for more of what it does not understand.
            None => tokio::select! {
                dialled = dialling.as_mut() => (Some(dialled), None),
                name = looked_at => (None, name),
            },
            Some(Err(failure)) if failure.message.ends_with(HUNG_UP) => (Some(Err(failure)), looked_at.await),
            Some(dialled) => (Some(dialled), None),
        };
        if let Some(name) = name {
            return Err(ProbeFailure::new(FailureKind::NotPostgres, format!("what answers there speaks {name}")));
        }
        match dialled {
            Some(dialled) => dialled,
            None => dialling.await,
        }
    }

    async fn dial(&self, endpoint: &Endpoint, notices: Arc<Notices>) -> Result<(Client, Driver), ProbeFailure> {
        let Some(passwords) = &self.passwords else {
            return self.dial.dial(self.config_for(endpoint), notices).await.map_err(|error| self.not_opened(error));
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
                Err(error) if not_let_in(&error) => Err(passwords.refused(self.not_opened(error)).await),
                Err(error) => Err(self.not_opened(error)),
            }
        };
        Box::pin(dialling).await
    }

    fn not_opened(&self, error: Error) -> ProbeFailure {
        // A server that has worked may hang up, too: it was killed, or its machine.
        let hung_up = hung_up(&error) && !self.worked.load(Ordering::Relaxed);
        let mut failure = failure(verdict_of_open(&error), error);
        if hung_up && failure.kind == FailureKind::Unreachable {
            failure.message.push_str(HUNG_UP);
        }
        failure
    }

    fn config_for(&self, endpoint: &Endpoint) -> Config {
        let mut config = self.template.clone();
        match &endpoint.address {
            Address::Tcp(address) => {
                // A trailing dot makes a DNS name absolute; certificates are issued without it. Without any name, they are for
                // the address.
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
            // No candidate of a pool that connects by itself.
            Address::Wrapped => {}
        }
        config
    }
}

impl Open<ClientWrapper> for Opener {
    fn open<'a>(
        &'a self,
        endpoint: &'a Endpoint,
        question: Question,
        scope: CancellationToken,
    ) -> BoxFuture<'a, Opened<ClientWrapper>> {
        Box::pin(async move {
            let notices = Arc::new(Notices::default());
            // The TLS connector is the user's: a panic in it costs this one session.
            let dialling = AssertUnwindSafe(self.dial_a_server(endpoint, Arc::clone(&notices))).catch_unwind();
            let (client, driver) = dialling.await.unwrap_or_else(|panic| Err(panicked(CONNECTOR, &*panic)))?;
            self.worked.store(true, Ordering::Relaxed);
            let (token, dial, config) = (client.cancel_token(), Arc::clone(&self.dial), self.config_for(endpoint));
            let cancelling = cancel(move || dial.cancel(config.clone(), token.clone()));
            let driving = drive(driver, scope.clone(), Arc::clone(&notices), Arc::clone(&self.stirs), cancelling);
            let task = tokio::spawn(driving);
            let abort = Some(task.abort_handle());
            let client = Guarded::new(ClientWrapper::new(client, task));
            let session = Session { client, abort, scope, notices };
            let report = self.questions.ask(&endpoint.address, &session.client, question).await?;
            Ok((session, report))
        })
    }

    fn ask<'a>(
        &'a self,
        address: &'a Address,
        client: &'a Client,
        vigil: Option<Vigil>,
    ) -> BoxFuture<'a, Result<ServerReport, ProbeFailure>> {
        Box::pin(self.questions.ask_after(vigil, address, client))
    }

    fn stirs(&self) -> u64 {
        self.stirs.load(Ordering::Relaxed)
    }

    fn drives(&self) -> bool {
        true
    }

    fn cancel(&self, endpoint: &Endpoint, token: CancelToken) -> BoxFuture<'static, Result<(), Error>> {
        self.dial.cancel(self.config_for(endpoint), token)
    }
}

/// Sends a cancel request, and again after a moment, as one that overtakes the statement finds the session idle and is
/// lost. Ends with the first that is not taken within two seconds.
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

/// Asks servers what they are.
#[derive(Default)]
pub(crate) struct Questions {
    /// What servers do not let this role read.
    parts: Withheld<Refused>,
    /// Servers that did not let this role wait for a promotion.
    vigil: Withheld<()>,
}

impl Questions {
    /// One round trip, unless something of the question is refused: then that is looked for, and left out for a while.
    pub(crate) async fn ask(
        &self,
        address: &Address,
        client: &Client,
        question: Question,
    ) -> Result<ServerReport, ProbeFailure> {
        let known = self.parts.of(address).unwrap_or_default();
        let mut refused = known;
        for last in [false, false, true] {
            let error = match rows(client, &question.sql(refused)).await {
                Err(error) if about_a_part(&error) => error,
                answer => {
                    let report = read(question, refused, answer);
                    match &report {
                        Ok(_) if refused != known => self.parts.note(address, refused, Refused::and),
                        // What was left out may be what is missing: the whole question is asked next.
                        Err(_) => self.parts.forget(address),
                        Ok(_) => {}
                    }
                    return report;
                }
            };
            tracing::debug!("a part of the question is refused: {}", explain(&error));
            refused = refused.and(withheld::look_for(client, question, refused).await);
            if last {
                // What can be had without any right. Not remembered, as nobody knows what else is in the way.
                refused = refused.and(Refused::ALL);
            }
        }
        read(question, refused, rows(client, &question.sql(refused)).await)
    }

    /// On a session that was opened earlier. The question is sent together with the vigil, and in a transaction of its own:
    /// one that began on a standby stays read-only. Where the server refuses to wait, by its rights or by a
    /// `statement_timeout`, it is answered at once.
    pub(crate) async fn ask_after(
        &self,
        vigil: Option<Vigil>,
        address: &Address,
        client: &Client,
    ) -> Result<ServerReport, ProbeFailure> {
        let waiting = async {
            let Some(vigil) = vigil.filter(|_| self.vigil.of(address).is_none()) else { return };
            let Err(error) = rows(client, &wait_for_promotion(vigil)).await else { return };
            tracing::debug!("the server does not wait for its promotion: {}", explain(&error));
            if not_offered(&error) || error.code() == Some(&SqlState::QUERY_CANCELED) {
                self.vigil.note(address, (), |(), ()| ());
            }
        };
        let ((), report) = tokio::join!(biased; waiting, self.ask(address, client, Question::Again));
        report
    }
}

/// One open session. Dropping it closes the socket.
pub(crate) struct Session<C = ClientWrapper> {
    pub(crate) client: Guarded<C>,
    /// Ends the driver from outside, although somebody still holds the client; where the driver is this crate's.
    pub(crate) abort: Option<AbortHandle>,
    /// All sessions of this scope end with it, where their drivers are this crate's.
    pub(crate) scope: CancellationToken,
    pub(crate) notices: Arc<Notices>,
}

type Farewell<C> = Box<dyn FnOnce(&mut C) + Send + Sync>;

/// A client, and what is to be done when it is dropped.
pub(crate) struct Guarded<C> {
    client: C,
    farewell: Option<Farewell<C>>,
}

impl<C> Guarded<C> {
    fn new(client: C) -> Self {
        Self { client, farewell: None }
    }

    pub(crate) fn with_farewell(client: C, farewell: impl FnOnce(&mut C) + Send + Sync + 'static) -> Self {
        Self { client, farewell: Some(Box::new(farewell)) }
    }
}

impl<C> Drop for Guarded<C> {
    fn drop(&mut self) {
        if let Some(farewell) = self.farewell.take() {
            // Somebody else's code, and this may run in the task of the cluster.
            let _ = std::panic::catch_unwind(AssertUnwindSafe(|| farewell(&mut self.client)));
        }
    }
}

impl<C> Deref for Guarded<C> {
    type Target = C;

    fn deref(&self) -> &C {
        &self.client
    }
}

impl<C> DerefMut for Guarded<C> {
    fn deref_mut(&mut self) -> &mut C {
        &mut self.client
    }
}

/// However a driver ends, also by being aborted.
struct AtTheEnd(Arc<Notices>);

impl Drop for AtTheEnd {
    fn drop(&mut self) {
        self.0.end.over();
        self.0.left(false);
        self.0.activity.end();
        if let Some(ear) = self.0.ear.get() {
            ear.ended();
        }
    }
}

/// `cancelling` is spawned where the session turns out to be busy although it was given back.
async fn drive(
    mut driver: Driver,
    scope: CancellationToken,
    notices: Arc<Notices>,
    stirs: Arc<AtomicU64>,
    cancelling: impl Future<Output = ()> + Send + 'static,
) {
    let at_the_end = AtTheEnd(Arc::clone(&notices));
    notices.end.driven();
    let activity = &notices.activity;
    let bell = Arc::new(Bell { rung: AtomicBool::new(true), driver: AtomicWaker::new() });
    let waker = Waker::from(Arc::clone(&bell));
    let counted = Waker::from(Arc::new(Counted { activity: Arc::clone(activity), bell: Arc::clone(&bell) }));
    let mut left = pin!(scope.cancelled());
    let mut busy = false;
    // But for the bell, the driver is woken by what is to be sent and by what was received, and by nothing else.
    let ended = poll_fn(|context| {
        bell.driver.register(context.waker());
        if bell.rung.swap(false, Ordering::AcqRel) && left.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
            return Poll::Ready(Ok(()));
        }
        notices.stirs.fetch_add(1, Ordering::Relaxed);
        if notices.pooled.load(Ordering::Relaxed) {
            stirs.fetch_add(1, Ordering::Relaxed);
        }
        let woken = activity.before_poll();
        let polled = driver.as_mut().poll(&mut Context::from_waker(&counted));
        busy = activity.polled(woken) && polled.is_pending();
        if busy { Poll::Ready(Ok(())) } else { polled }
    });
    if let Err(error) = ended.await {
        tracing::debug!("a session ended: {}", explain(&error));
        at_the_end.0.end.ended_with(&error);
        at_the_end.0.left(true);
    }
    if busy {
        tracing::debug!("a connection was given back with something under way: cancelled and closed");
        tokio::spawn(cancelling);
    }
}

/// Counts what wakes the driver: a request that was made, or something that was received.
struct Counted {
    activity: Arc<Activity>,
    bell: Arc<Bell>,
}

impl Wake for Counted {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.activity.wake();
        self.bell.driver.wake();
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

/// The rows of the answer, as far as anybody reads them. A value that is no text is not the same as NULL, which says that
/// something is not told.
pub(crate) async fn rows(client: &Client, sql: &str) -> Result<Vec<Vec<Option<String>>>, Error> {
    let mut messages = pin!(client.simple_query_raw(sql).await?);
    let mut rows = Vec::new();
    while let Some(message) = messages.try_next().await? {
        // What follows is dropped as it comes.
        let SimpleQueryMessage::Row(row) = message else {
            continue;
        };
        if rows.len() >= MOST_ROWS {
            // Counted, as far as that is cheap, and not kept.
            if rows.len() < MOST_COUNTED {
                rows.push(Vec::new());
            }
        } else {
            let value = |index| row.try_get(index).map_or_else(|_| Some('\u{FFFD}'.to_string()), text);
            rows.push((0..row.len().min(MOST_ROWS)).map(value).collect());
        }
    }
    Ok(rows)
}

fn text(value: Option<&str>) -> Option<String> {
    value.map(|text| text.get(..LONGEST_VALUE).unwrap_or(text).to_owned())
}

fn read(
    question: Question,
    refused: Refused,
    answer: Result<Vec<Vec<Option<String>>>, Error>,
) -> Result<ServerReport, ProbeFailure> {
    let nonsense =
        |bad: BadReport| ProbeFailure::new(FailureKind::NotPostgres, bad.to_string()).caused_by(Arc::new(bad));
    question.read(refused, &answer.map_err(no_report)?).map_err(nonsense)
}

/// A question on an open session brought an error.
fn no_report(error: Error) -> ProbeFailure {
    let spoke = error.as_db_error().is_some();
    match classify(&error) {
        // The session goes on, and with it the server.
        verdict @ (Verdict::Application | Verdict::Aborted | Verdict::Conflict | Verdict::ReadOnly) if spoke => {
            let mut failure = failure(verdict, error);
            failure.kind = FailureKind::Errored;
            failure
        }
        verdict => failure(verdict, error),
    }
}

/// The manager of a wrapped pool could not make a session.
pub(crate) fn not_created<E: std::error::Error + Send + Sync + 'static>(error: E) -> ProbeFailure {
    let driver = links(&error).find_map(|link| link.downcast_ref::<Error>());
    let verdict = driver.map_or(Verdict::ConnectionLost, verdict_of_open);
    let message = driver.map_or_else(|| error.to_string(), explain);
    ProbeFailure::new(kind_of(verdict), message).caused_by(Arc::new(error))
}

/// Code that a program plugged in has panicked: that is the end of one try, and of nothing else.
pub(crate) fn panicked(whose: &str, panic: &(dyn Any + Send)) -> ProbeFailure {
    let said = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    let message = said.map_or_else(|| format!("{whose} panicked"), |said| format!("{whose} panicked: {said}"));
    ProbeFailure::new(FailureKind::Unreachable, message)
}

fn failure(verdict: Verdict, error: Error) -> ProbeFailure {
    let message = explain(&error);
    ProbeFailure::new(kind_of(verdict), message).caused_by(Arc::new(error))
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
