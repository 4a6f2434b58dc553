//! What a seed is run with: everything, or only some of its faults and callers. A failing seed is shrunk to those that
//! it needs.

use std::collections::BTreeSet;
use std::fmt;

use crate::run::{ROUNDS, run};

/// The most callers that a simulation has.
const CALLERS: usize = 6;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Script {
    pub(crate) seed: u64,
    /// The rounds whose faults happen.
    pub(crate) rounds: BTreeSet<usize>,
    /// The callers that call.
    pub(crate) callers: BTreeSet<usize>,
}

impl Script {
    pub(crate) fn whole(seed: u64) -> Self {
        Self { seed, rounds: (0..ROUNDS).collect(), callers: (0..CALLERS).collect() }
    }

    /// Reads what its `Display` writes: a seed, perhaps with `rounds=1,2` and `callers=0,3`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        let mut script = Self::whole(words.next()?.parse().ok()?);
        for word in words {
            let (name, list) = word.split_once('=')?;
            let list: Option<BTreeSet<usize>> = list.split(',').map(|number| number.parse().ok()).collect();
            match name {
                "rounds" => script.rounds = list?,
                "callers" => script.callers = list?,
                _ => return None,
            }
        }
        Some(script)
    }

    /// Without these rounds and callers.
    fn without(&self, rounds: &[usize], callers: &[usize]) -> Self {
        let mut less = self.clone();
        less.rounds.retain(|round| !rounds.contains(round));
        less.callers.retain(|caller| !callers.contains(caller));
        less
    }
}

impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |numbers: &BTreeSet<usize>| numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let whole = Self::whole(self.seed);
        write!(f, "{}", self.seed)?;
        if self.rounds != whole.rounds {
            write!(f, " rounds={}", list(&self.rounds))?;
        }
        if self.callers != whole.callers {
            write!(f, " callers={}", list(&self.callers))?;
        }
        Ok(())
    }
}

/// A violation without its numbers, so that the same one is recognised in a shorter story.
pub(crate) fn kind_of(violation: &str) -> String {
    violation.chars().filter(|letter| !letter.is_ascii_digit()).take(60).collect()
}

/// Drops rounds and callers from the script as long as the same kind of violation stays.
pub(crate) fn shrink(script: &Script, violation: &str) -> Script {
    let wanted = kind_of(violation);
    let fails = |script: &Script| {
        !script.callers.is_empty()
            && run(script, false).is_ok_and(|outcome| outcome.violations.iter().any(|found| kind_of(found) == wanted))
    };
    let mut best = script.clone();
    // What comes after the last round that is needed is dropped first, and then smaller and smaller parts.
    let mut size = best.rounds.len().div_ceil(2);
    loop {
        let rounds: Vec<usize> = best.rounds.iter().rev().copied().collect();
        let dropped = rounds.chunks(size.max(1)).map(|chunk| best.without(chunk, &[])).find(&fails);
        match dropped {
            Some(less) => best = less,
            None if size <= 1 => break,
            None => size = size.div_ceil(2),
        }
    }
    for caller in 0..CALLERS {
        let less = best.without(&[], &[caller]);
        if less != best && fails(&less) {
            best = less;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_is_read_as_it_is_written() {
        let script = Script::whole(7).without(&[0, 5], &[1]);
        assert_eq!(Script::parse(&script.to_string()), Some(script));
        assert_eq!(Script::parse("42"), Some(Script::whole(42)));
        assert_eq!(Script::parse("42 rounds=1,x"), None);
    }
}
