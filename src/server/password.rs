//! Asks the user's provider for the password of each new session.
//!
//! A provider that fails or is slow says nothing about the server, which was not asked: such a failure must be neither
//! [`FailureKind::TimedOut`] nor [`FailureKind::Unreachable`], or connections that are well would be ended with it.
//! Tests: `tests/it/rotation.rs`.

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

/// A link of the source chain behind which the provider's own error can be downcast; what [`ProbeFailure`] holds cannot.
#[derive(Debug, thiserror::Error)]
#[error("the password provider failed")]
struct ProviderFailed(#[source] Box<dyn Error + Send + Sync>);

/// The user's function.
pub(crate) type Ask = Box<dyn Fn() -> BoxFuture<'static, Password> + Send + Sync>;

/// Neither a provider nor a server that said no is asked again earlier than after this.
const PAUSE: Duration = Duration::from_millis(250);

/// A provider of passwords, and whether one of them was ever the right one.
pub(crate) struct Passwords {
    ask: Ask,
    within: Duration,
    pause: Duration,
    let_in: AtomicBool,
}

impl Passwords {
    /// `open_within`: the shortest limit that the opening of a session is under. The provider has three quarters of it, so
    /// that it is the provider that is found to be slow, and not the server.
    pub(crate) fn new(ask: Ask, open_within: Duration) -> Self {
        Self { ask, within: open_within * 3 / 4, pause: PAUSE.min(open_within / 8), let_in: AtomicBool::new(false) }
    }

    /// The password for one session. Cancel-safe as the user's future is.
    pub(super) async fn next(&self) -> Result<Vec<u8>, ProbeFailure> {
        let failed = |message: String| ProbeFailure::new(FailureKind::NotNow, message);
        // A panic in it costs this one session.
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

    /// The server took a password of this provider's.
    pub(super) fn accepted(&self) {
        self.let_in.store(true, Ordering::Relaxed);
    }

    /// The server did not. Where an earlier one was right, it is being changed: the next one may be right again.
    pub(super) async fn refused(&self, mut failure: ProbeFailure) -> ProbeFailure {
        if self.let_in.load(Ordering::Relaxed) {
            failure.kind = FailureKind::NotNow;
            failure.message.push_str("; an earlier password was right: the password provider is asked again");
            sleep(self.pause).await;
        }
        failure
    }
}

/// Whatever its `Display` does, and however long its chain of sources is.
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
