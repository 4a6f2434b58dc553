//! psycopg, in a program of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Stdio;

use testbed::{Cluster, Node};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{ChildStdout, Command};
use tokio::time::timeout;

use super::{LONG, sidecar, through};

const WRITERS: usize = 8;
/// How many rows each of them stores before the failover, and then after it.
const ROWS: usize = 10;

/// Each writer stores a row at a time, and connects anew when its connection was lost. It prints its number and the
/// number and the server of each row that was acknowledged. A statement that fails may have stored its row, so no
/// number is used twice.
const PROGRAM: &str = r#"
import sys, threading, psycopg
writers = int(sys.argv[2])
def write(writer):
    connection = None
    number = writer
    while True:
        try:
            if connection is None:
                connection = psycopg.connect(sys.argv[1], autocommit=True)
            number += writers
            insert = "INSERT INTO notes VALUES (%s) RETURNING host(inet_server_addr())"
            server = connection.execute(insert, (number,)).fetchone()[0]
            print(f"{writer} {number} {server}\n", end="", flush=True)
        except psycopg.OperationalError:
            connection = None
for writer in range(writers):
    threading.Thread(target=write, args=(writer,)).start()
"#;

/// Reads what the program prints until each writer has stored enough rows on the server. After its first row there, a
/// writer stores none elsewhere. Returns the numbers of the rows.
async fn until_all_write_to(server: &str, lines: &mut Lines<BufReader<ChildStdout>>) -> Vec<i64> {
    let (mut rows, mut numbers) = (BTreeMap::<String, usize>::new(), Vec::new());
    while rows.len() < WRITERS || rows.values().any(|rows| *rows < ROWS) {
        let line = lines.next_line().await.unwrap().expect("it goes on");
        let [writer, number, to] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        assert!(to == server || !rows.contains_key(writer), "{line}, after one to {server}");
        numbers.push(number.parse().unwrap());
        if to == server {
            *rows.entry(writer.to_owned()).or_default() += 1;
        }
    }
    numbers
}

/// A Python with psycopg, if the machine has one: the one that `make setup-managers` installs for Patroni, the first in
/// the path, or the system's, for which `make setup` installs it.
async fn python() -> Option<&'static str> {
    let patronis = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/patroni/bin/python3");
    for python in [patronis, "python3", "/usr/bin/python3"] {
        let asked = Command::new(python).args(["-c", "import psycopg"]).stderr(Stdio::null()).status().await;
        if asked.is_ok_and(|status| status.success()) {
            return Some(python);
        }
    }
    println!("skipped: no Python with psycopg; `make setup` installs it");
    None
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_writers_go_on_with_the_new_primary_after_a_failover() {
    let Some(python) = python().await else { return };
    let cluster = Cluster::start().await;
    cluster
        .direct(Node(0))
        .await
        .batch_execute("CREATE TABLE notes (number bigint); GRANT ALL ON notes TO PUBLIC")
        .await
        .unwrap();
    let sidecar = sidecar(&cluster, LONG).await;
    let user = through(&cluster, &sidecar).get_user().unwrap().to_owned();
    let address = sidecar.address;
    let url = format!("host={} port={} user={user} dbname=app sslmode=disable", address.ip(), address.port());
    let mut child = Command::new(python)
        .args(["-c", PROGRAM, &url, &WRITERS.to_string()])
        .env("PYTHONNOUSERSITE", "1")
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let first = cluster.addr(Node(0)).to_string();
    let before = timeout(LONG, until_all_write_to(&first, &mut lines)).await;
    let mut acknowledged = before.expect("rows on the primary");

    cluster.freeze(Node(0));
    let successor = cluster.most_advanced_standby().await;
    cluster.promote_timed(successor).await;
    let second = cluster.addr(successor).to_string();
    let after = timeout(LONG, until_all_write_to(&second, &mut lines)).await;
    acknowledged.extend(after.expect("rows on the new primary"));
    child.kill().await.unwrap();

    let rows = cluster.direct(successor).await.query("SELECT number FROM notes", &[]).await.unwrap();
    let different: BTreeSet<i64> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(different.len(), rows.len(), "a row is there twice");
    let lost: Vec<_> = acknowledged.iter().filter(|number| !different.contains(number)).collect();
    assert!(lost.is_empty(), "of {} acknowledged rows, these are lost: {lost:?}", acknowledged.len());
}
