//! What the environment says.

use std::net::SocketAddr;
use std::time::Duration;

use crate::Region;

/// What the service is told when it starts.
pub struct Config {
    /// Where the database is: `DATABASE_URL`.
    pub database_url: String,
    /// The port to listen on: `PORT`, or 8080.
    pub port: u16,
    /// The port for operators: `OPERATOR_PORT`. Without it they are answered at the port of the users.
    pub operator_port: Option<u16>,
    /// How long a request may wait for a primary: `DEADLINE_SECONDS`, or 30. Longer than a failover takes, so that a
    /// request waits for its end.
    pub deadline: Duration,
    /// How long the requests under way may take once the service is told to stop: `DRAIN_SECONDS`, or as long as the
    /// deadline.
    pub drain: Duration,
    /// Name servers to ask instead of the system's: `DNS_SERVERS`, with commas between.
    pub dns_servers: Vec<SocketAddr>,
    /// The region of this machine and that of the primary: `FLY_REGION` and `PRIMARY_REGION`. Without both no write is
    /// sent elsewhere.
    pub region: Option<Region>,
}

/// A variable that is missing or makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum BadConfig {
    /// It has to be there.
    #[error("{0} is not set; set it to {1}")]
    Missing(&'static str, &'static str),
    /// It is there, and cannot be used.
    #[error("{0} is not {1}")]
    Unusable(&'static str, &'static str),
}

impl Config {
    /// A service for this database, with the default of everything else.
    #[must_use]
    pub fn new(database_url: String) -> Self {
        let deadline = Duration::from_secs(30);
        Self {
            database_url,
            port: 8080,
            operator_port: None,
            deadline,
            drain: deadline,
            dns_servers: Vec::new(),
            region: None,
        }
    }

    /// Reads the environment.
    pub fn from_env() -> Result<Self, BadConfig> {
        Self::read(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self, BadConfig> {
        let missing = BadConfig::Missing("DATABASE_URL", "postgres://user:password@host:port/database");
        let mut config = Self::new(variable("DATABASE_URL").ok_or(missing)?);
        let port = |name| match variable(name).map(|text| text.parse()) {
            Some(Ok(port)) => Ok(Some(port)),
            Some(Err(_)) => Err(BadConfig::Unusable(name, "a number below 65536")),
            None => Ok(None),
        };
        config.port = port("PORT")?.unwrap_or(config.port);
        config.operator_port = port("OPERATOR_PORT")?;
        let seconds = |name| match variable(name) {
            Some(text) => match text.parse() {
                Ok(seconds @ 1..=3600) => Ok(Some(Duration::from_secs(seconds))),
                _ => Err(BadConfig::Unusable(name, "a whole number of seconds, from 1 to 3600")),
            },
            None => Ok(None),
        };
        config.deadline = seconds("DEADLINE_SECONDS")?.unwrap_or(config.deadline);
        config.drain = seconds("DRAIN_SECONDS")?.unwrap_or(config.deadline);
        if let Some(servers) = variable("DNS_SERVERS") {
            let servers: Result<_, _> = servers.split(',').map(|server| server.trim().parse()).collect();
            config.dns_servers =
                servers.map_err(|_| BadConfig::Unusable("DNS_SERVERS", "a list of addresses like [fdaa::3]:53"))?;
        }
        if let (Some(here), Some(primary)) = (variable("FLY_REGION"), variable("PRIMARY_REGION")) {
            let region = Region::new(&here, &primary);
            config.region = Some(region.ok_or(BadConfig::Unusable("PRIMARY_REGION", "a region's code, like ams"))?);
        }
        Ok(config)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Config, BadConfig> {
        let of = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Config::read(of)
    }

    #[test]
    fn the_environment_is_read_or_refused() {
        const URL: (&str, &str) = ("DATABASE_URL", "postgres://app@db/app");
        let config = read(&[URL]).unwrap();
        assert_eq!((config.port, config.deadline.as_secs(), config.drain.as_secs()), (8080, 30, 30));
        assert!(config.dns_servers.is_empty() && config.region.is_none());

        let config =
            read(&[URL, ("PORT", "80"), ("DEADLINE_SECONDS", "90"), ("DNS_SERVERS", "[fdaa::3]:53, 10.0.0.2:53")]);
        let config = config.unwrap();
        assert_eq!((config.port, config.deadline.as_secs(), config.drain.as_secs()), (80, 90, 90));
        assert_eq!(config.dns_servers.len(), 2);

        assert!(read(&[URL, ("FLY_REGION", "ams")]).unwrap().region.is_none(), "the primary's region is not known");
        assert!(read(&[URL, ("FLY_REGION", "ams"), ("PRIMARY_REGION", "fra")]).unwrap().region.is_some());

        for (variables, named) in [
            (vec![], "DATABASE_URL"),
            (vec![URL, ("PORT", "http")], "PORT"),
            (vec![URL, ("OPERATOR_PORT", "65536")], "OPERATOR_PORT"),
            (vec![URL, ("DEADLINE_SECONDS", "0")], "DEADLINE_SECONDS"),
            (vec![URL, ("DNS_SERVERS", "fdaa::3")], "DNS_SERVERS"),
            (vec![URL, ("FLY_REGION", "ams"), ("PRIMARY_REGION", "fra;app=other")], "PRIMARY_REGION"),
        ] {
            let Err(error) = read(&variables) else { panic!("{variables:?} is refused") };
            assert!(error.to_string().starts_with(named), "{error}");
        }
    }
}
