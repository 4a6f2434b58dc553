//! The end of a test that hangs: after `LIMIT`, or `TESTBED_LIMIT` seconds, the process says which test it is, and
//! exits.
//!
//! Without it a run that hangs ends when the machine's patience does, and nobody learns which test it was. All tests of
//! the process end with it, and the reapers clear up behind them.

use std::cell::RefCell;
use std::io::{Write as _, stderr, stdout};
use std::sync::{Mutex, Once};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};
use std::{env, fs, process};

use crate::bed::sync::lock;

/// A multiple of what the longest test takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(300);
const INTERVAL: Duration = Duration::from_secs(1);

/// The tests that have begun something of the test bed and have not ended.
static RUNNING: Mutex<Vec<(ThreadId, String, Instant)>> = Mutex::new(Vec::new());

/// The thread that looks is started once.
static WATCH: Once = Once::new();

thread_local! {
    static THIS: RefCell<Option<Entry>> = const { RefCell::new(None) };
}

/// A test in [`RUNNING`], for as long as its thread lives.
struct Entry(ThreadId);

impl Drop for Entry {
    fn drop(&mut self) {
        lock(&RUNNING).retain(|(thread, ..)| *thread != self.0);
    }
}

/// Limits the test that calls this, if it is one of the test harness's: these run in threads of their own, which have
/// the names of the tests. The programs that run for as long as they are told have none.
pub fn begin() {
    let thread = thread::current();
    let Some(name) = thread.name().filter(|name| name.contains("::")) else { return };
    THIS.with_borrow_mut(|this| {
        if this.is_none() {
            *this = Some(Entry(thread.id()));
            let mut running = lock(&RUNNING);
            running.push((thread.id(), name.to_owned(), Instant::now()));
        }
    });
    WATCH.call_once(|| drop(thread::Builder::new().name("testbed-limit".to_owned()).spawn(watch)));
}

fn watch() {
    let told = env::var("TESTBED_LIMIT").ok().and_then(|seconds| seconds.parse().ok()).map(Duration::from_secs);
    let limit = told.unwrap_or(LIMIT);
    loop {
        thread::sleep(INTERVAL);
        let running = lock(&RUNNING);
        if let Some((_, name, begun)) = running.iter().find(|(.., begun)| begun.elapsed() > limit) {
            // Written past `print!`, which the harness keeps until the test ends. Nobody is left to tell of a failed
            // write.
            let _ = writeln!(stdout(), "\ntest {name} ... FAILED");
            let _ = writeln!(stderr(), "testbed: {name} hangs: it began {:?} ago\n{}", begun.elapsed(), threads());
            process::exit(101);
        }
    }
}

/// What the threads of this process wait for, as far as the kernel tells.
fn threads() -> String {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let read = |task: &fs::DirEntry, file| fs::read_to_string(task.path().join(file)).unwrap_or_default();
    let lines = tasks.map(|task| format!("  {}: {}", read(&task, "comm").trim(), read(&task, "wchan").trim()));
    lines.collect::<Vec<_>>().join("\n")
}
