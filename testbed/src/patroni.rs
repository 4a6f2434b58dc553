//! Three servers that Patroni manages, with etcd. What can happen to them is in `faults`.
//!
//! Patroni decides who is the primary here, and nobody else: the test bed starts processes, takes them away, and cuts
//! the paths between them. Each node has three such paths: its own to etcd, and those of its peers to its PostgreSQL
//! and to its Patroni. Clients connect to the node itself, past them.
//!
//! Patroni 4 enforces a `ttl` of 20 s and more, with which each failover takes 20 s. The test bed takes that limit
//! away, as Patroni 3 had none; nothing else of Patroni is changed.

mod config;
mod faults;
mod front;
mod installed;
pub(crate) mod rest;

use std::io::{Write as _, stderr};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use tokio::sync::{Mutex, MutexGuard};
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tokio_postgres::{Client, Config, NoTls};

use crate::cluster::{Node, ended};
use crate::dns::Dns;
use crate::etcd::Etcd;
use crate::orphans::{Orphans, postmaster};
use crate::path::Path as Link;
use crate::process;
use crate::program::Program;
use crate::server::{self, Server};
use crate::site::Site;
use crate::wait::until_slowly as until;

pub use faults::Part;
pub use front::{Checks, Front};
pub(crate) use installed::python;

const NODES: u8 = 3;
/// The distance of Patroni's own port to PostgreSQL's.
const REST: u16 = 100;
/// Which of the spare addresses the paths have.
const TO_POSTGRES: u8 = 10;
const TO_PATRONI: u8 = 20;
const TO_ETCD: u8 = 30;
/// For an election, or a node that is copied anew, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// For one answer of a node that may be frozen.
const ANSWER: Duration = Duration::from_millis(700);

/// What a cluster of Patroni's shall be like; see [`Patroni::builder`]. Times are in seconds, as Patroni has them.
#[derive(Clone, Debug)]
#[must_use]
pub struct PatroniBuilder {
    etcd: u8,
    ttl: u32,
    loop_wait: u32,
    retry_timeout: u32,
    primary_start_timeout: u32,
    synchronous: bool,
    failsafe: bool,
}

impl PatroniBuilder {
    /// Three members of etcd instead of one.
    pub fn three_etcd(mut self) -> Self {
        self.etcd = 3;
        self
    }

    /// `ttl`, `loop_wait` and `retry_timeout`: 5, 1 and 2 unless told. Patroni's own defaults are 30, 10 and 10.
    pub fn times(mut self, ttl: u32, loop_wait: u32, retry_timeout: u32) -> Self {
        (self.ttl, self.loop_wait, self.retry_timeout) = (ttl, loop_wait, retry_timeout);
        self
    }

    /// How long Patroni tries to start a crashed primary in place: 0, not at all, unless told. Its own default is 300.
    pub fn primary_start_timeout(mut self, seconds: u32) -> Self {
        self.primary_start_timeout = seconds;
        self
    }

    /// `synchronous_mode`: commits wait for a standby that Patroni chooses, and no other is promoted.
    pub fn synchronous(mut self) -> Self {
        self.synchronous = true;
        self
    }

    /// `failsafe_mode`: a primary without etcd goes on while all other members say that they see it.
    pub fn failsafe(mut self) -> Self {
        self.failsafe = true;
        self
    }

    /// Starts all; returns when there is a primary and both standbys stream.
    pub async fn start(self) -> Patroni {
        Patroni::launch(self).await
    }
}

/// What one node consists of besides its PostgreSQL, which Patroni starts.
struct Member {
    patroni: Mutex<Program>,
    config: String,
    script: String,
    to_postgres: Link,
    to_patroni: Link,
    /// One to each member.
    to_etcd: Vec<Link>,
}

/// Three nodes with Patroni and PostgreSQL, and etcd. The database and the roles are those of
/// [`Cluster`](crate::Cluster).
///
/// Dropping it ends all processes and removes the files; so does the end of the test process, however it comes.
///
/// Methods wait for the state they name, with a deadline, and panic when it does not come.
pub struct Patroni {
    members: Vec<Member>,
    etcd: Etcd,
    orphans: Orphans,
    site: Site,
    /// Commits shall wait for a standby.
    synchronous: AtomicBool,
}

/// Starting, and where things are.
impl Patroni {
    /// Whether a test can have one; prints a line that says why if not.
    pub fn is_installed() -> bool {
        let Err(why) = python() else { return true };
        // Written past `eprintln!`, which the harness keeps to itself when a test passes.
        let _ = writeln!(stderr(), "skipped: Patroni is not installed: {why} (sh scripts/setup.sh managers)");
        false
    }

    /// What to install before [`Patroni::start`] works; `None` if nothing is missing. For programs, which are not
    /// skipped.
    pub fn missing() -> Option<String> {
        if let Err(why) = Server::find() {
            return Some(why.to_string());
        }
        let why = python().err()?;
        Some(format!("Patroni and etcd are needed, and {why}: install them with `sh scripts/setup.sh managers`"))
    }

    /// One etcd, short times, asynchronous.
    pub async fn start() -> Self {
        Self::builder().start().await
    }

    /// A cluster with other choices than [`Patroni::start`] makes.
    pub fn builder() -> PatroniBuilder {
        PatroniBuilder {
            etcd: 1,
            ttl: 5,
            loop_wait: 1,
            retry_timeout: 2,
            primary_start_timeout: 0,
            synchronous: false,
            failsafe: false,
        }
    }

    async fn launch(choices: PatroniBuilder) -> Self {
        let python = python().unwrap_or_else(|why| panic!("testbed: Patroni is not installed: {why}"));
        let site = Site::claim(false).await;
        let copies: Vec<_> = (0..NODES)
            .map(|node| {
                let (template, data) = (site.template.clone(), site.folder.join(format!("n{node}")));
                spawn_blocking(move || server::copy(&template, &data))
            })
            .collect();
        let etcd = Etcd::start(&site, choices.etcd).await;
        for copy in copies {
            ended(copy).await;
        }
        let folders = (0..NODES).map(|node| site.folder.join(format!("n{node}"))).collect();
        let orphans = Orphans::watch(folders);
        let mut members = Vec::new();
        for node in 0..NODES {
            members.push(Member::start(&site, &etcd, python, node, &choices).await);
        }
        let patroni = Self { members, etcd, orphans, site, synchronous: choices.synchronous.into() };
        patroni.wait_healthy().await;
        let all: Vec<_> = patroni.nodes().into_iter().map(|node| patroni.addr(node)).collect();
        patroni.site.dns.set(&all);
        patroni
    }

    /// All nodes, running or not.
    pub fn nodes(&self) -> Vec<Node> {
        (0..self.members.len()).map(Node).collect()
    }

    /// The nodes but this one.
    pub fn others(&self, node: Node) -> Vec<Node> {
        self.nodes().into_iter().filter(|other| *other != node).collect()
    }

    /// The port of PostgreSQL on every node.
    pub fn port(&self) -> u16 {
        self.site.block.port
    }

    /// The address of a node.
    pub fn addr(&self, node: Node) -> IpAddr {
        self.site.block.node(node.0)
    }

    /// The address and port of a node, for clients.
    pub fn socket_addr(&self, node: Node) -> SocketAddr {
        SocketAddr::new(self.addr(node), self.port())
    }

    /// The DNS server that answers for `pg.internal`, with all nodes unless told otherwise.
    pub fn dns(&self) -> &Dns {
        &self.site.dns
    }

    /// The cluster by the addresses of its nodes.
    pub fn url_hosts(&self) -> String {
        let hosts: Vec<_> = self.nodes().into_iter().map(|node| self.socket_addr(node).to_string()).collect();
        format!("postgres://app@{}/app", hosts.join(","))
    }

    /// The folder of this cluster's files; it is gone when the cluster is.
    pub fn folder(&self) -> &Path {
        &self.site.folder
    }

    /// A session of the superuser `postgres` in the database `app`, as soon as the node gives one.
    pub async fn direct(&self, node: Node) -> Client {
        let what = format!("{node:?} accepts connections");
        until(&what, PATIENCE, || async { self.try_direct(node).await.map_err(|error| format!("{error:?}")) }).await
    }

    /// One attempt of [`Patroni::direct`]. A frozen node lets it hang.
    pub async fn try_direct(&self, node: Node) -> Result<Client, tokio_postgres::Error> {
        let mut config = Config::new();
        config.hostaddr(self.addr(node)).port(self.port()).user("postgres").dbname("app");
        config.application_name("testbed").connect_timeout(Duration::from_secs(2));
        let (client, connection) = config.connect(NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    fn member(&self, node: Node) -> &Member {
        self.members.get(node.0).unwrap_or_else(|| panic!("there is no {node:?}"))
    }

    async fn manager(&self, node: Node) -> MutexGuard<'_, Program> {
        self.member(node).patroni.lock().await
    }

    fn data(&self, node: Node) -> PathBuf {
        self.site.folder.join(format!("n{}", node.0))
    }

    fn rest_addr(&self, node: Node) -> SocketAddr {
        SocketAddr::new(self.addr(node), self.port() + REST)
    }
}

/// What Patroni says.
impl Patroni {
    /// The nodes whose Patroni says that it holds the lock, and runs the primary.
    async fn leaders(&self, among: &[Node]) -> Vec<Node> {
        self.answering(among, "/primary").await
    }

    /// The nodes whose Patroni says yes to this question.
    async fn answering(&self, among: &[Node], question: &str) -> Vec<Node> {
        let mut answering = Vec::new();
        for node in among {
            let answer = rest::ask(self.rest_addr(*node), "GET", question, "", ANSWER).await;
            if answer.is_ok_and(|(status, _)| status == 200) {
                answering.push(*node);
            }
        }
        answering
    }

    /// The primary, as soon as there is one.
    pub async fn leader(&self) -> Node {
        self.leader_among(&self.nodes()).await
    }

    /// The primary, as soon as it is another node than this one. Nothing is asked of this one.
    pub async fn successor(&self, of: Node) -> Node {
        self.leader_among(&self.others(of)).await
    }

    /// The standby to hand over to: the one that commits wait for, as Patroni takes no other then, or else any.
    pub async fn candidate(&self, leader: Node) -> Node {
        let others = self.others(leader);
        self.answering(&others, "/sync").await.first().copied().unwrap_or(others[0])
    }

    async fn leader_among(&self, nodes: &[Node]) -> Node {
        until("Patroni has a leader", PATIENCE, || async {
            // Patroni calls a server a primary as soon as it has told it to promote.
            let sql = "SELECT count(*) WHERE NOT pg_is_in_recovery()";
            match self.leaders(nodes).await[..] {
                [leader] if self.number(leader, sql).await == Some(1) => Ok(leader),
                _ => Err(self.state().await),
            }
        })
        .await
    }

    /// Waits until there is a primary and both standbys stream from it. In synchronous mode, Patroni would also promote
    /// one of them.
    pub async fn wait_healthy(&self) {
        until("Patroni's cluster is healthy", PATIENCE, || async {
            let [leader] = self.leaders(&self.nodes()).await[..] else { return Err(self.state().await) };
            let sql = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'";
            match self.number(leader, sql).await {
                Some(streaming) if streaming == i64::from(NODES) - 1 => Ok(()),
                _ => Err(self.state().await),
            }
        })
        .await;
        if self.synchronous.load(Ordering::Relaxed) {
            self.wait_synchronous(true).await;
        }
    }

    /// Waits until commits wait for a standby that Patroni would promote, or no longer do. PostgreSQL waits for it
    /// first, and Patroni writes it down a moment later: a primary that is lost in between has no successor.
    async fn wait_synchronous(&self, synchronous: bool) {
        let sql = "SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')";
        until("Patroni has set the synchronous standbys", PATIENCE, || async {
            let leader = self.leader().await;
            let waits = self.number(leader, sql).await.map(|standbys| standbys > 0);
            let noted = !self.answering(&self.others(leader), "/sync").await.is_empty();
            if waits == Some(synchronous) && noted == synchronous { Ok(()) } else { Err(self.state().await) }
        })
        .await;
    }

    /// The one number that a query gives, unless anything fails.
    async fn number(&self, node: Node, sql: &str) -> Option<i64> {
        let answer = async { self.try_direct(node).await?.query_one(sql, &[]).await?.try_get(0) };
        // A frozen server takes connections and answers nothing.
        timeout(ANSWER, answer).await.ok()?.ok()
    }

    /// What each node says of all, for an error's text.
    async fn state(&self) -> String {
        for node in self.nodes() {
            if let Ok((_, body)) = rest::ask(self.rest_addr(node), "GET", "/cluster", "", ANSWER).await {
                return body;
            }
        }
        "no Patroni answers".to_owned()
    }
}

impl Member {
    async fn start(site: &Site, etcd: &Etcd, python: &Path, node: u8, choices: &PatroniBuilder) -> Self {
        let addr = site.block.node(usize::from(node));
        let port = site.block.port;
        let link = async |spare: u8, port: u16, upstream: SocketAddr| {
            Link::start(SocketAddr::new(site.block.spare(spare), port), upstream).await
        };
        let to_postgres = link(TO_POSTGRES + node, port, SocketAddr::new(addr, port)).await;
        let to_patroni = link(TO_PATRONI + node, port + REST, SocketAddr::new(addr, port + REST)).await;
        let mut to_etcd = Vec::new();
        for (member, upstream) in (0..).zip(etcd.clients()) {
            to_etcd.push(link(TO_ETCD + node * 10 + member, upstream.port(), *upstream).await);
        }
        let program = Program::at(python.to_owned(), "patroni", &format!("patroni{node}"), site.server, &site.folder);
        let text = config::text(
            &config::Places {
                site,
                node,
                postgres: SocketAddr::new(addr, port),
                rest: SocketAddr::new(addr, port + REST),
                to_postgres: to_postgres.addr(),
                to_patroni: to_patroni.addr(),
                etcd: to_etcd.iter().map(|link| link.addr().to_string()).collect(),
            },
            choices,
        );
        let config = program.write("patroni.yml", &text).display().to_string();
        let script = program.write("run.py", config::SCRIPT).display().to_string();
        let member = Self { patroni: Mutex::new(program), config, script, to_postgres, to_patroni, to_etcd };
        member.launch(&mut *member.patroni.lock().await);
        member
    }

    fn launch(&self, patroni: &mut Program) {
        patroni.spawn(&[&self.script, &self.config]);
    }
}

impl Drop for Patroni {
    fn drop(&mut self) {
        let members = std::mem::take(&mut self.members);
        let servers: Vec<_> = (0..members.len()).filter_map(|node| postmaster(&self.data(Node(node)))).collect();
        // The managers first: they would start the servers again.
        drop(members);
        for server in servers {
            let mut left = process::kill_tree(server);
            left.push(server);
            // They are killed: this does not last long. What fails here the reaper sees.
            let mut patience = 2000;
            while patience > 0 && !left.iter().all(|id| process::reap(*id)) {
                thread::sleep(Duration::from_millis(1));
                patience -= 1;
            }
        }
    }
}
