//! The SQL that settles commits by the write-ahead log or by a table. It writes what a transaction leaves behind at
//! BEGIN, and asks a server about that later. What the answer means is decided in [`commit`](crate::commit). The tests
//! are in `tests/it/commit/settle.rs`.

mod columns;
mod evidence;
pub(crate) mod ledger;
pub(crate) mod lost;
pub(crate) mod wal;
