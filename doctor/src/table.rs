//! The servers as a table, and as JSON.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tokio_postgres_failover::error::FailureKind;
use tokio_postgres_failover::view::{Answer, CandidateReport, Refusal, Role, ServerReport};

const COLUMNS: [&str; 8] = ["address", "name", "role", "timeline", "read-only", "lag", "round trip", ""];

/// The rows of a table, the heading first. Empty if there are no servers.
pub(crate) fn lines(candidates: &[CandidateReport]) -> Vec<String> {
    if candidates.is_empty() {
        return Vec::new();
    }
    let newest = newest(candidates);
    let mut rows = vec![COLUMNS.map(str::to_owned)];
    rows.extend(candidates.iter().map(|candidate| row(candidate, newest)));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; COLUMNS.len()] = std::array::from_fn(width);
    let line = |row: &[String; COLUMNS.len()]| {
        let padded = row.iter().zip(widths).map(|(text, width)| format!("{text:width$}  "));
        padded.collect::<String>().trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

/// A line as it is printed: what servers and name servers say must not steer the terminal.
pub(crate) fn clean(line: &str) -> String {
    line.replace(char::is_control, " ")
}

/// The servers as JSON. What is not known is `null`.
pub(crate) fn json(candidates: &[CandidateReport]) -> Value {
    let newest = newest(candidates);
    let server = |candidate: &CandidateReport| {
        let answer = candidate.answer.as_ref();
        let (report, error) = answer.map_or((None, None), parts);
        json!({
            "address": candidate.endpoint.address.to_string(),
            "name": candidate.endpoint.host.as_deref(),
            "role": answer.map(|answer| role(answer, newest)),
            "timeline": report.and_then(|report| report.timeline),
            "read_only": report.map(|report| report.read_only),
            "lag_bytes": report.and_then(|report| lag(report, newest)),
            "round_trip_ms": candidate.took.map(|took| took.as_secs_f64() * 1000.0),
            "error": error,
        })
    };
    candidates.iter().map(server).collect()
}

/// What a line tells of each server, by its address: its role, its timeline, and what is wrong with it.
pub(crate) fn told(candidates: &[CandidateReport]) -> BTreeMap<String, String> {
    let newest = newest(candidates);
    let server = |candidate: &CandidateReport| {
        let answer = candidate.answer.as_ref();
        let (report, error) = answer.map_or((None, None), parts);
        let role = answer.map_or("no answer yet", |answer| role(answer, newest));
        let timeline = report.and_then(|report| report.timeline).map(|timeline| format!(", timeline {timeline}"));
        let error = error.map(|error| format!(": {error}"));
        let told = format!("{role}{}{}", timeline.unwrap_or_default(), error.unwrap_or_default());
        (candidate.endpoint.address.to_string(), told)
    };
    candidates.iter().map(server).collect()
}

/// The report of the writable server that has come furthest.
fn newest(candidates: &[CandidateReport]) -> Option<&ServerReport> {
    candidates.iter().filter_map(writable).max_by_key(|report| (report.timeline, report.wal))
}

/// What a server reports, and what is wrong with it.
fn parts(answer: &Answer) -> (Option<&ServerReport>, Option<String>) {
    match answer {
        Answer::Primary(report) | Answer::Refused(report, Refusal::Standby) => (Some(report), None),
        Answer::Refused(report, refusal) => (Some(report), Some(refusal.to_string())),
        Answer::Failed(failure) => (None, Some(failure.to_string())),
        _ => (None, None),
    }
}

/// How many bytes of WAL a standby is behind.
fn lag(report: &ServerReport, newest: Option<&ServerReport>) -> Option<u64> {
    let (newest, wal) = (newest?.wal?, report.wal?);
    report.in_recovery.then(|| newest.get().saturating_sub(wal.get()))
}

fn row(candidate: &CandidateReport, newest: Option<&ServerReport>) -> [String; COLUMNS.len()] {
    let none = || "–".to_owned();
    let took = candidate.took.map_or_else(none, |took| format!("{:.1} ms", took.as_secs_f64() * 1000.0));
    let none_yet = || (None, Some("no answer yet".to_owned()));
    let (report, error) = candidate.answer.as_ref().map_or_else(none_yet, parts);
    let of = |show: &dyn Fn(&ServerReport) -> String| report.map_or_else(none, show);
    let timeline = |report: &ServerReport| report.timeline.map_or_else(none, |timeline| timeline.to_string());
    let lag = |report: &ServerReport| lag(report, newest).map_or_else(none, |bytes| format!("{bytes} B"));
    [
        candidate.endpoint.address.to_string(),
        candidate.endpoint.host.as_deref().unwrap_or("–").to_owned(),
        candidate.answer.as_ref().map_or("–", |answer| role(answer, newest)).to_owned(),
        of(&timeline),
        of(&|report| (if report.read_only { "yes" } else { "no" }).to_owned()),
        of(&lag),
        took,
        error.unwrap_or_default(),
    ]
}

pub(crate) fn role(answer: &Answer, newest: Option<&ServerReport>) -> &'static str {
    let newest = newest.and_then(|newest| newest.timeline);
    match answer {
        // It may have answered before the newer one was known.
        Answer::Primary(report) if report.timeline.is_some() && report.timeline < newest => "old primary",
        Answer::Refused(_, Refusal::Zombie { .. }) => "old primary",
        Answer::Refused(_, Refusal::OtherCluster { .. }) => "foreign",
        Answer::Primary(report) | Answer::Refused(report, _) => match report.role() {
            Role::Primary => "primary",
            Role::Standby => "standby",
            Role::Fenced => "fenced",
            Role::Promoting => "promoting",
            _ => "other",
        },
        Answer::Failed(failure) => match failure.kind {
            FailureKind::Refused => "refuses us",
            FailureKind::NotPostgres => "no server",
            FailureKind::NotNow => "not ready",
            FailureKind::Full => "full",
            FailureKind::TimedOut => "silent",
            _ => "down",
        },
        _ => "other",
    }
}

/// The report of a server that is not in recovery.
fn writable(candidate: &CandidateReport) -> Option<&ServerReport> {
    match &candidate.answer {
        Some(Answer::Primary(report) | Answer::Refused(report, Refusal::Fenced)) => Some(report),
        _ => None,
    }
}
