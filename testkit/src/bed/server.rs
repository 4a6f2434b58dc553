//! The PostgreSQL installation: where its programs are, as whom they run, and the template that clusters are copied
//! from.

use std::collections::hash_map::DefaultHasher;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::hash::{Hash as _, Hasher as _};
use std::io::{Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::{env, process};

use rustix::fs::{FlockOperation, flock, statvfs};
use rustix::process::getuid;

use crate::Error;
use crate::bed::process::Reaper;

/// Every node's settings; what differs by node (address, port, name) is given on the command line.
///
/// `full_page_writes` and `wal_log_hints` are what `pg_rewind` asks for. Nothing lies outside the data folder: no
/// socket files, and no dynamic shared memory in `/dev/shm`, which a killed server would leave behind.
const SETTINGS: &str = "
fsync = off
synchronous_commit = on
full_page_writes = on
wal_log_hints = on
wal_level = replica
hot_standby = on
shared_buffers = 16MB
max_connections = 100
max_wal_senders = 8
max_replication_slots = 8
wal_keep_size = 64MB
wal_retrieve_retry_interval = 50ms
wal_receiver_timeout = 3s
wal_sender_timeout = 3s
max_logical_replication_workers = 0
autovacuum = off
jit = off
bgwriter_lru_maxpages = 0
restart_after_crash = on
password_encryption = 'scram-sha-256'
logging_collector = off
log_checkpoints = off
log_line_prefix = '%m [%p] '
unix_socket_directories = ''
dynamic_shared_memory_type = mmap
";

/// The caller's lines may stand before these; the first that matches counts.
const HBA: &str = "
host all all 127.0.0.0/8 trust
host replication all 127.0.0.0/8 trust
";

/// Run by the server in single-user mode, in these databases. A statement ends at a semicolon and an empty line.
/// The databases that nobody uses are dropped: starting a cluster is mostly copying, and each is 7 MB.
const SCHEMA: [(&str, &str); 2] = [
    (
        "postgres",
        "CREATE ROLE app LOGIN;\n\nCREATE DATABASE app OWNER app;\n\n\
         UPDATE pg_database SET datistemplate = false WHERE datname = 'template0';\n\nDROP DATABASE template0;\n\n",
    ),
    (
        "app",
        "DROP DATABASE postgres;\n\nALTER SCHEMA public OWNER TO app;\n\nCREATE SCHEMA testbed;\n\n\
         CREATE TABLE testbed.probe (writes bigint NOT NULL);\n\n\
         INSERT INTO testbed.probe VALUES (0);\n\nCHECKPOINT;\n\n",
    ),
];

/// `initdb`'s choices. Small WAL segments make a small template.
const INITDB: [&str; 7] = [
    "--no-sync",
    "--locale=C",
    "--encoding=UTF8",
    "--auth=trust",
    "--username=postgres",
    "--wal-segsize=1",
    "--pgdata",
];

/// The template's own size. A standby refuses to start with less than its control file says the primary had, so this is
/// the least that a cluster can be given by [`ClusterBuilder::setting`](crate::bed::ClusterBuilder::setting).
const SMALL: [&str; 5] = [
    "max_connections=4",
    "max_wal_senders=0",
    "max_worker_processes=0",
    "max_prepared_transactions=0",
    "max_locks_per_transaction=10",
];

/// A folder must hold all of these: some installations link only a few programs into PATH. Without `pg_rewind` an old
/// primary is copied anew.
const PROGRAMS: [&str; 3] = ["postgres", "initdb", "pg_basebackup"];

/// Where clusters live when there is room: their files never reach a disk.
const MEMORY: &str = "/dev/shm";
const ENOUGH_MEMORY: u64 = 4 << 30;

/// The installed server.
pub struct Server {
    programs: PathBuf,
    /// The servers' user and group when the tests run as root, which PostgreSQL refuses to.
    user: Option<(u32, u32)>,
    cache: PathBuf,
    clusters: PathBuf,
}

impl Server {
    /// Found once per process.
    pub fn installed() -> &'static Self {
        Self::find().unwrap_or_else(|error| panic!("testbed: {error}"))
    }

    /// [`Server::installed`], with the reason as a value where it cannot be used.
    pub fn find() -> Result<&'static Self, Error> {
        static SERVER: OnceLock<Result<Server, Error>> = OnceLock::new();
        SERVER.get_or_init(Self::look).as_ref().map_err(Clone::clone)
    }

    fn look() -> Result<Self, Error> {
        let programs = programs()?;
        let version = version(&programs.join("postgres"))?;
        let mut contents = DefaultHasher::new();
        (SETTINGS, HBA, SCHEMA, INITDB, SMALL).hash(&mut contents);
        let name =
            format!("tokio-postgres-failover-testbed-{}-pg{version}-{:016x}", getuid().as_raw(), contents.finish());
        let memory = Path::new(MEMORY);
        let roomy = statvfs(memory).is_ok_and(|fs| fs.f_bavail.saturating_mul(fs.f_frsize) >= ENOUGH_MEMORY);
        let clusters = if roomy { memory.to_owned() } else { env::temp_dir() };
        let user = if getuid().is_root() { Some(servers_user()?) } else { None };
        for folder in [&env::temp_dir(), &clusters] {
            user.map_or(Ok(()), |user| passable(folder, user))?;
        }
        Ok(Self {
            programs,
            user,
            cache: own_folder(&env::temp_dir().join(&name))?,
            clusters: own_folder(&clusters.join(&name))?,
        })
    }

    /// The folder of the server's programs.
    pub fn programs(&self) -> &Path {
        &self.programs
    }

    /// The folder of a new cluster; not made yet.
    pub fn cluster_folder(&self, tag: &str) -> PathBuf {
        self.clusters.join(tag)
    }

    /// A program of the server, or another one by its whole path, run by the right user in `folder`, in a process group
    /// of its own: a Ctrl-C for the tests is no shutdown request. libpq's variables are taken away, they would redirect
    /// `pg_rewind`.
    pub fn command(&self, program: impl AsRef<Path>, folder: &Path) -> Command {
        let mut command = Command::new(self.programs.join(program));
        command.current_dir(folder).env("LC_ALL", "C").process_group(0).stdin(Stdio::null());
        for (name, _) in env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"PG")) {
            command.env_remove(name);
        }
        if let Some((user, group)) = self.user {
            // `uid` drops the supplementary groups as well.
            command.uid(user).gid(group);
        }
        command
    }

    /// Gives a file or folder to the servers' user.
    pub fn give(&self, path: &Path) {
        if let Some((user, group)) = self.user {
            chown(path, Some(user), Some(group)).unwrap_or_else(|error| panic!("chown {}: {error}", path.display()));
        }
    }

    /// The data folder to copy: an initialised, cleanly stopped server with the database `app`. Made once per machine.
    ///
    /// A second one, the `foreign`, has another system identifier.
    pub fn template(&self, foreign: bool) -> PathBuf {
        let name = if foreign { "foreign" } else { "template" };
        let template = self.cache.join(name);
        if template.exists() {
            return template;
        }
        // Held until the return; the kernel lets go of it when a builder dies.
        let lock = File::create(self.cache.join(format!("{name}.lock"))).expect("the cache is writable");
        flock(&lock, FlockOperation::LockExclusive).expect("flock");
        if template.exists() {
            return template;
        }
        // The reaper removes a half-built folder; what it is renamed to, it does not know.
        let folder = self.cache.join(format!("build-{name}-{}", process::id()));
        let _reaper = Reaper::watch(&folder);
        make_folder(&folder);
        self.give(&folder);
        let data = folder.join("data");
        run(self.command("initdb", &folder).args(INITDB).arg(&data));
        append(&data.join("postgresql.conf"), SETTINGS);
        fs::write(data.join("pg_hba.conf"), HBA).expect("pg_hba.conf");
        for (database, sql) in SCHEMA {
            let mut script = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(folder.join("schema.sql"))
                .expect("schema.sql");
            script.write_all(sql.as_bytes()).expect("schema.sql");
            script.rewind().expect("schema.sql");
            let output = run(self
                .command("postgres", &folder)
                .args(["--single", "-j", "-D"])
                .arg(&data)
                .args(SMALL.iter().flat_map(|setting| ["-c", setting]))
                .arg(database)
                .stdin(script));
            // Single-user mode goes on after an error and succeeds.
            assert!(!output.contains("ERROR"), "the template's schema: {output}");
        }
        fs::rename(&data, &template).expect("rename the template");
        template
    }
}

/// Runs a program to its end and returns what it said.
pub fn run(command: &mut Command) -> String {
    match try_run(command) {
        Ok(output) => output,
        Err(output) => panic!("{command:?} failed: {output}"),
    }
}

/// [`run`], with a failure as a value.
pub fn try_run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| error.to_string())?;
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() { Ok(text) } else { Err(text) }
}

/// Adds text to a file that exists.
pub fn append(file: &Path, text: &str) {
    let opened = File::options().append(true).open(file);
    opened
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .unwrap_or_else(|error| panic!("{}: {error}", file.display()));
}

/// A folder that the servers' user may pass through.
pub fn make_folder(folder: &Path) {
    DirBuilder::new().mode(0o755).create(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
}

/// A folder with a foreseeable name in a shared place: made, or found to be ours.
fn own_folder(folder: &Path) -> Result<PathBuf, Error> {
    if let Err(error) = DirBuilder::new().mode(0o755).create(folder) {
        let ours = fs::symlink_metadata(folder).is_ok_and(|found| found.is_dir() && found.uid() == getuid().as_raw());
        if !ours {
            let reason = format!("{} cannot be made ({error}) and is not a folder of this user", folder.display());
            return Err(Error::failed("preparing the servers' files", reason));
        }
    }
    Ok(folder.to_owned())
}

/// Fails if the servers' user cannot pass through a folder, or through one above it.
fn passable(folder: &Path, (user, group): (u32, u32)) -> Result<(), Error> {
    let closed = |folder: &&Path| {
        fs::metadata(folder).is_ok_and(|found| {
            let (owner, owners) = (found.uid() == user, found.gid() == group);
            found.mode()
                & if owner {
                    0o100
                } else if owners {
                    0o010
                } else {
                    0o001
                }
                == 0
        })
    };
    let Some(closed) = folder.ancestors().find(closed) else { return Ok(()) };
    let reason = format!(
        "the tests run as root and the servers as another user, who cannot pass through {}; set TMPDIR to a folder \
         that everybody may pass through",
        closed.display()
    );
    Err(Error::failed("preparing the servers' files", reason))
}

/// As `15.18` of "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)".
fn version(postgres: &Path) -> Result<String, Error> {
    let failed = |reason| Error::failed(&format!("asking {} for its version", postgres.display()), reason);
    let output = Command::new(postgres).arg("--version").output().map_err(|error| failed(error.to_string()))?;
    let said = String::from_utf8_lossy(&output.stdout);
    said.split_whitespace().nth(2).map(ToOwned::to_owned).ok_or_else(|| failed(format!("it says {said:?}")))
}

/// Folders of packages that leave the programs out of PATH: parent, what stands before the version, what follows.
const PACKAGES: [(&str, &str, &str); 6] = [
    ("/usr/lib/postgresql", "", "bin"),
    ("/usr", "pgsql-", "bin"),
    ("/usr/lib", "postgresql", "bin"),
    ("/home/linuxbrew/.linuxbrew/opt", "postgresql@", "bin"),
    ("/opt/homebrew/opt", "postgresql@", "bin"),
    ("/usr/local/opt", "postgresql@", "bin"),
];

fn programs() -> Result<PathBuf, Error> {
    if let Some(folder) = env::var_os("PG_BIN") {
        let folder = Path::new(&folder);
        return complete(folder).ok_or_else(|| Error::NoPostgres { searched: format!("PG_BIN={}", folder.display()) });
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = env::split_paths(&path).collect();
    for (parent, prefix, below) in PACKAGES {
        let mut versions: Vec<(u32, PathBuf)> = fs::read_dir(parent)
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let version = entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()?;
                Some((version, entry.path().join(below)))
            })
            .collect();
        versions.sort();
        folders.extend(versions.into_iter().rev().map(|(_, folder)| folder));
    }
    let packages = PACKAGES.map(|(parent, prefix, below)| format!("{parent}/{prefix}*/{below}")).join(", ");
    let searched = || format!("PATH, {packages}");
    folders.iter().find_map(|folder| complete(folder)).ok_or_else(|| Error::NoPostgres { searched: searched() })
}

/// The folder that really holds the programs, if it holds all of them: links are followed, a server finds its files
/// from there.
fn complete(folder: &Path) -> Option<PathBuf> {
    let real = fs::canonicalize(folder.join("postgres")).ok()?;
    let folder = real.parent()?;
    PROGRAMS.iter().all(|program| folder.join(program).is_file()).then(|| folder.to_owned())
}

/// As whom the servers run when the tests run as root. Where PostgreSQL was unpacked without its package there is no
/// `postgres`; any user without rights will do.
fn servers_user() -> Result<(u32, u32), Error> {
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    user(&users, "postgres").or_else(|| user(&users, "nobody")).ok_or(Error::NoUser)
}

/// User and group of this name, in the lines of `/etc/passwd`.
fn user(users: &str, name: &str) -> Option<(u32, u32)> {
    users.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then_some(())?;
        Some((fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?))
    })
}

/// Copies a data folder, sharing blocks where the file system can.
pub fn copy(from: &Path, to: &Path) {
    run(Command::new("cp")
        .args([OsStr::new("-a"), OsStr::new("--reflink=auto"), from.as_os_str(), to.as_os_str()])
        .process_group(0));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_found_by_the_whole_name() {
        let users = "root:x:0:0:root:/root:/bin/sh\npostgresql:x:7:8::/:/bin/sh\npostgres:x:105:113::/:/bin/sh\n";
        assert_eq!(user(users, "postgres"), Some((105, 113)));
        assert_eq!(user(users, "nobody"), None);
        assert_eq!(user("postgres:x:many:113", "postgres"), None);
    }
}
