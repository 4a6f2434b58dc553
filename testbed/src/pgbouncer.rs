//! The real PgBouncer, on an address of the cluster's block.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use tokio_postgres::{Config, NoTls, SimpleQueryMessage};

use crate::cluster::Cluster;
use crate::program::{Program, is_installed};
use crate::wait::until;

const NAME: &str = "pgbouncer";
const PATIENCE: Duration = Duration::from_secs(20);
/// The role of its administration.
const ADMIN: &str = "admin";

/// What a PgBouncer shall be like; see [`PgBouncer::builder`].
#[must_use]
pub struct PgBouncerBuilder {
    settings: Vec<(String, String)>,
    users: Vec<(String, String)>,
    passwords: bool,
    name_server: Option<IpAddr>,
}

impl PgBouncerBuilder {
    /// Asks this DNS server, on port 53: PgBouncer's resolver takes no other one.
    pub fn name_server(mut self, addr: IpAddr) -> Self {
        self.name_server = Some(addr);
        self
    }

    /// A line of its configuration file. The last one of a name counts.
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.retain(|(known, _)| known != name);
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The role `app` must give this password (SCRAM), which stands in PgBouncer's `auth_file`, and by which it logs in
    /// to the servers.
    pub fn password(mut self, password: &str) -> Self {
        self.users.retain(|(user, _)| user != "app");
        self.users.push(("app".to_owned(), password.to_owned()));
        self.passwords = true;
        self
    }

    /// Starts it on a spare address of the cluster and leads it to `target`: an address, several in one round with
    /// commas in between, or a name that its DNS server knows. Returns when it listens.
    pub async fn start(self, cluster: &Cluster, listen: IpAddr, target: &str, port: u16) -> PgBouncer {
        static COUNT: AtomicU8 = AtomicU8::new(0);
        let label = format!("pgbouncer{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let program = Program::new(NAME, &label, cluster.server(), cluster.folder());
        if let Some(server) = self.name_server {
            program.write("resolv.conf", &format!("nameserver {server}\n"));
        }
        let users = self.users.iter().fold(String::new(), |mut lines, (user, password)| {
            let _ = writeln!(lines, "\"{user}\" \"{}\"", password.replace('"', "\"\""));
            lines
        });
        program.write("userlist.txt", &users);
        let addr = SocketAddr::new(listen, cluster.port());
        let mut bouncer = PgBouncer { program, choices: self, addr };
        bouncer.configure(target, port);
        bouncer.launch().await;
        bouncer
    }
}

/// A running PgBouncer. Ends when it is dropped.
pub struct PgBouncer {
    program: Program,
    choices: PgBouncerBuilder,
    addr: SocketAddr,
}

impl PgBouncer {
    /// Whether a test can have one; prints a line that says so if not.
    ///
    /// # Panics
    /// When it is missing and `CI` is `true`.
    pub fn is_installed() -> bool {
        is_installed(NAME)
    }

    /// One in this `pool_mode`, which trusts everybody.
    pub fn builder(mode: &str) -> PgBouncerBuilder {
        let users = ["app", ADMIN].map(|user| (user.to_owned(), user.to_owned())).to_vec();
        PgBouncerBuilder { settings: Vec::new(), users, passwords: false, name_server: None }.setting("pool_mode", mode)
    }

    /// Where clients connect.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The database `app` behind it, by its address.
    pub fn url(&self) -> String {
        format!("postgres://app@{}/app", self.addr)
    }

    /// Writes another server into its configuration file and tells it to read that: each server session ends as soon as
    /// it is free.
    pub async fn set_target(&self, target: &str, port: u16) {
        self.configure(target, port);
        self.command("RELOAD").await;
    }

    /// A statement to its administration console. Returns each row of the answer.
    pub async fn command(&self, statement: &str) -> Vec<Vec<String>> {
        let mut config = Config::new();
        config.hostaddr(self.addr.ip()).port(self.addr.port()).user(ADMIN).password(ADMIN).dbname("pgbouncer");
        let asked = async {
            let (client, connection) = config.connect(NoTls).await?;
            let connection = tokio::spawn(connection);
            let answer = client.simple_query(statement).await;
            connection.abort();
            answer
        };
        let answer = asked.await.unwrap_or_else(|error| panic!("{statement}: {error:?}\n{}", self.program.log()));
        let rows = answer.into_iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => {
                Some((0..row.len()).map(|at| row.get(at).unwrap_or_default().to_owned()).collect())
            }
            _ => None,
        });
        rows.collect()
    }

    /// How many server sessions it has logged in to the database `app`, in use or not.
    pub async fn server_sessions(&self) -> usize {
        let servers = self.command("SHOW SERVERS").await;
        servers.iter().filter(|row| row.iter().any(|value| value == "app")).count()
    }

    /// SIGTERM: all sessions end at once, and it is started again. Returns when it listens.
    pub async fn restart(&mut self) {
        self.program.end(Signal::TERM).await;
        self.launch().await;
    }

    async fn launch(&mut self) {
        let config = self.program.folder().join("pgbouncer.ini");
        self.program.spawn(&[config.to_str().expect("a path of the test bed")]);
        self.program.listens(self.addr).await;
        until("PgBouncer answers", PATIENCE, || async {
            let rows = self.command("SHOW VERSION").await;
            if rows.is_empty() { Err("no answer".to_owned()) } else { Ok(()) }
        })
        .await;
    }

    fn configure(&self, target: &str, port: u16) {
        let folder = self.program.folder().display();
        let auth = if self.choices.passwords { "scram-sha-256" } else { "trust" };
        let mut text = format!(
            "[databases]\napp = host={target} port={port} dbname=app\n\n[pgbouncer]\n\
             listen_addr = {}\nlisten_port = {}\nunix_socket_dir =\nauth_type = {auth}\n\
             auth_file = {folder}/userlist.txt\n\
             admin_users = {ADMIN}\n",
            self.addr.ip(),
            self.addr.port()
        );
        if self.choices.name_server.is_some() {
            let _ = writeln!(text, "resolv_conf = {folder}/resolv.conf");
        }
        for (name, value) in &self.choices.settings {
            let _ = writeln!(text, "{name} = {value}");
        }
        self.program.write("pgbouncer.ini", &text);
    }
}
