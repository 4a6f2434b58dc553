//! Decides when failed work runs again: the schedule of delays, the deadline, the number of attempts, the budget.
//! Knows nothing of whether a re-run is safe, and of clocks: the time is an argument. It names the public error for
//! the user's hooks alone, and looks into none.
//! Invariants: a delay never reaches beyond the deadline; no setting and no length of an outage panics or overflows;
//! the budget grants at most `burst + per_second × t + ratio × successes` re-runs without a wait in any time `t`.
//! Tests: at the end of this file, by property.

#[cfg(feature = "backoff")]
mod compat;
mod hooks;

pub use hooks::Retry;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::Instant;

use crate::random::SplitMix64;
use crate::sync::lock;

/// The longest wait and the most distant deadline, about thirty years. Longer settings count as this one, because points
/// in time and the timers of some platforms overflow beyond it.
pub(crate) const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);

/// A schedule of delays: how long to wait before each re-run of one call.
///
/// A schedule only says *how long*. Whether a re-run is safe is decided before it is asked, and the deadline and the
/// number of attempts of the [`RetryPolicy`] hold whatever it says: it can stop a call, and it cannot prolong one.
///
/// Every iterator of [`Duration`]s is a schedule, those of the `backon` crate among them.
///
/// ```
/// use std::time::Duration;
/// use tokio_postgres_failover::{Backoff, RetryPolicy};
///
/// /// Twice quickly, then once a second for as long as the deadline allows.
/// struct Patient(u32);
///
/// impl Backoff for Patient {
///     fn next_delay(&mut self) -> Option<Duration> {
///         self.0 += 1;
///         Some(Duration::from_millis(if self.0 <= 2 { 20 } else { 1000 }))
///     }
/// }
///
/// let own = RetryPolicy::new().schedule(|| Patient(0));
/// let iterator = RetryPolicy::new().schedule(|| [10, 50, 250].map(Duration::from_millis).into_iter());
/// # let _ = (own, iterator);
/// ```
pub trait Backoff: Send {
    /// The wait before the next re-run; `None` ends the call with the error of its last attempt.
    ///
    /// Asked once per failed attempt, on one call's own schedule, so the state in `self` is that call's alone.
    fn next_delay(&mut self) -> Option<Duration>;
}

impl<I: Iterator<Item = Duration> + Send> Backoff for I {
    fn next_delay(&mut self) -> Option<Duration> {
        self.next()
    }
}

/// Delays that grow by a factor up to a limit, and never end: the schedule a [`RetryPolicy`] uses by itself.
///
/// Named here for those who build a schedule of their own on top of it, as an iterator:
///
/// ```
/// use std::time::Duration;
/// use tokio_postgres_failover::{Exponential, RetryPolicy};
///
/// let delays = Exponential::new(Duration::from_millis(10), 2.0, Duration::from_millis(50));
/// let millis: Vec<_> = delays.take(4).map(|delay| delay.as_millis()).collect();
/// assert_eq!(millis, [10, 20, 40, 50]);
///
/// // The first re-run at once, then as usual.
/// let policy = RetryPolicy::new().schedule(|| {
///     let later = Exponential::new(Duration::from_millis(10), 2.0, Duration::from_secs(1)).jitter(7);
///     std::iter::once(Duration::ZERO).chain(later)
/// });
/// # let _ = policy;
/// ```
#[derive(Clone, Debug)]
pub struct Exponential {
    next: Duration,
    factor: f64,
    max: Duration,
    jitter: Option<SplitMix64>,
}

impl Exponential {
    /// `initial`, then each delay `factor` times the one before, none longer than `max`; no jitter.
    ///
    /// A factor below 1 (or no number at all) counts as 1: every delay is `initial`.
    #[must_use]
    pub fn new(initial: Duration, factor: f64, max: Duration) -> Self {
        Self { next: initial.min(max), factor: factor.max(1.0), max, jitter: None }
    }

    /// Makes each delay a random one between zero and what it would have been ("full jitter"), drawn from `seed`.
    ///
    /// After an outage many calls wait at once; with jitter they come back spread out and not in waves. That needs
    /// another seed for each of them: the same seed gives the same delays.
    #[must_use]
    pub fn jitter(mut self, seed: u64) -> Self {
        self.jitter = Some(SplitMix64::new(seed));
        self
    }
}

impl Iterator for Exponential {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let delay = self.next;
        // Out of range means "longer than any limit", however the multiplication came to that.
        self.next = Duration::try_from_secs_f64(delay.as_secs_f64() * self.factor).unwrap_or(self.max).min(self.max);
        Some(match &mut self.jitter {
            Some(generator) => generator.up_to(delay),
            None => delay,
        })
    }
}

type MakeBackoff = dyn Fn() -> Box<dyn Backoff> + Send + Sync;

/// How long one call goes on, how often it is run, and how long it waits in between.
///
/// It governs *willingness* only. Whether a piece of work may be run again at all (did the commit land?) is never up
/// to a policy, so none can make a write happen twice. The policy of a call, given by
/// [`TransactionBuilder::retry`](crate::TransactionBuilder::retry), replaces that of the pool as a whole;
/// [`Pool::retry_policy`](crate::Pool::retry_policy) has the pool's, to start from.
///
/// Three presets say what they are for; change what you like in them:
///
/// | preset | for | deadline | attempt | delays | in an outage |
/// |---|---|---|---|---|---|
/// | [`interactive`](Self::interactive) | somebody waits for the answer | 5 s | 5 s | 10 ms … 250 ms | rides short ones out, tells of long ones |
/// | [`batch`](Self::batch) | nobody does | 10 min | no limit | 100 ms … 10 s | sits it out, and leaves the new primary to others |
/// | [`none`](Self::none) | your own loop | 30 s | no limit | – | the first failure comes back |
///
/// What [`new`](Self::new) sets:
///
/// | setting | default |
/// |---|---|
/// | [`initial_delay`](Self::initial_delay) | 10 ms |
/// | [`factor`](Self::factor) | 2 |
/// | [`max_delay`](Self::max_delay) | 1 s |
/// | [`jitter`](Self::jitter) | full |
/// | [`deadline`](Self::deadline) | 30 s |
/// | [`attempts`](Self::attempts) | no limit |
/// | [`attempt_timeout`](Self::attempt_timeout) | no limit |
/// | [`classify`](Self::classify), [`on_retry`](Self::on_retry) | none |
///
/// Values that make no sense together are refused when the pool is built.
///
/// ```
/// use std::time::Duration;
/// use tokio_postgres_failover::RetryPolicy;
///
/// // A web request, with three seconds instead of five.
/// let web = RetryPolicy::interactive().deadline(Duration::from_secs(3));
/// // A nightly job that sits out an hour.
/// let batch = RetryPolicy::batch().deadline(Duration::from_secs(3600));
/// // No re-runs: the first error comes back.
/// let once = RetryPolicy::none();
/// # let _ = (web, batch, once);
/// ```
#[derive(Clone)]
pub struct RetryPolicy {
    initial_delay: Duration,
    factor: f64,
    max_delay: Duration,
    jitter: bool,
    seed: Option<u64>,
    deadline: Duration,
    attempts: Option<u32>,
    attempt_timeout: Option<Duration>,
    schedule: Option<Arc<MakeBackoff>>,
    hooks: hooks::Hooks,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for RetryPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("RetryPolicy");
        out.field("deadline", &self.deadline)
            .field("attempts", &self.attempts)
            .field("attempt_timeout", &self.attempt_timeout)
            .field("hooks", &self.hooks);
        if self.schedule.is_some() {
            return out.field("schedule", &"own").finish_non_exhaustive();
        }
        out.field("initial_delay", &self.initial_delay)
            .field("factor", &self.factor)
            .field("max_delay", &self.max_delay)
            .field("jitter", &self.jitter)
            .field("seed", &self.seed)
            .finish()
    }
}

impl RetryPolicy {
    /// The defaults of the table above.
    #[must_use]
    pub fn new() -> Self {
        Self {
            initial_delay: Duration::from_millis(10),
            factor: 2.0,
            max_delay: Duration::from_secs(1),
            jitter: true,
            seed: None,
            deadline: Duration::from_secs(30),
            attempts: None,
            attempt_timeout: None,
            schedule: None,
            hooks: hooks::Hooks::default(),
        }
    }

    /// For work that somebody waits for: five seconds for everything, no attempt longer than five seconds, and short
    /// delays, so that a call goes on within a quarter of a second of the end of an outage.
    ///
    /// A failover that takes longer is told as an error while the user is still there to see it. An attempt that begins
    /// in the last moment may still take its five seconds, and a COMMIT without an answer is looked into for five more.
    /// [`PoolBuilder::checkout_timeout`](crate::PoolBuilder::checkout_timeout) is for `get`, and for what a transaction waits
    /// while all connections are in use; it is a setting of its own.
    #[must_use]
    pub fn interactive() -> Self {
        let limit = Duration::from_secs(5);
        Self::new().deadline(limit).attempt_timeout(limit).max_delay(Duration::from_millis(250))
    }

    /// For work that nobody waits for: ten minutes, longer than the failovers of all set-ups that the README names, and
    /// long delays, so that a server which was just promoted serves the users first.
    #[must_use]
    pub fn batch() -> Self {
        Self::new()
            .deadline(Duration::from_secs(600))
            .initial_delay(Duration::from_millis(100))
            .max_delay(Duration::from_secs(10))
    }

    /// One attempt and no re-run. The [`deadline`](Self::deadline) still bounds that attempt's wait for a connection.
    #[must_use]
    pub fn none() -> Self {
        Self::new().attempts(1)
    }

    /// Upper bound of the wait before the first re-run. Default: 10 ms.
    ///
    /// A failover takes from tens of milliseconds to a minute. A small value costs a few attempts in vain, each of
    /// which waits for the primary anyhow; a large one is waited in full even where one lost connection was all that
    /// happened. Zero stays zero whatever the [`factor`](Self::factor): each re-run follows at once.
    #[must_use]
    pub fn initial_delay(mut self, initial_delay: Duration) -> Self {
        self.initial_delay = initial_delay;
        self
    }

    /// By how much each delay exceeds the one before. Default: 2. Must be finite and at least 1.
    ///
    /// The larger, the sooner a long outage is met with [`max_delay`](Self::max_delay) between attempts; 1 keeps the
    /// delay as it is.
    #[must_use]
    pub fn factor(mut self, factor: f64) -> Self {
        self.factor = factor;
        self
    }

    /// Upper bound of every wait. Default: 1 s. Must not be below [`initial_delay`](Self::initial_delay).
    ///
    /// It is also about how much later than the server a waiting call notices the end of an outage.
    #[must_use]
    pub fn max_delay(mut self, max_delay: Duration) -> Self {
        self.max_delay = max_delay;
        self
    }

    /// Whether each wait is drawn at random between zero and its upper bound. Default: `true`.
    ///
    /// Without it, calls that failed together come back together, and meet a promoted server as one wave.
    #[must_use]
    pub fn jitter(mut self, jitter: bool) -> Self {
        self.jitter = jitter;
        self
    }

    /// Draws the jitter from `seed`, the same for every call. Default: another one for each call.
    ///
    /// For tests that must see the same delays again. In a service it would undo what jitter is for.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// How long one call may take in all: waits for a connection, attempts, delays. Default: 30 s. Must not be zero.
    ///
    /// When the next wait would reach it, the call ends at once with its last error. Set it above the time a failover
    /// takes in your set-up to ride failovers out, below it to hear of them. More than 30 years count as 30 years.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// How often the work is run at most, the first run included. Default: no limit but the deadline. Must not be 0.
    ///
    /// A limit bounds what a call that fails for its own reasons costs. For an outage the deadline is the better
    /// bound: ten attempts may be over long before a standby is promoted.
    #[must_use]
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.attempts = Some(attempts);
        self
    }

    /// Takes the delays from a schedule of your own; `make` is called once for each call. Default: [`Exponential`].
    ///
    /// It replaces `initial_delay`, `factor`, `max_delay`, `jitter` and `seed`; `deadline` and `attempts` still hold.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tokio_postgres_failover::RetryPolicy;
    ///
    /// let steady = RetryPolicy::new().schedule(|| std::iter::repeat(Duration::from_millis(200)).take(20));
    /// # let _ = steady;
    /// ```
    #[must_use]
    pub fn schedule<B>(mut self, make: impl Fn() -> B + Send + Sync + 'static) -> Self
    where
        B: Backoff + 'static,
    {
        self.schedule = Some(Arc::new(move || Box::new(make())));
        self
    }

    /// How long one attempt may take from its BEGIN to its COMMIT. Default: no limit.
    ///
    /// An attempt that takes longer ends with [`Error::TimedOut`](crate::Error::TimedOut): the server is told to stop what it
    /// runs, the connection is closed, locks are freed, nothing is committed, and it is not run again. COMMIT itself is
    /// not cut off, as that would make its outcome unknown. For a limit on each statement set PostgreSQL's own
    /// `statement_timeout`, as in `options=-c statement_timeout=5s` of the connection string.
    ///
    /// The pool's own COMMIT is meant. What a closure has committed by itself, with a COMMIT of its own before the limit was
    /// over, stays committed, and the error does not tell: leave COMMIT to the pool.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tokio_postgres_failover::RetryPolicy;
    ///
    /// let policy = RetryPolicy::new().attempt_timeout(Duration::from_secs(5));
    /// # let _ = policy;
    /// ```
    #[must_use]
    pub fn attempt_timeout(mut self, timeout: Duration) -> Self {
        self.attempt_timeout = Some(timeout);
        self
    }

    /// The limit set by [`attempt_timeout`](Self::attempt_timeout), if any.
    pub(crate) fn attempt_limit(&self) -> Option<Duration> {
        self.attempt_timeout.map(|limit| limit.min(FAR))
    }

    /// The time one call may take, as set by [`deadline`](Self::deadline).
    #[must_use]
    pub fn deadline_after(&self) -> Duration {
        self.deadline
    }

    /// The limit set by [`attempts`](Self::attempts), if any.
    #[must_use]
    pub fn max_attempts(&self) -> Option<u32> {
        self.attempts
    }

    /// Whether the settings make sense together; if not, what to change.
    pub(crate) fn validate(&self) -> Result<(), String> {
        if self.deadline.is_zero() {
            return Err("the retry deadline is zero, so no call could ever succeed".into());
        }
        if self.attempt_timeout.is_some_and(|timeout| timeout.is_zero()) {
            return Err("the attempt time-out is zero, so no attempt could ever succeed".into());
        }
        if self.attempts == Some(0) {
            return Err("attempts counts the first run, so it must be at least 1".into());
        }
        if self.schedule.is_some() {
            return Ok(());
        }
        if !self.factor.is_finite() || self.factor < 1.0 {
            return Err(format!("the retry factor must be finite and at least 1, and is {}", self.factor));
        }
        if self.max_delay < self.initial_delay {
            return Err(format!("max_delay ({:?}) is below initial_delay ({:?})", self.max_delay, self.initial_delay));
        }
        Ok(())
    }

    /// Starts one call at `now`. `seed` must differ from call to call; a seed of the policy's own goes before it.
    pub(crate) fn start(&self, now: Instant, seed: u64) -> Retries {
        let schedule = if let Some(make) = &self.schedule {
            make()
        } else {
            let delays = Exponential::new(self.initial_delay, self.factor, self.max_delay);
            if self.jitter { Box::new(delays.jitter(self.seed.unwrap_or(seed))) } else { Box::new(delays) }
        };
        Retries {
            schedule,
            began: now,
            deadline: now.checked_add(self.deadline.min(FAR)).unwrap_or(now),
            attempt: 1,
            attempts: self.attempts,
            failed_at: None,
        }
    }
}

/// One call under a [`RetryPolicy`]: which attempt it is at, and until when it may go on.
pub(crate) struct Retries {
    schedule: Box<dyn Backoff>,
    began: Instant,
    deadline: Instant,
    attempt: u32,
    attempts: Option<u32>,
    /// When the attempt under way failed, if that was noticed before it was known what it had come to.
    failed_at: Option<Instant>,
}

impl Retries {
    /// The moment at which the call is over.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// The attempt under way; the first is 1.
    pub(crate) fn attempt(&self) -> u32 {
        self.attempt
    }

    /// The attempt under way failed at this moment; its delay is counted from here, whenever [`Self::next`] is asked.
    pub(crate) fn failed(&mut self, at: Instant) {
        self.failed_at = Some(at);
    }

    /// The attempt under way has failed, at `now` unless [`Self::failed`] said when: how long to wait before the next, or why
    /// there is none.
    ///
    /// A token taken from `budget` stays taken on `Ok`, and is given back on `Err`.
    pub(crate) fn next(&mut self, now: Instant, budget: &RetryBudget) -> Result<Duration, GiveUp> {
        if self.attempts.is_some_and(|limit| self.attempt >= limit) {
            return Err(GiveUp::Attempts(self.attempt));
        }
        let passed = self.failed_at.take().map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let delay = self.schedule.next_delay().ok_or(GiveUp::Schedule)?.saturating_sub(passed);
        // An attempt that starts at the deadline has no time left, so `>=`.
        let left = self.deadline.saturating_duration_since(now);
        if delay >= left {
            return Err(GiveUp::Deadline);
        }
        let wait = budget.withdraw(now);
        if wait >= left {
            budget.refund();
            return Err(GiveUp::Budget);
        }
        self.attempt = self.attempt.saturating_add(1);
        Ok(delay.max(wait))
    }
}

impl fmt::Debug for Retries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Retries")
            .field("deadline", &self.deadline)
            .field("attempt", &self.attempt)
            .field("attempts", &self.attempts)
            .finish_non_exhaustive()
    }
}

/// Why a call is not run again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GiveUp {
    /// The policy's number of attempts (this many) is used up.
    Attempts(u32),
    /// The next delay would reach the deadline.
    Deadline,
    /// The user's schedule ended.
    Schedule,
    /// The pool's budget has no re-run to give before the deadline.
    Budget,
    /// The user's hook said stop.
    Hook,
}

impl fmt::Display for GiveUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attempts(1) => f.write_str("the policy allows one attempt"),
            Self::Attempts(count) => write!(f, "the policy allows {count} attempts"),
            Self::Deadline => f.write_str("the deadline is reached before another attempt"),
            Self::Schedule => f.write_str("the retry schedule has ended"),
            Self::Budget => f.write_str("the retry budget grants no attempt before the deadline"),
            Self::Hook => f.write_str("the policy's on_retry said stop"),
        }
    }
}

/// A bound on the re-runs of all calls of one pool together, so that an outage does not multiply the load.
///
/// It is a bucket of tokens. A re-run takes one; `per_second` of them flow back, a call that succeeds puts back a
/// fraction of one ([`ratio`](Self::ratio)), and it holds `burst` at most. When it is empty a re-run is not refused
/// but waits for its turn; only a call whose turn would come after its deadline ends, with its last error. First runs
/// take no token, so a healthy pool never notices the budget.
///
/// Clones share one bucket: give the same budget to several pools to bound them together.
///
/// Default: 200 at once, then 500 per second. With these, 2,000 calls that fail in the same instant all run again
/// within four seconds.
///
/// ```
/// use tokio_postgres_failover::RetryBudget;
///
/// // A small server: after an outage, at most 20 re-runs at once and then 10 per second.
/// let budget = RetryBudget::new(20, 10).ratio(0.1);
/// # let _ = budget;
/// ```
#[derive(Clone, Debug)]
pub struct RetryBudget {
    ratio: f64,
    /// `None` has no limit.
    bucket: Option<Arc<Mutex<Bucket>>>,
}

#[derive(Debug)]
struct Bucket {
    burst: f64,
    per_second: f64,
    /// Below zero by as many as are promised to calls that wait.
    tokens: f64,
    /// Up to when the flow of tokens is counted in.
    counted_to: Option<Instant>,
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self::new(200, 500)
    }
}

impl RetryBudget {
    /// A full bucket of `burst` tokens, into which `per_second` of them flow back.
    ///
    /// With `per_second` zero, re-runs beyond `burst` are earned by successes alone.
    #[must_use]
    pub fn new(burst: u32, per_second: u32) -> Self {
        let burst = f64::from(burst);
        Self {
            ratio: 0.2,
            bucket: Some(Arc::new(Mutex::new(Bucket {
                burst,
                per_second: f64::from(per_second),
                tokens: burst,
                counted_to: None,
            }))),
        }
    }

    /// Every re-run is granted at once: only each call's own delays hold it back.
    #[must_use]
    pub fn unlimited() -> Self {
        Self { ratio: 0.0, bucket: None }
    }

    /// Tokens put back by a call that succeeds. Default: 0.2, so that a fifth of the traffic may be re-runs.
    ///
    /// A negative value or one that is no number counts as 0.
    #[must_use]
    pub fn ratio(mut self, ratio: f64) -> Self {
        self.ratio = ratio.max(0.0);
        self
    }

    /// Takes a token for a re-run at `now`, one yet to come if need be, and tells how long until it is there.
    pub(crate) fn withdraw(&self, now: Instant) -> Duration {
        let Some(mut bucket) = self.lock() else {
            return Duration::ZERO;
        };
        let before = bucket.counted_to.unwrap_or(now);
        let flowed = now.saturating_duration_since(before).as_secs_f64() * bucket.per_second;
        bucket.add(flowed);
        // Calls read the clock before they get here, so an earlier `now` may come later.
        bucket.counted_to = Some(before.max(now));
        bucket.tokens -= 1.0;
        if bucket.tokens >= 0.0 {
            return Duration::ZERO;
        }
        // Nothing flows in: no number of seconds is enough.
        Duration::try_from_secs_f64(-bucket.tokens / bucket.per_second).unwrap_or(Duration::MAX)
    }

    /// A call succeeded.
    pub(crate) fn deposit(&self) {
        if let Some(mut bucket) = self.lock() {
            bucket.add(self.ratio);
        }
    }

    /// Gives back a token of [`withdraw`](Self::withdraw) that is not used after all.
    pub(crate) fn refund(&self) {
        if let Some(mut bucket) = self.lock() {
            bucket.add(1.0);
        }
    }

    fn lock(&self) -> Option<MutexGuard<'_, Bucket>> {
        Some(lock(self.bucket.as_ref()?))
    }
}

impl Bucket {
    fn add(&mut self, tokens: f64) {
        self.tokens = (self.tokens + tokens).min(self.burst);
    }
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use proptest::prelude::*;

    use super::*;
    use crate::error::{CommitOutcome, Error};

    const SECOND: Duration = Duration::from_secs(1);

    fn millis(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    /// Any duration, the absurd ones as often as the common ones.
    fn durations() -> impl Strategy<Value = Duration> {
        prop_oneof![
            (0..5_000_u64).prop_map(Duration::from_millis),
            (any::<u64>(), 0..1_000_000_000_u32).prop_map(|(secs, nanos)| Duration::new(secs, nanos)),
            Just(Duration::ZERO),
            Just(Duration::from_nanos(1)),
            Just(Duration::MAX),
        ]
    }

    fn factors() -> impl Strategy<Value = f64> {
        prop_oneof![
            1.0..10.0_f64,
            any::<f64>(),
            Just(f64::MAX),
            Just(f64::INFINITY),
            Just(f64::NAN),
            Just(0.0),
            Just(-1.0),
        ]
    }

    fn policies() -> impl Strategy<Value = RetryPolicy> {
        (
            (durations(), factors(), durations(), any::<bool>()),
            (proptest::option::of(any::<u64>()), durations(), proptest::option::of(0..20_u32)),
        )
            .prop_map(|((initial, factor, max, jitter), (seed, deadline, attempts))| {
                let mut policy = RetryPolicy::new()
                    .initial_delay(initial)
                    .factor(factor)
                    .max_delay(max)
                    .jitter(jitter)
                    .deadline(deadline);
                if let Some(seed) = seed {
                    policy = policy.seed(seed);
                }
                if let Some(attempts) = attempts {
                    policy = policy.attempts(attempts);
                }
                policy
            })
    }

    proptest! {
        #[test]
        fn delays_stay_below_max_and_jitter_below_the_delay(
            initial in durations(), factor in factors(), max in durations(), seed: u64,
        ) {
            let plain = Exponential::new(initial, factor, max);
            let jittered = plain.clone().jitter(seed);
            let mut before = Duration::ZERO;
            for (plain, jittered) in plain.zip(jittered).take(200) {
                prop_assert!(plain <= max);
                prop_assert!(jittered <= plain);
                // Growing, but for the last digit of a floating-point number.
                prop_assert!(before.saturating_sub(plain) <= before / 1_000_000);
                before = plain;
            }
        }

        #[test]
        fn the_same_seed_gives_the_same_delays(policy in policies(), own: u64, a: u64, b: u64) {
            let now = Instant::now();
            let delays = |policy: &RetryPolicy, seed| {
                let mut retries = policy.start(now, seed);
                let budget = RetryBudget::unlimited();
                (0..20).map(|_| retries.next(now, &budget)).collect::<Vec<_>>()
            };
            prop_assert_eq!(delays(&policy, a), delays(&policy, a));
            let seeded = policy.seed(own);
            prop_assert_eq!(delays(&seeded, a), delays(&seeded, b));
        }

        /// Whatever the policy and the time each attempt takes.
        #[test]
        fn no_wait_reaches_the_deadline_and_no_attempt_is_one_too_many(
            policy in policies(),
            work in proptest::collection::vec(durations(), 1..60),
            burst in 0..5_u32,
            per_second in 0..20_u32,
        ) {
            let mut now = Instant::now();
            let budget = RetryBudget::new(burst, per_second);
            let mut retries = policy.start(now, 1);
            prop_assert_eq!(retries.attempt(), 1);
            for work in work {
                let Some(after) = now.checked_add(work.min(FAR)) else { break };
                now = after;
                let attempt = retries.attempt();
                match retries.next(now, &budget) {
                    Ok(delay) => {
                        prop_assert!(now + delay < retries.deadline());
                        prop_assert_eq!(retries.attempt(), attempt + 1);
                        prop_assert!(policy.max_attempts().is_none_or(|limit| attempt < limit));
                        now += delay;
                    }
                    Err(GiveUp::Attempts(count)) => {
                        prop_assert_eq!(count, attempt);
                        prop_assert!(policy.max_attempts().is_some_and(|limit| attempt >= limit));
                        break;
                    }
                    Err(_) => prop_assert_eq!(retries.attempt(), attempt),
                }
            }
        }

        /// In every window, not only from the start.
        #[test]
        fn the_budget_grants_no_more_than_it_says(
            burst in 0..10_u32,
            per_second in 0..50_u32,
            ratio in 0.0..1.5_f64,
            steps in proptest::collection::vec((0..200_u64, 0..3_u32, 0..4_u32), 1..60),
        ) {
            let budget = RetryBudget::new(burst, per_second).ratio(ratio);
            let start = Instant::now();
            let mut now = start;
            let mut events = Vec::new();
            for (pause, successes, withdrawals) in steps {
                now += millis(pause);
                for _ in 0..successes {
                    budget.deposit();
                }
                let granted = (0..withdrawals).filter(|_| budget.withdraw(now).is_zero()).count();
                events.push((now, successes, u32::try_from(granted).unwrap()));
            }
            for (from, &(begin, ..)) in events.iter().enumerate() {
                let (mut granted, mut successes) = (0, 0);
                for &(end, more, also) in &events[from..] {
                    successes += more;
                    granted += also;
                    let bound = f64::from(burst)
                        + f64::from(per_second) * (end - begin).as_secs_f64()
                        + ratio * f64::from(successes);
                    prop_assert!(f64::from(granted) <= bound + 1e-6);
                }
            }
        }

        #[test]
        fn a_budget_never_panics(
            burst: u32, per_second: u32, ratio: f64, steps in proptest::collection::vec((any::<u32>(), 0..4_u8), 0..40),
        ) {
            let budget = RetryBudget::new(burst, per_second).ratio(ratio);
            let start = Instant::now();
            for (second, what) in steps {
                // Not in order: calls read the clock before they take the lock.
                let now = start + Duration::from_secs(u64::from(second));
                match what {
                    0 => budget.deposit(),
                    1 => budget.refund(),
                    _ => drop(budget.withdraw(now)),
                }
            }
        }
    }

    #[test]
    fn presets_are_as_documented() {
        let now = Instant::now();
        let delays = |policy: RetryPolicy| {
            assert_eq!(policy.validate(), Ok(()));
            let mut retries = policy.jitter(false).start(now, 0);
            let delays = (0..9).map(|_| retries.next(now, &RetryBudget::unlimited()));
            delays.map_while(Result::ok).map(|delay| delay.as_millis()).collect::<Vec<_>>()
        };
        assert_eq!(delays(RetryPolicy::interactive()), [10, 20, 40, 80, 160, 250, 250, 250, 250]);
        assert_eq!(delays(RetryPolicy::batch()), [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        assert_eq!(delays(RetryPolicy::none()), [] as [u128; 0]);
        let limits = |policy: RetryPolicy| (policy.deadline_after(), policy.attempt_timeout);
        assert_eq!(limits(RetryPolicy::interactive()), (5 * SECOND, Some(5 * SECOND)));
        assert_eq!(limits(RetryPolicy::batch()), (600 * SECOND, None));
        assert_eq!(limits(RetryPolicy::none()), (30 * SECOND, None));
    }

    #[test]
    fn a_hook_sees_the_retry_and_its_no_gives_the_token_back() {
        let now = Instant::now();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let policy = RetryPolicy::new().jitter(false).on_retry({
            let seen = Arc::clone(&seen);
            move |retry| {
                assert!(matches!(retry.cause(), Error::Closed));
                seen.lock().unwrap().push((retry.attempt(), retry.delay(), retry.commit_outcome()));
                if retry.attempt() < 2 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            }
        });
        assert!(format!("{policy:?}").contains("on_retry: true"), "{policy:?}");
        let budget = RetryBudget::new(2, 0);
        let mut retries = policy.start(now, 0);
        for (outcome, allowed) in [(CommitOutcome::NotCommitted, true), (CommitOutcome::Unknown, false)] {
            let delay = retries.next(now, &budget).unwrap();
            assert_eq!(policy.allows(&Retry::new(&retries, &Error::Closed, delay, outcome), &budget), allowed);
        }
        let expected = [(1, millis(10), CommitOutcome::NotCommitted), (2, millis(20), CommitOutcome::Unknown)];
        assert_eq!(*seen.lock().unwrap(), expected);
        // Two were there, one was used.
        assert_eq!(budget.withdraw(now), Duration::ZERO);
        assert_eq!(budget.withdraw(now), Duration::MAX);
    }

    #[test]
    fn defaults_are_as_documented() {
        let now = Instant::now();
        let policy = RetryPolicy::default();
        assert_eq!(policy.validate(), Ok(()));
        assert_eq!(policy.deadline_after(), 30 * SECOND);
        assert_eq!(policy.max_attempts(), None);
        let mut retries = policy.clone().jitter(false).start(now, 0);
        assert_eq!(retries.deadline(), now + 30 * SECOND);
        let delays: Vec<_> = (0..9).map(|_| retries.next(now, &RetryBudget::default()).unwrap().as_millis()).collect();
        assert_eq!(delays, [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        assert!(format!("{policy:?}").contains("initial_delay: 10ms"));
    }

    #[test]
    fn jitter_spreads_over_the_whole_range() {
        let (mut low, mut high) = (0, 0);
        for seed in 0..1000 {
            let delay = Exponential::new(SECOND, 1.0, SECOND).jitter(seed).next().unwrap();
            low += u32::from(delay < SECOND / 4);
            high += u32::from(delay > SECOND * 3 / 4);
        }
        assert!((200..300).contains(&low) && (200..300).contains(&high), "{low}, {high}");
    }

    #[test]
    fn calls_without_a_seed_of_the_policy_differ() {
        let now = Instant::now();
        let first = |seed| {
            let mut retries = RetryPolicy::new().start(now, seed);
            retries.next(now, &RetryBudget::unlimited()).unwrap()
        };
        let mut all: Vec<_> = (0..100).map(first).collect();
        all.sort();
        all.dedup();
        assert!(all.len() > 95, "{}", all.len());
    }

    #[test]
    fn attempts_count_the_first_run() {
        let now = Instant::now();
        let budget = RetryBudget::unlimited();
        let mut once = RetryPolicy::none().start(now, 0);
        assert_eq!(once.next(now, &budget), Err(GiveUp::Attempts(1)));
        let mut thrice = RetryPolicy::new().attempts(3).start(now, 0);
        assert!(thrice.next(now, &budget).is_ok());
        assert!(thrice.next(now, &budget).is_ok());
        assert_eq!(thrice.next(now, &budget), Err(GiveUp::Attempts(3)));
        assert_eq!(thrice.attempt(), 3);
    }

    #[test]
    fn the_deadline_ends_a_call_before_a_wait_in_vain() {
        let now = Instant::now();
        let budget = RetryBudget::new(1, 0);
        let policy = RetryPolicy::new().jitter(false).initial_delay(millis(100));
        let mut retries = policy.deadline(SECOND).start(now, 0);
        assert_eq!(retries.next(now + millis(900), &budget), Err(GiveUp::Deadline));
        // It took no token: there is one still.
        assert_eq!(budget.withdraw(now), Duration::ZERO);
        assert_eq!(budget.withdraw(now), Duration::MAX);
        let mut late = RetryPolicy::new().start(now, 0);
        assert_eq!(late.next(now + 31 * SECOND, &budget), Err(GiveUp::Deadline));
    }

    #[test]
    fn a_schedule_of_ones_own() {
        let now = Instant::now();
        let policy = RetryPolicy::new().schedule(|| [5, 7].map(millis).into_iter());
        let budget = RetryBudget::unlimited();
        // Each call has its own.
        for _ in 0..2 {
            let mut retries = policy.start(now, 0);
            assert_eq!(retries.next(now, &budget), Ok(millis(5)));
            assert_eq!(retries.next(now, &budget), Ok(millis(7)));
            assert_eq!(retries.next(now, &budget), Err(GiveUp::Schedule));
        }
        assert!(format!("{policy:?}").contains("own"));
        // It may stop a call, never prolong one.
        let policy = policy.schedule(|| std::iter::repeat(Duration::MAX));
        assert_eq!(policy.start(now, 0).next(now, &budget), Err(GiveUp::Deadline));
    }

    #[test]
    fn a_delay_is_counted_from_the_failure_and_the_budgets_turn_is_not() {
        let now = Instant::now();
        let policy = RetryPolicy::new().initial_delay(millis(100)).jitter(false);
        let after = |elapsed| {
            let mut retries = policy.start(now, 0);
            retries.failed(now);
            retries.next(now + elapsed, &RetryBudget::unlimited())
        };
        assert_eq!(after(millis(30)), Ok(millis(70)));
        assert_eq!(after(SECOND), Ok(Duration::ZERO));
        let budget = RetryBudget::new(1, 10);
        budget.withdraw(now + SECOND);
        let mut retries = policy.start(now, 0);
        retries.failed(now);
        assert_eq!(retries.next(now + SECOND, &budget), Ok(millis(100)));
        assert_eq!(retries.next(now + SECOND, &RetryBudget::unlimited()), Ok(millis(200)), "of this failure alone");
    }

    #[test]
    fn an_empty_budget_spaces_calls_out() {
        let now = Instant::now();
        let budget = RetryBudget::new(2, 10);
        let waits: Vec<_> = (0..5).map(|_| budget.withdraw(now).as_millis()).collect();
        assert_eq!(waits, [0, 0, 100, 200, 300]);
        // The three promised ones are due first.
        assert_eq!(budget.withdraw(now + millis(300)), millis(100));
        // The longer of the two waits counts.
        let policy = RetryPolicy::new().jitter(false);
        let mut retries = policy.start(now, 0);
        assert_eq!(retries.next(now + millis(300), &budget), Ok(millis(200)));
        let mut retries = policy.initial_delay(SECOND).start(now, 0);
        assert_eq!(retries.next(now + millis(300), &budget), Ok(SECOND));
    }

    #[test]
    fn a_budget_that_cannot_pay_in_time_keeps_its_tokens() {
        let now = Instant::now();
        let budget = RetryBudget::new(1, 1);
        let policy = RetryPolicy::new().deadline(SECOND).jitter(false);
        assert!(policy.start(now, 0).next(now, &budget).is_ok());
        for _ in 0..100 {
            assert_eq!(policy.start(now, 0).next(now, &budget), Err(GiveUp::Budget));
        }
        assert_eq!(budget.withdraw(now), SECOND);
    }

    #[test]
    fn successes_pay_back_and_clones_share() {
        let now = Instant::now();
        let budget = RetryBudget::new(1, 0).ratio(0.5);
        let other = budget.clone();
        assert_eq!(budget.withdraw(now), Duration::ZERO);
        other.deposit();
        other.deposit();
        assert_eq!(budget.withdraw(now), Duration::ZERO);
        // The bucket does not overflow.
        (0..100).for_each(|_| other.deposit());
        assert_eq!(budget.withdraw(now), Duration::ZERO);
        assert_eq!(budget.withdraw(now), Duration::MAX);
    }

    #[test]
    fn a_clock_read_late_earns_nothing_twice() {
        let early = Instant::now();
        let late = early + SECOND;
        let budget = RetryBudget::new(1, 10);
        let waits = [late, early, late].map(|now| budget.withdraw(now));
        assert_eq!(waits, [0, 100, 200].map(millis));
    }

    #[test]
    fn a_ratio_below_zero_takes_nothing() {
        for ratio in [-5.0, f64::NAN, f64::NEG_INFINITY] {
            let budget = RetryBudget::new(1, 0).ratio(ratio);
            budget.deposit();
            assert_eq!(budget.withdraw(Instant::now()), Duration::ZERO);
        }
    }

    #[test]
    fn what_overflows_is_the_limit() {
        let mut delays = Exponential::new(SECOND, f64::MAX, 9 * SECOND);
        assert_eq!(delays.next(), Some(SECOND));
        assert_eq!(delays.next(), Some(9 * SECOND));
        let now = Instant::now();
        let retries = RetryPolicy::new().deadline(Duration::MAX).start(now, 0);
        assert_eq!(retries.deadline(), now + FAR);
    }

    #[test]
    fn unlimited_is() {
        let now = Instant::now();
        let budget = RetryBudget::unlimited();
        assert!((0..10_000).all(|_| budget.withdraw(now).is_zero()));
    }

    #[test]
    fn two_thousand_calls_get_through_the_default_budget() {
        let now = Instant::now();
        let budget = RetryBudget::default();
        let longest = (0..2000).map(|_| budget.withdraw(now)).max().unwrap();
        assert!(longest > 3 * SECOND && longest < 4 * SECOND, "{longest:?}");
    }

    #[test]
    fn nonsense_is_refused() {
        let complaints = [
            (RetryPolicy::new().deadline(Duration::ZERO), "deadline"),
            (RetryPolicy::new().attempts(0), "attempts"),
            (RetryPolicy::new().factor(0.5), "factor"),
            (RetryPolicy::new().factor(f64::NAN), "factor"),
            (RetryPolicy::new().factor(f64::INFINITY), "factor"),
            (RetryPolicy::new().max_delay(millis(1)), "max_delay"),
        ];
        for (policy, word) in complaints {
            let complaint = policy.validate().unwrap_err();
            assert!(complaint.contains(word), "{complaint}");
        }
        // Settings that the user's own schedule replaces do not matter.
        let own = RetryPolicy::new().factor(0.0).schedule(std::iter::empty);
        assert_eq!(own.validate(), Ok(()));
    }

    #[test]
    fn policies_and_budgets_go_everywhere() {
        fn check<T: Clone + Send + Sync + fmt::Debug + 'static>() {}
        fn check_call<T: Send + 'static>() {}
        check::<RetryPolicy>();
        check::<RetryBudget>();
        check_call::<Retries>();
    }
}
