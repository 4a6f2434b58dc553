#![doc = include_str!("../README.md")]

// Level 0: pure. Decides; no I/O, no clock, no task.
mod classify;
mod resolve;
mod retry;
mod topology;

// Level 1: I/O. Fetches what the decisions need; decides nothing.
mod server;

// Level 2: the one task that owns a topology.
mod cluster;

// Level 3: the public error, composed of what the layers below say.
mod error;

// Level 4: connections of the current generation.
mod pool;

// Level 5: work that runs again.
mod transaction;

pub use deadpool;
pub use deadpool_postgres;
pub use tokio_postgres;

pub use error::{
    BuildError, CommitOutcome, CommitUnknown, Error, Exhausted, Refused, RolledBack, Unavailable, UnavailableReason,
};
pub use pool::{Client, Connection, IntoConfig, Manager, Pool, PoolBuilder, Status};
pub use resolve::{Addresses, BoxFuture, FixedResolver, HickoryResolver, Resolve, ResolveError};
pub use retry::{Backoff, Exponential, RetryBudget, RetryPolicy};
pub use topology::{
    Address, Answer, BadReport, CandidateReport, Change, Endpoint, FailureKind, GenerationId, Lsn, Origin,
    ProbeFailure, Refusal, Role, ServerReport, State, View,
};
pub use transaction::{Guarantee, Savepoint, Transaction, TransactionBuilder};
