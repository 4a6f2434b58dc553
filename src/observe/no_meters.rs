//! The metrics of a build without the feature `metrics`: there are none, and the calls cost nothing.

#![expect(clippy::unused_self, reason = "the same calls as with the feature")]

use std::time::Duration;

use super::operation::{Failure, OPERATIONS, Operation};
use super::{PoolNames, SettledOutcome, Stopwatch};
use crate::classify::Verdict;
use crate::topology::{Eviction, GenerationId, Refusal};

pub(super) struct Meters;

impl Meters {
    pub(super) fn new(names: &PoolNames) -> Self {
        // It names the pool in its metrics alone.
        let _ = &names.pool;
        Self
    }

    pub(super) fn sized(&self, _: usize, _: usize) {}

    pub(super) fn closed(&self) {}

    pub(super) fn searching(&self) {}

    pub(super) fn lost(&self) {}

    pub(super) fn found(&self, _: GenerationId, _: Duration) {}

    pub(super) fn evicted(&self, _: Eviction, _: usize) {}

    pub(super) fn refused(&self, _: Refusal) {}

    pub(super) fn connection_lost(&self) {}

    pub(super) fn waits(&self) {}

    pub(super) fn waits_no_more(&self) {}

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the real one holds a time")]
    pub(super) fn waited(&self, _: &Stopwatch) {}

    pub(super) fn timed_out(&self) {}

    pub(super) fn opened(&self, _: Duration) {}

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the real one holds a time")]
    pub(super) fn used(&self, _: &Stopwatch) {}

    pub(super) fn rerun(&self, _: Verdict) {}

    pub(super) fn settled(&self, _: SettledOutcome) {}

    pub(super) fn operation(&self, _: Operation, _: Duration, _: Option<&Failure<'_>>) {
        // Their names are of use with the feature alone.
        let _ = OPERATIONS;
    }
}

pub(super) struct StateGauge;

impl StateGauge {
    pub(super) fn new() -> Self {
        Self
    }

    pub(super) fn used(&self, _: &Meters) {}

    pub(super) fn idle(&self, _: &Meters) {}

    pub(super) fn left(&self, _: &Meters) {}
}
