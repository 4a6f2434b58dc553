//! Waiting for a condition, never for a time.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

/// How often a condition is looked at.
const INTERVAL: Duration = Duration::from_millis(3);
const SLOWLY: Duration = Duration::from_millis(50);

/// Waits until `condition` holds, looking every few milliseconds.
///
/// # Panics
/// When `deadline` passes first, also if the condition itself hangs: names `what` and the time spent.
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// use std::time::Duration;
/// let mut left = 3;
/// tokio_postgres_failover_testkit::bed::wait::eventually("the countdown ends", Duration::from_secs(1), async || {
///     left -= 1;
///     left == 0
/// })
/// .await;
/// # });
/// ```
pub async fn eventually(what: &str, deadline: Duration, mut condition: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    let holds = timeout(deadline, async {
        while !condition().await {
            sleep(INTERVAL).await;
        }
    });
    let held = holds.await.is_ok();
    assert!(held, "not seen within {:?}: {what}", begun.elapsed());
}

/// [`eventually`] for a value, and with the reason of the last failure in the panic.
///
/// Takes a plain closure: futures built on `AsyncFnMut` are not provably `Send`, and a fault is often injected from a
/// spawned task.
pub async fn until<T, F>(what: &str, deadline: Duration, attempt: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, String>>,
{
    until_every(INTERVAL, what, deadline, attempt).await
}

/// [`until`] for what is slow to answer: it looks every 50 ms.
pub async fn until_slowly<T, F>(what: &str, deadline: Duration, attempt: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, String>>,
{
    until_every(SLOWLY, what, deadline, attempt).await
}

async fn until_every<T, F>(interval: Duration, what: &str, deadline: Duration, mut attempt: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, String>>,
{
    let begun = Instant::now();
    let mut last = String::from("no attempt ended");
    let found = timeout(deadline, async {
        loop {
            match attempt().await {
                Ok(value) => return value,
                Err(reason) => last = reason,
            }
            sleep(interval).await;
        }
    });
    let found = found.await.ok();
    found.unwrap_or_else(|| panic!("not seen within {:?}: {what} ({last})", begun.elapsed()))
}
