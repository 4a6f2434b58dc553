//! Counts the messages that pass in both directions.

use super::messages::Messages;
use super::{BLOCKED, COMMIT, COPYING, FAILED, REQUEST, STALLED, TRANSACTION};

/// Counts the messages that pass in both directions.
#[expect(clippy::struct_excessive_bools, reason = "they are independent, and each is one of the published flags")]
#[derive(Debug)]
pub(in crate::server) struct Counter {
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
    pub(super) last_commit: u64,
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
    pub(in crate::server) fn new(asks_for_tls: bool) -> Self {
        let asks = u8::from(asks_for_tls);
        Self {
            // The TLS request and the start-up message have no type letter.
            sent: Messages::behind(0, asks + 1),
            received: Messages::behind(asks, 0),
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

    pub(in crate::server) fn sent(&mut self, bytes: &[u8]) {
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
    pub(in crate::server) fn blocked(&mut self) {
        self.blocked = true;
    }

    /// Returns whether a request has ended.
    pub(in crate::server) fn received(&mut self, bytes: &[u8]) -> bool {
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
    pub(in crate::server) fn shows_life(&self) -> bool {
        self.alive
    }

    /// The driver has read all received data.
    pub(in crate::server) fn drained(&mut self) {
        self.stalled = false;
    }

    pub(in crate::server) fn flags(&self) -> u8 {
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
