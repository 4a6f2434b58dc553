//! The page in a real browser, without a window: Chromium or Chrome, spoken to by its debugging protocol over pipes.

use std::env;
use std::fs;
use std::io::{Write as _, stderr};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Stdio, id};
use std::time::Duration;

use hyper::StatusCode;
use serde_json::{Value, json};
use testbed::Cluster;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::{Instant, sleep, timeout};

use crate::{Running, config};

const NAMES: [&str; 5] =
    ["chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome-headless-shell"];
/// A browser starts slowly on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// The browser reads file descriptor 3 and writes 4: they are this command's standard input and output.
const COMMAND: &str = r#"exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1"#;

fn find() -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    NAMES.iter().find_map(|name| env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file()))
}

/// A browser with one page. It ends with the test.
struct Browser {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    folder: PathBuf,
    last: u64,
    page: Option<String>,
    /// What went wrong in the page's script.
    exceptions: Vec<Value>,
}

impl Browser {
    /// `None` where there is none, which is said.
    fn start() -> Option<Self> {
        let Some(program) = find() else {
            // Written past `eprintln!`, which the harness keeps to itself when a test passes.
            let _ =
                writeln!(stderr(), "SKIPPED: no browser is installed ({}): apt-get install chromium", NAMES.join(", "));
            return None;
        };
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("browser-{}", id()));
        fs::create_dir_all(&folder).unwrap();
        let mut child = Command::new("sh")
            .args(["-c", COMMAND, "sh"])
            .arg(program)
            .args([
                "--headless",
                "--remote-debugging-pipe",
                "--no-first-run",
                "--disable-gpu",
                "--disable-dev-shm-usage",
            ])
            // It may be run by root, as in a container. The only page it opens is ours.
            .args(["--no-sandbox", "--window-size=1100,1000"])
            .arg(format!("--user-data-dir={}", folder.display()))
            .arg("about:blank")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let (to, from) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Some(Self { child, to, from, folder, last: 0, page: None, exceptions: Vec::new() })
    }

    async fn call(&mut self, method: &str, params: Value) -> Value {
        self.last += 1;
        let mut message = json!({ "id": self.last, "method": method, "params": params });
        if let Some(page) = &self.page {
            message["sessionId"] = page.as_str().into();
        }
        let mut text = message.to_string().into_bytes();
        text.push(0);
        self.to.write_all(&text).await.unwrap();
        let answer = timeout(PATIENCE, self.answer()).await;
        let answer = answer.unwrap_or_else(|_| panic!("the browser does not answer {method}"));
        assert!(answer.get("error").is_none(), "{method}: {answer}");
        answer["result"].clone()
    }

    async fn answer(&mut self) -> Value {
        loop {
            let mut text = Vec::new();
            self.from.read_until(0, &mut text).await.unwrap();
            assert_eq!(text.pop(), Some(0), "the browser has ended");
            let message: Value = serde_json::from_slice(&text).unwrap();
            if message["id"] == self.last {
                return message;
            }
            if message["method"] == "Runtime.exceptionThrown" {
                self.exceptions.push(message["params"].clone());
            }
        }
    }

    async fn open(&mut self, address: SocketAddr) {
        let target = self.call("Target.createTarget", json!({ "url": "about:blank" })).await;
        let params = json!({ "targetId": target["targetId"], "flatten": true });
        let attached = self.call("Target.attachToTarget", params).await;
        self.page = Some(attached["sessionId"].as_str().unwrap().to_owned());
        self.call("Runtime.enable", json!({})).await;
        self.call("Page.navigate", json!({ "url": format!("http://{address}/") })).await;
    }

    async fn evaluate(&mut self, expression: &str) -> Value {
        let params = json!({ "expression": expression, "returnByValue": true });
        let answer = self.call("Runtime.evaluate", params).await;
        assert!(answer.get("exceptionDetails").is_none(), "{expression}: {answer}");
        answer["result"]["value"].clone()
    }

    /// Waits until a user can read this.
    async fn shows(&mut self, text: &str) {
        let begun = Instant::now();
        loop {
            let read = self.evaluate("document.body?.innerText ?? ''").await;
            let read = read.as_str().unwrap_or_default();
            if read.contains(text) {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "the page does not show {text:?}:\n{read}\n{:?}", self.exceptions);
            sleep(Duration::from_millis(50)).await;
        }
    }

    async fn close(mut self) {
        self.page = None;
        self.call("Browser.close", json!({})).await;
        let ended = timeout(PATIENCE, self.child.wait()).await;
        ended.expect("the browser ends").unwrap();
        // What is left there is in the way of nobody.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_browser_shows_the_new_primary_and_finds_the_service_again() {
    let Some(mut browser) = Browser::start() else { return };
    let cluster = Cluster::start().await;
    let config = || {
        let mut config = config(&cluster);
        config.database_url = cluster.url_hosts();
        config
    };
    let service = Running::start(config()).await;
    let address = service.address;
    let first = cluster.primary();
    let ready = |node| format!("● Ready: {} is the primary", cluster.socket_addr(node));
    browser.open(address).await;
    browser.shows(&ready(first)).await;
    browser.shows("● primary, verified").await;
    browser.shows("○ standby").await;
    assert_eq!(browser.evaluate("document.getElementById('banner').className").await, "wide good");
    let mut client = service.client().await;
    for _ in 0..3 {
        assert_eq!(client.order("tea", &[]).await.unwrap().status, StatusCode::CREATED);
    }
    drop(client);
    browser.shows("stored\n3\n").await;

    cluster.kill(first).await;
    browser.shows("✕ Not ready: no verified primary").await;
    browser.shows("✕ PrimaryLost").await;
    assert_eq!(browser.evaluate("document.getElementById('banner').className").await, "wide bad");
    let next = cluster.most_advanced_standby().await;
    cluster.promote_timed(next).await;
    browser.shows(&ready(next)).await;
    browser.shows("✕ no answer").await;
    let rows =
        browser.evaluate("Array.from(document.querySelectorAll('#events tr')).map(row => row.textContent)").await;
    let row = |kind: &str, node| {
        let text = format!("{kind}{} ", cluster.socket_addr(node));
        rows.as_array().unwrap().iter().position(|row| row.as_str().is_some_and(|row| row.contains(&text)))
    };
    let (lost, found) =
        (row("PrimaryLost", first).expect("the loss"), row("PrimaryFound", next).expect("the new primary"));
    assert!(found < lost, "the newest first: {rows}");

    service.stop().await;
    browser.shows("✕ No contact with the service").await;
    let service = Running::start_at(TcpListener::bind(address).await.unwrap(), config());
    browser.shows(&ready(next)).await;
    assert_eq!(browser.exceptions, Vec::<Value>::new(), "the page's script");
    browser.close().await;
    service.stop().await;
}
