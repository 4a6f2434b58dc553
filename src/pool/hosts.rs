//! Reads the hosts of a connection string as libpq does. The parameters `host`, `hostaddr` and `port` are lists. They
//! override the hosts and ports that a URL has before its path. `target_session_attrs` is read here, too.

use std::net::IpAddr;

use tokio_postgres::Config;
use tokio_postgres::config::Host;

use crate::error::BuildError;
use crate::resolve::is_scoped;

/// The options about hosts that come as parameters. As in libpq, an empty value counts as none.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Hosts {
    pub(super) host: Option<String>,
    hostaddr: Option<String>,
    port: Option<String>,
    /// A value of `target_session_attrs` that this pool cannot serve.
    refused: Option<&'static str>,
}

/// One server or name. The port defaults to PostgreSQL's.
pub(super) struct Target {
    pub(super) host: Option<Host>,
    pub(super) address: Option<IpAddr>,
    pub(super) port: u16,
}

const DEFAULT_PORT: u16 = 5432;

impl Hosts {
    /// Takes an option out of the text, and returns whether it has. If not, the driver gets the option. If an option is
    /// repeated, the last one counts.
    pub(super) fn take(&mut self, key: &str, value: &str) -> bool {
        let option = match key {
            "host" => &mut self.host,
            "hostaddr" => &mut self.hostaddr,
            "port" => &mut self.port,
            "target_session_attrs" => return self.take_role(value),
            _ => return false,
        };
        *option = Some(value.to_owned()).filter(|value| !value.is_empty());
        true
    }

    /// Reads the role in `target_session_attrs`. The pool always connects to the primary, which is also right for
    /// `any`.
    fn take_role(&mut self, value: &str) -> bool {
        self.refused = match value {
            "any" | "read-write" | "primary" => None,
            "read-only" => Some("read-only"),
            "standby" => Some("standby"),
            "prefer-standby" => Some("prefer-standby"),
            _ => return false,
        };
        true
    }

    /// Fails for a role that this pool cannot serve.
    pub(super) fn check_role(&self) -> Result<(), BuildError> {
        let Some(role) = self.refused else {
            return Ok(());
        };
        let problem = format!(
            "{role} cannot be served: this pool leads to the primary alone; remove the option, or read from standbys \
             through another pool"
        );
        Err(BuildError::invalid("target_session_attrs", problem))
    }

    /// Returns the servers and names, in order.
    pub(super) fn targets(&self, config: &Config) -> Result<Vec<Target>, BuildError> {
        let hosts: Vec<Host> = match &self.host {
            // The driver decides whether a host is a path or a name.
            Some(list) => list.split(',').flat_map(|host| Config::new().host(host).get_hosts().to_vec()).collect(),
            None => config.get_hosts().to_vec(),
        };
        let addresses: Vec<Option<IpAddr>> = match &self.hostaddr {
            Some(list) => list.split(',').map(address).collect::<Result<_, _>>()?,
            None => config.get_hostaddrs().iter().copied().map(Some).collect(),
        };
        let ports: Vec<u16> = match &self.port {
            Some(list) => list.split(',').map(port).collect::<Result<_, _>>()?,
            None => config.get_ports().to_vec(),
        };
        let count = hosts.len().max(addresses.len());
        if count == 0 {
            return Err(BuildError::NoHost);
        }
        if !hosts.is_empty() && !addresses.is_empty() && hosts.len() != addresses.len() {
            let problem =
                format!("{} hosts and {} hostaddrs; give one hostaddr for each host", hosts.len(), addresses.len());
            return Err(BuildError::invalid("hostaddr", problem));
        }
        if ports.len() > 1 && ports.len() != count {
            let problem = format!("{} ports for {count} hosts; give one port, or one for each host", ports.len());
            return Err(BuildError::invalid("port", problem));
        }
        let target = |index: usize| Target {
            host: hosts.get(index).cloned(),
            address: addresses.get(index).copied().flatten(),
            port: ports.get(index).or(ports.first()).copied().unwrap_or(DEFAULT_PORT),
        };
        (0..count).map(target).map(Target::checked).collect()
    }
}

impl Target {
    fn checked(self) -> Result<Self, BuildError> {
        if self.port == 0 {
            return Err(BuildError::invalid("port", "0 is not a port; PostgreSQL's default is 5432"));
        }
        let name = match &self.host {
            Some(Host::Tcp(name)) => Some(name.trim_matches(['[', ']'])),
            #[cfg(unix)]
            Some(Host::Unix(_)) => None,
            None => None,
        };
        if self.address.is_some() {
            return Ok(self);
        }
        if name.is_some_and(is_scoped) {
            return Err(scoped("host"));
        }
        // libpq takes such a host for an abstract Unix socket, but the driver takes it for a name.
        if name.is_some_and(|name| name.starts_with('@')) {
            let problem = "an abstract Unix socket, as in @pg, cannot be connected to by the driver; give the folder \
                           of the server's socket, or its address";
            return Err(BuildError::invalid("host", problem));
        }
        #[cfg(unix)]
        if let Some(Host::Unix(folder)) = &self.host
            && std::os::unix::net::SocketAddr::from_pathname(folder.join(format!(".s.PGSQL.{}", self.port))).is_err()
        {
            let problem = "the path of the server's socket is too long for this system, which takes about a hundred \
                           bytes; give a shorter one, such as a symbolic link to the folder";
            return Err(BuildError::invalid("host", problem));
        }
        Ok(self)
    }
}

/// The error for an address with an interface. The driver cannot connect to one, because it does not pass the interface
/// to the system.
fn scoped(option: &'static str) -> BuildError {
    let problem = "an address with an interface, as in fe80::1%eth0, cannot be connected to by the driver; give the \
                   server's global or unique local address, or a name that leads to one";
    BuildError::invalid(option, problem)
}

fn address(text: &str) -> Result<Option<IpAddr>, BuildError> {
    match text.trim() {
        // An empty address means that the host at the same position is looked up.
        "" => Ok(None),
        text if is_scoped(text) => Err(scoped("hostaddr")),
        text => text.parse().map(Some).map_err(|_| invalid("hostaddr")),
    }
}

fn port(text: &str) -> Result<u16, BuildError> {
    match text.trim() {
        "" => Ok(DEFAULT_PORT),
        text => text.parse().map_err(|_| invalid("port")),
    }
}

/// The error that the driver would give. The text leaves out the value, because that may be a piece of a password.
fn invalid(option: &str) -> BuildError {
    BuildError::Url(format!("invalid connection string: invalid value for option `{option}`"))
}

#[cfg(test)]
mod tests {
    use super::super::ssl::split;
    use super::*;

    fn targets(text: &str) -> Result<Vec<String>, String> {
        let (driver, ssl) = split(text);
        let config: Config = driver.parse().map_err(|error| format!("{error}: {driver}"))?;
        let targets = ssl.hosts.targets(&config).map_err(|error| error.to_string())?;
        let shown = |target: &Target| {
            let host = match &target.host {
                Some(Host::Tcp(name)) => name.clone(),
                #[cfg(unix)]
                Some(Host::Unix(path)) => path.display().to_string(),
                None => String::new(),
            };
            let address = target.address.map(|address| format!("={address}")).unwrap_or_default();
            format!("{host}{address}:{}", target.port)
        };
        Ok(targets.iter().map(shown).collect())
    }

    #[test]
    fn lists_are_read_as_libpq_reads_them() {
        for (text, expected) in [
            ("postgres://app@a,b/app", &["a:5432", "b:5432"][..]),
            ("postgres://app@a:1,b,[::1]:3/app", &["a:1", "b:5432", "::1:3"]),
            ("postgres:///app?host=/a,/b,/c", &["/a:5432", "/b:5432", "/c:5432"]),
            ("postgres:///app?host=/a,/b,/c&port=1,2,3", &["/a:1", "/b:2", "/c:3"]),
            ("postgres:///app?host=%2Fa%2C%2Fb&port=1%2C2", &["/a:1", "/b:2"]),
            ("postgres:///app?host=/a,b&port=7", &["/a:7", "b:7"]),
            ("postgres:///app?host=a,b,c&port=1,,3", &["a:1", "b:5432", "c:3"]),
            ("postgres://app@%2Fa,%2Fb/app", &["/a:5432", "/b:5432"]),
            ("postgres://app@a/app?port=7", &["a:7"]),
            ("postgres://app@a,b/app?port=7", &["a:7", "b:7"]),
            ("postgres://app@a,b/app?port=7,8&host=c,d", &["c:7", "d:8"]),
            ("postgres://app@a:9/app?host=b", &["b:9"]),
            ("postgres://app@a/app?host=b&host=c", &["c:5432"]),
            ("postgres://app@a/app?host=", &["a:5432"]),
            ("postgres://app@a/app?hostaddr=10.0.0.1", &["a=10.0.0.1:5432"]),
            ("postgres://app@a,b/app?hostaddr=10.0.0.1,::2&port=1,2", &["a=10.0.0.1:1", "b=::2:2"]),
            ("postgres://app@a,b/app?hostaddr=,10.0.0.2", &["a:5432", "b=10.0.0.2:5432"]),
            ("postgres:///app?hostaddr=10.0.0.1,10.0.0.2", &["=10.0.0.1:5432", "=10.0.0.2:5432"]),
            ("host=/a,/b port=1,2 user=app", &["/a:1", "/b:2"]),
            ("host='a, b' user=app", &["a:5432", " b:5432"]),
            ("host=a host=b user=app", &["b:5432"]),
            ("host=a,b hostaddr=10.0.0.1, user=app", &["a=10.0.0.1:5432", "b:5432"]),
            ("hostaddr = 10.0.0.1 port = '' user=app", &["=10.0.0.1:5432"]),
        ] {
            let expected: Vec<String> = expected.iter().map(ToString::to_string).collect();
            assert_eq!(targets(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn lists_that_make_no_sense_are_refused() {
        for (text, words) in [
            ("user=app", "no host"),
            ("host='' user=app", "no host"),
            ("postgres:///app?host=", "no host"),
            ("postgres:///app?host=a,b,c&port=1,2", "2 ports for 3 hosts"),
            ("postgres://app@a/app?port=0", "0 is not a port"),
            ("postgres://app@a/app?port=x", "invalid value for option `port`"),
            ("postgres://app@a/app?port=99999", "invalid value for option `port`"),
            ("host=a hostaddr=nowhere", "invalid value for option `hostaddr`"),
            ("host=a,b hostaddr=10.0.0.1", "2 hosts and 1 hostaddrs"),
            ("host=fe80::1%eth0", "interface"),
            ("postgres://app@[fe80::1%25eth0]/app", "interface"),
            ("hostaddr=fe80::1%2", "interface"),
        ] {
            let problem = targets(text).expect_err(text);
            assert!(problem.contains(words), "{text}: {problem}");
        }
    }

    #[test]
    fn roles_are_spelled_as_in_libpq() {
        for (role, served) in [
            ("any", Some(true)),
            ("read-write", Some(true)),
            ("primary", Some(true)),
            ("read-only", Some(false)),
            ("standby", Some(false)),
            ("prefer-standby", Some(false)),
            ("master", None),
            ("", None),
        ] {
            for text in [
                format!("postgres://a/app?target_session_attrs={role}"),
                format!("host=a target_session_attrs='{role}'"),
            ] {
                let (driver, ssl) = split(&text);
                let parsed = driver.parse::<Config>().ok().map(|_| ssl.hosts.check_role());
                assert_eq!(parsed.as_ref().map(Result::is_ok), served, "{text}");
                if let Some(Err(error)) = parsed {
                    assert!(error.to_string().contains(role) && error.to_string().contains("primary"), "{error}");
                }
            }
        }
    }
}
