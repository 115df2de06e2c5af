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

/// Weights of which the sum is at most that are taken as they are, and so are those of which the mean
/// is at most [`MEAN`], however many there are.
const SUM: u64 = 16_384;
const MEAN: u64 = 16;

/// By what the weights of a list are divided: 1, but where they are as large as no ratio needs.
///
/// `hash ... consistent` makes 160 points of 16 bytes for each unit of weight, in every worker: fifty
/// peers that somebody weighs by their megabytes would be a ring of gigabytes, and where there is no
/// memory for it nothing is served. With this bound it has 42 MB, and 16 units for each peer of a
/// large list. The sum is more than half of the bound then: a share of one percent is off by less than
/// a percent of itself.
///
/// It is a power of two, and not the greatest common divisor or the least number that would do: it
/// depends on all peers, and wherever it changes, the ring is another and nearly all keys move. So it
/// changes only where the sum doubles.
pub(crate) fn divisor(weights: impl Iterator<Item = u32>) -> u32 {
    let (number, sum) = weights.fold((0, 0), |(number, sum), it| (number + 1, sum + u64::from(it)));
    let most = SUM.max(MEAN * number);
    let divisor = sum.div_ceil(most).max(1).next_power_of_two();
    // Of 32-bit weights the mean divided by MEAN fits.
    u32::try_from(divisor).unwrap_or(u32::MAX)
}

impl Attributes {
    /// The same with its weight divided, to the nearest number; none becomes 0.
    pub(crate) fn divided(self, divisor: u32) -> Self {
        let weight = u64::from(self.weight) + u64::from(divisor / 2);
        let weight = u32::try_from(weight / u64::from(divisor)).unwrap_or(u32::MAX);
        Self { weight: weight.max(1), ..self }
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
    fn large_weights_are_divided_by_a_power_of_two() {
        let all = |weight, number| divisor(std::iter::repeat_n(weight, number));
        // Nobody notices it with weights that anybody would write by hand.
        assert_eq!([all(1, 0), all(1, 1), all(100, 50), all(16, 10_000), all(1, 100_000)], [1; 5]);
        assert_eq!([all(16_384, 1), all(16_385, 1), all(8192, 2), all(8193, 2)], [1, 2, 1, 2]);
        assert_eq!([all(65_535, 10), all(65_535, 50), all(u32::MAX, 1)], [64, 256, 1 << 18]);
        assert_eq!([all(17, 10_000), all(u32::MAX, 100_000)], [2, 1 << 28]);
        // It stays where single ones change.
        assert_eq!(divisor([vec![100; 999], vec![1]].concat().into_iter()), all(100, 1000));
    }

    #[test]
    fn weights_are_divided_to_the_nearest_number_and_none_is_lost() {
        let divided = |weight, divisor| {
            Attributes { weight, ..Attributes::default() }.divided(divisor).weight
        };
        let all = [(7, 1), (8, 4), (9, 4), (10, 4), (1, 4), (1, 1 << 28), (u32::MAX, 2)];
        let all = all.map(|(weight, divisor)| divided(weight, divisor));
        assert_eq!(all, [7, 2, 2, 3, 1, 1, 1 << 31]);
        let other = Attributes { weight: 8, max_conns: 5, ..Attributes::default() };
        assert_eq!(other.divided(2), Attributes { weight: 4, ..other });
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
