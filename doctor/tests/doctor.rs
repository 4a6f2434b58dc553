//! The program against real servers.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

use std::env;
use std::process::{Output, Stdio};
use std::time::Duration;

use testbed::{Cluster, Node};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpListener;
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

/// For what comes within seconds on an idle machine.
const LONG: Duration = Duration::from_secs(60);

fn doctor(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_doctor"));
    command.args(arguments).kill_on_drop(true);
    for (name, _) in env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PG")) {
        command.env_remove(name);
    }
    command.env_remove("DATABASE_URL").env("HOME", "/nowhere");
    command
}

async fn said(arguments: &[&str]) -> (Output, String) {
    let output = timeout(LONG, doctor(arguments).output()).await.expect("an end").unwrap();
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    (output, text)
}

fn watching(url: &str, more: &[&str]) -> (Child, Lines<BufReader<ChildStdout>>) {
    let mut child = doctor(&[&["--watch", url], more].concat()).stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    (child, lines)
}

/// Reads until each of these words was in a line, in whatever order. Returns the lines.
async fn until(lines: &mut Lines<BufReader<ChildStdout>>, words: &[String]) -> Vec<String> {
    let mut seen = Vec::new();
    let reading = async {
        while !words.iter().all(|words| seen.iter().any(|line: &String| line.contains(words))) {
            seen.push(lines.next_line().await.unwrap().expect("it goes on"));
        }
    };
    let read = timeout(LONG, reading).await;
    assert!(read.is_ok(), "not all of {words:?}: {seen:#?}");
    seen
}

/// Each server has a row, and the last line says what a pool would do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_shows_each_server_and_the_verdict() {
    let cluster = Cluster::start().await;
    let (output, text) = said(&[&cluster.url_hosts()]).await;
    assert_eq!(output.status.code(), Some(0), "{text}");
    for (node, role) in [(0, "primary"), (1, "standby"), (2, "standby")] {
        let address = cluster.socket_addr(Node(node)).to_string();
        assert!(text.lines().any(|line| line.starts_with(&address) && line.contains(role)), "{text}");
    }
    let primary = cluster.socket_addr(Node(0));
    assert!(text.trim_end().ends_with(&format!("A pool would use {primary}, timeline 1.")), "{text}");

    let (_, text) = said(&["--json", &cluster.url_hosts()]).await;
    let object: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(object["would_use_a_primary"], true);
    assert_eq!(object["servers"][0]["role"], "primary");
    assert_eq!(object["servers"][0]["timeline"], 1);
    assert_eq!(object["servers"][2]["role"], "standby");
}

/// Nobody listens there, an unknown role, and a wrong command: told by the exit code and in words.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_tells_what_is_wrong() {
    let cluster = Cluster::builder().nodes(1).start().await;
    let nobody = cluster.spare_addr(0);
    let (output, text) = said(&[&format!("postgres://app@{nobody}:{}/app", cluster.port())]).await;
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("A pool would wait: none of the servers answers as PostgreSQL"), "{text}");
    let url = cluster.url_hosts();
    let (_, hosts) = url.split_once('@').unwrap();
    let (output, text) = said(&[&format!("postgres://stranger@{hosts}")]).await;
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("A pool would refuse every call at once, because") && text.contains("stranger"), "{text}");
    let (_lines, mut lines) = watching(&format!("postgres://stranger@{hosts}"), &[]);
    until(&mut lines, &["A pool would refuse every call at once, because".to_owned()]).await;

    let (output, _) = said(&["--watch"]).await;
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().contains("usage: doctor"));
    let (output, text) = said(&["--help"]).await;
    assert_eq!((output.status.code(), text.starts_with("usage: doctor")), (Some(0), true), "{text}");
}

/// A password on the command line is seen by every user of the machine: it may be in the environment.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_reads_the_environment() {
    let cluster = Cluster::builder().nodes(1).password("s3cret").start().await;
    let address = cluster.socket_addr(Node(0));
    let (host, port) = (address.ip().to_string(), address.port().to_string());
    let url = cluster.url_hosts();
    let libpq =
        [("PGHOST", &*host), ("PGPORT", &*port), ("PGUSER", "app"), ("PGDATABASE", "app"), ("PGPASSWORD", "s3cret")];
    for variables in [&[("DATABASE_URL", &*url)][..], &libpq[..]] {
        let output =
            timeout(LONG, doctor(&[]).envs(variables.iter().copied()).output()).await.expect("an end").unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains(&format!("A pool would use {address}")), "{text}{output:?}");
    }
}

/// The server's words are those of anybody who answers there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_server_says_does_not_steer_the_terminal() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let _ = stream.read(&mut [0; 1024]).await;
                let fields = b"SFATAL\0VFATAL\0C28000\0M\x1b]0;title\x07\x1b[2J no\0\0";
                let length = u32::try_from(fields.len() + 4).unwrap().to_be_bytes();
                let _ = stream.write_all(&[&b"E"[..], &length, fields].concat()).await;
                // Whoever closes with something unread takes back what was sent.
                let _ = stream.read(&mut [0; 1024]).await;
            });
        }
    });
    let url = format!("postgres://app@{address}/app");
    let (_, text) = said(&[&url]).await;
    assert!(text.contains("title") && !text.replace('\n', "").contains(char::is_control), "{text:?}");
    let (_child, mut lines) = watching(&url, &[]);
    let lines = until(&mut lines, &["A pool would refuse every call at once".to_owned()]).await;
    assert!(!lines.concat().contains(char::is_control), "{lines:?}");
}

/// The library's advice is for programmers.
#[cfg(not(feature = "rustls"))]
#[tokio::test]
async fn it_says_how_to_get_tls() {
    let (output, _) = said(&["postgres://app@127.0.0.1:1/app?sslmode=require"]).await;
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("cargo install --path doctor --features rustls"), "{said}");
}

/// Without a terminal a watch prints a line for each change, or JSON, through a failover.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_tells_of_a_failover() {
    let cluster = Cluster::start().await;
    let (_lines, mut lines) = watching(&cluster.url_hosts(), &[]);
    let (_json, mut json) = watching(&cluster.url_hosts(), &["--json"]);
    let first = cluster.socket_addr(Node(0));
    let used = format!("A pool would use {first}, timeline 1.");
    until(&mut lines, std::slice::from_ref(&used)).await;
    until(&mut json, &[used]).await;

    cluster.kill(Node(0)).await;
    let successor = cluster.most_advanced_standby().await;
    cluster.promote_timed(successor).await;
    let second = cluster.socket_addr(successor);
    let used = format!("A pool would use {second}, timeline 2.");
    let found = format!("primary found: {second}");
    until(&mut lines, &[found.clone(), format!("{second}: primary, timeline 2"), used.clone()]).await;
    for line in until(&mut json, &[found, used.clone()]).await {
        let object: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(
            object["would_use_a_primary"] == true,
            object["verdict"].as_str().unwrap().starts_with("A pool would use")
        );
    }
}
