//! What the command line asks for.

use std::env;
use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio_postgres_failover::{BuildError, Pool, PoolBuilder};

pub(crate) const USAGE: &str = "\
usage: doctor ['postgres://user@name:5432/db'] [--dns 10.0.0.2:53] [--watch] [--json]
  Without a connection string it reads DATABASE_URL, or else libpq's variables (PGHOST, PGUSER, PGPASSWORD, PGSERVICE
  and so on) and ~/.pgpass. Give a password there: other users of the machine see the arguments.
  --dns ADDRESS  asks this name server; may be given several times
  --watch        goes on, and shows each change; end it with Ctrl-C
  --json         prints JSON instead of a table, one object a line";

/// Time for each server, all at once.
const PROBE: Duration = Duration::from_secs(3);
/// With `--watch`, the time between two looks at all servers.
const PATROL: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub(crate) enum Wrong {
    #[error("which database? Name it by its connection string, or by these variables: {0}\n{USAGE}")]
    NoUrl(BuildError),
    /// No error: the usage was asked for.
    #[error("{USAGE}")]
    Help,
    #[error("{0} is not UTF-8\n{USAGE}")]
    NotUtf8(&'static str),
    // What stands in the wrong place may be a password: it is not repeated.
    #[error("one connection string is expected, and these options at most\n{USAGE}")]
    Unexpected,
    #[error("--dns needs a name server\n{USAGE}")]
    NoNameServer,
    #[error("--dns: expected an address, as in 10.0.0.2:53\n{USAGE}")]
    NameServer,
    #[error("{0}\nThis program was built without TLS: cargo install --path doctor --features rustls")]
    NoTls(BuildError),
    #[error(transparent)]
    Build(BuildError),
}

impl From<BuildError> for Wrong {
    /// What the library says about its feature is of no use at a command line.
    fn from(error: BuildError) -> Self {
        match error {
            BuildError::NoTls { .. } => Self::NoTls(error),
            other => Self::Build(other),
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Arguments {
    /// `None`: the environment says it.
    url: Option<String>,
    dns: Vec<SocketAddr>,
    pub(crate) watch: bool,
    pub(crate) json: bool,
}

impl Arguments {
    pub(crate) fn read(arguments: impl Iterator<Item = OsString>) -> Result<Self, Wrong> {
        let mut read = Self::default();
        let arguments = arguments.map(|argument| argument.into_string().map_err(|_| Wrong::NotUtf8("an argument")));
        let mut arguments = arguments.collect::<Result<Vec<_>, _>>()?.into_iter();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--help" | "-h" => return Err(Wrong::Help),
                "--watch" => read.watch = true,
                "--json" => read.json = true,
                "--dns" => read.dns.push(name_server(&arguments.next().ok_or(Wrong::NoNameServer)?)?),
                _ if argument.starts_with('-') || read.url.is_some() => return Err(Wrong::Unexpected),
                _ => read.url = Some(argument),
            }
        }
        Ok(read)
    }

    pub(crate) fn pool(self) -> Result<Pool, Wrong> {
        let mut builder = match self.url {
            Some(url) => Pool::builder(url)?,
            None => of_environment()?,
        };
        builder = builder.probe_timeout(PROBE).application_name("doctor");
        if self.watch {
            builder = builder.patrol_interval(PATROL);
        }
        if !self.dns.is_empty() {
            builder = builder.dns_servers(self.dns);
        }
        Ok(builder.build()?)
    }
}

/// The configuration in the environment, where other users of the machine do not see it.
fn of_environment() -> Result<PoolBuilder, Wrong> {
    match env::var("DATABASE_URL") {
        Ok(url) if !url.is_empty() => Ok(Pool::builder(url)?),
        Err(env::VarError::NotUnicode(_)) => Err(Wrong::NotUtf8("DATABASE_URL")),
        _ => Pool::from_env().map_err(Wrong::NoUrl),
    }
}

/// A name server, on port 53 unless told.
fn name_server(text: &str) -> Result<SocketAddr, Wrong> {
    let bare = || text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 53));
    text.parse().or_else(|_| bare()).map_err(|_| Wrong::NameServer)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "these are tests")]

    use super::*;

    fn read(arguments: &[&str]) -> Result<Arguments, Wrong> {
        Arguments::read(arguments.iter().map(OsString::from))
    }

    #[test]
    fn options_may_stand_on_either_side() {
        for order in [["--watch", "postgres://h/d", "--json"], ["postgres://h/d", "--json", "--watch"]] {
            let arguments = read(&order).unwrap();
            assert!(arguments.watch && arguments.json && arguments.url.as_deref() == Some("postgres://h/d"));
        }
        let arguments = read(&["x", "--dns", "10.0.0.2", "--dns", "[fd00::1]:5353"]).unwrap();
        assert_eq!(arguments.dns, ["10.0.0.2:53".parse().unwrap(), "[fd00::1]:5353".parse().unwrap()]);
    }

    #[test]
    fn a_missing_feature_is_told_in_words_of_the_command_line() {
        let told = Wrong::from(BuildError::NoTls { option: "sslmode" }).to_string();
        assert!(told.ends_with("cargo install --path doctor --features rustls"), "{told}");
        let told = Wrong::from(BuildError::NoHost).to_string();
        assert_eq!(told, BuildError::NoHost.to_string());
    }

    #[test]
    fn what_is_wrong_is_told_and_no_password_is_repeated() {
        for (arguments, words) in [
            (&["a", "--dns"][..], "--dns needs a name server"),
            (&["a", "--dns", "here"], "--dns: expected an address"),
            (&["--dns", "postgres://app:s3cret@h/d"], "--dns: expected an address"),
            (&["a", "s3cret"], "one connection string is expected"),
            (&["a", "--password=s3cret"], "one connection string is expected"),
            (&["-x"], "one connection string is expected"),
            (&["a", "-h"], "usage: doctor"),
        ] {
            let text = read(arguments).unwrap_err().to_string();
            assert!(text.contains(words) && !text.contains("s3cret"), "{arguments:?}: {text}");
        }
    }
}
