//! Figures: samples of one metric, and what is told of them.

use serde::{Deserialize, Serialize};
use testbed::Spread;

/// Samples of one metric of one peer in one case. `None` among them stands for "never": more than any number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// [`crate::peer::Peer::name`], or another subject's name.
    pub peer: String,
    /// `recovery/kill`, `growth/waiters/1000`, …
    pub case: String,
    /// What was measured: `first_write`, `errors`, …
    pub metric: String,
    /// `ms`, `count`, `us`, …
    pub unit: String,
    /// One per repetition.
    pub samples: Vec<Option<f64>>,
    /// The median of the samples that the ratio is relative to, where there is one, and what it is.
    pub base: Option<Base>,
}

/// What a ratio is relative to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Base {
    /// For instance `floor`.
    pub name: String,
    /// In the measurement's unit.
    pub median: f64,
}

impl Measurement {
    /// Without a base.
    pub fn new(
        peer: impl Into<String>,
        case: impl Into<String>,
        metric: impl Into<String>,
        unit: impl Into<String>,
        samples: Vec<Option<f64>>,
    ) -> Self {
        let (peer, case, metric, unit) = (peer.into(), case.into(), metric.into(), unit.into());
        Self { peer, case, metric, unit, samples, base: None }
    }

    /// With a ratio relative to this median.
    #[must_use]
    pub fn relative_to(mut self, name: impl Into<String>, median: Option<f64>) -> Self {
        self.base = median.map(|median| Base { name: name.into(), median });
        self
    }

    /// Median, minimum and maximum.
    pub fn spread(&self) -> Spread {
        Spread::of(self.samples.iter().copied())
    }

    /// Median by the base's median.
    pub fn ratio(&self) -> Option<f64> {
        let base = self.base.as_ref()?.median;
        self.spread().median.map(|median| median / base).filter(|ratio| ratio.is_finite())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(samples: &[Option<f64>]) -> Measurement {
        Measurement::new("peer", "case", "metric", "ms", samples.to_vec())
    }

    #[test]
    fn ratios_are_of_medians() {
        let measured = of(&[Some(4.0), Some(6.0)]).relative_to("floor", Some(2.0));
        assert_eq!(measured.ratio(), Some(2.5));
        assert_eq!(of(&[Some(4.0)]).relative_to("floor", Some(0.0)).ratio(), None);
        assert_eq!(of(&[Some(4.0)]).ratio(), None);
    }
}
