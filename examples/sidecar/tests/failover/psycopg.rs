//! psycopg, in a program of its own.

use std::process::Stdio;

use testbed::{Cluster, Node};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::time::timeout;

use super::{LONG, sidecar, through};

/// It writes a row at a time, and connects anew when its connection was lost. It prints the server of each row.
const PROGRAM: &str = r#"
import sys, psycopg
connection = None
number = 0
while True:
    try:
        if connection is None:
            connection = psycopg.connect(sys.argv[1], autocommit=True)
        insert = "INSERT INTO notes VALUES (%s) RETURNING host(inet_server_addr())"
        server = connection.execute(insert, (number,)).fetchone()[0]
        print(server, flush=True)
        number += 1
    except psycopg.OperationalError:
        connection = None
"#;

/// A Python with psycopg, if the machine has one: the one that `make setup-managers` installs for Patroni, or its own.
async fn python() -> Option<&'static str> {
    for python in [concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/patroni/bin/python3"), "python3"] {
        let asked = Command::new(python).args(["-c", "import psycopg"]).stderr(Stdio::null()).status().await;
        if asked.is_ok_and(|status| status.success()) {
            return Some(python);
        }
    }
    println!("skipped: no Python with psycopg; `make setup-managers` installs one");
    None
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_writes_to_the_new_primary_after_a_failover() {
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
        .args(["-c", PROGRAM, &url])
        .env("PYTHONNOUSERSITE", "1")
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let first = cluster.addr(Node(0)).to_string();
    let line = timeout(LONG, lines.next_line()).await.expect("a row").unwrap();
    assert_eq!(line.as_deref(), Some(first.as_str()));

    cluster.freeze(Node(0));
    let successor = cluster.most_advanced_standby().await;
    cluster.promote_timed(successor).await;
    let second = cluster.addr(successor).to_string();
    let after = async {
        let mut rows = 0;
        while rows < 10 {
            let server = lines.next_line().await.unwrap().expect("it goes on");
            assert!(rows == 0 || server == second, "a row went to {server} after one to {second}");
            rows += usize::from(server == second);
        }
    };
    timeout(LONG, after).await.expect("rows on the new primary");
}
