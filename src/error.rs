//! The public errors, which are made of what the layers below report.
//!
//! Invariants: an error that says "not committed" is true. Every error says what happened and what to do. A time-out
//! never hides its cause. Tests: `tests/it/errors.rs`.

mod build;
mod call;
mod ended;
mod refused;
mod transaction;
mod unavailable;
mod unknown;

pub use build::BuildError;
pub use call::{CommitOutcome, Error};
pub use ended::SessionEnded;
pub use refused::Refused;
pub use transaction::{EndedInside, Ending, Exhausted, RolledBack};
pub(crate) use unavailable::Obstacle;
pub use unavailable::{Unavailable, UnavailableReason};
pub use unknown::CommitUnknown;
pub(crate) use unknown::InDoubt;
