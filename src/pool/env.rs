//! Reads a pool's configuration from where libpq's programs find theirs: the variables `PG*`, a service file and a
//! password file.
//!
//! It writes what it finds as a connection string, which is then read like any other. So the same options are honoured,
//! and the same are refused.

mod passfile;
mod service;

use std::ffi::OsString;
use std::path::PathBuf;

use super::config::{Configuration, IntoConfig, targets};
use super::{Pool, PoolBuilder};
use crate::error::BuildError;

/// libpq's variables, each with its option. A variable whose option is not honoured here is refused by name.
const VARIABLES: [(&str, &str); 35] = [
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
    ("PGMINPROTOCOLVERSION", "min_protocol_version"),
    ("PGMAXPROTOCOLVERSION", "max_protocol_version"),
    ("PGCLIENTENCODING", "client_encoding"),
    ("PGTARGETSESSIONATTRS", "target_session_attrs"),
    ("PGLOADBALANCEHOSTS", "load_balance_hosts"),
];

/// libpq's variables for settings of the session. The value `default` leaves the setting to the server.
const SETTINGS: [(&str, &str); 3] = [("PGTZ", "timezone"), ("PGDATESTYLE", "datestyle"), ("PGGEQO", "geqo")];

/// Options that are not honoured, with the values that are accepted nevertheless, because they ask for what happens
/// here anyway.
const ANYWAY: [(&str, &[&str]); 10] = [
    ("gssencmode", &["disable", "prefer"]),
    ("gssdelegation", &["0"]),
    ("sslcompression", &["0"]),
    ("sslsni", &["1"]),
    ("requiressl", &["0"]),
    ("sslcertmode", &["allow"]),
    ("ssl_min_protocol_version", &["TLSv1.2"]),
    ("krbsrvname", &["postgres"]),
    ("min_protocol_version", &["3.0"]),
    ("max_protocol_version", &["3.0", "3.2", "latest"]),
];

impl Pool {
    /// Starts a configuration from the environment, as `psql` without arguments does: the variables `PGHOST`, `PGUSER`,
    /// `PGDATABASE` and so on, a service file (`PGSERVICE`, `PGSERVICEFILE`, `~/.pg_service.conf`,
    /// `PGSYSCONFDIR/pg_service.conf`), and a password file (`PGPASSFILE`, `~/.pgpass`).
    ///
    /// As in libpq, the service overrides the variables, and `PGTZ`, `PGDATESTYLE` and `PGGEQO` override the `options`
    /// of the session. A password file is read if no password is given. If its permissions let others read it, it is
    /// ignored, and a line in the log says so. These are the differences from libpq:
    /// - **Without `PGSSLMODE` nothing is encrypted.** libpq's default is `prefer`: it encrypts if the server offers
    ///   that. Set `PGSSLMODE=verify-full`, as [`Pool::builder`] describes; this needs the feature `rustls`.
    ///   `~/.postgresql` is not read.
    /// - A host must be named. The socket of this machine is no default, because it is of no use to a pool that follows
    ///   a primary.
    /// - There is one password for all hosts. A password file with different passwords for them is refused by
    ///   [`PoolBuilder::build`], unless there is a [`PoolBuilder::password_provider`], which is asked instead of the
    ///   file.
    /// - Without `PGUSER`, the password file is searched for the user in `USER` or `LOGNAME`.
    /// - An option that is not honoured here is refused, unless its value asks for what happens anyway. Variables and
    ///   files must be UTF-8.
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
type Variable<'a> = Box<dyn Fn(&str) -> Option<OsString> + 'a>;

/// Where the configuration comes from.
struct Surroundings<'a> {
    variable: Variable<'a>,
}

impl Surroundings<'_> {
    fn of_process() -> Self {
        Self { variable: Box::new(|name| std::env::var_os(name)) }
    }

    /// As in libpq, an empty value counts as none.
    fn variable(&self, name: &'static str) -> Result<Option<String>, BuildError> {
        let value = (self.variable)(name).filter(|value| !value.is_empty());
        let text = value.map(OsString::into_string).transpose();
        text.map_err(|_| BuildError::invalid(name, "its value is not UTF-8; write it in UTF-8, or unset it"))
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        (self.variable)(name).filter(|value| !value.is_empty()).map(PathBuf::from)
    }

    fn at_home(&self, name: &str) -> Option<PathBuf> {
        self.path("HOME").map(|home| home.join(name))
    }
}

/// The options that were found. The first value of an option counts, even if it is empty or asks for nothing.
#[derive(Default)]
struct FoundOptions(Vec<(String, String)>);

impl FoundOptions {
    /// As in libpq, an empty value counts as none.
    fn get(&self, option: &str) -> Option<&str> {
        let found = self.0.iter().find(|(known, _)| known == option);
        found.map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
    }

    fn add(&mut self, option: &str, value: String) {
        // libpq and the driver have different names for this option.
        let option = if option == "keepalives_count" { "keepalives_retries" } else { option };
        if self.0.iter().all(|(known, _)| known != option) {
            self.0.push((option.to_owned(), value));
        }
    }

    fn take(&mut self, option: &str) -> Option<String> {
        let at = self.0.iter().position(|(known, _)| known == option)?;
        Some(self.0.remove(at).1).filter(|value| !value.is_empty())
    }

    /// The connection string of these options.
    fn text(&self) -> String {
        let anyway = |option: &str, value: &str| {
            ANYWAY.iter().any(|(known, values)| *known == option && values.contains(&value))
        };
        let asked = self.0.iter().filter(|(option, value)| !value.is_empty() && !anyway(option, value));
        let pairs = asked.map(|(option, value)| {
            let value = value.replace('\\', "\\\\").replace('\'', "\\'");
            format!("{option}='{value}'")
        });
        pairs.collect::<Vec<_>>().join(" ")
    }
}

fn from(surroundings: &Surroundings<'_>) -> Result<Configuration, BuildError> {
    let mut options = FoundOptions::default();
    if let Some(service) = surroundings.variable("PGSERVICE")? {
        for (option, value) in service::find(surroundings, &service)? {
            options.add(&option, value);
        }
    }
    for (variable, option) in VARIABLES {
        if let Some(value) = surroundings.variable(variable)? {
            options.add(option, value);
        }
    }
    add_settings(surroundings, &mut options)?;
    if options.get("host").or(options.get("hostaddr")).is_none() {
        let problem = "names no server, and neither does PGHOSTADDR or a service; set it to a host, or to several";
        return Err(BuildError::invalid("PGHOST", problem));
    }
    let passfile = options.take("passfile");
    let mut configuration = options.text().as_str().into_configuration()?;
    if configuration.config.get_password().is_none() {
        configuration.password_file = password_file(surroundings, passfile, &configuration)?;
    }
    Ok(configuration)
}

/// Adds the settings to the session's options. A space or a backslash in a value gets a backslash before it.
fn add_settings(surroundings: &Surroundings<'_>, options: &mut FoundOptions) -> Result<(), BuildError> {
    let mut all = options.get("options").unwrap_or_default().to_owned();
    for (variable, setting) in SETTINGS {
        let value = surroundings.variable(variable)?;
        if let Some(value) = value.filter(|value| !value.eq_ignore_ascii_case("default")) {
            let value = value.replace('\\', "\\\\").replace(' ', "\\ ");
            // Of two equal settings the last one counts. libpq sends these beside the options, and the server reads
            // them after the options, so they come last here.
            all = if all.is_empty() { format!("-c {setting}={value}") } else { format!("{all} -c {setting}={value}") };
        }
    }
    if !all.is_empty() {
        options.take("options");
        options.add("options", all);
    }
    Ok(())
}

/// What the password file says: the password, or why it cannot be used. That counts only if nobody else gives the
/// password. `None`: there is no file, or it has no password for these servers.
fn password_file(
    surroundings: &Surroundings<'_>,
    passfile: Option<String>,
    configuration: &Configuration,
) -> Result<Option<Result<String, BuildError>>, BuildError> {
    let Some(path) = passfile.map(PathBuf::from).or_else(|| surroundings.at_home(".pgpass")) else { return Ok(None) };
    let lines = match passfile::read(&path) {
        Ok(Some(lines)) => lines,
        Ok(None) => return Ok(None),
        Err(unusable) => return Ok(Some(Err(unusable))),
    };
    let (config, hosts) = (&configuration.config, &configuration.ssl.hosts);
    let user = match config.get_user() {
        Some(user) => Some(user.to_owned()),
        None => {
            surroundings.variable("USER")?.map_or_else(|| surroundings.variable("LOGNAME"), |user| Ok(Some(user)))?
        }
    };
    let Some(user) = user else { return Ok(None) };
    let database = config.get_dbname().unwrap_or(&user);
    // Reports what is wrong with the hosts, as `build` would.
    targets(config, hosts)?;
    let mut found = Vec::new();
    for target in hosts.targets(config)? {
        let host = passfile::name_of(&target);
        found.push(passfile::password(&lines, &host, target.port, database, &user));
    }
    found.dedup();
    Ok(match &found[..] {
        [Some(password)] => Some(Ok(password.clone())),
        [None] | [] => None,
        _ => {
            let problem = format!(
                "{} has different passwords for the hosts, or none for some of them, and a pool uses one for all; \
                 write a line that fits them all, or use `PoolBuilder::password_provider`",
                path.display()
            );
            Some(Err(BuildError::invalid("passfile", problem)))
        }
    })
}

#[cfg(test)]
mod tests;
