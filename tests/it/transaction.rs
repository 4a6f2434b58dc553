//! What a call of `transaction` and its relatives makes of its closure, of errors and of its options.

mod calls;
mod cancel;
mod endings;
mod helpers;
mod inner;
mod opening;
mod raised;
mod shapes;
mod stale;
mod tune;
