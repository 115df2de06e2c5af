//! What the peers of an upstream should be.

use std::collections::HashSet;
use std::net::SocketAddr;

use crate::label::Label;

/// One peer that should be in the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Which instance it is.
    pub label: Label,
    /// Where it listens.
    pub address: SocketAddr,
    /// In the backups' list.
    pub backup: bool,
    /// What balancers go by.
    pub attributes: Attributes,
}

/// What may change while a peer stays the same. The meanings are those of nginx's `server`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// At least 1.
    pub weight: u32,
    /// Connections at a time; 0 for no limit.
    pub max_conns: u32,
    /// Failures until it is left alone; 0 for never.
    pub max_fails: u32,
    /// In seconds.
    pub fail_timeout: u32,
    /// In the list, but gets no requests.
    pub down: bool,
}

impl Default for Attributes {
    /// nginx's own defaults.
    fn default() -> Self {
        Self { weight: 1, max_conns: 0, max_fails: 1, fail_timeout: 10, down: false }
    }
}

/// Brings the peers of all sources of an upstream into the one order and takes out duplicates.
///
/// The order is that of node, service ID and address: `hash` and `ip_hash` go by position, and two
/// nginx with the same configuration should choose the same. Peers that stay never change places,
/// so that an edit is a matter of links that are right one by one. Of several peers with one
/// address the first stays, primaries before backups, earlier sources before later ones: nginx
/// would treat them as different servers, with twice the weight and half the failures.
pub fn arrange(sources: impl IntoIterator<Item = Spec>) -> Vec<Spec> {
    let mut specs: Vec<Spec> = sources.into_iter().collect();
    // Stable: the sources' order stays within primaries and backups.
    specs.sort_by_key(|spec| spec.backup);
    let mut seen = HashSet::with_capacity(specs.len());
    specs.retain(|spec| seen.insert(spec.address));
    specs.sort_by(|a, b| (&a.label, a.address).cmp(&(&b.label, b.address)));
    specs
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn spec(id: &str, port: u16) -> Spec {
        Spec {
            label: Label::new("n1", id, 1),
            address: ([10, 0, 0, 1], port).into(),
            backup: false,
            attributes: Attributes::default(),
        }
    }

    #[test]
    fn sorted_by_node_and_id() {
        let mut other_node = spec("a", 1);
        other_node.label = Label::new("n0", "z", 1);
        let all = arrange([spec("b", 2), spec("a", 3), other_node]);
        let ids: Vec<_> = all.iter().map(|s| s.label.id()).collect();
        assert_eq!(ids, ["z", "a", "b"]);
    }

    #[test]
    fn the_addresses_of_an_instance_are_in_order() {
        let all = arrange([spec("a", 3), spec("a", 1), spec("b", 0), spec("a", 2)]);
        let ports: Vec<_> = all.iter().map(|s| s.address.port()).collect();
        assert_eq!(ports, [1, 2, 3, 0]);
    }

    #[test]
    fn one_peer_for_an_address_and_primaries_first() {
        let backup = Spec { backup: true, ..spec("a", 1) };
        let all = arrange([backup.clone(), spec("b", 1), spec("c", 1), spec("d", 2)]);
        let ids: Vec<_> = all.iter().map(|s| (s.label.id(), s.backup)).collect();
        assert_eq!(ids, [("b", false), ("d", false)]);
        assert_eq!(arrange([backup.clone()]), [backup]);
    }
}
