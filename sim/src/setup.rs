//! What stays the same through one simulation: the cluster, and how the pool is built.

use crate::rng::Rng;

/// How the name of the cluster is resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dns {
    /// The name has the address of each server.
    All,
    /// The name has the address of the primary, and changes some time after a failover.
    Primary,
    /// The configuration has the addresses. There is no name.
    Hosts,
}

/// What the pool's role may read about the history of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shown {
    Function,
    Files,
    Nothing,
}

/// What stays the same through one simulation.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a choice of its own")]
pub(crate) struct Setup {
    pub(crate) servers: usize,
    pub(crate) synchronous: bool,
    pub(crate) shown: Shown,
    pub(crate) dns: Dns,
    pub(crate) max_size: usize,
    /// The pool falls asleep if nobody calls.
    pub(crate) sleeps: bool,
    /// The pool wraps one of deadpool's, whose manager connects to wherever a name leads.
    pub(crate) wrapped: bool,
    /// The log-in names another process than the session's, as a pooler does. So the pool does not rely on its answers.
    pub(crate) pooled: bool,
    /// The servers archive, so a promoted one takes the next number that nobody has taken.
    pub(crate) archives: bool,
    /// The clock of one server is wrong.
    pub(crate) wrong_clock: bool,
}

/// A pooler's number for a client is the number of the client's process on the server, and this.
const POOLED: i32 = 1 << 20;

impl Setup {
    /// Returns the process that the log-in of a session names.
    pub(crate) fn named(self, pid: i32) -> i32 {
        if self.pooled { pid ^ POOLED } else { pid }
    }

    pub(crate) fn choose(rng: &mut Rng) -> Self {
        Self {
            servers: [2, 3, 3, 3][rng.index(4)],
            synchronous: rng.chance(50),
            shown: [Shown::Function, Shown::Function, Shown::Files, Shown::Nothing][rng.index(4)],
            dns: [Dns::All, Dns::All, Dns::Primary, Dns::Hosts][rng.index(4)],
            max_size: [2, 4, 6, 6][rng.index(4)],
            sleeps: rng.chance(15),
            wrapped: rng.chance(10),
            archives: rng.chance(40),
            wrong_clock: rng.chance(25),
            // Without a draw of its own, because that would change the rest of every story that is kept.
            pooled: rng.clone().chance(25),
        }
    }

    /// Returns whether the program has a listener. It would keep a pool awake, and a wrapped pool has none.
    pub(crate) fn listens(self) -> bool {
        !self.sleeps && !self.wrapped && self.max_size > 2
    }

    /// Returns whether a crash loses what was not flushed. Without the function of `sql/history.sql`, the pool must see
    /// each crash that loses a mark, and a simulation cannot promise that. So such servers flush each record at once:
    /// docs/exactly-once.md, assumption 5.
    pub(crate) fn loses_unflushed(self) -> bool {
        self.shown == Shown::Function
    }
}
