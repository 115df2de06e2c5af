//! One registered instance, as Consul's answer describes it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use thiserror::Error;

/// An instance of a service. It is known by its node and its service ID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// The node's name.
    pub node: String,
    /// The service ID, unique on its node.
    pub id: String,
    /// Where it listens, or why that cannot be said.
    pub address: Result<Endpoint, Unusable>,
    /// Its tags.
    pub tags: Vec<String>,
    /// The worst of its checks and its node's.
    pub status: Status,
    /// The ID of the check that says so; none while it is passing.
    pub check: Option<Box<str>>,
    /// Its weights.
    pub weights: Weights,
    /// What of its `Meta` is meant for nginx: the keys that begin with `nginx_`.
    pub meta: BTreeMap<String, String>,
}

/// A host and a port, as an instance is registered.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    /// The host.
    pub host: Host,
    /// The port, from 1.
    pub port: u16,
}

/// Consul takes any text for an address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Host {
    /// An address.
    Ip(IpAddr),
    /// A name, which has to be resolved.
    Name(Box<str>),
}

impl Instance {
    /// By what it is known: its node and its service ID.
    pub fn key(&self) -> (&str, &str) {
        (&self.node, &self.id)
    }

    /// The host name that has to be resolved before it can serve.
    pub fn name(&self) -> Option<&str> {
        match &self.address {
            Ok(Endpoint { host: Host::Name(name), .. }) => Some(name),
            _ => None,
        }
    }
}

/// How healthy an instance is, from the best to the worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    /// All checks pass, or there are none.
    Passing,
    /// A check warns.
    Warning,
    /// A check fails.
    Critical,
    /// An operator put the instance or its node into maintenance.
    Maintenance,
}

/// Weights for balancing, 0 to 65535; 0 takes the instance out of rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weights {
    /// While the status is passing.
    pub passing: u16,
    /// While the status is warning.
    pub warning: u16,
}

impl Default for Weights {
    /// Consul's own defaults.
    fn default() -> Self {
        Self { passing: 1, warning: 1 }
    }
}

impl Weights {
    /// The weight that holds while the status is `status`.
    pub fn at(self, status: Status) -> u16 {
        match status {
            Status::Warning => self.warning,
            Status::Passing | Status::Critical | Status::Maintenance => self.passing,
        }
    }
}

/// Why an instance has no address that could be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
pub enum Unusable {
    /// Neither an IP address nor a host name.
    #[error("invalid-address")]
    InvalidAddress,
    /// A host name, and no address of it is known.
    #[error("unresolved")]
    Unresolved,
    /// No port, or 0.
    #[error("no-port")]
    NoPort,
    /// A port that is no number from 1 to 65535.
    #[error("invalid-port")]
    InvalidPort,
}

/// Reads an address and a port as they stand in a registration. The catalog takes any text and
/// any number: `localhost`, 0 and 70000 are all possible.
pub(crate) fn address(host: &str, port: Option<i64>) -> Result<Endpoint, Unusable> {
    let host = match host.parse::<IpAddr>() {
        Ok(ip) if is_host(ip) => Host::Ip(ip),
        Err(_) if is_host_name(host) => Host::Name(host.into()),
        _ => return Err(Unusable::InvalidAddress),
    };
    match port {
        None => Err(Unusable::InvalidPort),
        Some(0) => Err(Unusable::NoPort),
        Some(port) => {
            let port = u16::try_from(port).map_err(|_| Unusable::InvalidPort)?;
            Ok(Endpoint { host, port })
        }
    }
}

/// Connecting to 0.0.0.0 reaches nginx's own host: never what was meant.
pub(crate) fn is_host(ip: IpAddr) -> bool {
    let ip = ip.to_canonical();
    !ip.is_unspecified() && !ip.is_multicast() && ip != IpAddr::V4(Ipv4Addr::BROADCAST)
}

/// RFC 1123's letters, digits, hyphens and dots, and the underscore that is common inside. A name
/// of digits and dots alone is a mistyped address.
fn is_host_name(text: &str) -> bool {
    let name = text.strip_suffix('.').unwrap_or(text);
    name.len() <= 253
        && name.bytes().any(|b| b.is_ascii_alphabetic())
        && name.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let ok = |h, p| address(h, Some(p)).unwrap();
        let ip = |host: &str, port| Endpoint { host: Host::Ip(host.parse().unwrap()), port };
        assert_eq!(ok("10.0.0.1", 80), ip("10.0.0.1", 80));
        assert_eq!(ok("fe80::1", 65535), ip("fe80::1", 65535));
        assert_eq!(ok("::ffff:1.2.3.4", 1), ip("::ffff:1.2.3.4", 1));
        for name in ["web.example", "localhost", "a_b", "web.example."] {
            assert_eq!(ok(name, 80), Endpoint { host: Host::Name(name.into()), port: 80 });
        }

        let err = |h, p| address(h, p).unwrap_err();
        assert_eq!(err("10.0.0.1", Some(0)), Unusable::NoPort);
        assert_eq!(err("10.0.0.1", Some(70000)), Unusable::InvalidPort);
        assert_eq!(err("10.0.0.1", Some(-1)), Unusable::InvalidPort);
        assert_eq!(err("10.0.0.1", None), Unusable::InvalidPort);
        assert_eq!(err("web.example", Some(0)), Unusable::NoPort);
        for bad in [
            "",
            " ",
            "10.0.0.256",
            "1.2.3",
            "[::1]",
            "a b",
            "a\n",
            "-a",
            "a..b",
            "0.0.0.0",
            "::ffff:0.0.0.0",
        ] {
            assert_eq!(err(bad, Some(80)), Unusable::InvalidAddress, "{bad:?}");
        }
    }

    #[test]
    fn statuses_are_ordered_from_good_to_bad() {
        use Status::*;
        assert!(Passing < Warning && Warning < Critical && Critical < Maintenance);
    }
}
