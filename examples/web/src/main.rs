//! The service, as its environment configures it. README.md says how.

use std::error::Error;
use std::net::Ipv6Addr;
use std::process::ExitCode;

use failover_web::{Config, Service, recorder};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// On all of IPv4 and IPv6: Fly's private network is IPv6 alone.
async fn listen(port: u16) -> std::io::Result<TcpListener> {
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await
}

async fn run() -> Result<(), Box<dyn Error>> {
    let config = Config::from_env()?;
    let recorder = recorder()?;
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder)?;
    // From here on neither signal ends the process by itself.
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let listener = listen(config.port).await?;
    println!("listening on {}", listener.local_addr()?);
    let operators = match config.operator_port {
        Some(port) => Some(listen(port).await?),
        None => None,
    };
    if let Some(operators) = &operators {
        println!("listening for operators on {}", operators.local_addr()?);
    }
    let service = Service::new(config, handle)?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    service.serve(listener, operators, stop).await?;
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
