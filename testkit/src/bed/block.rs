//! A block of loopback addresses that belongs to one cluster.

use std::hash::{BuildHasher as _, RandomState};
use std::net::{IpAddr, Ipv4Addr, TcpListener};

use crate::Error;

/// Below the range that systems give to outgoing connections.
const PORTS: std::ops::Range<u16> = 15432..15442;
const FIRST_SPARE: u8 = 10;
const DNS: u8 = 253;
const CLAIM: u8 = 254;

/// 127.a.b.0/24, one port. Held by a listener on its last address, so the kernel frees it when the process dies.
pub struct Block {
    a: u8,
    b: u8,
    pub port: u16,
    _claim: TcpListener,
}

impl Block {
    /// Claims a block that no other process holds.
    pub fn claim() -> Result<Self, Error> {
        for port in PORTS {
            // Another program that listens on all addresses makes every block fail: then try another port.
            for _ in 0..32 {
                let [a, b, ..] = RandomState::new().hash_one(port).to_le_bytes();
                let a = 10 + a % 191;
                if let Ok(claim) = TcpListener::bind((Ipv4Addr::new(127, a, b, CLAIM), port)) {
                    return Ok(Self { a, b, port, _claim: claim });
                }
            }
        }
        Err(Error::NoAddress { ports: (PORTS.start, PORTS.end - 1) })
    }

    fn addr(&self, last: u8) -> IpAddr {
        Ipv4Addr::new(127, self.a, self.b, last).into()
    }

    /// Of a server, counted from 0.
    pub fn node(&self, node: usize) -> IpAddr {
        self.addr(u8::try_from(node + 1).expect("few nodes"))
    }

    /// For proxies and traps, counted from 0.
    pub fn spare(&self, n: u8) -> IpAddr {
        let last = FIRST_SPARE.checked_add(n).filter(|last| *last < DNS);
        self.addr(last.expect("a block has 243 spare addresses"))
    }

    pub fn dns(&self) -> IpAddr {
        self.addr(DNS)
    }
}
