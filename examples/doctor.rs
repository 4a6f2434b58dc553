//! Says what a pool would do with a connection string: asks every server behind it, side by side.
//!
//! `cargo run --example doctor -- 'postgres://user:password@name:5432/db' [--dns 10.0.0.2:53]`
//!
//! Exit code: 0 when a pool would use a primary, 1 when it would wait or fail, 2 when the command is wrong.

use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};
use tokio_postgres_failover::error::FailureKind;
use tokio_postgres_failover::view::{Answer, CandidateReport, Refusal, Role, ServerReport, State};
use tokio_postgres_failover::{Error as PoolError, Pool};

const USAGE: &str = "usage: doctor 'postgres://user:password@name:5432/db' [--dns 10.0.0.2:53]";
/// Time for each server, all at once.
const PROBE: Duration = Duration::from_secs(3);
/// Time for everything, resolving included.
const LIMIT: Duration = Duration::from_secs(4);

#[tokio::main]
async fn main() -> ExitCode {
    let pool = match pool() {
        Ok(pool) => pool,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    let began = Instant::now();
    let deadline = began + LIMIT;
    let found = timeout_at(deadline, pool.connect()).await;
    // The first good answer decides; what the others say is of interest here.
    while !all_answered(&pool) && Instant::now() < deadline {
        sleep(Duration::from_millis(20)).await;
    }
    let mut candidates = pool.candidates();
    candidates.sort_by(|a, b| a.endpoint.address.cmp(&b.endpoint.address));
    print_table(&candidates);
    if let Some(failure) = pool.dns_failure() {
        println!("DNS: {failure}");
    }
    let refused = found.ok().and_then(Result::err);
    let (good, sentence) = verdict(&pool, &candidates, refused);
    println!("{sentence}");
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn pool() -> Result<Pool, Box<dyn Error>> {
    let mut url = None;
    let mut dns = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == "--dns" {
            let server = arguments.next().ok_or_else(|| format!("--dns needs a name server\n{USAGE}"))?;
            dns.push(name_server(&server)?);
        } else if argument.starts_with("--") || url.is_some() {
            // What stands in the wrong place may be a password: it is not repeated.
            return Err(format!("one connection string is expected, and --dns at most\n{USAGE}").into());
        } else {
            url = Some(argument);
        }
    }
    let url = url.ok_or_else(|| format!("which database? Name it by its connection string\n{USAGE}"))?;
    let mut builder = Pool::builder(url)?.probe_timeout(PROBE).application_name("doctor");
    if !dns.is_empty() {
        builder = builder.dns_servers(dns);
    }
    Ok(builder.build()?)
}

/// A name server, on port 53 unless told.
fn name_server(text: &str) -> Result<SocketAddr, String> {
    let bare = || text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 53));
    text.parse().or_else(|_| bare()).map_err(|_| format!("--dns {text}: expected an address, as in 10.0.0.2:53"))
}

/// Has there been an answer of DNS, and one of every candidate?
fn all_answered(pool: &Pool) -> bool {
    let candidates = pool.candidates();
    let resolved = !candidates.is_empty() || pool.dns_failure().is_some();
    resolved && candidates.iter().all(|candidate| candidate.answer.is_some())
}

fn print_table(candidates: &[CandidateReport]) {
    if candidates.is_empty() {
        return;
    }
    let newest = candidates.iter().filter_map(writable).max_by_key(|report| (report.timeline, report.wal));
    let mut rows =
        vec![["address", "name", "role", "timeline", "read-only", "lag", "round trip", ""].map(str::to_owned)];
    rows.extend(candidates.iter().map(|candidate| row(candidate, newest)));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 8] = std::array::from_fn(width);
    for row in &rows {
        let mut line = String::new();
        for (text, width) in row.iter().zip(widths) {
            line.push_str(text);
            line.extend(std::iter::repeat_n(' ', width + 2 - text.chars().count()));
        }
        println!("{}", line.trim_end());
    }
    println!();
}

fn row(candidate: &CandidateReport, newest: Option<&ServerReport>) -> [String; 8] {
    let none = || "–".to_owned();
    let took = candidate.took.map_or_else(none, |took| format!("{:.1} ms", took.as_secs_f64() * 1000.0));
    let (report, error) = match &candidate.answer {
        Some(Answer::Primary(report) | Answer::Refused(report, Refusal::Standby)) => (Some(report), String::new()),
        Some(Answer::Refused(report, refusal)) => (Some(report), refusal.to_string()),
        Some(Answer::Failed(failure)) => (None, failure.to_string()),
        _ => (None, format!("no answer within {LIMIT:?}")),
    };
    let of = |show: &dyn Fn(&ServerReport) -> String| report.map_or_else(none, show);
    let timeline = |report: &ServerReport| report.timeline.map_or_else(none, |timeline| timeline.to_string());
    let lag = |report: &ServerReport| match (report.in_recovery, newest.and_then(|newest| newest.wal), report.wal) {
        (true, Some(newest), Some(wal)) => format!("{} B", newest.get().saturating_sub(wal.get())),
        _ => none(),
    };
    [
        candidate.endpoint.address.to_string(),
        candidate.endpoint.host.as_deref().unwrap_or("–").to_owned(),
        candidate.answer.as_ref().map_or_else(none, |answer| role(answer, newest)),
        of(&timeline),
        of(&|report| (if report.read_only { "yes" } else { "no" }).to_owned()),
        of(&lag),
        took,
        error,
    ]
}

fn role(answer: &Answer, newest: Option<&ServerReport>) -> String {
    let newest = newest.and_then(|newest| newest.timeline);
    let name = match answer {
        // It may have answered before the newer one was known.
        Answer::Primary(report) if report.timeline < newest => "old primary",
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
    };
    name.to_owned()
}

/// The report of a server that is not in recovery.
fn writable(candidate: &CandidateReport) -> Option<&ServerReport> {
    match &candidate.answer {
        Some(Answer::Primary(report) | Answer::Refused(report, Refusal::Fenced)) => Some(report),
        _ => None,
    }
}

/// What a pool would do, in one sentence, and whether that is good news.
fn verdict(pool: &Pool, candidates: &[CandidateReport], refused: Option<PoolError>) -> (bool, String) {
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
