//! The service and its page against Patroni and etcd, and the program behind `make web`. `make test-managers` runs
//! them.

use std::env;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use failover_web::Config;
use hyper::StatusCode;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use testbed::{Part, Patroni, eventually};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

use crate::viewer::{Viewer, has_failed_over, of_the_primary};
use crate::{LONG, Running};

/// For ten servers that start, or a failover of theirs, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

fn at(address: SocketAddr) -> impl Fn(&Value) -> bool {
    move |status| status["primary"]["endpoint"] == address.to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "starts ten servers and more: make test-managers"]
async fn patroni_the_page_shows_a_switchover_and_a_lost_machine() {
    if !Patroni::is_installed() {
        return;
    }
    let patroni = Patroni::start().await;
    let service = Running::start(Config::new(patroni.url_hosts())).await;
    let mut viewer = Viewer::open(service.address).await;
    let first = patroni.leader().await;
    let status = viewer.status("Patroni's leader", at(patroni.socket_addr(first))).await;
    let timeline = status["primary"]["timeline"].as_u64().unwrap();

    let second = patroni.candidate(first).await;
    patroni.switchover(second).await;
    let status = viewer.status("the new leader", at(patroni.socket_addr(second))).await;
    assert_eq!(status["primary"]["timeline"], timeline + 1);
    patroni.wait_healthy().await;
    let all = |status: &Value| {
        let roles = crate::page::roles(status);
        roles.iter().filter(|role| **role == "standby").count() == 2 && roles.contains(&"primary")
    };
    viewer.status("the old leader as a standby", all).await;

    patroni.kill(second, Part::Both).await;
    let third = patroni.successor(second).await;
    let status = viewer.status("the successor", at(patroni.socket_addr(third))).await;
    assert_eq!(status["primary"]["timeline"], timeline + 2);
    let mut client = service.client().await;
    assert_eq!(client.order("tea", &[]).await.unwrap().status, StatusCode::CREATED);
    let mut late = Viewer::open(service.address).await;
    let [first, second, third] = [first, second, third].map(|node| patroni.socket_addr(node));
    let both = |events: &Value| has_failed_over(events, first, second) && has_failed_over(events, second, third);
    let events = late.events("both failovers", both).await;
    println!("{:#?}", of_the_primary(&events));
    drop((viewer, late, client));
    service.stop().await;
}

/// `make web`, as somebody types at it.
struct Web {
    child: Child,
    output: BufReader<ChildStdout>,
    said: String,
}

fn program() -> Command {
    // cargo puts the examples beside the tests.
    let mut path: PathBuf = env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.push("examples/patroni");
    assert!(path.is_file(), "{} is missing: cargo build --all-features --example patroni", path.display());
    let mut command = Command::new(path);
    command.env("PORT", "0").stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
    command
}

impl Web {
    /// Starts it in synchronous mode, in which nothing may be lost; returns when it says where its page is.
    async fn start() -> Self {
        let mut child = program().env("SYNCHRONOUS", "1").spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut web = Self { child, output, said: String::new() };
        web.says("The page is at http://").await;
        web.says("quit").await;
        web
    }

    fn page(&self) -> SocketAddr {
        let (_, rest) = self.said.split_once("The page is at http://").unwrap();
        let port = rest.split_once('/').unwrap().0.rsplit(':').next().unwrap();
        (Ipv4Addr::LOCALHOST, port.parse().unwrap()).into()
    }

    async fn types(&mut self, text: &str) {
        self.child.stdin.as_mut().unwrap().write_all(text.as_bytes()).await.unwrap();
    }

    /// Reads on to a line with these words; `None` reads to the end.
    async fn reads(&mut self, words: Option<&str>) {
        loop {
            let mut line = String::new();
            let read = timeout(PATIENCE, self.output.read_line(&mut line)).await;
            let read = read.unwrap_or_else(|_| panic!("{words:?} is not said:\n{}", self.said)).unwrap();
            assert!(read > 0 || words.is_none(), "{words:?} is not said:\n{}", self.said);
            self.said.push_str(&line);
            if read == 0 || words.is_some_and(|words| line.contains(words)) {
                return;
            }
        }
    }

    async fn says(&mut self, words: &str) {
        self.reads(Some(words)).await;
    }

    /// Nothing is left when it has ended.
    async fn ends(mut self) -> String {
        let id = self.child.id().expect("it runs");
        self.reads(None).await;
        let status = timeout(PATIENCE, self.child.wait()).await.expect("an end in time").unwrap();
        assert!(status.success(), "{status}\n{}", self.said);
        eventually("all servers are gone", LONG, async || left_of(id).is_empty()).await;
        self.said
    }
}

/// The processes of the test bed that this process started, by the name of their cluster.
fn left_of(id: u32) -> Vec<String> {
    let tag = format!("testbed-{id}-");
    let commands = std::fs::read_dir("/proc").unwrap().flatten();
    let commands = commands.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    let commands = commands.map(|command| String::from_utf8_lossy(&command).replace('\0', " "));
    commands.filter(|command| command.contains(&tag)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "starts ten servers and more: make test-managers"]
async fn patroni_make_web_does_what_is_typed_and_loses_nothing() {
    if !Patroni::is_installed() {
        return;
    }
    let mut web = Web::start().await;
    let mut viewer = Viewer::open(web.page()).await;
    viewer.status("the load", |status| status["orders"]["per_second"].as_f64().is_some_and(|pace| pace > 0.0)).await;
    web.types("switchover\nfly\n\n  kill \nfreeze\ncut\n").await;
    for words in ["hands over to", "is gone", "hangs", "is cut off"] {
        web.says(words).await;
        web.says("is the leader now").await;
        web.says("is a standby now").await;
        web.says("Requests that failed: 0.").await;
        web.says("lost: 0, stored twice: 0").await;
    }
    // The end of the input.
    drop(web.child.stdin.take());
    let said = web.ends().await;
    println!("{said}");
    assert!(said.contains("There is no command \"fly\""), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "starts ten servers and more: make test-managers"]
async fn patroni_make_web_ends_on_a_signal_in_the_midst_of_a_command() {
    if !Patroni::is_installed() {
        return;
    }
    let mut web = Web::start().await;
    web.types("kill\n").await;
    web.says("is gone").await;
    let id = i32::try_from(web.child.id().expect("it runs")).unwrap();
    kill_process(Pid::from_raw(id).unwrap(), Signal::INT).unwrap();
    let said = web.ends().await;
    assert!(!said.contains("is a standby now"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the program behind `make web`: make test-managers"]
async fn patroni_make_web_says_what_to_install() {
    // No program is found here.
    let output = program().env("PATH", "/nonexistent").env("PG_BIN", "/nonexistent").stderr(Stdio::piped()).output();
    let output = timeout(PATIENCE, output).await.expect("an end in time").unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("apt-get install postgresql"), "{said}");
    let output = program().env("PATH", "/nonexistent").stderr(Stdio::piped()).output();
    let output = timeout(PATIENCE, output).await.expect("an end in time").unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("sh scripts/setup.sh managers"), "{said}");
}
