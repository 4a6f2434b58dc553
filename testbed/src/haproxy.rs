//! The real HAProxy, set up as Fly Postgres (postgres-flex) does it: one on each node, each in front of all nodes, and
//! an HTTP end point on each node that tells its role.
//!
//! Fly's ports are 5432 (HAProxy), 5433 (that node's own server) and 5500 (the role). Here they follow the cluster's
//! port.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::process::Child;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::Signal;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_postgres::{Config, NoTls};

use crate::cluster::{Cluster, Node};
use crate::port::Port;
use crate::program::{Program, ended, is_installed};
use crate::sync::lock;
use crate::wait::{eventually, until};

const NAME: &str = "haproxy";
/// Distances to the cluster's port.
const PROXY: u16 = 100;
const ROLE: u16 = 200;
const STATS: u16 = 300;
/// Checks come every two seconds, and two or three of them decide.
const PATIENCE: Duration = Duration::from_secs(20);

/// The role of each node by HTTP, as Fly's `/flycheck/role` tells it: `primary`, `replica` or `zombie`, or a failure
/// where the server gives no session. Each question is a new session; nothing is kept. Dropping it closes all.
pub struct FlyChecks {
    nodes: Vec<Mutex<Option<Port>>>,
    endpoints: Vec<Endpoint>,
    held: watch::Sender<bool>,
}

#[derive(Clone)]
struct Endpoint {
    listen: SocketAddr,
    server: Config,
    zombie: Arc<Mutex<bool>>,
    held: watch::Receiver<bool>,
}

impl FlyChecks {
    /// An end point on each node.
    pub async fn start(cluster: &Cluster) -> Self {
        let (held, holds) = watch::channel(false);
        let endpoint = |node| {
            let mut server = Config::new();
            server.hostaddr(cluster.addr(node)).port(cluster.port()).user("postgres").dbname("app");
            server.application_name("flycheck").connect_timeout(Duration::from_secs(2));
            let listen = SocketAddr::new(cluster.addr(node), cluster.port() + ROLE);
            Endpoint { listen, server, zombie: Arc::default(), held: holds.clone() }
        };
        let endpoints: Vec<_> = cluster.nodes().into_iter().map(endpoint).collect();
        let checks = Self { nodes: endpoints.iter().map(|_| Mutex::default()).collect(), endpoints, held };
        for node in cluster.nodes() {
            checks.up(node).await;
        }
        checks
    }

    /// While held, questions wait: the proxies know nothing beyond what they assume.
    pub fn hold(&self, held: bool) {
        self.held.send_replace(held);
    }

    /// From now on this node says that it is a zombie, as one does whose lock file was written; or no longer.
    pub fn set_zombie(&self, node: Node, zombie: bool) {
        *lock(&self.endpoints[node.0].zombie) = zombie;
    }

    /// The end point of this node refuses connections, as its machine does when it is gone.
    pub fn down(&self, node: Node) {
        *lock(&self.nodes[node.0]) = None;
    }

    /// Undoes [`FlyChecks::down`].
    pub async fn up(&self, node: Node) {
        let endpoint = self.endpoints[node.0].clone();
        let listener = until("the port of the checks is free", PATIENCE, || async {
            TcpListener::bind(endpoint.listen).await.map_err(|error| error.to_string())
        })
        .await;
        let port = Port::on(listener, move |stream| endpoint.clone().answer(stream));
        *lock(&self.nodes[node.0]) = Some(port);
    }
}

impl Endpoint {
    async fn answer(mut self, mut stream: TcpStream) -> Option<()> {
        let mut question = Vec::new();
        while !question.windows(4).any(|end| end == b"\r\n\r\n") {
            let read = stream.read_buf(&mut question).await.ok()?;
            (read > 0).then_some(())?;
        }
        self.held.wait_for(|held| !held).await.ok()?;
        let (status, said) = match self.role().await {
            Ok(role) => ("200 OK", role.to_owned()),
            Err(error) => ("500 Internal Server Error", format!("failed to connect to local node: {error}")),
        };
        let answer = format!("HTTP/1.0 {status}\r\nContent-Length: {}\r\n\r\n{said}", said.len());
        stream.write_all(answer.as_bytes()).await.ok()
    }

    async fn role(&self) -> Result<&'static str, tokio_postgres::Error> {
        if *lock(&self.zombie) {
            return Ok("zombie");
        }
        let (client, connection) = self.server.connect(NoTls).await?;
        let connection = tokio::spawn(connection);
        let standby = client.query_one("SELECT pg_is_in_recovery()", &[]).await;
        connection.abort();
        Ok(if standby?.get(0) { "replica" } else { "primary" })
    }
}

/// A running HAProxy on a node's address. Ends when it is dropped.
pub struct HaProxy {
    program: Program,
    config: String,
    addr: SocketAddr,
    stats: SocketAddr,
    /// Those that were replaced by a reload: each ends with its last session.
    retired: Vec<Child>,
}

impl HaProxy {
    /// Whether a test can have one; prints a line that says so if not.
    ///
    /// # Panics
    /// When it is missing and `CI` is `true`.
    pub fn is_installed() -> bool {
        is_installed(NAME)
    }

    /// The port of the proxies, on every node.
    pub fn port(cluster: &Cluster) -> u16 {
        cluster.port() + PROXY
    }

    /// The cluster by its DNS name and the port of the proxies: what Fly writes into `DATABASE_URL`.
    pub fn url(cluster: &Cluster) -> String {
        format!("postgres://app@pg.internal:{}/app", Self::port(cluster))
    }

    /// Starts the proxy of this node with Fly's settings, and returns when it listens: it may not have checked any
    /// server yet.
    pub async fn start(cluster: &Cluster, node: Node) -> Self {
        let addr = SocketAddr::new(cluster.addr(node), Self::port(cluster));
        let stats = SocketAddr::new(cluster.addr(node), cluster.port() + STATS);
        let program = Program::new(NAME, &format!("haproxy{}", node.0), cluster.server(), cluster.folder());
        let text = configuration(cluster, node, addr, stats);
        let config = program.write("haproxy.cfg", &text).to_str().expect("a path of the test bed").to_owned();
        let mut proxy = Self { program, config, addr, stats, retired: Vec::new() };
        proxy.launch().await;
        proxy
    }

    /// Where clients connect.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Its supervisor ends it by SIGTERM and starts it again, as Fly's does whenever a read-only mode begins or ends:
    /// all sessions get a bare end of file. Returns when it listens.
    pub async fn restart(&mut self) {
        self.stop().await;
        self.launch().await;
    }

    /// SIGTERM: sessions get a bare end of file, connections are refused.
    pub async fn stop(&mut self) {
        self.program.end(Signal::TERM).await;
    }

    /// Starts it again after [`HaProxy::stop`]; returns when it listens.
    pub async fn launch(&mut self) {
        self.program.spawn(&["-db", "-f", &self.config]);
        self.program.listens(self.addr).await;
    }

    /// A new process takes the port over, and the old one ends with its last session. Returns when the old one listens
    /// no more.
    pub async fn reload(&mut self) {
        let old = self.program.id().expect("it runs");
        let replaced = self.program.spawn(&["-db", "-f", &self.config, "-sf", &old.to_string()]);
        self.retired.extend(replaced);
        let (new, stats) = (self.program.id().expect("it runs"), self.stats);
        until("the new process answers alone", PATIENCE, move || async move {
            for _ in 0..10 {
                let info = ask(stats, "show info").await?;
                if !info.lines().any(|line| line == format!("Pid: {new}")) {
                    return Err(info);
                }
            }
            Ok(())
        })
        .await;
    }

    /// Waits for the end of the sessions that older processes still serve.
    pub async fn wait_retired(&mut self) {
        for mut old in self.retired.drain(..) {
            ended(NAME, &mut old).await;
        }
    }

    /// Waits until its checks have found exactly this node to be the primary.
    pub async fn wait_found(&self, cluster: &Cluster, node: Node) {
        let addr = cluster.socket_addr(node).to_string();
        eventually(&format!("HAProxy has found {node:?}"), PATIENCE, async || {
            let servers = self.servers().await;
            let up = || servers.iter().filter(|server| server.status.starts_with("UP"));
            up().any(|server| server.addr == addr) && up().all(|server| server.addr == addr && server.check == "L7OK")
        })
        .await;
    }

    /// Waits until its checks have taken every server away.
    pub async fn wait_none(&self) {
        eventually("HAProxy has no server", PATIENCE, async || {
            !self.servers().await.iter().any(|server| server.status.starts_with("UP"))
        })
        .await;
    }

    async fn servers(&self) -> Vec<Behind> {
        let csv = ask(self.stats, "show stat").await.unwrap_or_default();
        let mut lines = csv.lines();
        let names: Vec<_> = lines.next().unwrap_or_default().trim_start_matches("# ").split(',').collect();
        let column = |line: &[&str], name| {
            let at = names.iter().position(|known| *known == name);
            at.and_then(|at| line.get(at)).map_or_else(String::new, |value| (*value).to_owned())
        };
        let servers = lines.map(|line| line.split(',').collect::<Vec<_>>());
        let servers = servers.filter(|line| column(line, "pxname") == "bk_db" && column(line, "svname") != "BACKEND");
        servers
            .map(|line| Behind {
                addr: column(&line, "addr"),
                status: column(&line, "status"),
                check: column(&line, "check_status"),
            })
            .collect()
    }
}

impl Drop for HaProxy {
    fn drop(&mut self) {
        for old in &mut self.retired {
            // As in the program's own drop.
            let _ = old.kill();
            let _ = old.wait();
        }
    }
}

/// What the proxy thinks of a server.
struct Behind {
    addr: String,
    status: String,
    check: String,
}

/// One question to the proxy's administration port.
pub(crate) async fn ask(stats: SocketAddr, question: &str) -> Result<String, String> {
    let asked = async {
        let mut stream = TcpStream::connect(stats).await?;
        stream.write_all(format!("{question}\n").as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    asked.await.map_err(|error| error.to_string())
}

/// What Fly's file comes to, with this cluster's names, ports and DNS server. What Fly leaves at HAProxy's defaults (a
/// check every two seconds, three to fall, two to rise) is left here, too.
fn configuration(cluster: &Cluster, node: Node, addr: SocketAddr, stats: SocketAddr) -> String {
    let (own, port, role) = (cluster.socket_addr(node), cluster.port(), cluster.port() + ROLE);
    let mut text = String::from("global\n    maxconn 1000\n    log stdout format raw daemon\n");
    let _ = write!(
        text,
        "    stats socket ipv4@{stats} level admin\n\n\
         defaults\n    log global\n    mode tcp\n    retries 2\n    timeout client 30m\n    timeout connect 4s\n    \
         timeout server 30m\n    timeout check 5s\n\n\
         resolvers dns\n    nameserver dns1 {}\n    accepted_payload_size 8192\n\n\
         frontend ft_postgresql\n    bind {addr}\n    default_backend bk_db\n\n\
         backend bk_db\n    balance roundrobin\n    option httpchk GET /flycheck/role\n    \
         http-check expect string primary\n    http-check disable-on-404\n    \
         server-template pg 10 pg.internal:{port} check port {role} resolvers dns resolve-prefer ipv4 init-addr none \
         on-marked-down shutdown-sessions\n    \
         server own {own} check backup port {role} on-marked-down shutdown-sessions\n",
        cluster.dns().addr()
    );
    text
}
