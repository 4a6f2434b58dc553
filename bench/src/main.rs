//! `make bench`: see `BENCHMARKS.md` for what it measures, and `Settings` for what the environment may ask for.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use failover_bench::error::Error;
use failover_bench::event::now_micros;
use failover_bench::isolation::{self, Network};
use failover_bench::report::{self, Places};
use failover_bench::results::Results;
use failover_bench::settings::{Case, Settings};
use failover_bench::versions::Machine;
use failover_bench::{console, fleet, floor, growth, quiet, recovery};

fn main() -> ExitCode {
    // Silent unless RUST_LOG asks: RUST_LOG=tokio_postgres_failover=debug shows what this crate did when.
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the benchmark stopped: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Error> {
    let settings = Settings::from_environment()?;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.split_first() {
        None => {
            isolation::enter()?;
            block_on(measure(&settings))?;
            // Its figures are for the terminal, and there is no report of them.
            if settings.cases == [Case::Fleet] {
                return Ok(());
            }
            report::write(&settings.out, &Places::beside_results(&settings.out))
        }
        Some((word, [])) if word == "report" => report::write(&settings.out, &Places::beside_results(&settings.out)),
        Some((word, [])) if word == "docs" => report::write(&settings.out, &Places::of_the_project()),
        Some((word, rest)) if word == "point" => block_on(growth::point(rest)),
        Some((word, _)) => Err(Error::setting("the command", word, "nothing, report or docs")),
    }
}

fn block_on(work: impl Future<Output = Result<(), Error>>) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|source| Error::Program { what: "tokio".to_owned(), source })?;
    runtime.block_on(work)
}

async fn measure(settings: &Settings) -> Result<(), Error> {
    for case in &settings.cases {
        match case {
            Case::Recovery => {
                let network = Arc::new(Network::here().await);
                for failure in &settings.failures {
                    recovery::run(settings, &network, *failure).await?;
                }
            }
            Case::Floor => floor::run(settings, &Arc::new(Network::here().await)).await?,
            Case::Growth => growth::run(settings).await?,
            Case::Quiet => quiet_path(settings).await?,
            Case::Fleet => fleet::run(settings, &Arc::new(Network::here().await)).await?,
        }
    }
    Ok(())
}

/// What a call costs while nothing happens.
async fn quiet_path(settings: &Settings) -> Result<(), Error> {
    let failed = |error: quiet::Failure| Error::Other(format!("the quiet path: {error}"));
    let mut options = quiet::Options::from_environment().map_err(failed)?;
    if settings.quick && settings.rounds.is_none() {
        options = quiet::Options { rounds: 3, slice: Duration::from_millis(200), tasks: vec![1, 8], ..options };
    }
    let measurements = quiet::run(&options, console::say).await.map_err(failed)?;
    let network = Arc::new(Network::here().await);
    let results = Results {
        case: "quiet".to_owned(),
        explained: format!(
            "What a call costs while nothing happens, in slices of {:?}, each relative to the slice of deadpool-fast \
             in the same round; a primary with a synchronous standby, fsync on",
            options.slice
        ),
        command: console::command(settings, "CASES=quiet", options.rounds),
        at: now_micros() / 1_000_000,
        machine: Machine::this(failover_bench::postgres_version(&network).await?),
        rounds: options.rounds,
        seed: settings.seed,
        peers: Vec::new(),
        notes: Vec::new(),
        measurements,
        told: BTreeMap::new(),
    };
    results.write(&settings.out).map(drop)
}
