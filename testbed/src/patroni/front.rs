//! The real HAProxy in front of a cluster of Patroni's: it asks each Patroni whether its server is the primary.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use tokio_postgres::{Config, NoTls};

use super::{PATIENCE, Patroni};
use crate::haproxy::ask;
use crate::program::{Program, is_installed};
use crate::wait::until_slowly as until;

const NAME: &str = "haproxy";
/// Which of the spare addresses it has.
const FRONT: u8 = 70;
/// The distance of its administration port to the cluster's.
const STATS: u16 = 300;

/// How HAProxy asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Checks {
    /// As Patroni's own `haproxy.cfg`: every 3 s, three to fall, two to rise, 5 s for an answer.
    Usual,
    /// Every second, two to fall, one to rise, 1 s for an answer.
    Quick,
}

impl Checks {
    fn settings(self) -> (&'static str, &'static str) {
        match self {
            Self::Usual => ("5s", "inter 3s fall 3 rise 2"),
            Self::Quick => ("1s", "inter 1s fall 2 rise 1"),
        }
    }

    /// What HAProxy counts up to: so many failures are needed from then on. A server that was never checked has one to
    /// go.
    fn full_health(self) -> u32 {
        match self {
            Self::Usual => 3 + 2 - 1,
            Self::Quick => 2,
        }
    }
}

/// A running HAProxy. Ends when it is dropped.
pub struct Front {
    addr: SocketAddr,
    _program: Program,
}

impl Front {
    /// Whether a test can have one; prints a line that says so if not.
    ///
    /// # Panics
    /// When it is missing and `CI` is `true`.
    pub fn is_installed() -> bool {
        is_installed(NAME)
    }

    /// Starts it; returns when it leads to the primary, and has checked that as often as it counts.
    pub async fn start(patroni: &Patroni, checks: Checks) -> Self {
        let addr = SocketAddr::new(patroni.site.block.spare(FRONT), patroni.port());
        let mut program = Program::new(NAME, "front", patroni.site.server, patroni.folder());
        let stats = SocketAddr::new(addr.ip(), patroni.port() + STATS);
        let config = program.write("haproxy.cfg", &configuration(patroni, addr, stats, checks)).display().to_string();
        program.spawn(&["-db", "-f", &config]);
        program.listens(addr).await;
        until("HAProxy leads to the primary", PATIENCE, || leads_to_primary(addr)).await;
        until("HAProxy is sure of the primary", PATIENCE, || is_sure(stats, checks.full_health())).await;
        Self { addr, _program: program }
    }

    /// The cluster by its one address.
    pub fn url(&self) -> String {
        format!("postgres://app@{}/app", self.addr)
    }
}

async fn leads_to_primary(addr: SocketAddr) -> Result<(), String> {
    let mut config = Config::new();
    config.hostaddr(addr.ip()).port(addr.port()).user("app").dbname("app").connect_timeout(Duration::from_secs(2));
    let (client, connection) = config.connect(NoTls).await.map_err(|error| error.to_string())?;
    let connection = tokio::spawn(connection);
    let row = client.query_one("SELECT pg_is_in_recovery()", &[]).await;
    connection.abort();
    match row.map(|row| row.get(0)) {
        Ok(false) => Ok(()),
        Ok(true) => Err("a standby".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

async fn is_sure(page: SocketAddr, health: u32) -> Result<(), String> {
    let csv = ask(page, "show stat").await?;
    let mut lines = csv.lines().map(|line| line.trim_start_matches("# ").split(',').collect::<Vec<_>>());
    let names = lines.next().unwrap_or_default();
    let at = |name| names.iter().position(|known| *known == name);
    let (Some(status), Some(counted)) = (at("status"), at("check_health")) else {
        return Err("no such columns".to_owned());
    };
    let value = |line: &[&str], at: usize| line.get(at).copied().unwrap_or_default().to_owned();
    let sure = lines.any(|line| {
        value(&line, status) == "UP" && value(&line, counted).parse::<u32>().is_ok_and(|counted| counted >= health)
    });
    if sure { Ok(()) } else { Err("not yet".to_owned()) }
}

fn configuration(patroni: &Patroni, addr: SocketAddr, stats: SocketAddr, checks: Checks) -> String {
    let (check, pace) = checks.settings();
    let mut text = format!(
        "global\n    maxconn 1000\n    stats socket ipv4@{stats} level admin\n\n\
         defaults\n    mode tcp\n    retries 2\n    timeout client 30m\n    timeout connect 4s\n    \
         timeout server 30m\n    timeout check {check}\n\n\
         listen primary\n    bind {addr}\n    option httpchk OPTIONS /primary\n    http-check expect status 200\n    \
         default-server {pace} on-marked-down shutdown-sessions\n"
    );
    for node in patroni.nodes() {
        let (server, rest) = (patroni.socket_addr(node), patroni.rest_addr(node).port());
        let _ = writeln!(text, "    server n{} {server} maxconn 100 check port {rest}", node.0);
    }
    text
}
