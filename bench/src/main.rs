//! `make bench`: see `BENCHMARKS.md` for what it measures, and `Settings` for what the environment may ask for.

use std::process::ExitCode;
use std::sync::Arc;

use failover_bench::error::Error;
use failover_bench::isolation::{self, Network};
use failover_bench::report::{self, Places};
use failover_bench::settings::{Case, Settings};
use failover_bench::{floor, growth, recovery};

fn main() -> ExitCode {
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
            Case::Quiet => {}
        }
    }
    Ok(())
}
