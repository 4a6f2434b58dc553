//! The service, as its environment configures it. README.md says how.

use std::error::Error;
use std::net::Ipv6Addr;
use std::process::ExitCode;

use failover_web::{Config, Service, recorder};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

async fn run() -> Result<(), Box<dyn Error>> {
    let config = Config::from_env()?;
    let recorder = recorder()?;
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder)?;
    // From here on neither signal ends the process by itself.
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    // All of IPv4 and IPv6: Fly's private network is IPv6 alone.
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, config.port)).await?;
    let service = Service::new(config, handle)?;
    println!("listening on {}", listener.local_addr()?);
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    service.serve(listener, stop).await?;
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("failover-web: {error}");
            ExitCode::FAILURE
        }
    }
}
