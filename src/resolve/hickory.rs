//! Asks DNS by means of the `hickory-resolver` crate.
//!
//! This module decides nothing. It asks for both address families, and [`Addresses::merge`] makes one answer of them.
//! It knows nothing of servers and pools.
//!
//! Invariant: nothing outlives its question, neither an answer nor a state that could make the next answer outdated. So
//! each question uses a new hickory client. Building it takes about ten microseconds. A shared client lets a question
//! join an equal one that is still under way (its `NameServerPool::active_requests`, with or without a cache). A
//! question that is asked after a failover could then get the answer to one that was asked before. A shared client
//! would also retransmit later after slow answers, but that is when packets get lost.
//!
//! Tests: `tests/it/failover/resolve.rs`, and `resolve/hickory/tests.rs` for those that need their own
//! `/etc/resolv.conf`.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::{Either, select};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use tokio::time::{Instant, timeout};

use super::setup::{Files, ResolverSetup, Source, System};
use super::system::HostsFile;
use super::{Addresses, BoxFuture, Resolve, ResolveError};
use crate::sync::lock;

/// How many times a question is sent before it counts as unanswered.
const ATTEMPTS: u32 = 2;

/// The longest time-out. hickory adds the time-out to the clock, and the sum must not overflow.
const LONGEST: Duration = Duration::from_secs(3600);

/// How long to wait for the second address family after the first one has given addresses. Some name servers drop AAAA
/// queries. Without this limit, each question to them would last until the time-out.
const GRACE: Duration = Duration::from_millis(100);
/// In case the second family always takes longer than [`GRACE`]: if it stays missing, every fourth look-up
/// ([`PATIENT`]) waits for this long instead.
const LONG_GRACE: Duration = Duration::from_secs(1);
const PATIENT: u32 = 4;
/// Of so many names it remembers at most that one of their families is missing.
const MOST_NAMES: usize = 1024;

/// What the name servers have told about one name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Nothing,
    /// Something about one address family, and nothing about the other one.
    Half,
    All,
}

impl Told {
    fn by(one: &Result<Addresses, ResolveError>, other: &Result<Addresses, ResolveError>) -> Self {
        let silent = |found: &Result<Addresses, ResolveError>| matches!(found, Err(ResolveError::TimedOut { .. }));
        match (silent(one), silent(other)) {
            (true, true) => Self::Nothing,
            (false, false) => Self::All,
            _ => Self::Half,
        }
    }
}

/// Why a name has led to no address.
struct Unfound {
    error: ResolveError,
    told: Told,
}

/// A resolver that asks DNS for each question, without a cache.
///
/// - It caches neither addresses nor failures, whatever their time to live says.
/// - It asks for A and AAAA records separately and at the same time, and merges the answers, IPv4 first. When one kind
///   has given addresses, it waits for the other kind for at most 100 ms. While the other kind stays missing, every
///   fourth look-up waits for 1 s. If the other kind fails, the result holds what was found, and [`Addresses::partial`]
///   has the failure. If neither gives addresses, the failure that says more is reported: a SERVFAIL or a time-out
///   rather than a "no such name".
/// - It asks again by TCP after a truncated answer, and follows CNAME records.
/// - An IP address is its own answer. Nothing is sent for it.
///
/// # Search lists
/// A name without a trailing dot is tried with the search domains of `/etc/resolv.conf`, as all programs do. In
/// Kubernetes (`ndots:5`, three or more search domains) the resolver first asks for
/// `my-pg.internal.<namespace>.svc.cluster.local` and so on, and only then for `my-pg.internal`. Write the host as
/// `my-pg.internal.`, with a dot at its end, so that it asks only for that name.
///
/// # Examples
/// ```
/// use std::time::Duration;
/// use tokio_postgres_failover::resolve::HickoryResolver;
///
/// // Fly.io's name server for `.internal`, without a look at /etc/resolv.conf:
/// let resolver = HickoryResolver::with_name_servers(["[fdaa::3]:53".parse()?])
///     .timeout(Duration::from_millis(500));
/// # Ok::<(), std::net::AddrParseError>(())
/// ```
#[derive(Debug)]
pub struct HickoryResolver {
    setup: Source,
    timeout: Duration,
    /// For each name: how many look-ups in a row have found one address family only, because the other one failed.
    partial: Mutex<HashMap<String, u32>>,
}

impl HickoryResolver {
    /// A resolver that asks as the system is configured. It uses `/etc/hosts`, and the name servers, search domains,
    /// `ndots` and `edns0` of `/etc/resolv.conf`. It does not use that file's `timeout` and `attempts`: see
    /// [`HickoryResolver::timeout`].
    ///
    /// When one of the files has changed, it is read again before the next question. While the new version cannot be
    /// used, the last usable one stays in force. As in the C library, a name in `/etc/hosts` is not asked for in DNS.
    /// On Windows and macOS the name servers come from the settings of the system.
    ///
    /// # Examples
    /// ```no_run
    /// use tokio_postgres_failover::resolve::{HickoryResolver, Resolve};
    ///
    /// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
    /// for address in HickoryResolver::system()?.resolve("my-pg.internal.").await? {
    ///     println!("{address}");
    /// }
    /// # Ok(()) }
    /// ```
    pub fn system() -> Result<Self, ResolveError> {
        Self::from_files(Files { resolv_conf: "/etc/resolv.conf".into(), hosts: "/etc/hosts".into() })
    }

    /// A resolver that asks these name servers, by UDP and TCP on the given port, and reads no file. It has no search
    /// domains, so it asks for each name as it is.
    ///
    /// # Examples
    /// ```
    /// # use tokio_postgres_failover::resolve::HickoryResolver;
    /// let resolver = HickoryResolver::with_name_servers([([10, 0, 0, 2], 53).into()]);
    /// ```
    #[must_use]
    pub fn with_name_servers(servers: impl IntoIterator<Item = SocketAddr>) -> Self {
        let name_servers = servers.into_iter().map(|server| {
            let (mut udp, mut tcp) = (ConnectionConfig::udp(), ConnectionConfig::tcp());
            udp.port = server.port();
            tcp.port = server.port();
            NameServerConfig::new(server.ip(), true, vec![udp, tcp])
        });
        Self::new(Source::Given(Arc::new(ResolverSetup {
            name_servers: name_servers.collect(),
            scoped: None,
            search: Vec::new(),
            ndots: 0,
            edns0: false,
            hosts: HostsFile::default(),
        })))
    }

    /// How long one attempt may take. Default: 1 s. There are two attempts, so a name without an answer fails after
    /// twice this time.
    ///
    /// While DNS is silent, a search for the primary goes on with the servers that the pool has seen before, so a
    /// longer time costs a running pool little. Raise it when the name servers are far away. More than an hour counts
    /// as an hour.
    ///
    /// # Examples
    /// ```
    /// # use std::time::Duration;
    /// # use tokio_postgres_failover::resolve::HickoryResolver;
    /// let resolver = HickoryResolver::with_name_servers([([10, 0, 0, 2], 53).into()])
    ///     .timeout(Duration::from_secs(3));
    /// ```
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout.min(LONGEST);
        self
    }

    /// Asks for the TXT records of `name`, and joins the strings of each. It asks for the name as it is, without a
    /// search list. The pool itself asks for no TXT records.
    ///
    /// # Errors
    /// As [`Resolve::resolve`]: no such name, no TXT record, a failing or silent name server.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_postgres_failover::resolve::HickoryResolver;
    ///
    /// let machines = HickoryResolver::system()?.text("vms.my-pg.internal").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn text(&self, name: &str) -> Result<Vec<String>, ResolveError> {
        let started = Instant::now();
        let mut asked = Name::from_str_relaxed(name).map_err(|error| ResolveError::custom(name, error))?;
        asked.set_fqdn(true);
        let failed = |error| failure(name, error, started.elapsed());
        let client = self.client(&self.setup.current()).map_err(failed)?;
        let lookup = timeout(self.timeout * ATTEMPTS, client.lookup(asked, RecordType::TXT)).await;
        let lookup = lookup.map_err(|_| failed(NetError::Timeout))?.map_err(failed)?;
        let records: Vec<String> = lookup.answers().iter().filter_map(|record| joined(&record.data)).collect();
        if records.is_empty() {
            return Err(ResolveError::NoAddresses { name: name.to_owned() });
        }
        Ok(records)
    }

    fn new(setup: Source) -> Self {
        Self { setup, timeout: Duration::from_secs(1), partial: Mutex::default() }
    }

    fn from_files(files: Files) -> Result<Self, ResolveError> {
        Ok(Self::new(Source::System(System::new(files)?)))
    }

    async fn look_up(&self, host: &str) -> Result<Addresses, ResolveError> {
        if let Some(itself) = Addresses::literal(host) {
            return Ok(itself);
        }
        // Only the relaxed syntax allows an underscore, which host names do not have but names of services often do.
        let name = Name::from_str_relaxed(host).map_err(|error| ResolveError::custom(host, error))?;
        let setup = self.setup.current();
        if let Some(addresses) = setup.hosts.addresses(host) {
            return Ok(addresses);
        }
        if let Some(scoped) = setup.hosts.scoped(host) {
            let problem = format!("/etc/hosts has {scoped}, and the driver connects to no address with an interface");
            return Err(ResolveError::custom(host, problem));
        }
        if let (Some(scoped), true) = (&setup.scoped, setup.name_servers.is_empty()) {
            let problem = format!(
                "the only name server in resolv.conf, {scoped}, cannot be asked, as its address includes an interface; \
                 name another one, there or with `PoolBuilder::dns_servers`"
            );
            return Err(ResolveError::custom(host, problem));
        }
        let client = self.client(&setup).map_err(|error| failure(host, error, Duration::ZERO))?;
        let mut reported = ResolveError::NotFound { name: host.to_owned() };
        let mut half = self.misses_a_family(host);
        for name in setup.candidates(&name) {
            match self.both_families(&client, host, &name, half).await {
                Ok(addresses) => return Ok(addresses),
                Err(unfound) => {
                    reported = reported.or_more_telling(unfound.error);
                    // As in the C library, silence ends the search list, because the other names would time out as
                    // well. But an answer for one family is an answer.
                    match unfound.told {
                        Told::Nothing => break,
                        Told::Half => half = true,
                        Told::All => {}
                    }
                }
            }
        }
        // What was not waited for may have had an address, so the next look-up waits.
        self.note(host, 0, false);
        Err(reported)
    }

    fn client(&self, setup: &ResolverSetup) -> Result<TokioResolver, NetError> {
        let servers = ResolverConfig::from_name_servers(setup.name_servers.clone());
        let mut builder = TokioResolver::builder_with_config(servers, TokioRuntimeProvider::default());
        let options = builder.options_mut();
        options.cache_size = 0;
        options.timeout = self.timeout;
        // hickory counts only the repetitions.
        options.attempts = ATTEMPTS as usize - 1;
        options.edns0 = setup.edns0;
        // `look_up` has read the hosts file already, and hickory would look up only the first name of a search list.
        options.use_hosts_file = ResolveHosts::Never;
        builder.build()
    }

    /// Returns whether the last look-up has found one address family only, and this one is not to wait long for the
    /// other.
    fn misses_a_family(&self, host: &str) -> bool {
        lock(&self.partial).get(host).is_some_and(|missed| missed % PATIENT != PATIENT - 1)
    }

    /// Notes whether a look-up has missed one family, as the `missed` ones in a row before it have.
    fn note(&self, host: &str, missed: u32, is_partial: bool) {
        let mut partial = lock(&self.partial);
        if !is_partial {
            partial.remove(host);
        } else if partial.len() < MOST_NAMES || partial.contains_key(host) {
            partial.insert(host.to_owned(), missed.wrapping_add(1));
        }
    }

    /// Asks for `name`. Errors name `host`. `half`: one of the families is probably not answered at all, so this does
    /// not wait long for it if the other one has no address.
    async fn both_families(
        &self,
        client: &TokioResolver,
        host: &str,
        name: &Name,
        half: bool,
    ) -> Result<Addresses, Unfound> {
        let started = Instant::now();
        let silent = |_| failure(host, NetError::Timeout, started.elapsed());
        let family = async |record_type| {
            // hickory's own time-out starts again when it changes to TCP, so this one limits both together.
            let found = timeout(self.timeout * ATTEMPTS, one_family(client, name, record_type))
                .await
                .map_err(silent)?
                .map_err(|error| failure(host, error, started.elapsed()))?;
            // The name is an alias that leads to no address.
            if found.is_empty() {
                return Err(ResolveError::NoAddresses { name: host.to_owned() });
            }
            Ok(found)
        };
        let (v4, v6) = (pin!(family(RecordType::A)), pin!(family(RecordType::AAAA)));
        let (Either::Left((faster, slower)) | Either::Right((faster, slower))) = select(v4, v6).await;
        let missed = lock(&self.partial).get(host).copied().unwrap_or_default();
        let patient = missed % PATIENT == PATIENT - 1;
        let grace = if patient { LONG_GRACE } else { GRACE };
        let slower = if faster.is_ok() || (half && faster.as_ref().is_err_and(ResolveError::is_answer)) {
            timeout(grace, slower).await.unwrap_or_else(|elapsed| Err(silent(elapsed)))
        } else {
            slower.await
        };
        let told = Told::by(&faster, &slower);
        let mut merged = Addresses::merge(faster, slower).map_err(|error| Unfound { error, told })?;
        self.note(host, missed, merged.partial().is_some());
        // Either family may answer first, so sort by family. The sort is stable and keeps the order within each family.
        merged.addresses.sort_by_key(IpAddr::is_ipv6);
        Ok(merged)
    }
}

impl Resolve for HickoryResolver {
    fn resolve<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Addresses, ResolveError>> {
        Box::pin(self.look_up(host))
    }
}

async fn one_family(client: &TokioResolver, name: &Name, record_type: RecordType) -> Result<Addresses, NetError> {
    let lookup = client.lookup(name.clone(), record_type).await?;
    // The answer also holds the aliases that led to the addresses.
    let records = lookup.answers().iter();
    Ok(records
        .filter(|record| record.record_type() == record_type)
        .filter_map(|record| record.data.ip_addr())
        .collect())
}

/// Joins the strings of a TXT record, which are at most 255 bytes long each.
fn joined(data: &RData) -> Option<String> {
    let RData::TXT(text) = data else {
        return None;
    };
    Some(String::from_utf8_lossy(&text.txt_data.concat()).into_owned())
}

/// Translates an error of hickory into one of this crate.
fn failure(host: &str, error: NetError, after: Duration) -> ResolveError {
    let name = host.to_owned();
    match error {
        _ if error.is_nx_domain() => ResolveError::NotFound { name },
        NetError::Dns(DnsError::NoRecordsFound(none)) if none.response_code == ResponseCode::NoError => {
            ResolveError::NoAddresses { name }
        }
        NetError::Dns(DnsError::ResponseCode(code)) => {
            ResolveError::ServerFailure { name, code: format!("{code:?}").to_ascii_uppercase() }
        }
        NetError::Timeout => ResolveError::TimedOut { name, after },
        NetError::NoConnections => ResolveError::NoNameServers { name },
        other => ResolveError::custom(name, other),
    }
}

#[cfg(test)]
mod tests;
