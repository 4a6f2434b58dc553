//! A ready-made TLS connector on rustls, and its settings: the authorities that it trusts, what it checks, and the
//! certificate that it shows.
//!
//! Feature `rustls`. Any other connector can be given to [`PoolBuilder::tls`](crate::PoolBuilder::tls).

// This module knows nothing of pools. Certificates are rotated while pools are running, so if a file has changed, the
// next session reads it again. No type of rustls leaves this module. Tests: `tests/it/sessions/tls.rs`.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;
use std::{fmt, fs, io};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::sync::lock;

/// How [`PoolBuilder::rustls`](crate::PoolBuilder::rustls) checks the servers' certificates. Feature `rustls`.
///
/// The connection string can say the same, see [`Pool::builder`](crate::Pool::builder). If both do, the stricter check
/// counts.
///
/// Files are read when the pool is built. If they have changed, the next session reads them again, so a rotated
/// certificate needs no new pool. If a changed file cannot be used, the pool writes that to the log and goes on with
/// what it read last. Bytes and the authorities of the platform are read once.
///
/// ```no_run
/// # fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use tokio_postgres_failover::Pool;
/// use tokio_postgres_failover::tls::Tls;
///
/// let pool = Pool::builder("postgres://app@my-pg.internal/app")?
///     .rustls(Tls::verify_full().root_certificates_file("/etc/ssl/my-pg-ca.pem"))
///     .build()?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "it does nothing until it is given to `PoolBuilder::rustls`"]
pub struct Tls {
    verify: Verify,
    roots: Vec<Pem>,
    /// Whether to trust the platform's authorities in addition to `roots`. If `roots` is empty, they are trusted
    /// anyway.
    platform: bool,
    client: Option<(Pem, Pem)>,
}

/// What is checked in a server's certificate. Each value also checks what the one before it does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Verify {
    Nothing,
    Authority,
    Name,
}

/// Certificates or a key, as PEM text. `Debug` shows no key.
#[derive(Clone)]
enum Pem {
    File(PathBuf),
    Bytes(Arc<[u8]>),
}

impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.fmt(f),
            Self::Bytes(_) => f.write_str("PEM"),
        }
    }
}

impl fmt::Display for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Bytes(_) => f.write_str("the bytes given"),
        }
    }
}

impl Tls {
    fn new(verify: Verify) -> Self {
        Self { verify, roots: Vec::new(), platform: false, client: None }
    }

    /// The same as `sslmode=verify-full`. A trusted authority must have signed the certificate, and the certificate
    /// must have the name of the host in the connection string as a subjectAltName, whichever address the pool connects
    /// to. The common name does not count.
    ///
    /// The platform's authorities are trusted, unless others are given.
    pub fn verify_full() -> Self {
        Self::new(Verify::Name)
    }

    /// The same as `sslmode=verify-ca`. A trusted authority must have signed the certificate, which may have any name.
    ///
    /// [`PoolBuilder::build`](crate::PoolBuilder::build) fails unless the authority is given, because those of the
    /// platform sign certificates for anybody.
    pub fn verify_ca() -> Self {
        Self::new(Verify::Authority)
    }

    /// The same as `sslmode=require`. The connection is encrypted, but nothing shows who the server is.
    ///
    /// Anybody who can redirect the connection can read it. `channel_binding=require` in the connection string binds
    /// the proof of the password to the server's certificate, so that a man in the middle is refused.
    pub fn unverified() -> Self {
        Self::new(Verify::Nothing)
    }

    /// Trusts the authorities in this PEM file instead of the platform's. It can be called for several files.
    pub fn root_certificates_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.roots.push(Pem::File(path.into()));
        self
    }

    /// Trusts these authorities (PEM) instead of the platform's. It can be called several times.
    ///
    /// ```no_run
    /// # fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_postgres_failover::Pool;
    /// use tokio_postgres_failover::tls::Tls;
    ///
    /// // From a secret that is in the environment.
    /// let authority = std::env::var("PG_CA")?;
    /// let tls = Tls::verify_full().root_certificates_pem(authority);
    /// let pool = Pool::builder("postgres://app@my-pg.internal/app")?.rustls(tls).build()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn root_certificates_pem(mut self, pem: impl AsRef<[u8]>) -> Self {
        self.roots.push(Pem::Bytes(pem.as_ref().into()));
        self
    }

    /// Trusts the platform's authorities in addition to the given ones. If none are given, the platform's are trusted
    /// anyway.
    pub fn platform_roots(mut self) -> Self {
        self.platform = true;
        self
    }

    /// Shows this certificate (with its intermediates) to servers that ask for one, as `sslcert` and `sslkey` do. Both
    /// are PEM files, and the key has no passphrase.
    pub fn client_certificate_files(mut self, certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.client = Some((Pem::File(certificate.into()), Pem::File(key.into())));
        self
    }

    /// The same as [`Tls::client_certificate_files`], from PEM bytes.
    pub fn client_certificate_pem(mut self, certificate: impl AsRef<[u8]>, key: impl AsRef<[u8]>) -> Self {
        self.client = Some((Pem::Bytes(certificate.as_ref().into()), Pem::Bytes(key.as_ref().into())));
        self
    }

    /// Raises the check to `verify`, unless it is stricter already.
    pub(crate) fn at_least(mut self, verify: Verify) -> Self {
        self.verify = self.verify.max(verify);
        self
    }

    pub(crate) fn has_roots(&self) -> bool {
        !self.roots.is_empty() || self.platform
    }

    pub(crate) fn has_client_certificate(&self) -> bool {
        self.client.is_some()
    }

    /// Makes the connector. `direct` means TLS from the first byte, for which servers require the name of the protocol
    /// (ALPN).
    pub(crate) fn connector(self, direct: bool) -> Result<Connector, Unusable> {
        if self.verify == Verify::Authority && self.roots.is_empty() {
            let problem = "`verify-ca` needs sslrootcert=<file>, as the platform's authorities sign for anybody; with \
                           them, use `verify-full`";
            return Err(Unusable::new("sslmode", problem));
        }
        let platform = if self.verify > Verify::Nothing && (self.platform || self.roots.is_empty()) {
            platform_roots()?
        } else {
            Vec::new()
        };
        let plan = Plan { tls: self, platform, direct };
        let stamps = plan.stamps();
        let read = Read { connector: MakeRustlsConnect::new(plan.config()?), stamps, complaint: None };
        Ok(Connector(Arc::new(Shared { plan, read: Mutex::new(read) })))
    }
}

/// Why no connector can be made.
#[derive(Debug)]
pub(crate) struct Unusable {
    /// The option of the connection string for the same setting.
    pub(crate) option: &'static str,
    pub(crate) problem: String,
}

impl Unusable {
    fn new(option: &'static str, problem: impl Into<String>) -> Self {
        Self { option, problem: problem.into() }
    }
}

/// The connector that each session uses. All clones share the certificates that were read.
#[derive(Clone)]
pub(crate) struct Connector(Arc<Shared>);

struct Shared {
    plan: Plan,
    read: Mutex<Read>,
}

/// The settings of a connector. They are used again whenever the files change.
struct Plan {
    tls: Tls,
    platform: Vec<CertificateDer<'static>>,
    direct: bool,
}

/// The connector that was made of the files when they were read last.
struct Read {
    connector: MakeRustlsConnect,
    stamps: Vec<Option<Stamp>>,
    /// Why the files cannot be used now, as written to the log. It prevents a second line with the same text.
    complaint: Option<String>,
}

/// Identifies one version of a file. It follows links, because Kubernetes changes the target of a link.
#[derive(PartialEq, Eq)]
struct Stamp {
    modified: SystemTime,
    length: u64,
    #[cfg(unix)]
    inode: u64,
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let metadata = fs::metadata(path).ok()?;
        Some(Self {
            modified: metadata.modified().ok()?,
            length: metadata.len(),
            #[cfg(unix)]
            inode: std::os::unix::fs::MetadataExt::ino(&metadata),
        })
    }
}

impl Connector {
    fn current(&self) -> MakeRustlsConnect {
        let mut read = lock(&self.0.read);
        // The stamps are taken before the files are read, so a change in between is noticed next time.
        let stamps = self.0.plan.stamps();
        if stamps == read.stamps {
            return read.connector.clone();
        }
        match self.0.plan.config() {
            Ok(config) => {
                tracing::info!("the files of certificates have changed and were read again");
                *read = Read { connector: MakeRustlsConnect::new(config), stamps, complaint: None };
            }
            // The file may be half written. The next session tries again.
            Err(Unusable { option, problem }) if read.complaint.as_ref() != Some(&problem) => {
                tracing::warn!("{option}: {problem}; the certificates read before are used");
                read.complaint = Some(problem);
            }
            Err(_) => {}
        }
        read.connector.clone()
    }
}

impl<S> MakeTlsConnect<S> for Connector
where
    MakeRustlsConnect: MakeTlsConnect<S, Error = Infallible>,
{
    type Stream = <MakeRustlsConnect as MakeTlsConnect<S>>::Stream;
    type TlsConnect = <MakeRustlsConnect as MakeTlsConnect<S>>::TlsConnect;
    type Error = Infallible;

    fn make_tls_connect(&mut self, host: &str) -> Result<Self::TlsConnect, Infallible> {
        MakeTlsConnect::<S>::make_tls_connect(&mut self.current(), host)
    }
}

impl Plan {
    /// The stamps of all files. A missing file has none, so that it counts as changed once it is there.
    fn stamps(&self) -> Vec<Option<Stamp>> {
        let client = self.tls.client.iter().flat_map(|(certificate, key)| [certificate, key]);
        let files = self.tls.roots.iter().chain(client).filter_map(|pem| match pem {
            Pem::File(path) => Some(path),
            Pem::Bytes(_) => None,
        });
        files.map(|path| Stamp::of(path)).collect()
    }

    fn config(&self) -> Result<ClientConfig, Unusable> {
        let provider = Arc::new(ring::default_provider());
        let algorithms = provider.signature_verification_algorithms;
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| Unusable::new("sslmode", error.to_string()))?;
        let builder = match self.tls.verify {
            Verify::Name => builder.with_root_certificates(self.roots()?),
            Verify::Authority => {
                let roots = Some(self.roots()?);
                builder.dangerous().with_custom_certificate_verifier(Arc::new(Nameless { roots, algorithms }))
            }
            Verify::Nothing => {
                builder.dangerous().with_custom_certificate_verifier(Arc::new(Nameless { roots: None, algorithms }))
            }
        };
        let mut config = match &self.tls.client {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let chain = certificates("sslcert", certificate)?;
                let key = PrivateKeyDer::from_pem_slice(&contents("sslkey", key)?).map_err(|error| {
                    let problem = format!("{key} holds no private key in PEM without a passphrase: {error}");
                    Unusable::new("sslkey", problem)
                })?;
                builder
                    .with_client_auth_cert(chain, key)
                    .map_err(|error| Unusable::new("sslcert", format!("cannot be used with its key: {error}")))?
            }
        };
        // Without resumption, each session checks the certificate that the server has now.
        config.resumption = Resumption::disabled();
        if self.direct {
            config.alpn_protocols = vec![b"postgresql".to_vec()];
        }
        Ok(config)
    }

    fn roots(&self) -> Result<RootCertStore, Unusable> {
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(self.platform.iter().cloned());
        for pem in &self.tls.roots {
            let (added, ignored) = store.add_parsable_certificates(certificates("sslrootcert", pem)?);
            if added == 0 {
                return Err(Unusable::new("sslrootcert", format!("no certificate in {pem} can be an authority's")));
            }
            if ignored > 0 {
                tracing::warn!("sslrootcert: {ignored} certificates in {pem} make no sense and are left out");
            }
        }
        Ok(store)
    }
}

fn contents(option: &'static str, pem: &Pem) -> Result<Vec<u8>, Unusable> {
    match pem {
        Pem::Bytes(bytes) => Ok(bytes.to_vec()),
        Pem::File(path) => fs::read(path).map_err(|error| {
            let problem = match error.kind() {
                io::ErrorKind::NotFound => format!("there is no file {pem}; give the path of a PEM file"),
                _ => format!("{pem} cannot be read: {error}"),
            };
            Unusable::new(option, problem)
        }),
    }
}

fn certificates(option: &'static str, pem: &Pem) -> Result<Vec<CertificateDer<'static>>, Unusable> {
    let bytes = contents(option, pem)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let certificates = certificates.map_err(|error| Unusable::new(option, format!("{pem} is no PEM: {error}")))?;
    if certificates.is_empty() {
        let problem = format!("{pem} holds no certificate; it must have a line -----BEGIN CERTIFICATE-----");
        return Err(Unusable::new(option, problem));
    }
    Ok(certificates)
}

fn platform_roots() -> Result<Vec<CertificateDer<'static>>, Unusable> {
    let found = rustls_native_certs::load_native_certs();
    if found.certs.is_empty() {
        let why: Vec<String> = found.errors.iter().map(|error| format!(" ({error})")).collect();
        let problem = format!(
            "this machine has no certificates of authorities{}; install its package ca-certificates, or give the \
             server's authority as sslrootcert=<file>",
            why.concat()
        );
        return Err(Unusable::new("sslrootcert", problem));
    }
    Ok(found.certs)
}

/// Checks who signed a certificate if it has `roots`, and checks no name. The server must hold the key of the
/// certificate in any case, because channel binding relies on that.
#[derive(Debug)]
struct Nameless {
    roots: Option<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Nameless {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Some(roots) = &self.roots {
            let parsed = ParsedCertificate::try_from(certificate)?;
            verify_server_cert_signed_by_trust_anchor(&parsed, roots, intermediates, now, self.algorithms.all)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Makes tests of the examples in the page on TLS.
#[cfg(doctest)]
#[doc = include_str!("../docs/tls.md")]
struct Page;
