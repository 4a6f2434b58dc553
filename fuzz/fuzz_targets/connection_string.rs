//! Any text as a connection string, up to what a pool would be made of.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tokio_postgres_failover::fuzzing::configuration;
use tokio_postgres_failover::tokio_postgres::Config;
use tokio_postgres_failover::tokio_postgres::config::{LoadBalanceHosts, SslMode, TargetSessionAttrs};
use tokio_postgres_failover::{BuildError, Pool};
use tokio_postgres_failover_fuzz::short_and_in_one_line;

/// What these words belong to is read as libpq reads it, or is refused, and the driver reads some of it otherwise:
/// lists of hosts, the names of roles, a time-out in milliseconds, files for TLS, and options of libpq that the driver
/// does not know.
const READ_HERE: [&str; 18] = [
    "host",
    "port",
    "target_session_attrs",
    "%",
    "tcp_user_timeout",
    "ssl",
    "client_encoding",
    "fallback_application_name",
    "gss",
    "keepalives_count",
    "krb",
    "oauth_",
    "passfile",
    "replication",
    "require",
    "scram_",
    "service",
    "protocol_version",
];

fuzz_target!(|text: &str| {
    let read_here = READ_HERE.iter().any(|word| text.contains(word));
    for tls in [false, true] {
        let made = configuration(text, tls);
        let again = configuration(text, tls);
        assert_eq!(format!("{made:?}"), format!("{again:?}"), "the same text, read twice");
        let driver = text.parse::<Config>();
        let made = match made {
            Ok(made) => made,
            Err(error) => {
                assert!(
                    read_here || driver.is_err() == matches!(error, BuildError::Url(_)),
                    "what the driver reads is refused for its own reason: {error}"
                );
                short_and_in_one_line(&error);
                continue;
            }
        };
        let Ok(driver) = driver else {
            assert!(read_here, "nothing else is accepted that the driver does not read");
            continue;
        };
        assert!(Pool::builder(text).is_ok());
        assert!(Pool::builder(text.to_owned()).is_ok());

        // Every host is honoured, and each of them can be connected to.
        let hosts = driver.get_hosts().len().max(driver.get_hostaddrs().len());
        assert!(read_here || made.names.len() + made.addresses.len() == hosts, "{made:?}");
        assert!(!made.names.is_empty() || !made.addresses.is_empty());
        assert!(made.names.iter().all(|(name, port)| !name.trim().is_empty() && *port != 0), "{made:?}");
        // No name is an address: it would be asked of the DNS.
        assert!(made.names.iter().all(|(name, _)| name.parse::<std::net::IpAddr>().is_err()), "{made:?}");

        // What cannot be honoured is refused, and what is left is what the text says.
        assert_ne!(driver.get_target_session_attrs(), TargetSessionAttrs::ReadOnly);
        assert_ne!(driver.get_load_balance_hosts(), LoadBalanceHosts::Random);
        assert!(tls || driver.get_ssl_mode() != SslMode::Require);
        let template = &made.template;
        assert!(
            template.get_hosts().is_empty() && template.get_hostaddrs().is_empty() && template.get_ports().is_empty()
        );
        assert_eq!(template.get_user(), driver.get_user());
        assert_eq!(template.get_password(), driver.get_password());
        assert_eq!(template.get_dbname(), driver.get_dbname());
        assert_eq!(template.get_options(), driver.get_options());
        assert_eq!(template.get_ssl_mode(), driver.get_ssl_mode());
        assert_eq!(template.get_connect_timeout(), driver.get_connect_timeout());
    }
});
