//! A stopwatch that costs nothing without the feature `metrics`, because nobody reads it then.

use std::time::Duration;

#[cfg(feature = "metrics")]
use tokio::time::Instant;

/// Measures the time from one moment, for example since a connection was handed out.
#[derive(Clone, Copy)]
pub(crate) struct Stopwatch(#[cfg(feature = "metrics")] Instant);

#[cfg(feature = "metrics")]
impl Stopwatch {
    pub(super) fn start() -> Self {
        Self(Instant::now())
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }
}

#[cfg(not(feature = "metrics"))]
impl Stopwatch {
    pub(super) fn start() -> Self {
        Self()
    }

    #[expect(clippy::unused_self, clippy::trivially_copy_pass_by_ref, reason = "the real one holds a time")]
    pub(super) fn elapsed(&self) -> Duration {
        Duration::ZERO
    }
}
