//! A loopback network for one test.
//!
//! Tests run in parallel, in several processes, perhaps in several checkouts. Each gets a
//! 127.A.B.0/24 of its own, so that fixed ports never meet. Connections that leave without a
//! bound address come from 127.0.0.1, so ephemeral ports are never in the way either.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

/// The host and port whose listening socket is the claim on a network: the kernel knows of it in
/// every process of the machine, and gives it up with the process, however that ends.
const CLAIM: (u8, u16) = (254, 19_999);

/// Ports are counted up from here: under the ephemeral ports of Linux (32768 and up), which any
/// connection of the machine may hold on 127.0.0.1 at any time.
const FIRST_PORT: u16 = 20_000;
const LAST_PORT: u16 = 32_000;

/// Networks are 127.64.0.0/24 to 127.127.255.0/24.
const NETWORKS: u16 = 64 * 256;

/// A loopback network. Clones share it; it is given back with the last of them.
#[derive(Clone)]
pub struct Net(Arc<Inner>);

struct Inner {
    /// The first three bytes of the network's addresses, or none for 127.0.0.1 alone.
    network: Option<[u8; 3]>,
    _claim: Option<TcpListener>,
    next_port: AtomicU16,
}

impl Net {
    /// A /24 that nobody else on this machine has.
    pub fn isolated() -> Net {
        // From a random place, so that a network is not taken again right after its last test,
        // while connections of that test are still in TIME_WAIT.
        let start = random();
        for n in 0..NETWORKS {
            let n = start.wrapping_add(n) % NETWORKS;
            let network = [127, 64 + (n >> 8) as u8, n as u8];
            let [a, b, c] = network;
            if let Ok(claim) = TcpListener::bind((Ipv4Addr::new(a, b, c, CLAIM.0), CLAIM.1)) {
                return Net(Arc::new(Inner {
                    network: Some(network),
                    _claim: Some(claim),
                    next_port: AtomicU16::new(FIRST_PORT),
                }));
            }
        }
        panic!("none of {NETWORKS} loopback networks is free, or 127.0.0.0/8 is not local here");
    }

    /// 127.0.0.1 with free ports, for the eyes of a person.
    pub fn localhost() -> Net {
        let first = FIRST_PORT + random() % (LAST_PORT - FIRST_PORT);
        Net(Arc::new(Inner { network: None, _claim: None, next_port: AtomicU16::new(first) }))
    }

    /// The address of the network's host `n`; on localhost always 127.0.0.1.
    pub fn ip(&self, n: u8) -> Ipv4Addr {
        assert!((1..CLAIM.0).contains(&n), "hosts are 1 to 253, not {n}");
        self.0.network.map_or(Ipv4Addr::LOCALHOST, |[a, b, c]| Ipv4Addr::new(a, b, c, n))
    }

    /// The next port that is free, for TCP and UDP, on every host of this network.
    ///
    /// Two processes that ask for ports of localhost at the same moment could be given the same
    /// one: that is what isolated networks are for.
    pub fn port(&self) -> u16 {
        let ip = self.0.network.map_or(Ipv4Addr::LOCALHOST, |[a, b, c]| {
            // On a network of our own only a listener on all addresses can be in the way, and it
            // is in the way on any host.
            Ipv4Addr::new(a, b, c, CLAIM.0)
        });
        for _ in FIRST_PORT..LAST_PORT {
            let next = |port| Some(if port >= LAST_PORT { FIRST_PORT } else { port + 1 });
            let port =
                match self.0.next_port.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next) {
                    Ok(port) | Err(port) => port,
                };
            if is_free(ip.into(), port) {
                return port;
            }
        }
        panic!("no port from {FIRST_PORT} to {LAST_PORT} is free on {ip}");
    }
}

fn is_free(ip: IpAddr, port: u16) -> bool {
    TcpListener::bind((ip, port)).is_ok() && UdpSocket::bind((ip, port)).is_ok()
}

/// The standard library seeds its hash maps at random; that is random enough here.
fn random() -> u16 {
    RandomState::new().hash_one(std::process::id()) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_do_not_meet_and_are_given_back() {
        let (one, two) = (Net::isolated(), Net::isolated());
        assert_ne!(one.ip(1), two.ip(1));

        let claim = (one.ip(1).octets(), CLAIM);
        let ([a, b, c, _], (host, port)) = claim;
        let bind = || TcpListener::bind((Ipv4Addr::new(a, b, c, host), port));
        assert!(bind().is_err());
        let clone = one.clone();
        drop(one);
        assert!(bind().is_err(), "a clone still has it");
        drop(clone);
        assert!(bind().is_ok());
    }

    #[test]
    fn ports_are_free_and_never_given_twice() {
        for net in [Net::isolated(), Net::localhost()] {
            let (first, second) = (net.port(), net.port());
            assert_ne!(first, second);
            TcpListener::bind((net.ip(1), first)).unwrap();
            UdpSocket::bind((net.ip(1), second)).unwrap();
        }
    }

    #[test]
    fn a_listener_on_all_addresses_is_stepped_over() {
        let net = Net::isolated();
        for _ in 0..100 {
            let next = net.0.next_port.load(Ordering::Relaxed);
            // Another test may listen on that port, on an address of its own; the next one then.
            if let Ok(_everywhere) = TcpListener::bind((Ipv4Addr::UNSPECIFIED, next)) {
                assert_ne!(net.port(), next);
                return;
            }
            net.port();
        }
        panic!("no port is free on all addresses");
    }
}
