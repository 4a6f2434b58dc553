//! What was measured, and on what.

use std::process::Command;

use serde::{Deserialize, Serialize};

const LOCK: &str = include_str!("../../Cargo.lock");

/// The newest version of a crate in the lock file, which is what was built.
pub fn of(name: &str) -> &'static str {
    let wanted = format!("name = \"{name}\"");
    let mut lines = LOCK.lines();
    let mut found = "unknown";
    while let Some(line) = lines.next() {
        if line == wanted
            && let Some(version) = lines.next().and_then(|line| line.strip_prefix("version = "))
        {
            found = version.trim_matches('"');
        }
    }
    found
}

/// The machine and the programs of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// What the kernel calls the processor.
    pub processor: String,
    /// How many of them this process may use.
    pub cores: usize,
    /// In MiB.
    pub memory: u64,
    /// `uname -sr`.
    pub kernel: String,
    /// `rustc --version`.
    pub rust: String,
    /// What the servers say they are.
    pub postgres: String,
    /// The commit that was checked out, with a mark where files differed from it.
    pub commit: String,
}

impl Machine {
    /// This one. What cannot be found out is called unknown.
    pub fn this(postgres: String) -> Self {
        let processor = field("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".to_owned());
        let memory = field("/proc/meminfo", "MemTotal").and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
        Self {
            processor,
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory: memory.unwrap_or_default() / 1024,
            kernel: said("uname", &["-sr"]),
            rust: said("rustc", &["--version"]),
            postgres,
            commit: said("git", &["describe", "--always", "--dirty"]),
        }
    }
}

/// The value of the first line that begins with this key.
fn field(file: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    let output = output.ok().filter(|output| output.status.success());
    output.map_or_else(|| "unknown".to_owned(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    #[test]
    fn versions_are_those_of_the_lock_file() {
        assert!(super::of("tokio-postgres").starts_with("0.7."), "{}", super::of("tokio-postgres"));
        assert_eq!(super::of("no-such-crate"), "unknown");
    }
}
