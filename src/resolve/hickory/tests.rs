use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use hickory_resolver::proto::op::Message;
use hickory_resolver::proto::rr::Record;
use tokio::net::UdpSocket;

use super::*;

/// A directory with a `resolv.conf` and a `hosts`. Dropping this removes it.
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

    /// Replaces the file by renaming a new one, as a DHCP client or an orchestrator does.
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
    // The new text is as long as the old one, and most likely written within the same tick of the file system's clock.
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

/// Counts the log's lines.
#[derive(Clone, Default)]
struct Lines(Arc<AtomicUsize>);

impl std::io::Write for Lines {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// There is one line, however many questions meet the same file.
#[cfg(target_os = "linux")]
#[test]
fn d7_a_file_that_cannot_be_used_is_one_line_of_the_log() {
    let etc = Etc::new("d7-line");
    let resolver = etc.resolver().unwrap();
    fs::remove_file(etc.0.join("hosts")).unwrap();
    // Reading it fails with EIO.
    std::os::unix::fs::symlink("/proc/self/mem", etc.0.join("hosts")).unwrap();
    let lines = Lines::default();
    let writer = {
        let lines = lines.clone();
        move || lines.clone()
    };
    let log = tracing_subscriber::fmt().with_writer(writer).finish();
    tracing::subscriber::with_default(log, || {
        for _ in 0..50 {
            assert_eq!(servers(&resolver), ["127.0.0.1"]);
        }
    });
    assert_eq!(lines.0.load(Ordering::Relaxed), 1);
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

/// As in the C library, a file counts as missing if the file system is the reason that it cannot be read.
#[tokio::test]
async fn d7_a_file_that_cannot_be_read_is_no_file() {
    let etc = Etc::new("d7-unreadable");
    let is_a_directory = etc.0.join("directory");
    fs::create_dir(&is_a_directory).unwrap();
    let in_no_directory = etc.0.join("hosts").join("file");
    let itself = etc.0.join("itself");
    std::os::unix::fs::symlink(&itself, &itself).unwrap();
    for unreadable in [is_a_directory, in_no_directory, itself] {
        let files = Files { resolv_conf: unreadable.clone(), hosts: etc.0.join("hosts") };
        etc.write("hosts", "10.0.0.1 pg.internal\n");
        let resolver = HickoryResolver::from_files(files).unwrap();
        assert_eq!(servers(&resolver), ["127.0.0.1"], "{unreadable:?}");
        assert_eq!(found(&resolver, "pg.internal").await, ["10.0.0.1"], "{unreadable:?}");
        let files = Files { resolv_conf: etc.0.join("resolv.conf"), hosts: unreadable.clone() };
        let resolver = HickoryResolver::from_files(files).unwrap();
        assert_eq!(servers(&resolver), ["127.0.0.1"], "{unreadable:?}");
    }
    // If a file becomes unreadable, its last contents stay in force.
    let resolver = etc.resolver().unwrap();
    etc.write("resolv.conf", "nameserver 127.0.0.9\n");
    assert_eq!(servers(&resolver), ["127.0.0.9"]);
    fs::remove_file(etc.0.join("resolv.conf")).unwrap();
    fs::create_dir(etc.0.join("resolv.conf")).unwrap();
    assert_eq!(servers(&resolver), ["127.0.0.9"]);
}

/// A name server whose address includes an interface cannot be asked. If it is the only one, no other server is asked
/// in its place, and the error names it.
#[tokio::test]
async fn d7_a_name_server_with_an_interface_is_named() {
    let etc = Etc::new("d7-scoped");
    etc.write("resolv.conf", "nameserver fe80::1%eth0\n");
    let resolver = etc.resolver().unwrap();
    assert_eq!(servers(&resolver), [""; 0]);
    let error = resolver.resolve("pg.internal").await.unwrap_err();
    for word in ["fe80::1%eth0", "interface"] {
        assert!(error.to_string().contains(word), "{error}");
    }
    assert!(!error.is_answer(), "it says nothing about the name");
    etc.write("resolv.conf", "nameserver fe80::1%eth0\nnameserver 127.0.0.2\n");
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

/// What a [`NameServer`] says about a name and an address family.
#[derive(Clone, Copy)]
enum Reply {
    Address(IpAddr),
    NoSuchName,
    Silence,
}

/// A name server on loopback. The packed crate has these tests but not the test bed, so the server is here.
struct NameServer {
    address: SocketAddr,
    replies: Arc<Mutex<HashMap<(String, RecordType), Reply>>>,
    /// Accepts connections, and never answers on one.
    _tcp: std::net::TcpListener,
}

impl NameServer {
    async fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let server = Self { address, replies: Arc::default(), _tcp: std::net::TcpListener::bind(address).unwrap() };
        let replies = Arc::clone(&server.replies);
        tokio::spawn(async move {
            let mut buffer = [0; 4096];
            loop {
                let (length, client) = socket.recv_from(&mut buffer).await.unwrap();
                let mut message = Message::from_vec(&buffer[..length]).unwrap().into_response();
                let asked = (message.queries[0].name().to_string(), message.queries[0].query_type());
                match lock(&replies)[&asked] {
                    Reply::Address(address) => {
                        let name = message.queries[0].name().clone();
                        message.add_answer(Record::from_rdata(name, 0, address.into()));
                    }
                    Reply::NoSuchName => message.metadata.response_code = ResponseCode::NXDomain,
                    Reply::Silence => continue,
                }
                socket.send_to(&message.to_vec().unwrap(), client).await.unwrap();
            }
        });
        server
    }

    fn reply(&self, name: &str, a: Reply, aaaa: Reply) {
        let mut replies = lock(&self.replies);
        replies.insert((name.to_owned(), RecordType::A), a);
        replies.insert((name.to_owned(), RecordType::AAAA), aaaa);
    }
}

/// A name server drops the questions for one address family. As in the C library, its answer for the other family
/// counts: the search list goes on behind a name that does not exist.
#[tokio::test]
async fn d6_a_silent_family_does_not_end_the_search_list() {
    let dns = NameServer::start().await;
    let resolver = || {
        let mut resolver = HickoryResolver::with_name_servers([dns.address]).timeout(Duration::from_millis(500));
        let Source::Given(setup) = &mut resolver.setup else { unreachable!("they were given") };
        let setup = Arc::get_mut(setup).expect("nobody else has it");
        setup.search = ["a.example.", "b.example."].map(|domain| Name::from_ascii(domain).unwrap()).to_vec();
        setup.ndots = 5;
        resolver
    };
    for silent in ["AAAA", "A"] {
        let but = |name, reply| match silent {
            "AAAA" => dns.reply(name, reply, Reply::Silence),
            _ => dns.reply(name, Reply::Silence, reply),
        };
        let address: IpAddr = if silent == "AAAA" { [10, 0, 0, 1].into() } else { "fdaa::1".parse().unwrap() };
        but("pg.a.example.", Reply::NoSuchName);
        but("pg.b.example.", Reply::Address(address));
        let resolver = resolver();
        let addresses = resolver.resolve("pg").await.unwrap();
        assert_eq!(addresses.iter().collect::<Vec<_>>(), [address], "{silent}");
        assert!(addresses.partial().is_some(), "{silent}");
        // No name has an address. What was silent may have one.
        but("pg.b.example.", Reply::NoSuchName);
        but("pg.", Reply::NoSuchName);
        assert!(!resolver.resolve("pg").await.unwrap_err().is_answer(), "{silent}");
        // The silence of both families ends the list.
        but("pg.a.example.", Reply::Silence);
        but("pg.b.example.", Reply::Address(address));
        assert!(matches!(resolver.resolve("pg").await, Err(ResolveError::TimedOut { .. })), "{silent}");
    }
}

#[test]
fn a_resolver_prints_whom_it_asks() {
    let resolver = HickoryResolver::with_name_servers([([10, 0, 0, 2], 5353).into()]);
    let text = format!("{resolver:?}");
    assert!(text.contains("10.0.0.2:5353"), "{text}");
}
