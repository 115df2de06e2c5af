//! What differs between the peers that are there and those that should be.

use std::collections::HashMap;
use std::net::SocketAddr;

use crate::label::Label;
use crate::spec::{Attributes, Spec};

/// A peer as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Which instance it is.
    pub label: Label,
    /// Where it listens.
    pub address: SocketAddr,
    /// Its attributes.
    pub attributes: Attributes,
}

/// How to get from the peers found to those wanted.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The list as it should be, in order.
    pub sequence: Vec<Step>,
    /// Which of those found go.
    pub remove: Vec<usize>,
}

/// One place of the new list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// One that was found stays.
    Keep {
        /// Its number among those found.
        found: usize,
        /// Its number among the specs.
        spec: usize,
        /// Whether its attributes change.
        change: bool,
    },
    /// A new one.
    Add {
        /// Its number among the specs.
        spec: usize,
    },
}

impl Plan {
    /// Compares. A peer is the same when address, node and service ID are: a new instance at an
    /// old address has not failed yet, and one that moved is another peer to nginx.
    pub fn new(found: &[Found], wanted: &[&Spec]) -> Self {
        // Most of a large list stays as it is: that what is before the first change and behind the last
        // one is the same, nothing has to be looked up for.
        let is_same = |(peer, want): &(&Found, &&Spec)| {
            peer.address == want.address && peer.label == want.label
        };
        let head = found.iter().zip(wanted).take_while(is_same).count();
        let rest = found.iter().skip(head).rev().zip(wanted.iter().skip(head).rev());
        let tail = rest.take_while(is_same).count();
        let middle = head..found.len() - tail;
        let mut index: HashMap<(SocketAddr, &Label), usize> = found
            .iter()
            .enumerate()
            .take(middle.end)
            .skip(middle.start)
            .map(|(n, peer)| ((peer.address, &peer.label), n))
            .collect();
        let sequence: Vec<Step> = wanted
            .iter()
            .enumerate()
            .map(|(spec, want)| {
                let behind = wanted.len() - spec;
                let known = if spec < head {
                    Some(spec)
                } else if behind <= tail {
                    Some(found.len() - behind)
                } else {
                    index.remove(&(want.address, &want.label))
                };
                match known {
                    Some(n) => Step::Keep {
                        found: n,
                        spec,
                        change: found.get(n).is_none_or(|peer| peer.attributes != want.attributes),
                    },
                    None => Step::Add { spec },
                }
            })
            .collect();
        // Twins cannot be: specs have one peer for an address. Were there any, one of them stays, and the
        // others go, too.
        let mut kept = vec![false; found.len()];
        for step in &sequence {
            if let Step::Keep { found, .. } = step
                && let Some(kept) = kept.get_mut(*found)
            {
                *kept = true;
            }
        }
        let remove = (0..found.len()).filter(|n| kept.get(*n) == Some(&false)).collect();
        Self { sequence, remove }
    }

    /// Whether the list is already as it should be.
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty()
            && self.sequence.iter().enumerate().all(|(place, step)| {
                matches!(step, Step::Keep { found, change: false, .. } if *found == place)
            })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::spec::arrange;
    use crate::spec::tests::spec;

    fn found(spec: &Spec) -> Found {
        Found { label: spec.label.clone(), address: spec.address, attributes: spec.attributes }
    }

    fn plan(found_: &[Spec], wanted: &[Spec]) -> Plan {
        let found: Vec<_> = found_.iter().map(found).collect();
        Plan::new(&found, &wanted.iter().collect::<Vec<_>>())
    }

    #[test]
    fn nothing_to_do() {
        assert!(plan(&[], &[]).is_empty());
        let all = [spec("a", 1), spec("b", 2)];
        assert!(plan(&all, &all).is_empty());
    }

    #[test]
    fn adds_removes_and_changes() {
        let mut heavy = spec("b", 2);
        heavy.attributes.weight = 7;
        let plan = plan(&[spec("a", 1), spec("b", 2)], &[heavy, spec("c", 3)]);
        assert_eq!(
            plan,
            Plan {
                sequence: vec![
                    Step::Keep { found: 1, spec: 0, change: true },
                    Step::Add { spec: 1 }
                ],
                remove: vec![0],
            }
        );
    }

    #[test]
    fn another_instance_at_the_same_address_is_another_peer() {
        let plan = plan(&[spec("a", 1)], &[spec("b", 1)]);
        assert_eq!(plan, Plan { sequence: vec![Step::Add { spec: 0 }], remove: vec![0] });
    }

    #[test]
    fn a_mere_change_of_order_is_a_change() {
        let (a, b) = (spec("a", 1), spec("b", 2));
        let plan = plan(&[b.clone(), a.clone()], &[a, b]);
        assert!(!plan.is_empty() && plan.remove.is_empty());
    }

    fn specs() -> impl Strategy<Value = Vec<Spec>> {
        proptest::collection::vec((0..6u8, 1..8u16, 1..3u32), 0..10).prop_map(|all| {
            arrange(all.into_iter().map(|(id, port, weight)| {
                let mut spec = spec(&id.to_string(), port);
                spec.attributes.weight = weight;
                spec
            }))
        })
    }

    proptest! {
        /// Carried out on a list of its own, the plan makes the wanted list of the found one, each
        /// found peer is kept or removed exactly once, and a second plan finds nothing to do.
        #[test]
        fn a_plan_carried_out_is_what_was_wanted(before in specs(), after in specs()) {
            let plan = plan(&before, &after);
            let mut used = plan.remove.clone();
            let mut result = Vec::new();
            for step in &plan.sequence {
                match *step {
                    Step::Keep { found, spec, change } => {
                        prop_assert_eq!(&before[found].label, &after[spec].label);
                        prop_assert_eq!(before[found].address, after[spec].address);
                        prop_assert_eq!(change, before[found].attributes != after[spec].attributes);
                        used.push(found);
                        result.push(Spec { attributes: after[spec].attributes, ..before[found].clone() });
                    }
                    Step::Add { spec } => result.push(after[spec].clone()),
                }
            }
            used.sort_unstable();
            prop_assert_eq!(used, (0..before.len()).collect::<Vec<_>>());
            prop_assert_eq!(&result, &after);
            prop_assert!(super::Plan::new(
                &result.iter().map(found).collect::<Vec<_>>(),
                &after.iter().collect::<Vec<_>>()
            ).is_empty());
        }
    }
}
