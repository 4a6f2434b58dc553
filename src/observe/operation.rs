//! How long calls and statements take. OpenTelemetry's conventions call both operations of a database client.

use std::time::Duration;

use tokio_postgres::Error;

use super::{Observer, Stopwatch};
use crate::sync::log_safely;

/// What a caller asks of the database. A statement has the name of the driver's method, because its text is not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// A call with all its attempts.
    Transaction,
    Query,
    Execute,
    BatchExecute,
    Prepare,
}

/// All of them, with their names in metrics.
pub(super) const OPERATIONS: [(Operation, &str); 5] = [
    (Operation::Transaction, "transaction"),
    (Operation::Query, "query"),
    (Operation::Execute, "execute"),
    (Operation::BatchExecute, "batch_execute"),
    (Operation::Prepare, "prepare"),
];

impl Operation {
    /// The operation of a method of the driver's client. `None` for one that returns before its answer has ended, or
    /// that may ask nothing, because the statement is cached.
    pub(crate) fn of(method: &str) -> Option<Self> {
        if method.ends_with("_raw") && method != "execute_raw" || method.ends_with("_cached") {
            return None;
        }
        let kinds = [("query", Self::Query), ("simple_query", Self::Query), ("execute", Self::Execute)];
        let others = [("batch_execute", Self::BatchExecute), ("prepare", Self::Prepare)];
        kinds.into_iter().chain(others).find(|(begins, _)| method.starts_with(begins)).map(|(_, operation)| operation)
    }
}

/// Why an operation failed.
#[cfg_attr(not(feature = "metrics"), expect(dead_code, reason = "only metrics read it"))]
pub(super) struct Failure<'a> {
    /// The SQLSTATE, if the server has answered.
    pub(super) code: Option<&'a str>,
    /// A word for a failure without a code.
    pub(super) kind: &'static str,
}

/// An operation that has begun. If it is dropped, its caller has given up, and nothing is measured.
pub(crate) struct Timed<'a> {
    observer: &'a Observer,
    operation: Operation,
    since: Stopwatch,
}

impl Observer {
    pub(crate) fn times(&self, operation: Operation) -> Timed<'_> {
        Timed { observer: self, operation, since: Stopwatch::start() }
    }

    /// As [`Timed::statement_ended`], where somebody else has measured the time.
    pub(crate) fn statement_took(&self, method: &str, took: Duration, error: Option<&Error>) {
        if let Some(operation) = Operation::of(method) {
            let failure = error.map(failure_of);
            log_safely(|| self.meters.operation(operation, took, failure.as_ref()));
        }
    }
}

impl Timed<'_> {
    pub(crate) fn statement_ended<T>(self, result: &Result<T, Error>) {
        self.ended(result.as_ref().err().map(failure_of).as_ref());
    }

    /// `failure`: the SQLSTATE if there is one, and a word for the error.
    pub(crate) fn call_ended(self, failure: Option<(Option<&str>, &'static str)>) {
        self.ended(failure.map(|(code, kind)| Failure { code, kind }).as_ref());
    }

    fn ended(self, failure: Option<&Failure<'_>>) {
        log_safely(|| self.observer.meters.operation(self.operation, self.since.elapsed(), failure));
    }
}

fn failure_of(error: &Error) -> Failure<'_> {
    let code = error.code().map(tokio_postgres::error::SqlState::code);
    // The second word is the convention's for everything else.
    Failure { code, kind: if error.is_closed() { "connection_closed" } else { "_OTHER" } }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_known_by_their_names() {
        for (method, operation) in [
            ("query", Some(Operation::Query)),
            ("query_typed_opt", Some(Operation::Query)),
            ("simple_query", Some(Operation::Query)),
            ("execute_raw", Some(Operation::Execute)),
            ("execute_typed", Some(Operation::Execute)),
            ("batch_execute", Some(Operation::BatchExecute)),
            ("prepare_typed", Some(Operation::Prepare)),
            ("prepare_cached", None),
            ("query_raw", None),
            ("simple_query_raw", None),
            ("copy_in", None),
        ] {
            assert_eq!(Operation::of(method), operation, "{method}");
        }
    }
}
