//! Asks the user's provider for the password of each new session.
//!
//! If a provider fails or is slow, the server was not asked, so this says nothing about the server. Such a failure must
//! be neither [`FailureKind::TimedOut`] nor [`FailureKind::Unreachable`], because those can end working connections.
//! The tests are in `tests/it/sessions/rotation.rs`.

use std::error::Error;
use std::fmt::Write;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::time::{sleep, timeout};

use crate::classify::links;
use crate::topology::{FailureKind, ProbeFailure};

type Password = Result<Vec<u8>, Box<dyn Error + Send + Sync>>;

/// A link in the error's source chain. Its source is the provider's own error, which the user can downcast. That is not
/// possible for the `Arc` that [`ProbeFailure`] holds.
#[derive(Debug, thiserror::Error)]
#[error("the password provider failed")]
struct ProviderFailed(#[source] Box<dyn Error + Send + Sync>);

/// The user's provider function.
pub(crate) type PasswordProvider = Box<dyn Fn() -> BoxFuture<'static, Password> + Send + Sync>;

/// Shortest pause before a provider that failed is asked again.
const PAUSE: Duration = Duration::from_millis(250);

/// A provider of passwords, and whether a server has ever accepted one of its passwords.
pub(crate) struct Passwords {
    ask: PasswordProvider,
    within: Duration,
    pause: Duration,
    let_in: AtomicBool,
}

impl Passwords {
    /// `open_within` is the shortest time limit for opening a session. The provider gets three quarters of it, so that
    /// a slow provider is reported as such and not as a slow server.
    pub(crate) fn new(ask: PasswordProvider, open_within: Duration) -> Self {
        Self { ask, within: open_within * 3 / 4, pause: PAUSE.min(open_within / 8), let_in: AtomicBool::new(false) }
    }

    /// Returns the password for one session. Cancel-safe if the user's future is.
    pub(super) async fn next(&self) -> Result<Vec<u8>, ProbeFailure> {
        let failed = |message: String| ProbeFailure::new(FailureKind::NotNow, message);
        // A panic of the provider costs only this one session.
        let asked = AssertUnwindSafe(async { (self.ask)().await }).catch_unwind();
        let Ok(answer) = timeout(self.within, asked).await else {
            return Err(failed(format!("the password provider gave no password within {:?}", self.within)));
        };
        let failure = match answer {
            Ok(Ok(password)) => return Ok(password),
            Ok(Err(error)) => {
                let error = ProviderFailed(error);
                failed(in_one_line(&error)).caused_by(Arc::new(error))
            }
            Err(_) => failed("the password provider panicked".to_owned()),
        };
        sleep(self.pause).await;
        Err(failure)
    }

    /// Notes that a server has accepted a password of this provider.
    pub(super) fn accepted(&self) {
        self.let_in.store(true, Ordering::Relaxed);
    }

    /// Handles a refused password. If an earlier password was accepted, the password is probably being changed, and the
    /// next one may be right. It is tried as rarely as after any refusal, because the change may also have gone wrong.
    pub(super) fn refused(&self, mut failure: ProbeFailure) -> ProbeFailure {
        if !self.let_in.load(Ordering::Relaxed) {
            return failure;
        }
        failure.message.push_str("; an earlier password was right: the password provider is asked again");
        failure.that_may_pass()
    }
}

/// Formats the error with its sources in one line, even if `Display` panics or the chain is long.
fn in_one_line(error: &(dyn Error + 'static)) -> String {
    std::panic::catch_unwind(AssertUnwindSafe(|| chain(error))).unwrap_or_else(|_| "its error panicked".to_owned())
}

fn chain(error: &(dyn Error + 'static)) -> String {
    let mut line = String::new();
    for error in links(error) {
        let text = error.to_string();
        if !line.ends_with(&text) {
            // Writing to a String cannot fail.
            let _ = write!(line, "{}{text}", if line.is_empty() { "" } else { ": " });
        }
    }
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}
