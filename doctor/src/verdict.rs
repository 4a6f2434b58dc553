//! What a pool would do with these servers.

use tokio_postgres_failover::error::FailureKind;
use tokio_postgres_failover::view::{Answer, CandidateReport, Refusal, State};
use tokio_postgres_failover::{Error as PoolError, Pool};

/// What a pool would do, in one sentence, and whether that is good news.
pub(crate) fn verdict(pool: &Pool, candidates: &[CandidateReport], refused: Option<PoolError>) -> (bool, String) {
    if let State::Primary { endpoint, report } = pool.status().view.state {
        let timeline = report.timeline.map_or_else(String::new, |timeline| format!(", timeline {timeline}"));
        return (true, format!("A pool would use {}{timeline}.", endpoint.address));
    }
    if let Some(PoolError::Refused(refused)) = refused {
        return (false, format!("A pool would refuse every call at once, because {refused}."));
    }
    let count = |wanted: fn(&Answer) -> bool| {
        candidates.iter().filter(|candidate| candidate.answer.as_ref().is_some_and(wanted)).count()
    };
    let fenced = count(|answer| matches!(answer, Answer::Refused(_, Refusal::Fenced)));
    let standbys = count(|answer| matches!(answer, Answer::Refused(_, Refusal::Standby)));
    let busy = count(
        |answer| matches!(answer, Answer::Failed(failure) if matches!(failure.kind, FailureKind::NotNow | FailureKind::Full)),
    );
    let why = match (candidates.is_empty(), fenced, standbys) {
        (true, ..) => "the name leads to no server; check its spelling and the name servers (--dns)".to_owned(),
        (_, 1.., _) => {
            "the primary is fenced (default_transaction_read_only is on), and there is no other; look for a \
             full disk, a lost quorum or a manual setting"
                .to_owned()
        }
        (_, 0, 1..) => format!("none of the servers is a primary (standbys that answer: {standbys}); promote one"),
        _ if busy > 0 => {
            "a server is up and takes no session now: it starts, stops, or has too many clients; see its row".to_owned()
        }
        _ => "none of the servers answers as PostgreSQL; check that they run, the port, and the firewall".to_owned(),
    };
    (false, format!("A pool would wait: {why}."))
}
