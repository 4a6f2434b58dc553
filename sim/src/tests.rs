//! What the simulation itself promises. `make sim` and `make sim-mutants` look for faults of the crate.

use crate::faults::all;
use crate::run::run;
use crate::script::Script;

/// Without its flags, tokio and the crate's wall clock make choices of their own.
const REPEATABLE: bool = cfg!(all(failover_sim, tokio_unstable));

#[test]
fn a_seed_tells_the_same_story_twice() {
    for seed in [1, 42, 4711] {
        let [first, second] = [(); 2].map(|()| run(&Script::whole(seed), true).unwrap());
        assert!(first.trace.len() > 100, "seed {seed} has a story");
        if !REPEATABLE {
            eprintln!("skipped: built without the flags of scripts/sim.sh");
            return;
        }
        for (number, (one, other)) in first.trace.iter().zip(&second.trace).enumerate() {
            assert_eq!(one, other, "seed {seed}, line {number}");
        }
        assert_eq!(first.trace.len(), second.trace.len(), "seed {seed}");
    }
}

#[test]
fn what_was_wrong_once_is_right() {
    let stories = include_str!("../regressions.txt").lines().filter(|line| !line.starts_with('#'));
    for story in stories.filter(|line| !line.trim().is_empty()) {
        let script = Script::parse(story.split('#').next().unwrap()).unwrap_or_else(|| panic!("{story}"));
        let outcome = run(&script, false).unwrap();
        assert!(outcome.violations.is_empty(), "`make sim SEED=\"{script}\" TRACE=1`: {:?}", outcome.violations);
    }
}

#[test]
fn a_few_seeds_have_no_violation_and_see_much() {
    let mut counts = crate::trace::Counts::default();
    for seed in 1..=40 {
        let outcome = run(&Script::whole(seed), false).unwrap();
        assert!(outcome.violations.is_empty(), "`make sim SEED={seed} TRACE=1`: {:?}", outcome.violations);
        assert!(outcome.failovers >= 5, "seed {seed} has {} failovers", outcome.failovers);
        counts.add(&outcome.counts);
    }
    for fault in all() {
        assert!(counts.of("faults", fault.name) > 0, "never seen in forty seeds: {}", fault.name);
    }
    for (group, name) in [("calls", "exactly once Ok"), ("failovers", "promoted"), ("failovers", "recovered")] {
        assert!(counts.of(group, name) > 0, "never seen: {group} {name}");
    }
}
