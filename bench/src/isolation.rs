//! A network and a resolver of the benchmark's own: then `getaddrinfo` knows the test bed's names, and a host can
//! vanish.
//!
//! As root the program starts itself again in new mount and network namespaces. Nothing outside of them changes, and
//! they end with it. Without root, or where that fails, the cases and peers that need it are left out, and the report
//! says so.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use testbed::Dns;

use crate::error::Error;

/// Set in the program that runs in the namespaces: the name server's address.
const INSIDE: &str = "BENCH_INSIDE_NAMESPACES";
const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(127, 53, 0, 53);
/// The file is the shell's own; `$1` and what follows is the program.
const ENTER: &str = r#"
ip link set lo up || exit 97
file=$(mktemp) && echo "nameserver $NAMESERVER" >"$file" || exit 97
mount --bind "$file" /etc/resolv.conf && rm -f "$file" || exit 97
exec "$@"
"#;

fn unshare(program: &[std::ffi::OsString]) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--net", "--", "sh", "-c", ENTER, "sh"]).args(program);
    command.env("NAMESERVER", NAME_SERVER.to_string()).env(INSIDE, "1");
    command
}

/// Starts this program again in namespaces of its own, where that works; returns where it does not, or has been done.
pub fn enter() -> Result<(), Error> {
    if std::env::var_os(INSIDE).is_some() {
        return Ok(());
    }
    let tried = unshare(&["true".into()]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !tried.is_ok_and(|status| status.success()) {
        return Ok(());
    }
    let program =
        std::env::current_exe().map_err(|source| Error::Program { what: "this program".to_owned(), source })?;
    let all: Vec<_> = [program.into_os_string()].into_iter().chain(std::env::args_os().skip(1)).collect();
    // Returns only when it failed.
    let source = unshare(&all).exec();
    Err(Error::Program { what: "unshare".to_owned(), source })
}

/// What of the machine the benchmark may use.
pub struct Network {
    /// The name server that the system's resolver asks, inside the namespaces.
    pub dns: Option<Dns>,
    /// Whether packets can be dropped.
    pub firewall: bool,
}

impl Network {
    /// Looks at where the program is.
    pub async fn here() -> Self {
        if std::env::var_os(INSIDE).is_none() {
            return Self { dns: None, firewall: false };
        }
        let dns = Dns::start(SocketAddr::new(NAME_SERVER.into(), 53)).await;
        let made = nft("add table inet bench; add chain inet bench gone { type filter hook input priority 0; }");
        Self { dns: Some(dns), firewall: made.is_ok() }
    }

    /// What has to be left out, for the report.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if self.dns.is_none() {
            notes.push(
                "Not run as root, or without unshare(1): peers that ask the system's resolver could not be given a DNS \
                 name."
                    .to_owned(),
            );
        }
        if !self.firewall {
            notes.push("Without root or nft(8) no host can be made to vanish: that case is left out.".to_owned());
        }
        notes
    }

    /// From now on no packet from or to this address arrives, and nobody is told.
    pub fn vanish(&self, address: IpAddr) -> Result<(), Error> {
        nft(&format!(
            "add rule inet bench gone ip daddr {address} drop; add rule inet bench gone ip saddr {address} drop"
        ))
    }

    /// Every packet arrives again.
    pub fn restore(&self) -> Result<(), Error> {
        if self.firewall { nft("flush chain inet bench gone") } else { Ok(()) }
    }
}

fn nft(rules: &str) -> Result<(), Error> {
    let output = Command::new("nft").arg(rules).output();
    let output = output.map_err(|source| Error::Program { what: "nft".to_owned(), source })?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Other(format!("nft: {}", String::from_utf8_lossy(&output.stderr).trim())))
}
