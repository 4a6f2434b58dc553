//! The names and ports of a Postgres app on Fly.io, as they are in its private DNS.
//!
//! This module decides which name to ask for, and asks nobody. Sources:
//! <https://fly.io/docs/networking/private-networking/> and the image `flyio/postgres-flex`.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};

/// The address of a Postgres app in the private network of Fly.io: a name of its `.internal` DNS and one of two ports.
///
/// It prints as `host:port`, ready for a connection string. docs/dns.md says which name and port go together.
///
/// ```
/// use tokio_postgres_failover::fly::Fly;
///
/// // All members, which the pool asks itself. This is the usual choice.
/// assert_eq!(Fly::app("my-pg").direct().to_string(), "my-pg.internal:5433");
/// assert_eq!(Fly::app("my-pg").region("ams").direct().to_string(), "ams.my-pg.internal:5433");
/// // What `fly pg attach` writes. The HAProxy of one of the nearest members leads to the primary.
/// assert_eq!(Fly::app("my-pg").nearest(2).to_string(), "top2.nearest.of.my-pg.internal:5432");
/// ```
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use tokio_postgres_failover::Pool;
/// use tokio_postgres_failover::fly::Fly;
///
/// let pool = Pool::builder(format!("postgres://app@{}/app", Fly::app("my-pg").direct()))?
///     .dns_servers([Fly::NAME_SERVER])
///     .build()?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[must_use = "it does nothing by itself: it is for a connection string"]
pub struct Fly {
    app: String,
    which: Which,
    port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Which {
    All,
    Region(String),
    Nearest(u8),
    Machine(String),
}

impl Fly {
    /// The name server of the private network, at the address that every machine on Fly.io reaches. Over `WireGuard` it
    /// is `::3` of the organization's own network, such as `fdaa:0:18::3`.
    pub const NAME_SERVER: SocketAddr =
        SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::new(0xfdaa, 0, 0, 0, 0, 0, 0, 3), 53, 0, 0));
    /// The port of HAProxy, which runs on every member. It leads to the member that it believes to be the primary.
    pub const HAPROXY: u16 = 5432;
    /// The port of the member's own PostgreSQL.
    pub const DIRECT: u16 = 5433;

    /// All started machines of the app: `<app>.internal`. The port is 5432 unless [`Fly::direct`] is called.
    pub fn app(name: impl Into<String>) -> Self {
        Self { app: name.into(), which: Which::All, port: Self::HAPROXY }
    }

    /// Only the machines in one region: `<region>.<app>.internal`.
    pub fn region(self, region: impl Into<String>) -> Self {
        Self { which: Which::Region(region.into()), ..self }
    }

    /// Only the `count` nearest machines: `top<count>.nearest.of.<app>.internal`. The primary need not be one of them,
    /// so leave the port at 5432.
    pub fn nearest(self, count: u8) -> Self {
        Self { which: Which::Nearest(count), ..self }
    }

    /// Only one machine: `<id>.vm.<app>.internal`. Its address may change, but its id does not.
    pub fn machine(self, id: impl Into<String>) -> Self {
        Self { which: Which::Machine(id.into()), ..self }
    }

    /// Connects to port 5433, which is each server itself, so that the pool finds out itself which one is the primary.
    pub fn direct(self) -> Self {
        Self { port: Self::DIRECT, ..self }
    }

    /// The DNS name.
    #[must_use]
    pub fn host(&self) -> String {
        let app = &self.app;
        match &self.which {
            Which::All => format!("{app}.internal"),
            Which::Region(region) => format!("{region}.{app}.internal"),
            Which::Nearest(count) => format!("top{count}.nearest.of.{app}.internal"),
            Which::Machine(id) => format!("{id}.vm.{app}.internal"),
        }
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The name whose TXT record lists the machines of the app and their regions: `vms.<app>.internal`. Ask for it with
    /// [`HickoryResolver::text`](crate::resolve::HickoryResolver::text), and read the answer with [`FlyMachine::read`].
    #[must_use]
    pub fn machines(&self) -> String {
        format!("vms.{}.internal", self.app)
    }
}

impl fmt::Display for Fly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host(), self.port)
    }
}

/// A machine of an app, from the TXT record of [`Fly::machines`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct FlyMachine {
    /// Its id.
    pub id: String,
    /// The region that it runs in.
    pub region: String,
}

/// The error of a TXT record that is not a list of machines.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a list of machines: {0:?}; expected `<id> <region>,<id> <region>`, as vms.<app>.internal has it")]
pub struct BadMachines(String);

impl FlyMachine {
    /// Reads one TXT record of [`Fly::machines`], which has pairs of id and region, separated by commas.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_postgres_failover::fly::{Fly, FlyMachine};
    /// use tokio_postgres_failover::resolve::HickoryResolver;
    ///
    /// let resolver = HickoryResolver::with_name_servers([Fly::NAME_SERVER]);
    /// for record in resolver.text(&Fly::app("my-pg").machines()).await? {
    ///     for machine in FlyMachine::read(&record)? {
    ///         println!("{} in {}", machine.id, machine.region);
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn read(record: &str) -> Result<Vec<Self>, BadMachines> {
        let machine = |pair: &str| {
            let mut words = pair.split_whitespace().map(str::to_owned);
            match (words.next(), words.next(), words.next()) {
                (Some(id), Some(region), None) => Ok(Self { id, region }),
                _ => Err(BadMachines(record.chars().take(100).collect())),
            }
        };
        if record.trim().is_empty() {
            return Ok(Vec::new());
        }
        record.split(',').map(machine).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_flys_dns() {
        let app = || Fly::app("my-pg");
        for (fly, printed) in [
            (app(), "my-pg.internal:5432"),
            (app().direct(), "my-pg.internal:5433"),
            (app().region("ams"), "ams.my-pg.internal:5432"),
            (app().nearest(3), "top3.nearest.of.my-pg.internal:5432"),
            (app().machine("148e21").direct(), "148e21.vm.my-pg.internal:5433"),
        ] {
            assert_eq!(fly.to_string(), printed);
            assert_eq!(format!("{}:{}", fly.host(), fly.port()), printed);
        }
        assert_eq!(app().region("ams").machines(), "vms.my-pg.internal");
        assert_eq!(Fly::NAME_SERVER.to_string(), "[fdaa::3]:53");
    }

    proptest::proptest! {
        #[test]
        fn whatever_a_record_says_is_read_or_refused(record: String) {
            let _ = FlyMachine::read(&record);
        }

        #[test]
        fn what_is_listed_is_read(pairs in proptest::collection::vec(("[0-9a-f]{1,14}", "[a-z]{3}"), 0..50)) {
            let list: Vec<_> = pairs.iter().map(|(id, region)| format!("{id} {region}")).collect();
            let read = FlyMachine::read(&list.join(",")).unwrap();
            let read: Vec<_> = read.into_iter().map(|machine| (machine.id, machine.region)).collect();
            proptest::prop_assert_eq!(read, pairs);
        }
    }

    #[test]
    fn machines_are_read_or_refused() {
        let machine = |id: &str, region: &str| FlyMachine { id: id.to_owned(), region: region.to_owned() };
        let two = vec![machine("148e21", "ams"), machine("9185ab", "cdg")];
        assert_eq!(FlyMachine::read("148e21 ams,9185ab cdg"), Ok(two.clone()));
        assert_eq!(FlyMachine::read(" 148e21 ams , 9185ab  cdg\n"), Ok(two));
        assert_eq!(FlyMachine::read(""), Ok(Vec::new()));
        for bad in ["148e21", "148e21 ams,", "148e21 ams extra", ",", "a b;c d"] {
            let error = FlyMachine::read(bad).unwrap_err().to_string();
            assert!(error.contains("expected"), "{bad}: {error}");
        }
    }
}
