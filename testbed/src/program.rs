//! Programs that stand between a pool and its servers: found, run in a folder of the cluster, and ended by id.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;
use std::{env, thread};

use rustix::process::Signal;
use tokio::net::TcpStream;

use crate::process;
use crate::server::{Server, make_folder};
use crate::wait::until;

/// As for the steps of a cluster.
const PATIENCE: Duration = Duration::from_secs(30);
/// Where system packages put servers, which is not in everybody's PATH.
const FOLDERS: [&str; 4] = ["/usr/sbin", "/usr/local/sbin", "/usr/local/bin", "/opt/homebrew/bin"];

pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(FOLDERS.map(PathBuf::from));
    folders.map(|folder| folder.join(name)).find(|program| program.is_file())
}

/// Whether a test can have this program. Says so where it cannot; the continuous integration has to have it.
pub(crate) fn is_installed(name: &str) -> bool {
    if find(name).is_some() {
        return true;
    }
    let told = format!("{name} is not installed (sh scripts/setup.sh, or apt-get install {name})");
    assert!(env::var_os("CI").is_none_or(|ci| ci != "true"), "testbed: {told}");
    eprintln!("SKIPPED: {told}");
    false
}

/// A running program, whose configuration and log lie in a folder of its own. Ends when it is dropped, and with the
/// cluster.
pub(crate) struct Program {
    name: &'static str,
    path: PathBuf,
    folder: PathBuf,
    server: &'static Server,
    child: Option<Child>,
}

impl Program {
    /// Makes the folder `label` below the cluster's; nothing runs yet.
    pub(crate) fn new(name: &'static str, label: &str, server: &'static Server, cluster: &Path) -> Self {
        let path = find(name).unwrap_or_else(|| panic!("testbed: {name} is not installed"));
        Self::at(path, name, label, server, cluster)
    }

    /// The same for a program at this path, or for one of the server's own by its name.
    pub(crate) fn at(path: PathBuf, name: &'static str, label: &str, server: &'static Server, cluster: &Path) -> Self {
        let folder = cluster.join(label);
        make_folder(&folder);
        server.give(&folder);
        Self { name, path, folder, server, child: None }
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes a file that the program reads.
    pub(crate) fn write(&self, file: &str, text: &str) -> PathBuf {
        let path = self.folder.join(file);
        fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        self.server.give(&path);
        path
    }

    /// Starts it; returns the one that ran before, if it still does. One argument at least names the folder, by which
    /// the cluster's reaper finds the process.
    pub(crate) fn spawn(&mut self, arguments: &[&str]) -> Option<Child> {
        let folder = self.folder.to_str().expect("a folder of the test bed");
        assert!(arguments.iter().any(|argument| argument.contains(folder)), "{arguments:?}");
        let log = File::options().create(true).append(true).open(self.log_file()).expect("the log");
        let child = self
            .server
            .command(&self.path, &self.folder)
            .args(arguments)
            .stdout(log.try_clone().expect("the log"))
            .stderr(Stdio::from(log))
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", self.path.display()));
        self.child.replace(child)
    }

    /// Its process, unless it has ended.
    pub(crate) fn running(&mut self) -> Option<u32> {
        let child = self.child.as_mut()?;
        if child.try_wait().expect("a child can be waited for").is_some() {
            self.child = None;
        }
        self.id()
    }

    pub(crate) fn id(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Waits until it listens; panics with its log when it does not.
    pub(crate) async fn listens(&self, addr: SocketAddr) {
        let what = format!("{} listens on {addr}", self.name);
        until(&what, PATIENCE, || async move {
            TcpStream::connect(addr).await.map(drop).map_err(|error| format!("{error}; {}", self.log()))
        })
        .await;
    }

    pub(crate) fn signal(&self, signal: Signal) {
        process::signal(self.id().unwrap_or_else(|| panic!("{} does not run", self.name)), signal);
    }

    /// Sends the signal and waits for the end.
    pub(crate) async fn end(&mut self, signal: Signal) {
        self.signal(signal);
        let mut child = self.child.take().expect("it ran");
        ended(self.name, &mut child).await;
    }

    pub(crate) fn log(&self) -> String {
        fs::read(self.log_file()).map(|log| String::from_utf8_lossy(&log).into_owned()).unwrap_or_default()
    }

    fn log_file(&self) -> PathBuf {
        self.folder.join("log")
    }
}

/// Waits for the end of a process that was told to.
pub(crate) async fn ended(name: &str, child: &mut Child) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while child.try_wait().expect("a child can be waited for").is_none() {
        assert!(tokio::time::Instant::now() < deadline, "{name} does not end");
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            eprintln!(
                "testbed: the last of {}'s log:\n{}",
                self.name,
                lines[lines.len().saturating_sub(30)..].join("\n")
            );
        }
        if let Some(mut child) = self.child.take() {
            // Neither fails for a child that is not reaped yet, and nothing can be done about it here.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
