//! What a pool would do with these servers.

use tokio_postgres_failover::error::FailureKind;
use tokio_postgres_failover::view::{Answer, CandidateReport, Refusal, State};
use tokio_postgres_failover::{Error, Pool};

/// What a pool would do, in one sentence, and whether that is good news. `refused`: the error of a call, if there was
/// one.
pub(crate) fn verdict(pool: &Pool, candidates: &[CandidateReport], refused: Option<Error>) -> (bool, String) {
    let because = match (pool.status().view.state, refused) {
        (State::Primary { endpoint, report }, _) => {
            let timeline = report.timeline.map_or_else(String::new, |timeline| format!(", timeline {timeline}"));
            return (true, format!("A pool would use {}{timeline}.", endpoint.address));
        }
        (_, Some(Error::Refused(refused))) => refused.to_string(),
        (State::Searching { refused: Some(failure) }, _) => failure.to_string(),
        _ => {
            let answers: Vec<Option<&Answer>> = candidates.iter().map(|candidate| candidate.answer.as_ref()).collect();
            return (false, format!("A pool would wait: {}.", why_none(&answers)));
        }
    };
    (false, format!("A pool would refuse every call at once, because {because}."))
}

/// Why none of the servers is a primary that a pool would use, and what to do. The first thing that holds for one of
/// them.
fn why_none(answers: &[Option<&Answer>]) -> String {
    let count = |wanted: fn(&Answer) -> bool| answers.iter().flatten().filter(|answer| wanted(answer)).count();
    let failed = |kinds: &[FailureKind]| {
        let is_one = |answer: &&&Answer| matches!(answer, Answer::Failed(failure) if kinds.contains(&failure.kind));
        answers.iter().flatten().filter(is_one).count()
    };
    let cases = [
        (
            usize::from(answers.is_empty()),
            "the name leads to no server; check its spelling and the name servers (--dns)",
        ),
        (
            count(|answer| matches!(answer, Answer::Refused(_, Refusal::Fenced))),
            "the primary is fenced (default_transaction_read_only is on), and there is no other; look for a full disk, \
             a lost quorum or a manual setting",
        ),
        (
            count(|answer| matches!(answer, Answer::Refused(_, Refusal::Promoting))),
            "a standby is being promoted; it takes a moment",
        ),
        (
            count(|answer| matches!(answer, Answer::Refused(_, Refusal::Zombie { .. }))),
            "an old primary is up, and its successor is not; start the successor",
        ),
        (
            count(|answer| matches!(answer, Answer::Refused(_, Refusal::OtherCluster { .. }))),
            "a server of another cluster answers; check where the name leads to",
        ),
        (
            failed(&[FailureKind::NotNow, FailureKind::Full]),
            "a server is up and takes no session now: it starts, stops, or has too many clients; see its row",
        ),
        (
            failed(&[FailureKind::Refused]),
            "a server refuses these credentials, this database or this sslmode; see its row",
        ),
        (
            count(|answer| matches!(answer, Answer::Refused(_, refusal) if *refusal != Refusal::Standby)),
            "a primary answers that a pool does not use; see its row",
        ),
        (
            count(|answer| matches!(answer, Answer::Refused(_, Refusal::Standby))),
            "none of the servers is a primary; promote a standby",
        ),
        (answers.iter().filter(|answer| answer.is_none()).count(), "not every server has answered yet"),
    ];
    let found = cases.into_iter().find(|(count, _)| *count > 0);
    let text = found.map_or(
        "none of the servers answers as PostgreSQL; check that they run, the port, and the firewall",
        |(_, text)| text,
    );
    text.to_owned()
}
