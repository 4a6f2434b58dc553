//! Reads a configuration: the servers that it names, the settings of each session, and the options that cannot be
//! honoured. Does no I/O.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::Config;
use tokio_postgres::config::{ChannelBinding, Host, LoadBalanceHosts, SslMode, SslNegotiation, TargetSessionAttrs};

use super::hosts::{Hosts, Target};
use super::ssl::{self, Ssl};
use super::startup;
use super::typo;
use crate::cluster::Name;
use crate::error::BuildError;
use crate::observe::PoolNames;
use crate::topology::{Address, Endpoint};

/// The longest `tcp_user_timeout`. Linux stores it as milliseconds, in 31 bits.
const LONGEST_USER_TIMEOUT: Duration = Duration::from_secs(24 * 24 * 60 * 60);
/// The driver's default of `keepalives_idle`, which is too long to be useful.
const DRIVER_KEEPALIVES_IDLE: Duration = Duration::from_secs(2 * 60 * 60);
/// Idle time, interval and count of TCP keep-alive probes. They notice a vanished host within eight seconds.
const KEEPALIVES: (Duration, Duration, u32) = (Duration::from_secs(5), Duration::from_secs(1), 3);

/// The largest values that Linux accepts: in seconds for the first two, and for the last one.
const LONGEST_KEEPALIVE: u64 = 32_767;
const MOST_KEEPALIVES: u32 = 127;

/// What [`Pool::builder`](crate::Pool::builder) takes: a connection string or a [`tokio_postgres::Config`]. Sealed.
pub trait IntoConfig: sealed::Sealed {
    #[doc(hidden)]
    fn into_configuration(self) -> Result<Configuration, BuildError>;
}

/// A connection string in two parts: what the driver reads, and the options that this crate has taken out of it.
#[doc(hidden)]
pub struct Configuration {
    pub(super) config: Config,
    pub(super) ssl: Ssl,
    /// What a password file says. It counts only if no provider gives the password.
    pub(super) password_file: Option<Result<String, BuildError>>,
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for &str {}
    impl Sealed for String {}
    impl Sealed for &String {}
    impl Sealed for tokio_postgres::Config {}
    impl Sealed for super::Configuration {}
}

impl IntoConfig for &str {
    fn into_configuration(self) -> Result<Configuration, BuildError> {
        let (text, ssl) = ssl::split(self);
        let mut config: Config =
            text.parse().map_err(|error| BuildError::url(&error, |told| typo::hint(&text, told)))?;
        not_misread(self, &config, &ssl)?;
        ssl.hosts.check_role()?;
        if let Some((option, problem)) = ssl.refused {
            return Err(BuildError::invalid(option, problem));
        }
        if !ssl.user_timeout.is_zero() {
            config.tcp_user_timeout(ssl.user_timeout);
        }
        Ok(Configuration { config, ssl, password_file: None })
    }
}

impl IntoConfig for String {
    fn into_configuration(self) -> Result<Configuration, BuildError> {
        self.as_str().into_configuration()
    }
}

impl IntoConfig for &String {
    fn into_configuration(self) -> Result<Configuration, BuildError> {
        self.as_str().into_configuration()
    }
}

/// A configuration that was already read from the environment.
impl IntoConfig for Configuration {
    fn into_configuration(self) -> Result<Configuration, BuildError> {
        Ok(self)
    }
}

impl IntoConfig for Config {
    fn into_configuration(self) -> Result<Configuration, BuildError> {
        Ok(Configuration { config: self, ssl: Ssl::default(), password_file: None })
    }
}

/// Refuses text that the driver and libpq misread. They would take a piece of the password for the name of a host, a
/// database or a role, and names are shown. The error quotes nothing, because that could be the piece.
fn not_misread(text: &str, config: &Config, ssl: &Ssl) -> Result<(), BuildError> {
    let url = ["postgres://", "postgresql://"].iter().find_map(|scheme| text.strip_prefix(scheme));
    // In a list of `option=value` it separates, and ends nothing.
    if url.is_some_and(|rest| rest.ends_with(['\n', '\r'])) {
        let problem = "it ends with a line break, which would belong to its last part; remove that, as in `url.trim()`";
        return Err(BuildError::invalid("connection string", problem));
    }
    if let Some((credentials, rest)) = url.and_then(|rest| rest.split_once('@')) {
        // The driver ends the credentials at the first `@`.
        let (before_parameters, _) = rest.split_once('?').unwrap_or((rest, ""));
        let (user, _) = credentials.split_once(':').unwrap_or((credentials, ""));
        let parameter = ["?password=", "&password="].iter().any(|key| credentials.contains(key));
        if before_parameters.contains('@') || user.contains(['/', '?']) || parameter {
            let problem = "an `@` in a password, a name or a parameter must be written %40";
            return Err(BuildError::invalid("connection string", problem));
        }
    }
    let hosts = ssl.hosts.host.as_deref();
    let names = [config.get_user(), config.get_dbname(), config.get_options(), config.get_application_name()];
    let files = ssl.files().map(|(_, value)| value);
    // In `host= password=…` the driver takes `password=…` for the value of `host`.
    if url.is_none()
        && hosts.into_iter().chain(names.into_iter().flatten()).chain(files).any(|value| value.starts_with("password="))
    {
        let problem = "has no value, and took the password for it; write '' for an empty value";
        return Err(BuildError::invalid("the option before `password`", problem));
    }
    Ok(())
}

/// The servers that the configuration names: by DNS name, and by address.
pub(super) struct Targets {
    pub(super) names: Vec<Name>,
    pub(super) addresses: Vec<Endpoint>,
}

pub(super) fn targets(config: &Config, hosts: &Hosts) -> Result<Targets, BuildError> {
    let mut targets = Targets { names: Vec::new(), addresses: Vec::new() };
    for target in hosts.targets(config)? {
        targets.add(target)?;
    }
    Ok(targets)
}

impl Targets {
    fn add(&mut self, Target { host, address, port }: Target) -> Result<(), BuildError> {
        let name = match &host {
            // As in libpq, an address determines where to connect.
            #[cfg(unix)]
            Some(Host::Unix(_)) if address.is_some() => None,
            #[cfg(unix)]
            Some(Host::Unix(folder)) => {
                self.addresses.push(Endpoint { host: None, address: Address::Unix(folder.clone(), port) });
                return Ok(());
            }
            Some(Host::Tcp(name)) if name.trim().is_empty() => return Err(BuildError::NoHost),
            Some(Host::Tcp(name)) => Some(name.as_str()),
            None => None,
        };
        // A URL has an IPv6 address in brackets. The driver strips them, but a configuration built in code may contain
        // them.
        let literal = name.and_then(|name| name.trim_matches(['[', ']']).parse::<IpAddr>().ok());
        match (address.or(literal), name) {
            (Some(ip), name) => {
                let address = Address::Tcp(SocketAddr::new(ip.to_canonical(), port));
                self.addresses.push(Endpoint { host: name.map(Arc::from), address });
            }
            (None, Some(name)) => self.names.push(Name { host: Arc::from(name), port }),
            (None, None) => return Err(BuildError::NoHost),
        }
        Ok(())
    }
}

/// Copies the configuration without its hosts, because the driver has no setter that removes them. What the user has
/// written is kept. `written` names the options about TCP that the user has written, because the driver does not
/// distinguish their values from its defaults.
pub(super) fn template(
    config: &Config,
    written: &[&'static str],
    tls: bool,
    dead_after: Duration,
) -> Result<Config, BuildError> {
    if config.get_target_session_attrs() == TargetSessionAttrs::ReadOnly {
        let problem = "read-only cannot be honoured: this pool connects to the primary; remove the option";
        return Err(BuildError::invalid("target_session_attrs", problem));
    }
    if config.get_load_balance_hosts() == LoadBalanceHosts::Random {
        let problem = "random cannot be honoured: all servers are probed at once and the primary is used; remove it";
        return Err(BuildError::invalid("load_balance_hosts", problem));
    }
    if config.get_ssl_mode() == SslMode::Require && !tls {
        return Err(BuildError::NoTls { option: "sslmode" });
    }
    // The driver would otherwise send the password in plain text, or refuse each session.
    if config.get_ssl_negotiation() == SslNegotiation::Direct && config.get_ssl_mode() != SslMode::Require {
        let problem = "`direct` needs TLS: write sslmode=verify-full (or `verify-ca`, `require`) beside it";
        return Err(BuildError::invalid("sslnegotiation", problem));
    }
    if config.get_options().is_some_and(startup::read_only) {
        let problem = "`default_transaction_read_only` makes each server look fenced, and this pool is for writing to \
                       the primary; remove it, and ask for read-only transactions one by one";
        return Err(BuildError::invalid("options", problem));
    }
    if config.get_channel_binding() == ChannelBinding::Require && config.get_ssl_mode() == SslMode::Disable {
        return Err(BuildError::invalid("channel_binding", "`require` needs TLS, and sslmode=disable forbids it"));
    }
    if config.get_channel_binding() == ChannelBinding::Require && !tls {
        return Err(BuildError::NoTls { option: "channel_binding" });
    }
    if config.get_tcp_user_timeout().is_some_and(|timeout| *timeout > LONGEST_USER_TIMEOUT) {
        return Err(BuildError::invalid("tcp_user_timeout", "is longer than 24 days, which Linux does not take"));
    }
    if config.get_keepalives() {
        usable_keepalives(config)?;
    }
    let mut template = Config::new();
    if let Some(user) = config.get_user() {
        template.user(user);
    }
    if let Some(password) = config.get_password() {
        template.password(password);
    }
    if let Some(dbname) = config.get_dbname() {
        template.dbname(dbname);
    }
    if let Some(options) = config.get_options() {
        template.options(options);
    }
    if let Some(timeout) = config.get_connect_timeout() {
        template.connect_timeout(*timeout);
    }
    template
        .application_name(config.get_application_name().unwrap_or("tokio-postgres-failover"))
        .ssl_mode(config.get_ssl_mode())
        .ssl_negotiation(config.get_ssl_negotiation())
        .channel_binding(config.get_channel_binding());
    let user_timeout = (!written.contains(&"tcp_user_timeout")).then_some(dead_after.min(LONGEST_USER_TIMEOUT));
    if let Some(timeout) = config.get_tcp_user_timeout().copied().or(user_timeout) {
        template.tcp_user_timeout(timeout);
    }
    keep_alive(config, written, &mut template);
    Ok(template)
}

/// The time limit for opening a session: that of the builder, or else the `connect_timeout` of the configuration. In a
/// connection string, `connect_timeout` limits all of it, as in libpq. In a [`Config`] that was built in code, it
/// limits only TCP, as in the driver, so a value below the default does not shorten the whole.
pub(super) fn open_within(
    config: &Config,
    written: &[&'static str],
    builder: Option<Duration>,
    default: Duration,
) -> Result<Duration, BuildError> {
    match (builder, config.get_connect_timeout().copied()) {
        (Some(limit), Some(timeout)) if timeout > limit && !limit.is_zero() => {
            let problem = format!(
                "{timeout:?} is longer than `PoolBuilder::probe_timeout`, {limit:?}, which limits opening a session; \
                 raise that, or remove one of them"
            );
            Err(BuildError::invalid("connect_timeout", problem))
        }
        (Some(limit), _) => Ok(limit),
        (None, Some(timeout)) if timeout > default || written.contains(&"connect_timeout") => Ok(timeout),
        (None, _) => Ok(default),
    }
}

/// Returns the names for the pool's metrics and log lines. Without a database name, PostgreSQL uses the user's name.
pub(super) fn names(pool: Option<String>, targets: &Targets, template: &Config) -> PoolNames {
    let database = template.get_dbname().or(template.get_user()).unwrap_or_default().to_owned();
    let server = match (targets.names.first(), targets.addresses.first()) {
        (Some(name), _) => format!("{}:{}", name.host, name.port),
        (None, Some(endpoint)) => endpoint.address.to_string(),
        (None, None) => String::new(),
    };
    PoolNames { pool: pool.unwrap_or_else(|| format!("{server}/{database}")), database }
}

/// Refuses values that Linux does not accept, because no session could be opened with them.
fn usable_keepalives(config: &Config) -> Result<(), BuildError> {
    let times = [
        ("keepalives_idle", Some(config.get_keepalives_idle())),
        ("keepalives_interval", config.get_keepalives_interval()),
    ];
    for (option, time) in times {
        if time.is_some_and(|time| !(1..=LONGEST_KEEPALIVE).contains(&time.as_secs())) {
            return Err(BuildError::invalid(option, format!("must be between 1 s and {LONGEST_KEEPALIVE} s")));
        }
    }
    if config.get_keepalives_retries().is_some_and(|retries| !(1..=MOST_KEEPALIVES).contains(&retries)) {
        return Err(BuildError::invalid("keepalives_retries", format!("must be between 1 and {MOST_KEEPALIVES}")));
    }
    Ok(())
}

/// Sets the keep-alives. As in libpq, 0 stands for the system's default. For the idle time, the system's default is
/// also the driver's: two hours.
fn keep_alive(config: &Config, written: &[&'static str], template: &mut Config) {
    let idle = config.get_keepalives_idle();
    let unset = idle == DRIVER_KEEPALIVES_IDLE && !written.contains(&"keepalives_idle");
    template
        .keepalives(config.get_keepalives())
        .keepalives_idle(if unset { KEEPALIVES.0 } else { idle })
        .keepalives_retries(config.get_keepalives_retries().unwrap_or(KEEPALIVES.2));
    let interval = (!written.contains(&"keepalives_interval")).then_some(KEEPALIVES.1);
    if let Some(interval) = config.get_keepalives_interval().or(interval) {
        template.keepalives_interval(interval);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        let error = text.into_configuration().map(drop).expect_err(text).to_string();
        assert!(!error.contains("s3cr3t"), "{error}");
        error
    }

    /// Only a build without the feature `rustls` meets it otherwise.
    #[test]
    fn an_option_that_nothing_can_honour_without_tls_is_named() {
        for (url, expected) in [
            ("host=db sslmode=require", "sslmode"),
            ("host=db channel_binding=require", "channel_binding"),
            ("host=db sslmode=require channel_binding=require", "sslmode"),
        ] {
            let error = template(&url.parse().unwrap(), &[], false, Duration::from_secs(20)).unwrap_err();
            assert!(matches!(error, BuildError::NoTls { option } if option == expected), "{url}: {error:?}");
        }
    }

    /// The fuzz target `password` found the first of these; the others are of the same kind.
    #[test]
    fn a_password_that_is_read_as_something_else_is_refused_and_not_repeated() {
        for text in [
            "postgres://app:p@s3cr3t@my-pg.internal/app",
            "postgres://app:p@s3cr3t/s3cr3t@my-pg.internal/app",
            "postgresql://app:p@s3cr3t,s3cr3t@my-pg.internal/app",
            "postgres://app:p@%2Fs3cr3t@my-pg.internal/app",
            "postgres://my-pg.internal/app?password=p@s3cr3t",
            "postgres://my-pg.internal:5432/app?password=p@s3cr3t",
        ] {
            assert!(refused(text).contains("must be written %40"), "{text}");
        }
        for option in ["host", "user", "dbname", "options", "application_name", "sslrootcert"] {
            let text = format!("hostaddr=127.0.0.1 {option}= password=s3cr3t");
            assert!(refused(&text).contains("has no value"), "{text}");
        }
    }

    /// What the user has written about TCP is kept, even if it equals the driver's default, or is 0 for the system's.
    /// Each row expects `tcp_user_timeout` in milliseconds, as libpq reads it, then the idle time and the interval of
    /// keep-alives in seconds, and their number.
    #[test]
    fn what_is_written_about_tcp_is_kept() {
        for (options, expected) in [
            ("", (Some(20_000), 5, Some(1), Some(3))),
            ("keepalives_idle=7200", (Some(20_000), 7200, Some(1), Some(3))),
            ("keepalives_idle=0", (Some(20_000), 7200, Some(1), Some(3))),
            ("keepalives_idle=60", (Some(20_000), 60, Some(1), Some(3))),
            ("keepalives_interval=0", (Some(20_000), 5, None, Some(3))),
            ("keepalives_interval=75&keepalives_retries=9", (Some(20_000), 5, Some(75), Some(9))),
            ("tcp_user_timeout=0", (None, 5, Some(1), Some(3))),
            ("tcp_user_timeout=-1", (None, 5, Some(1), Some(3))),
            ("tcp_user_timeout=600", (Some(600), 5, Some(1), Some(3))),
            ("tcp_user_timeout=20000", (Some(20_000), 5, Some(1), Some(3))),
            ("tcp_user_timeout=600&tcp_user_timeout=0", (None, 5, Some(1), Some(3))),
            ("tcp_user_timeout=0&keepalives_idle=7200&keepalives_interval=0", (None, 7200, None, Some(3))),
        ] {
            let url = format!("postgres://app@my-pg.internal/app?{options}");
            let pairs = format!("host=my-pg.internal user=app {}", options.replace('&', " "));
            for text in [url, pairs] {
                let Configuration { config, ssl, .. } = text.as_str().into_configuration().unwrap();
                let template = template(&config, &ssl.written, false, Duration::from_secs(20)).unwrap();
                let found = (
                    template.get_tcp_user_timeout().map(Duration::as_millis),
                    template.get_keepalives_idle().as_secs(),
                    template.get_keepalives_interval().map(|interval| interval.as_secs()),
                    template.get_keepalives_retries(),
                );
                assert_eq!(found, expected, "{text}");
            }
        }
        for text in ["tcp_user_timeout=soon", "tcp_user_timeout=99999999999"] {
            assert!(refused(&format!("host=my-pg.internal {text}")).contains("tcp_user_timeout"), "{text}");
        }
        let error = template(&config("keepalives_retries=0"), &[], false, Duration::from_secs(20)).unwrap_err();
        assert!(error.to_string().contains("keepalives_retries"), "{error}");
    }

    fn config(options: &str) -> Config {
        format!("host=my-pg.internal user=app {options}").as_str().into_configuration().unwrap().config
    }

    /// As in libpq, `hostaddr` is where to connect to, whatever `host` says.
    #[test]
    fn an_address_beside_a_socket_counts() {
        for (text, expected) in [
            ("host=/run/pg hostaddr=10.0.0.1", &["10.0.0.1:5432"][..]),
            ("host=/run/pg,/run/pg hostaddr=,10.0.0.1 port=7", &["/run/pg/.s.PGSQL.7", "10.0.0.1:7"]),
            ("postgres:///app?host=/run/pg&hostaddr=fdaa::1", &["[fdaa::1]:5432"]),
            ("host=/run/pg", &["/run/pg/.s.PGSQL.5432"]),
        ] {
            let Configuration { config, ssl, .. } = text.into_configuration().unwrap();
            let targets = targets(&config, &ssl.hosts).unwrap();
            let found: Vec<_> = targets.addresses.iter().map(ToString::to_string).collect();
            assert_eq!(found, expected, "{text}");
            assert!(targets.names.is_empty(), "{text}");
        }
    }

    #[test]
    fn what_is_unambiguous_is_taken() {
        for (text, dbname) in [
            ("postgres://app:p%40s3cr3t@my-pg.internal/a%40b", "a@b"),
            ("postgres://app:p/s?3@my-pg.internal/app", "app"),
            ("postgres://app@my-pg.internal/app?application_name=a@b", "app"),
            ("host=my-pg.internal dbname=a@b password=p@s", "a@b"),
            ("host=my-pg.internal dbname=app application_name='' password=p", "app"),
        ] {
            assert_eq!(text.into_configuration().unwrap().config.get_dbname(), Some(dbname), "{text}");
        }
    }
}
