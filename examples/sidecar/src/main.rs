//! The sidecar as a program, as its environment configures it. README.md says how.

use std::env;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use failover_sidecar::Sidecar;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_postgres_failover::{BuildError, Pool};
use tracing_subscriber::EnvFilter;

const DEFAULT_LISTEN: &str = "127.0.0.1:5432";
/// A connection waits so long for a primary. A failover with Patroni's defaults takes up to 30 s.
const DEFAULT_WAIT: u64 = 60;

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("DATABASE_URL is not set; example: postgres://app@pg1.lan,pg2.lan,pg3.lan/app")]
    NoUrl,
    #[error("LISTEN={0} is not an address and a port; example: {DEFAULT_LISTEN}")]
    Listen(String),
    #[error("WAIT_SECONDS={0} is not a number of seconds; example: {DEFAULT_WAIT}")]
    Wait(String),
    #[error("DATABASE_URL: {0}; this program was built without TLS: build it with `--features rustls`")]
    NoTls(BuildError),
    #[error("DATABASE_URL: {0}")]
    Build(BuildError),
    #[error("{address} cannot be listened on; choose another LISTEN: {source}")]
    Bind { address: SocketAddr, source: std::io::Error },
    #[error("signals cannot be received: {0}")]
    Signal(std::io::Error),
}

impl From<BuildError> for Failure {
    /// What the library says about its feature is of no use to who runs a program.
    fn from(error: BuildError) -> Self {
        match error {
            BuildError::NoTls { .. } => Self::NoTls(error),
            other => Self::Build(other),
        }
    }
}

async fn run() -> Result<(), Failure> {
    let url = env::var("DATABASE_URL").map_err(|_| Failure::NoUrl)?;
    let listen = env::var("LISTEN").unwrap_or_else(|_| DEFAULT_LISTEN.to_owned());
    let address: SocketAddr = listen.parse().map_err(|_| Failure::Listen(listen))?;
    let wait = env::var("WAIT_SECONDS").unwrap_or_else(|_| DEFAULT_WAIT.to_string());
    let wait = Duration::from_secs(wait.parse().map_err(|_| Failure::Wait(wait))?);
    let pool = Pool::builder(url)?.application_name("failover-sidecar").build()?;
    let listener = TcpListener::bind(address).await.map_err(|source| Failure::Bind { address, source })?;
    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate()).map_err(Failure::Signal)?,
        signal(SignalKind::interrupt()).map_err(Failure::Signal)?,
    );
    if let Ok(address) = listener.local_addr() {
        println!("listening on {address}");
    }
    let stop = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    Sidecar::new(pool, wait).serve(listener, stop).await;
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("failover-sidecar: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_feature_is_told_in_words_of_the_program() {
        let told = Failure::from(BuildError::NoTls { option: "sslmode" }).to_string();
        assert!(told.starts_with("DATABASE_URL: sslmode") && told.contains("`--features rustls`"), "{told}");
        let told = Failure::from(BuildError::NoHost).to_string();
        assert_eq!(told, format!("DATABASE_URL: {}", BuildError::NoHost));
    }
}
