//! Nothing survives a test.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use testbed::{Cluster, Node, Part, Patroni, eventually};

const VICTIM: &str = "TESTBED_LEAK_VICTIM";
/// Set for a victim whose cluster is Patroni's.
const PATRONI: &str = "TESTBED_LEAK_PATRONI";

/// Processes with the cluster's name in their command line; those that only wait to be reaped have none.
fn processes(folder: &Path) -> usize {
    let tag = folder.file_name().unwrap().as_encoded_bytes();
    let commands = fs::read_dir("/proc").unwrap().filter_map(|entry| fs::read(entry.ok()?.path().join("cmdline")).ok());
    commands.filter(|command| command.windows(tag.len()).any(|window| window == tag)).count()
}

/// System V shared memory segments of all servers that are dead: nobody is attached.
fn abandoned_segments(servers: &[String]) -> usize {
    let segments = fs::read_to_string("/proc/sysvipc/shm").unwrap();
    segments
        .lines()
        .filter(|line| line.split_whitespace().nth(4).is_some_and(|creator| servers.iter().any(|id| id == creator)))
        .count()
}

fn server_ids(folder: &Path) -> Vec<String> {
    let locks = (0..3).filter_map(|node| fs::read_to_string(folder.join(format!("n{node}/postmaster.pid"))).ok());
    locks.map(|lock| lock.lines().next().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_dropped_cluster_leaves_nothing() {
    let cluster = Cluster::start().await;
    let folder = cluster.folder().to_owned();
    assert!(folder.exists());
    assert!(processes(&folder) > 3);
    let servers = server_ids(&folder);
    assert_eq!((servers.len(), abandoned_segments(&servers)), (3, 3));
    cluster.kill(Node(2)).await;
    cluster.freeze(Node(1));
    drop(cluster);
    assert_eq!(processes(&folder), 0);
    assert_eq!(abandoned_segments(&servers), 0);
    assert!(!folder.exists());
}

/// This program once more, for the test that hangs with a cluster.
fn victim_of(name: &str, value: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "leak::victim", "--ignored", "--nocapture"]).env(VICTIM, "yes").env(name, value);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[tokio::test]
async fn a_test_that_hangs_is_named_and_ended() {
    let mut folder = None;
    for limit in ["1", "10"] {
        let ended = victim_of("TESTBED_LIMIT", limit).output().unwrap();
        let (told, why) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
        assert_eq!(ended.status.code(), Some(101), "{told}{why}");
        assert!(told.contains("\ntest leak::victim ... FAILED\n"), "{told}");
        assert!(why.contains("leak::victim hangs"), "{why}");
        // A slow machine has not started the servers within a second.
        folder = told.lines().find_map(|line| Some(PathBuf::from(line.split_once("folder=")?.1)));
        if folder.is_some() {
            break;
        }
    }
    let folder = folder.expect("the victim comes to its cluster");
    eventually("the folder is gone", Duration::from_secs(30), async || !folder.exists()).await;
    assert_eq!(processes(&folder), 0);
}

#[tokio::test]
async fn a_killed_test_leaves_nothing() {
    let mut victim = victim_of("TESTBED_LIMIT", "300").spawn().unwrap();
    let lines = BufReader::new(victim.stdout.take().unwrap()).lines();
    let folder =
        lines.map_while(Result::ok).find_map(|line| Some(PathBuf::from(line.split_once("folder=")?.1))).unwrap();
    let servers = server_ids(&folder);
    assert_eq!(servers.len(), 3);
    assert!(processes(&folder) > 3);
    victim.kill().unwrap();
    victim.wait().unwrap();
    eventually("the folder is gone", Duration::from_secs(30), async || !folder.exists()).await;
    assert_eq!(processes(&folder), 0);
    assert_eq!(abandoned_segments(&servers), 0);
}

/// etcd, the managers, what they have started, and one that cannot be asked to end.
#[tokio::test]
async fn a_killed_test_leaves_nothing_of_patroni() {
    if !Patroni::is_installed() {
        return;
    }
    let mut victim = victim_of(PATRONI, "yes").spawn().unwrap();
    let lines = BufReader::new(victim.stdout.take().unwrap()).lines();
    let folder =
        lines.map_while(Result::ok).find_map(|line| Some(PathBuf::from(line.split_once("folder=")?.1))).unwrap();
    let servers = server_ids(&folder);
    assert_eq!(servers.len(), 3);
    assert!(processes(&folder) > 7, "{}", processes(&folder));
    victim.kill().unwrap();
    victim.wait().unwrap();
    eventually("the folder is gone", Duration::from_secs(30), async || !folder.exists()).await;
    assert_eq!(processes(&folder), 0);
    assert_eq!(abandoned_segments(&servers), 0);
}

#[tokio::test]
#[ignore = "it is run, and ended, by other tests of this file"]
async fn victim() {
    if std::env::var_os(VICTIM).is_none() {
        return;
    }
    if std::env::var_os(PATRONI).is_some() {
        let patroni = Patroni::start().await;
        patroni.freeze(patroni.leader().await, Part::Patroni).await;
        println!("folder={}", patroni.folder().display());
        std::future::pending::<()>().await;
    }
    let cluster = Cluster::start().await;
    cluster.kill(Node(0)).await;
    cluster.freeze(Node(1));
    println!("folder={}", cluster.folder().display());
    std::future::pending::<()>().await;
}
