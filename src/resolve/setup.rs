//! Which name servers to ask, and for which names. Either the user gives them, or the files of the system do, which are
//! read again when they change.

use std::error::Error;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;
use std::{fmt, fs};

use hickory_resolver::config::{ConnectionConfig, NameServerConfig};
use hickory_resolver::proto::rr::Name;

use super::ResolveError;
use super::system::{HostsFile, ResolvConf};
use crate::sync::lock;

/// Where the name servers come from.
#[derive(Debug)]
pub(super) enum Source {
    Given(Arc<ResolverSetup>),
    System(System),
}

impl Source {
    pub(super) fn current(&self) -> Arc<ResolverSetup> {
        match self {
            Self::Given(setup) => Arc::clone(setup),
            Self::System(system) => system.current(),
        }
    }
}

/// Which name servers to ask, and for which names.
pub(super) struct ResolverSetup {
    pub(super) name_servers: Vec<NameServerConfig>,
    /// A name server that cannot be asked, because its address includes an interface.
    pub(super) scoped: Option<String>,
    pub(super) search: Vec<Name>,
    pub(super) ndots: usize,
    pub(super) edns0: bool,
    pub(super) hosts: HostsFile,
}

impl ResolverSetup {
    /// Reads the files. `before` is what was read last.
    fn read(files: &Files, before: Option<&Self>) -> Result<Self, Unusable> {
        let hosts = HostsFile::parse(&read_text(&files.hosts)?.unwrap_or_default());
        // A missing or empty file is probably about to be written. Until then, its last contents stay in force.
        if let Some(before) = before.filter(|_| !files.tell_servers()) {
            let (name_servers, search) = (before.name_servers.clone(), before.search.clone());
            let scoped = before.scoped.clone();
            return Ok(Self { name_servers, scoped, search, ndots: before.ndots, edns0: before.edns0, hosts });
        }
        let (name_servers, conf) = read_resolv_conf(&files.resolv_conf)?;
        let ResolvConf { scoped, search, ndots, edns0, .. } = conf;
        Ok(Self { name_servers, scoped, search, ndots, edns0, hosts })
    }

    /// The absolute names that `name` may stand for, in the order in which to try them.
    pub(super) fn candidates(&self, name: &Name) -> Vec<Name> {
        let mut absolute = name.clone();
        absolute.set_fqdn(true);
        if name.is_fqdn() {
            return vec![absolute];
        }
        // A name that gets too long with its domain cannot exist, so it is left out.
        let searched = self.search.iter().filter_map(|domain| name.clone().append_domain(domain).ok());
        let mut names: Vec<Name> = searched.collect();
        // A name with `ndots` dots has one label more than that. `localhost` is not sent to any server (RFC 6761).
        let first = usize::from(name.num_labels()) > self.ndots || name.is_localhost();
        names.insert(if first { 0 } else { names.len() }, absolute);
        names
    }
}

impl fmt::Debug for ResolverSetup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let servers = self.name_servers.iter().map(|server| {
            let port = server.connections.first().map_or(53, |connection| connection.port);
            SocketAddr::new(server.ip, port)
        });
        f.debug_struct("ResolverSetup")
            .field("name_servers", &servers.collect::<Vec<_>>())
            .field("search", &self.search)
            .field("ndots", &self.ndots)
            .finish_non_exhaustive()
    }
}

/// Returns the text of the file, even if it is not valid UTF-8. `None` if the file system itself is the reason that it
/// cannot be read: as in glibc, such a file counts as missing. Other failures may be temporary, for instance a lack of
/// file descriptors.
fn read_text(file: &Path) -> Result<Option<String>, Unusable> {
    match fs::read(file) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if lies_in_the_file_system(&error) => Ok(None),
        Err(error) => Err(Unusable { file: file.to_owned(), source: Arc::new(error) }),
    }
}

/// The number of the error for a circle of symbolic links, for which `ErrorKind` has no stable name.
const LINKS_IN_A_CIRCLE: i32 = if cfg!(target_os = "linux") { 40 } else { 62 };

/// glibc's list in `resolv/res_init.c`.
fn lies_in_the_file_system(error: &io::Error) -> bool {
    let kinds = [ErrorKind::NotFound, ErrorKind::PermissionDenied, ErrorKind::IsADirectory, ErrorKind::NotADirectory];
    kinds.contains(&error.kind()) || (cfg!(unix) && error.raw_os_error() == Some(LINKS_IN_A_CIRCLE))
}

/// A file that cannot be used, and why.
#[derive(Debug)]
struct Unusable {
    file: PathBuf,
    source: Arc<dyn Error + Send + Sync>,
}

fn name_server(ip: IpAddr) -> NameServerConfig {
    NameServerConfig::new(ip, true, vec![ConnectionConfig::udp(), ConnectionConfig::tcp()])
}

#[cfg(all(unix, not(any(target_os = "android", target_vendor = "apple"))))]
fn read_resolv_conf(file: &Path) -> Result<(Vec<NameServerConfig>, ResolvConf), Unusable> {
    let own_name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let conf = ResolvConf::parse(&read_text(file)?.unwrap_or_default(), own_name.trim()).or_local();
    Ok((conf.servers.iter().copied().map(name_server).collect(), conf))
}

#[cfg(not(all(unix, not(any(target_os = "android", target_vendor = "apple")))))]
fn read_resolv_conf(file: &Path) -> Result<(Vec<NameServerConfig>, ResolvConf), Unusable> {
    let unusable = |error| Unusable { file: file.to_owned(), source: Arc::new(error) };
    let (config, options) = hickory_resolver::system_conf::read_system_conf().map_err(unusable)?;
    let (domain, search, name_servers) = config.into_parts();
    // Without a search list, the domain of the host's own name is searched.
    let search = if search.is_empty() { Vec::from_iter(domain) } else { search };
    let conf = ResolvConf { servers: Vec::new(), scoped: None, search, ndots: options.ndots, edns0: options.edns0 };
    Ok((name_servers, conf))
}

/// The setup of the system, which is read again when its files have changed.
pub(super) struct System {
    files: Files,
    last: Mutex<Last>,
}

/// What was read last.
struct Last {
    stamps: Stamps,
    setup: Arc<ResolverSetup>,
    /// Why the files cannot be used now, as written to the log. It prevents a second line with the same text.
    complaint: Option<String>,
}

impl Last {
    /// Writes one line for all questions that meet the same trouble.
    fn complain(&mut self, unusable: &Unusable) {
        let complaint = format!("{}: {}", unusable.file.display(), unusable.source);
        if self.complaint.as_ref() == Some(&complaint) {
            return;
        }
        tracing::warn!(
            error = %unusable.source,
            file = %unusable.file.display(),
            "the resolver configuration has changed and cannot be used; the last one stays in force"
        );
        self.complaint = Some(complaint);
    }
}

impl System {
    pub(super) fn new(files: Files) -> Result<Self, ResolveError> {
        let stamps = files.stamps();
        let setup = ResolverSetup::read(&files, None).map_err(|unusable| ResolveError::NoConfiguration {
            file: unusable.file.display().to_string(),
            source: unusable.source,
        })?;
        Ok(Self { files, last: Mutex::new(Last { stamps, setup: Arc::new(setup), complaint: None }) })
    }

    /// The current setup. It costs two calls of `stat` as long as no file has changed.
    fn current(&self) -> Arc<ResolverSetup> {
        let mut last = lock(&self.last);
        // The stamps are taken before the files are read, so a change in between is noticed next time.
        let stamps = self.files.stamps();
        if last.stamps != stamps {
            match ResolverSetup::read(&self.files, Some(&last.setup)) {
                Ok(setup) => *last = Last { stamps, setup: Arc::new(setup), complaint: None },
                // The file may be half written. The old stamps are kept, so that each question tries again.
                Err(unusable) => last.complain(&unusable),
            }
        }
        Arc::clone(&last.setup)
    }
}

impl fmt::Debug for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("System").field(&self.current()).finish()
    }
}

#[derive(Debug)]
pub(super) struct Files {
    pub(super) resolv_conf: PathBuf,
    pub(super) hosts: PathBuf,
}

impl Files {
    /// Returns whether resolv.conf names a name server. It is always true on systems that do not use that file.
    #[cfg(all(unix, not(any(target_os = "android", target_vendor = "apple"))))]
    fn tell_servers(&self) -> bool {
        let text = read_text(&self.resolv_conf).ok().flatten().unwrap_or_default();
        let conf = ResolvConf::parse(&text, "");
        !conf.servers.is_empty() || conf.scoped.is_some()
    }

    #[cfg(not(all(unix, not(any(target_os = "android", target_vendor = "apple")))))]
    fn tell_servers(&self) -> bool {
        true
    }

    fn stamps(&self) -> Stamps {
        [stamp(&self.resolv_conf), stamp(&self.hosts)]
    }
}

/// The stamps of resolv.conf and of the hosts file. `None` means that there is no such file.
type Stamps = [Option<Stamp>; 2];

#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    len: u64,
    /// Files are often replaced by renaming, and the new one may have the same length and the same time.
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
