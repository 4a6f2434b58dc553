//! What the command line asks for.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio_postgres_failover::{BuildError, Pool};

pub(crate) const USAGE: &str = "\
usage: doctor 'postgres://user:password@name:5432/db' [--dns 10.0.0.2:53] [--watch] [--json]
  --dns ADDRESS  asks this name server; may be given several times
  --watch        goes on, and shows each change; end it with Ctrl-C
  --json         prints JSON instead of a table, one object a line";

/// Time for each server, all at once.
const PROBE: Duration = Duration::from_secs(3);
/// With `--watch`, the time between two looks at all servers.
const PATROL: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub(crate) enum Wrong {
    #[error("which database? Name it by its connection string\n{USAGE}")]
    NoUrl,
    // What stands in the wrong place may be a password: it is not repeated.
    #[error("one connection string is expected, and these options at most\n{USAGE}")]
    Unexpected,
    #[error("--dns needs a name server\n{USAGE}")]
    NoNameServer,
    #[error("--dns: expected an address, as in 10.0.0.2:53\n{USAGE}")]
    NameServer,
    #[error(transparent)]
    Build(#[from] BuildError),
}

#[derive(Debug, Default)]
pub(crate) struct Arguments {
    url: String,
    dns: Vec<SocketAddr>,
    pub(crate) watch: bool,
    pub(crate) json: bool,
}

impl Arguments {
    pub(crate) fn read(mut arguments: impl Iterator<Item = String>) -> Result<Self, Wrong> {
        let (mut read, mut url) = (Self::default(), None);
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--watch" => read.watch = true,
                "--json" => read.json = true,
                "--dns" => read.dns.push(name_server(&arguments.next().ok_or(Wrong::NoNameServer)?)?),
                _ if argument.starts_with("--") || url.is_some() => return Err(Wrong::Unexpected),
                _ => url = Some(argument),
            }
        }
        Ok(Self { url: url.ok_or(Wrong::NoUrl)?, ..read })
    }

    pub(crate) fn pool(self) -> Result<Pool, Wrong> {
        let mut builder = Pool::builder(self.url)?.probe_timeout(PROBE).application_name("doctor");
        if self.watch {
            builder = builder.patrol_interval(PATROL);
        }
        if !self.dns.is_empty() {
            builder = builder.dns_servers(self.dns);
        }
        Ok(builder.build()?)
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
        Arguments::read(arguments.iter().map(|argument| (*argument).to_owned()))
    }

    #[test]
    fn options_may_stand_on_either_side() {
        for order in [["--watch", "postgres://h/d", "--json"], ["postgres://h/d", "--json", "--watch"]] {
            let arguments = read(&order).unwrap();
            assert!(arguments.watch && arguments.json && arguments.url == "postgres://h/d");
        }
        let arguments = read(&["x", "--dns", "10.0.0.2", "--dns", "[fd00::1]:5353"]).unwrap();
        assert_eq!(arguments.dns, ["10.0.0.2:53".parse().unwrap(), "[fd00::1]:5353".parse().unwrap()]);
    }

    #[test]
    fn what_is_wrong_is_told_and_no_password_is_repeated() {
        for (arguments, words) in [
            (&[][..], "which database?"),
            (&["a", "--dns"], "--dns needs a name server"),
            (&["a", "--dns", "here"], "--dns: expected an address"),
            (&["--dns", "postgres://app:s3cret@h/d"], "--dns: expected an address"),
            (&["a", "s3cret"], "one connection string is expected"),
            (&["a", "--password=s3cret"], "one connection string is expected"),
        ] {
            let text = read(arguments).unwrap_err().to_string();
            assert!(text.contains(words) && !text.contains("s3cret"), "{arguments:?}: {text}");
        }
    }
}
