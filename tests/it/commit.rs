//! How a transaction ends: COMMIT, the loss of its answer, and what is found out afterwards.

mod clusters;
mod evidence;
mod failing;
mod fenced;
pub(crate) mod finish;
mod history;
mod inside;
mod left;
mod lost;
mod settle;
mod unsent;
