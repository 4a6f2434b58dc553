//! What a pool tells: events, figures and errors.

mod ended;
mod errors;
#[cfg(feature = "metrics")]
mod gauges;
mod texts;
#[cfg(feature = "metrics")]
mod watch;
