//! Reads `/etc/resolv.conf` and `/etc/hosts` as the C library (glibc) does. It skips what makes no sense and reads the
//! rest as usual.
//!
//! This module is pure: text goes in. Sources: `__res_vinit` in glibc's `resolv/res_init.c`, and `hosts(5)`.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_resolver::proto::rr::Name;

use super::Addresses;

/// glibc's `MAXNS`. If there are more name servers, only the first ones are asked.
const MAX_SERVERS: usize = 3;
/// glibc's `RES_MAXNDOTS`.
const MAX_NDOTS: usize = 15;
/// The most search domains that are used. More are a mistake, and each of them costs one question for every unknown
/// name.
const MAX_SEARCH: usize = 32;

/// What a `resolv.conf` says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ResolvConf {
    pub(super) servers: Vec<IpAddr>,
    /// A name server whose address includes an interface, as in `fe80::1%eth0`. glibc would ask it.
    pub(super) scoped: Option<String>,
    pub(super) search: Vec<Name>,
    pub(super) ndots: usize,
    pub(super) edns0: bool,
}

impl ResolvConf {
    /// `own_name` is the name of this host. Its domain is searched if the file names no search domain.
    pub(super) fn parse(text: &str, own_name: &str) -> Self {
        let mut found = Self { servers: Vec::new(), scoped: None, search: Vec::new(), ndots: 1, edns0: false };
        let mut search: Option<Vec<&str>> = None;
        for line in text.lines() {
            // As in glibc, a keyword must begin its line, so an indented one is skipped.
            let Some((keyword, rest)) = line.split_once([' ', '\t']) else {
                continue;
            };
            let mut words = rest.split_ascii_whitespace();
            match keyword {
                "nameserver" if found.servers.len() < MAX_SERVERS => {
                    // A comment may follow the address without a space.
                    let word = words.next().and_then(|word| word.split(['#', ';']).next()).unwrap_or_default();
                    match word.parse() {
                        Ok(server) => found.servers.push(server),
                        Err(_) if is_scoped(word) => found.scoped = Some(word.to_owned()),
                        Err(_) => {}
                    }
                }
                // The last line of these two kinds counts.
                "domain" => search = Some(words.take(1).collect()),
                "search" => search = Some(words.collect()),
                "options" => words.for_each(|option| found.option(option)),
                _ => {}
            }
        }
        let own_domain = own_name.split_once('.').map(|(_, domain)| domain);
        let search = search.filter(|domains| !domains.is_empty()).unwrap_or_else(|| own_domain.into_iter().collect());
        found.search = search.into_iter().filter_map(domain).take(MAX_SEARCH).collect();
        found
    }

    fn option(&mut self, option: &str) {
        if option == "edns0" {
            self.edns0 = true;
        } else if let Some(dots) = option.strip_prefix("ndots:") {
            let digits: String = dots.chars().take_while(char::is_ascii_digit).collect();
            // glibc reads a missing number as zero, and a number that is too large as the largest one.
            self.ndots = if digits.is_empty() { 0 } else { digits.parse().unwrap_or(MAX_NDOTS).min(MAX_NDOTS) };
        }
    }

    /// Adds the name server on this host if the file names none, as glibc does.
    pub(super) fn or_local(mut self) -> Self {
        if self.servers.is_empty() && self.scoped.is_none() {
            self.servers.push(IpAddr::V4(Ipv4Addr::LOCALHOST));
        }
        self
    }
}

/// Reads a search domain. Skips the root: `search .` switches the search list off, and searching the root would only
/// repeat the question for the name itself.
fn domain(word: &str) -> Option<Name> {
    if word == "." {
        return None;
    }
    let mut name = Name::from_str_relaxed(word).ok()?;
    name.set_fqdn(true);
    Some(name)
}

/// What a hosts file says: the addresses of each name, and the names whose address cannot be used.
#[derive(Debug, Default)]
pub(super) struct HostsFile {
    names: HashMap<String, Vec<IpAddr>>,
    /// The names with an address that includes an interface, as in `fe80::1%eth0`.
    scoped: HashMap<String, String>,
}

impl HostsFile {
    pub(super) fn parse(text: &str) -> Self {
        let mut hosts = Self::default();
        for line in text.lines() {
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_ascii_whitespace();
            let Some(address) = words.next() else {
                continue;
            };
            let names = words.map(key);
            if let Ok(address) = address.parse::<IpAddr>() {
                names.for_each(|name| hosts.names.entry(name).or_default().push(address));
            } else if is_scoped(address) {
                names.for_each(|name| drop(hosts.scoped.insert(name, address.to_owned())));
            }
        }
        hosts
    }

    pub(super) fn addresses(&self, host: &str) -> Option<Addresses> {
        self.names.get(&key(host)).map(|addresses| Addresses::new(addresses.iter().copied()))
    }

    /// The address with an interface that the file gives for `host`, if it gives one.
    pub(super) fn scoped(&self, host: &str) -> Option<&str> {
        self.scoped.get(&key(host)).map(String::as_str)
    }
}

fn key(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

/// Returns whether the text is an IPv6 address together with its interface, as in `fe80::1%eth0`.
pub(crate) fn is_scoped(text: &str) -> bool {
    text.split_once('%').is_some_and(|(address, scope)| !scope.is_empty() && address.parse::<Ipv6Addr>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Vec<String>, Vec<String>, usize, bool) {
        let found = ResolvConf::parse(text, "web.corp.example");
        (
            found.servers.iter().map(ToString::to_string).collect(),
            found.search.iter().map(Name::to_string).collect(),
            found.ndots,
            found.edns0,
        )
    }

    #[test]
    fn odd_files_are_read_as_the_c_library_reads_them() {
        let own = || vec!["corp.example.".to_owned()];
        let servers = |servers: &[&str]| (servers.iter().map(ToString::to_string).collect(), own(), 1, false);
        for (text, expected) in [
            ("", servers(&[])),
            ("# nothing\n; nothing\n\n", servers(&[])),
            ("nameserver 10.0.0.1\r\n", servers(&["10.0.0.1"])),
            ("nameserver\t10.0.0.1\t# the first", servers(&["10.0.0.1"])),
            ("nameserver 10.0.0.1#x\nnameserver 10.0.0.2;x", servers(&["10.0.0.1", "10.0.0.2"])),
            ("nameserver 10.0.0.1 10.0.0.2 junk", servers(&["10.0.0.1"])),
            ("nameserver nowhere\nnameserver 10.0.0.1.2\nnameserver\nnameserver fdaa::3", servers(&["fdaa::3"])),
            (" nameserver 10.0.0.1\n#nameserver 10.0.0.2\nNameserver 10.0.0.3", servers(&[])),
            (
                "nameserver 1.0.0.1\nnameserver 1.0.0.2\nnameserver 1.0.0.3\nnameserver 1.0.0.4",
                servers(&["1.0.0.1", "1.0.0.2", "1.0.0.3"]),
            ),
            ("lookup file bind\nfamily inet4\nsortlist 130.155.160.0", servers(&[])),
        ] {
            assert_eq!(read(text), expected, "{text:?}");
        }
        let search = |text: &str| read(text).1;
        assert_eq!(search("search a.example bad..domain b.example"), ["a.example.", "b.example."]);
        assert_eq!(search(&format!("search {}.example b.example", "x".repeat(64))), ["b.example."]);
        assert_eq!(search("search a.example\nsearch b.example"), ["b.example."]);
        assert_eq!(search("search a.example\ndomain b.example c.example"), ["b.example."]);
        assert_eq!(search("search a.example b.example.\n"), ["a.example.", "b.example."]);
        assert_eq!(search("search\n"), ["corp.example."]);
        // systemd-resolved writes this to switch the search list off: the name itself is asked for anyway.
        assert_eq!(search("search ."), [""; 0]);
        assert_eq!(search("search . a.example"), ["a.example."]);
        assert_eq!(ResolvConf::parse("", "web").search, []);
        let many: Vec<String> = (0..100).map(|n| format!("d{n}.example")).collect();
        assert_eq!(search(&format!("search {}", many.join(" "))).len(), MAX_SEARCH);
        for (options, ndots, edns0) in [
            ("options ndots:5 timeout:1 attempts:9 rotate edns0 no-such-thing", 5, true),
            ("options ndots:99", 15, false),
            ("options ndots:99999999999999999999999", 15, false),
            ("options ndots:0", 0, false),
            ("options ndots:2x", 2, false),
            ("options ndots:", 0, false),
            ("options ndots:-1", 0, false),
            ("options ndots:2\noptions edns0", 2, true),
            ("options", 1, false),
        ] {
            assert_eq!((read(options).2, read(options).3), (ndots, edns0), "{options}");
        }
        assert_eq!(ResolvConf::parse("", "").or_local().servers, [IpAddr::from([127, 0, 0, 1])]);
    }

    #[test]
    fn a_hosts_file_with_odd_lines_tells_what_the_others_say() {
        let hosts = HostsFile::parse(
            "10.0.0.1 PG pg.internal # the primary\n\nnonsense pg\n10.0.0 pg\n10.0.0.2\n  fdaa::1\tpg\n\
             10.0.0.3 pg#comment\nfe80::1%eth0 far pg\n\u{fffd} pg\n",
        );
        let of = |host| hosts.addresses(host).map(|found| found.iter().map(|ip| ip.to_string()).collect::<Vec<_>>());
        assert_eq!(of("pg").unwrap(), ["10.0.0.1", "fdaa::1", "10.0.0.3"]);
        assert_eq!(of("pg.INTERNAL.").unwrap(), ["10.0.0.1"]);
        assert_eq!((of("far"), of("10.0.0.2")), (None, None));
        assert_eq!(hosts.scoped("FAR"), Some("fe80::1%eth0"));
        assert!(is_scoped("fe80::1%2") && !is_scoped("fe80::1") && !is_scoped("10.0.0.1%2") && !is_scoped("fe80::1%"));
    }
}
