//! Finds out from the bytes that a session sends and receives whether a request is under way. This sends no message.
//!
//! It counts requests (`Query` and `Sync`) on the way to the server and their ends (`ReadyForQuery`) on the way back,
//! and keeps the last transaction state. The driver sends two messages by itself: it closes a statement, and it rolls
//! back a dropped transaction. No caller waits for these, so they do not make a session busy. The module is pure except
//! for the atomics that publish the result. The tests are `activity/tests.rs` and `tests/it/checkout/busy.rs`.

mod commits;
mod names;

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use tokio::sync::Notify;

use self::commits::Commits;
use self::names::Names;

/// A caller's request is under way.
const REQUEST: u8 = 1;
/// A transaction is open, and the driver has not sent a ROLLBACK for it.
const TRANSACTION: u8 = 2;
/// The server waits for COPY data.
const COPYING: u8 = 4;
/// The network has not accepted all data that must be sent.
const BLOCKED: u8 = 8;
/// Nobody reads the answer: a caller holds a stream of rows and does not read on.
const STALLED: u8 = 16;
/// The last request has failed, but its `ReadyForQuery` has not arrived, which shows whether a transaction is open. The
/// server sends it immediately.
const FAILED: u8 = 32;
/// A COMMIT is under way. Do not cancel it: that would end its wait for a synchronous standby, and make rows visible
/// that no standby has.
const COMMIT: u8 = 64;

/// What the driver's task publishes about one session to the holder of its connection.
#[derive(Debug, Default)]
pub(crate) struct Activity {
    flags: AtomicU8,
    /// How many times the driver's task was woken. `dealt_with` is the number of these wake-ups that it has handled.
    woken: AtomicU64,
    dealt_with: AtomicU64,
    /// The connection was given back, so nothing may be under way on it.
    given_back: AtomicBool,
    /// The connection was given back with something under way, so its session is closed.
    condemned: AtomicBool,
    /// Notifies when the driver's task has handled all wake-ups.
    settled: Notify,
    /// When the server last sent something, in milliseconds of the wall clock.
    heard_at: AtomicU64,
    /// The number of the last request that commits.
    last_commit: AtomicU64,
    /// Where signs of the server's life are noted.
    heard: OnceLock<Heard>,
}

/// Whether any of several sessions to one server has received a sign of the server's life since the last call of
/// `take`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Heard(Arc<AtomicBool>);

impl Heard {
    pub(crate) fn note(&self) {
        // Many sessions share this. Reading first is cheaper than writing to memory that others read, and it usually
        // finds `true`.
        if !self.0.load(Ordering::Relaxed) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    /// Returns the value, and resets it.
    pub(crate) fn take(&self) -> bool {
        self.0.load(Ordering::Relaxed) && self.0.swap(false, Ordering::Relaxed)
    }
}

impl Activity {
    /// Returns whether a request is known to be under way, or a transaction is known to be open. Nothing is known while
    /// the driver has not seen all requests: for instance, a transaction was dropped, and its ROLLBACK is not sent yet.
    pub(crate) fn is_busy(&self) -> bool {
        self.flags.load(Ordering::Acquire) & !STALLED != 0 && self.is_settled()
    }

    /// Returns whether a request may be under way, or a transaction may be open. For a session that has ended, returns
    /// whether that was so at its end.
    pub(crate) fn may_be_busy(&self) -> bool {
        self.flags.load(Ordering::Acquire) != 0 || !self.is_settled()
    }

    /// Returns whether a transaction is open and no request is under way. Then waiting would not end the transaction.
    pub(crate) fn in_transaction(&self) -> bool {
        self.flags.load(Ordering::Acquire) & (REQUEST | TRANSACTION) == TRANSACTION
    }

    /// Returns whether a request is under way whose text commits: COMMIT or END, sent by the driver or by the user.
    pub(crate) fn is_committing(&self) -> bool {
        self.flags.load(Ordering::Acquire) & COMMIT != 0
    }

    /// Returns whether a request goes on only if a caller reads on, or sends data.
    pub(crate) fn is_held_up(&self) -> bool {
        self.flags.load(Ordering::Acquire) & (STALLED | COPYING) != 0
    }

    /// Returns whether the answer to the last request was not received, or not read, to its end.
    pub(super) fn is_finishing(&self) -> bool {
        self.flags.load(Ordering::Acquire) & (FAILED | STALLED) != 0
    }

    pub(crate) fn is_condemned(&self) -> bool {
        self.condemned.load(Ordering::Acquire)
    }

    /// Returns whether the driver's task has seen all requests.
    pub(crate) fn is_settled(&self) -> bool {
        self.woken.load(Ordering::SeqCst) == self.dealt_with.load(Ordering::SeqCst)
    }

    /// Returns whether the session is idle. `None`: that is not known, because the driver's task has not seen all
    /// requests, or because the end of a failed request has not arrived.
    pub(crate) fn is_idle(&self) -> Option<bool> {
        if !self.is_settled() {
            return None;
        }
        let flags = self.flags.load(Ordering::Acquire);
        if flags & !STALLED == FAILED && !self.is_condemned() {
            return None;
        }
        Some(flags == 0 && !self.is_condemned())
    }

    /// Waits until it is known whether the session is idle, and returns it. Cancel-safe.
    pub(crate) async fn idle(&self) -> bool {
        self.until(Self::is_idle).await
    }

    /// Waits until nothing is under way. Cancel-safe.
    pub(crate) async fn becomes_idle(&self) {
        self.until(|this| (this.is_settled() && this.flags.load(Ordering::Acquire) == 0).then_some(())).await;
    }

    /// Waits until the driver's task has seen all requests. Cancel-safe.
    pub(super) async fn settles(&self) {
        self.until(|this| this.is_settled().then_some(())).await;
    }

    /// Waits until `look` finds something. It looks each time that the driver's task has handled all wake-ups.
    async fn until<T>(&self, look: impl Fn(&Self) -> Option<T>) -> T {
        loop {
            let settled = self.settled.notified();
            if let Some(found) = look(self) {
                return found;
            }
            settled.await;
        }
    }

    pub(crate) fn lend(&self) {
        self.given_back.store(false, Ordering::SeqCst);
    }

    pub(crate) fn give_back(&self) {
        self.given_back.store(true, Ordering::SeqCst);
    }

    /// Counts a wake-up of the driver's task.
    pub(super) fn wake(&self) {
        self.woken.fetch_add(1, Ordering::SeqCst);
    }

    /// Call this before polling the driver, and pass the result to [`Activity::polled`].
    pub(super) fn before_poll(&self) -> u64 {
        self.woken.load(Ordering::SeqCst)
    }

    /// Notes that the driver has handled all wake-ups up to `woken`. Returns whether the connection was given back with
    /// something under way.
    pub(super) fn polled(&self, woken: u64) -> bool {
        self.dealt_with.store(woken, Ordering::SeqCst);
        self.settled.notify_waiters();
        let busy = self.flags.load(Ordering::Acquire) & !FAILED != 0 && self.is_settled();
        let left_busy = busy && self.given_back.load(Ordering::SeqCst);
        if left_busy {
            self.condemned.store(true, Ordering::Release);
        }
        left_busy
    }

    /// Notes that the session has ended, and wakes the tasks that wait. They find out from their client that it is
    /// closed.
    pub(super) fn end(&self) {
        self.condemned.store(true, Ordering::Release);
        self.dealt_with.store(self.woken.load(Ordering::SeqCst), Ordering::SeqCst);
        self.settled.notify_waiters();
    }

    /// When the server last sent something, in milliseconds of the wall clock. 0 if unknown.
    pub(crate) fn heard_at(&self) -> u64 {
        self.heard_at.load(Ordering::Relaxed)
    }

    pub(super) fn heard(&self, now: u64) {
        self.heard_at.store(now, Ordering::Relaxed);
    }

    /// The number of the last request whose text commits. It changes with each such request.
    pub(crate) fn last_commit(&self) -> u64 {
        self.last_commit.load(Ordering::Acquire)
    }

    /// From now on, signs of the server's life on this session are noted in `heard`. Only the first call counts.
    pub(crate) fn tell(&self, heard: &Heard) {
        let _ = self.heard.set(heard.clone());
    }

    /// Notes that something was received which shows that the server lives.
    pub(super) fn note_life(&self) {
        if let Some(heard) = self.heard.get() {
            heard.note();
        }
    }

    /// Returns whether a caller's request or a transaction is known to be under way.
    pub(super) fn is_working(&self) -> bool {
        self.flags.load(Ordering::Acquire) & !STALLED != 0
    }

    pub(super) fn publish(&self, counter: &Counter) {
        self.last_commit.store(counter.last_commit, Ordering::Release);
        self.flags.store(counter.flags(), Ordering::Release);
    }
}

/// Counts the messages that pass in both directions.
#[expect(clippy::struct_excessive_bools, reason = "they are independent, and each is one of the published flags")]
#[derive(Debug)]
pub(super) struct Counter {
    sent: Messages,
    received: Messages,
    /// The number of requests that were sent. `answered` is the number of those that have ended.
    requests: u64,
    answered: u64,
    /// The number of the last request that a caller waits for. `last_rollback` is the number of the last ROLLBACK that
    /// the driver sent by itself.
    last_request: u64,
    last_rollback: u64,
    /// The last request that commits.
    last_commit: u64,
    /// The request being sent carries out a prepared statement that commits.
    binds_commit: bool,
    /// The request being sent does more than close a statement.
    begun: bool,
    /// The request that is being answered has failed. Its end follows soon, and shows whether a transaction is open.
    failed: bool,
    transaction: bool,
    copying: bool,
    blocked: bool,
    stalled: bool,
    /// The data that was read last shows that the server lives.
    alive: bool,
}

impl Counter {
    /// Creates a counter for the start of a session. `asks_for_tls`: the session begins with a TLS request, which is
    /// answered with one byte.
    pub(super) fn new(asks_for_tls: bool) -> Self {
        let asks = u8::from(asks_for_tls);
        Self {
            // The TLS request and the start-up message have no type letter.
            sent: Messages { untyped: asks + 1, ..Messages::default() },
            received: Messages { bare: asks, ..Messages::default() },
            // The log-in ends with `ReadyForQuery`, like a request.
            requests: 1,
            answered: 0,
            last_request: 1,
            last_rollback: 0,
            last_commit: 0,
            binds_commit: false,
            begun: false,
            failed: false,
            transaction: false,
            copying: false,
            blocked: false,
            stalled: false,
            alive: false,
        }
    }

    pub(super) fn sent(&mut self, bytes: &[u8]) {
        self.blocked = false;
        let Self { sent, requests, last_request, last_rollback, last_commit, binds_commit, begun, .. } = self;
        sent.feed(bytes, |letter, rollback, commit| match letter {
            // These close a statement, give a password, or end the session.
            b'C' | b'p' | b'X' => {}
            b'S' => {
                *requests += 1;
                if std::mem::take(begun) {
                    *last_request = *requests;
                }
                if std::mem::take(binds_commit) {
                    *last_commit = *requests;
                }
            }
            b'Q' => {
                *requests += 1;
                let last = if rollback { &mut *last_rollback } else { &mut *last_request };
                *last = *requests;
                if commit {
                    *last_commit = *requests;
                }
            }
            _ => {
                *begun = true;
                *binds_commit |= letter == b'B' && commit;
            }
        });
    }

    /// The network accepted none of the data.
    pub(super) fn blocked(&mut self) {
        self.blocked = true;
    }

    /// Returns whether a request has ended.
    pub(super) fn received(&mut self, bytes: &[u8]) -> bool {
        // Data that had waited in a buffer may have been sent long ago, by a server that is dead now.
        let fresh = !self.stalled && !bytes.is_empty();
        self.stalled = true;
        let Self { received, answered, failed, transaction, copying, .. } = self;
        let before = *answered;
        received.feed(bytes, |letter, in_transaction, _| match letter {
            b'Z' => {
                *answered += 1;
                *failed = false;
                *copying = false;
                *transaction = in_transaction && !planted!("gives back what is within a transaction");
            }
            // The server ignores the Sync that was sent before the COPY data.
            b'G' => {
                *answered += 1;
                *copying = true;
            }
            // The driver passes an error on before the end of the request has arrived.
            b'E' => *failed = true,
            _ => {}
        });
        let ended = *answered != before;
        // An error without the end of a request after it may be a proxy's, or the server's last message. The same is
        // true of a notice: after an immediate shutdown or the crash of another backend, a server sends one on each
        // session. A server that ends sends nothing else unasked, so a parameter or a notification shows that it goes
        // on.
        let last_words = self.failed || matches!(self.received.last(), b'E' | b'N');
        self.alive = (ended || fresh) && !last_words;
        ended
    }

    /// Returns whether the bytes that were read last show that the server lives: they end a request, or the driver had
    /// waited for them.
    pub(super) fn shows_life(&self) -> bool {
        self.alive
    }

    /// The driver has read all received data.
    pub(super) fn drained(&mut self) {
        self.stalled = false;
    }

    pub(super) fn flags(&self) -> u8 {
        let sending = self.begun || self.sent.within();
        let failed = self.failed && self.last_request == self.answered + 1 && !sending;
        let under_way = sending || self.last_request > self.answered;
        // If a ROLLBACK follows a failed request, it does not matter whether that request has left a transaction open.
        let ending = failed && self.last_rollback < self.last_request;
        let open = self.transaction && self.last_rollback <= self.answered;
        [
            (REQUEST, under_way && !failed),
            (TRANSACTION, open),
            (COPYING, self.copying),
            (BLOCKED, self.blocked),
            (STALLED, self.stalled),
            (FAILED, ending),
            (COMMIT, under_way && !failed && self.last_commit > self.answered),
        ]
        .into_iter()
        .filter_map(|(flag, set)| set.then_some(flag))
        .sum()
    }
}

/// The text that the driver sends by itself when a transaction is dropped.
const ROLLBACK: &[u8] = b"ROLLBACK\0";

/// Splits the bytes of one direction into messages. The bytes may come in chunks of any size.
#[derive(Debug, Default)]
struct Messages {
    /// The number of leading bytes without a message header.
    bare: u8,
    /// The number of leading messages without a type letter.
    untyped: u8,
    header: [u8; 5],
    have: usize,
    /// The number of bytes of the current body that have not come yet.
    left: usize,
    /// How many bytes of the body match the text that is looked for. `None` if they do not match.
    matched: Option<usize>,
    /// Looks for a commit in the text of a query. `named`: the name of a prepared statement comes first, as in `Parse`.
    commits: Commits,
    named: bool,
    names: Names,
}

impl Messages {
    /// Returns whether a message is incomplete.
    fn within(&self) -> bool {
        self.have > 0
    }

    /// The letter of the last message, complete or not.
    fn last(&self) -> u8 {
        self.header[0]
    }

    /// Calls `tell` at the end of each message, with its letter and two flags. The first flag of `Query` says whether
    /// it is a ROLLBACK, and that of `ReadyForQuery` whether a transaction is open. The second flag of `Query` says
    /// whether one of its statements commits, and that of `Bind` whether its prepared statement does.
    fn feed(&mut self, mut bytes: &[u8], mut tell: impl FnMut(u8, bool, bool)) {
        while !bytes.is_empty() {
            if self.bare > 0 {
                self.bare -= 1;
                bytes = &bytes[1..];
                continue;
            }
            let from = usize::from(self.untyped > 0);
            if self.have + from < 5 {
                self.header[self.have + from] = bytes[0];
                self.have += 1;
                bytes = &bytes[1..];
                if self.have + from == 5 {
                    let [_, length @ ..] = self.header;
                    self.left = (u32::from_be_bytes(length) as usize).saturating_sub(4);
                    self.matched = Some(0);
                    self.named = self.header[0] == b'P';
                    self.names.begin(self.header[0]);
                    if matches!(self.header[0], b'Q' | b'P') {
                        self.commits = Commits::default();
                    }
                }
            } else {
                let (body, rest) = bytes.split_at(self.left.min(bytes.len()));
                self.look_at(body);
                self.left -= body.len();
                bytes = rest;
            }
            if self.have + from == 5 && self.left == 0 {
                if self.untyped > 0 {
                    self.untyped -= 1;
                } else {
                    let found = match self.header[0] {
                        b'Z' => self.matched == Some(1),
                        _ => self.matched == Some(ROLLBACK.len()),
                    };
                    let commits = matches!(self.header[0], b'Q' | b'P') && self.commits.found();
                    let binds = self.names.end(self.header[0], commits);
                    tell(self.header[0], found, commits || binds);
                }
                self.have = 0;
            }
        }
    }

    /// Returns the part of a body that belongs to the text of a query.
    fn text_of<'a>(&mut self, body: &'a [u8]) -> &'a [u8] {
        if !self.named {
            return body;
        }
        let Some(end) = body.iter().position(|byte| *byte == 0) else { return &[] };
        self.named = false;
        body.get(end + 1..).unwrap_or_default()
    }

    fn look_at(&mut self, body: &[u8]) {
        self.names.feed(body);
        if matches!(self.header[0], b'Q' | b'P') {
            let text = self.text_of(body);
            self.commits.feed(text);
        }
        self.matched = match (self.header[0], self.matched) {
            // `T` and `E` mean an open transaction, `I` means none.
            (b'Z', Some(at)) if body.first().is_some_and(|state| *state != b'I') => Some(at + 1),
            (b'Q', Some(at)) if ROLLBACK.get(at..).is_some_and(|rest| rest.starts_with(body)) => Some(at + body.len()),
            (b'Z', before) => before,
            _ => None,
        };
    }
}

#[cfg(test)]
mod tests;
