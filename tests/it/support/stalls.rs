//! How long the machine stood still: a bound on a time is for what the pool takes, and not for what the machine does.

use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How often the watch looks at the clock.
const TICK: Duration = Duration::from_millis(10);
/// A look that comes this long after the one before was kept from coming.
const LATE: Duration = Duration::from_millis(30);
/// A pause that may exceed a time limit of the pool's, or of a server's.
const NOTABLE: Duration = Duration::from_millis(50);

/// One for the whole process; it begins with the first call of [`watch`].
static WATCH: Mutex<Option<Watch>> = Mutex::new(None);

struct Watch {
    looked: Instant,
    /// From when to when nothing ran, as far as this process can see.
    stalls: Vec<(Instant, Instant)>,
}

impl Watch {
    fn look(&mut self, now: Instant) {
        if now.saturating_duration_since(self.looked) > LATE {
            self.stalls.push((self.looked, now));
        }
        self.looked = now;
    }
}

/// From now on stalls are watched for.
pub(crate) fn watch() {
    let mut watch = WATCH.lock().unwrap_or_else(PoisonError::into_inner);
    if watch.is_none() {
        *watch = Some(Watch { looked: Instant::now(), stalls: Vec::new() });
        thread::spawn(look_again_and_again);
    }
}

/// The time, from which on stalls are watched for.
pub(crate) fn now() -> Instant {
    watch();
    Instant::now()
}

fn look_again_and_again() {
    loop {
        thread::sleep(TICK);
        if let Some(watch) = WATCH.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            watch.look(Instant::now());
        }
    }
}

/// How much of the time since then the machine stood still.
pub(crate) fn lost_since(since: Instant) -> Duration {
    let mut watch = WATCH.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(watch) = watch.as_mut() else { return Duration::ZERO };
    // The one that asks may be awake before the watch is.
    watch.look(Instant::now());
    watch.stalls.iter().map(|(from, to)| to.saturating_duration_since((*from).max(since))).sum()
}

/// What stalls since then may have added to a time: they themselves, and as much for what had to begin anew.
pub(crate) fn slack_since(since: Instant) -> Duration {
    2 * lost_since(since)
}

/// Whether the machine stood still for so long since then that time limits may have passed in it.
pub(crate) fn any_since(since: Instant) -> bool {
    lost_since(since) > NOTABLE
}

/// Tries again, twice at most, where it came out wrong and the machine stood still meanwhile.
pub(crate) async fn unless_stalled<T>(mut attempt: impl AsyncFnMut() -> Result<T, String>) -> T {
    let mut tries = 0;
    loop {
        let began = now();
        tries += 1;
        match attempt().await {
            Ok(value) => return value,
            Err(why) if tries < 3 && any_since(began) => println!("once more, as the machine stood still: {why}"),
            Err(why) => panic!("{why}"),
        }
    }
}
