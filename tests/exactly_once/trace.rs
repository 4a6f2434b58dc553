//! What became of one call on its way to its answer: when it was tried, with which transaction ids, and what was
//! settled.
//!
//! The pool tells nobody but its log that a commit was in doubt. The log's events come in the task of the call that
//! they are about, and are noted there.

use std::cell::RefCell;
use std::fmt::{Debug, Write as _};
use std::time::Instant;

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

tokio::task_local! {
    static CALL: RefCell<Trace>;
}

/// One call.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trace {
    tries: Vec<Try>,
    pub(crate) settlings: Vec<Settling>,
}

/// One run of the closure.
#[derive(Clone, Copy, Debug)]
struct Try {
    began: Instant,
    xid: Option<u64>,
}

/// The end of a doubt.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settling {
    pub(crate) at: Instant,
    pub(crate) found: Found,
    /// Of the transaction that it is about.
    pub(crate) xid: Option<u64>,
}

/// What a settler found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Found {
    Committed,
    NotCommitted,
    Unknown,
}

impl Trace {
    /// Follows a call to its end.
    pub(crate) async fn of<T>(call: impl Future<Output = T>) -> (T, Self) {
        CALL.scope(RefCell::default(), async {
            let answer = call.await;
            (answer, CALL.with(RefCell::take))
        })
        .await
    }

    /// The closure begins. Its transaction has begun before.
    pub(crate) fn began() {
        let began = Try { began: Instant::now(), xid: None };
        let _outside_of_calls = CALL.try_with(|call| call.borrow_mut().tries.push(began));
    }

    /// The transaction's id.
    pub(crate) fn xid(xid: u64) {
        let _outside_of_calls = CALL.try_with(|call| {
            if let Some(last) = call.borrow_mut().tries.last_mut() {
                last.xid = Some(xid);
            }
        });
    }

    /// When it was decided that a call ends with success, at the latest: its transaction had begun on a server, or a
    /// server had told that it is committed.
    pub(crate) fn proven(&self) -> Option<Instant> {
        let settled = self.settlings.last().filter(|settling| settling.found == Found::Committed);
        settled.map(|settling| settling.at).or_else(|| self.tries.last().map(|last| last.began))
    }
}

/// Notes in the calls what the pool's log says of their settling.
pub(crate) struct Listener;

impl<S: Subscriber> Layer<S> for Listener {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut said = Said::default();
        event.record(&mut said);
        let found = match (said.message.as_str(), said.outcome.as_str()) {
            ("a commit without an answer was settled", "Committed") => Found::Committed,
            ("a commit without an answer was settled", "NotCommitted") => Found::NotCommitted,
            ("the outcome of a commit is not known", _) => Found::Unknown,
            _ => return,
        };
        let _outside_of_calls = CALL.try_with(|call| {
            let mut call = call.borrow_mut();
            let xid = call.tries.last().and_then(|last| last.xid);
            call.settlings.push(Settling { at: Instant::now(), found, xid });
        });
    }
}

/// The fields that tell of a settling.
#[derive(Default)]
struct Said {
    message: String,
    outcome: String,
}

impl Visit for Said {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let text = match field.name() {
            "message" => &mut self.message,
            "outcome" => &mut self.outcome,
            _ => return,
        };
        let _infallible = write!(text, "{value:?}");
    }
}
