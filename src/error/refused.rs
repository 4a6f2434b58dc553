//! The error of a server that refuses the pool for good, and the advice on it.

use std::error::Error as StdError;
use std::fmt;

use crate::classify::{BadCertificate, TlsTrouble, tls_trouble};
use crate::topology::{Endpoint, FailureKind, ProbeFailure};

/// [`Error::Refused`](super::Error::Refused): a server answered, and it will refuse the pool again.
#[derive(Debug)]
pub struct Refused {
    endpoint: Option<Endpoint>,
    failure: ProbeFailure,
}

impl Refused {
    pub(crate) fn new(endpoint: Option<Endpoint>, failure: ProbeFailure) -> Self {
        Self { endpoint, failure }
    }

    /// The server that refused. `None` if the failure is about several servers, or if the server has answered something
    /// else since.
    #[must_use]
    pub fn endpoint(&self) -> Option<&Endpoint> {
        self.endpoint.as_ref()
    }

    /// What the server said.
    #[must_use]
    pub fn failure(&self) -> &ProbeFailure {
        &self.failure
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let trouble = tls_trouble(&self.failure.message);
        if self.failure.kind == FailureKind::SeveralClusters {
            return write!(
                f,
                "{}; name the right cluster by `PoolBuilder::system_identifier` or `Pool::accept_cluster`, or make the \
                 name lead to that cluster alone",
                self.failure
            );
        }
        let advice = match (self.failure.kind, trouble) {
            (FailureKind::NotPostgres, _) => "that is not PostgreSQL; check host and port",
            (_, Some(trouble)) => advice_on_tls(trouble),
            _ => "check user, password, database, pg_hba.conf and sslmode",
        };
        let failure = &self.failure;
        match (&self.endpoint, trouble) {
            (Some(endpoint), Some(TlsTrouble::Certificate(_))) => {
                write!(f, "the certificate of {endpoint} is not accepted: {failure}; {advice}")
            }
            (Some(endpoint), _) => write!(f, "{endpoint} refuses this pool: {failure}; {advice}"),
            (None, _) => write!(f, "the server refuses this pool: {failure}; {advice}"),
        }
    }
}

fn advice_on_tls(trouble: TlsTrouble) -> &'static str {
    match trouble {
        TlsTrouble::Certificate(BadCertificate::Expired) => "renew it on the server, or set this machine's clock",
        TlsTrouble::Certificate(BadCertificate::NotYetValid) => {
            "set the clocks of both machines, or wait until it \
                                                                 becomes valid"
        }
        TlsTrouble::Certificate(BadCertificate::WrongName) => {
            "connect by a name that the certificate has as a subjectAltName, have it issued for this name too, or \
             check no name with sslmode=verify-ca"
        }
        TlsTrouble::Certificate(BadCertificate::UnknownAuthority) => {
            "if this is the right server, trust the authority that signed the certificate: sslrootcert=<file with the \
             authority's certificate>"
        }
        TlsTrouble::Certificate(BadCertificate::Unusable) => {
            "have a certificate issued for the server: X.509 version 3, with the server's name, and not that of an \
             authority"
        }
        TlsTrouble::NotOffered => {
            "set `ssl = on` on the server, or a weaker sslmode than `require` in the connection string"
        }
        TlsTrouble::NotDirect => {
            "sslnegotiation=direct needs PostgreSQL 17 or newer, a proxy in front of it that knows it too, and a \
             connector that offers the protocol `postgresql` (ALPN); leave it out: it only saves a round trip"
        }
        TlsTrouble::Wanted => {
            "the server does not let this user log in without TLS: set sslmode=verify-full or `require` if the server \
             offers TLS, or allow logins without it in pg_hba.conf"
        }
    }
}

impl StdError for Refused {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&self.failure)
    }
}
