//! Reads a pool's configuration from where libpq's programs find theirs: the variables `PG*`, a service file and a
//! password file.
//!
//! It writes what it finds as a connection string, which is then read like any other. So the same options are honoured,
//! and the same are refused.

mod passfile;
mod service;

use std::path::{Path, PathBuf};

use super::config::{Configuration, IntoConfig, targets};
use super::{Pool, PoolBuilder};
use crate::error::BuildError;

/// libpq's variables, each with its option. A variable whose option is not honoured here is refused by name.
const VARIABLES: [(&str, &str); 33] = [
    ("PGHOST", "host"),
    ("PGHOSTADDR", "hostaddr"),
    ("PGPORT", "port"),
    ("PGDATABASE", "dbname"),
    ("PGUSER", "user"),
    ("PGPASSWORD", "password"),
    ("PGPASSFILE", "passfile"),
    ("PGOPTIONS", "options"),
    ("PGAPPNAME", "application_name"),
    ("PGCONNECT_TIMEOUT", "connect_timeout"),
    ("PGSSLMODE", "sslmode"),
    ("PGSSLNEGOTIATION", "sslnegotiation"),
    ("PGSSLROOTCERT", "sslrootcert"),
    ("PGSSLCERT", "sslcert"),
    ("PGSSLKEY", "sslkey"),
    ("PGSSLCRL", "sslcrl"),
    ("PGSSLCRLDIR", "sslcrldir"),
    ("PGSSLSNI", "sslsni"),
    ("PGSSLCERTMODE", "sslcertmode"),
    ("PGSSLCOMPRESSION", "sslcompression"),
    ("PGSSLMINPROTOCOLVERSION", "ssl_min_protocol_version"),
    ("PGSSLMAXPROTOCOLVERSION", "ssl_max_protocol_version"),
    ("PGREQUIRESSL", "requiressl"),
    ("PGCHANNELBINDING", "channel_binding"),
    ("PGREQUIREAUTH", "require_auth"),
    ("PGREQUIREPEER", "requirepeer"),
    ("PGKRBSRVNAME", "krbsrvname"),
    ("PGGSSENCMODE", "gssencmode"),
    ("PGGSSLIB", "gsslib"),
    ("PGGSSDELEGATION", "gssdelegation"),
    ("PGCLIENTENCODING", "client_encoding"),
    ("PGTARGETSESSIONATTRS", "target_session_attrs"),
    ("PGLOADBALANCEHOSTS", "load_balance_hosts"),
];

/// libpq's variables for settings of the session.
const SETTINGS: [(&str, &str); 3] = [("PGTZ", "timezone"), ("PGDATESTYLE", "datestyle"), ("PGGEQO", "geqo")];

/// Options that are not honoured, with the values that are accepted nevertheless, because they ask for what happens
/// here anyway.
const ANYWAY: [(&str, &[&str]); 5] = [
    ("gssencmode", &["disable", "prefer"]),
    ("gssdelegation", &["0"]),
    ("sslcompression", &["0"]),
    ("sslsni", &["1"]),
    ("requiressl", &["0"]),
];

impl Pool {
    /// Starts a configuration from the environment, as `psql` without arguments does: the variables `PGHOST`, `PGUSER`,
    /// `PGDATABASE` and so on, a service file (`PGSERVICE`, `PGSERVICEFILE`, `~/.pg_service.conf`,
    /// `PGSYSCONFDIR/pg_service.conf`), and a password file (`PGPASSFILE`, `~/.pgpass`).
    ///
    /// As in libpq, the service overrides the variables. `PGTZ`, `PGDATESTYLE` and `PGGEQO` become `options` of the
    /// session. A password file is read if no password is given. If its permissions let others read it, it is ignored,
    /// and a line in the log says so. There are four differences from libpq:
    /// - A host must be named. The socket of this machine is no default, because it is of no use to a pool that follows
    ///   a primary.
    /// - There is one password for all hosts. A password file with different passwords for them is refused.
    /// - Without `PGUSER`, the password file is searched for the user in `USER` or `LOGNAME`.
    /// - `DATABASE_URL` is not read, because it is not libpq's: pass it to [`Pool::builder`].
    ///
    /// # Errors
    /// [`BuildError::Invalid`] names the variable, the file or the option that cannot be used. No error repeats a
    /// password.
    ///
    /// ```no_run
    /// # fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_postgres_failover::Pool;
    ///
    /// // PGHOST=a.my-pg.internal,b.my-pg.internal PGUSER=app PGDATABASE=app
    /// let pool = Pool::from_env()?.max_size(32).build()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn from_env() -> Result<PoolBuilder, BuildError> {
        PoolBuilder::new(from(&Surroundings::of_process())?)
    }
}

/// Returns the value of an environment variable.
type Variable<'a> = Box<dyn Fn(&str) -> Option<String> + 'a>;

/// Where the configuration comes from.
struct Surroundings<'a> {
    variable: Variable<'a>,
}

impl Surroundings<'_> {
    fn of_process() -> Self {
        Self { variable: Box::new(|name| std::env::var(name).ok()) }
    }

    /// As in libpq, an empty value counts as none.
    fn variable(&self, name: &str) -> Option<String> {
        (self.variable)(name).filter(|value| !value.is_empty())
    }

    fn at_home(&self, name: &str) -> Option<PathBuf> {
        self.variable("HOME").map(|home| Path::new(&home).join(name))
    }
}

/// The options that were found. The first value of an option counts.
#[derive(Default)]
struct Options(Vec<(String, String)>);

impl Options {
    fn get(&self, option: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == option).map(|(_, value)| value.as_str())
    }

    fn add(&mut self, option: &str, value: String) {
        // libpq and the driver have different names for this option.
        let option = if option == "keepalives_count" { "keepalives_retries" } else { option };
        let anyway = ANYWAY.iter().any(|(known, values)| *known == option && values.contains(&value.as_str()));
        if self.get(option).is_none() && !anyway {
            self.0.push((option.to_owned(), value));
        }
    }

    fn take(&mut self, option: &str) -> Option<String> {
        let at = self.0.iter().position(|(known, _)| known == option)?;
        Some(self.0.remove(at).1)
    }

    /// The connection string of these options.
    fn text(&self) -> String {
        let pairs = self.0.iter().map(|(option, value)| {
            let value = value.replace('\\', "\\\\").replace('\'', "\\'");
            format!("{option}='{value}'")
        });
        pairs.collect::<Vec<_>>().join(" ")
    }
}

fn from(surroundings: &Surroundings<'_>) -> Result<Configuration, BuildError> {
    let mut options = Options::default();
    if let Some(service) = surroundings.variable("PGSERVICE") {
        for (option, value) in service::find(surroundings, &service)? {
            options.add(&option, value);
        }
    }
    for (variable, option) in VARIABLES {
        if let Some(value) = surroundings.variable(variable) {
            options.add(option, value);
        }
    }
    add_settings(surroundings, &mut options);
    if options.get("host").or(options.get("hostaddr")).is_none() {
        let problem = "names no server, and neither does PGHOSTADDR or a service; set it to a host, or to several";
        return Err(BuildError::invalid("PGHOST", problem));
    }
    let passfile = options.take("passfile");
    let mut configuration = options.text().as_str().into_configuration()?;
    if configuration.config.get_password().is_none() {
        add_password(surroundings, passfile, &mut configuration)?;
    }
    Ok(configuration)
}

/// Adds the settings to the session's options. A space or a backslash in a value gets a backslash before it.
fn add_settings(surroundings: &Surroundings<'_>, options: &mut Options) {
    let mut all = options.get("options").unwrap_or_default().to_owned();
    for (variable, setting) in SETTINGS {
        if let Some(value) = surroundings.variable(variable) {
            let value = value.replace('\\', "\\\\").replace(' ', "\\ ");
            // Of two equal settings the last one counts, and PGOPTIONS must override these, so it comes last.
            all = if all.is_empty() { format!("-c {setting}={value}") } else { format!("-c {setting}={value} {all}") };
        }
    }
    if !all.is_empty() {
        options.take("options");
        options.add("options", all);
    }
}

/// Looks for the password in the password file, if there is one.
fn add_password(
    surroundings: &Surroundings<'_>,
    passfile: Option<String>,
    configuration: &mut Configuration,
) -> Result<(), BuildError> {
    let Some(path) = passfile.map(PathBuf::from).or_else(|| surroundings.at_home(".pgpass")) else { return Ok(()) };
    let Some(lines) = passfile::read(&path)? else { return Ok(()) };
    let (config, hosts) = (&configuration.config, &configuration.ssl.hosts);
    let os_user = || surroundings.variable("USER").or_else(|| surroundings.variable("LOGNAME"));
    let Some(user) = config.get_user().map(ToOwned::to_owned).or_else(os_user) else { return Ok(()) };
    let database = config.get_dbname().unwrap_or(&user);
    // Reports what is wrong with the hosts, as `build` would.
    targets(config, hosts)?;
    let mut found = Vec::new();
    for target in hosts.targets(config)? {
        let host = passfile::name_of(&target);
        found.push(passfile::password(&lines, &host, target.port, database, &user));
    }
    found.dedup();
    match &found[..] {
        [Some(password)] => {
            configuration.config.password(password);
            Ok(())
        }
        [None] | [] => Ok(()),
        _ => {
            let problem = format!(
                "{} has different passwords for the hosts, or none for some of them, and a pool uses one for all; \
                 write a line that fits them all, or use `PoolBuilder::password_provider`",
                path.display()
            );
            Err(BuildError::invalid("passfile", problem))
        }
    }
}

#[cfg(test)]
mod tests;
