//! Counts the messages that pass in both directions, and notes what they do to the session's transaction.

use std::collections::VecDeque;

use super::commits::Ends;
use super::messages::{Message, Messages, Says};
use super::{BLOCKED, COMMIT, COPYING, FAILED, REQUEST, STALLED, TRANSACTION, TransactionEnd, Unanswered};

/// Counts the messages that pass in both directions.
#[derive(Debug)]
pub(in crate::server) struct Counter {
    sent: Messages,
    received: Messages,
    pub(super) counts: Counts,
}

/// What the messages have told so far.
#[expect(clippy::struct_excessive_bools, reason = "they are independent, and each is one of the published flags")]
#[derive(Debug, Default)]
pub(super) struct Counts {
    /// The number of requests that were sent. `answered` is the number of those that have ended.
    requests: u64,
    answered: u64,
    /// The number of the last request that a caller waits for. `last_rollback` is the number of the last ROLLBACK that
    /// the driver sent by itself.
    last_request: u64,
    last_rollback: u64,
    /// The number of the last request that commits.
    pub(super) last_commit: u64,
    /// The number of the last request that is the pool's own COMMIT.
    pub(super) pools_commit: u64,
    /// The other requests that end a transaction.
    endings: Endings,
    /// What the prepared statements do that the request being sent carries out.
    bound: Ends,
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
    /// The server process of the session, as the log-in has shown it.
    pub(super) pid: i32,
    /// The first answer since the last publication that shows the end of a transaction.
    pub(super) end: Option<TransactionEnd>,
    /// The requests that were not answered and whose answer may contain that of a ROLLBACK: their numbers, and what
    /// they do. Such requests are rare.
    may_roll_back: VecDeque<(u64, Ends)>,
    /// How many times the request that is being answered has rolled back, to a savepoint or entirely.
    rolled_back: u16,
    /// Since the last publication, something was rolled back, and no text shows what.
    pub(super) rolled_back_unseen: bool,
    /// Whether new transactions are read-only by default, if the server has reported it since the last publication.
    pub(super) read_only: Option<bool>,
    /// Since the last publication, a statement was sent that drops all prepared statements.
    pub(super) deallocated: bool,
}

/// The requests whose text ends a transaction. The pool's own COMMIT is none of them.
#[derive(Debug, Default)]
struct Endings {
    /// The number of the last one that commits.
    last_commit: u64,
    /// The number of the last one.
    last: u64,
    /// While the last one is not answered: another statement was sent behind one that was not answered.
    goes_on: bool,
}

impl Endings {
    /// Notes that a request with this number was sent, whose statements do this. `answered`: so many requests are
    /// answered.
    fn note(&mut self, number: u64, ends: Ends, answered: u64) {
        self.goes_on = self.last > answered || ends.goes_on;
        if ends.leaves {
            self.last = number;
        }
        if ends.commits {
            self.last_commit = number;
        }
    }
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
            counts: Counts { requests: 1, last_request: 1, ..Counts::default() },
        }
    }

    pub(in crate::server) fn sent(&mut self, bytes: &[u8]) {
        self.counts.blocked = false;
        let Self { sent, counts, .. } = self;
        sent.feed(bytes, |message| counts.sent(message));
    }

    /// The network accepted none of the data.
    pub(in crate::server) fn blocked(&mut self) {
        self.counts.blocked = true;
    }

    /// Returns whether a request has ended.
    pub(in crate::server) fn received(&mut self, bytes: &[u8]) -> bool {
        let Self { received, counts, .. } = self;
        // Data that had waited in a buffer may have been sent long ago, by a server that is dead now.
        let fresh = !counts.stalled && !bytes.is_empty();
        counts.stalled = true;
        let before = counts.answered;
        received.feed(bytes, |message| counts.received(message));
        let ended = counts.answered != before;
        // An error without the end of a request after it may be a proxy's, or the server's last message. The same is
        // true of a notice: after an immediate shutdown or the crash of another backend, a server sends one on each
        // session. A server that ends sends nothing else unasked, so a parameter or a notification shows that it goes
        // on.
        let last_words = counts.failed || matches!(received.last(), b'E' | b'N');
        counts.alive = (ended || fresh) && !last_words;
        ended
    }

    /// Returns whether the bytes that were read last show that the server lives: they end a request, or the driver had
    /// waited for them.
    pub(in crate::server) fn shows_life(&self) -> bool {
        self.counts.alive
    }

    /// The driver has read all received data. Returns whether that is news.
    pub(in crate::server) fn drained(&mut self) -> bool {
        std::mem::take(&mut self.counts.stalled)
    }

    pub(super) fn flags(&self) -> u8 {
        self.counts.flags(self.sent.within())
    }

    /// Returns whether each request is answered, those of the driver, too, and no message is incomplete.
    pub(in crate::server) fn is_all_answered(&self) -> bool {
        self.counts.requests == self.counts.answered && !self.sent.within() && !self.received.within()
    }
}

impl Counts {
    fn sent(&mut self, message: Message) {
        self.deallocated |= message.deallocates;
        match message.letter {
            // These close a statement, give a password, or end the session.
            b'C' | b'p' | b'X' => {}
            b'S' => {
                self.requests += 1;
                if std::mem::take(&mut self.begun) {
                    self.last_request = self.requests;
                    let ends = std::mem::take(&mut self.bound);
                    self.requested(ends, None);
                }
            }
            b'Q' => {
                self.requests += 1;
                if message.says == Some(Says::DriversRollback) {
                    self.last_rollback = self.requests;
                } else {
                    self.last_request = self.requests;
                }
                self.requested(message.ends, message.says);
            }
            letter => {
                self.begun = true;
                if letter == b'B' {
                    // Statements of one pipeline follow each other, but this counts only within one text.
                    self.bound = Ends { goes_on: false, ..self.bound.and(message.ends) };
                }
            }
        }
    }

    /// A whole request was sent, whose statements do this.
    fn requested(&mut self, ends: Ends, says: Option<Says>) {
        if ends.commits {
            self.last_commit = self.requests;
        }
        if ends.may_roll_back() {
            self.may_roll_back.push_back((self.requests, ends));
        }
        match says {
            Some(Says::PoolsCommit) => self.pools_commit = self.requests,
            // It writes nothing outside of a transaction, whatever is under way before it.
            Some(Says::DriversRollback) if self.endings.last > self.answered => {}
            _ => self.endings.note(self.requests, ends, self.answered),
        }
    }

    fn received(&mut self, message: Message) {
        match (message.letter, message.says) {
            (b'Z', says) => {
                self.answered += 1;
                // A proxy that has lost its server may answer with an error and "idle". No statement has ended the
                // transaction then. So a failed request counts only if its text, or that of a later one, ends one. The
                // answer to a Close that the driver sends by itself may come late, when the next transaction is waited
                // for.
                let closes = self.answered > self.last_request.max(self.last_rollback);
                if says == Some(Says::Idle) && !closes && (!self.failed || self.endings.last >= self.answered) {
                    self.ends(self.answered, TransactionEnd::RolledBack);
                }
                self.request_ends();
                self.failed = false;
                self.copying = false;
                self.transaction = says != Some(Says::Idle) && !planted!("gives back what is within a transaction");
            }
            (b'C', Some(Says::Committed)) => self.ends(self.answered + 1, TransactionEnd::Committed),
            (b'C', Some(Says::Prepared)) => self.ends(self.answered + 1, TransactionEnd::Prepared),
            (b'S', Some(Says::ReadOnly(read_only))) => self.read_only = Some(read_only),
            (b'C', Some(Says::RolledBack)) => self.rolls_back(),
            // The server ignores the Sync that was sent before the COPY data.
            (b'G', _) => {
                self.answered += 1;
                self.request_ends();
                self.copying = true;
            }
            // The driver passes an error on before the end of the request has arrived.
            (b'E', _) => self.failed = true,
            (b'K', _) => self.pid = message.pid,
            _ => {}
        }
    }

    /// The request with the number `answered` has ended.
    fn request_ends(&mut self) {
        self.rolled_back = 0;
        while self.may_roll_back.front().is_some_and(|(number, _)| *number <= self.answered) {
            self.may_roll_back.pop_front();
        }
    }

    /// A statement is answered as ROLLBACK. The same is answered to a rollback to a savepoint, and to a COMMIT in a
    /// failed transaction. So the text of the request decides.
    fn rolls_back(&mut self) {
        let request = self.answered + 1;
        self.rolled_back = self.rolled_back.saturating_add(1);
        let known = self.may_roll_back.front().filter(|(number, _)| *number == request).map(|(_, ends)| *ends);
        let ends = known.unwrap_or_default();
        if self.rolled_back <= ends.to_savepoints {
            // If the text fails before it comes to its savepoints, this may have been the end of the transaction.
            self.rolled_back_unseen |= ends.leaves || ends.chains;
            return;
        }
        if ends.leaves || ends.chains {
            self.ends(request, TransactionEnd::RolledBack);
        } else {
            self.rolled_back_unseen |= request != self.pools_commit;
        }
    }

    /// The answer to the request with this number shows that a transaction has ended, or that none is open.
    fn ends(&mut self, request: u64, end: TransactionEnd) {
        if request != self.pools_commit {
            self.end.get_or_insert(end);
        }
    }

    /// The server carries out a prepared statement before the end of the request has arrived.
    fn binds_commit(&self) -> bool {
        self.begun && self.bound.commits
    }

    /// What a request that was not answered may have done to the transaction, by its text. The pool's own COMMIT does
    /// not count.
    pub(super) fn unanswered(&self) -> Unanswered {
        if self.endings.last > self.answered && self.endings.goes_on {
            Unanswered::GoesOn
        } else if self.endings.last_commit > self.answered || self.binds_commit() {
            Unanswered::Commits
        } else {
            Unanswered::Nothing
        }
    }

    /// `within`: a message was sent in part.
    fn flags(&self, within: bool) -> u8 {
        let sending = self.begun || within;
        let failed = self.failed && self.last_request == self.answered + 1 && !sending;
        let under_way = sending || self.last_request > self.answered;
        // If a ROLLBACK follows a failed request, it does not matter whether that request has left a transaction open.
        let ending = failed && self.last_rollback < self.last_request;
        let open = self.transaction && self.last_rollback <= self.answered;
        let commits = self.last_commit > self.answered || self.binds_commit();
        let flag = |flag, set| if set { flag } else { 0 };
        flag(REQUEST, under_way && !failed)
            | flag(TRANSACTION, open)
            | flag(COPYING, self.copying)
            | flag(BLOCKED, self.blocked)
            | flag(STALLED, self.stalled)
            | flag(FAILED, ending)
            | flag(COMMIT, under_way && !failed && commits)
    }
}
