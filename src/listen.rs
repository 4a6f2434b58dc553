//! LISTEN that survives failovers, and says so when notifications may have been missed.
//!
//! Decides what a reader gets, in which order, and what is dropped when it is slow: [`Backlog`], which is pure. One task
//! per listener keeps a session of its own to the verified primary and subscribes again when it ends. Invariants: after
//! the gap mark of a new subscription nothing is missing that was notified later; a backlog never grows beyond its
//! capacity; a dropped listener leaves neither task nor session. Tests: at the end of this file, `tests/it/listen.rs`.

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use std::time::Duration;

use deadpool_postgres::ClientWrapper;
use futures_util::Stream;
use futures_util::future::poll_fn;
use futures_util::task::AtomicWaker;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Notification;
use tokio_util::sync::CancellationToken;

use crate::classify::{Verdict, classify, explain, not_offered};
use crate::error::Error;
use crate::pool::{Aside, Pool};
use crate::retry::Exponential;
use crate::server::{Ear, rows};
use crate::sync::lock;
use crate::topology::{Suspicion, UNDISTURBED};

/// Notifications that wait for a reader. PostgreSQL's payloads are below 8,000 bytes, so this is 8 MB at the very worst.
const CAPACITY: usize = 1024;
/// Pauses between two tries to subscribe again, when it is not for want of a primary.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(5));
/// An idle session shows by this that it is still there and still subscribed, also to proxies that close idle ones.
fn check() -> String {
    format!("{UNDISTURBED} SELECT pg_listening_channels() ORDER BY 1")
}

/// The same, where the function is taken from the role: then what the session is subscribed to is not seen.
fn check_alive() -> String {
    format!("{UNDISTURBED} SHOW transaction_read_only")
}

/// What the server answers to [`check`]; `None` where it does not let this role ask.
async fn subscribed_to(client: &tokio_postgres::Client) -> Result<Option<Channels>, tokio_postgres::Error> {
    match rows(client, &check()).await {
        Err(error) if not_offered(&error) => rows(client, &check_alive()).await.map(|_| None),
        answer => answer.map(Some),
    }
}

type Channels = Vec<Vec<Option<String>>>;

/// A session that listens is idle by its nature; from PostgreSQL 14 on a role's `idle_session_timeout` would end it again and
/// again. Asked for apart: where it is refused, the subscription is in force all the same.
const STAY: &str = "SELECT pg_catalog.set_config('idle_session_timeout', '0', false) \
                     WHERE pg_catalog.current_setting('idle_session_timeout', true) IS NOT NULL";
/// So many heart-beats lie between two checks.
const CHECK_EVERY: u32 = 10;
/// Time for one answer: the subscription's, or the check's.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

impl Pool {
    /// Subscribes to these channels, on a session of its own to the verified primary, and again after each failover.
    ///
    /// Returns when the subscription is in force: what is notified from then on is received. Waits for that at most for
    /// the checkout timeout. Channel names are taken as they are, upper case and special characters included: `NOTIFY
    /// Orders` folds its name to lower case and is heard on `orders`.
    ///
    /// PostgreSQL keeps no notification for a session that is not there. So when the session was lost, to a failover
    /// or otherwise, the listener subscribes again by itself and says [`Message::MayHaveGap`]: read the state that the
    /// notifications are about anew at that point. A primary that died without a word is noticed as by the pool: the
    /// session ends as soon as a successor is proved, or after `dead_after`. The session itself is asked every tenth
    /// heart-beat (10 s) whether it is still subscribed, which also keeps it alive behind proxies that close idle ones.
    ///
    /// The session counts neither as one of `max_size` nor in [`Pool::status`]. Dropping the [`Listener`] closes it. A
    /// listener keeps the pool alive, like a [`Client`](crate::Client).
    ///
    /// Does not work through a pooler in transaction mode (`PgBouncer`'s `pool_mode=transaction`), as the session that
    /// listens is not the client's there: connect around it.
    ///
    /// # Errors
    /// [`Error::Unavailable`] where there was no primary in time, [`Error::Refused`] where the credentials are wrong,
    /// [`Error::Database`] where the server does not take the names of the channels (an empty one), [`Error::Wrapped`] where
    /// the pool is a [wrapped](Pool::wrap) one.
    ///
    /// # Cancel safety
    /// A dropped future leaves nothing behind.
    ///
    /// ```no_run
    /// # async fn example(pool: tokio_postgres_failover::Pool) -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_postgres_failover::Message;
    ///
    /// let mut listener = pool.listen(["orders", "prices"]).await?;
    /// // Subscribe first, read the state then: what changes in between is notified.
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
        if self.is_wrapped() {
            return Err(Error::Wrapped);
        }
        self.not_ended()?;
        let sql = subscription(channels);
        let inbox = Arc::new(Inbox::default());
        let began = Instant::now();
        let subscribing = subscribe(self, &sql, &inbox);
        let first = timeout(self.checkout_timeout(), subscribing).await.map_err(|_| self.unavailable(began))??;
        // Where the pool runs: the caller's runtime may end before.
        let keeping = self.runtime().spawn(keep(self.clone(), sql, first, Keeping(Arc::clone(&inbox))));
        Ok(Listener { inbox, task: keeping.abort_handle() })
    }
}

/// `LISTEN` for each channel. In quotes, which are doubled within: the name is taken as it is.
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

/// What a [`Listener`] receives. There will be no third: whoever handles it handles the gap.
#[derive(Clone, Debug)]
pub enum Message {
    /// Somebody's NOTIFY: its channel, its payload, and the process id of the session that sent it.
    Notification(Notification),
    /// Notifications may be missing here: the session was lost and there is a new one, or the reader was too slow.
    /// The subscription is in force: what changes from now on is notified, so the state read now is not missed.
    MayHaveGap,
}

/// Notifications of some channels, across failovers, from [`Pool::listen`].
///
/// Read it with [`Listener::recv`], or as a [`Stream`]. It ends, with `None`, when the pool is closed; where the runtime of
/// the pool has ended, [`Error::RuntimeEnded`] comes before that. Any other `Err` ends nothing: it says that there has been no subscription for the checkout timeout, or that the servers refuse it, and
/// why, each time anew; the listener goes on trying, and [`Message::MayHaveGap`] follows when it succeeds. Whoever has no
/// use for late news drops the listener then.
///
/// Up to 1,024 notifications wait for a reader. For one that is slower the newer ones are dropped, and
/// [`Message::MayHaveGap`] stands in their place, once; so a reader that stopped costs no more memory, and holds up
/// neither the server nor the pool.
#[must_use = "a listener that is dropped has ended its subscription"]
pub struct Listener {
    inbox: Arc<Inbox>,
    task: AbortHandle,
}

impl Listener {
    /// The next message; `None` when the pool was closed and all was read. Cancel-safe: nothing is lost.
    ///
    /// Waits without a limit, as nobody knows when somebody notifies; but not in silence: without a subscription there
    /// is an `Err` after the checkout timeout.
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
    aside: Aside<ClientWrapper>,
    ended: CancellationToken,
    channels: Option<Channels>,
}

impl Subscribed {
    /// Returns why the subscription is not in force any more.
    async fn lost(&mut self, pause: Duration) -> String {
        while timeout(pause, self.ended.cancelled()).await.is_err() {
            match timeout(ANSWER_WITHIN, subscribed_to(self.aside.client())).await {
                Ok(Ok(None)) => {}
                Ok(Ok(channels)) if self.channels.is_none() || channels == self.channels => self.channels = channels,
                Ok(Ok(_)) => {
                    return "the server forgot it; a pooler in transaction mode cannot be listened through".into();
                }
                Ok(Err(error)) => return explain(&error),
                Err(_) => return format!("no answer within {ANSWER_WITHIN:?}"),
            }
        }
        "its session ended".into()
    }
}

/// Keeps the subscription in force until the pool is closed, or the task ended.
async fn keep(pool: Pool, sql: String, mut subscribed: Subscribed, keeping: Keeping) {
    let inbox = &keeping.0;
    let pause = pool.heartbeat().saturating_mul(CHECK_EVERY);
    loop {
        let why = subscribed.lost(pause).await;
        tracing::debug!(generation = subscribed.aside.generation().get(), why, "a subscription was lost");
        pool.suspect(subscribed.aside.generation(), Suspicion::Connection);
        drop(subscribed);
        match again(&pool, &sql, inbox).await {
            Ok(next) => subscribed = next,
            Err(Error::Closed) => return inbox.close(),
            Err(ended) => return inbox.end(ended),
        }
        tracing::debug!(generation = subscribed.aside.generation().get(), "subscribed again");
        inbox.update(Backlog::subscribed);
    }
}

/// However the task ends, also with its runtime before it has ever run, its reader does not wait for ever.
struct Keeping(Arc<Inbox>);

impl Drop for Keeping {
    fn drop(&mut self) {
        self.0.end(Error::RuntimeEnded);
    }
}

/// Subscribes again, however long it takes. Fails where the pool has ended.
async fn again(pool: &Pool, sql: &str, inbox: &Arc<Inbox>) -> Result<Subscribed, Error> {
    let mut pauses = Exponential::new(PAUSE.0, 2.0, PAUSE.1).jitter(pool.next_seed());
    loop {
        let began = Instant::now();
        let error = match timeout(pool.checkout_timeout(), subscribe(pool, sql, inbox)).await {
            Ok(Ok(subscribed)) => return Ok(subscribed),
            Ok(Err(ended @ (Error::Closed | Error::RuntimeEnded))) => return Err(ended),
            Ok(Err(error)) => error,
            Err(_) => pool.unavailable(began),
        };
        inbox.update(|backlog| backlog.trouble = Some(error));
        sleep(pauses.next().unwrap_or(PAUSE.1)).await;
    }
}

/// Tries until a session is subscribed, or something is wrong that a failover would not explain.
async fn subscribe(pool: &Pool, sql: &str, inbox: &Arc<Inbox>) -> Result<Subscribed, Error> {
    let mut pauses = Exponential::new(PAUSE.0, 2.0, PAUSE.1).jitter(pool.next_seed());
    loop {
        let aside = match pool.aside().await {
            Ok(aside) => aside,
            // It has paused already.
            Err(Error::Unavailable(_)) => continue,
            Err(error) => return Err(error),
        };
        let ended = CancellationToken::new();
        aside.hear(Arc::new(Hears { inbox: Arc::clone(inbox), ended: ended.clone() }));
        let subscribing = async {
            let (_, listening) = tokio::join!(biased; rows(aside.client(), STAY), aside.client().batch_execute(sql));
            listening?;
            subscribed_to(aside.client()).await
        };
        match timeout(ANSWER_WITHIN, subscribing).await {
            // What was never in force could not be missed later either.
            Ok(Ok(Some(channels))) if channels.is_empty() && !sql.is_empty() => {
                tracing::warn!("LISTEN had no effect: a pooler in transaction mode cannot be listened through");
            }
            Ok(Ok(channels)) => return Ok(Subscribed { aside, ended, channels }),
            // The server is well and does not want this: the name of a channel.
            Ok(Err(error)) if matches!(classify(&error), Verdict::Application | Verdict::NotPostgres) => {
                return Err(error.into());
            }
            _ => pool.suspect(aside.generation(), Suspicion::Connection),
        }
        sleep(pauses.next().unwrap_or(PAUSE.1)).await;
    }
}

/// The ear of one session.
#[derive(Debug)]
struct Hears {
    inbox: Arc<Inbox>,
    ended: CancellationToken,
}

impl Ear for Hears {
    fn notified(&self, notification: Notification) {
        self.inbox.update(|backlog| backlog.push(notification));
    }

    fn ended(&self) {
        self.ended.cancel();
    }
}

/// What the task and the sessions put in, and the reader takes out.
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

    /// Ends with this error, unless it has ended.
    fn end(&self, error: Error) {
        self.update(|backlog| {
            if !backlog.closed {
                backlog.closed = true;
                backlog.trouble = Some(error);
            }
        });
    }

    fn poll(&self, cx: &Context<'_>) -> Poll<Option<Result<Message, Error>>> {
        // Registered first: what comes in between is seen, or wakes.
        self.reader.register(cx.waker());
        let next = self.backlog().next();
        next.map(|item| match item {
            Some(Ok(Entry::Told(notification))) => Some(Ok(Message::Notification(notification))),
            Some(Ok(Entry::Gap)) => Some(Ok(Message::MayHaveGap)),
            Some(Err(error)) => Some(Err(error)),
            None => None,
        })
    }
}

/// What waits for the reader, in order.
#[derive(Debug)]
struct Backlog<N> {
    queue: VecDeque<Entry<N>>,
    /// Why there is no subscription now, once there has been none for a while. Newer than all in the queue.
    trouble: Option<Error>,
    closed: bool,
}

#[derive(Debug, PartialEq)]
enum Entry<N> {
    Told(N),
    Gap,
}

impl<N> Default for Backlog<N> {
    fn default() -> Self {
        Self { queue: VecDeque::new(), trouble: None, closed: false }
    }
}

impl<N> Backlog<N> {
    fn push(&mut self, notification: N) {
        if self.queue.len() < CAPACITY {
            self.queue.push_back(Entry::Told(notification));
        } else {
            self.gap();
        }
    }

    /// One mark stands for all that is missing in its place.
    fn gap(&mut self) {
        if !matches!(self.queue.back(), Some(Entry::Gap)) {
            self.queue.push_back(Entry::Gap);
        }
    }

    /// There is a new subscription: what was wrong is not any more, and something may be missing.
    fn subscribed(&mut self) {
        self.trouble = None;
        self.gap();
    }

    fn next(&mut self) -> Poll<Option<Result<Entry<N>, Error>>> {
        if let Some(entry) = self.queue.pop_front() {
            return Poll::Ready(Some(Ok(entry)));
        }
        match self.trouble.take() {
            Some(error) => Poll::Ready(Some(Err(error))),
            None if self.closed => Poll::Ready(None),
            None => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn channels_are_taken_as_they_are() {
        assert_eq!(
            subscription(["a", "Für Elise", "x\"; DROP TABLE t; --"]),
            concat!("LISTEN \"a\";", "LISTEN \"Für Elise\";", "LISTEN \"x\"\"; DROP TABLE t; --\";",)
        );
        assert_eq!(subscription::<[&str; 0]>([]), "");
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Notify(u16),
        Resubscribe,
        Trouble,
        Read(u16),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0..600_u16).prop_map(Step::Notify),
            Just(Step::Resubscribe),
            Just(Step::Trouble),
            (0..900_u16).prop_map(Step::Read),
        ];
        proptest::collection::vec(step, 1..30)
    }

    proptest! {
        /// Notifications are numbered: whatever is missing between two that were read, a mark stands in its place.
        #[test]
        fn nothing_is_missing_without_a_mark(steps in steps()) {
            let mut backlog = Backlog::default();
            let (mut told, mut read, mut marked, mut resubscribed) = (0_u32, 0_u32, false, false);
            let mut steps = steps;
            steps.push(Step::Read(u16::MAX));
            for step in steps {
                match step {
                    Step::Notify(count) => for _ in 0..count {
                        told += 1;
                        backlog.push(told);
                    },
                    Step::Resubscribe => {
                        backlog.subscribed();
                        prop_assert!(backlog.trouble.is_none());
                        prop_assert!(matches!(backlog.queue.back(), Some(Entry::Gap)));
                        resubscribed = true;
                    }
                    Step::Trouble => backlog.trouble = Some(Error::Closed),
                    Step::Read(count) => for _ in 0..count {
                        match backlog.next() {
                            Poll::Ready(Some(Ok(Entry::Told(number)))) => {
                                prop_assert!(number > read);
                                prop_assert!(number == read + 1 || marked, "{read}, then {number}");
                                (read, marked) = (number, false);
                            }
                            Poll::Ready(Some(Ok(Entry::Gap))) => {
                                prop_assert!(!marked || resubscribed, "two marks in a row");
                                marked = true;
                            }
                            Poll::Ready(Some(Err(_))) => prop_assert!(backlog.queue.is_empty()),
                            Poll::Ready(None) => prop_assert!(false, "nobody closed it"),
                            Poll::Pending => break,
                        }
                    },
                }
                // Marks alternate with notifications at least, so they cannot pile up either.
                prop_assert!(backlog.queue.len() <= CAPACITY + 1, "{}", backlog.queue.len());
            }
            prop_assert!(read == told || marked, "{told} told, {read} read");
        }
    }

    #[test]
    fn a_closed_backlog_is_read_to_its_end() {
        let mut backlog = Backlog::default();
        backlog.push(1);
        backlog.closed = true;
        assert!(matches!(backlog.next(), Poll::Ready(Some(Ok(Entry::Told(1))))));
        assert!(matches!(backlog.next(), Poll::Ready(None)));
    }
}
