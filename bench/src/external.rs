//! Peers that are programs of their own, in other languages.
//!
//! `bench/peers/setup.sh` installs them and writes down which it could. A program is told by its environment where the
//! servers are ([`Target::environment`]). It says `ready` when its pool has its connections, then a line for each
//! answer ([`Event::parse`]), and ends when its input is closed. What it writes to its standard error explains a failed
//! start.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use testbed::lock;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::event::Event;
use crate::peer::{Load, Peer, Target};
use crate::recorder::Recorder;

/// A virtual machine starts, and a pool opens its connections, within this.
const READY_WITHIN: Duration = Duration::from_mins(1);
/// A program that has not ended so long after its input is killed.
const STOP_WITHIN: Duration = Duration::from_secs(2);
/// So many lines of a program's standard error are kept.
const SAID: usize = 20;

/// Every peer outside of Rust, installed or not: one that is missing says so by [`Peer::missing`].
pub fn peers() -> Vec<Box<dyn Peer>> {
    let to = installed_to();
    let list = fs::read_to_string(to.join("peers"));
    let words = Words { hosts: Hosts::All, ..Words::default() };
    let programs = [
        Program {
            name: "psycopg-pool",
            config: "all hosts, target_session_attrs=read-write connect_timeout=3; \
                     ConnectionPool(check=check_connection)",
            command: vec![python(&to), source("python/pool.py")],
            ..Program::of(words)
        },
        Program {
            name: "hikaricp",
            config: "all hosts, targetServerType=primary, connectTimeout=2 loginTimeout=2 cancelSignalTimeout=2 \
                     socketTimeout=30 tcpKeepAlive=true; HikariCP as it comes",
            command: java(&to),
            ..Program::of(words)
        },
        Program {
            name: "node-postgres",
            config: "one name, or the first host (it has no multi-host); query_timeout 5000, connectionTimeoutMillis \
                     2000, keepAlive, idleTimeoutMillis 0",
            command: vec!["node".into(), to.join("node/load.js").display().to_string()],
            ..Program::of(Words { hosts: Hosts::First, asks_dns: true })
        },
        Program {
            name: "aws-python",
            config: "AWS advanced Python wrapper over psycopg, plugins=failover wrapper_dialect=pg; that dialect knows \
                     no \
                     topology, so libpq gets all hosts and target_session_attrs=read-write; a connection for each \
                     worker",
            command: vec![python(&to), source("python/aws.py")],
            ..Program::of(words)
        },
        Program { name: "aws-jdbc", config: "AWS advanced JDBC wrapper, plugins=failover", ..Program::of(words) },
    ];
    programs
        .into_iter()
        .map(|program| {
            let state = state(list.as_deref().ok(), program.name);
            Box::new(Program { state, ..program }) as Box<dyn Peer>
        })
        .collect()
}

/// Which of the hosts a program takes.
#[derive(Clone, Copy, Debug, Default)]
enum Hosts {
    #[default]
    All,
    First,
}

/// How a program is told where the servers are.
#[derive(Clone, Copy, Debug, Default)]
struct Words {
    hosts: Hosts,
    /// It can be told which name server to ask.
    asks_dns: bool,
}

/// One program.
#[derive(Clone, Debug)]
struct Program {
    name: &'static str,
    config: &'static str,
    command: Vec<String>,
    words: Words,
    /// Its version, or why it is missing.
    state: Result<String, String>,
}

impl Program {
    fn of(words: Words) -> Self {
        Self { name: "", config: "", command: Vec::new(), words, state: Ok(String::new()) }
    }

    fn command(&self, target: &Target) -> Option<Command> {
        let (program, arguments) = self.command.split_first()?;
        let mut command = Command::new(program);
        command.args(arguments).envs(target.environment());
        if let (Hosts::First, Some(first)) = (self.words.hosts, target.hosts.first()) {
            command.env("BENCH_HOSTS", first.to_string());
        }
        if target.name.is_some() && !target.system_dns {
            command.env("BENCH_DNS", target.dns.to_string());
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        Some(command)
    }
}

#[async_trait]
impl Peer for Program {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn version(&self) -> String {
        self.state.clone().unwrap_or_default()
    }

    fn config(&self) -> String {
        self.config.to_owned()
    }

    fn is_rust(&self) -> bool {
        false
    }

    fn needs_name(&self) -> bool {
        matches!(self.words.hosts, Hosts::First)
    }

    async fn missing(&self) -> Option<String> {
        self.state.clone().err()
    }

    fn refuses(&self, target: &Target) -> Option<String> {
        let unknown = target.name.is_some() && !target.system_dns && !self.words.asks_dns;
        unknown.then(|| "it asks the system's resolver, which does not know the name".to_owned())
    }

    async fn start(&self, target: &Target, recorder: Arc<Recorder>) -> Result<Box<dyn Load>, String> {
        if let Err(why) = &self.state {
            return Err(why.clone());
        }
        let mut command = self.command(target).ok_or("it has no command")?;
        let mut child = command.spawn().map_err(|error| format!("{}: {error}", self.command.join(" ")))?;
        let (Some(input), Some(output), Some(errors)) = (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err("it has no pipes".to_owned());
        };
        let said = Arc::new(Mutex::new(VecDeque::new()));
        let listening = tokio::spawn(listen(errors, Arc::clone(&said)));
        let mut lines = BufReader::new(output).lines();
        if let Err(why) = ready(&mut lines).await {
            let _ = child.start_kill();
            // Its last words come before the end of the pipe.
            let _ = timeout(STOP_WITHIN, listening).await;
            let said = lock(&said);
            return Err(format!("{why}; it said: {}", Vec::from(said.clone()).join(" | ")));
        }
        let reading = tokio::spawn(read(lines, recorder));
        Ok(Box::new(Running { child, input: Some(input), reading }))
    }
}

async fn ready(lines: &mut Lines<BufReader<ChildStdout>>) -> Result<(), String> {
    let waiting = async {
        while let Some(line) = lines.next_line().await.map_err(|error| error.to_string())? {
            if line == "ready" {
                return Ok(());
            }
        }
        Err("it ended before it was ready".to_owned())
    };
    timeout(READY_WITHIN, waiting).await.unwrap_or_else(|_| Err(format!("it was not ready within {READY_WITHIN:?}")))
}

async fn read(mut lines: Lines<BufReader<ChildStdout>>, recorder: Arc<Recorder>) {
    while let Ok(Some(line)) = lines.next_line().await {
        if let Some(event) = Event::parse(&line) {
            recorder.record(event);
        }
    }
}

async fn listen(errors: impl AsyncRead + Unpin, said: Arc<Mutex<VecDeque<String>>>) {
    let mut lines = BufReader::new(errors).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let mut said = lock(&said);
        if said.len() == SAID {
            said.pop_front();
        }
        said.push_back(line);
    }
}

/// A program under way. Dropping it kills the program.
struct Running {
    child: Child,
    input: Option<ChildStdin>,
    reading: JoinHandle<()>,
}

#[async_trait]
impl Load for Running {
    async fn stop(mut self: Box<Self>) {
        drop(self.input.take());
        if timeout(STOP_WITHIN, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
        }
        // What it said until then is in the pipe. A child of its own may hold the pipe open, which is not waited for.
        if timeout(STOP_WITHIN, &mut self.reading).await.is_err() {
            self.reading.abort();
        }
    }

    fn memory(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()?)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        let kilobytes: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
        Some(kilobytes * 1024)
    }
}

/// What `setup.sh` wrote of this peer: `NAME installed: VERSION` or `NAME missing: WHY`.
fn state(list: Option<&str>, name: &str) -> Result<String, String> {
    let list = list.ok_or_else(|| "not set up: run bench/peers/setup.sh".to_owned())?;
    let said = list.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let said = said.ok_or_else(|| "bench/peers/setup.sh said nothing of it".to_owned())?;
    match said.split_once(": ") {
        Some(("installed", version)) => Ok(version.to_owned()),
        Some((_, why)) => Err(why.to_owned()),
        None => Err(said.to_owned()),
    }
}

fn source(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("peers").join(path).display().to_string()
}

/// Where `setup.sh` puts what it installs.
fn installed_to() -> PathBuf {
    std::env::var_os("BENCH_PEERS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench"), PathBuf::from)
}

fn python(to: &Path) -> String {
    to.join("venv/bin/python").display().to_string()
}

fn java(to: &Path) -> Vec<String> {
    let jars = ["postgresql", "HikariCP", "slf4j-api", "slf4j-nop"].map(|jar| format!("/usr/share/java/{jar}.jar"));
    let path = format!("{}:{}", to.join("java").display(), jars.join(":"));
    vec!["java".into(), "-cp".into(), path, "Load".into()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target() -> Target {
        let address = "127.0.0.1:5432".parse().unwrap();
        Target {
            hosts: vec![address, "127.0.0.2:5432".parse().unwrap()],
            name: None,
            dns: "127.0.0.1:53".parse().unwrap(),
            system_dns: false,
            port: 5432,
            pace: Duration::ZERO,
            user: "app".into(),
            password: String::new(),
            database: "app".into(),
            table: "t".into(),
            workers: 1,
            prefix: "p".into(),
        }
    }

    fn shell(script: &str) -> Program {
        Program {
            name: "shell",
            command: vec!["sh".into(), "-c".into(), script.into()],
            ..Program::of(Words::default())
        }
    }

    async fn run(script: &str) -> Vec<Event> {
        let recorder = Arc::new(Recorder::new(1));
        let load = shell(script).start(&target(), Arc::clone(&recorder)).await.unwrap();
        assert!(load.memory().is_some());
        load.stop().await;
        recorder.events()
    }

    #[tokio::test]
    async fn what_a_program_says_until_its_end_is_recorded() {
        let events = run("echo noise; echo ready; echo ok 1 0 p-0-0; cat; echo err 2 0 p-0-1 no server").await;
        let outcomes: Vec<_> = events.into_iter().map(|event| (event.micros, event.id, event.outcome)).collect();
        assert_eq!(outcomes, [(1, "p-0-0".into(), Ok(())), (2, "p-0-1".into(), Err("no server".into()))]);
    }

    #[tokio::test]
    async fn a_program_that_does_not_end_is_killed() {
        let began = tokio::time::Instant::now();
        assert_eq!(run("echo ready; echo ok 1 0 p-0-0; exec sleep 3600").await.len(), 1);
        assert!(began.elapsed() >= STOP_WITHIN, "it had its time to end by itself");
    }

    #[tokio::test]
    async fn a_failed_start_tells_what_the_program_said() {
        let started = shell("echo the host is down >&2; exit 1").start(&target(), Arc::new(Recorder::new(1))).await;
        let why = started.err().unwrap();
        assert!(why.contains("ended before") && why.contains("the host is down"), "{why}");
    }

    #[tokio::test]
    async fn a_program_finds_its_servers_in_its_environment() {
        let first = Program { words: Words { hosts: Hosts::First, ..Words::default() }, ..shell("") };
        for (program, hosts) in [(shell(""), "127.0.0.1:5432,127.0.0.2:5432"), (first, "127.0.0.1:5432")] {
            let script = "echo ready; echo err 1 0 p-0-0 $BENCH_HOSTS $BENCH_TABLE $BENCH_WORKERS";
            let program = Program { command: vec!["sh".into(), "-c".into(), script.into()], ..program };
            let recorder = Arc::new(Recorder::new(1));
            program.start(&target(), Arc::clone(&recorder)).await.unwrap().stop().await;
            assert_eq!(recorder.events()[0].outcome, Err(format!("{hosts} t 1")));
        }
    }

    #[test]
    fn a_name_is_for_those_who_can_ask_for_it() {
        let named = Target { name: Some("db.test".into()), ..target() };
        assert!(shell("").refuses(&named).is_some());
        assert!(shell("").refuses(&Target { system_dns: true, ..named.clone() }).is_none());
        let asks = Program { words: Words { asks_dns: true, ..Words::default() }, ..shell("") };
        assert!(asks.refuses(&named).is_none());
        assert!(shell("").refuses(&target()).is_none());
    }

    #[test]
    fn the_list_of_what_is_installed_is_read() {
        let list = "psycopg-pool installed: psycopg 3.3.9\naws-jdbc missing: no network: none\n";
        assert_eq!(state(Some(list), "psycopg-pool"), Ok("psycopg 3.3.9".into()));
        assert_eq!(state(Some(list), "aws-jdbc"), Err("no network: none".into()));
        assert!(state(Some(list), "psycopg").is_err() && state(None, "psycopg-pool").is_err());
        let names: Vec<String> = peers().iter().map(|peer| peer.name()).collect();
        assert_eq!(names, ["psycopg-pool", "hikaricp", "node-postgres", "aws-python", "aws-jdbc"]);
    }
}
