//! What the simulation in sim/ replaces in this crate. It exists only with `cfg(failover_sim)`, which `make sim` sets.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use tokio::time::Instant;

thread_local! {
    static BEGUN: Cell<Option<Instant>> = const { Cell::new(None) };
    static MUTANT: RefCell<String> = const { RefCell::new(String::new()) };
    static SEEN: RefCell<Seen> = const { RefCell::new(Seen::new()) };
}

/// How often each row was used, by its group and its name.
pub type Seen = BTreeMap<(&'static str, String), u64>;

/// The wall clock at the beginning of each simulation, in milliseconds since 1970.
const EPOCH: u64 = 1_700_000_000_000;

/// Begins a simulation on this thread. The wall clock then follows tokio's clock, which is paused.
pub fn begin() {
    BEGUN.set(Some(Instant::now()));
}

pub(crate) fn wall_clock() -> u64 {
    let since = BEGUN.get().map_or_else(Default::default, |begun| begun.elapsed());
    EPOCH + u64::try_from(since.as_millis()).unwrap_or(0)
}

/// Turns on one deliberate fault of this crate on this thread, by its name. The simulation must find it.
pub fn plant(mutant: &str) {
    MUTANT.with_borrow_mut(|planted| mutant.clone_into(planted));
}

/// Returns whether this deliberate fault is turned on.
pub(crate) fn is_planted(mutant: &str) -> bool {
    MUTANT.with_borrow(|planted| planted == mutant)
}

/// Counts that a row of a decision was used on this thread.
pub(crate) fn see(group: &'static str, name: String) {
    SEEN.with_borrow_mut(|seen| *seen.entry((group, name)).or_default() += 1);
}

/// Returns which rows were used on this thread since the last call.
#[must_use]
pub fn take_seen() -> Seen {
    SEEN.take()
}
