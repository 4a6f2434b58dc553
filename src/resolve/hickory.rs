//! Asks DNS, by way of hickory.
//!
//! Decides nothing: it fetches both address families and lets `resolve.rs` merge them. Knows nothing of servers and
//! pools. No answer outlives its question, and neither does anything else that could make the next answer an old one:
//! hickory's client is built anew for each question (some ten microseconds). One that is shared lets a question join
//! an equal one that is still on its way (its `NameServerPool::active_requests`, with or without a cache), so that a
//! question asked after a failover could get an answer to one asked before. It also would stretch its retransmissions
//! to the slowness it has seen, just when packets get lost.
//!
//! Tests in `tests/resolve.rs`; below, those that need a file in the place of `/etc/resolv.conf`.

use std::{
    fmt, fs,
    io::ErrorKind,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    pin::pin,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use futures_util::future::{Either, select};
use hickory_resolver::{
    TokioResolver,
    config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig},
    net::{DnsError, NetError, runtime::TokioRuntimeProvider},
    proto::{
        op::ResponseCode,
        rr::{Name, RData, RecordType},
    },
};
use tokio::time::{Instant, timeout};

use super::system::{Hosts, ResolvConf};
use crate::resolve::{Addresses, BoxFuture, Resolve, ResolveError};
use crate::sync::lock;

/// How often a question is put before it counts as unanswered.
const ATTEMPTS: u32 = 2;

/// hickory adds the time-out to the clock, and the sum must not overflow.
const LONGEST: Duration = Duration::from_secs(3600);

/// How long the slower address family is waited for once the other one has brought addresses. There are name servers
/// that drop AAAA queries; without this, each question of theirs would take until the time-out.
const GRACE: Duration = Duration::from_millis(100);

/// Asks DNS for the addresses of a name, anew each time.
///
/// - Nothing is cached, neither addresses nor failures, whatever their time to live says.
/// - A and AAAA records are asked for apart and at the same time, and merged, IPv4 first. When one kind is answered
///   with addresses, the other one is waited for 100 ms at most; when it fails, what was found is returned, and
///   [`Addresses::partial`] has the failure. When neither brings addresses, the more telling failure is
///   reported: a SERVFAIL or a time-out before a "no such name".
/// - A truncated answer is asked for again by TCP; CNAME records are followed.
/// - An IP address stands for itself. Nothing is sent.
///
/// # Search lists
/// A name without a trailing dot is tried with the search domains of `/etc/resolv.conf`, as all programs do. In
/// Kubernetes (`ndots:5`, three or more search domains) that means that `my-pg.internal` is asked for as
/// `my-pg.internal.<namespace>.svc.cluster.local` and so on before it is asked for as it stands. Write the host as
/// `my-pg.internal.`, with a dot at its end, to have it asked at once, and only so.
///
/// # Examples
/// ```
/// use std::time::Duration;
/// use tokio_postgres_failover::HickoryResolver;
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
}

impl HickoryResolver {
    /// Asks as the system is configured to: by `/etc/hosts` and the name servers, search domains, `ndots` and `edns0`
    /// of `/etc/resolv.conf`. Its `timeout` and `attempts` are not used, see [`HickoryResolver::timeout`].
    ///
    /// When one of the files has changed, it is read again before the next question; while the new version cannot be
    /// used, the last one that could stays in force. As in the C library, a name in `/etc/hosts` is not asked for in
    /// DNS. On Windows and macOS the name servers are those of the system settings.
    ///
    /// # Examples
    /// ```no_run
    /// use tokio_postgres_failover::{HickoryResolver, Resolve};
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

    /// Asks these name servers, by UDP and TCP on the port given, and reads no file. Each name is asked for as it is:
    /// there are no search domains.
    ///
    /// # Examples
    /// ```
    /// # use tokio_postgres_failover::HickoryResolver;
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
        Self::new(Source::Given(Arc::new(Setup {
            name_servers: name_servers.collect(),
            search: Vec::new(),
            ndots: 0,
            edns0: false,
            hosts: Hosts::default(),
        })))
    }

    /// How long one attempt may take. Default: 1 s. There are two attempts, so a name that nobody answers for fails
    /// after twice this time.
    ///
    /// A search for the primary goes on with the servers seen before while DNS is silent, so a longer time costs a
    /// running pool little; raise it when name servers are far away. More than an hour is an hour.
    ///
    /// # Examples
    /// ```
    /// # use std::time::Duration;
    /// # use tokio_postgres_failover::HickoryResolver;
    /// let resolver = HickoryResolver::with_name_servers([([10, 0, 0, 2], 53).into()])
    ///     .timeout(Duration::from_secs(3));
    /// ```
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout.min(LONGEST);
        self
    }

    /// The TXT records of `name`, each with its strings joined, as the name servers have them now. Asked for as it is,
    /// without a search list. The pool itself asks for none.
    ///
    /// # Errors
    /// As [`Resolve::resolve`]: no such name, no TXT record, a failing or silent name server.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_postgres_failover::HickoryResolver;
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
        Self { setup, timeout: Duration::from_secs(1) }
    }

    fn from_files(files: Files) -> Result<Self, ResolveError> {
        Ok(Self::new(Source::System(System::new(files)?)))
    }

    async fn look_up(&self, host: &str) -> Result<Addresses, ResolveError> {
        if let Some(itself) = Addresses::literal(host) {
            return Ok(itself);
        }
        // Relaxed, as only that takes an underscore, which no host name has and many a service name.
        let name = Name::from_str_relaxed(host).map_err(|error| ResolveError::custom(host, error))?;
        let setup = self.setup.current();
        if let Some(addresses) = setup.hosts.addresses(host) {
            return Ok(addresses);
        }
        if let Some(scoped) = setup.hosts.scoped(host) {
            let problem = format!("/etc/hosts has {scoped}, and the driver connects to no address with an interface");
            return Err(ResolveError::custom(host, problem));
        }
        let client = self.client(&setup).map_err(|error| failure(host, error, Duration::ZERO))?;
        let mut reported = ResolveError::NotFound { name: host.to_owned() };
        for name in setup.candidates(&name) {
            match self.both_families(&client, host, &name).await {
                Ok(addresses) => return Ok(addresses),
                // As in the C library: who is silent about one name would be silent about the others.
                Err(silence @ ResolveError::TimedOut { .. }) => return Err(reported.or_more_telling(silence)),
                Err(error) => reported = reported.or_more_telling(error),
            }
        }
        Err(reported)
    }

    fn client(&self, setup: &Setup) -> Result<TokioResolver, NetError> {
        let servers = ResolverConfig::from_name_servers(setup.name_servers.clone());
        let mut builder = TokioResolver::builder_with_config(servers, TokioRuntimeProvider::default());
        let options = builder.options_mut();
        options.cache_size = 0;
        options.timeout = self.timeout;
        // hickory counts the repeats.
        options.attempts = ATTEMPTS as usize - 1;
        options.edns0 = setup.edns0;
        // `Setup::hosts` was looked into already; hickory looks up the first name of a search list only.
        options.use_hosts_file = ResolveHosts::Never;
        builder.build()
    }

    /// `host` is what errors name; `name` is what is asked.
    async fn both_families(&self, client: &TokioResolver, host: &str, name: &Name) -> Result<Addresses, ResolveError> {
        let started = Instant::now();
        let silent = |_| failure(host, NetError::Timeout, started.elapsed());
        let family = async |record_type| {
            // hickory's own time-out starts again when it turns to TCP.
            let found = timeout(self.timeout * ATTEMPTS, one_family(client, name, record_type))
                .await
                .map_err(silent)?
                .map_err(|error| failure(host, error, started.elapsed()))?;
            // An alias that leads to nothing.
            if found.is_empty() {
                return Err(ResolveError::NoAddresses { name: host.to_owned() });
            }
            Ok(found)
        };
        let (v4, v6) = (pin!(family(RecordType::A)), pin!(family(RecordType::AAAA)));
        let (Either::Left((faster, slower)) | Either::Right((faster, slower))) = select(v4, v6).await;
        let slower = if faster.is_ok() {
            timeout(GRACE, slower).await.unwrap_or_else(|elapsed| Err(silent(elapsed)))
        } else {
            slower.await
        };
        let mut merged = Addresses::merge(faster, slower)?;
        // Who answered first is chance; a stable sort leaves each family in the order of its answer.
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
    // The answer also holds the aliases that led there.
    let records = lookup.answers().iter();
    Ok(records
        .filter(|record| record.record_type() == record_type)
        .filter_map(|record| record.data.ip_addr())
        .collect())
}

/// A TXT record is cut into strings of 255 bytes at most.
fn joined(data: &RData) -> Option<String> {
    let RData::TXT(text) = data else {
        return None;
    };
    Some(String::from_utf8_lossy(&text.txt_data.concat()).into_owned())
}

/// hickory's error in our words.
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

/// Where the name servers come from.
#[derive(Debug)]
enum Source {
    Given(Arc<Setup>),
    System(System),
}

impl Source {
    fn current(&self) -> Arc<Setup> {
        match self {
            Self::Given(setup) => Arc::clone(setup),
            Self::System(system) => system.current(),
        }
    }
}

/// Whom to ask, and what for.
struct Setup {
    name_servers: Vec<NameServerConfig>,
    search: Vec<Name>,
    ndots: usize,
    edns0: bool,
    hosts: Hosts,
}

impl Setup {
    /// `before`: what was read last.
    fn read(files: &Files, before: Option<&Self>) -> Result<Self, NetError> {
        let hosts = Hosts::parse(&read_text(&files.hosts)?.unwrap_or_default());
        // A file that is gone or empty is about to be written: what it said last holds until then.
        if let Some(before) = before.filter(|_| !files.tell_servers()) {
            let (name_servers, search) = (before.name_servers.clone(), before.search.clone());
            return Ok(Self { name_servers, search, ndots: before.ndots, edns0: before.edns0, hosts });
        }
        let (name_servers, conf) = read_resolv_conf(&files.resolv_conf)?;
        Ok(Self { name_servers, search: conf.search, ndots: conf.ndots, edns0: conf.edns0, hosts })
    }

    /// The absolute names that `name` may stand for, in the order in which to try them.
    fn candidates(&self, name: &Name) -> Vec<Name> {
        let mut absolute = name.clone();
        absolute.set_fqdn(true);
        if name.is_fqdn() {
            return vec![absolute];
        }
        // A name that gets too long with its domain is none.
        let searched = self.search.iter().filter_map(|domain| name.clone().append_domain(domain).ok());
        let mut names: Vec<Name> = searched.collect();
        // As many dots as `ndots` means as many labels and one. `localhost` is not sent to any server (RFC 6761).
        let first = usize::from(name.num_labels()) > self.ndots || name.is_localhost();
        names.insert(if first { 0 } else { names.len() }, absolute);
        names
    }
}

impl fmt::Debug for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let servers = self.name_servers.iter().map(|server| {
            let port = server.connections.first().map_or(53, |connection| connection.port);
            SocketAddr::new(server.ip, port)
        });
        f.debug_struct("Setup")
            .field("name_servers", &servers.collect::<Vec<_>>())
            .field("search", &self.search)
            .field("ndots", &self.ndots)
            .finish_non_exhaustive()
    }
}

/// The file's text, whatever bytes are in it; `None` where there is no such file.
fn read_text(file: &Path) -> Result<Option<String>, NetError> {
    match fs::read(file) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn name_server(ip: IpAddr) -> NameServerConfig {
    NameServerConfig::new(ip, true, vec![ConnectionConfig::udp(), ConnectionConfig::tcp()])
}

#[cfg(all(unix, not(any(target_os = "android", target_vendor = "apple"))))]
fn read_resolv_conf(file: &Path) -> Result<(Vec<NameServerConfig>, ResolvConf), NetError> {
    let own_name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let conf = ResolvConf::parse(&read_text(file)?.unwrap_or_default(), own_name.trim()).or_local();
    Ok((conf.servers.iter().copied().map(name_server).collect(), conf))
}

#[cfg(not(all(unix, not(any(target_os = "android", target_vendor = "apple")))))]
fn read_resolv_conf(_: &Path) -> Result<(Vec<NameServerConfig>, ResolvConf), NetError> {
    let (config, options) = hickory_resolver::system_conf::read_system_conf()?;
    let (domain, search, name_servers) = config.into_parts();
    // The domain of the host's own name is what the search list is when there is none.
    let search = if search.is_empty() { Vec::from_iter(domain) } else { search };
    let conf = ResolvConf { servers: Vec::new(), search, ndots: options.ndots, edns0: options.edns0 };
    Ok((name_servers, conf))
}

/// The system's setup, read again when its files have changed.
struct System {
    files: Files,
    last: Mutex<(Stamps, Arc<Setup>)>,
}

impl System {
    fn new(files: Files) -> Result<Self, ResolveError> {
        let stamps = files.stamps();
        let setup = Setup::read(&files, None).map_err(|error| ResolveError::NoConfiguration {
            file: files.resolv_conf.display().to_string(),
            source: Arc::new(error),
        })?;
        Ok(Self { files, last: Mutex::new((stamps, Arc::new(setup))) })
    }

    /// Two calls of `stat`, and no more than that as long as nothing changed.
    fn current(&self) -> Arc<Setup> {
        let mut last = lock(&self.last);
        // Taken before the files are read: what changes while they are is seen the next time.
        let stamps = self.files.stamps();
        if last.0 != stamps {
            match Setup::read(&self.files, Some(&last.1)) {
                Ok(setup) => *last = (stamps, Arc::new(setup)),
                // The stamps stay as they are, so each question tries again: it may be half written.
                Err(error) => tracing::warn!(
                    %error,
                    file = %self.files.resolv_conf.display(),
                    "the resolver configuration has changed and cannot be used; the last one stays in force"
                ),
            }
        }
        Arc::clone(&last.1)
    }
}

impl fmt::Debug for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("System").field(&self.current()).finish()
    }
}

#[derive(Debug)]
struct Files {
    resolv_conf: PathBuf,
    hosts: PathBuf,
}

impl Files {
    /// Does the file name a name server, where it is the one that counts?
    #[cfg(all(unix, not(any(target_os = "android", target_vendor = "apple"))))]
    fn tell_servers(&self) -> bool {
        let text = read_text(&self.resolv_conf).ok().flatten().unwrap_or_default();
        !ResolvConf::parse(&text, "").servers.is_empty()
    }

    #[cfg(not(all(unix, not(any(target_os = "android", target_vendor = "apple")))))]
    fn tell_servers(&self) -> bool {
        true
    }

    fn stamps(&self) -> Stamps {
        [stamp(&self.resolv_conf), stamp(&self.hosts)]
    }
}

/// What tells one version of a file from the next; `None` when there is no such file.
type Stamps = [Option<Stamp>; 2];

#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    len: u64,
    /// Files are often replaced by renaming, sometimes by one of the same length within one tick of the clock.
    inode: u64,
}

fn stamp(file: &Path) -> Option<Stamp> {
    let metadata = fs::metadata(file).ok()?;
    #[cfg(unix)]
    let inode = std::os::unix::fs::MetadataExt::ino(&metadata);
    #[cfg(not(unix))]
    let inode = 0;
    Some(Stamp { modified: metadata.modified().ok(), len: metadata.len(), inode })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with a `resolv.conf` and a `hosts`, gone when dropped.
    struct Etc(PathBuf);

    impl Etc {
        fn new(test: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("resolve-{test}-{}", std::process::id()));
            fs::create_dir_all(&dir).unwrap();
            let etc = Self(dir);
            etc.write("resolv.conf", "nameserver 127.0.0.1\n");
            etc.write("hosts", "");
            etc
        }

        /// As a DHCP client or an orchestrator does it: the new file takes the old one's place at once.
        fn write(&self, file: &str, text: &str) {
            let new = self.0.join("new");
            fs::write(&new, text).unwrap();
            fs::rename(new, self.0.join(file)).unwrap();
        }

        fn resolver(&self) -> Result<HickoryResolver, ResolveError> {
            HickoryResolver::from_files(Files { resolv_conf: self.0.join("resolv.conf"), hosts: self.0.join("hosts") })
        }
    }

    impl Drop for Etc {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn servers(resolver: &HickoryResolver) -> Vec<String> {
        let setup = resolver.setup.current();
        setup.name_servers.iter().map(|server| server.ip.to_string()).collect()
    }

    fn candidates(resolv_conf: &str, host: &str) -> Vec<String> {
        let etc = Etc::new(&format!("candidates-{}-{host}", resolv_conf.len()));
        etc.write("resolv.conf", &format!("nameserver 127.0.0.1\n{resolv_conf}\n"));
        let setup = etc.resolver().unwrap().setup.current();
        let names = setup.candidates(&Name::from_str_relaxed(host).unwrap());
        names.iter().map(Name::to_string).collect()
    }

    async fn found(resolver: &HickoryResolver, host: &str) -> Vec<String> {
        let found = resolver.resolve(host).await.unwrap();
        found.iter().map(|address| address.to_string()).collect()
    }

    #[test]
    fn d7_a_new_resolv_conf_is_read_before_the_next_question() {
        let etc = Etc::new("d7-new");
        let resolver = etc.resolver().unwrap();
        assert_eq!(servers(&resolver), ["127.0.0.1"]);
        // As long as the old text, and most likely within the same tick of the file system's clock.
        etc.write("resolv.conf", "nameserver 127.0.0.2\n");
        assert_eq!(servers(&resolver), ["127.0.0.2"]);
        etc.write("resolv.conf", "nameserver fdaa::3\nnameserver 127.0.0.4\n");
        assert_eq!(servers(&resolver), ["fdaa::3", "127.0.0.4"]);
    }

    #[test]
    fn d7_an_unchanged_file_is_not_read_again() {
        let etc = Etc::new("d7-unchanged");
        let resolver = etc.resolver().unwrap();
        assert!(Arc::ptr_eq(&resolver.setup.current(), &resolver.setup.current()));
    }

    #[test]
    fn d7_a_file_that_cannot_be_used_leaves_the_old_one_in_force() {
        let etc = Etc::new("d7-bad");
        let resolver = etc.resolver().unwrap();
        for bad in ["", "search internal\n"] {
            etc.write("resolv.conf", bad);
            assert_eq!(servers(&resolver), ["127.0.0.1"]);
        }
        fs::remove_file(etc.0.join("resolv.conf")).unwrap();
        assert_eq!(servers(&resolver), ["127.0.0.1"]);
        etc.write("resolv.conf", "nameserver 127.0.0.2\n");
        assert_eq!(servers(&resolver), ["127.0.0.2"]);
    }

    #[tokio::test]
    async fn d7_without_a_name_server_the_one_on_this_host_is_asked() {
        let etc = Etc::new("d7-none");
        etc.write("resolv.conf", "options ndots:5\n");
        assert_eq!(servers(&etc.resolver().unwrap()), ["127.0.0.1"]);
        fs::remove_file(etc.0.join("resolv.conf")).unwrap();
        etc.write("hosts", "10.0.0.1 pg.internal\nfe80::1%eth0 far.internal\n");
        let resolver = etc.resolver().unwrap();
        assert_eq!(servers(&resolver), ["127.0.0.1"]);
        assert_eq!(found(&resolver, "pg.internal").await, ["10.0.0.1"], "the hosts file is read all the same");
        let error = resolver.resolve("far.internal").await.unwrap_err();
        assert!(error.to_string().contains("fe80::1%eth0"), "{error}");
        etc.write("hosts", "10.0.0.2 pg.internal\n");
        assert_eq!(found(&resolver, "pg.internal").await, ["10.0.0.2"]);
        // A file that appears later counts.
        etc.write("resolv.conf", "search bad..domain corp.example # junk\nnameserver 127.0.0.2 junk\n");
        assert_eq!(servers(&resolver), ["127.0.0.2"]);
    }

    #[tokio::test]
    async fn d7_names_of_the_hosts_file_are_followed_too() {
        let etc = Etc::new("d7-hosts");
        etc.write("resolv.conf", "nameserver 127.0.0.1\nsearch a.internal b.internal\noptions ndots:5\n");
        etc.write("hosts", "10.0.0.1 PG pg.internal # the primary\n::1 pg\n");
        let resolver = etc.resolver().unwrap();
        assert_eq!(found(&resolver, "pg").await, ["10.0.0.1", "::1"]);
        assert_eq!(found(&resolver, "pg.INTERNAL.").await, ["10.0.0.1"]);
        etc.write("hosts", "10.0.0.2 pg pg.internal # the primary\n::1 pg\n");
        assert_eq!(found(&resolver, "pg.internal").await, ["10.0.0.2"]);
        fs::remove_file(etc.0.join("hosts")).unwrap();
        assert_eq!(found(&resolver, "localhost").await, ["127.0.0.1", "::1"]);
    }

    #[tokio::test]
    async fn localhost_is_known_to_the_system() {
        let Ok(resolver) = HickoryResolver::system() else {
            return; // a machine without a name server
        };
        let addresses = resolver.resolve("localhost").await.unwrap();
        assert!(addresses.iter().all(|address| address.is_loopback()), "{addresses:?}");
    }

    #[test]
    fn d6_search_domains_and_ndots() {
        let kubernetes = "search x.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5";
        assert_eq!(
            candidates(kubernetes, "my-pg.internal"),
            [
                "my-pg.internal.x.svc.cluster.local.",
                "my-pg.internal.svc.cluster.local.",
                "my-pg.internal.cluster.local.",
                "my-pg.internal."
            ]
        );
        assert_eq!(candidates(kubernetes, "my-pg.internal."), ["my-pg.internal."]);
        assert_eq!(candidates("search corp.example", "pg.internal"), ["pg.internal.", "pg.internal.corp.example."]);
        assert_eq!(candidates("search corp.example", "pg"), ["pg.corp.example.", "pg."]);
        assert_eq!(candidates("domain corp.example", "pg"), ["pg.corp.example.", "pg."]);
    }

    #[test]
    fn a_resolver_prints_whom_it_asks() {
        let resolver = HickoryResolver::with_name_servers([([10, 0, 0, 2], 5353).into()]);
        let text = format!("{resolver:?}");
        assert!(text.contains("10.0.0.2:5353"), "{text}");
    }
}
