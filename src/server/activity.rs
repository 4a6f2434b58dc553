//! Whether a request is under way on a session, read from the bytes that pass: no message is sent for it.
//!
//! Counts requests (`Query` and `Sync`) on the way to the server and their ends (`ReadyForQuery`) on the way back, and keeps
//! the last transaction state. What the driver sends by itself without anybody waiting does not make a session busy: closing
//! a statement, and the ROLLBACK of a dropped transaction. Pure but for the atomics that publish the outcome. Tests:
//! `activity/tests.rs`, `tests/it/busy.rs`.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use tokio::sync::Notify;

/// A request is under way that somebody was interested in.
const REQUEST: u8 = 1;
/// A transaction is open that nothing on its way will end.
const TRANSACTION: u8 = 2;
/// The server waits for the data of a COPY.
const COPYING: u8 = 4;
/// Not all that is to be sent was taken by the network.
const BLOCKED: u8 = 8;
/// The answer is not taken: somebody holds a stream of rows and reads no further.
const STALLED: u8 = 16;
/// The last request has failed, and its end is still to come. The server sends it at once; it tells whether a transaction is
/// open.
const FAILED: u8 = 32;

/// What the driver's task publishes of one session, for whoever holds its connection.
#[derive(Debug, Default)]
pub(crate) struct Activity {
    flags: AtomicU8,
    /// How often the driver's task was woken, and how many of these it has dealt with.
    woken: AtomicU64,
    dealt_with: AtomicU64,
    /// The connection was given back, and nobody may have anything under way on it.
    given_back: AtomicBool,
    /// It was given back with something under way, as turned out afterwards.
    condemned: AtomicBool,
    /// The driver's task has dealt with all that woke it.
    settled: Notify,
    /// When the server has said something last, in milliseconds of the wall clock.
    heard_at: AtomicU64,
}

impl Activity {
    /// Something is known to be under way, or a transaction to be open. Where the driver has not seen all requests yet, as
    /// when a transaction has just been dropped and its ROLLBACK not been sent, nothing is known.
    pub(crate) fn is_busy(&self) -> bool {
        self.flags.load(Ordering::Acquire) & !STALLED != 0 && self.is_settled()
    }

    /// An open transaction will not end by itself, so there is nothing to wait for.
    pub(crate) fn in_transaction(&self) -> bool {
        self.flags.load(Ordering::Acquire) & (REQUEST | TRANSACTION) == TRANSACTION
    }

    pub(crate) fn is_condemned(&self) -> bool {
        self.condemned.load(Ordering::Acquire)
    }

    /// The driver's task has seen all requests that were made.
    pub(crate) fn is_settled(&self) -> bool {
        self.woken.load(Ordering::SeqCst) == self.dealt_with.load(Ordering::SeqCst)
    }

    /// Whether the session is idle. `None` while the driver's task has not seen all requests, or a request has failed whose
    /// end is still to come.
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
        loop {
            let settled = self.settled.notified();
            if let Some(idle) = self.is_idle() {
                return idle;
            }
            settled.await;
        }
    }

    /// Waits until nothing is under way. Cancel-safe.
    pub(crate) async fn becomes_idle(&self) {
        loop {
            let settled = self.settled.notified();
            if self.is_settled() && self.flags.load(Ordering::Acquire) == 0 {
                return;
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

    /// The driver's task is woken.
    pub(super) fn wake(&self) {
        self.woken.fetch_add(1, Ordering::SeqCst);
    }

    /// To be called before the driver is polled; what it returns goes into [`Activity::polled`].
    pub(super) fn before_poll(&self) -> u64 {
        self.woken.load(Ordering::SeqCst)
    }

    /// The driver has dealt with all that woke it up to `woken`. Returns whether the connection was given back with
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

    /// The session has ended; whoever waits finds out by its client.
    pub(super) fn end(&self) {
        self.condemned.store(true, Ordering::Release);
        self.dealt_with.store(self.woken.load(Ordering::SeqCst), Ordering::SeqCst);
        self.settled.notify_waiters();
    }

    /// When the server has said something last, in milliseconds of the wall clock; 0 where nobody knows.
    pub(crate) fn heard_at(&self) -> u64 {
        self.heard_at.load(Ordering::Relaxed)
    }

    pub(super) fn heard(&self, now: u64) {
        self.heard_at.store(now, Ordering::Relaxed);
    }

    pub(super) fn publish(&self, flags: u8) {
        self.flags.store(flags, Ordering::Release);
    }
}

/// Counts what passes in both directions.
#[expect(clippy::struct_excessive_bools, reason = "they are independent, and each is one of the published flags")]
#[derive(Debug)]
pub(super) struct Counter {
    sent: Messages,
    received: Messages,
    /// Requests that were sent, and those that were answered.
    requests: u64,
    answered: u64,
    /// The last request that somebody was interested in, and the last ROLLBACK of the driver's own.
    last_request: u64,
    last_rollback: u64,
    /// The request that is being sent does more than close a statement.
    begun: bool,
    /// The request that is being answered has failed. Its end follows soon, and tells whether a transaction is open.
    failed: bool,
    transaction: bool,
    copying: bool,
    blocked: bool,
    stalled: bool,
}

impl Counter {
    /// From the start of a session. `asks_for_tls`: a question for TLS goes before, and its answer of one byte.
    pub(super) fn new(asks_for_tls: bool) -> Self {
        let asks = u8::from(asks_for_tls);
        Self {
            // The question and the start-up message have no type letter.
            sent: Messages { untyped: asks + 1, ..Messages::default() },
            received: Messages { bare: asks, ..Messages::default() },
            // The log-in ends like a request.
            requests: 1,
            answered: 0,
            last_request: 1,
            last_rollback: 0,
            begun: false,
            failed: false,
            transaction: false,
            copying: false,
            blocked: false,
            stalled: false,
        }
    }

    pub(super) fn sent(&mut self, bytes: &[u8]) {
        self.blocked = false;
        let Self { sent, requests, last_request, last_rollback, begun, .. } = self;
        sent.feed(bytes, |letter, rollback| match letter {
            // A statement is closed, a password given, the session ended.
            b'C' | b'p' | b'X' => {}
            b'S' => {
                *requests += 1;
                if std::mem::take(begun) {
                    *last_request = *requests;
                }
            }
            b'Q' => {
                *requests += 1;
                let last = if rollback { &mut *last_rollback } else { &mut *last_request };
                *last = *requests;
            }
            _ => *begun = true,
        });
    }

    /// Nothing of it was taken.
    pub(super) fn blocked(&mut self) {
        self.blocked = true;
    }

    /// Returns whether a request has ended.
    pub(super) fn received(&mut self, bytes: &[u8]) -> bool {
        self.stalled = true;
        let Self { received, answered, failed, transaction, copying, .. } = self;
        let before = *answered;
        received.feed(bytes, |letter, in_transaction| match letter {
            b'Z' => {
                *answered += 1;
                *failed = false;
                *copying = false;
                *transaction = in_transaction;
            }
            // The server takes no notice of the Sync that went before the data.
            b'G' => {
                *answered += 1;
                *copying = true;
            }
            // The driver hands an error on before the end of the request has come.
            b'E' => *failed = true,
            _ => {}
        });
        *answered != before
    }

    /// All that has come was taken.
    pub(super) fn drained(&mut self) {
        self.stalled = false;
    }

    pub(super) fn flags(&self) -> u8 {
        let sending = self.begun || self.sent.within();
        let failed = self.failed && self.last_request == self.answered + 1 && !sending;
        let under_way = sending || self.last_request > self.answered;
        // What a failed request has left open is of no interest where a ROLLBACK follows.
        let ending = failed && self.last_rollback < self.last_request;
        let open = self.transaction && self.last_rollback <= self.answered;
        [
            (REQUEST, under_way && !failed),
            (TRANSACTION, open),
            (COPYING, self.copying),
            (BLOCKED, self.blocked),
            (STALLED, self.stalled),
            (FAILED, ending),
        ]
        .into_iter()
        .filter_map(|(flag, set)| set.then_some(flag))
        .sum()
    }
}

/// The driver's own, when a transaction is dropped.
const ROLLBACK: &[u8] = b"ROLLBACK\0";

/// The messages of one direction, however they are cut.
#[derive(Debug, Default)]
struct Messages {
    /// Bytes without a header that come first.
    bare: u8,
    /// Messages without a type letter that come first.
    untyped: u8,
    header: [u8; 5],
    have: usize,
    /// Of the body that is passing.
    left: usize,
    /// How much of the body is what was looked for.
    matched: Option<usize>,
}

impl Messages {
    /// In the midst of a message.
    fn within(&self) -> bool {
        self.have > 0
    }

    /// Tells of each message at its end: its letter, and of `Query` whether it is a ROLLBACK, of `ReadyForQuery` whether it is
    /// within a transaction.
    fn feed(&mut self, mut bytes: &[u8], mut tell: impl FnMut(u8, bool)) {
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
                    tell(self.header[0], found);
                }
                self.have = 0;
            }
        }
    }

    fn look_at(&mut self, body: &[u8]) {
        self.matched = match (self.header[0], self.matched) {
            // `T` and `E` are states of a transaction, `I` is none.
            (b'Z', Some(at)) if body.first().is_some_and(|state| *state != b'I') => Some(at + 1),
            (b'Q', Some(at)) if ROLLBACK.get(at..).is_some_and(|rest| rest.starts_with(body)) => Some(at + body.len()),
            (b'Z', before) => before,
            _ => None,
        };
    }
}

#[cfg(test)]
mod tests;
