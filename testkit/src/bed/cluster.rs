//! A primary and its hot standbys, and what can happen to them.
//!
//! The test bed is the cluster's manager: it decides who is promoted and whom the standbys follow. Nothing fences an
//! old primary, so every kind of split brain can be made. A node's own changes ([`Cluster::set_read_only`], the standby
//! it follows) lie in its `postgresql.auto.conf`.

mod timelines;

use std::fs::{self, File, Permissions};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use std::{fmt::Write as _, thread};

use rustix::process::Signal;
use tokio::net::TcpStream;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{interval, sleep, sleep_until, timeout};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, NoTls};

use crate::Error;
use crate::bed::block::Block;
use crate::bed::certificate::Certificate;
use crate::bed::dns::Dns;
use crate::bed::process::{self, Reaper};
use crate::bed::server::{self, Server};
use crate::bed::site::Site;
use crate::bed::sync::lock;
use crate::bed::wait::until;

pub use timelines::Background;

/// How long a step of the test bed itself may take before the test fails. Steps take milliseconds; a loaded machine
/// gets time, and so does a standby that waits ten seconds for its WAL receiver, see [`Cluster::wake`].
const PATIENCE: Duration = Duration::from_secs(120);
/// After so many looks in vain, some milliseconds apart, a server is told once more to read its configuration.
const TELL_AGAIN: u32 = 500;
/// How long a dead node tries to follow before it is copied anew.
const FOLLOW_PATIENCE: Duration = Duration::from_secs(2);
/// How long a promotion waits for the other standbys to turn to the new primary.
const TURNING_PATIENCE: Duration = Duration::from_millis(500);
/// How long after a promotion the manager's own work may come: the waiting for the standbys, the next `ALTER SYSTEM`,
/// the end of its sessions. A real one comes back some seconds later, and not while the clients do.
const CALM: Duration = Duration::from_millis(250);
/// What takes longer than this does not go as usual.
const UNHURRIED: Duration = Duration::from_millis(100);

/// A member of a cluster, counted from 0. `Node(0)` is the first primary.
///
/// ```
/// use tokio_postgres_failover_testkit::Node;
///
/// assert!(Node(0) < Node(1));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Node(pub usize);

/// What [`Cluster::promote_timed`] saw.
#[derive(Clone, Copy, Debug)]
pub struct Promotion {
    /// When the first write on a session that was already open had been answered.
    pub accepted_at: Instant,
    /// From asking for the promotion to `accepted_at`.
    pub took: Duration,
}

/// What a cluster shall be like; see [`Cluster::builder`].
#[derive(Clone, Debug)]
#[must_use]
pub struct ClusterBuilder {
    nodes: usize,
    synchronous: bool,
    foreign: bool,
    archive: bool,
    settings: String,
    hba: String,
    password: Option<String>,
    certificate: Option<Certificate>,
    clients: Option<String>,
}

impl ClusterBuilder {
    /// How many nodes, the primary included: 1 to 5, 3 unless told.
    pub fn nodes(mut self, nodes: usize) -> Self {
        assert!((1..=5).contains(&nodes), "a cluster has 1 to 5 nodes, not {nodes}");
        self.nodes = nodes;
        self
    }

    /// Commits do not wait for a standby. Without this call they wait for any one, where there is one.
    pub fn asynchronous(self) -> Self {
        self.synchronous(false)
    }

    /// Whether commits wait for a standby.
    pub fn synchronous(mut self, synchronous: bool) -> Self {
        self.synchronous = synchronous;
        self
    }

    /// A line of `postgresql.conf`, on every node. The value is quoted here.
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        writeln!(self.settings, "{name} = '{}'", value.replace('\'', "''")).expect("a string");
        self
    }

    /// Lines of `pg_hba.conf` that come before the test bed's own, on every node.
    pub fn hba(mut self, lines: &str) -> Self {
        writeln!(self.hba, "{lines}").expect("a string");
        self
    }

    /// The role `app` must give this password (SCRAM). `postgres` and the standbys still need none.
    pub fn password(mut self, password: &str) -> Self {
        self.password = Some(password.to_owned());
        self
    }

    /// Every node offers TLS, with this certificate. Each can be given another by [`Cluster::set_certificate`].
    pub fn tls(mut self, certificate: &Certificate) -> Self {
        self.certificate = Some(certificate.clone());
        self
    }

    /// Clients may show certificates that the authority with this certificate signed; which lines of
    /// [`ClusterBuilder::hba`] want one, they say.
    pub fn tls_clients(mut self, pem: &str) -> Self {
        self.clients = Some(pem.to_owned());
        self
    }

    /// Another system identifier than all other clusters of the test bed have, which are copies of one template.
    pub fn foreign(mut self) -> Self {
        self.foreign = true;
        self
    }

    /// Starts the servers and returns when all standbys are streaming.
    pub async fn start(self) -> Cluster {
        self.try_start().await.unwrap_or_else(|error| panic!("testbed: {error}"))
    }

    /// [`ClusterBuilder::start`], with an error where this machine cannot have a cluster.
    pub async fn try_start(self) -> Result<Cluster, Error> {
        Cluster::launch(self).await
    }
}

/// The processes of one node.
#[derive(Default)]
struct Postmaster {
    child: Option<Child>,
    frozen: bool,
}

impl Postmaster {
    fn running(&mut self) -> Option<u32> {
        let child = self.child.as_mut()?;
        let id = child.id();
        if child.try_wait().expect("a child can be waited for").is_some() {
            *self = Self::default();
            return None;
        }
        Some(id)
    }
}

/// Real PostgreSQL servers on loopback addresses of their own: a primary and hot standbys.
///
/// All listen on the same port. They have the database `app`, owned by the role `app` (no superuser), and the superuser
/// `postgres`. Dropping the cluster ends its servers and removes its files; so does the end of the test process,
/// however it comes.
///
/// Methods wait for the state they name, with a deadline, and panic when it does not come.
pub struct Cluster {
    nodes: Vec<Mutex<Postmaster>>,
    primary: AtomicUsize,
    synchronous: bool,
    password: Option<String>,
    server: &'static Server,
    tag: String,
    folder: PathBuf,
    dns: Dns,
    reaper: Option<Reaper>,
    block: Block,
}

/// Starting, stopping, and where things are.
impl Cluster {
    /// Three nodes; a commit waits for any one standby.
    pub async fn start() -> Self {
        Self::builder().start().await
    }

    /// A cluster with other choices than [`Cluster::start`] makes.
    pub fn builder() -> ClusterBuilder {
        ClusterBuilder {
            nodes: 3,
            synchronous: true,
            foreign: false,
            archive: false,
            settings: String::new(),
            hba: String::new(),
            password: None,
            certificate: None,
            clients: None,
        }
    }

    async fn launch(choices: ClusterBuilder) -> Result<Self, Error> {
        let ClusterBuilder { nodes, synchronous, foreign, archive, settings, hba, password, certificate, clients } =
            choices;
        let Site { server, template, tag, folder, dns, reaper, block } = Site::try_claim(foreign).await?;
        let cluster = Arc::new(Self {
            nodes: (0..nodes).map(|_| Mutex::default()).collect(),
            primary: AtomicUsize::new(0),
            synchronous,
            password,
            server,
            tag,
            folder,
            dns,
            reaper: Some(reaper),
            block,
        });
        let hba = match cluster.password {
            Some(_) => format!("{hba}host all app 127.0.0.0/8 scram-sha-256\n"),
            None => hba,
        };
        if let Some(certificate) = &certificate {
            for node in cluster.nodes() {
                cluster.write_certificate(node, certificate);
            }
        }
        if let Some(clients) = clients {
            cluster.write(&cluster.clients_file(), &clients);
        }
        // The caller's settings come last, and so they count.
        let settings = if archive { cluster.make_archive() + &settings } else { settings };
        let created: Vec<_> = cluster
            .nodes()
            .into_iter()
            .map(|node| {
                let (cluster, template) = (Arc::clone(&cluster), template.clone());
                let (settings, hba) = (settings.clone(), hba.clone());
                spawn_blocking(move || {
                    let data = cluster.data(node);
                    server::copy(&template, &data);
                    server::append(&data.join("postgresql.conf"), &settings);
                    let rules = data.join("pg_hba.conf");
                    let below = fs::read_to_string(&rules).expect("pg_hba.conf");
                    fs::write(&rules, hba + &below).expect("pg_hba.conf");
                    cluster.configure(node, (node != Node(0)).then_some(Node(0)));
                    cluster.spawn(node);
                })
            })
            .collect();
        for node in created {
            ended(node).await;
        }
        let cluster = Arc::into_inner(cluster).expect("the copies have ended");
        for node in cluster.nodes() {
            cluster.wait_up(node).await;
        }
        if let Some(password) = &cluster.password {
            let sql = format!("ALTER ROLE app PASSWORD {}", quoted(password));
            let session = cluster.administrator(Node(0)).await;
            session.batch_execute(&sql).await.expect("ALTER ROLE");
            for node in cluster.others(Node(0)) {
                cluster.wait_replayed(node).await;
            }
        }
        cluster.wait_streaming(Node(0), nodes - 1).await;
        cluster.dns.set(&cluster.nodes().into_iter().map(|node| cluster.addr(node)).collect::<Vec<_>>());
        Ok(cluster)
    }

    /// Waits until a node that was just started gives sessions. One that exits instead, over a setting for example, is
    /// told at once.
    async fn wait_up(&self, node: Node) {
        let what = format!("{node:?} accepts connections");
        let up = until(&what, PATIENCE, || async {
            if !self.is_running(node) {
                return Ok(false);
            }
            self.try_direct(node).await.map(|_| true).map_err(|error| format!("{error:?}"))
        });
        assert!(up.await, "{node:?} does not start:\n{}", self.last_lines(node, 5));
    }

    /// The port of every node.
    pub fn port(&self) -> u16 {
        self.block.port
    }

    /// The address of a node.
    pub fn addr(&self, node: Node) -> IpAddr {
        assert!(node.0 < self.nodes.len(), "there is no {node:?}");
        self.block.node(node.0)
    }

    /// A further address that is this cluster's alone, for a proxy or a trap: `n` is below 243.
    pub fn spare_addr(&self, n: u8) -> IpAddr {
        self.block.spare(n)
    }

    /// The address and port of a node.
    pub fn socket_addr(&self, node: Node) -> SocketAddr {
        SocketAddr::new(self.addr(node), self.port())
    }

    /// All nodes, running or not.
    pub fn nodes(&self) -> Vec<Node> {
        (0..self.nodes.len()).map(Node).collect()
    }

    /// The node that was promoted last.
    pub fn primary(&self) -> Node {
        Node(self.primary.load(Ordering::SeqCst))
    }

    /// The DNS server that answers for `pg.internal`, at first with all nodes.
    pub fn dns(&self) -> &Dns {
        &self.dns
    }

    /// The cluster by its DNS name.
    pub fn url(&self) -> String {
        format!("postgres://{}@pg.internal:{}/app", self.user(), self.port())
    }

    /// The cluster by the addresses of its nodes.
    pub fn url_hosts(&self) -> String {
        let hosts: Vec<_> = self.nodes().into_iter().map(|node| self.socket_addr(node).to_string()).collect();
        format!("postgres://{}@{}/app", self.user(), hosts.join(","))
    }

    /// The role `app` with its password, as a connection string has them.
    pub fn user(&self) -> String {
        let mut user = String::from("app");
        for (n, byte) in self.password.iter().flat_map(|password| password.bytes()).enumerate() {
            let separator = if n == 0 { ":" } else { "" };
            write!(user, "{separator}%{byte:02X}").expect("a string");
        }
        user
    }

    /// Whether the node's server process exists, frozen or not.
    pub fn is_running(&self, node: Node) -> bool {
        self.postmaster(node).running().is_some()
    }

    /// Whether it is frozen; see [`Cluster::freeze`].
    pub fn is_frozen(&self, node: Node) -> bool {
        self.postmaster(node).frozen
    }

    /// What the servers said last, for the report of a failed test.
    fn show_logs(&self) {
        for node in self.nodes() {
            eprintln!("testbed: the last of {node:?}'s log:\n{}", self.last_lines(node, 30));
        }
    }

    fn last_lines(&self, node: Node, count: usize) -> String {
        let log = fs::read(self.log_file(node)).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    }

    /// What the node's server wrote to its log so far. A failing test prints the last lines of each.
    pub async fn log(&self, node: Node) -> String {
        let log = tokio::fs::read(self.log_file(node)).await.expect("the log");
        String::from_utf8_lossy(&log).into_owned()
    }

    /// A session of the superuser `postgres` in the database `app`, as soon as the node gives one.
    pub async fn direct(&self, node: Node) -> Client {
        until(&format!("{node:?} accepts connections"), PATIENCE, || async {
            self.try_direct(node).await.map_err(|error| format!("{error:?}"))
        })
        .await
    }

    /// One attempt of [`Cluster::direct`]. A frozen node lets it hang.
    pub async fn try_direct(&self, node: Node) -> Result<Client, tokio_postgres::Error> {
        let mut config = Config::new();
        config.hostaddr(self.addr(node)).port(self.port()).user("postgres").dbname("app");
        config.application_name("testbed").connect_timeout(Duration::from_secs(2));
        let (client, connection) = config.connect(NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// The first number of the servers' version, as 15. `PG_BIN` names the folder of the servers' programs.
    pub async fn version(&self) -> u32 {
        let sql = "SELECT current_setting('server_version_num')::int / 10000";
        let row = self.direct(self.primary()).await.query_one(sql, &[]).await;
        row.expect("the version").get::<_, i32>(0).unsigned_abs()
    }

    /// The folder of this cluster's files; it is gone when the cluster is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The installation that the servers are of.
    pub fn server(&self) -> &'static Server {
        self.server
    }

    fn postmaster(&self, node: Node) -> MutexGuard<'_, Postmaster> {
        let postmaster = self.nodes.get(node.0).unwrap_or_else(|| panic!("there is no {node:?}"));
        lock(postmaster)
    }

    fn running(&self, node: Node) -> u32 {
        self.postmaster(node).running().unwrap_or_else(|| panic!("{node:?} does not run"))
    }

    fn data(&self, node: Node) -> PathBuf {
        self.folder.join(name(node))
    }

    fn log_file(&self, node: Node) -> PathBuf {
        self.folder.join(format!("{}.log", name(node)))
    }

    /// Starts the process; what differs by node goes onto its command line, where no copied file overrules it.
    fn spawn(&self, node: Node) {
        let mut postmaster = self.postmaster(node);
        assert!(postmaster.running().is_none(), "{node:?} runs already");
        let data = self.data(node);
        let log = File::options().create(true).append(true).open(self.log_file(node)).expect("the log");
        let mut command = self.server.command("postgres", &data);
        let (certificate, key) = self.certificate_files(node);
        if certificate.exists() {
            command
                .args(["-c", "ssl=on"])
                .args(["-c", &format!("ssl_cert_file={}", certificate.display())])
                .args(["-c", &format!("ssl_key_file={}", key.display())]);
        }
        if self.clients_file().exists() {
            command.args(["-c", &format!("ssl_ca_file={}", self.clients_file().display())]);
        }
        let child = command
            .arg("-D")
            .arg(&data)
            .args(["-c", &format!("listen_addresses={}", self.addr(node))])
            .args(["-c", &format!("port={}", self.port())])
            .args(["-c", &format!("cluster_name={}-{}", self.tag, name(node))])
            .stdout(log.try_clone().expect("the log"))
            .stderr(Stdio::from(log))
            .spawn()
            .expect("postgres starts");
        postmaster.child = Some(child);
    }

    /// Beside the data folder: what is copied from another node does not touch them.
    fn certificate_files(&self, node: Node) -> (PathBuf, PathBuf) {
        let file = |ending| self.folder.join(format!("{}.{ending}", name(node)));
        (file("crt"), file("key"))
    }

    fn write_certificate(&self, node: Node, certificate: &Certificate) {
        let (path, key) = self.certificate_files(node);
        self.write(&path, &certificate.certificate);
        self.write(&key, &certificate.key);
    }

    fn clients_file(&self) -> PathBuf {
        self.folder.join("clients.crt")
    }

    /// For the server's eyes only, as it wants its keys.
    fn write(&self, path: &Path, pem: &str) {
        fs::write(path, pem).expect("a certificate's file");
        fs::set_permissions(path, Permissions::from_mode(0o600)).expect("a certificate's file");
        self.server.give(path);
    }

    /// Another certificate, on a cluster that was built with [`ClusterBuilder::tls`]: for the sessions that are opened
    /// from about now on, as the server is told and does not answer.
    pub fn set_certificate(&self, node: Node, certificate: &Certificate) {
        self.write_certificate(node, certificate);
        process::signal(self.running(node), Signal::HUP);
    }

    /// Writes a node's own settings anew: whom it follows, and whom its commits wait for once it is the primary.
    fn configure(&self, node: Node, follows: Option<Node>) {
        let data = self.data(node);
        let mut settings =
            format!("synchronous_standby_names = {}\n", quoted(&self.synchronous_names(self.others(node))));
        let signal = data.join("standby.signal");
        if let Some(primary) = follows {
            writeln!(settings, "primary_conninfo = {}", quoted(&self.conninfo(primary, node))).expect("a string");
            self.signal_standby(node);
        } else if signal.exists() {
            fs::remove_file(&signal).expect("standby.signal");
        }
        // Written in place: the file stays the servers' own, who replace it on ALTER SYSTEM.
        fs::write(data.join("postgresql.auto.conf"), settings).expect("postgresql.auto.conf");
    }

    /// The node's next start is that of a standby.
    fn signal_standby(&self, node: Node) {
        let signal = self.data(node).join("standby.signal");
        fs::write(&signal, "").expect("standby.signal");
        self.server.give(&signal);
    }

    fn others(&self, node: Node) -> impl Iterator<Item = Node> + use<> {
        (0..self.nodes.len()).map(Node).filter(move |other| *other != node)
    }

    fn synchronous_names(&self, standbys: impl IntoIterator<Item = Node>) -> String {
        let names: Vec<_> = standbys.into_iter().map(name).collect();
        if !self.synchronous || names.is_empty() {
            return String::new();
        }
        format!("ANY 1 ({})", names.join(", "))
    }

    fn conninfo(&self, primary: Node, standby: Node) -> String {
        format!(
            "host={} port={} user=postgres application_name={} connect_timeout=2",
            self.addr(primary),
            self.port(),
            name(standby)
        )
    }

    /// Nodes other than this one that can be asked something.
    fn awake_others(&self, node: Node) -> Vec<Node> {
        let awake = |other: &Node| {
            let mut postmaster = self.postmaster(*other);
            postmaster.running().is_some() && !postmaster.frozen
        };
        self.others(node).filter(awake).collect()
    }
}

/// Faults of processes.
impl Cluster {
    /// SIGKILL to the server and its children at once, as when the machine loses power, but that the kernel still
    /// closes the sockets. Returns when all are gone.
    pub async fn kill(&self, node: Node) {
        let backends = process::kill_tree(self.running(node));
        self.wait_exit(node).await;
        until(&format!("the backends of {node:?} are gone"), PATIENCE, || async {
            if backends.iter().all(|backend| process::reap(*backend)) { Ok(()) } else { Err(format!("{backends:?}")) }
        })
        .await;
    }

    /// SIGINT: sessions are ended with 57P01. Returns when the server has shut down cleanly.
    pub async fn stop_fast(&self, node: Node) {
        process::signal(self.running(node), Signal::INT);
        self.wait_exit(node).await;
    }

    /// SIGQUIT: backends drop everything, the next start recovers. Returns when the server has exited.
    pub async fn stop_immediate(&self, node: Node) {
        process::signal(self.running(node), Signal::QUIT);
        self.wait_exit(node).await;
    }

    /// SIGTERM: no new sessions (57P03), the open ones go on, and the server exits after the last. Does not wait for
    /// that.
    #[allow(clippy::unused_async, reason = "stands in one row with the other ways to stop")]
    pub async fn stop_smart(&self, node: Node) {
        process::signal(self.running(node), Signal::TERM);
    }

    /// SIGSTOP to the server and its children: connections stay, new ones are accepted by the kernel, nothing answers.
    pub fn freeze(&self, node: Node) {
        let id = self.running(node);
        process::stop_tree(id);
        self.postmaster(node).frozen = true;
    }

    /// Ends [`Cluster::freeze`]. A standby that was frozen during a promotion still follows the old primary:
    /// [`Cluster::restart_as_standby`] turns it.
    pub fn thaw(&self, node: Node) {
        let id = self.running(node);
        process::continue_tree(id);
        self.postmaster(node).frozen = false;
    }

    /// SIGSTOP to the process that sends a standby its WAL: what is committed from now on is on the primary alone,
    /// until that is killed, or for three seconds: then the standby gives up the silent connection, and is sent
    /// everything.
    pub async fn stop_shipping(&self, primary: Node, standby: Node) {
        let sql = "SELECT pid FROM pg_stat_replication WHERE application_name = $1";
        let row = self.direct(primary).await.query_one(sql, &[&name(standby)]).await;
        process::stop(row.expect("a sender of WAL").get::<_, i32>(0).unsigned_abs());
    }

    /// Starts a stopped node as it is: an old primary comes back writable, on its old timeline, beside the new one.
    ///
    /// In a synchronous cluster such a zombie has no standby, so its commits wait for ever unless the session says
    /// `SET synchronous_commit = local`. Use [`ClusterBuilder::asynchronous`] for one that acknowledges writes.
    pub async fn start_node(&self, node: Node) {
        self.spawn(node);
        self.wait_up(node).await;
    }

    /// SIGKILL to one backend: the server ends all sessions and recovers. The victim is a session made for this.
    pub async fn kill_backend(&self, node: Node) {
        let victim = self.direct(node).await;
        let row = victim.query_one("SELECT pg_backend_pid()", &[]).await.expect("a backend's id");
        process::signal(row.get::<_, i32>(0).unsigned_abs(), Signal::KILL);
        until("the killed session ends", PATIENCE, || async {
            if victim.is_closed() { Ok(()) } else { Err(String::from("open")) }
        })
        .await;
    }

    /// [`Cluster::kill_backend`], and returns when the server has recovered. Until it has noticed the crash, its other
    /// sessions go on, and what they begin crashes with it. Panics if that takes longer than `within`.
    pub async fn crash_backend(&self, node: Node, within: Duration) {
        let before = self.replayed(node).await;
        self.kill_backend(node).await;
        let recovered = timeout(within, async {
            loop {
                let now = self.replayed(node).await;
                if now.is_some() && now != before {
                    return;
                }
                sleep(Duration::from_millis(3)).await;
            }
        });
        recovered.await.expect("the server recovers");
    }

    /// Where the server's last recovery ended.
    async fn replayed(&self, node: Node) -> Option<String> {
        let session = self.try_direct(node).await.ok()?;
        session.query_one("SELECT pg_last_wal_replay_lsn()::text", &[]).await.ok()?.get(0)
    }

    async fn wait_exit(&self, node: Node) {
        until(&format!("{node:?} exits"), PATIENCE, || async {
            if self.is_running(node) { Err(String::from("it runs")) } else { Ok(()) }
        })
        .await;
    }
}

/// Faults made by SQL.
impl Cluster {
    /// `ALTER SYSTEM SET default_transaction_read_only`: open sessions see it, too. Returns when a new session does.
    pub async fn set_read_only(&self, node: Node, read_only: bool) {
        let session = self.direct(node).await;
        alter_system(&session, "default_transaction_read_only", if read_only { "on" } else { "off" }).await;
        self.wait_default_read_only(node, read_only).await;
    }

    /// `ALTER DATABASE app SET default_transaction_read_only`, which is how Fly fences: open sessions go on writing.
    /// It is a row of the catalog, so it reaches the standbys, and is still there after a promotion.
    pub async fn set_database_read_only(&self, node: Node, read_only: bool) {
        let session = self.administrator(node).await;
        let value = if read_only { "on" } else { "off" };
        let sql = format!("ALTER DATABASE app SET default_transaction_read_only = {value}");
        session.batch_execute(&sql).await.expect("ALTER DATABASE");
        self.wait_default_read_only(node, read_only).await;
    }

    /// Ends the sessions whose application name is LIKE this pattern (57P01); returns how many.
    pub async fn terminate_backends(&self, node: Node, application_name_like: &str) -> u64 {
        let sql = "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity
                   WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND application_name LIKE $1";
        let row = self.direct(node).await.query_one(sql, &[&application_name_like]).await;
        row.expect("pg_terminate_backend").get::<_, i64>(0).unsigned_abs()
    }

    /// A session that writes whatever the defaults say, waits for no standby, and whose errors are not worth logging.
    async fn administrator(&self, node: Node) -> Client {
        let session = self.direct(node).await;
        let sql =
            "SET default_transaction_read_only = off; SET synchronous_commit = local; SET log_min_messages = fatal";
        session.batch_execute(sql).await.expect("SET");
        session
    }

    async fn wait_default_read_only(&self, node: Node, read_only: bool) {
        until(&format!("new sessions of {node:?} are read-only: {read_only}"), PATIENCE, || async {
            let row = self.direct(node).await.query_one("SHOW default_transaction_read_only", &[]).await;
            let shown: String = row.map_err(|error| format!("{error:?}"))?.get(0);
            if (shown == "on") == read_only { Ok(()) } else { Err(shown) }
        })
        .await;
    }
}

/// Failover.
impl Cluster {
    /// [`Cluster::promote_timed`], for those who do not need the instant.
    pub async fn promote(&self, node: Node) -> Duration {
        self.promote_timed(node).await.took
    }

    /// Makes a standby the primary; returns a quarter of a second after it accepts writes, when the other awake
    /// standbys stream from it. For these it waits half a second more at most.
    ///
    /// In a synchronous cluster commits wait for one of these once they stream, and what was committed before
    /// has reached them when this returns; so Patroni does it, too. With none awake commits wait for nobody.
    /// Nothing is done to the old primary. Promote [`Cluster::most_advanced_standby`]: another one may lack commits
    /// that were acknowledged.
    pub async fn promote_timed(&self, node: Node) -> Promotion {
        let (probe, asking) = (self.administrator(node).await, self.direct(node).await);
        let mut followers = Vec::new();
        for other in self.awake_others(node).into_iter().filter(|other| *other != self.primary()) {
            followers.push((other, self.direct(other).await));
        }
        // The other standbys still follow the old primary: commits that waited for them from the first moment would
        // stand still until they have turned round.
        alter_system(&asking, "synchronous_standby_names", "").await;

        let begun = Instant::now();
        asking.execute("SELECT pg_promote(false)", &[]).await.expect("pg_promote");
        let accepted = async {
            let mut tick = interval(Duration::from_millis(1));
            loop {
                match probe.batch_execute("UPDATE testbed.probe SET writes = writes + 1").await {
                    Ok(()) => return Instant::now(),
                    Err(error) if error.code() == Some(&SqlState::READ_ONLY_SQL_TRANSACTION) => {
                        assert!(begun.elapsed() < PATIENCE, "{node:?} does not become writable");
                    }
                    Err(error) => panic!("the promoted {node:?} says {error:?}"),
                }
                tick.tick().await;
            }
        };
        let followed = async {
            for (other, session) in &followers {
                alter_system(session, "primary_conninfo", &self.conninfo(node, *other)).await;
            }
        };
        let (accepted_at, ()) = tokio::join!(accepted, followed);
        self.primary.store(node.0, Ordering::SeqCst);
        sleep_until((accepted_at + CALM).into()).await;
        let sql = "SELECT ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int";
        let timeline = asking.query_one(sql, &[]).await.expect("the new timeline").get(0);
        let mut follow = Vec::new();
        for (other, session) in &followers {
            // One that cannot follow would make commits wait for ever: an old primary that lives may have sent it more.
            let follows = self.wait_following(*other, session, node, timeline).await;
            if follows || !is_ahead(session, &asking, timeline).await {
                follow.push(*other);
            }
        }
        let names = self.synchronous_names(follow);
        alter_system(&asking, "synchronous_standby_names", &names).await;
        wait_synchronous(&asking, &names).await;
        // A commit that waits for a standby also waits for all before it. Under a fence there is nothing to wait for.
        let _ = timeout(TURNING_PATIENCE, asking.batch_execute("UPDATE testbed.probe SET writes = writes + 1")).await;
        Promotion { accepted_at, took: accepted_at - begun }
    }

    /// Waits until a standby streams from this node, but not for long: one that is ahead of the new primary never will.
    /// Returns whether it streams.
    async fn wait_following(&self, standby: Node, session: &Client, primary: Node, timeline: i32) -> bool {
        let (begun, alarm) = (Instant::now(), Alarm::set());
        // One that is ahead streams the old timeline once more, up to its end.
        let sql =
            "SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming' AND sender_host = $1 AND received_tli = $2";
        while begun.elapsed() < TURNING_PATIENCE {
            let streams = session.query_opt(sql, &[&self.addr(primary).to_string(), &timeline]).await;
            if streams.is_ok_and(|row| row.is_some()) {
                return true;
            }
            if alarm.rings() {
                self.wake(standby).await;
            }
            sleep(Duration::from_millis(3)).await;
        }
        false
    }

    /// Wakes a standby's postmaster. Up to PostgreSQL 15 it can miss that a WAL receiver is to be started again, when
    /// the old one ends just before it goes to sleep; it then sleeps on until anything happens, and the standby waits
    /// ten seconds.
    async fn wake(&self, standby: Node) {
        // Nothing listens while a node starts: then it is awake.
        let _ = timeout(UNHURRIED, TcpStream::connect(self.socket_addr(standby))).await;
    }

    /// A planned change: the primary shuts down cleanly, the standby is promoted, the old primary comes back as a
    /// standby. Returns the time from the shutdown's begin to the first write.
    pub async fn switch_over(&self, node: Node) -> Duration {
        let (old, begun) = (self.primary(), Instant::now());
        self.stop_fast(old).await;
        let promotion = self.promote_timed(node).await;
        self.restart_as_standby(old).await;
        promotion.accepted_at - begun
    }

    /// The awake standby that received the most WAL.
    pub async fn most_advanced_standby(&self) -> Node {
        let mut best = None;
        for node in self.awake_others(self.primary()) {
            let session = self.direct(node).await;
            // What was received starts anew at a segment's begin when a standby reconnects; what was replayed stays.
            let sql = "SELECT (coalesce(greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()), '0/0') - \
                       '0/0')::bigint
                       WHERE pg_is_in_recovery()";
            if let Some(row) = session.query_opt(sql, &[]).await.expect("the LSN") {
                best = best.max(Some((row.get::<_, i64>(0), node)));
            }
        }
        best.expect("a standby that runs").1
    }

    /// Any node but the primary becomes a standby of it, and is streaming when this returns.
    ///
    /// An old primary is rewound; a node that cannot follow is copied from the primary. Its own `ALTER SYSTEM` settings
    /// are lost.
    pub async fn restart_as_standby(&self, node: Node) {
        let primary = self.primary();
        assert_ne!(node, primary, "the primary cannot follow itself");
        if self.is_running(node) {
            if self.postmaster(node).frozen {
                self.thaw(node);
            }
            self.stop_fast(node).await;
        }
        let session = self.administrator(primary).await;
        // Until its first checkpoint, a promoted server's control file names the old timeline, and pg_rewind finds
        // nothing to do.
        session.batch_execute("CHECKPOINT").await.expect("CHECKPOINT");
        let source = format!("host={} port={} user=postgres dbname=app", self.addr(primary), self.port());
        let data = self.data(node);
        let was_primary = !data.join("standby.signal").exists();
        let mut rewind = self.server.command("pg_rewind", &self.folder);
        rewind.arg("--no-sync").arg("--source-server").arg(&source).arg("--target-pgdata").arg(&data);
        let mut usable = true;
        if was_primary {
            usable = ended(spawn_blocking(move || server::try_run(&mut rewind).is_ok())).await;
        }
        if usable {
            self.configure(node, Some(primary));
            self.spawn(node);
            usable = self.follows(&session, node, FOLLOW_PATIENCE).await;
        }
        if !usable {
            // Its folder is of no use any more. A signal that asks it to end may come too early, and be lost.
            if self.is_running(node) {
                self.kill(node).await;
            }
            // A process of the killed server may still write a file.
            let removed = || async { fs::remove_dir_all(&data).map_err(|error| error.to_string()) };
            until("the old data folder is removed", FOLLOW_PATIENCE, removed).await;
            let mut copy = self.server.command("pg_basebackup", &self.folder);
            copy.args(["--no-sync", "--checkpoint=fast", "--wal-method=stream", "--dbname"])
                .arg(&source)
                .arg("--pgdata")
                .arg(&data);
            ended(spawn_blocking(move || server::run(&mut copy))).await;
            self.configure(node, Some(primary));
            self.spawn(node);
            let follows = self.follows(&session, node, PATIENCE).await;
            assert!(follows, "{node:?} does not follow {primary:?}:\n{}", self.log(node).await);
        }
        let names = self.synchronous_names(self.others(primary));
        alter_system(&session, "synchronous_standby_names", &names).await;
    }

    /// Waits until so many standbys stream from this node.
    pub async fn wait_streaming(&self, primary: Node, standbys: usize) {
        let session = self.direct(primary).await;
        let alarm = Alarm::set();
        until(&format!("{standbys} standbys stream from {primary:?}"), PATIENCE, || async {
            if alarm.rings() {
                for standby in self.awake_others(primary) {
                    self.wake(standby).await;
                }
            }
            let sql = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'";
            let row = session.query_one(sql, &[]).await.map_err(|error| format!("{error:?}"))?;
            let streaming = row.get::<_, i64>(0);
            if usize::try_from(streaming).is_ok_and(|streaming| streaming >= standbys) {
                Ok(())
            } else {
                Err(format!("{streaming} do"))
            }
        })
        .await;
    }

    /// Waits until a standby answers and shows what the primary has committed up to now.
    pub async fn wait_replayed(&self, standby: Node) {
        // Not the insert position: what nobody waits for is written and sent only when the WAL writer next wakes up.
        let primary = self.direct(self.primary()).await;
        let row = primary.query_one("SELECT pg_current_wal_flush_lsn()::text", &[]).await;
        let target: String = row.expect("the LSN").get(0);
        let session = self.direct(standby).await;
        let alarm = Alarm::set();
        until(&format!("{standby:?} has replayed {target}"), PATIENCE, || async {
            if alarm.rings() {
                self.wake(standby).await;
            }
            let sql = "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn, pg_last_wal_replay_lsn()::text";
            let row = session.query_one(sql, &[&target]).await.map_err(|error| format!("{error:?}"))?;
            if row.get::<_, Option<bool>>(0) == Some(true) {
                Ok(())
            } else {
                Err(format!("it is at {:?}", row.get::<_, Option<String>>(1)))
            }
        })
        .await;
    }

    /// Whether the node is streaming the primary's timeline before the time is over. A node that exits never will.
    ///
    /// A standby that is ahead of the new primary streams, too, for a moment: the old timeline's last segment.
    async fn follows(&self, primary: &Client, node: Node, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let sql = "SELECT ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int
                   FROM pg_stat_replication WHERE state = 'streaming' AND application_name = $1";
        while Instant::now() < deadline && self.is_running(node) {
            // First, for it wakes the standby: see `wake`.
            let standby = self.try_direct(node).await;
            let timeline = primary.query_opt(sql, &[&name(node)]).await.expect("pg_stat_replication");
            if let (Some(timeline), Ok(standby)) = (timeline, standby) {
                let sql = "SELECT received_tli FROM pg_stat_wal_receiver WHERE status = 'streaming'";
                let received = standby.query_opt(sql, &[]).await.ok().flatten();
                if received.and_then(|row| row.get::<_, Option<i32>>(0)) == timeline.get(0) {
                    return true;
                }
            }
            sleep(Duration::from_millis(3)).await;
        }
        false
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if thread::panicking() {
            self.show_logs();
        }
        for node in self.nodes() {
            let Some(mut server) = self.postmaster(node).child.take() else { continue };
            if server.try_wait().is_ok_and(|exit| exit.is_some()) {
                continue;
            }
            let backends = process::kill_tree(server.id());
            // They are killed: this does not wait long, and what fails here the reaper sees.
            let _ = server.wait();
            while !backends.iter().all(|backend| process::reap(*backend)) {
                thread::sleep(Duration::from_millis(1));
            }
        }
        drop(self.reaper.take());
    }
}

/// Tells somebody who waits for a standby, and looks every few milliseconds, when it is to be woken: what takes longer
/// than usual is a reason, and each wake-up costs the server a process.
struct Alarm {
    set: Instant,
    rung: AtomicU32,
}

impl Alarm {
    fn set() -> Self {
        Self { set: Instant::now(), rung: AtomicU32::new(0) }
    }

    fn rings(&self) -> bool {
        let rung = self.rung.load(Ordering::Relaxed);
        let rings = self.set.elapsed() > UNHURRIED + UNHURRIED / 4 * rung;
        if rings {
            self.rung.store(rung + 1, Ordering::Relaxed);
        }
        rings
    }
}

/// A node's name towards the others, and of its folder.
fn name(node: Node) -> String {
    format!("n{}", node.0)
}

/// The task's result, or its panic.
pub async fn ended<T>(task: JoinHandle<T>) -> T {
    task.await.unwrap_or_else(|error| resume_unwind(error.into_panic()))
}

/// A literal, of SQL and of the configuration files alike.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// Has the standby replayed more than the promoted server had when it was promoted, and not from that server's
/// timeline? The timeline matters: a slow machine may see a standby late that has followed long since.
async fn is_ahead(standby: &Client, promoted: &Client, timeline: i32) -> bool {
    let fork: String =
        promoted.query_one("SELECT pg_last_wal_replay_lsn()::text", &[]).await.expect("the fork's position").get(0);
    let sql = "SELECT pg_last_wal_replay_lsn() > $1::text::pg_lsn
                  AND NOT EXISTS (SELECT FROM pg_stat_wal_receiver WHERE received_tli = $2)";
    standby.query_one(sql, &[&fork, &timeline]).await.is_ok_and(|row| row.get(0))
}

/// Waits until commits wait for these standbys. It is the checkpointer that tells the sessions, when it gets to it
/// (`SyncRepUpdateSyncStandbysDefined`); until then they are acknowledged without a standby.
async fn wait_synchronous(session: &Client, names: &str) {
    let looks = AtomicU32::new(0);
    until(&format!("commits wait for {names:?}"), PATIENCE, || async {
        // On a loaded machine it was seen that a server had never read its configuration again.
        if looks.fetch_add(1, Ordering::Relaxed) % TELL_AGAIN == TELL_AGAIN - 1 {
            session.execute("SELECT pg_reload_conf()", &[]).await.expect("pg_reload_conf");
        }
        let sql = "SELECT current_setting('synchronous_standby_names') = $1
                      AND EXISTS (SELECT FROM pg_stat_activity
                                   WHERE backend_type = 'checkpointer'
                                     AND wait_event IN ('CheckpointerMain', 'CheckpointWriteDelay'))";
        match session.query_one(sql, &[&names]).await.map(|row| row.get(0)) {
            Ok(true) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

/// Works on standbys and read-only servers: it writes a file. Not in effect at once: the signal has to arrive.
async fn alter_system(session: &Client, name: &str, value: &str) {
    session.batch_execute(&format!("ALTER SYSTEM SET {name} = {}", quoted(value))).await.expect("ALTER SYSTEM");
    session.execute("SELECT pg_reload_conf()", &[]).await.expect("pg_reload_conf");
}
