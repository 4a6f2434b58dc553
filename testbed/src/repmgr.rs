//! Three servers that repmgr manages, as on Fly: it promotes a standby when the primary is gone, and fences nobody.

use std::io::{Write as _, stderr};
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;
use tokio::task::spawn_blocking;

use crate::cluster::{Cluster, Node, ended};
use crate::program::Program;
use crate::server::{self, Server};
use crate::wait::until_slowly as until;

/// For an election on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
const ROLES: [&str; 2] = ["CREATE ROLE repmgr SUPERUSER LOGIN", "CREATE DATABASE repmgr OWNER repmgr"];

/// A [`Cluster`] whose standbys are promoted by repmgr. Commits wait for no standby, as on Fly.
///
/// [`Cluster::primary`] does not know of repmgr's promotions: see [`Repmgr::successor`].
pub struct Repmgr {
    managers: Vec<Program>,
    cluster: Cluster,
}

impl Repmgr {
    /// Whether a test can have one; prints a line that says so if not.
    pub fn is_installed() -> bool {
        let programs = Server::installed().programs();
        if ["repmgr", "repmgrd"].iter().all(|program| programs.join(program).is_file()) {
            return true;
        }
        // Written past `eprintln!`, which the harness keeps to itself when a test passes.
        let missing = programs.join("repmgrd");
        let _ = writeln!(
            stderr(),
            "skipped: repmgr is not installed: no {} (sh scripts/setup.sh managers)",
            missing.display()
        );
        false
    }

    /// Starts the servers, registers them, and starts the managers.
    pub async fn start() -> Self {
        let cluster = Cluster::builder().asynchronous().setting("shared_preload_libraries", "repmgr").start().await;
        let session = cluster.direct(Node(0)).await;
        for sql in ROLES {
            session.batch_execute(sql).await.expect("a role and a database for repmgr");
        }
        for node in cluster.nodes().split_off(1) {
            cluster.wait_replayed(node).await;
        }
        let managers: Vec<_> = cluster.nodes().into_iter().map(|node| configure(&cluster, node)).collect();
        let mut repmgr = Self { managers, cluster };
        for node in repmgr.cluster.nodes() {
            repmgr.register(node).await;
        }
        for manager in &mut repmgr.managers {
            let config = config_file(manager).display().to_string();
            manager.spawn(&["-f", &config, "--daemonize=false"]);
        }
        repmgr.wait_monitored().await;
        repmgr
    }

    /// The servers, and what can happen to them. [`Cluster::start_node`] starts an old primary again by hand: it is
    /// writable, beside its successor.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// The node that repmgr has promoted in the place of this one, as soon as it takes writes.
    pub async fn successor(&self, of: Node) -> Node {
        until("repmgr has promoted a standby", PATIENCE, || async {
            for node in self.cluster.nodes().into_iter().filter(|node| *node != of) {
                let Ok(session) = self.cluster.try_direct(node).await else { continue };
                let in_recovery = session.query_one("SELECT pg_is_in_recovery()", &[]).await;
                if in_recovery.is_ok_and(|row| !row.get::<_, bool>(0)) {
                    return Ok(node);
                }
            }
            Err(self.managers.iter().map(Program::log).collect::<Vec<_>>().join("\n"))
        })
        .await
    }

    /// SIGKILL to the node's repmgrd, which dies with its machine.
    pub async fn kill_manager(&mut self, node: Node) {
        self.managers[node.0].end(Signal::KILL).await;
    }

    async fn register(&self, node: Node) {
        let config = config_file(&self.managers[node.0]).display().to_string();
        let mut command = self.cluster.server().command("repmgr", self.cluster.folder());
        command.args(["-f", &config]);
        if node == Node(0) {
            command.args(["primary", "register"]);
        } else {
            command.args(["standby", "register", "--wait-sync=20"]);
        }
        ended(spawn_blocking(move || server::run(&mut command))).await;
    }

    /// Each repmgrd has told its server that it watches over it.
    async fn wait_monitored(&self) {
        for manager in &self.managers {
            until("repmgrd watches", PATIENCE, || async {
                let log = manager.log();
                if log.contains("monitoring") { Ok(()) } else { Err(log) }
            })
            .await;
        }
    }
}

fn config_file(manager: &Program) -> PathBuf {
    manager.folder().join("repmgr.conf")
}

/// The least that repmgr takes: it looks every second, and tries once more.
fn configure(cluster: &Cluster, node: Node) -> Program {
    let server = cluster.server();
    let Node(number) = node;
    let path = server.programs().join("repmgrd");
    let manager = Program::at(path, "repmgrd", &format!("repmgr{number}"), server, cluster.folder());
    let (config, programs, data) =
        (config_file(&manager), server.programs().display(), cluster.folder().join(format!("n{number}")));
    let (config, data, folder) = (config.display(), data.display(), manager.folder().display());
    let (addr, port, id) = (cluster.addr(node), cluster.port(), number + 1);
    manager.write(
        "repmgr.conf",
        &format!(
            "node_id={id}
node_name='n{number}'
conninfo='host={addr} port={port} user=repmgr dbname=repmgr connect_timeout=2'
data_directory='{data}'
pg_bindir='{programs}'
use_replication_slots=no
failover=automatic
promote_command='{programs}/repmgr standby promote -f {config}'
follow_command='{programs}/repmgr standby follow -f {config} --upstream-node-id=%n'
log_level=INFO
repmgrd_pid_file='{folder}/repmgrd.pid'
monitor_interval_secs=1
reconnect_attempts=1
reconnect_interval=1
connection_check_type=ping
promote_check_interval=1
promote_check_timeout=10
primary_notification_timeout=5
election_rerun_interval=1
service_promote_command='{programs}/pg_ctl -D {data} -W promote'
"
        ),
    );
    manager
}
