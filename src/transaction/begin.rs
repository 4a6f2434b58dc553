//! The choices that a call makes for how its transactions begin.

use std::sync::Arc;

use crate::commit::{Ledger, Nonce, Signature};

/// How a transaction begins.
pub(super) struct Begin {
    pub(super) sql: String,
    /// The SQL for a transaction without a mark. It sets a value by which COMMIT recognises the transaction.
    pub(super) unmarked: String,
    pub(super) marks: MarkKind,
    pub(super) read_only: bool,
}

/// What the pool writes together with BEGIN.
pub(super) enum MarkKind {
    Nothing,
    /// A mark that nobody looks for. An earlier attempt may have done the work already, and then this attempt writes
    /// nothing else. The mark makes its COMMIT wait for the synchronous standbys all the same.
    Write,
    Wal,
    Ledger(Ledger),
}

/// What an attempt remembers of a BEGIN that travels: how its transaction is marked.
pub(super) enum Travelling {
    Unmarked,
    Wal(Nonce, Option<Arc<Signature>>),
    Ledger(Ledger),
}
