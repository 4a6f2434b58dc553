//! The choices that a call makes for how its transactions begin.

use crate::commit::Ledger;

/// How a transaction begins.
pub(super) struct Begin {
    pub(super) sql: String,
    /// The same for a transaction without a mark, which must be told from others in another way.
    pub(super) unmarked: String,
    pub(super) marks: MarkWith,
    pub(super) read_only: bool,
}

/// What is written together with BEGIN.
pub(super) enum MarkWith {
    Nothing,
    /// A mark that is never looked for. It makes COMMIT wait for the synchronous standbys even if the work finds itself
    /// already done, and writes nothing.
    Write,
    Wal,
    Ledger(Ledger),
}
