//! `make bench`: see `BENCHMARKS.md` for what it measures, and `Settings` for what the environment may ask for.

use std::process::ExitCode;
use std::sync::Arc;

use failover_bench::error::Error;
use failover_bench::isolation::{self, Network};
use failover_bench::recovery;
use failover_bench::settings::{Case, Settings};

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
    isolation::enter()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|source| Error::Program { what: "tokio".to_owned(), source })?;
    runtime.block_on(measure(&settings))
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
            Case::Growth | Case::Floor | Case::Quiet => {}
        }
    }
    Ok(())
}
