//! Decides how connections are encrypted: not at all, by the user's connector, or by rustls with the given options.

use std::sync::Arc;

#[cfg(feature = "rustls")]
use tokio_postgres::config::{ChannelBinding, SslMode, SslNegotiation};
use tokio_postgres::{Config, NoTls};

use super::ssl::Ssl;
#[cfg(feature = "rustls")]
use super::ssl::{Mode, SYSTEM};
use crate::connect::Connect;
use crate::error::BuildError;
use crate::server::Opener;
#[cfg(feature = "rustls")]
use crate::tls::{Tls, Verify};

/// Creates an [`Opener`] from the finished template, and hides the TLS connector's type.
pub(super) type MakeOpener = Box<dyn FnOnce(Config) -> Opener + Send>;

/// What the user told the builder about encryption.
pub(super) enum Security {
    /// Nothing, so the connection string decides.
    Unsaid,
    Own(MakeOpener),
    #[cfg(feature = "rustls")]
    Rustls(Tls),
}

/// Returns the opener of a pool that does not encrypt.
pub(super) fn plain_opener(template: Config, connector: Option<Arc<dyn Connect>>) -> Opener {
    match connector {
        Some(connector) => Opener::over(template, connector, NoTls),
        None => Opener::new(template, NoTls),
    }
}

/// Returns what creates the opener, or `None` if connections are not encrypted. May set `sslmode`.
pub(super) fn make_opener(
    security: Security,
    ssl: &Ssl,
    config: &mut Config,
    connector: Option<&Arc<dyn Connect>>,
) -> Result<Option<MakeOpener>, BuildError> {
    match (security, ssl.files().next()) {
        (Security::Own(_), _) if connector.is_some() => {
            let problem = "a TLS connector for the driver's sockets cannot encrypt the streams of \
                           `PoolBuilder::connector`; \
                           let that connector encrypt its streams, or use this crate's feature `rustls`";
            Err(BuildError::invalid("tls", problem))
        }
        (Security::Own(_), Some((option, _))) => {
            let problem = "a connector given with `PoolBuilder::tls` does not read it; give the file to the connector";
            Err(BuildError::invalid(option, problem))
        }
        (Security::Own(own), None) => Ok(Some(own)),
        (other, _) => by_rustls(other, ssl, config, connector),
    }
}

/// Options that need TLS are refused later, when the template is made.
#[cfg(not(feature = "rustls"))]
fn by_rustls(
    _: Security,
    ssl: &Ssl,
    _: &mut Config,
    _: Option<&Arc<dyn Connect>>,
) -> Result<Option<MakeOpener>, BuildError> {
    match ssl.files().next() {
        Some((option, _)) => Err(BuildError::NoTls { option }),
        None => Ok(None),
    }
}

#[cfg(feature = "rustls")]
fn by_rustls(
    security: Security,
    ssl: &Ssl,
    config: &mut Config,
    over: Option<&Arc<dyn Connect>>,
) -> Result<Option<MakeOpener>, BuildError> {
    let tls = match security {
        Security::Rustls(tls) => {
            if ssl.mode == Some(Mode::Prefer) || config.get_ssl_mode() == SslMode::Disable {
                let problem = "contradicts `PoolBuilder::rustls`, which requires TLS; remove one of them";
                return Err(BuildError::invalid("sslmode", problem));
            }
            config.ssl_mode(SslMode::Require);
            tls
        }
        _ if is_asked_for(ssl, config) => Tls::unverified(),
        _ => return Ok(None),
    };
    let direct = config.get_ssl_negotiation() == SslNegotiation::Direct;
    let connector = described(tls, ssl, config)?.connector(direct);
    let connector = connector.map_err(|unusable| BuildError::invalid(unusable.option, unusable.problem))?;
    let over = over.cloned();
    Ok(Some(Box::new(move |template| match over {
        Some(over) => Opener::over(template, over, connector),
        None => Opener::new(template, connector),
    })))
}

/// A connection string without `sslmode` means the same with and without the feature, because another crate may have
/// enabled the feature.
#[cfg(feature = "rustls")]
fn is_asked_for(ssl: &Ssl, config: &Config) -> bool {
    ssl.mode == Some(Mode::Prefer)
        || ssl.files().next().is_some()
        || config.get_ssl_mode() == SslMode::Require
        || config.get_channel_binding() == ChannelBinding::Require
}

/// Adds the options of the connection string by libpq's rules. Refuses options that are meant to protect the connection
/// but would have no effect.
#[cfg(feature = "rustls")]
fn described(tls: Tls, ssl: &Ssl, config: &Config) -> Result<Tls, BuildError> {
    if let (Some((option, _)), true) = (ssl.files().next(), config.get_ssl_mode() != SslMode::Require) {
        let problem = "needs sslmode=verify-full (or `verify-ca`, `require`) beside it: without, who is in between can \
                       turn TLS off";
        return Err(BuildError::invalid(option, problem));
    }
    let tls = with_client_certificate(with_roots(tls, ssl)?, ssl)?;
    Ok(match ssl.mode {
        Some(Mode::VerifyFull) => tls.at_least(Verify::Name),
        Some(Mode::VerifyCa) => tls.at_least(Verify::Authority),
        _ => tls,
    })
}

#[cfg(feature = "rustls")]
fn twice(option: &'static str) -> BuildError {
    BuildError::invalid(option, "`PoolBuilder::rustls` is given the same; remove one of them")
}

#[cfg(feature = "rustls")]
fn with_roots(tls: Tls, ssl: &Ssl) -> Result<Tls, BuildError> {
    match ssl.root.as_deref() {
        None => Ok(tls),
        Some(_) if tls.has_roots() => Err(twice("sslrootcert")),
        Some(SYSTEM) if ssl.mode == Some(Mode::VerifyFull) => Ok(tls.platform_roots()),
        Some(SYSTEM) => {
            let problem = "`system` needs sslmode=verify-full: the platform's authorities sign for anybody";
            Err(BuildError::invalid("sslrootcert", problem))
        }
        // If an authority is given, it is checked even with `require`, as in libpq.
        Some(file) => Ok(tls.root_certificates_file(file).at_least(Verify::Authority)),
    }
}

#[cfg(feature = "rustls")]
fn with_client_certificate(tls: Tls, ssl: &Ssl) -> Result<Tls, BuildError> {
    match (&ssl.certificate, &ssl.key) {
        (None, None) => Ok(tls),
        (Some(_), Some(_)) if tls.has_client_certificate() => Err(twice("sslcert")),
        (Some(certificate), Some(key)) => Ok(tls.client_certificate_files(certificate, key)),
        (Some(_), None) => Err(BuildError::invalid("sslkey", "is missing beside sslcert; give the file of its key")),
        (None, Some(_)) => Err(BuildError::invalid("sslcert", "is missing beside sslkey; give its certificate's file")),
    }
}
