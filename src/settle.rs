//! Writes what a transaction leaves behind at BEGIN, and asks a server what it says about it, by the write-ahead log or
//! by a table. Decides nothing; the rule is [`commit`](crate::commit). The tests are in `tests/it/commit/settle.rs`.

mod evidence;
pub(crate) mod ledger;
pub(crate) mod wal;
