//! What is told of repeated measurements: the median, and how far they lie apart. Pure.

use std::time::Duration;

/// Median, minimum and maximum. `None` among the values stands for "never", and is more than any number.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Spread {
    /// Half of the values are below. `None`: never, or there was no value.
    pub median: Option<f64>,
    /// The least value.
    pub min: Option<f64>,
    /// The largest value. `None`: never, or there was no value.
    pub max: Option<f64>,
}

impl Spread {
    /// The spread of these values.
    pub fn of(values: impl Iterator<Item = Option<f64>>) -> Self {
        let mut values: Vec<f64> = values.map(|value| value.unwrap_or(f64::INFINITY)).collect();
        values.sort_unstable_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied();
        let (low, high) = (at(values.len().saturating_sub(1) / 2), at(values.len() / 2));
        let finite = |value: Option<f64>| value.filter(|value| value.is_finite());
        Self {
            median: finite(low.zip(high).map(|(low, high)| f64::midpoint(low, high))),
            min: finite(at(0)),
            max: finite(values.last().copied()),
        }
    }
}

/// The longest time without an event between the start and the end. The pause at the end counts as well: what never
/// came back has a gap. Moments are durations since whatever time zero is, in order.
pub fn longest_gap(start: Duration, moments: impl Iterator<Item = Duration>, end: Duration) -> Duration {
    let mut before = start;
    let mut longest = Duration::ZERO;
    for at in moments.chain([end]) {
        longest = longest.max(at.saturating_sub(before));
        before = before.max(at);
    }
    longest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_is_more_than_any_number() {
        let spread = Spread::of([Some(3.0), None, Some(1.0)].into_iter());
        assert_eq!(spread, Spread { median: Some(3.0), min: Some(1.0), max: None });
        assert_eq!(Spread::of([Some(3.0), None].into_iter()).median, None, "half of the values never came");
        assert_eq!(Spread::of([Some(4.0), Some(6.0)].into_iter()).median, Some(5.0));
        assert_eq!(Spread::of(std::iter::empty()), Spread { median: None, min: None, max: None });
    }

    #[test]
    fn a_gap_at_either_end_counts() {
        let ms = Duration::from_millis;
        let gap = |moments: &[u64]| longest_gap(ms(10), moments.iter().map(|at| ms(*at)), ms(100));
        assert_eq!(gap(&[20, 50, 90]), ms(40));
        assert_eq!(gap(&[70, 90]), ms(60));
        assert_eq!(gap(&[20]), ms(80));
        assert_eq!(gap(&[]), ms(90));
        assert_eq!(gap(&[5, 20, 150]), ms(130), "an event after the end is in order, too");
    }
}
