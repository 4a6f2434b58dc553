//! Finds out from the bytes that a session sends and receives whether a request is under way. This sends no message.
//!
//! It counts requests (`Query` and `Sync`) on the way to the server and their ends (`ReadyForQuery`) on the way back,
//! and keeps the last transaction state. The driver sends two messages by itself: it closes a statement, and it rolls
//! back a dropped transaction. No caller waits for these, so they do not make a session busy.
//!
//! It also notes when a closure ends the pool's transaction. The answers show that exactly. Only for a request that was
//! not answered does the text count that was sent.
//!
//! The module is pure except for the atomics that publish the result. The tests are `activity/tests.rs`,
//! `activity/tests/ends.rs` and `tests/it/checkout/busy.rs`.

mod commits;
mod counter;
mod messages;
mod names;

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use tokio::sync::Notify;

use super::opening::{Opening, OpeningState};

pub(super) use self::counter::Counter;
pub(crate) use self::messages::POOLS_COMMIT;

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
    /// The number of tasks that wait for that.
    waiting: AtomicUsize,
    /// When the server last sent something, in milliseconds of the wall clock.
    heard_at: AtomicU64,
    /// The number of the last request that is the pool's own COMMIT.
    pools_commit: AtomicU64,
    /// The first [`TransactionEnd`] since the last call of [`Activity::watch`]. 0: none.
    first_end: AtomicU8,
    /// Since the last call of [`Activity::watch`], something was rolled back, and no text shows what.
    rolled_back_unseen: AtomicBool,
    /// Whether the server reports if new transactions are read-only by default, and whether they are now.
    reports_read_only: AtomicBool,
    is_read_only: AtomicBool,
    /// Whether they have been at some time since the last call of [`Activity::watch`].
    was_read_only: AtomicBool,
    /// The [`Unanswered`] of now.
    unanswered: AtomicU8,
    /// The server process of the session, as the log-in has shown it. 0 if it has not.
    pid: AtomicI32,
    /// Where signs of the server's life are noted.
    heard: OnceLock<Heard>,
    /// Everything that was sent is answered, what the driver sends by itself, too.
    all_answered: AtomicBool,
    /// A statement was sent that drops all prepared statements.
    deallocated: AtomicBool,
    /// The opening of the session's transaction, if it travels with the first request.
    opening: Opening,
}

/// A task that waits is counted as long as this lives.
struct Waits<'a>(&'a AtomicUsize);

impl<'a> Waits<'a> {
    fn on(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
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
        // Whoever counts itself first and then looks is notified of everything that it has not seen.
        let _waits = Waits::on(&self.waiting);
        // If the driver's task has not counted this one, this load sees its last store, and what it has published
        // before.
        let _ = self.dealt_with.load(Ordering::SeqCst);
        loop {
            let settled = self.settled.notified();
            if let Some(found) = look(self) {
                return found;
            }
            settled.await;
        }
    }

    pub(crate) fn check_out(&self) {
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
        self.notify();
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
        self.notify();
    }

    /// Notifies those who wait. Nearly always nobody does, and then this takes no lock.
    fn notify(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.settled.notify_waiters();
        }
    }

    /// When the server last sent something, in milliseconds of the wall clock. 0 if unknown.
    pub(crate) fn heard_at(&self) -> u64 {
        self.heard_at.load(Ordering::Relaxed)
    }

    pub(super) fn heard(&self, now: u64) {
        self.heard_at.store(now, Ordering::Relaxed);
    }

    /// The number of the last request that is the pool's own COMMIT. It changes when one is sent.
    pub(crate) fn pools_commit(&self) -> u64 {
        self.pools_commit.load(Ordering::Acquire)
    }

    /// Forgets how earlier transactions ended. Call this while no request is under way.
    pub(crate) fn watch(&self) {
        self.first_end.store(0, Ordering::Release);
        self.rolled_back_unseen.store(false, Ordering::Release);
        self.was_read_only.store(self.is_read_only.load(Ordering::Acquire), Ordering::Release);
    }

    /// Returns how a transaction has ended first since the last call of [`Self::watch`], as the answers show it. The
    /// pool's own COMMIT does not count.
    pub(crate) fn transaction_end(&self) -> Option<TransactionEnd> {
        [TransactionEnd::Committed, TransactionEnd::Prepared, TransactionEnd::RolledBack]
            .into_iter()
            .find(|end| *end as u8 == self.first_end.load(Ordering::Acquire))
    }

    /// Returns whether something was rolled back since the last call of [`Self::watch`], and no text shows whether it
    /// was the transaction or a part of it.
    pub(crate) fn has_rolled_back_unseen(&self) -> bool {
        self.rolled_back_unseen.load(Ordering::Acquire)
    }

    /// Returns whether the server reports if new transactions are read-only by default. PostgreSQL 14 and later do.
    pub(crate) fn tells_read_only(&self) -> bool {
        self.reports_read_only.load(Ordering::Acquire)
    }

    /// Returns whether new transactions were read-only by default at some time since the last call of [`Self::watch`].
    /// The server reports this before the end of the first request to which it applies.
    pub(crate) fn was_read_only(&self) -> bool {
        self.was_read_only.load(Ordering::Acquire)
    }

    /// Returns whether the server is in a transaction, and has answered everything that was sent.
    pub(crate) fn is_quiet_in_transaction(&self) -> bool {
        self.is_settled() && self.flags.load(Ordering::Acquire) == TRANSACTION && !self.is_condemned()
    }

    /// Returns whether the session is idle and has answered everything, also what the driver has sent by itself.
    pub(crate) fn is_silent(&self) -> bool {
        self.is_idle() == Some(true) && self.all_answered.load(Ordering::Acquire)
    }

    /// Returns whether a statement was sent since the last call that drops all prepared statements.
    pub(crate) fn take_deallocated(&self) -> bool {
        self.deallocated.load(Ordering::Acquire) && self.deallocated.swap(false, Ordering::AcqRel)
    }

    /// The opening of the session's transaction.
    pub(crate) fn opening(&self) -> &Opening {
        &self.opening
    }

    /// Returns whether a transaction's opening is left over. Nobody else may use such a session.
    pub(crate) fn has_opening(&self) -> bool {
        self.opening.state() != OpeningState::Absent
    }

    /// Returns what a request that was not answered may have done to the transaction.
    pub(crate) fn unanswered(&self) -> Unanswered {
        match self.unanswered.load(Ordering::Acquire) {
            0 => Unanswered::Nothing,
            1 => Unanswered::Commits,
            _ => Unanswered::GoesOn,
        }
    }

    /// Waits until each request is answered that may have ended the transaction, or the session has ended. Cancel-safe.
    pub(crate) async fn ends_are_answered(&self) {
        let answered = |this: &Self| this.unanswered() == Unanswered::Nothing || this.is_condemned();
        self.until(|this| answered(this).then_some(())).await;
    }

    /// Waits until the session has ended. Cancel-safe.
    pub(crate) async fn until_over(&self) {
        self.until(|this| this.is_condemned().then_some(())).await;
    }

    /// The server process of the session, as the log-in has shown it.
    pub(crate) fn pid(&self) -> Option<i32> {
        Some(self.pid.load(Ordering::Acquire)).filter(|pid| *pid != 0)
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

    pub(super) fn publish(&self, counter: &mut Counter) {
        let counts = &mut counter.counts;
        if let Some(end) = counts.end.take() {
            // Only the first one counts.
            let _ = self.first_end.compare_exchange(0, end as u8, Ordering::AcqRel, Ordering::Acquire);
        }
        if std::mem::take(&mut counts.rolled_back_unseen) {
            self.rolled_back_unseen.store(true, Ordering::Release);
        }
        if let Some(read_only) = counts.read_only.take() {
            self.reports_read_only.store(true, Ordering::Release);
            self.is_read_only.store(read_only, Ordering::Release);
            self.was_read_only.fetch_or(read_only, Ordering::AcqRel);
        }
        if std::mem::take(&mut counts.deallocated) {
            self.deallocated.store(true, Ordering::Release);
        }
        self.pid.store(counts.pid, Ordering::Release);
        self.pools_commit.store(counts.pools_commit, Ordering::Release);
        self.unanswered.store(counts.unanswered() as u8, Ordering::Release);
        self.all_answered.store(counter.is_all_answered(), Ordering::Release);
        self.flags.store(counter.flags(), Ordering::Release);
    }
}

/// How the answers show that a transaction has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum TransactionEnd {
    Committed = 1,
    Prepared = 2,
    RolledBack = 3,
}

/// What the requests that were not answered may have done to the transaction, by their text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Unanswered {
    Nothing = 0,
    /// They may have committed or prepared it, and done nothing after that.
    Commits = 1,
    /// They may have ended it in any way, and carried out other statements after that.
    GoesOn = 2,
}

#[cfg(test)]
mod tests;
