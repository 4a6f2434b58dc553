//! Processes by their ids: signals, children, and the reaper that ends a cluster whatever happens to the test.
//!
//! Knows nothing of PostgreSQL beyond the names of its programs and of its lock file.

use std::fs;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, waitpid};

/// Sends a signal; a process that is already gone is no error.
pub fn signal(id: u32, signal: Signal) {
    match kill_process(pid(id), signal) {
        Ok(()) | Err(Errno::SRCH) => {}
        Err(error) => panic!("cannot send {signal:?} to process {id}: {error}"),
    }
}

/// The letter of the process's state (`R`, `S`, `T`, `Z`, …), `None` when there is no such process.
fn state(id: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Whether this is a server's process that lives, or waits to be reaped.
pub fn is_postgres(id: u32) -> bool {
    fs::read_to_string(format!("/proc/{id}/comm")).is_ok_and(|name| name.trim() == "postgres")
}

/// Lets the children of a killed server become children of this process, which reaps them. A container's first process
/// often reaps nobody, and the dead would fill the process table.
pub fn adopt_orphans() {
    set_child_subreaper(Some(getpid())).expect("prctl");
}

/// Whether an orphan has ended; takes it out of the process table then.
pub fn reap(id: u32) -> bool {
    match waitpid(Some(pid(id)), WaitOptions::NOHANG) {
        Ok(reaped) => reaped.is_some(),
        Err(_not_our_child) => matches!(state(id), None | Some('Z' | 'X')),
    }
}

fn pid(id: u32) -> Pid {
    i32::try_from(id).ok().and_then(Pid::from_raw).expect("a process id")
}

pub fn children(id: u32) -> Vec<u32> {
    // The file is missing from kernels built without CONFIG_PROC_CHILDREN.
    if let Ok(list) = fs::read_to_string(format!("/proc/{id}/task/{id}/children")) {
        return list.split_whitespace().filter_map(|child| child.parse().ok()).collect();
    }
    let processes = fs::read_dir("/proc").expect("the test bed needs /proc");
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|child: &u32| {
            let parent = || -> Option<u32> {
                let stat = fs::read_to_string(format!("/proc/{child}/stat")).ok()?;
                stat.rsplit_once(") ")?.1.split_whitespace().nth(1)?.parse().ok()
            };
            parent() == Some(id)
        })
        .collect()
}

/// Stops one process and returns when it has stopped.
pub fn stop(id: u32) {
    signal(id, Signal::STOP);
    let deadline = Instant::now() + Duration::from_secs(20);
    while !matches!(state(id), None | Some('T' | 't' | 'Z' | 'X')) {
        assert!(Instant::now() < deadline, "process {id} does not stop");
        thread::sleep(Duration::from_micros(100));
    }
}

/// Stops a process and its children. The parent goes first, so that it cannot start another child meanwhile.
pub fn stop_tree(id: u32) {
    stop(id);
    for child in children(id) {
        stop(child);
    }
}

/// Undoes [`stop_tree`].
pub fn continue_tree(id: u32) {
    for child in children(id) {
        signal(child, Signal::CONT);
    }
    signal(id, Signal::CONT);
}

/// Kills a process and its children, as a power cut does. Returns the children, which their new parent reaps.
pub fn kill_tree(id: u32) -> Vec<u32> {
    stop(id);
    let children = children(id);
    signal(id, Signal::KILL);
    for child in &children {
        signal(*child, Signal::KILL);
    }
    children
}

/// Ends the processes of one folder and removes it: when told to, or when this process dies in any way.
///
/// A shell in a process group of its own (Ctrl-C passes it by) waits for the end of a pipe that only this process
/// holds. It ends the PostgreSQL programs, their managers, and the proxies in front of them, that carry the folder's
/// name in their command line, by id: a postmaster does by `-D`, its children by `cluster_name`, a proxy by its
/// configuration file. That finds children that are frozen, orphaned, or not yet born when this process died.
pub struct Reaper {
    folder: PathBuf,
    shell: Child,
    pipe: Option<ChildStdin>,
}

// A killed server leaves a System V shared memory segment (its interlock, 56 bytes) outside of its folder. The lock
// file names it; the creator's id is compared so that no other program's segment is ever taken for it.
const SCRIPT: &str = r#"
trap '' HUP INT QUIT TERM
IFS= read -r folder || exit 0
while read -r ignored; do :; done
tag=${folder##*/}
[ -n "$tag" ] || exit 1
rounds=0
while :; do
    found=
    for file in $(printf %s "$tag" | grep -alF -f - /proc/[0-9]*/cmdline 2>/dev/null); do
        id=${file#/proc/}
        id=${id%/cmdline}
        name=
        { read -r name <"/proc/$id/comm"; } 2>/dev/null
        case $name in
        postgres | initdb | cp | pg_ctl | pg_rewind | pg_basebackup | haproxy | pgbouncer | etcd | python3 | repmgr | \
            repmgrd)
            kill -9 "$id" 2>/dev/null
            found=yes
            ;;
        esac
    done
    [ -n "$found" ] || break
    rounds=$((rounds + 1))
    [ "$rounds" -lt 500 ] || exit 1
    sleep 0.01
done
for lock in "$folder"/*/postmaster.pid; do
    [ -f "$lock" ] || continue
    server=$(sed -n 1p "$lock")
    segment=$(sed -n '7s/^ *[0-9]* *//p' "$lock")
    while read -r key id perms size creator rest; do
        [ "$id" = "$segment" ] && [ "$creator" = "$server" ] && ipcrm -m "$id"
    done </proc/sysvipc/shm
done
rm -rf "$folder"
"#;

impl Reaper {
    /// Watches over `folder`, which need not exist yet. Its last component must be unique on the machine.
    pub fn watch(folder: &Path) -> Self {
        let mut shell = Command::new("sh")
            .args(["-c", SCRIPT, "testbed-reaper"])
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the test bed needs `sh`");
        let mut pipe = shell.stdin.take().expect("stdin is piped");
        writeln!(pipe, "{}", folder.display()).expect("the reaper reads");
        Self { folder: folder.to_owned(), shell, pipe: Some(pipe) }
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        drop(self.pipe.take());
        if !self.shell.wait().is_ok_and(|status| status.success()) {
            // No panic: this often runs while one unwinds.
            eprintln!("testbed: the reaper failed, look for processes of {}", self.folder.display());
        }
    }
}
