//! A long run in parts, on each core. It may be stopped at any time, and goes on behind the parts that it has ended.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions, create_dir_all, read_to_string};
use std::io::{self, Write};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread::{available_parallelism, sleep};
use std::time::Duration;

use crate::setting;

/// The seeds of one part.
const SEEDS: u64 = 500;
const FAILOVERS: u64 = 1_000_000;
/// What a part's last line is preceded by.
const SUMMARY: &str = "PART ";

/// Prints what a part's parent writes into its list.
pub(crate) fn summary(first: u64, seeds: u64, failovers: u64, processor: Duration, bad: &[u64]) {
    let seconds = processor.as_secs_f64();
    println!("{SUMMARY}{first} {seeds} seeds, {failovers} failovers, {seconds:.1} s of processor, violations: {bad:?}");
}

/// The first seed of a part, and its failovers.
fn read(line: &str) -> Option<(u64, u64)> {
    let (first, rest) = line.strip_prefix(SUMMARY)?.split_once(' ')?;
    let failovers = rest.split(", ").nth(1)?.strip_suffix(" failovers")?;
    Some((first.parse().ok()?, failovers.parse().ok()?))
}

struct Long {
    list: File,
    done: BTreeSet<u64>,
    next: u64,
    seeds: u64,
    failovers: u64,
    bad: bool,
}

/// Runs parts until there were enough failovers. `LIST` is the file that keeps the parts' lines.
pub(crate) fn long() -> ExitCode {
    let list = setting("LIST").unwrap_or_else(|| "target/sim-long.txt".to_owned());
    match go_on(Path::new(&list)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{list}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn go_on(path: &Path) -> io::Result<bool> {
    if let Some(folder) = path.parent() {
        create_dir_all(folder)?;
    }
    let before = if path.exists() { read_to_string(path)? } else { String::new() };
    let parts: Vec<_> = before.lines().filter_map(read).collect();
    let mut long = Long {
        list: OpenOptions::new().create(true).append(true).open(path)?,
        done: parts.iter().map(|(first, _)| *first).collect(),
        next: setting("FIRST").unwrap_or(1),
        seeds: setting("SEEDS").unwrap_or(SEEDS),
        failovers: parts.iter().map(|(_, failovers)| *failovers).sum(),
        bad: before.contains("VIOLATION"),
    };
    let wanted = setting("FAILOVERS").unwrap_or(FAILOVERS);
    let jobs = setting("JOBS").unwrap_or_else(|| available_parallelism().map_or(1, usize::from));
    println!("{} parts are done, with {} of {wanted} failovers", long.done.len(), long.failovers);
    let mut running: Vec<Child> = Vec::new();
    loop {
        for mut child in std::mem::take(&mut running) {
            if child.try_wait()?.is_some() {
                long.take(child)?;
            } else {
                running.push(child);
            }
        }
        while running.len() < jobs && long.failovers < wanted {
            running.push(long.begin()?);
        }
        if running.is_empty() {
            break;
        }
        sleep(Duration::from_millis(100));
    }
    let verdict = if long.bad { "some have violations" } else { "none has a violation" };
    println!("{} parts with {} failovers: {verdict}", long.done.len(), long.failovers);
    Ok(!long.bad)
}

impl Long {
    /// Begins the next part, in a process of its own.
    fn begin(&mut self) -> io::Result<Child> {
        while self.done.contains(&self.next) {
            self.next += self.seeds;
        }
        let first = self.next;
        self.next += self.seeds;
        let mut command = Command::new(std::env::current_exe()?);
        command.env("FIRST", first.to_string()).env("SEEDS", self.seeds.to_string()).env("PART", "1");
        command.env_remove("SEED").env_remove("LIMIT").stdout(Stdio::piped()).spawn()
    }

    /// Keeps what a part has found.
    fn take(&mut self, child: Child) -> io::Result<()> {
        let output = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let kept = text.lines().filter(|line| line.starts_with(SUMMARY) || line.contains("VIOLATION"));
        for line in kept {
            println!("{line}");
            writeln!(self.list, "{line}")?;
            self.bad |= line.contains("VIOLATION");
        }
        match text.lines().find_map(read) {
            Some((first, failovers)) => {
                self.done.insert(first);
                self.failovers += failovers;
                Ok(())
            }
            None => Err(io::Error::other(format!("a part has ended without its summary: {}", output.status))),
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_summary_is_read_again() {
        let line = "PART 501 500 seeds, 8700 failovers, 43.1 s of processor, violations: []";
        assert_eq!(super::read(line), Some((501, 8700)));
        assert_eq!(super::read("VIOLATION with seed 7: x"), None);
    }
}
