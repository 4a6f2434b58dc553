//! What the page shows of the pool. It names servers, and holds nothing of the connection string but their names.

use std::time::SystemTime;

use serde::Serialize;
use tokio_postgres_failover::Pool;
use tokio_postgres_failover::error::FailureKind;
use tokio_postgres_failover::view::{Answer, CandidateReport, Endpoint, Refusal, ServerReport, State};

use crate::journal::{Tone, since_1970};
use crate::orders::Measured;

#[derive(Serialize)]
pub(crate) struct Status {
    /// This moment, in milliseconds since 1970: the page's own clock may differ.
    now: u64,
    state: &'static str,
    /// What `/readyz` says.
    ready: bool,
    /// Why the state changed last, and when.
    why: String,
    since: u64,
    generation: u64,
    primary: Option<Primary>,
    members: Vec<Member>,
    dns_failure: Option<String>,
    connections: Connections,
    orders: Measured,
}

#[derive(Serialize)]
struct Primary {
    endpoint: String,
    timeline: Option<u32>,
    /// As text: JavaScript's numbers have 53 bits.
    system_identifier: Option<String>,
}

#[derive(Serialize)]
struct Member {
    endpoint: String,
    role: &'static str,
    tone: Tone,
    /// Whether it is the primary that the pool uses.
    verified: bool,
    timeline: Option<u32>,
    /// What it said, or why it said nothing.
    answer: String,
}

#[derive(Serialize)]
struct Connections {
    open: usize,
    idle: usize,
    most: usize,
    /// Requests that wait for one.
    waiting: usize,
}

/// Reads what the pool knows. Nothing is asked of a server, and nothing waits.
pub(crate) fn of(pool: &Pool, orders: Measured) -> Status {
    let status = pool.status();
    let view = status.view;
    let primary = match &view.state {
        State::Primary { endpoint, report } => Some((endpoint, report)),
        _ => None,
    };
    let mut candidates = pool.candidates();
    candidates.sort_by(|a, b| (&a.endpoint.address, &a.endpoint.host).cmp(&(&b.endpoint.address, &b.endpoint.host)));
    let now = SystemTime::now();
    Status {
        now: since_1970(now),
        state: match view.state {
            State::Primary { .. } => "primary",
            State::Searching { .. } => "searching",
            State::Asleep => "asleep",
            _ => "stopping",
        },
        ready: primary.is_some(),
        since: since_1970(now.checked_sub(view.changed.at.elapsed()).unwrap_or(now)),
        generation: view.generation.get(),
        members: candidates.iter().map(|candidate| member(candidate, primary.map(|(endpoint, _)| endpoint))).collect(),
        primary: primary.map(|(endpoint, report)| Primary {
            endpoint: endpoint.to_string(),
            timeline: report.timeline,
            system_identifier: report.system_identifier.map(|identifier| identifier.to_string()),
        }),
        why: view.changed.why,
        dns_failure: pool.dns_failure(),
        connections: Connections {
            open: status.size,
            idle: status.available,
            most: status.max_size,
            waiting: status.waiting,
        },
        orders,
    }
}

fn member(candidate: &CandidateReport, primary: Option<&Endpoint>) -> Member {
    let verified = primary == Some(&candidate.endpoint);
    let (role, tone) = role(candidate.answer.as_ref(), verified);
    let report = candidate.answer.as_ref().and_then(report);
    Member {
        endpoint: candidate.endpoint.to_string(),
        role,
        tone,
        verified,
        timeline: report.and_then(|report| report.timeline),
        answer: candidate.answer.as_ref().map_or_else(|| "has not answered yet".to_owned(), Answer::to_string),
    }
}

fn report(answer: &Answer) -> Option<&ServerReport> {
    match answer {
        Answer::Primary(report) | Answer::Refused(report, _) => Some(report),
        _ => None,
    }
}

/// What to call a member. The last answer may be older than the pool's verdict, so only the verified primary is shown
/// as one.
fn role(answer: Option<&Answer>, verified: bool) -> (&'static str, Tone) {
    if verified {
        return ("primary", Tone::Good);
    }
    match answer {
        None => ("not asked yet", Tone::Plain),
        Some(Answer::Primary(_)) => ("primary, not verified", Tone::Warning),
        Some(Answer::Refused(_, refusal)) => match refusal {
            Refusal::Standby => ("standby", Tone::Plain),
            Refusal::Promoting => ("being promoted", Tone::Warning),
            Refusal::Fenced => ("fenced", Tone::Warning),
            Refusal::Zombie { .. } => ("old primary", Tone::Bad),
            Refusal::OtherCluster { .. } => ("other cluster", Tone::Bad),
            Refusal::AnotherServer => ("other server", Tone::Warning),
            _ => ("not identified", Tone::Warning),
        },
        Some(Answer::Failed(failure)) => match failure.kind {
            FailureKind::Unreachable | FailureKind::TimedOut | FailureKind::UnknownName => ("no answer", Tone::Bad),
            FailureKind::NotNow | FailureKind::Full => ("busy", Tone::Warning),
            _ => ("not usable", Tone::Bad),
        },
        Some(_) => ("unknown", Tone::Plain),
    }
}
