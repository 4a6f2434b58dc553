//! What a call costs while nothing happens: `get`, `SELECT 1` and return, and transactions of one INSERT.
//!
//! Each pool runs for a short slice, all of them one after the other, round after round in another order; a ratio is
//! that of a slice to the slice of deadpool-postgres `Fast` in the same round. What another program does to the machine
//! meanwhile hits both. Messages and allocations are counted, not sampled, by a run of one task alone.

mod subjects;

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use testbed::{Cluster, Tap};

use crate::counting;
use crate::measurement::Measurement;
use subjects::{BASE, Slice, Subject, Where};

/// Connections in each pool.
pub const CONNECTIONS: usize = 8;
/// So many calls are counted, after as many that are not.
const COUNTED: u32 = 200;

/// Why it could not be measured.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What a call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// `get`, `SELECT 1` and return.
    Get,
    /// A transaction with one INSERT.
    Transaction,
}

impl Work {
    fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Transaction => "transaction",
        }
    }
}

/// What is measured, and for how long.
#[derive(Clone, Debug)]
pub struct Options {
    /// `ROUNDS`: slices of each subject.
    pub rounds: usize,
    /// `SECONDS`: the length of a slice.
    pub slice: Duration,
    /// `TASKS=1,8,64,512`: how many tasks call at the same time.
    pub tasks: Vec<usize>,
    /// `WORK=get,transaction`.
    pub work: Vec<Work>,
    /// `SUBJECTS=failover,bb8`: these alone, and the one that ratios are relative to. All unless told.
    pub subjects: Vec<String>,
    /// `COMMIT_DELAY`: how long a COMMIT waits for its disk, in microseconds. On loopback and a fast disk, the
    /// processors are what is measured.
    pub commit_delay: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            rounds: 15,
            slice: Duration::from_millis(500),
            tasks: vec![1, 8, 64, 512],
            work: vec![Work::Get, Work::Transaction],
            subjects: Vec::new(),
            commit_delay: 0,
        }
    }
}

impl Options {
    /// Reads the process's environment.
    pub fn from_environment() -> Result<Self, Failure> {
        Self::read(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self, Failure> {
        let mut options = Self::default();
        if let Some(rounds) = variable("ROUNDS") {
            options.rounds = number("ROUNDS", &rounds)?;
        }
        if let Some(seconds) = variable("SECONDS") {
            let seconds: f64 = number("SECONDS", &seconds)?;
            options.slice = Duration::try_from_secs_f64(seconds).map_err(|error| format!("SECONDS: {error}"))?;
        }
        if let Some(tasks) = variable("TASKS") {
            options.tasks = tasks.split(',').map(|word| number("TASKS", word)).collect::<Result<_, _>>()?;
        }
        if let Some(delay) = variable("COMMIT_DELAY") {
            options.commit_delay = number("COMMIT_DELAY", &delay)?;
        }
        if let Some(work) = variable("WORK") {
            let known = |word| [Work::Get, Work::Transaction].into_iter().find(|it| it.name() == word);
            let read = |word| known(word).ok_or_else(|| format!("WORK={word}: say get or transaction"));
            options.work = work.split(',').map(read).collect::<Result<_, _>>()?;
        }
        if let Some(subjects) = variable("SUBJECTS") {
            options.subjects = subjects.split(',').map(str::to_owned).collect();
        }
        if options.rounds == 0 || options.tasks.contains(&0) || options.slice.is_zero() {
            return Err("ROUNDS, TASKS and SECONDS are 1 or more, and more than nothing".into());
        }
        Ok(options)
    }
}

fn number<T: std::str::FromStr>(name: &str, text: &str) -> Result<T, Failure> {
    text.trim().parse().map_err(|_| format!("{name}={text}: say a number").into())
}

/// Starts a primary with a synchronous standby, `fsync` on, and measures. `progress` is told what is measured now.
pub async fn run(options: &Options, progress: impl Fn(&str)) -> Result<Vec<Measurement>, Failure> {
    let cluster = Cluster::builder()
        .nodes(2)
        .setting("fsync", "on")
        .setting("commit_delay", &options.commit_delay.to_string())
        .setting("commit_siblings", "0")
        .setting("max_connections", "300")
        .start()
        .await;
    subjects::prepare(&cluster.direct(cluster.primary()).await).await?;
    let direct = Where { address: cluster.socket_addr(cluster.primary()) };
    let tap = Tap::start(SocketAddr::new(cluster.spare_addr(0), 0), direct.address).await;
    let mut measured = Vec::new();
    for work in &options.work {
        let wanted = |subject: &dyn Subject| {
            let named = |name: &String| *name == subject.name();
            subject.name() == BASE || options.subjects.is_empty() || options.subjects.iter().any(named)
        };
        let open = async |at: Where| -> Result<Vec<Box<dyn Subject>>, Failure> {
            let all = subjects::open(*work, at).await?;
            Ok(all.into_iter().filter(|subject| wanted(&**subject)).collect())
        };
        progress(&format!("{}: messages and allocations", work.name()));
        for subject in open(Where { address: tap.addr() }).await? {
            measured.extend(counted(*work, &*subject, &tap).await?);
        }
        let subjects = open(direct).await?;
        for tasks in &options.tasks {
            progress(&format!("{}: {tasks} tasks, {} rounds", work.name(), options.rounds));
            measured.extend(paired(*work, &subjects, *tasks, options).await?);
        }
    }
    Ok(measured)
}

/// Messages and allocations of one call.
async fn counted(work: Work, subject: &dyn Subject, tap: &Tap) -> Result<Vec<Measurement>, Failure> {
    subject.calls(COUNTED).await?;
    tap.reset();
    let (done, allocated) = counting::allocations(subject.calls(COUNTED)).await;
    done?;
    let counts = tap.counts();
    let case = format!("quiet/{}", work.name());
    let one = |metric: &str, unit: &str, total: u64| {
        #[expect(clippy::cast_precision_loss, reason = "some thousands")]
        let each = total as f64 / f64::from(COUNTED);
        Measurement::new(subject.name(), case.as_str(), metric, unit, vec![Some(each)])
    };
    Ok(vec![
        one("round trips", "count", counts.round_trips),
        one("messages", "count", counts.by_type.values().sum()),
        one("allocations", "count", allocated.calls),
        one("allocated", "B", allocated.bytes),
    ])
}

/// Round after round, a slice of each subject.
async fn paired(
    work: Work,
    subjects: &[Box<dyn Subject>],
    tasks: usize,
    options: &Options,
) -> Result<Vec<Measurement>, Failure> {
    let subjects: Vec<_> = subjects.iter().filter(|subject| tasks <= subject.most_tasks()).collect();
    let mut slices: Vec<Vec<Slice>> = vec![Vec::new(); subjects.len()];
    for subject in &subjects {
        subject.slice(tasks, options.slice / 5).await?;
    }
    for round in 0..options.rounds {
        for index in order(subjects.len(), round) {
            slices[index].push(subjects[index].slice(tasks, options.slice).await?);
        }
    }
    let base = subjects.iter().position(|subject| subject.name() == BASE).ok_or("the base is always measured")?;
    let case = format!("quiet/{}/{tasks}", work.name());
    let mut measured = Vec::new();
    for (index, subject) in subjects.iter().enumerate() {
        let mut metric = |name: &str, unit: &str, of: fn(&Slice) -> f64| {
            let samples = slices[index].iter().map(|slice| Some(of(slice))).collect();
            measured.push(Measurement::new(subject.name(), case.as_str(), name, unit, samples));
            let ratios = slices[index].iter().zip(&slices[base]).map(|(slice, base)| Some(of(slice) / of(base)));
            let metric = format!("{name}, ratio");
            measured.push(Measurement::new(subject.name(), case.as_str(), metric, "ratio", ratios.collect()));
        };
        metric("throughput", "/s", |slice| slice.throughput);
        metric("p50", "us", |slice| slice.p50);
        metric("p99", "us", |slice| slice.p99);
        metric("p99.9", "us", |slice| slice.p999);
        metric("cpu", "us", |slice| slice.cpu);
    }
    Ok(measured)
}

/// Every round begins with another subject, and every other round runs backwards: nobody always follows the same one.
fn order(count: usize, round: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).map(|place| (place + round / 2) % count).collect();
    if round % 2 == 1 {
        order.reverse();
    }
    order
}

/// The figures as tables, one for each case.
pub fn tables(measured: &[Measurement]) -> String {
    let mut text = String::new();
    let mut cases: Vec<&str> = measured.iter().map(|it| it.case.as_str()).collect();
    cases.dedup();
    for case in cases {
        let of_case: Vec<&Measurement> = measured.iter().filter(|it| it.case == case).collect();
        let mut metrics: Vec<&str> = Vec::new();
        let mut peers: Vec<&str> = Vec::new();
        for it in &of_case {
            if !metrics.contains(&it.metric.as_str()) {
                metrics.push(&it.metric);
            }
            if !peers.contains(&it.peer.as_str()) {
                peers.push(&it.peer);
            }
        }
        let _ = writeln!(text, "\n{case}\n\n| | {} |\n|---|{}", metrics.join(" | "), "---|".repeat(metrics.len()));
        for peer in peers {
            let cell = |metric: &&str| {
                let found = of_case.iter().find(|it| it.peer == peer && it.metric == **metric);
                found.map_or_else(|| "–".to_owned(), |it| cell(it))
            };
            let cells: Vec<String> = metrics.iter().map(cell).collect();
            let _ = writeln!(text, "| {peer} | {} |", cells.join(" | "));
        }
    }
    text
}

fn cell(measured: &Measurement) -> String {
    let spread = measured.spread();
    let [median, min, max] = [spread.median, spread.min, spread.max].map(|it| it.unwrap_or(f64::NAN));
    match measured.unit.as_str() {
        "ratio" => format!("{median:.3} ({min:.3} – {max:.3})"),
        "/s" => format!("{median:.0}"),
        unit => format!("{median:.1} {}", if unit == "count" { "" } else { unit }).trim_end().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_always_follows_the_same_one() {
        let orders: Vec<_> = (0..4).map(|round| order(3, round)).collect();
        assert_eq!(orders, [[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1]]);
    }

    #[test]
    fn options_are_read_or_refused() {
        let read = |given: &[(&str, &str)]| {
            Options::read(|name| given.iter().find(|(given, _)| *given == name).map(|(_, value)| (*value).to_owned()))
        };
        let options = read(&[("TASKS", "1,16"), ("WORK", "transaction"), ("SECONDS", "0.2")]).unwrap();
        assert_eq!((options.tasks, options.work), (vec![1, 16], vec![Work::Transaction]));
        assert_eq!(options.slice, Duration::from_millis(200));
        for bad in [("TASKS", "1,x"), ("WORK", "rest"), ("SECONDS", "-1"), ("ROUNDS", "0"), ("COMMIT_DELAY", "3ms")] {
            let refused = read(&[bad]).unwrap_err().to_string();
            assert!(refused.contains(bad.0), "{refused}");
        }
    }

    /// Everything once, and short: every subject answers, sends what it has to, and the figures are there.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn every_subject_is_measured() {
        let options = Options { rounds: 1, slice: Duration::from_millis(50), tasks: vec![1, 16], ..Options::default() };
        let measured = run(&options, |_| ()).await.unwrap();
        let median = |peer: &str, case: &str, metric: &str| {
            let found = measured.iter().find(|it| (&*it.peer, &*it.case, &*it.metric) == (peer, case, metric));
            found.unwrap_or_else(|| panic!("{peer} {case} {metric}")).spread().median.unwrap()
        };
        for (peer, trips) in [("failover", 1.0), (BASE, 1.0), ("deadpool-verified", 2.0), ("bb8-untested", 1.0)] {
            assert!((median(peer, "quiet/get", "round trips") - trips).abs() < f64::EPSILON, "{peer}");
            assert!(median(peer, "quiet/get/16", "throughput") > 1.0, "{peer}");
        }
        for peer in ["exactly-once", "at-most-once", "idempotent", "ledger", BASE, "sqlx", "bb8"] {
            assert!(median(peer, "quiet/transaction", "allocations") >= 1.0, "{peer}");
            assert!(median(peer, "quiet/transaction/1", "p50") > 1.0, "{peer}");
        }
        assert!((median(BASE, "quiet/get/1", "throughput, ratio") - 1.0).abs() < f64::EPSILON);
        let text = tables(&measured);
        assert!(text.contains("quiet/transaction/16") && text.contains("| ledger |"), "{text}");
    }
}
