//! What the cluster's task waits for: the look-up of a name, or the answer of a server.
//!
//! Nothing is decided here. Each piece of work holds only what the task gives it.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::timeout;

use super::Name;
use super::kept::Number;
use crate::resolve::{Addresses, Resolve, ResolveError};
use crate::server::{Open, Opened, Scope, Session, SessionClient, panicked};
use crate::topology::{Endpoint, FailureKind, NameAnswer, ProbeFailure, PromotionWait, Question, ServerReport};

/// Time limit for a look-up. The resolver's own limit is shorter.
const RESOLVE_WITHIN: Duration = Duration::from_secs(10);

/// The result of a piece of work.
pub(super) enum WorkResult<C> {
    Resolved {
        name: usize,
        answer: NameAnswer,
    },
    Opened {
        endpoint: Endpoint,
        beside: bool,
        fresh: bool,
        result: Opened<C>,
    },
    /// The answer on a kept session. `session` is `None` if a panic has lost it.
    Asked {
        endpoint: Endpoint,
        number: Number,
        session: Option<Session<C>>,
        beside: bool,
        result: Result<ServerReport, ProbeFailure>,
    },
}

/// How one server is asked.
#[derive(Clone, Copy)]
pub(super) struct ProbeOptions {
    pub(super) fresh: bool,
    pub(super) beside: bool,
    pub(super) promotion_wait: Option<PromotionWait>,
    pub(super) within: Duration,
}

/// Turns a panic of the program's log during this work into a failed answer. Without an answer, the topology would wait
/// for one for ever and never ask again.
pub(super) async fn contained<C>(
    work: impl Future<Output = WorkResult<C>>,
    failed: impl FnOnce(ProbeFailure) -> WorkResult<C>,
) -> WorkResult<C> {
    let done = AssertUnwindSafe(work).catch_unwind().await;
    done.unwrap_or_else(|panic| failed(panicked("what the program logs with", &*panic)))
}

/// Asks the resolver for the addresses of the configured name with this index.
pub(super) async fn look_up<C>(index: usize, name: Name, resolver: Arc<dyn Resolve>) -> WorkResult<C> {
    let answer = match addresses_of(&*resolver, &name.host).await {
        Ok(addresses) if addresses.is_empty() => NameAnswer::Unknown(format!("{} has no address", name.host)),
        Ok(addresses) => NameAnswer::Addresses {
            partial: addresses.partial().map(ToString::to_string),
            endpoints: name.endpoints(&addresses),
        },
        Err(error) if error.is_answer() => NameAnswer::Unknown(error.to_string()),
        Err(error) => NameAnswer::Failed(error.to_string()),
    };
    WorkResult::Resolved { name: index, answer }
}

/// Asks the resolver, within a time limit. It may be user code, so it may take too long or panic; that costs only this
/// one answer.
async fn addresses_of(resolver: &dyn Resolve, host: &str) -> Result<Addresses, ResolveError> {
    let answer = AssertUnwindSafe(async { resolver.resolve(host).await }).catch_unwind();
    match timeout(RESOLVE_WITHIN, answer).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) => Err(ResolveError::custom(host, "the resolver panicked")),
        Err(_) => Err(ResolveError::custom(host, format!("the resolver gave no answer within {RESOLVE_WITHIN:?}"))),
    }
}

/// Asks a server on its kept session, or on a new one, which ends with `scope`.
pub(super) async fn ask<C: SessionClient>(
    opener: Arc<dyn Open<C>>,
    endpoint: Endpoint,
    kept: Option<(Number, Session<C>)>,
    ProbeOptions { fresh, beside, promotion_wait, within }: ProbeOptions,
    scope: Scope,
) -> WorkResult<C> {
    let silent = || ProbeFailure::new(FailureKind::TimedOut, format!("no answer within {within:?}"));
    match kept {
        Some((number, session)) => {
            let answer = timeout(within, opener.ask(&endpoint.address, &session.client, promotion_wait)).await;
            let result = answer.unwrap_or_else(|_| Err(silent()));
            WorkResult::Asked { endpoint, number, session: Some(session), beside, result }
        }
        None if beside && !fresh => {
            let result = Err(ProbeFailure::new(FailureKind::Unreachable, "no session is open"));
            WorkResult::Opened { endpoint, beside, fresh, result }
        }
        None => {
            let answer = timeout(within, opener.open(&endpoint, Question::Candidate, scope)).await;
            let late = |_| {
                let message = format!("no answer within {within:?} (probe_timeout)");
                Err(ProbeFailure::new(FailureKind::TimedOut, message))
            };
            WorkResult::Opened { endpoint, beside, fresh: true, result: answer.unwrap_or_else(late) }
        }
    }
}
