//! The details that an [`Error`] carries.
//!
//! Match on them to find out more than the text says: the reason of an outage, the server that refused, the error of
//! the last attempt. [The page on errors](crate::docs::errors) says for each of them what to do.

// The public errors are made of what the layers below report.
//
// Invariants: an error that says "not committed" is true. Every error says what happened and what to do. A time-out
// never hides its cause. Tests: `tests.rs`, `tests/it/observe/errors.rs` and `texts.rs`.

pub(crate) mod build;
pub(crate) mod call;
mod refused;
#[cfg(test)]
mod tests;
mod unavailable;

pub(crate) use build::BuildError;
pub(crate) use call::{CommitOutcome, Error, InDoubt};
pub use call::{CommitUnknown, EndedInside, Ending, Exhausted, RolledBack, SessionEnded};
pub use refused::Refused;
pub(crate) use unavailable::{CHECKOUT_TIMEOUT, Obstacle};
pub use unavailable::{Unavailable, UnavailableReason};

pub use crate::commit::Unsettled;
pub use crate::topology::{FailureKind, ProbeFailure};
