use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;
use crate::error::{CommitOutcome, Error};

const SECOND: Duration = Duration::from_secs(1);

fn millis(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// Random durations. Absurd ones are as frequent as usual ones.
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
    let odd = prop_oneof![Just(f64::MAX), Just(f64::INFINITY), Just(f64::NAN), Just(0.0), Just(-1.0)];
    prop_oneof![1.0..10.0_f64, any::<f64>(), odd]
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
            // The delays grow, apart from rounding errors.
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

    /// This is true for any policy, and for attempts of any duration.
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
                    prop_assert!(policy.attempts.is_none_or(|limit| attempt < limit));
                    now += delay;
                }
                Err(GiveUp::Attempts(count)) => {
                    prop_assert_eq!(count, attempt);
                    prop_assert!(policy.attempts.is_some_and(|limit| attempt >= limit));
                    break;
                }
                Err(_) => prop_assert_eq!(retries.attempt(), attempt),
            }
        }
    }

    /// The bound holds in every window of time, not only from the start.
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
            // The times are not in order, because calls read the clock before they take the lock.
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
    let limits = |policy: RetryPolicy| (policy.deadline, policy.attempt_limit());
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
        let promised = budget.promised();
        assert_eq!(policy.allows(&Retry::new(&retries, &Error::Closed, delay, outcome)), allowed);
        if allowed {
            promised.spend();
        }
    }
    let expected = [(1, millis(10), CommitOutcome::NotCommitted), (2, millis(20), CommitOutcome::Unknown)];
    assert_eq!(*seen.lock().unwrap(), expected);
    // There were two tokens, and one was used.
    assert_eq!(budget.withdraw(now), Duration::ZERO);
    assert_eq!(budget.withdraw(now), Duration::MAX);
}

#[test]
fn defaults_are_as_documented() {
    let now = Instant::now();
    let policy = RetryPolicy::default();
    assert_eq!(policy.validate(), Ok(()));
    assert_eq!(policy.deadline, 30 * SECOND);
    assert_eq!(policy.attempts, None);
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
    // The call took no token, so there is still one.
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
    // Each call has its own schedule.
    for _ in 0..2 {
        let mut retries = policy.start(now, 0);
        assert_eq!(retries.next(now, &budget), Ok(millis(5)));
        assert_eq!(retries.next(now, &budget), Ok(millis(7)));
        assert_eq!(retries.next(now, &budget), Err(GiveUp::Schedule));
    }
    assert!(format!("{policy:?}").contains("own"));
    // A schedule can stop a call, but cannot prolong it.
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
    // The three tokens that were promised before come first.
    assert_eq!(budget.withdraw(now + millis(300)), millis(100));
    // The longer one of the two waits counts.
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
