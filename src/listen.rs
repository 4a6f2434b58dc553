//! A LISTEN that survives failovers, and tells its reader when notifications may have been missed.
//!
//! [`Pool::listen`] begins a subscription.

// `listen/backlog.rs` decides what a reader gets, in which order, and what is dropped when the reader is slow. One task
// per listener keeps a session of its own to the verified primary, and subscribes again when that session ends.
//
// Invariants: the reader gets every notification that comes after the gap mark of a new subscription. A dropped
// listener leaves neither a task nor a session. Tests: `tests/it/sessions/listen.rs`.

mod backlog;

use std::fmt;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use std::time::Duration;

use deadpool_postgres::ClientWrapper;
use futures_util::Stream;
use futures_util::future::{FutureExt, poll_fn};
use futures_util::task::AtomicWaker;
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Notification;
use tokio_util::sync::CancellationToken;

use crate::classify::{Verdict, classify, explain, not_offered};
use crate::error::{Error, UnavailableReason};
use crate::pool::{Pool, SideSession};
use crate::retry::Exponential;
use crate::server::{NotificationSink, rows};
use crate::sync::{lock, log_safely};
use crate::topology::{Suspicion, UNDISTURBED};
use backlog::{Backlog, BacklogEntry};

/// The shortest and the longest pause between two tries to subscribe. A missing primary causes no such pause, because
/// the search for it has pauses of its own.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(5));
/// The SQL by which an idle session checks that it is alive and still subscribed. It also keeps proxies from closing
/// the session as idle.
fn check() -> String {
    format!("{UNDISTURBED} SELECT pg_listening_channels() ORDER BY 1")
}

/// The SQL that checks only whether the session is alive. It serves roles that may not call the function in [`check`].
fn check_alive() -> String {
    format!("{UNDISTURBED} SHOW transaction_read_only")
}

/// The channels that the session is subscribed to, or `None` if the server does not let this role ask.
async fn subscribed_to(client: &tokio_postgres::Client) -> Result<Option<Channels>, tokio_postgres::Error> {
    match rows(client, &check()).await {
        Err(error) if not_offered(&error) => rows(client, &check_alive()).await.map(|_| None),
        answer => answer.map(Some),
    }
}

type Channels = Vec<Vec<Option<String>>>;

/// Switches off the time limit for idle sessions. A session that listens is idle most of the time, so the
/// `idle_session_timeout` of a role (PostgreSQL 14 and later) would end it again and again. It is a statement of its
/// own, so that the subscription is in force even if the server refuses this statement.
const STAY: &str = "SELECT pg_catalog.set_config('idle_session_timeout', '0', false) \
                     WHERE pg_catalog.current_setting('idle_session_timeout', true) IS NOT NULL";
/// How many heartbeats lie between two checks of the subscription.
const CHECK_EVERY: u32 = 10;
/// How long to wait for the answer to a subscription or a check.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

impl Pool {
    /// Subscribes to these channels on a separate session to the verified primary, and again after each failover.
    ///
    /// This returns when the subscription is in force. It waits for that no longer than the checkout timeout, or the
    /// time limit for opening a session ([`probe_timeout`](crate::PoolBuilder::probe_timeout)) if that is longer. The
    /// listener receives all notifications from then on. Channel names are taken as they are, including upper case and
    /// special characters. `NOTIFY Orders` folds its name to lower case, so it arrives on the channel `orders`. The
    /// server cuts a longer name off after 63 bytes, and notifications carry the short one.
    ///
    /// PostgreSQL keeps no notifications for a session that has ended. When the session is lost, by a failover or
    /// otherwise, the listener subscribes again by itself and returns [`Message::MayHaveGap`]. At that point, read
    /// again the state that the notifications are about. The pool notices a primary that died silently, and the session
    /// ends as soon as a successor is proved, or after `dead_after`. Every tenth heartbeat (10 s) the listener asks the
    /// server whether the session is still subscribed. This also keeps it alive behind proxies that close idle
    /// sessions.
    ///
    /// The session does not count towards `max_size`, and [`Pool::status`] does not show it. Dropping the [`Listener`]
    /// closes it. A listener keeps the pool alive, like a [`Client`](crate::Client).
    ///
    /// It does not work through a pooler in transaction mode (`PgBouncer`'s `pool_mode=transaction`), because the
    /// session that listens does not stay with one client there. Connect directly to the server in that case.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if there was no primary in time, and earlier if nobody knows the host's name.
    /// [`Error::Refused`] if the credentials are wrong. [`Error::Database`] if the server does not accept the name of a
    /// channel (an empty one). [`Error::Wrapped`] if the pool is a [wrapped](Pool::wrap) one.
    ///
    /// # Cancel safety
    /// A dropped future leaves nothing behind.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_postgres_failover::listen::Message;
    ///
    /// let mut listener = pool.listen(["orders", "prices"]).await?;
    /// // Subscribe first and read the state after that, so that a change in between is notified.
    /// while let Some(message) = listener.recv().await {
    ///     match message {
    ///         Ok(Message::Notification(it)) => println!("{}: {}", it.channel(), it.payload()),
    ///         Ok(Message::MayHaveGap) => println!("read all orders and prices anew"),
    ///         Err(error) => eprintln!("still not subscribed: {error}"),
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn listen<I>(&self, channels: I) -> Result<Listener, Error>
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        let within = self.beside_within()?;
        let sql = subscription(channels);
        let inbox = Arc::new(Inbox::default());
        let began = Instant::now();
        let (pool, text, into) = (self.clone(), sql.clone(), Arc::clone(&inbox));
        // The session and the task belong to the runtime of the pool, because the caller's runtime may end earlier.
        let mut subscribing = JoinSet::new();
        subscribing.spawn_on(async move { subscribe(&pool, &text, &into).await }, self.runtime());
        let joining = async {
            let joined = timeout(within, subscribing.join_next()).await.map_err(|_| self.unavailable_beside(began))?;
            joined.ok_or(Error::RuntimeEnded).and_then(or_panic)?
        };
        let first = self.unless_closing(joining).await?;
        let keeping = self.runtime().spawn(keep(self.clone(), sql, first, InboxGuard(Arc::clone(&inbox))));
        Ok(Listener { inbox, task: keeping.abort_handle() })
    }
}

/// What a task has returned. A panic in it, which is that of code that the program plugs in, goes on here.
fn or_panic<T>(joined: Result<T, JoinError>) -> Result<T, Error> {
    joined.map_err(|error| match error.try_into_panic() {
        Ok(panic) => resume_unwind(panic),
        Err(_) => Error::RuntimeEnded,
    })
}

/// One `LISTEN` for each channel. The names are quoted, and quotes within are doubled, so that each name is taken as it
/// is.
fn subscription<I>(channels: I) -> String
where
    I: IntoIterator,
    I::Item: AsRef<str>,
{
    channels.into_iter().fold(String::new(), |sql, channel| {
        let name = channel.as_ref().replace('"', "\"\"");
        sql + "LISTEN \"" + &name + "\";"
    })
}

/// What a [`Listener`] receives. There will be no third variant, so that every `match` handles the gap.
#[derive(Clone, Debug)]
pub enum Message {
    /// A NOTIFY, with its channel, its payload and the process id of the session that sent it.
    Notification(Notification),
    /// Notifications may be missing here, because the session was lost and replaced or because the reader was too slow.
    /// The subscription is in force again. If you read the state now, every later change of it is notified.
    MayHaveGap,
}

/// Notifications of some channels, across failovers, from [`Pool::listen`].
///
/// Read it with [`Listener::recv`] or as a [`Stream`]. It ends with `None` when the pool is closed. If the runtime of
/// the pool has ended, [`Error::RuntimeEnded`] comes before that.
///
/// Any other `Err` does not end it. Such an error says that there has been no subscription for the checkout timeout, or
/// that the servers refuse one, and it gives the reason. It is repeated as long as that lasts. The listener goes on
/// trying, and returns [`Message::MayHaveGap`] when it succeeds. Drop the listener on an error if you have no use for
/// late notifications.
///
/// Up to 1,024 notifications wait for a reader. If the reader is slower, the newer ones are dropped, and one
/// [`Message::MayHaveGap`] takes their place. So a reader that has stopped costs no more memory, and holds up neither
/// the server nor the pool.
#[must_use = "a listener that is dropped has ended its subscription"]
pub struct Listener {
    inbox: Arc<Inbox>,
    task: AbortHandle,
}

impl Listener {
    /// The next message, or `None` when the pool is closed and everything was read. Cancel-safe: nothing is lost.
    ///
    /// It waits without a limit, because nobody knows when the next NOTIFY comes. But if there is no subscription, it
    /// returns an `Err` after the checkout timeout.
    pub async fn recv(&mut self) -> Option<Result<Message, Error>> {
        poll_fn(|cx| self.inbox.poll(cx)).await
    }
}

impl Stream for Listener {
    type Item = Result<Message, Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.inbox.poll(cx)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener").field("waiting", &self.inbox.backlog().queue.len()).finish_non_exhaustive()
    }
}

/// A session that is subscribed.
struct Subscribed {
    side_session: SideSession<ClientWrapper>,
    ended: CancellationToken,
    channels: Option<Channels>,
}

impl Subscribed {
    /// Returns why the subscription is not in force any more.
    async fn lost(&mut self, pause: Duration) -> String {
        if planted!("does not notice a lost subscription") {
            std::future::pending::<()>().await;
        }
        while timeout(pause, self.ended.cancelled()).await.is_err() {
            match self.checked().await {
                Some(Ok(None)) => {}
                Some(Ok(channels)) if self.channels.is_none() || channels == self.channels => self.channels = channels,
                Some(Ok(_)) => {
                    return "the server forgot it; LISTEN does not work through a pooler in transaction mode".into();
                }
                Some(Err(error)) => return explain(&error),
                None => return format!("no answer within {ANSWER_WITHIN:?}"),
            }
        }
        "its session ended".into()
    }

    /// Asks what the session is subscribed to. `None`: it was silent for too long. Before it answers, the server sends
    /// all notifications of the last transaction. As long as those arrive, the session is not silent.
    async fn checked(&self) -> Option<Result<Option<Channels>, tokio_postgres::Error>> {
        let mut asking = pin!(subscribed_to(self.side_session.client()));
        loop {
            let received = self.side_session.notices().traffic();
            if let Ok(answer) = timeout(ANSWER_WITHIN, asking.as_mut()).await {
                return Some(answer);
            }
            if self.side_session.notices().traffic() == received {
                return None;
            }
        }
    }
}

/// Keeps the subscription in force until the pool is closed or the task ends.
async fn keep(pool: Pool, sql: String, first: Subscribed, keeping: InboxGuard) {
    let inbox = &keeping.0;
    let mut subscribed = Some(first);
    loop {
        // This calls the program's log, which may panic. A panic costs only one step.
        match AssertUnwindSafe(keep_once(&pool, &sql, inbox, &mut subscribed)).catch_unwind().await {
            Ok(Ok(())) => {}
            Ok(Err(Error::Closed)) => return inbox.close(),
            Ok(Err(ended)) => return inbox.end(ended),
            Err(_) => sleep(PAUSE.0).await,
        }
    }
}

/// Waits until the subscription is lost, and subscribes again. It fails if the pool has ended.
async fn keep_once(
    pool: &Pool,
    sql: &str,
    inbox: &Arc<Inbox>,
    subscribed: &mut Option<Subscribed>,
) -> Result<(), Error> {
    if let Some(lost) = subscribed {
        let why = lost.lost(pool.heartbeat().saturating_mul(CHECK_EVERY)).await;
        let generation = lost.side_session.generation();
        *subscribed = None;
        pool.suspect(generation, Suspicion::Connection);
        tracing::debug!(generation = generation.get(), why, "a subscription was lost");
    }
    let next = again(pool, sql, inbox).await?;
    let generation = next.side_session.generation();
    *subscribed = Some(next);
    if !planted!("marks no gap") {
        inbox.update(Backlog::subscribed);
    }
    tracing::debug!(generation = generation.get(), "subscribed again");
    Ok(())
}

/// Ends the inbox when the task ends, so that its reader does not wait forever. The task may end with its runtime
/// before it has ever run.
struct InboxGuard(Arc<Inbox>);

impl Drop for InboxGuard {
    fn drop(&mut self) {
        self.0.end(Error::RuntimeEnded);
    }
}

/// Subscribes again, without a time limit. Fails if the pool has ended. The reader is told each time that a checkout
/// timeout has passed. The attempt that is under way goes on, because a log-in may take longer than that.
async fn again(pool: &Pool, sql: &str, inbox: &Arc<Inbox>) -> Result<Subscribed, Error> {
    let mut pauses = Exponential::new(PAUSE.0, 2.0, PAUSE.1).jitter(pool.next_seed());
    let began = Instant::now();
    loop {
        let mut subscribing = pin!(subscribe(pool, sql, inbox));
        let error = loop {
            match timeout(pool.checkout_timeout(), subscribing.as_mut()).await {
                Ok(Ok(subscribed)) => return Ok(subscribed),
                Ok(Err(ended @ (Error::Closed | Error::RuntimeEnded))) => return Err(ended),
                Ok(Err(error)) => break error,
                Err(_) => inbox.update(|backlog| backlog.trouble = Some(pool.unavailable_beside(began))),
            }
        };
        inbox.update(|backlog| backlog.trouble = Some(error));
        // The next try says why the pool has ended.
        let _ = timeout(pauses.next().unwrap_or(PAUSE.1), pool.closing().cancelled()).await;
    }
}

/// Tries until a session is subscribed, or until an error shows that a failover is not the reason.
async fn subscribe(pool: &Pool, sql: &str, inbox: &Arc<Inbox>) -> Result<Subscribed, Error> {
    let mut pauses = Exponential::new(PAUSE.0, 2.0, PAUSE.1).jitter(pool.next_seed());
    loop {
        let side_session = match pool.side_session().await {
            Ok(side_session) => side_session,
            // A session to the primary could not be opened, and `side_session` has paused already.
            Err(Error::Unavailable(none)) if none.reason() == UnavailableReason::NoSession => continue,
            // Waiting for a primary does not help.
            Err(error) => return Err(error),
        };
        let ended = CancellationToken::new();
        side_session.deliver_to(Arc::new(InboxSink { inbox: Arc::clone(inbox), ended: ended.clone() }));
        let subscribing = async {
            let (_, listening) =
                tokio::join!(biased; rows(side_session.client(), STAY), side_session.client().batch_execute(sql));
            listening?;
            subscribed_to(side_session.client()).await
        };
        match timeout(ANSWER_WITHIN, subscribing).await {
            // The server forgot the subscription at once, so a listener on this session would receive nothing.
            Ok(Ok(Some(channels))) if channels.is_empty() && !sql.is_empty() => {
                log_safely(|| {
                    tracing::warn!("LISTEN had no effect: it does not work through a pooler in transaction mode");
                });
            }
            Ok(Ok(channels)) => return Ok(Subscribed { side_session, ended, channels }),
            // The server is well but refuses the statement, for example because of the name of a channel.
            Ok(Err(error)) if matches!(classify(&error), Verdict::Application | Verdict::NotPostgres) => {
                return Err(error.into());
            }
            _ => pool.suspect(side_session.generation(), Suspicion::Connection),
        }
        let _ = timeout(pauses.next().unwrap_or(PAUSE.1), pool.closing().cancelled()).await;
    }
}

/// Receives the notifications of one session, and notes its end.
#[derive(Debug)]
struct InboxSink {
    inbox: Arc<Inbox>,
    ended: CancellationToken,
}

impl NotificationSink for InboxSink {
    fn notified(&self, notification: Notification) {
        self.inbox.update(|backlog| backlog.push(notification));
    }

    fn ended(&self) {
        self.ended.cancel();
    }
}

/// The task and the sessions put messages in, and the reader takes them out.
#[derive(Debug, Default)]
struct Inbox {
    backlog: Mutex<Backlog<Notification>>,
    reader: AtomicWaker,
}

impl Inbox {
    fn backlog(&self) -> MutexGuard<'_, Backlog<Notification>> {
        lock(&self.backlog)
    }

    fn update(&self, change: impl FnOnce(&mut Backlog<Notification>)) {
        change(&mut self.backlog());
        self.reader.wake();
    }

    fn close(&self) {
        self.update(|backlog| backlog.closed = true);
    }

    /// Ends with this error, unless it has ended already.
    fn end(&self, error: Error) {
        self.update(|backlog| {
            if !backlog.closed {
                backlog.closed = true;
                backlog.trouble = Some(error);
            }
        });
    }

    fn poll(&self, cx: &Context<'_>) -> Poll<Option<Result<Message, Error>>> {
        // The waker is registered first, so that a message in between is either seen below or wakes the reader.
        self.reader.register(cx.waker());
        let next = self.backlog().next();
        next.map(|item| match item {
            Some(Ok(BacklogEntry::Told(notification))) => Some(Ok(Message::Notification(notification))),
            Some(Ok(BacklogEntry::Gap)) => Some(Ok(Message::MayHaveGap)),
            Some(Err(error)) => Some(Err(error)),
            None => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_of_the_task_goes_on_in_its_caller() {
        let joined: Result<(), _> = tokio::spawn(async { panic!("a bug in the log") }).await;
        let panic = std::panic::catch_unwind(AssertUnwindSafe(|| or_panic(joined))).unwrap_err();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"a bug in the log"));
        let task = tokio::spawn(std::future::pending::<()>());
        task.abort();
        assert!(matches!(or_panic(task.await), Err(Error::RuntimeEnded)));
    }

    #[test]
    fn channels_are_taken_as_they_are() {
        assert_eq!(
            subscription(["a", "Für Elise", "x\"; DROP TABLE t; --"]),
            concat!("LISTEN \"a\";", "LISTEN \"Für Elise\";", "LISTEN \"x\"\"; DROP TABLE t; --\";",)
        );
        assert_eq!(subscription::<[&str; 0]>([]), "");
    }
}
