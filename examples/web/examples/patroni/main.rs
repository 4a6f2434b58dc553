//! `make web`: three Patroni nodes, etcd and the service on this machine, under load, with failovers at the keyboard
//! and the page in the browser that shows them. README.md of the service says more.
//!
//! Environment: `PORT`, or 8080; `SYNCHRONOUS=1` for Patroni's synchronous mode.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "it stands on the test bed, which ends with a panic"
)]

#[path = "../../tests/failover/client.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod client;
mod command;
mod load;

use std::env;
use std::error::Error;
use std::io::{IsTerminal as _, Write as _, stdin, stdout};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use failover_web::{Config, Service, recorder};
use testbed::Patroni;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tracing_subscriber::EnvFilter;

use command::{COMMANDS, Command};
use load::Load;

/// Longer than Patroni takes here, and shorter than the load waits for an answer.
const DEADLINE: Duration = Duration::from_secs(45);
/// For the requests under way at the end.
const DRAIN: Duration = Duration::from_secs(1);
const CLIENTS: usize = 8;

/// Ctrl-C, and what else ends a program at a terminal. From here on none of them ends it by itself.
struct Signals([Signal; 3]);

impl Signals {
    fn listen() -> std::io::Result<Self> {
        let [interrupt, terminate, hangup] =
            [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal);
        Ok(Self([interrupt?, terminate?, hangup?]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// The lines of the standard input; the channel ends with it. A thread reads them: a task that reads would hold the end
/// of the program until the next line.
fn lines() -> mpsc::UnboundedReceiver<String> {
    let (sender, receiver) = mpsc::unbounded_channel();
    thread::spawn(move || {
        for line in stdin().lines() {
            let Ok(line) = line else { return };
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

async fn listen() -> Result<TcpListener, Box<dyn Error>> {
    let port = match env::var("PORT") {
        Ok(port) => port.parse().map_err(|_| format!("PORT is {port:?}; set it to a number below 65536"))?,
        Err(_) => 8080,
    };
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let listener = TcpListener::bind(address).await;
    Ok(listener.map_err(|error| format!("{address}: {error}; choose another port with PORT=8081 make web"))?)
}

fn synchronous() -> bool {
    env::var("SYNCHRONOUS").is_ok_and(|value| !matches!(value.as_str(), "" | "0"))
}

async fn run() -> Result<(), Box<dyn Error>> {
    let mut signals = Signals::listen()?;
    if let Some(missing) = Patroni::missing() {
        return Err(missing.into());
    }
    let listener = listen().await?;
    let address = listener.local_addr()?;
    println!("Three Patroni nodes and etcd start; this takes some ten seconds.");
    let builder = if synchronous() { Patroni::builder().synchronous() } else { Patroni::builder() };
    let patroni = tokio::select! {
        patroni = builder.start() => Arc::new(patroni),
        () = signals.next() => return Ok(()),
    };
    let recorder = recorder()?;
    let figures = recorder.handle();
    metrics::set_global_recorder(recorder)?;
    let mut config = Config::new(patroni.url_hosts());
    (config.deadline, config.drain) = (DEADLINE, DRAIN);
    let service = Service::new(config, figures)?;
    let (stop, told) = oneshot::channel::<()>();
    let served = tokio::spawn(service.serve(listener, None, async {
        let _ = told.await;
    }));
    let load = Arc::new(Load::start(address, CLIENTS));
    for node in patroni.nodes() {
        println!("  n{} is PostgreSQL at {}", node.0, patroni.socket_addr(node));
    }
    println!("The page is at http://{address}/ and {CLIENTS} clients store orders.\n{COMMANDS}");
    tokio::select! {
        () = commands(&patroni, &load) => {}
        () = signals.next() => println!(),
    }
    println!("All of it ends.");
    load.stop().await;
    // Fails if the service has ended by itself: then what it says is told below.
    let _ = stop.send(());
    served.await??;
    Ok(())
}

/// Does what is typed, one after the other, until `quit` or the end of the input.
async fn commands(patroni: &Arc<Patroni>, load: &Arc<Load>) {
    let mut lines = lines();
    loop {
        if stdin().is_terminal() {
            print!("> ");
            // A terminal that is gone ends the program by a signal.
            let _ = stdout().flush();
        }
        let Some(line) = lines.recv().await else { return };
        match line.parse() {
            Ok(Command::Quit) => return,
            Ok(command) => carry_out(command, patroni, load).await,
            Err(()) if line.trim().is_empty() => {}
            Err(()) => println!("There is no command {:?}.\n{COMMANDS}", line.trim()),
        }
    }
}

/// A task of its own: what the test bed does not see in time ends this command, and nothing else.
async fn carry_out(command: Command, patroni: &Arc<Patroni>, load: &Arc<Load>) {
    let (patroni, load) = (Arc::clone(patroni), Arc::clone(load));
    let mut task = Aborted(tokio::spawn(async move { command.run(&patroni, &load).await }));
    if (&mut task.0).await.is_err() {
        println!("That did not come to its end (see above). The others go on; `quit` ends all.");
    }
}

/// A task that ends with its owner.
struct Aborted(tokio::task::JoinHandle<()>);

impl Drop for Aborted {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("error"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("make web: {error}");
            ExitCode::FAILURE
        }
    }
}
