//! Nothing is left of a test, however it ends.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use tokio_postgres_failover_testkit::{Cluster, Node};

use crate::{PATIENCE, again};

/// Processes of the servers that listen on this address.
fn servers(address: &str) -> usize {
    let wanted = format!("listen_addresses={address}");
    let commands = fs::read_dir("/proc").unwrap().filter_map(|entry| fs::read(entry.ok()?.path().join("cmdline")).ok());
    commands.filter(|command| String::from_utf8_lossy(command).split('\0').any(|word| word == wanted)).count()
}

fn address(cluster: &Cluster, node: Node) -> String {
    let url = cluster.superuser_url(node).unwrap();
    url.split_once('@').unwrap().1.split_once(':').unwrap().0.to_owned()
}

#[test]
fn a_dropped_cluster_leaves_nothing() {
    let cluster = Cluster::builder().standbys(1).start().wait().unwrap();
    let addresses = [Node(0), Node(1)].map(|node| address(&cluster, node));
    assert_eq!(addresses.each_ref().map(|address| servers(address)), [1, 1]);
    cluster.freeze(Node(1)).wait().unwrap();
    drop(cluster);
    assert_eq!(addresses.map(|address| servers(&address)), [0, 0]);
}

#[test]
fn a_killed_test_leaves_nothing() {
    let mut victim = again("leftovers::victim").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(victim.stdout.take().unwrap()).lines().map_while(Result::ok);
    let address = lines.find_map(|line| Some(line.split_once("address=")?.1.to_owned())).expect("a cluster");
    assert_eq!(servers(&address), 1);
    victim.kill().unwrap();
    victim.wait().unwrap();
    let begun = Instant::now();
    while servers(&address) > 0 {
        assert!(begun.elapsed() < PATIENCE, "the servers go on");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
#[ignore = "killed by a_killed_test_leaves_nothing"]
fn victim() {
    let cluster = Cluster::builder().standbys(1).start().wait().unwrap();
    println!("address={}", address(&cluster, Node(0)));
    thread::sleep(Duration::from_secs(600));
}
