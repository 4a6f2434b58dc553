//! What can happen in the model, and how a random history is made.

use super::*;

/// One operation. A server is given by a number, modulo the number of servers on which the operation is possible. A
/// transaction is given in the same way.
#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    Begin {
        on: usize,
    },
    /// A whole transaction of another client.
    Write {
        on: usize,
        flush: bool,
    },
    Commit {
        client: usize,
        how: Commit,
    },
    /// The synchronous standby confirms, or the wait for it is cancelled.
    Finish {
        client: usize,
    },
    Abort {
        client: usize,
    },
    Ship {
        to: usize,
        records: usize,
    },
    Crash {
        on: usize,
        kept: usize,
    },
    BackendCrash {
        on: usize,
        kept: usize,
    },
    Stop {
        on: usize,
    },
    /// Starts a server in its previous role.
    Start {
        on: usize,
    },
    /// A crashed or stopped primary is started as a standby on its own log. A failover manager does this while no other
    /// server may become the leader.
    Lease {
        on: usize,
    },
    /// A crashed primary is recovered in single-user mode, which nobody sees, and is shut down.
    SingleUser {
        on: usize,
        /// If WAL is archived, the shutdown begins a new segment, and its checkpoint is the first record there.
        switch: bool,
    },
    /// A checkpoint, or a standby's restart point.
    Checkpoint {
        on: usize,
    },
    /// Recycles the segments that no recovery needs any more.
    Recycle {
        on: usize,
    },
    /// The server is rewound to the fork, and restarted as a standby.
    Follow {
        on: usize,
        upstream: usize,
    },
    Promote {
        on: usize,
    },
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Commit {
    Flushed,
    /// `synchronous_commit = off`.
    Unflushed,
    /// The commit record is written, and the transaction is in progress until `Finish`.
    Held,
}

pub(super) fn op() -> impl Strategy<Value = Op> {
    let number = 0..12_usize;
    let how = prop_oneof![4 => Just(Commit::Flushed), 2 => Just(Commit::Unflushed), 2 => Just(Commit::Held)];
    prop_oneof![
        5 => number.clone().prop_map(|on| Op::Begin { on }),
        6 => (number.clone(), any::<bool>()).prop_map(|(on, flush)| Op::Write { on, flush }),
        5 => (number.clone(), how).prop_map(|(client, how)| Op::Commit { client, how }),
        1 => number.clone().prop_map(|client| Op::Finish { client }),
        1 => number.clone().prop_map(|client| Op::Abort { client }),
        6 => (number.clone(), 0..8_usize).prop_map(|(to, records)| Op::Ship { to, records }),
        2 => (number.clone(), 0..4_usize).prop_map(|(on, kept)| Op::Crash { on, kept }),
        1 => (number.clone(), 0..4_usize).prop_map(|(on, kept)| Op::BackendCrash { on, kept }),
        1 => number.clone().prop_map(|on| Op::Stop { on }),
        2 => number.clone().prop_map(|on| Op::Start { on }),
        1 => number.clone().prop_map(|on| Op::Lease { on }),
        1 => (number.clone(), any::<bool>()).prop_map(|(on, switch)| Op::SingleUser { on, switch }),
        2 => number.clone().prop_map(|on| Op::Checkpoint { on }),
        1 => number.clone().prop_map(|on| Op::Recycle { on }),
        2 => (number.clone(), number.clone()).prop_map(|(on, upstream)| Op::Follow { on, upstream }),
        3 => number.prop_map(|on| Op::Promote { on }),
    ]
}
