//! The random numbers of this crate. They spread out actions that many callers would otherwise take at the same moment.
//! The seed is an argument: this module reads no clock and no entropy. No security depends on the numbers. Invariant:
//! the same seed gives the same numbers, so a test that prints its seed can be repeated.

use std::time::Duration;

/// The generator of Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (2014). Every seed is good.
#[derive(Clone, Debug)]
pub(crate) struct SplitMix64(u64);

impl SplitMix64 {
    /// How far the state moves with each number.
    pub(crate) const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(Self::STEP);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A duration between zero and `limit`, both included, each equally likely. A limit of more than 584 years counts
    /// as 584 years.
    pub(crate) fn up_to(&mut self, limit: Duration) -> Duration {
        let nanos = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        let scaled = ((u128::from(nanos) + 1) * u128::from(self.next())) >> 64;
        Duration::from_nanos(u64::try_from(scaled).unwrap_or(nanos))
    }

    /// A factor between 0.75 and 1.25, both included.
    pub(crate) fn near_one(&mut self) -> f64 {
        0.75 + f64::from(u16::try_from(self.next() >> 48).unwrap_or(0)) / f64::from(u16::MAX) / 2.0
    }
}
