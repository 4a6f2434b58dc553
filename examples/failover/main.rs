//! The demo: a primary fails in three ways while this pool and a plain deadpool-postgres pool write to the same
//! cluster.
//!
//! `make demo`, or `cargo run --release --example failover`. It starts its own servers. Environment:
//! - `FAULT=kill`: `kill -9`; `FAULT=freeze`: the host stops without a word; `FAULT=demotion`: the primary is made
//!   read-only
//!   in place. Unless told, all three, one after the other.
//! - `RUNS=20` repeats each failover on fresh clusters and shows median, minimum and maximum of each figure.
//! - `DNS=moves` (default): the name leads to the primary alone and moves 200 ms after the promotion; `DNS=all`: it
//!   lists
//!   all members all the time; `DNS=hosts`: the connection string names the three hosts, and there is no DNS.
//! - `DETECT_MS=1000`: how long the cluster's manager takes to notice that the primary is dead.
//!
//! The exit code is not zero when this pool lost a write, stored one twice, or let an error through.

mod fault;
mod figures;
mod load;
mod picture;
mod plain;
mod scenario;
mod screen;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use fault::Fault;
use scenario::Run;
use screen::Screen;

/// Writers on each side, and connections in each pool.
const WRITERS: usize = 8;
/// Pause of a writer between two writes. It leaves two processor cores room for three servers and both loads.
const PACE: Duration = Duration::from_millis(5);

/// What the clients know of where the servers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Naming {
    /// DNS names the primary alone, and moves a while after the promotion.
    Moves,
    /// DNS names all members.
    All,
    /// The connection string names all members by address.
    Hosts,
}

impl Naming {
    fn name(self) -> &'static str {
        match self {
            Self::Moves => "moves",
            Self::All => "all",
            Self::Hosts => "hosts",
        }
    }

    fn explained(self) -> &'static str {
        match self {
            Self::Moves => "DNS names the primary alone and moves 200 ms after the promotion",
            Self::All => "DNS names all members all the time",
            Self::Hosts => "the connection string names the three hosts; no DNS",
        }
    }
}

/// What the environment asks for.
#[derive(Clone, Copy, Debug)]
struct Settings {
    /// `None`: all, one after the other.
    fault: Option<Fault>,
    runs: usize,
    naming: Naming,
    detection: Duration,
}

impl Settings {
    fn from_environment() -> Result<Self, Box<dyn Error>> {
        let naming = match std::env::var("DNS").as_deref() {
            Err(_) | Ok("" | "moves") => Naming::Moves,
            Ok("all") => Naming::All,
            Ok("hosts") => Naming::Hosts,
            Ok(other) => return Err(format!("DNS={other}: say moves, all or hosts").into()),
        };
        let fault = match std::env::var("FAULT").as_deref() {
            Err(_) | Ok("") => None,
            Ok(name) => Some(Fault::named(name).ok_or_else(|| format!("FAULT={name}: say kill, freeze or demotion"))?),
        };
        let runs = usize::try_from(number("RUNS", 1)?)?;
        if runs == 0 {
            return Err("RUNS=0: there is nothing to run; say 1 or more".into());
        }
        Ok(Self { fault, runs, naming, detection: Duration::from_millis(number("DETECT_MS", 1000)?) })
    }
}

fn number(variable: &str, default: u64) -> Result<u64, Box<dyn Error>> {
    match std::env::var(variable) {
        Ok(text) if !text.is_empty() => {
            text.parse().map_err(|_| format!("{variable}={text}: say a whole number").into())
        }
        _ => Ok(default),
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    // Silent unless RUST_LOG asks: RUST_LOG=tokio_postgres_failover=debug shows what the pool does.
    tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).init();
    match demo().await {
        Ok(faults) if faults.is_empty() => ExitCode::SUCCESS,
        Ok(faults) => {
            for fault in faults {
                eprintln!("FAILED: {fault}");
            }
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("the demo could not be run: {error}");
            ExitCode::from(2)
        }
    }
}

/// Runs everything; returns what this pool did wrong.
async fn demo() -> Result<Vec<String>, Box<dyn Error>> {
    let settings = Settings::from_environment()?;
    let screen = Screen::new(settings.runs);
    screen.say(&format!(
        "{WRITERS} writers each through this pool and through plain deadpool-postgres, one write every {PACE:?};\n\
         {}; a manager that notices within {:?}",
        settings.naming.explained(),
        settings.detection
    ));
    let mut all: Vec<(Fault, Vec<Run>)> = Vec::new();
    let mut faults = Vec::new();
    for fault in Fault::ALL.into_iter().filter(|fault| settings.fault.is_none_or(|only| only == *fault)) {
        screen.say(&format!("\n{}", fault.explained()));
        let mut runs = Vec::new();
        for number in 1..=settings.runs {
            let run = scenario::run(settings, fault, &screen).await?;
            let who = format!("{}, run {number} of {}", fault.name(), settings.runs);
            faults.extend(run.pool.figures.faults().into_iter().map(|fault| format!("{who}: {fault}")));
            faults.extend(run.pool.messages.iter().map(|message| format!("{who}: a caller got: {message}")));
            if settings.runs > 1 {
                screen.summary(number, &run);
            }
            runs.push(run);
        }
        screen.table(&runs);
        all.push((fault, runs));
    }
    let folder = target().join("demo");
    std::fs::create_dir_all(&folder)?;
    let (picture, data) = (folder.join("failover.svg"), folder.join("failover.json"));
    std::fs::write(&picture, picture::draw(&all))?;
    std::fs::write(&data, format!("{:#}\n", figures::json(settings, &all)))?;
    screen.say(&format!("\n{}\n{}", picture.display(), data.display()));
    Ok(faults)
}

/// The project's target folder, wherever the command was called and whatever cargo builds into.
fn target() -> PathBuf {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
    let here = std::env::current_dir().unwrap_or_default();
    project.strip_prefix(&here).map(Path::to_path_buf).unwrap_or(project)
}
