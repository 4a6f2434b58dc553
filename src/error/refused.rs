//! A server that refuses the pool for good, and what to do about it.

use std::error::Error as StdError;
use std::fmt;

use crate::classify::{BadCertificate, TlsTrouble, tls_trouble};
use crate::topology::{Endpoint, FailureKind, ProbeFailure};

/// [`Error::Refused`]: a server that answered and will go on refusing.
#[derive(Debug)]
pub struct Refused {
    endpoint: Option<Endpoint>,
    failure: ProbeFailure,
}

impl Refused {
    pub(crate) fn new(endpoint: Option<Endpoint>, failure: ProbeFailure) -> Self {
        Self { endpoint, failure }
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
                "{}; say which one is meant by `PoolBuilder::system_identifier` or `Pool::accept_cluster`, or have the name \
                 lead to that one alone",
                self.failure
            );
        }
        let advice = match (self.failure.kind, trouble) {
            (FailureKind::NotPostgres, _) => "what answers there is not PostgreSQL; check host and port",
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
        TlsTrouble::Certificate(BadCertificate::NotYetValid) => "set the clocks of both machines, or wait until it is",
        TlsTrouble::Certificate(BadCertificate::WrongName) => {
            "connect by a name that it holds as a subjectAltName, have it issued for this one too, or check no name with \
             sslmode=verify-ca"
        }
        TlsTrouble::Certificate(BadCertificate::UnknownAuthority) => {
            "if it is the right server, trust the authority that signed it: sslrootcert=<file with its certificate>"
        }
        TlsTrouble::Certificate(BadCertificate::Unusable) => {
            "have one issued for servers: X.509 version 3, with the server's name, not an authority's own"
        }
        TlsTrouble::NotOffered => {
            "set `ssl = on` on the server, or a weaker sslmode than `require` in the connection string"
        }
        TlsTrouble::Wanted => {
            "nobody may log in so without TLS: set sslmode=verify-full, or `require`, if the server offers TLS, or allow it in \
             pg_hba.conf"
        }
    }
}

impl StdError for Refused {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&self.failure)
    }
}
